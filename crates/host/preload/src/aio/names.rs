//! libaio's names. They give error numbers as the kernel does, and leave `errno` alone.
//!
//! libaio calls the kernel itself, and is caught there; but then it, and not the program, would be
//! the one that submits, and each call would take a detour. The names are ordinary words, so a hook
//! does nothing unless a library behind us has the name with libaio's version (src/libaio.map):
//! else the function is somebody else's.

use core::ffi::{CStr, c_int, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};

use super::abi::SigSet;
use super::perform;
use crate::calls::SYS_IO_PGETEVENTS;
use crate::gate;
use crate::names::{caller, hook};
use crate::process;
use crate::site::Caller;

type Function = unsafe extern "C" fn(usize, usize, usize, usize, usize, usize) -> isize;

/// A name of libaio's.
struct Name {
    name: &'static CStr,
    version: &'static CStr,
    number: i64,
    /// Libaio's function; null: not looked up yet; [`nobody`]: there is none.
    theirs: AtomicPtr<c_void>,
    /// The next function of this name, if it is not libaio's.
    next: AtomicPtr<c_void>,
}

extern "C" fn nobody() {}

impl Name {
    const fn new(name: &'static CStr, version: &'static CStr, number: i64) -> Name {
        let null = core::ptr::null_mut();
        Name { name, version, number, theirs: AtomicPtr::new(null), next: AtomicPtr::new(null) }
    }

    /// Libaio's function of this name.
    fn theirs(&self) -> Option<*mut c_void> {
        let nobody = nobody as *mut c_void;
        let mut theirs = self.theirs.load(Ordering::Relaxed);
        if theirs.is_null() {
            theirs = self.of_version(self.version).unwrap_or(nobody);
            self.theirs.store(theirs, Ordering::Relaxed);
        }
        (theirs != nobody).then_some(theirs)
    }

    fn of_version(&self, version: &CStr) -> Option<*mut c_void> {
        // SAFETY: a lookup by two C strings.
        let found = unsafe { libc::dlvsym(libc::RTLD_NEXT, self.name.as_ptr(), version.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    /// Does a call by this name: in our way if it concerns us, else as it would have been done.
    ///
    /// # Safety
    ///
    /// It is the program's own, with its own arguments.
    unsafe fn call(&self, args: [usize; 6], caller: Caller) -> isize {
        process::arm_thread();
        if self.theirs().is_some()
            && let Some(result) = perform(self.number, &args, caller, None)
        {
            return result;
        }
        // SAFETY: the caller's promise.
        unsafe { self.call_theirs(args) }
    }

    /// Calls the function that the program would have called without us.
    ///
    /// # Safety
    ///
    /// As [`Name::call`].
    unsafe fn call_theirs(&self, args: [usize; 6]) -> isize {
        let next = || gate::look_up(&self.next, self.name);
        // SAFETY: the function of this name, with what the program passed to it.
        unsafe { pass(self.theirs().unwrap_or_else(next), args) }
    }
}

/// # Safety
///
/// The function takes the arguments; it may take fewer.
unsafe fn pass(function: *mut c_void, args: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller's promise. Arguments that it does not take lie in registers that it may
    // use as it likes.
    unsafe { core::mem::transmute::<*mut c_void, Function>(function)(a, b, c, d, e, f) }
}

static SUBMIT: Name = Name::new(c"io_submit", c"LIBAIO_0.1", libc::SYS_io_submit);
static SETUP: Name = Name::new(c"io_setup", c"LIBAIO_0.4", libc::SYS_io_setup);
static DESTROY: Name = Name::new(c"io_destroy", c"LIBAIO_0.4", libc::SYS_io_destroy);
static CANCEL: Name = Name::new(c"io_cancel", c"LIBAIO_0.4", libc::SYS_io_cancel);
static GETEVENTS: Name = Name::new(c"io_getevents", c"LIBAIO_0.4", libc::SYS_io_getevents);
static PGETEVENTS: Name = Name::new(c"io_pgetevents", c"LIBAIO_0.5", SYS_IO_PGETEVENTS);

hook!(io_submit => on_submit);
unsafe extern "C" fn on_submit(
    context: usize,
    count: usize,
    iocbs: usize,
    fourth: usize,
    fifth: usize,
    stack: *const usize,
) -> isize {
    // SAFETY: the program's own call, and the hook's stack pointer.
    unsafe { SUBMIT.call([context, count, iocbs, fourth, fifth, 0], caller(stack)) }
}

/// Defines the hooks of calls that submit nothing. All arguments are passed on, because the
/// function may be somebody else's, who has more of them.
macro_rules! names {
    ($($name:ident = $of:ident;)+) => {$(
        /// Stands in front of libaio's.
        ///
        /// # Safety
        ///
        /// As libaio's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            a: usize, b: usize, c: usize, d: usize, e: usize, f: usize,
        ) -> isize {
            // SAFETY: the program's own call.
            unsafe { $of.call([a, b, c, d, e, f], Caller::NOBODY) }
        }
    )+};
}

names! {
    io_setup = SETUP;
    io_destroy = DESTROY;
    io_cancel = CANCEL;
}

/// Stands in front of libaio's, which has the mask itself as its sixth argument.
///
/// # Safety
///
/// As libaio's.
#[unsafe(no_mangle)]
unsafe extern "C" fn io_pgetevents(
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    mask: usize,
) -> isize {
    let set = SigSet { mask, size: size_of::<u64>() };
    let sixth = if mask == 0 { 0 } else { (&raw const set).addr() };
    process::arm_thread();
    if PGETEVENTS.theirs().is_some()
        && let Some(result) =
            perform(SYS_IO_PGETEVENTS, &[a, b, c, d, e, sixth], Caller::NOBODY, None)
    {
        return result;
    }
    // SAFETY: the program's own call.
    unsafe { PGETEVENTS.call_theirs([a, b, c, d, e, mask]) }
}

/// Stands in front of libaio's.
///
/// # Safety
///
/// As libaio's.
#[unsafe(no_mangle)]
unsafe extern "C" fn io_getevents(
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    // Before version 0.4 there was no least number of events, so that the third argument was the
    // array. Programs of that time get at this hook as well, as it has no version.
    const MOST_EVENTS: usize = c_int::MAX as usize;
    let older = (c > MOST_EVENTS).then(|| GETEVENTS.of_version(c"LIBAIO_0.1")).flatten();
    // SAFETY: the program's own call.
    unsafe {
        match older {
            Some(older) => pass(older, [a, b, c, d, e, f]),
            None => GETEVENTS.call([a, b, c, d, e, f], Caller::NOBODY),
        }
    }
}
