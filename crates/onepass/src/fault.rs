//! Foreign memory that vanishes: recovery from SIGBUS and SIGSEGV.
//!
//! The owner of foreign memory can truncate the file behind it at any moment; the next access
//! raises SIGBUS. There is no way to ask first. So one handler for the process decides, from the
//! faulting address, whose fault it is:
//!
//! 1. **A kernel of this crate**, running under [`guarded`] on this very thread, touched its
//!    foreign range: the kernel is abandoned and `guarded` returns a [`Fault`].
//! 2. **A registered [`Region`]** raised SIGBUS: library code reads a virtqueue's rings through
//!    plain pointers and cannot be abandoned. A page of zeros is mapped over the hole, the region
//!    is marked, and the access is done again; the region's owner sees the mark and ends the
//!    client.
//! 3. **Anybody else's**: the handler that was there before gets it (the standard library's, which
//!    reports stack overflows), or the process dies of the signal as it would have without us.
//!
//! Everything that the handler touches is an atomic or was written before the signal was raised,
//! on the same thread; it takes no lock and allocates nothing. It reads one thread-local, which is
//! initialised at compile time. (In a library loaded with `dlopen` the C library may allocate a
//! thread's copy on first use; a thread that is inside `guarded` has had that first use.)
//!
//! A handler that someone installs after us and that does not call its predecessor takes all this
//! away; so does a thread that blocks the two signals.

mod regions;
mod trampoline;

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Once, OnceLock};

use crate::{Fault, Segment};
pub use regions::{CAPACITY, Region, register};
use trampoline::Record;

/// Installs the handler for the process; only the first call does anything.
///
/// The kernels and [`register`] call it themselves. A program calls it early if it installs
/// handlers of its own that should come first, in front of this one.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: a system call without memory.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        PAGE.store(usize::try_from(page).expect("a page has a size"), Ordering::Relaxed);
        for (signal, previous) in SIGNALS.iter().zip(&PREVIOUS) {
            install_for(*signal, previous);
        }
    });
}

/// Runs `body`, and returns a [`Fault`] if it faults inside the foreign range `[start, start+len)`.
///
/// The fault abandons `body` where it stands, like `longjmp`: what it had done so far stays done,
/// what its locals held is gone. `Copy` makes sure that its captures need no destructor; the rest
/// is the caller's promise. Calls may nest.
///
/// # Errors
///
/// [`Fault`] with the address, brought into the range if the kernel reported only the page.
///
/// # Safety
///
/// - `body`, and all that it calls while it touches the foreign range, may be abandoned at each
///   access: no destructors in scope, no allocation, no locks, no panics.
/// - In the pages that the range lies in, `body` touches nothing but the range.
/// - This thread does not block SIGBUS and SIGSEGV.
#[inline]
pub unsafe fn guarded<F: FnMut() + Copy>(
    start: *const u8,
    len: usize,
    body: F,
) -> Result<(), Fault> {
    // SAFETY: the caller's promises.
    unsafe { guarded_in(&[Segment { addr: start, len }], body) }
}

/// [`guarded`] with several foreign ranges.
///
/// # Errors
///
/// As there.
///
/// # Safety
///
/// As there, for all of the ranges.
#[inline]
pub(crate) unsafe fn guarded_in<F: FnMut() + Copy>(
    ranges: &[Segment],
    mut body: F,
) -> Result<(), Fault> {
    /// Calls the closure at `body`.
    unsafe extern "C" fn call<F: FnMut()>(body: *mut c_void) {
        // SAFETY: `body` is the closure of the `guarded_in` that passes this function.
        unsafe { (*body.cast::<F>())() }
    }

    install();
    let mut record = Record::of(ranges);
    let record = &raw mut record;
    ARMED.with(|armed| {
        let outer = armed.load(Ordering::Relaxed);
        armed.store(record, Ordering::Relaxed);
        // The handler runs on this thread: only the compiler could reorder these.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: `record` outlives the call, and `call::<F>` takes the closure that it is given.
        // `body` may be abandoned, as the caller promises; `call` and `enter` own nothing.
        let faulted = unsafe { trampoline::enter(record, call::<F>, (&raw mut body).cast()) };
        compiler_fence(Ordering::SeqCst);
        armed.store(outer, Ordering::Relaxed);
        if faulted == 0 {
            return Ok(());
        }
        // SAFETY: `record` is our local; the handler has written it and is done.
        Err(Fault { addr: unsafe { (*record).fault } })
    })
}

