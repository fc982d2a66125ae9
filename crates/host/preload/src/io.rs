//! One I/O between submission and completion, whatever interface it came by.
//!
//! ```text
//! begin ── copies what must be copied ──> Io ── iovs() ──> the kernel ── end(result) ──> result
//! ```
//!
//! | I/O | `begin` | the kernel gets | `end` |
//! |---|---|---|---|
//! | write, bounced | copies the data once | the copy | |
//! | read, bounced | | private memory | copies out |
//! | write, watched | copies the data | the program's memory | compares |
//! | read, watched | | the program's memory | |
//!
//! - **IO-1** Each byte of a bounced write is loaded once; what the kernel does with the copy, and
//!   how often it reads it, the program can not influence.
//! - **IO-2** Each segment's copy lies at the same offset within a page as the segment, and the
//!   segments stay as many: the kernel's answers about alignment and vectors are those that the
//!   program would have got.
//! - **IO-3** What `begin` took, `end` gives back; if `begin` fails, it has given all back.
//! - **IO-4** A watched I/O is known by an [`Io`] from before the kernel hears of it until after
//!   `end` looked at the memory: two I/Os on one buffer are always seen.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use libc::iovec;
use stableio_onepass as onepass;
use stableio_session::{Effect, Engine, Remark};

use crate::ask;
use crate::files::File;
use crate::free::Free;
use crate::pool::{PAGE, Slot};
use crate::session;
use crate::site::{Caller, Site};
use crate::watch;

/// Direction of an I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dir {
    Read,
    Write,
}

/// An I/O that a program asks for.
pub(crate) struct Request<'a> {
    pub(crate) dir: Dir,
    pub(crate) engine: Engine,
    pub(crate) file: File,
    /// Where the data lies; the vector itself is ours, copied from the program.
    pub(crate) segs: &'a [iovec],
    /// Where in the file; `u64::MAX`: at its own position.
    pub(crate) offset: u64,
    /// Where in the program.
    pub(crate) caller: Caller,
}

/// An I/O under way: a record in a table of this process. Whoever holds it ends it, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Io(u32);

/// Whether I/O in this direction on the file needs an [`Io`]; if not, it goes to the kernel as it
/// is.
pub(crate) fn concerns(file: File, dir: Dir) -> bool {
    match dir {
        _ if session::detects() => true,
        Dir::Write => file.effect() == Effect::Bounce,
        Dir::Read => file.private_reads(),
    }
}

/// Most I/Os that a process has under way through this library.
pub(crate) const MOST: usize = 8192;
/// Segments that a record holds itself; a longer vector lies in a slot.
pub(crate) const INLINE_SEGS: usize = 4;

/// A record. Its holder alone touches `body`; the atomics are for those who look for overlaps.
pub(crate) struct Record {
    /// Number plus one of the next free record.
    next: AtomicU32,
    /// 0: free; else [`Dir`] as [`Record::dir_of`] has it, set once `shared_segs` are.
    pub(crate) in_flight: AtomicU32,
    /// The first segments in the program's memory: start and length.
    pub(crate) shared_segs: [[AtomicUsize; 2]; INLINE_SEGS],
    /// Place that submitted it, for a finding about another I/O.
    pub(crate) site: AtomicU32,
    body: UnsafeCell<MaybeUninit<Body>>,
}

/// What the holder knows.
pub(crate) struct Body {
    pub(crate) dir: Dir,
    pub(crate) engine: Engine,
    pub(crate) file: File,
    pub(crate) offset: u64,
    pub(crate) len: usize,
    pub(crate) submitted_ns: u64,
    /// Thread that submitted it.
    pub(crate) submitter: u32,
    pub(crate) site: Site,
    /// Whether the kernel works on the copy (bounced) or on the program's memory (watched).
    bounced: bool,
    count: usize,
    user: [iovec; INLINE_SEGS],
    private: [iovec; INLINE_SEGS],
    /// Longer vectors: the program's, then the private one.
    vectors: Option<Slot>,
    /// The copy.
    data: Option<Slot>,
}

const NO_SEG: iovec = iovec { iov_base: core::ptr::null_mut(), iov_len: 0 };

// SAFETY: `body` is touched by the record's holder alone (taken off the free list by one
// compare-and-swap); the rest is atomic.
unsafe impl Sync for Record {}

impl Record {
    #[expect(clippy::declare_interior_mutable_const, reason = "only to fill the table")]
    const NEW: Record = Record {
        next: AtomicU32::new(0),
        in_flight: AtomicU32::new(0),
        shared_segs: [const { [const { AtomicUsize::new(0) }; 2] }; INLINE_SEGS],
        site: AtomicU32::new(0),
        // Zeros, so that the table takes no room in the file.
        body: UnsafeCell::new(MaybeUninit::zeroed()),
    };

    /// The value of `in_flight` for a direction.
    pub(crate) fn dir_of(dir: Dir) -> u32 {
        match dir {
            Dir::Read => 1,
            Dir::Write => 2,
        }
    }
}

