//! Judging entries: which need private memory or the ring behind, and which can not be.

use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering};

use libc::iovec;
use stableio_session::{FILES, Remark};

use super::abi::{
    BUFFER_SELECT, FILE_INDEX_ALLOC, FIXED_FILE, MSG_SEND_FD, OP_CLOSE, OP_FADVISE, OP_FALLOCATE,
    OP_FILES_UPDATE, OP_FSYNC, OP_LAST_KNOWN, OP_LINK_TIMEOUT, OP_MSG_RING, OP_NOP, OP_OPENAT,
    OP_OPENAT2, OP_POLL_REMOVE, OP_READ_MULTISHOT, OP_SPLICE, OP_SYNC_FILE_RANGE, OP_TIMEOUT,
    POLL_UPDATE_USER_DATA, Sqe,
};
use super::back::After;
use super::files::read_fd;
use super::submit::{Inner, Way, bytes_of, dir_of, failure};
use super::{FOREIGN_COMPLETIONS, Ring, injects, read, refuses};
use crate::calls;
use crate::files::{self, File};
use crate::gate::syscall;
use crate::io::{self, Dir};
use crate::session;
use crate::site::Caller;
use crate::sync;
use crate::uncached::{self, RWF_DONTCACHE};

impl Inner {
    /// Decides about the entries of a chain: all of them go behind, or none.
    pub(super) fn judge(&mut self, ring: &'static Ring, chain: Range<u32>) {
        for i in chain.clone() {
            self.judge_one(ring, i, chain.len() > 1);
        }
        if !self.mediates(&chain) {
            return;
        }
        let can = chain.clone().all(|i| self.can_go_behind(i)) && ring.make_back().is_some();
        for i in chain {
            if can {
                let plan = self.plan_of(i);
                if !matches!(plan.way, Way::Mediate(_)) {
                    plan.way = Way::Mediate(After::Nothing);
                }
            } else if matches!(self.plan_of(i).way, Way::Mediate(_)) {
                self.can_not(
                    i,
                    b"direct I/O in a chain, or in an order (IOSQE_IO_DRAIN), that \
                    can not be kept",
                );
            }
        }
    }

    /// Whether an entry means the same to the ring behind.
    fn can_go_behind(&mut self, i: u32) -> bool {
        let sqe = self.plan_of(i).before;
        let alike = dir_of(sqe.opcode).is_some()
            || matches!(
                sqe.opcode,
                OP_NOP
                    | OP_FSYNC
                    | OP_SYNC_FILE_RANGE
                    | OP_FALLOCATE
                    | OP_FADVISE
                    | OP_TIMEOUT
                    | OP_LINK_TIMEOUT
            );
        alike && (sqe.flags & FIXED_FILE == 0 || self.files.is_mirrored(sqe.fd as u32))
    }

    /// An entry can not be covered: it fails, or passes.
    fn can_not(&mut self, i: u32, what: &[u8]) {
        let refused = refuses(Remark::Ring, what);
        let plan = self.plan_of(i);
        let (dir, shared) = (dir_of(plan.before.opcode), plan.file.shared());
        if refused {
            (plan.after, plan.way) = (failure(&plan.before, libc::EINVAL), Way::Native);
            shared.inspect(|file| {
                file.refused.fetch_add(1, Ordering::Relaxed);
            });
            return;
        }
        plan.way = dir.map_or(Way::Native, Way::Counted);
        if session::detects() {
            sync::unwatched(dir.unwrap_or(Dir::Write));
        } else {
            shared.inspect(|file| {
                file.unprotected.fetch_add(1, Ordering::Relaxed);
            });
        }
    }

    /// What an entry's `fd` means.
    fn file_of(&mut self, sqe: &Sqe) -> File {
        if sqe.flags & FIXED_FILE != 0 { self.files.get(sqe.fd as u32) } else { files::of(sqe.fd) }
    }

    fn judge_one(&mut self, ring: &'static Ring, i: u32, linked: bool) {
        let sqe = self.plan_of(i).before;
        if let Some(dir) = dir_of(sqe.opcode) {
            let file = self.file_of(&sqe);
            if file.is_direct() {
                self.plan_of(i).file = file;
                self.judge_transfer(i, dir);
            }
            return;
        }
        match sqe.opcode {
            OP_OPENAT | OP_OPENAT2 => self.judge_open(i, linked),
            // A ring that closes itself can not be let go of in here: its record stays.
            OP_CLOSE if sqe.file_index == 0 && files::ring_of(sqe.fd).is_none() => {
                files::forget(sqe.fd);
            }
            OP_CLOSE if sqe.file_index != 0 => {
                self.files.set(sqe.file_index - 1, -1, || ring.make_back());
            }
            OP_FILES_UPDATE => self.judge_update(i),
            OP_SPLICE => {
                let file = self.file_of(&sqe);
                if let Some(error) = sync::spliced_into(file, libc::EINVAL) {
                    self.plan_of(i).after = failure(&sqe, -error as i32);
                }
            }
            OP_MSG_RING
                if sqe.addr == MSG_SEND_FD && self.files.get(sqe.addr3 as u32).is_direct() =>
            {
                self.can_not(i, b"a file that is open for direct I/O, sent to another ring");
            }
            OP_MSG_RING if sqe.addr == MSG_SEND_FD => {}
            OP_MSG_RING => FOREIGN_COMPLETIONS.store(true, Ordering::Relaxed),
            OP_POLL_REMOVE if sqe.len & POLL_UPDATE_USER_DATA != 0 => self.counted = false,
            OP_LAST_KNOWN.. if sqe.opcode > OP_LAST_KNOWN => {
                let file = self.file_of(&sqe);
                if file.is_direct() {
                    self.plan_of(i).file = file;
                    self.can_not(
                        i,
                        b"an operation that this version does not know, on a file \
                        that is open for direct I/O",
                    );
                }
            }
            _ => {}
        }
    }

