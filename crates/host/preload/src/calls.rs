//! What this library does instead of a system call, by number.
//!
//! Three ways lead here: a hook by name, `syscall()`, and the net, which catches the instruction
//! itself. [`take`] does what concerns us; what does not, the way it came by lets through.

use stableio_onepass as onepass;

use crate::files;
use crate::gate::{call, call_with_cookie, syscall};
use crate::io::Dir;
use crate::site::Caller;
use crate::sync::{self, At, Transfer};
use crate::{aio, process, signals, uring};

/// Number 333 of arch/x86/entry/syscalls/syscall_64.tbl, which the `libc` crate lacks.
pub(crate) const SYS_IO_PGETEVENTS: i64 = 333;

/// Does the system call: in our way if it concerns us, else as it is.
///
/// # Safety
///
/// It is the program's own, with its own arguments.
pub(crate) unsafe fn perform(number: i64, args: &[usize; 6], caller: Caller) -> isize {
    process::arm_thread();
    // SAFETY: the caller's promise.
    unsafe { take(number, args, caller).unwrap_or_else(|| call(number, *args)) }
}

/// Does the system call if it concerns us.
///
/// # Safety
///
/// It is the program's own, with its own arguments.
pub(crate) unsafe fn take(number: i64, args: &[usize; 6], caller: Caller) -> Option<isize> {
    let fd = args[0] as i32;
    match number {
        libc::SYS_read => buffer(Dir::Read, args, At::Position, caller),
        libc::SYS_write => buffer(Dir::Write, args, At::Position, caller),
        libc::SYS_pread64 => buffer(Dir::Read, args, At::Offset(args[3] as i64), caller),
        libc::SYS_pwrite64 => buffer(Dir::Write, args, At::Offset(args[3] as i64), caller),
        libc::SYS_readv => vector(Dir::Read, args, At::Position, 0, caller),
        libc::SYS_writev => vector(Dir::Write, args, At::Position, 0, caller),
        libc::SYS_preadv => vector(Dir::Read, args, At::Offset(args[3] as i64), 0, caller),
        libc::SYS_pwritev => vector(Dir::Write, args, At::Offset(args[3] as i64), 0, caller),
        libc::SYS_preadv2 => vector(Dir::Read, args, at(args[3] as i64), args[5] as i32, caller),
        libc::SYS_pwritev2 => vector(Dir::Write, args, at(args[3] as i64), args[5] as i32, caller),
        libc::SYS_open => {
            let flags = args[1] as i32;
            // SAFETY: the caller's promise.
            Some(unsafe { open([libc::AT_FDCWD as usize, args[0], args[1], args[2]], flags) })
        }
        libc::SYS_openat => {
            let [dir, path, flags, mode, ..] = *args;
            // SAFETY: the caller's promise.
            Some(unsafe { open([dir, path, flags, mode], flags as i32) })
        }
        // SAFETY: the caller's promise.
        libc::SYS_openat2 => Some(unsafe { openat2(args) }),
        libc::SYS_creat => {
            // SAFETY: the caller's promise.
            let result = unsafe { call(number, *args) };
            Some(files::opened(result, 0))
        }
        // SAFETY: the caller's promise.
        libc::SYS_fcntl => unsafe { fcntl(args) },
        libc::SYS_close => Some(files::close(fd)),
        libc::SYS_close_range => {
            if args[2] as u32 & libc::CLOSE_RANGE_CLOEXEC == 0 {
                files::forget_range(args[0] as u32, args[1] as u32);
            }
            None
        }
        libc::SYS_dup | libc::SYS_dup2 | libc::SYS_dup3 => {
            // SAFETY: the caller's promise.
            let new = unsafe { call(number, *args) };
            Some(files::duplicated(fd, new))
        }
        // Programs go on with read and write when these say so.
        libc::SYS_sendfile => sync::spliced_into(files::of(fd), libc::EINVAL),
        libc::SYS_splice => sync::spliced_into(files::of(args[2] as i32), libc::EINVAL),
        libc::SYS_copy_file_range => sync::spliced_into(files::of(args[2] as i32), libc::EXDEV),
        libc::SYS_recvmsg => {
            // SAFETY: the caller's promise; the kernel has filled the message if it succeeded.
            unsafe {
                let got = call(number, *args);
                if got >= 0 {
                    received(args[1] as *const libc::msghdr);
                }
                Some(got)
            }
        }
        libc::SYS_pidfd_getfd => {
            // SAFETY: the caller's promise.
            let got = unsafe { call(number, *args) };
            files::forget(got as i32);
            Some(got)
        }
        libc::SYS_io_setup
        | libc::SYS_io_destroy
        | libc::SYS_io_submit
        | libc::SYS_io_getevents
        | SYS_IO_PGETEVENTS
        | libc::SYS_io_cancel => {
            // SAFETY: the caller's promise.
            unsafe { aio::take(number, args, caller) }
        }
        libc::SYS_io_uring_setup | libc::SYS_io_uring_enter | libc::SYS_io_uring_register => {
            // SAFETY: the caller's promise.
            unsafe { uring::take(number, args, caller) }
        }
        // SAFETY: the caller's promise.
        libc::SYS_rt_sigaction => unsafe { signals::take_sigaction(args) },
        // SAFETY: the caller's promise.
        libc::SYS_execve | libc::SYS_execveat => unsafe { process::take_exec(number, args) },
        _ => None,
    }
}