const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// What handled [`SIGNALS`] before; written before our handler can run.
static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];

/// Bytes of a page; written before our handler can run.
static PAGE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The innermost [`guarded`] of this thread, or null. Atomic only because a signal handler
    /// reads it; no other thread does.
    static ARMED: AtomicPtr<Record> = const { AtomicPtr::new(ptr::null_mut()) };
}

/// Puts our handler in front of the one that is there.
fn install_for(signal: c_int, previous: &OnceLock<libc::sigaction>) {
    // SAFETY: sigaction is plain data, for which zeros are valid.
    let (mut old, mut new) = unsafe { std::mem::zeroed::<(libc::sigaction, libc::sigaction)>() };
    // SAFETY: asks for the present action only.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut old) };
    assert_eq!(asked, 0, "sigaction({signal}) cannot be read");
    previous.get_or_init(|| old);

    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
    new.sa_sigaction = handler as usize;
    // On the alternate stack, because a stack overflow comes by here on its way to the standard
    // library's handler, and needs a stack to run on.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_fault` has the signature that SA_SIGINFO asks for, and is async-signal-safe.
    let set = unsafe { libc::sigaction(signal, &raw const new, ptr::null_mut()) };
    assert_eq!(set, 0, "sigaction({signal}) cannot be set");
}

/// The handler of both signals. It must leave `errno` as it finds it.
extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t that is valid for the handler's duration.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Codes up to zero are signals that a process sent; they have no address.
    let is_access = code > 0;
    // SAFETY: `context` is the ucontext_t of the interrupted code, as SA_SIGINFO promises.
    if is_access && unsafe { abandon(addr, context.cast()) } {
        return;
    }
    // Memory that vanished raises SIGBUS. SIGSEGV in a region is a bug of ours, to be seen.
    if is_access && signal == libc::SIGBUS && regions::mend(addr, PAGE.load(Ordering::Relaxed)) {
        return;
    }
    // SAFETY: these are the arguments that this handler was called with.
    unsafe { pass_on(signal, is_access, info, context) }
}

/// Makes the interrupted code continue behind its [`guarded`], if the fault is inside its range.
///
/// # Safety
///
/// `context` is the context of the code on this thread that the fault interrupted.
unsafe fn abandon(addr: usize, context: *mut libc::ucontext_t) -> bool {
    let record = ARMED.with(|armed| armed.load(Ordering::Relaxed));
    if record.is_null() {
        return false;
    }
    // SAFETY: `guarded` removes its record from ARMED before it returns, so the record is alive;
    // its code does not run now, because this handler interrupted it.
    let record = unsafe { &mut *record };
    // SAFETY: the ranges outlive that call, too.
    let Some(fault) = (unsafe { record.covers(addr, PAGE.load(Ordering::Relaxed)) }) else {
        return false;
    };
    record.fault = fault;
    // SAFETY: `covers` has seen that `enter` is on the stack, with its registers saved there.
    unsafe { trampoline::resume(record, context) };
    true
}

/// Hands a fault that is not ours to whoever had the signal before us.
///
/// # Safety
///
/// The arguments are those of the signal handler; it does nothing after this.
unsafe fn pass_on(
    signal: c_int,
    is_access: bool,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    let ours = SIGNALS.iter().zip(&PREVIOUS).find(|(ours, _)| **ours == signal);
    let Some(previous) = ours.and_then(|(_, previous)| previous.get()) else { return };
    match previous.sa_sigaction {
        // The kernel does not let a program ignore a bad access; only sent signals can be.
        libc::SIG_IGN if !is_access => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: async-signal-safe, without memory.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the flag says that the handler has this signature.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without the flag, a handler has this signature.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
    // With the default action, a bad access is repeated when we return, and kills the process with
    // the signal that it should see. A sent signal does not repeat itself. The standard library's
    // handler, too, sets the default action and relies on the repetition: the process would live
    // on without our handler.
    if !is_access && is_default(signal) {
        // SAFETY: async-signal-safe, without memory; the signal waits until we have returned.
        unsafe { libc::raise(signal) };
    }
}

/// Whether the action of `signal` is the default one.
fn is_default(signal: c_int) -> bool {
    // SAFETY: sigaction is plain data, for which zeros are valid.
    let mut now = unsafe { std::mem::zeroed::<libc::sigaction>() };
    // SAFETY: async-signal-safe; asks for the present action only.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_DFL
}
