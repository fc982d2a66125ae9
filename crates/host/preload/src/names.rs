//! The names that stand in front of the C library's: reading, writing, opening, closing.
//!
//! A hook is two functions. The one with the name passes its stack pointer along as the sixth
//! argument, so that the other knows where it was called from ([`Caller`]); none of these functions
//! has more than five arguments of its own. A descriptor that is not open for direct I/O goes to
//! the C library's function, which is also a cancellation point.

use core::arch::naked_asm;
use core::ffi::{c_char, c_int, c_void};

use libc::iovec;

use crate::calls;
use crate::files;
use crate::gate::{answer, real};
use crate::io::Dir;
use crate::site::Caller;
use crate::sync::{self, At, Transfer};

/// Defines the function of this name, and passes its calls to `$inner` with the stack pointer as
/// the sixth argument.
macro_rules! hook {
    ($($name:ident)+ => $inner:path) => {$(
        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name() {
            core::arch::naked_asm!("mov r9, rsp", "jmp {inner}", inner = sym $inner)
        }
    )+};
}
pub(crate) use hook;

/// Where the hook with this stack pointer was called from.
///
/// # Safety
///
/// `stack` is the stack pointer at the entry of a function.
#[inline]
pub(crate) unsafe fn caller(stack: *const usize) -> Caller {
    // SAFETY: a return address lies there.
    Caller { address: unsafe { *stack }, stack: stack as usize }
}

/// Defines the hooks of one transfer of a buffer.
macro_rules! buffer {
    ($($name:ident)+ => $inner:ident, $real:literal, $dir:ident, $($at:ident)?) => {
        hook!($($name)+ => $inner);
        unsafe extern "C" fn $inner(
            fd: c_int, start: *mut c_void, len: usize, _offset: i64, _: usize, stack: *const usize,
        ) -> isize {
            let file = files::of(fd);
            if !file.is_direct() {
                // SAFETY: the program's own call.
                return unsafe {
                    buffer!(@real $real, fd, start, len $(, { let $at = _offset; $at })?)
                };
            }
            let at = buffer!(@at $({ let $at = _offset; $at })?);
            // SAFETY: the hook passed its stack pointer.
            let caller = unsafe { caller(stack) };
            let transfer = Transfer { dir: Dir::$dir, fd, file, at, flags: 0, caller };
            answer(sync::buffer(transfer, start as usize, len))
        }
    };
    (@real $real:literal, $fd:expr, $start:expr, $len:expr) => {
        real!($real as fn(c_int, *mut c_void, usize) -> isize)($fd, $start, $len)
    };
    (@real $real:literal, $fd:expr, $start:expr, $len:expr, $at:expr) => {
        real!($real as fn(c_int, *mut c_void, usize, i64) -> isize)($fd, $start, $len, $at)
    };
    (@at) => { At::Position };
    (@at $at:expr) => { At::Offset($at) };
}

buffer!(read __read => on_read, c"read", Read,);
buffer!(write __write => on_write, c"write", Write,);
buffer!(pread pread64 __pread64 => on_pread, c"pread64", Read, offset);
buffer!(pwrite pwrite64 __pwrite64 => on_pwrite, c"pwrite64", Write, offset);

hook!(__read_chk => on_read_chk);
unsafe extern "C" fn on_read_chk(
    fd: c_int,
    start: *mut c_void,
    len: usize,
    room: usize,
    _: usize,
    stack: *const usize,
) -> isize {
    if len > room {
        // SAFETY: the C library's own check ends the program.
        return unsafe {
            real!(c"__read_chk" as fn(c_int, *mut c_void, usize, usize) -> isize)(
                fd, start, len, room,
            )
        };
    }
    // SAFETY: the program's own call, with the hook's stack pointer.
    unsafe { on_read(fd, start, len, 0, 0, stack) }
}

hook!(__pread_chk __pread64_chk => on_pread_chk);
unsafe extern "C" fn on_pread_chk(
    fd: c_int,
    start: *mut c_void,
    len: usize,
    offset: i64,
    room: usize,
    stack: *const usize,
) -> isize {
    if len > room {
        // SAFETY: the C library's own check ends the program.
        return unsafe {
            real!(c"__pread64_chk" as fn(c_int, *mut c_void, usize, i64, usize) -> isize)(
                fd, start, len, offset, room,
            )
        };
    }
    // SAFETY: the program's own call, with the hook's stack pointer.
    unsafe { on_pread(fd, start, len, offset, 0, stack) }
}