/// Where a transfer goes whose position may be the file's own (`preadv2` and `pwritev2`: -1).
pub(crate) fn at(offset: i64) -> At {
    if offset == -1 { At::Position } else { At::Offset(offset) }
}

fn buffer(dir: Dir, args: &[usize; 6], at: At, caller: Caller) -> Option<isize> {
    let fd = args[0] as i32;
    let file = files::of(fd);
    file.is_direct()
        .then(|| sync::buffer(Transfer { dir, fd, file, at, flags: 0, caller }, args[1], args[2]))
}

fn vector(dir: Dir, args: &[usize; 6], at: At, flags: i32, caller: Caller) -> Option<isize> {
    let fd = args[0] as i32;
    let file = files::of(fd);
    file.is_direct().then(|| {
        let transfer = Transfer { dir, fd, file, at, flags, caller };
        sync::vector(transfer, args[1] as *const _, args[2])
    })
}

/// `openat`, with the cookie that lets direct I/O through the net.
///
/// # Safety
///
/// `args` are those of the system call, from the program.
unsafe fn open(args: [usize; 4], flags: i32) -> isize {
    let [dir, path, bits, mode] = args;
    // SAFETY: the caller's promise.
    let fd = unsafe { call_with_cookie(libc::SYS_openat, [dir, path, bits, mode, 0]) };
    files::opened(fd, flags)
}

/// # Safety
///
/// `args` are those of the system call, from the program.
unsafe fn openat2(args: &[usize; 6]) -> isize {
    // The first word of `struct open_how` is the flags; what is decided is about what was read.
    let mut how = [0u64; 8];
    let size = args[3];
    if size > size_of_val(&how) {
        return -(libc::E2BIG as isize);
    }
    // SAFETY: the program's memory is foreign, ours is large enough.
    let read = unsafe { onepass::copy_in(args[2] as *const u8, how.as_mut_ptr().cast(), size) };
    if read.is_err() {
        return -(libc::EFAULT as isize);
    }
    let how_at = how.as_ptr() as usize;
    // SAFETY: the caller's promise; the structure is ours, of this size.
    let fd = unsafe { call_with_cookie(libc::SYS_openat2, [args[0], args[1], how_at, size, 0]) };
    files::opened(fd, how[0] as i32)
}

/// # Safety
///
/// `args` are those of the system call, from the program.
unsafe fn fcntl(args: &[usize; 6]) -> Option<isize> {
    let (fd, command) = (args[0] as i32, args[1] as i32);
    match command {
        libc::F_SETFL => Some(files::set_flags(fd, args[2] as i32)),
        libc::F_GETFL => {
            // SAFETY: a system call without memory.
            let flags = unsafe { syscall!(libc::SYS_fcntl, fd, command) };
            Some(files::flags_as_asked(fd, flags))
        }
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
            // SAFETY: a system call without memory.
            let new = unsafe { syscall!(libc::SYS_fcntl, fd, command, args[2]) };
            Some(files::duplicated(fd, new))
        }
        _ => None,
    }
}

/// Takes note of descriptors that came with a message (`SCM_RIGHTS`): what they are is found out
/// when they are used.
///
/// # Safety
///
/// The kernel has filled the message.
pub(crate) unsafe fn received(message: *const libc::msghdr) {
    // SAFETY: the kernel wrote the control messages of a message that the caller vouches for.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<i32>();
                let bytes = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for i in 0..bytes / size_of::<i32>() {
                    files::forget(data.add(i).read_unaligned());
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
}