    /// A transfer on a file that is open for direct I/O.
    fn judge_transfer(&mut self, i: u32, dir: Dir) {
        let (counted, polls) = (self.counted, self.polls());
        let plan = self.plan_of(i);
        let (sqe, file) = (plan.before, plan.file);
        if file.is_uncached() {
            return self.judge_uncached(i, dir);
        }
        if !io::concerns(file, dir) {
            plan.way = Way::Counted(dir);
        } else if sqe.flags & BUFFER_SELECT != 0 || sqe.opcode == OP_READ_MULTISHOT {
            self.can_not(i, b"direct I/O into buffers that the kernel picks");
        } else if dir == Dir::Write && !session::detects() && plan.alone && counted {
            plan.way = Way::Bounce;
        } else if polls {
            // The ring behind does not, so it would do what this one can not.
            self.can_not(i, b"direct I/O by a ring that polls the device (IORING_SETUP_IOPOLL)");
        } else {
            plan.way = Way::Mediate(After::Nothing);
        }
    }

    /// A transfer on a file that the program opened for direct I/O, and that is open without.
    fn judge_uncached(&mut self, i: u32, dir: Dir) {
        let plan = self.plan_of(i);
        let (sqe, file) = (plan.before, plan.file);
        plan.way = Way::Counted(dir);
        if let Some(error) = uncached::refuses(sqe.op_flags as i32) {
            (plan.after, plan.way) = (failure(&sqe, -error as i32), Way::Native);
            return;
        }
        if dir == Dir::Write {
            file.shared().inspect(|file| {
                file.fallen_back.fetch_add(1, Ordering::Relaxed);
            });
        }
        let fixed = sqe.flags & FIXED_FILE != 0;
        let fd = if fixed { self.files.fd(sqe.fd as u32) } else { sqe.fd };
        if has_dontcache(file, fd) {
            self.plan_of(i).after.op_flags |= RWF_DONTCACHE as u32;
        } else if fd >= 0 {
            let after = After::Settle { fd, dir, offset: sqe.off as i64 };
            file.count(dir, bytes_of(&sqe));
            self.plan_of(i).way = Way::Mediate(after);
        }
    }

    /// An opening: if it is for direct I/O, it is done here, in the way that `openat` goes.
    fn judge_open(&mut self, i: u32, linked: bool) {
        let plan = self.plan_of(i);
        let sqe = plan.before;
        let flags = if sqe.opcode == OP_OPENAT {
            u64::from(sqe.op_flags)
        } else {
            // The first word of `struct open_how`.
            read::<u64>(sqe.off).unwrap_or(0)
        };
        if flags & libc::O_DIRECT as u64 == 0 {
            return;
        }
        if sqe.file_index != 0 || linked || !injects() {
            let what = b"a file opened for direct I/O by a ring, in a chain or without descriptor";
            return self.can_not(i, what);
        }
        let (dir, path) = (sqe.fd as usize, sqe.addr as usize);
        let (number, args) = if sqe.opcode == OP_OPENAT {
            let (flags, mode) = (sqe.op_flags as usize, sqe.len as usize);
            (libc::SYS_openat, [dir, path, flags, mode, 0, 0])
        } else {
            (libc::SYS_openat2, [dir, path, sqe.off as usize, sqe.len as usize, 0, 0])
        };
        // SAFETY: the program's own call, that it asks the ring for.
        let fd = unsafe { calls::take(number, &args, Caller::NOBODY) }
            .unwrap_or(-(libc::EINVAL as isize)) as i32;
        plan.after = sqe.with_result(fd);
        if fd >= 0 {
            plan.way = Way::Opened(fd);
        }
    }

    /// Files that the ring itself is to register.
    fn judge_update(&mut self, i: u32) {
        let sqe = self.plan_of(i).before;
        if sqe.off as u32 != FILE_INDEX_ALLOC {
            self.plan_of(i).way = Way::Update;
            return;
        }
        let mut fds = (0..sqe.len).map_while(|i| read_fd(sqe.addr + u64::from(i) * 4));
        if fds.any(|fd| fd >= 0 && files::of(fd).is_direct()) {
            self.can_not(
                i,
                b"a file that is open for direct I/O, registered where the kernel picks",
            );
        }
    }
}

/// Whether the file takes `RWF_DONTCACHE`; tried once, by reading where there can be nothing.
fn has_dontcache(file: File, fd: i32) -> bool {
    static TRIED: [AtomicU8; FILES] = [const { AtomicU8::new(0) }; FILES];
    let slot = file.slot();
    if TRIED.get(slot).is_some_and(|tried| tried.swap(1, Ordering::Relaxed) == 0) {
        let mut byte = 0u8;
        let one = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let beyond = i64::MAX - 4096;
        // SAFETY: reads into the byte that is there.
        let answer = unsafe {
            let flags = RWF_DONTCACHE;
            syscall!(libc::SYS_preadv2, fd, &raw const one, 1, beyond, 0, flags)
        };
        if answer != 0 {
            uncached::lacks_dontcache(slot);
        }
    }
    uncached::has_dontcache(slot)
}
