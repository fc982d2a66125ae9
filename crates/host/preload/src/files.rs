//! Which descriptors are open for direct I/O, and what is done with each.
//!
//! One word for each descriptor: unknown, plain, or a file of the session and the effect on it. It
//! is filled when the descriptor is made, or else when it is first used, by asking the kernel for
//! its flags and the launcher for the file.
//!
//! - **FD-1** A word that says `plain` is written only over `unknown`, by compare-and-swap: who
//!   looked at a descriptor that was closed meanwhile can not cover a new direct one.
//! - **FD-2** Whatever gives a descriptor another meaning, or the direct flag, sets its word to
//!   unknown, or to what it now is, before the program knows of it.

use core::mem::zeroed;
use core::sync::atomic::{AtomicU32, Ordering};

use stableio_session::{Answer, Effect, FILES, Remark, Session};

use crate::ask;
use crate::gate::{call_with_cookie, syscall};
use crate::io::Dir;
use crate::session;
use crate::uring;

/// Descriptors that have a word; the others are looked at each time.
const WORDS: usize = 1 << 16;

static TABLE: [AtomicU32; WORDS] = [const { AtomicU32::new(0) }; WORDS];
static IN_FLIGHT: [AtomicU32; FILES] = [const { AtomicU32::new(0) }; FILES];

/// What is known of an open file: a word of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct File(u32);

impl File {
    const UNKNOWN: File = File(0);
    /// Not open for direct I/O: nothing is done with it.
    pub(crate) const PLAIN: File = File(1);
    const DIRECT: u32 = 1 << 31;
    /// Not a file but a ring of io_uring: `uring` knows it by the number in the other bits.
    const RING: u32 = 1 << 30;

    fn of(answer: Answer) -> File {
        File(File::DIRECT | (answer.slot % FILES as u32) << 16 | (answer.bits & 0xffff))
    }

    fn ring(self) -> Option<u32> {
        (self.0 & (File::DIRECT | File::RING) == File::RING).then_some(self.0 & !File::RING)
    }

    fn answer(self) -> Answer {
        Answer { slot: (self.0 & !File::DIRECT) >> 16, bits: self.0 & 0xffff }
    }

    /// Whether the program opened it for direct I/O.
    #[inline]
    pub(crate) fn is_direct(self) -> bool {
        self.0 & File::DIRECT != 0
    }

    /// What is done with it.
    pub(crate) fn effect(self) -> Effect {
        // What can not be understood is bounced, which is always right.
        self.answer().effect().unwrap_or(Effect::Bounce)
    }

    /// Whether reads go to private memory first.
    pub(crate) fn private_reads(self) -> bool {
        self.answer().private_reads() && matches!(self.effect(), Effect::Bounce | Effect::Untouched)
    }

    /// Whether it is open without the direct flag although the program asked for it.
    pub(crate) fn is_uncached(self) -> bool {
        self.is_direct() && self.effect() == Effect::Uncached
    }

    /// Its slot in the session.
    pub(crate) fn slot(self) -> usize {
        self.answer().slot as usize
    }