/// Defines the hooks of one transfer of a vector, at a position that `$at` makes of the arguments.
macro_rules! vector {
    ($($name:ident)+ => $inner:ident, $real:literal, $dir:ident,
        |$offset:ident, $flags:ident| ($at:expr, $rwf:expr), ($($ty:ty),*), ($($pass:expr),*)
    ) => {
        hook!($($name)+ => $inner);
        unsafe extern "C" fn $inner(
            fd: c_int,
            segs: *const iovec,
            count: c_int,
            $offset: i64,
            $flags: c_int,
            stack: *const usize,
        ) -> isize {
            let file = files::of(fd);
            let Ok(number) = usize::try_from(count) else {
                return answer(-(libc::EINVAL as isize));
            };
            if !file.is_direct() {
                // SAFETY: the program's own call.
                return unsafe {
                    real!($real as fn(c_int, *const iovec, c_int $(, $ty)*) -> isize)(
                        fd, segs, count $(, $pass)*
                    )
                };
            }
            // SAFETY: the hook passed its stack pointer.
            let caller = unsafe { caller(stack) };
            let transfer =
                Transfer { dir: Dir::$dir, fd, file, at: $at, flags: $rwf, caller };
            answer(sync::vector(transfer, segs, number))
        }
    };
}

vector!(readv __readv => on_readv, c"readv", Read,
    |_offset, _flags| (At::Position, 0), (), ());
vector!(writev __writev => on_writev, c"writev", Write,
    |_offset, _flags| (At::Position, 0), (), ());
vector!(preadv preadv64 => on_preadv, c"preadv64", Read,
    |offset, _flags| (At::Offset(offset), 0), (i64), (offset));
vector!(pwritev pwritev64 => on_pwritev, c"pwritev64", Write,
    |offset, _flags| (At::Offset(offset), 0), (i64), (offset));
vector!(preadv2 preadv64v2 => on_preadv2, c"preadv64v2", Read,
    |offset, flags| (calls::at(offset), flags), (i64, c_int), (offset, flags));
vector!(pwritev2 pwritev64v2 => on_pwritev2, c"pwritev64v2", Write,
    |offset, flags| (calls::at(offset), flags), (i64, c_int), (offset, flags));

/// Defines hooks whose work is a system call that `calls` knows how to do: for a program that asks
/// by name, the result goes through `errno`.
macro_rules! by_number {
    ($($name:ident($($arg:ident: $ty:ty),*) = $number:ident, $args:expr;)+) => {$(
        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $ty),*) -> c_int {
            // SAFETY: the program's own call. None of these is a transfer, so nobody asks where it
            // came from.
            answer(unsafe { calls::perform(libc::$number, &$args, Caller::NOBODY) }) as c_int
        }
    )+};
}

by_number! {
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [dir as usize, path as usize, flags as usize, mode as usize, 0, 0];
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [dir as usize, path as usize, flags as usize, mode as usize, 0, 0];
    open(path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, mode as usize, 0, 0];
    open64(path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, mode as usize, 0, 0];
    __open(path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, mode as usize, 0, 0];
    __open64(path: *const c_char, flags: c_int, mode: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, mode as usize, 0, 0];
    __open_2(path: *const c_char, flags: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, 0, 0, 0];
    __open64_2(path: *const c_char, flags: c_int) =
        SYS_openat, [libc::AT_FDCWD as usize, path as usize, flags as usize, 0, 0, 0];
    __openat_2(dir: c_int, path: *const c_char, flags: c_int) =
        SYS_openat, [dir as usize, path as usize, flags as usize, 0, 0, 0];
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) =
        SYS_openat, [dir as usize, path as usize, flags as usize, 0, 0, 0];
    creat(path: *const c_char, mode: c_int) =
        SYS_creat, [path as usize, mode as usize, 0, 0, 0, 0];
    creat64(path: *const c_char, mode: c_int) =
        SYS_creat, [path as usize, mode as usize, 0, 0, 0, 0];
    fcntl(fd: c_int, command: c_int, arg: usize) =
        SYS_fcntl, [fd as usize, command as usize, arg, 0, 0, 0];
    fcntl64(fd: c_int, command: c_int, arg: usize) =
        SYS_fcntl, [fd as usize, command as usize, arg, 0, 0, 0];
    __fcntl(fd: c_int, command: c_int, arg: usize) =
        SYS_fcntl, [fd as usize, command as usize, arg, 0, 0, 0];
    close(fd: c_int) = SYS_close, [fd as usize, 0, 0, 0, 0, 0];
    __close(fd: c_int) = SYS_close, [fd as usize, 0, 0, 0, 0, 0];
    close_range(first: u32, last: u32, flags: c_int) =
        SYS_close_range, [first as usize, last as usize, flags as usize, 0, 0, 0];
    dup(fd: c_int) = SYS_dup, [fd as usize, 0, 0, 0, 0, 0];
    dup2(old: c_int, new: c_int) = SYS_dup2, [old as usize, new as usize, 0, 0, 0, 0];
    __dup2(old: c_int, new: c_int) = SYS_dup2, [old as usize, new as usize, 0, 0, 0, 0];
    dup3(old: c_int, new: c_int, flags: c_int) =
        SYS_dup3, [old as usize, new as usize, flags as usize, 0, 0, 0];
}