static RECORDS: [Record; MOST] = [const { Record::NEW }; MOST];
static FREE: Free = Free::new();
/// Records that were ever used: the others are free, and in no list.
static USED: AtomicUsize = AtomicUsize::new(0);

/// The records that may be in flight.
pub(crate) fn records() -> &'static [Record] {
    &RECORDS[..USED.load(Ordering::Acquire).min(MOST)]
}

fn take_record() -> Option<u32> {
    FREE.take(|index| Some(&RECORDS.get(index as usize)?.next)).or_else(|| {
        let fresh = |used| Some(used + 1).filter(|used| *used <= MOST);
        let index = USED.fetch_update(Ordering::AcqRel, Ordering::Acquire, fresh);
        index.ok().map(|index| index as u32)
    })
}

fn give_record(index: u32) {
    let record = &RECORDS[index as usize];
    record.in_flight.store(0, Ordering::Release);
    FREE.give(index, &record.next);
}

/// A forked child has none of its parent's I/Os under way.
pub(crate) fn after_fork() {
    for record in records() {
        record.in_flight.store(0, Ordering::Relaxed);
    }
    FREE.clear();
    USED.store(0, Ordering::Relaxed);
}

/// Begins an I/O that concerns us ([`concerns`]).
///
/// # Errors
///
/// `-EFAULT` if the program's memory can not be read; `-EAGAIN` if the memory of the session, or
/// the table, is used up by I/Os under way: it will be there when some of them have ended;
/// `-EINVAL` for more than any slot holds.
pub(crate) fn begin(request: &Request) -> Result<Io, isize> {
    let index = take_record().ok_or(-(libc::EAGAIN as isize))?;
    let io = Io(index);
    // SAFETY: the record is ours since `take_record`.
    let body = unsafe { &mut *io.record().body.get() }.write(Body::new(request));
    if let Err(error) = body.fill(request) {
        body.drop_memory();
        give_record(index);
        return Err(error);
    }
    if !body.bounced {
        watch::begin(io, request);
    }
    request.file.begun();
    Ok(io)
}

/// Does a bounced I/O here and now: `transfer` is given the private vector, and returns the
/// kernel's result. The same as [`begin`] and [`Io::end`], without a record for others to see.
///
/// # Errors
///
/// As [`begin`].
pub(crate) fn run(
    request: &Request,
    transfer: impl FnOnce(&[iovec]) -> isize,
) -> Result<isize, isize> {
    let mut body = Body::new(request);
    if let Err(error) = body.fill(request) {
        body.drop_memory();
        return Err(error);
    }
    request.file.begun();
    let result = transfer(body.private());
    Ok(body.finish(result))
}

impl Io {
    /// Its number: below [`MOST`], and free for another I/O once this one has ended.
    pub(crate) fn index(self) -> u32 {
        self.0
    }

    /// The I/O of this number, which the caller holds.
    pub(crate) fn from_index(index: u32) -> Option<Io> {
        ((index as usize) < MOST).then_some(Io(index))
    }

    /// What the kernel is to be given: valid until [`Io::end`].
    pub(crate) fn iovs(self) -> &'static [iovec] {
        let body = self.body();
        if body.bounced { body.private() } else { body.user() }
    }

    /// Ends it with the kernel's result (bytes, or a negative error number), before the program
    /// hears of it. Returns what the program is to hear.
    pub(crate) fn end(self, result: isize) -> isize {
        if !self.body().bounced {
            watch::end(self, result);
        }
        let answer = self.body().finish(result);
        give_record(self.0);
        answer
    }

    /// Ends it as never submitted: nothing is compared, copied or counted.
    pub(crate) fn cancel(self) {
        self.body().file.abandoned();
        self.body().drop_memory();
        give_record(self.0);
    }

    /// The record's shared part.
    pub(crate) fn record(self) -> &'static Record {
        &RECORDS[self.0 as usize]
    }

    /// What the holder knows. The reference must not be kept over [`Io::end`].
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn body(self) -> &'static mut Body {
        // SAFETY: the holder of an `Io` is alone with its record (see `Record`), and each function
        // here uses the reference up before it hands the `Io` on. `begin` has written it.
        unsafe { (*self.record().body.get()).assume_init_mut() }
    }
}

impl Body {
    fn new(request: &Request) -> Body {
        Body {
            dir: request.dir,
            engine: request.engine,
            file: request.file,
            offset: request.offset,
            len: request.segs.iter().fold(0, |sum, seg| sum.saturating_add(seg.iov_len)),
            submitted_ns: 0,
            submitter: 0,
            site: Site::NONE,
            bounced: !session::detects(),
            count: request.segs.len(),
            user: [NO_SEG; INLINE_SEGS],
            private: [NO_SEG; INLINE_SEGS],
            vectors: None,
            data: None,
        }
    }

