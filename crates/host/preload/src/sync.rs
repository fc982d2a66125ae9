//! read, write and their kin on descriptors that are open for direct I/O.

use core::mem::MaybeUninit;

use libc::iovec;
use stableio_onepass as onepass;
use stableio_session::{Effect, Engine, Remark};

use crate::ask;
use crate::files::File;
use crate::gate::syscall;
use crate::io::{self, Dir, Request};
use crate::pool::{PAGE, Slot};
use crate::session;
use crate::site::Caller;
use crate::uncached;

/// A longer transfer is bounced in pieces of this size, one after the other.
const PIECE: usize = 4 << 20;
const _: () = assert!(PIECE.is_multiple_of(PAGE), "a cut keeps what is aligned aligned");
/// Entries of a vector that are copied to the stack.
const ON_STACK: usize = 8;
/// Most entries that the kernel takes.
const IOV_MAX: usize = 1024;

/// Where in a file a transfer goes.
#[derive(Clone, Copy)]
pub(crate) enum At {
    /// At the file's position, which moves.
    Position,
    Offset(i64),
}

/// A transfer that a program asks for.
#[derive(Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) dir: Dir,
    pub(crate) fd: i32,
    pub(crate) file: File,
    pub(crate) at: At,
    /// `RWF_…`, or 0.
    pub(crate) flags: i32,
    pub(crate) caller: Caller,
}

/// Does a transfer of one buffer.
pub(crate) fn buffer(transfer: Transfer, start: usize, len: usize) -> isize {
    run(transfer, &[iovec { iov_base: start as *mut _, iov_len: len }])
}

/// Does a transfer of a vector in the program's memory.
pub(crate) fn vector(transfer: Transfer, vector: *const iovec, count: usize) -> isize {
    with_vector(vector, count, |segs| run(transfer, segs))
}

/// Calls `f` with a copy of a vector that lies in the program's memory, taken once.
pub(crate) fn with_vector(
    vector: *const iovec,
    count: usize,
    f: impl FnOnce(&[iovec]) -> isize,
) -> isize {
    if count > IOV_MAX {
        return -(libc::EINVAL as isize);
    }
    let mut on_stack = [const { MaybeUninit::<iovec>::uninit() }; ON_STACK];
    let (slot, at) = if count <= ON_STACK {
        (None, on_stack.as_mut_ptr().cast::<iovec>())
    } else {
        match Slot::take(count * size_of::<iovec>()) {
            Some(slot) => (Some(slot), slot.start().cast()),
            None => return -(libc::ENOMEM as isize),
        }
    };
    // SAFETY: the vector is the program's, foreign, and may be inaccessible; the copy is ours and
    // large enough, and used only once it is filled. The signals are not blocked.
    let result = unsafe {
        match onepass::copy_in(vector.cast(), at.cast(), count * size_of::<iovec>()) {
            Ok(()) => f(core::slice::from_raw_parts(at, count)),
            Err(_) => -(libc::EFAULT as isize),
        }
    };
    if let Some(slot) = slot {
        slot.release();
    }
    result
}

/// Does a transfer. The vector is ours; what it points to is the program's.
fn run(transfer: Transfer, segs: &[iovec]) -> isize {
    if transfer.file.is_uncached() {
        return uncached::run(transfer, segs);
    }
    if !io::concerns(transfer.file, transfer.dir) {
        let result = native(transfer, segs);
        transfer.file.count(transfer.dir, result);
        return result;
    }
    let total = segs.iter().fold(0usize, |sum, seg| sum.saturating_add(seg.iov_len));
    if session::detects() {
        watched(transfer, segs)
    } else if total <= PIECE || transfer.flags & libc::RWF_ATOMIC != 0 {
        bounced(transfer, segs)
    } else {
        in_pieces(transfer, segs)
    }
}

/// The transfer as the program wants it, on this memory.
pub(crate) fn native(transfer: Transfer, segs: &[iovec]) -> isize {
    use libc::{
        SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read,
        SYS_readv, SYS_write, SYS_writev,
    };
    let Transfer { dir, fd, at, flags, .. } = transfer;
    let pick = |read, write| if dir == Dir::Read { read } else { write };
    let (vector, count) = (segs.as_ptr(), segs.len());
    // SAFETY: the kernel checks the memory that a vector points to; the vector is ours.
    unsafe {
        match (at, segs) {
            _ if flags != 0 => {
                let offset = if let At::Offset(offset) = at { offset } else { -1 };
                let number = pick(SYS_preadv2, SYS_pwritev2);
                syscall!(number, fd, vector, count, offset, 0, flags)
            }
            (At::Position, [one]) => {
                syscall!(pick(SYS_read, SYS_write), fd, one.iov_base, one.iov_len)
            }
            (At::Offset(offset), [one]) => {
                let number = pick(SYS_pread64, SYS_pwrite64);
                syscall!(number, fd, one.iov_base, one.iov_len, offset)
            }
            (At::Position, _) => syscall!(pick(SYS_readv, SYS_writev), fd, vector, count),
            (At::Offset(offset), _) => {
                syscall!(pick(SYS_preadv, SYS_pwritev), fd, vector, count, offset, 0)
            }
        }
    }
}