/// Defines hooks as above that return a size.
macro_rules! sizes_by_number {
    ($($name:ident($($arg:ident: $ty:ty),*) = $number:ident;)+) => {$(
        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $ty),*) -> isize {
            let mut args = [0; 6];
            for (to, from) in args.iter_mut().zip([$($arg as usize),*]) {
                *to = from;
            }
            // SAFETY: the program's own call.
            answer(unsafe { calls::perform(libc::$number, &args, Caller::NOBODY) })
        }
    )+};
}

sizes_by_number! {
    sendfile(to: c_int, from: c_int, offset: *mut i64, len: usize) = SYS_sendfile;
    sendfile64(to: c_int, from: c_int, offset: *mut i64, len: usize) = SYS_sendfile;
    splice(from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, len: usize, flags: u32) =
        SYS_splice;
    copy_file_range(
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, len: usize, flags: u32
    ) = SYS_copy_file_range;
}

/// Stands in front of the C library's: descriptors may come along.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn recvmsg(socket: c_int, message: *mut libc::msghdr, flags: c_int) -> isize {
    // SAFETY: the program's own call; the kernel has filled the message if it succeeded.
    unsafe {
        let got = real!(c"recvmsg" as fn(c_int, *mut libc::msghdr, c_int) -> isize)(
            socket, message, flags,
        );
        if got >= 0 {
            calls::received(message);
        }
        got
    }
}

/// Stands in front of the C library's: descriptors may come along.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn recvmmsg(
    socket: c_int,
    messages: *mut libc::mmsghdr,
    count: u32,
    flags: c_int,
    time: *mut libc::timespec,
) -> c_int {
    type Real =
        unsafe extern "C" fn(c_int, *mut libc::mmsghdr, u32, c_int, *mut libc::timespec) -> c_int;
    // SAFETY: the C library's function of this name has this signature.
    let next: Real = unsafe { core::mem::transmute(crate::gate::next(c"recvmmsg")) };
    // SAFETY: the program's own call.
    let got = unsafe { next(socket, messages, count, flags, time) };
    for i in 0..usize::try_from(got).unwrap_or(0) {
        // SAFETY: the kernel has filled so many.
        unsafe { calls::received(&raw const (*messages.add(i)).msg_hdr) };
    }
    got
}

/// Stands in front of the C library's, which closes the descriptor by a name of its own.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn fclose(stream: *mut libc::FILE) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        let fd = libc::fileno(stream);
        let result = real!(c"fclose" as fn(*mut libc::FILE) -> c_int)(stream);
        files::forget(fd);
        result
    }
}

/// Stands in front of the C library's.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    let first = u32::try_from(first).unwrap_or(0);
    files::forget_range(first, u32::MAX);
    // SAFETY: the program's own call.
    unsafe { real!(c"closefrom" as fn(c_int) -> ())(first as c_int) }
}

/// Stands in front of the C library's: system calls by number. The seventh argument lies on the
/// stack, and the stack pointer is found from there.
///
/// # Safety
///
/// As the C library's.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall() {
    // The arguments become an array on the stack. 72 bytes: seven words, a spare one, and what
    // brings the stack pointer to a multiple of 16 for the call.
    naked_asm!(
        ".cfi_startproc",
        "sub rsp, 72",
        ".cfi_adjust_cfa_offset 72",
        "mov [rsp], rdi",
        "mov [rsp + 8], rsi",
        "mov [rsp + 16], rdx",
        "mov [rsp + 24], rcx",
        "mov [rsp + 32], r8",
        "mov [rsp + 40], r9",
        "mov rax, [rsp + 80]",
        "mov [rsp + 48], rax",
        "mov rdi, rsp",
        "lea rsi, [rsp + 72]",
        "call {inner}",
        "add rsp, 72",
        ".cfi_adjust_cfa_offset -72",
        "ret",
        ".cfi_endproc",
        inner = sym on_syscall,
    )
}

unsafe extern "C" fn on_syscall(words: *const usize, stack: *const usize) -> isize {
    // SAFETY: the hook passed seven words, and its stack pointer.
    unsafe {
        let number = *words as i64;
        let args: [usize; 6] = core::array::from_fn(|i| *words.add(i + 1));
        answer(calls::perform(number, &args, caller(stack)))
    }
}