    /// Takes memory and copies what is to be copied.
    fn fill(&mut self, request: &Request) -> Result<(), isize> {
        let again = -(libc::EAGAIN as isize);
        if self.count > INLINE_SEGS {
            let bytes = 2 * self.count * size_of::<iovec>();
            self.vectors = Some(Slot::take(bytes).ok_or(again)?);
        }
        self.user_mut().copy_from_slice(request.segs);
        let copies = self.bounced || self.dir == Dir::Write;
        if !copies {
            return Ok(());
        }
        let too_long = -(libc::EINVAL as isize);
        let room = self.lay_out(0).filter(|room| *room <= crate::pool::LARGEST).ok_or(too_long)?;
        let Some(data) = Slot::take(room) else {
            say_full();
            return Err(again);
        };
        self.data = Some(data);
        self.lay_out(data.start() as usize);
        match self.dir {
            Dir::Read => Ok(()),
            Dir::Write => self.copy_in(),
        }
    }

    /// Sets the private vector so that the copy begins at `start`, aligned to a page (IO-2), and
    /// returns how many bytes it takes; `None` if that is more than there can be.
    fn lay_out(&mut self, start: usize) -> Option<usize> {
        let mut at = start;
        for i in 0..self.count {
            let seg = self.user()[i];
            let behind = at % PAGE;
            let wanted = seg.iov_base as usize % PAGE;
            at = at.checked_add((wanted + PAGE - behind) % PAGE)?;
            self.private_mut()[i] = iovec { iov_base: at as *mut _, iov_len: seg.iov_len };
            at = at.checked_add(seg.iov_len).filter(|at| *at <= isize::MAX as usize)?;
        }
        Some(at - start)
    }

    fn copy_in(&self) -> Result<(), isize> {
        for (from, to) in self.user().iter().zip(self.private()) {
            // SAFETY: the program's memory is foreign, and may be inaccessible; the copy is ours,
            // of this length, and nobody else's before this returns. The signals are not blocked
            // (`signals.rs`).
            let copied =
                unsafe { onepass::copy_in(from.iov_base.cast(), to.iov_base.cast(), from.iov_len) };
            copied.map_err(|_| -(libc::EFAULT as isize))?;
        }
        Ok(())
    }

    /// Copies the first `len` bytes out; false if the program's memory can not be written.
    fn copy_out(&self, len: usize) -> bool {
        let mut left = len;
        for (to, from) in self.user().iter().zip(self.private()) {
            let now = left.min(from.iov_len);
            // SAFETY: as in `copy_in`; the kernel is done with the private memory, and has filled
            // this much of it.
            let copied =
                unsafe { onepass::copy_out(from.iov_base.cast(), to.iov_base.cast(), now) };
            if copied.is_err() {
                return false;
            }
            left -= now;
        }
        true
    }

    /// The program's vector.
    pub(crate) fn user(&self) -> &'static [iovec] {
        let at = match self.vectors {
            Some(slot) => slot.start().cast(),
            None => self.user.as_ptr(),
        };
        // SAFETY: `count` entries lie there: in the record, which is static, or in its slot. Both
        // are the holder's until `end`.
        unsafe { core::slice::from_raw_parts(at, self.count) }
    }

    /// The private vector.
    pub(crate) fn private(&self) -> &'static [iovec] {
        let at = match self.vectors {
            // SAFETY: the slot has room for twice `count`.
            Some(slot) => unsafe { slot.start().cast::<iovec>().add(self.count) },
            None => self.private.as_ptr().cast_mut(),
        };
        // SAFETY: as in `user`.
        unsafe { core::slice::from_raw_parts(at, self.count) }
    }

    fn user_mut(&mut self) -> &mut [iovec] {
        let at = match self.vectors {
            Some(slot) => slot.start().cast(),
            None => self.user.as_mut_ptr(),
        };
        // SAFETY: as in `user`; the borrow of the body makes it the only one.
        unsafe { core::slice::from_raw_parts_mut(at, self.count) }
    }

    fn private_mut(&mut self) -> &mut [iovec] {
        let at = match self.vectors {
            // SAFETY: the slot has room for twice `count`.
            Some(slot) => unsafe { slot.start().cast::<iovec>().add(self.count) },
            None => self.private.as_mut_ptr(),
        };
        // SAFETY: as in `user_mut`.
        unsafe { core::slice::from_raw_parts_mut(at, self.count) }
    }

    /// After the kernel, and the look at the memory: copies out what was read, counts, gives the
    /// memory back. Returns what the program is to hear.
    fn finish(&mut self, result: isize) -> isize {
        let mut answer = result;
        let reads = self.bounced && self.dir == Dir::Read;
        if reads && result > 0 && !self.copy_out(result as usize) {
            answer = -(libc::EFAULT as isize);
        }
        self.file.ended(self.dir, answer, self.bounced);
        self.drop_memory();
        answer
    }

    fn drop_memory(&mut self) {
        for slot in [self.vectors.take(), self.data.take()].into_iter().flatten() {
            slot.release();
        }
    }
}

#[cold]
fn say_full() {
    ask::say(
        Remark::NoMemory,
        &[b"all private memory is under I/O: some of it waits (--pool makes it larger)"],
    );
}