    /// Where the session counts it.
    pub(crate) fn shared(self) -> Option<&'static stableio_session::File> {
        session::get().and_then(|session: &Session| session.files.get(self.slot()))
    }

    /// Counts an I/O that begins.
    pub(crate) fn begun(self) {
        let Some(in_flight) = IN_FLIGHT.get(self.slot()) else { return };
        let now = u64::from(in_flight.fetch_add(1, Ordering::Relaxed) + 1);
        if let Some(shared) = self.shared()
            && shared.depth.load(Ordering::Relaxed) < now
        {
            shared.depth.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// Counts an I/O that ended with this result, and how it was done.
    pub(crate) fn ended(self, dir: Dir, result: isize, bounced: bool) {
        self.abandoned();
        self.count(dir, result);
        let Some(shared) = self.shared() else { return };
        match dir {
            Dir::Write if bounced => shared.bounced.fetch_add(1, Ordering::Relaxed),
            Dir::Read if bounced => shared.reads_bounced.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
    }

    /// Takes back that an I/O began.
    pub(crate) fn abandoned(self) {
        if let Some(in_flight) = IN_FLIGHT.get(self.slot()) {
            in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Counts an I/O that went to the kernel as it was.
    pub(crate) fn count(self, dir: Dir, result: isize) {
        let Some(shared) = self.shared() else { return };
        match dir {
            Dir::Read => shared.reads.fetch_add(1, Ordering::Relaxed),
            Dir::Write => {
                let bytes = u64::try_from(result).unwrap_or(0);
                shared.write_bytes.fetch_add(bytes, Ordering::Relaxed);
                shared.writes.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// What is known of the descriptor; it is found out if it is not.
#[inline]
pub(crate) fn of(fd: i32) -> File {
    match TABLE.get(fd as usize).map(|word| word.load(Ordering::Relaxed)) {
        Some(0) | None => find_out(fd),
        Some(word) => File(word),
    }
}

#[cold]
fn find_out(fd: i32) -> File {
    if fd < 0 || session::get().is_none() {
        return File::PLAIN;
    }
    // SAFETY: a system call without memory.
    let flags = unsafe { syscall!(libc::SYS_fcntl, fd, libc::F_GETFL) };
    if flags < 0 {
        return File::PLAIN;
    }
    let file = if flags as i32 & libc::O_DIRECT == 0 { File::PLAIN } else { classify(fd) };
    // An inherited descriptor can have come here without an opening that we saw.
    let file = settle(fd, file, flags as i32).unwrap_or(file);
    if let Some(word) = TABLE.get(fd as usize) {
        // FD-1. A direct one may be written over whatever is there: it errs on the safe side.
        match file {
            File::PLAIN => {
                let _ = word.compare_exchange(0, file.0, Ordering::AcqRel, Ordering::Relaxed);
            }
            direct => put(word, direct),
        }
    }
    file
}

/// What to do with a file that is open for direct I/O.
fn classify(fd: i32) -> File {
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let (known, stat) = unsafe {
        let mut stat: libc::stat = zeroed();
        (syscall!(libc::SYS_fstat, fd, &raw mut stat) == 0, stat)
    };
    let kind = stat.st_mode & libc::S_IFMT;
    // A pipe has the same flag, with another meaning.
    if known && kind != libc::S_IFREG && kind != libc::S_IFBLK {
        return File::PLAIN;
    }
    let Some(session) = session::get() else { return File::PLAIN };
    if let Some(slot) = session.find(stat.st_dev, stat.st_ino) {
        let bits = session.files[slot].answer.load(Ordering::Acquire);
        if bits != 0 {
            return File::of(Answer { slot: slot as u32, bits });
        }
    }
    match ask::about(fd) {
        Some(answer) if answer.bits != 0 => File::of(answer),
        _ => {
            ask::say(
                Remark::NoAnswer,
                &[b"the launcher does not answer: direct I/O is bounced without knowing whether \
                    it has to be"],
            );
            let effect = if session::detects() { Effect::Untouched } else { Effect::Bounce };
            File::of(Answer::new(0, effect, true))
        }
    }
}

/// Takes note of a descriptor that an opening gave, with these flags asked for.
///
/// # Errors
///
/// `-EINVAL` if the policy refuses direct I/O here; the descriptor is closed then.
pub(crate) fn opened(fd: isize, flags: i32) -> isize {
    if fd < 0 {
        return fd;
    }
    let number = fd as i32;
    if flags & libc::O_DIRECT == 0 || flags & libc::O_PATH != 0 {
        set(number, File::PLAIN);
        return fd;
    }
    let file = classify(number);
    match settle(number, file, flags) {
        Some(file) => {
            set(number, file);
            fd
        }
        None => {
            close(number);
            -(libc::EINVAL as isize)
        }
    }
}

/// Does to an open file what its effect asks for. `None`: it is refused.
fn settle(fd: i32, file: File, flags: i32) -> Option<File> {
    if !file.is_direct() {
        return Some(file);
    }
    match file.effect() {
        Effect::Refuse => {
            if let Some(shared) = file.shared() {
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
            None
        }
        Effect::Uncached => {
            // SAFETY: a system call without memory.
            unsafe { syscall!(libc::SYS_fcntl, fd, libc::F_SETFL, flags & !libc::O_DIRECT) };
            Some(file)
        }
        Effect::Untouched | Effect::Bounce => Some(file),
    }
}

/// Sets the flags of an open file, as `fcntl(F_SETFL)` does, and takes note.
pub(crate) fn set_flags(fd: i32, flags: i32) -> isize {
    let before = of(fd);
    let wanted = if before.is_uncached() { flags & !libc::O_DIRECT } else { flags };
    // SAFETY: a system call without memory. With the cookie, as it may ask for direct I/O.
    let result = unsafe {
        call_with_cookie(
            libc::SYS_fcntl,
            [fd as usize, libc::F_SETFL as usize, wanted as usize, 0, 0],
        )
    };
    if result < 0 {
        return result;
    }
    if before.ring().is_some() {
        return result;
    }
    if flags & libc::O_DIRECT == 0 {
        forget(fd);
        return result;
    }
    // The flag belongs to the open file: other descriptors of it are direct now, too.
    forget_plain();
    let file = if before.is_direct() { before } else { classify(fd) };
    match settle(fd, file, flags) {
        Some(file) => set(fd, file),
        None => {
            forget(fd);
            // SAFETY: a system call without memory.
            unsafe { syscall!(libc::SYS_fcntl, fd, libc::F_SETFL, flags & !libc::O_DIRECT) };
            return -(libc::EINVAL as isize);
        }
    }
    result
}

/// The flags of an open file as the program may see them: as it set them.
pub(crate) fn flags_as_asked(fd: i32, flags: isize) -> isize {
    if flags >= 0 && of(fd).is_uncached() { flags | libc::O_DIRECT as isize } else { flags }
}

/// Takes note that `new` is now what `old` is.
pub(crate) fn duplicated(old: i32, new: isize) -> isize {
    if new >= 0
        && let Some(word) = TABLE.get(new as usize)
    {
        let known = TABLE.get(old as usize).map_or(0, |word| word.load(Ordering::Relaxed));
        put(word, File(known));
    }
    new
}

/// The number of the ring that the descriptor is.
pub(crate) fn ring_of(fd: i32) -> Option<u32> {
    File(TABLE.get(fd as usize)?.load(Ordering::Acquire)).ring()
}

/// Takes note that the descriptor is the ring of this number.
pub(crate) fn set_ring(fd: i32, number: u32) {
    set(fd, File(File::RING | number));
}

/// A descriptor that is the ring of this number.
pub(crate) fn some_ring_fd(number: u32) -> Option<i32> {
    let fd =
        TABLE.iter().position(|word| File(word.load(Ordering::Acquire)).ring() == Some(number));
    fd.map(|fd| fd as i32)
}

/// Takes note that what were rings are none of this process.
pub(crate) fn forget_rings() {
    for word in &TABLE {
        if File(word.load(Ordering::Relaxed)).ring().is_some() {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// Takes note that the descriptor is about to be closed, or means something that we have not seen.
pub(crate) fn forget(fd: i32) {
    set(fd, File::UNKNOWN);
}

/// The same for a range of them, both ends included.
pub(crate) fn forget_range(first: u32, last: u32) {
    for fd in first..=last.min(WORDS as u32 - 1) {
        put(&TABLE[fd as usize], File::UNKNOWN);
    }
}

/// Whatever was found not to be direct may be so now.
fn forget_plain() {
    for word in &TABLE {
        let _ = word.compare_exchange(File::PLAIN.0, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

fn set(fd: i32, file: File) {
    if let Some(word) = TABLE.get(fd as usize) {
        put(word, file);
    }
}

/// Writes a word. Rings count the descriptors that mean them.
fn put(word: &AtomicU32, file: File) {
    if let Some(number) = file.ring() {
        uring::joined(number);
    }
    let before = File(word.swap(file.0, Ordering::AcqRel));
    if let Some(number) = before.ring() {
        uring::left(number);
    }
}

/// Closes a descriptor of ours, or of the program.
pub(crate) fn close(fd: i32) -> isize {
    forget(fd);
    // SAFETY: a system call without memory.
    unsafe { syscall!(libc::SYS_close, fd) }
}
