//! The way to the kernel that the net lets through.
//!
//! The net (`net.rs`) catches each system call whose instruction lies outside of the C library.
//! So this library has no such instruction of its own: it calls one of the C library's, a
//! `syscall; ret` that some function of it ends with. That also serves calls that the program made
//! elsewhere and that are none of our business: they are replayed there ([`syscall_ret`]).
//!
//! Results are as the kernel gives them: a negative one is an error number. `errno` is left alone,
//! and nothing here is a cancellation point, so that no thread is cancelled with a copy in hand.

use core::arch::asm;
use core::ffi::{CStr, c_void};
use core::ops::Range;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// A system call by number; the result as from the kernel.
///
/// # Safety
///
/// As the system call asks. Memory that it writes is valid for that.
pub(crate) unsafe fn call(number: i64, args: [usize; 6]) -> isize {
    let gate = SYSCALL_RET.load(Ordering::Relaxed);
    let result: isize;
    if gate == 0 {
        // SAFETY: the caller's promise. rcx and r11 are what the instruction itself spoils.
        unsafe {
            asm!("syscall", inlateout("rax") number as isize => result,
                in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
                in("r10") args[3], in("r8") args[4], in("r9") args[5],
                lateout("rcx") _, lateout("r11") _);
        }
    } else {
        // SAFETY: `gate` is the address of `syscall; ret`; for the rest as above. The call pushes
        // one word, which an asm block without `nostack` allows.
        unsafe {
            asm!("call {gate}", gate = in(reg) gate,
                inlateout("rax") number as isize => result,
                in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
                in("r10") args[3], in("r8") args[4], in("r9") args[5],
                lateout("rcx") _, lateout("r11") _);
        }
    }
    result
}

/// A system call of up to five arguments, with the session's cookie as the sixth: one that gives
/// direct I/O or a ring, and that the launcher's filter catches from everybody else.
///
/// # Safety
///
/// As [`call`].
pub(crate) unsafe fn call_with_cookie(number: i64, args: [usize; 5]) -> isize {
    let [a, b, c, d, e] = args;
    // SAFETY: the caller's promise.
    unsafe { call(number, [a, b, c, d, e, COOKIE.load(Ordering::Relaxed) as usize]) }
}

/// Fills the arguments of a system call up to six.
macro_rules! syscall {
    ($number:expr $(, $arg:expr)* $(,)?) => {{
        let given = [$($arg as usize),*];
        let mut args = [0; 6];
        args[..given.len()].copy_from_slice(&given);
        $crate::gate::call($number, args)
    }};
}
pub(crate) use syscall;

/// Sets the cookie, from the session.
pub(crate) fn set_cookie(cookie: u64) {
    COOKIE.store(cookie, Ordering::Relaxed);
}

static COOKIE: AtomicU64 = AtomicU64::new(0);
/// Address of `syscall; ret` in the C library; 0 before [`find`] found it.
static SYSCALL_RET: AtomicUsize = AtomicUsize::new(0);

/// Address of a `syscall; ret` in the C library, if there is one.
pub(crate) fn syscall_ret() -> Option<usize> {
    Some(SYSCALL_RET.load(Ordering::Relaxed)).filter(|gate| *gate != 0)
}

/// Finds the gate. Returns the C library's code; `None` if there is no gate in it.
pub(crate) fn find() -> Option<Range<usize>> {
    let code = c_library_code()?;
    // SAFETY: the C library's code is mapped, readable, and stays.
    let bytes = unsafe { core::slice::from_raw_parts(code.start as *const u8, code.len()) };
    let at = bytes.windows(3).position(|w| w == [0x0f, 0x05, 0xc3])?;
    SYSCALL_RET.store(code.start + at, Ordering::Relaxed);
    Some(code)
}

/// The executable segment of the object that holds the C library's `write`.
fn c_library_code() -> Option<Range<usize>> {
    struct Search {
        address: usize,
        found: Option<Range<usize>>,
    }
    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        search: *mut c_void,
    ) -> i32 {
        // SAFETY: the dynamic linker passes a valid description, and what we gave it.
        let (info, search) = unsafe { (&*info, &mut *search.cast::<Search>()) };
        for i in 0..usize::from(info.dlpi_phnum) {
            // SAFETY: there are `dlpi_phnum` headers.
            let header = unsafe { &*info.dlpi_phdr.add(i) };
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_X == 0 {
                continue;
            }
            let start = (info.dlpi_addr + header.p_vaddr) as usize;
            let code = start..start + header.p_memsz as usize;
            if code.contains(&search.address) {
                search.found = Some(code);
                return 1;
            }
        }
        0
    }
    let mut search = Search { address: next(c"write") as usize, found: None };
    // SAFETY: `visit` has the signature, and `search` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search.found
}

/// The function of this name that the program would have called without us; null if there is none.
pub(crate) fn next(name: &CStr) -> *mut c_void {
    // SAFETY: a lookup by a C string.
    unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) }
}

/// The C library's function that a hook stands in front of, looked up when it is first used. To be
/// called, or taken, in an `unsafe` block: the signature is the caller's word.
macro_rules! real {
    ($name:literal as fn($($arg:ty),* $(,)?) -> $ret:ty) => {{
        static FOUND: core::sync::atomic::AtomicPtr<core::ffi::c_void> =
            core::sync::atomic::AtomicPtr::new(core::ptr::null_mut());
        core::mem::transmute::<*mut core::ffi::c_void, unsafe extern "C" fn($($arg),*) -> $ret>(
            $crate::gate::look_up(&FOUND, $name),
        )
    }};
}
pub(crate) use real;

/// What `found` holds, filled by [`next`] if it is null; never null.
#[inline]
pub(crate) fn look_up(found: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = found.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    let function = next(name);
    if function.is_null() {
        // The program found a name with us that the libraries behind us do not have.
        absent(name);
    }
    found.store(function, Ordering::Relaxed);
    function
}

/// Ends the process: a function is called that no library behind us has.
fn absent(name: &CStr) -> ! {
    const HEAD: &[u8] = b"stableio: the program calls a function that its libraries lack: ";
    // SAFETY: writes bytes that are there, and ends the process.
    unsafe {
        syscall!(libc::SYS_write, 2, HEAD.as_ptr(), HEAD.len());
        syscall!(libc::SYS_write, 2, name.as_ptr(), name.to_bytes().len());
        syscall!(libc::SYS_write, 2, c"\n".as_ptr(), 1);
        libc::abort()
    }
}

/// Gives a result of the kernel as the C library does.
pub(crate) fn answer(result: isize) -> isize {
    if (-4095..0).contains(&result) {
        // SAFETY: the thread's own errno.
        unsafe { *libc::__errno_location() = -result as i32 };
        return -1;
    }
    result
}
