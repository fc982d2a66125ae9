//! The policy `uncached`: through the page cache, and out of it again.
//!
//! The kernel's own way is `RWF_DONTCACHE` (Linux 6.14): it starts writeback at once and drops the
//! pages when they are clean. Where a file system has no such thing, a write waits for writeback,
//! so that its errors reach the writer, and drops the pages itself.

use core::sync::atomic::{AtomicU8, Ordering};

use libc::iovec;
use stableio_session::{FILES, Remark};

use crate::ask;
use crate::gate::syscall;
use crate::io::Dir;
use crate::sync::{At, Transfer, native};

/// `RWF_DONTCACHE` of linux/fs.h, since 6.14.
pub(crate) const RWF_DONTCACHE: i32 = 0x80;

const UNKNOWN: u8 = 0;
const LACKS: u8 = 2;

/// By slot of the file: whether its file system has `RWF_DONTCACHE`.
static DONTCACHE: [AtomicU8; FILES] = [const { AtomicU8::new(UNKNOWN) }; FILES];

/// Does a transfer on a file that the program opened for direct I/O and that is open without.
pub(crate) fn run(transfer: Transfer, segs: &[iovec]) -> isize {
    if let Some(error) = refuses(transfer.flags) {
        return error;
    }
    let mut result = -(libc::EOPNOTSUPP as isize);
    if has_dontcache(transfer.file.slot()) {
        let flags = transfer.flags | RWF_DONTCACHE;
        result = native(Transfer { flags, ..transfer }, segs);
        if result == -(libc::EOPNOTSUPP as isize) {
            lacks_dontcache(transfer.file.slot());
        }
    }
    if result == -(libc::EOPNOTSUPP as isize) {
        result = written_back(transfer, native(transfer, segs));
    }
    transfer.file.count(transfer.dir, result);
    if transfer.dir == Dir::Write
        && let Some(file) = transfer.file.shared()
    {
        file.fallen_back.fetch_add(1, Ordering::Relaxed);
    }
    result
}

/// The error for an I/O with these flags, if it can not be done through the page cache.
pub(crate) fn refuses(flags: i32) -> Option<isize> {
    if flags & libc::RWF_ATOMIC == 0 {
        return None;
    }
    ask::say(Remark::Atomic, &[b"an atomic write was refused: buffered writes can not be atomic"]);
    Some(-(libc::EOPNOTSUPP as isize))
}

/// Whether to try `RWF_DONTCACHE` on the file in this slot.
pub(crate) fn has_dontcache(slot: usize) -> bool {
    DONTCACHE.get(slot).is_none_or(|known| known.load(Ordering::Relaxed) != LACKS)
}

/// Takes note that it was refused.
pub(crate) fn lacks_dontcache(slot: usize) {
    if let Some(known) = DONTCACHE.get(slot) {
        known.store(LACKS, Ordering::Relaxed);
    }
}

/// Waits for the writeback of what was written, drops it from the page cache, and returns the
/// result: the error if writeback failed.
fn written_back(transfer: Transfer, result: isize) -> isize {
    if result <= 0 {
        return result;
    }
    let offset = match transfer.at {
        At::Offset(offset) => offset,
        At::Position => {
            // SAFETY: a system call without memory.
            let now = unsafe { syscall!(libc::SYS_lseek, transfer.fd, 0, libc::SEEK_CUR) };
            now as i64 - result as i64
        }
    };
    settle(transfer.fd, transfer.dir, offset, result)
}

/// Writes back (a write), and drops from the page cache, what lies there in the file.
pub(crate) fn settle(fd: i32, dir: Dir, offset: i64, result: isize) -> isize {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: system calls without memory.
    unsafe {
        if dir == Dir::Write {
            let synced = syscall!(libc::SYS_sync_file_range, fd, offset, result, all);
            // What has no pages to write back (a pipe, a file in memory) answers so.
            let nothing = synced == -(libc::ESPIPE as isize) || synced == -(libc::EINVAL as isize);
            if synced < 0 && !nothing {
                return synced;
            }
        }
        syscall!(libc::SYS_fadvise64, fd, offset, result, libc::POSIX_FADV_DONTNEED);
    }
    result
}