/// By way of private memory. Waits for memory if others have it under I/O.
fn bounced(transfer: Transfer, segs: &[iovec]) -> isize {
    let request = request(transfer, segs);
    let mut waits = 0;
    loop {
        match io::run(&request, |segs| native(transfer, segs)) {
            Ok(result) => return result,
            Err(error) if error == -(libc::EAGAIN as isize) && waits < 100_000 => {
                waits += 1;
                nap();
            }
            Err(error) if error == -(libc::EAGAIN as isize) => return -(libc::ENOMEM as isize),
            Err(error) => return error,
        }
    }
}

/// A long transfer, in pieces that are cut at whole pages. Ends at the first that is short, as the
/// kernel ends at the first extent that fails.
fn in_pieces(transfer: Transfer, segs: &[iovec]) -> isize {
    let mut done = 0;
    let mut rest = segs.iter().copied();
    let mut seg = rest.next();
    while let Some(mut now) = seg {
        let mut piece = [iovec { iov_base: core::ptr::null_mut(), iov_len: 0 }; ON_STACK];
        let (mut count, mut len) = (0, 0);
        loop {
            let take = now.iov_len.min(PIECE - len);
            piece[count] = iovec { iov_base: now.iov_base, iov_len: take };
            (count, len) = (count + 1, len + take);
            now.iov_base = now.iov_base.wrapping_byte_add(take);
            now.iov_len -= take;
            seg = if now.iov_len > 0 { Some(now) } else { rest.next() };
            match seg {
                Some(next) if len < PIECE && count < piece.len() => now = next,
                _ => break,
            }
        }
        let at = match transfer.at {
            At::Position => At::Position,
            At::Offset(offset) => At::Offset(offset + done),
        };
        let result = bounced(Transfer { at, ..transfer }, &piece[..count]);
        if result < 0 {
            return if done > 0 { done as isize } else { result };
        }
        done += result as i64;
        if (result as usize) < len {
            break;
        }
    }
    done as isize
}

/// From the program's own memory, looked at before and after.
fn watched(transfer: Transfer, segs: &[iovec]) -> isize {
    match io::begin(&request(transfer, segs)) {
        Ok(io) => io.end(native(transfer, io.iovs())),
        Err(_) => {
            unwatched(transfer.dir);
            native(transfer, segs)
        }
    }
}

/// Counts a write that can not be watched.
pub(crate) fn unwatched(dir: Dir) {
    if let Some(session) = session::get()
        && dir == Dir::Write
    {
        session.totals.unwatched.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    }
}

fn request<'a>(transfer: Transfer, segs: &'a [iovec]) -> Request<'a> {
    let offset = match transfer.at {
        At::Offset(offset) => offset as u64,
        At::Position if session::detects() => position(transfer.fd),
        At::Position => u64::MAX,
    };
    let Transfer { dir, file, caller, .. } = transfer;
    Request { dir, engine: Engine::Sync, file, segs, offset, caller }
}

/// The file's position, as far as it can be known.
fn position(fd: i32) -> u64 {
    // SAFETY: a system call without memory.
    let at = unsafe { syscall!(libc::SYS_lseek, fd, 0, libc::SEEK_CUR) };
    u64::try_from(at).unwrap_or(u64::MAX)
}

/// Lets others finish.
pub(crate) fn nap() {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 100_000 };
    // SAFETY: reads the time there.
    unsafe { syscall!(libc::SYS_nanosleep, &raw const time, 0) };
}

/// A transfer into a file whose data comes neither from private memory nor from the program's:
/// splice, sendfile, copy_file_range. `Some`: it is refused with this error.
pub(crate) fn spliced_into(file: File, error: i32) -> Option<isize> {
    if !file.is_direct() {
        return None;
    }
    if session::detects() {
        unwatched(Dir::Write);
        return None;
    }
    if file.effect() != Effect::Bounce {
        return None;
    }
    let mut name = [0; 16];
    let verb: &[u8] = if session::best_effort() { b": not protected: " } else { b": refused: " };
    ask::say(
        Remark::Splice,
        &[
            ask::program(&mut name),
            verb,
            b"splice, sendfile or copy_file_range into a file that is open for direct I/O",
        ],
    );
    let counted = file.shared();
    if session::best_effort() {
        counted.inspect(|file| {
            file.unprotected.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        });
        return None;
    }
    counted.inspect(|file| {
        file.refused.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    });
    Some(-(error as isize))
}
