//! The three signals that this library needs, and that the program may want as well.
//!
//! SIGSYS is the net's; SIGSEGV and SIGBUS tell that memory which is being copied is not there.
//! Their handlers in the kernel stay ours. What the program sets is kept here, given back when it
//! asks, and called for what is not ours.
//!
//! - **SIGNAL-1** None of the three is ever blocked by what the program asks for, in its mask or in
//!   that of a handler: a blocked one that is forced kills.

use core::ffi::{c_int, c_void};
use core::mem::zeroed;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use stableio_onepass as onepass;

use crate::gate::{answer, real, syscall};

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// What the program set for one of the signals.
struct Wanted {
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
}

const OURS: [c_int; 3] = [libc::SIGSYS, libc::SIGSEGV, libc::SIGBUS];

static WANTED: [Wanted; 3] = [const {
    Wanted { handler: AtomicUsize::new(0), flags: AtomicI32::new(0), mask: AtomicU64::new(0) }
}; 3];

/// Whether it is this library that sets handlers just now.
static OURSELVES: AtomicBool = AtomicBool::new(false);

fn wanted(signal: c_int) -> Option<&'static Wanted> {
    OURS.iter().position(|ours| *ours == signal).map(|i| &WANTED[i])
}

/// Puts the handlers for memory that is not there in place: in front `onepass`, behind it
/// [`to_program`].
pub(crate) fn install_for_memory() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        install(signal, on_fault);
    }
    OURSELVES.store(true, Ordering::Relaxed);
    onepass::fault::install();
    OURSELVES.store(false, Ordering::Relaxed);
    unblock();
}

/// Puts a handler of ours in the kernel, and keeps what was there as what the program wants.
pub(crate) fn install(signal: c_int, handler: Handler) {
    // SAFETY: plain data, for which zeros are valid.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { (zeroed(), zeroed()) };
    new.sa_sigaction = handler as usize;
    // On the alternate stack if there is one: some runtimes' stacks are too small for a handler.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    if signal == libc::SIGSYS {
        // Nothing must come between: what the net does is not to be interrupted half-way.
        new.sa_mask = all_but_ours();
        new.sa_flags |= libc::SA_NODEFER;
    }
    // SAFETY: the handlers have the signature that SA_SIGINFO asks for.
    let set = unsafe { real_sigaction(signal, &raw const new, &raw mut old) };
    if set == 0
        && let Some(wanted) = wanted(signal)
    {
        keep(wanted, &old);
    }
}

/// Handler of SIGSEGV and SIGBUS behind that of `onepass`: not ours, so the program's.
extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the arguments of this handler.
    unsafe { to_program(signal, info, context) };
}

/// Does with a signal what the program wants.
///
/// # Safety
///
/// The arguments are those of a signal handler, which does nothing after this.
pub(crate) unsafe fn to_program(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let Some(wanted) = wanted(signal) else { return };
    let flags = wanted.flags.load(Ordering::Relaxed);
    let handler = wanted.handler.load(Ordering::Acquire);
    // SAFETY: the kernel passes a siginfo_t.
    let sent = unsafe { (*info).si_code } <= 0;
    match handler {
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: plain data; the default action for a signal that comes again when we return,
            // or at once if somebody sent it.
            unsafe {
                let default: libc::sigaction = zeroed();
                real_sigaction(signal, &raw const default, ptr::null_mut());
                if sent || signal == libc::SIGSYS {
                    let (pid, tid) = (crate::process::id(), crate::process::thread_id());
                    syscall!(libc::SYS_tgkill, pid, tid, signal);
                }
            }
        }
        handler => {
            if flags & libc::SA_RESETHAND != 0 {
                wanted.handler.store(libc::SIG_DFL, Ordering::Release);
            }
            let mut mask = wanted.mask.load(Ordering::Relaxed);
            if flags & libc::SA_NODEFER == 0 && !OURS.contains(&signal) {
                mask |= bit(signal);
            }
            // SAFETY: the program's handler has the signature that its flags say, and is called in
            // a handler, with its mask. When it returns, the kernel restores the mask.
            unsafe {
                let bytes = size_of::<u64>();
                syscall!(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const mask, 0, bytes);
                if flags & libc::SA_SIGINFO != 0 {
                    let handler: Handler = core::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(c_int) = core::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }
}

fn keep(wanted: &Wanted, action: &libc::sigaction) {
    wanted.flags.store(action.sa_flags, Ordering::Relaxed);
    wanted.mask.store(without_ours(first_word(&action.sa_mask)), Ordering::Relaxed);
    wanted.handler.store(action.sa_sigaction, Ordering::Release);
}

fn give(wanted: &Wanted) -> libc::sigaction {
    // SAFETY: plain data, for which zeros are valid.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = wanted.handler.load(Ordering::Acquire);
    action.sa_flags = wanted.flags.load(Ordering::Relaxed);
    action.sa_mask = set_of(wanted.mask.load(Ordering::Relaxed));
    action
}

/// # Safety
///
/// As `sigaction`.
unsafe fn real_sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        real!(c"sigaction" as fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int)(
            signal, new, old,
        )
    }
}

/// Stands in front of the C library's.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let ours = wanted(signal).filter(|_| !OURSELVES.load(Ordering::Relaxed));
    // SAFETY: the program's own call: the pointers are null or valid.
    unsafe {
        let Some(wanted) = ours else {
            if new.is_null() {
                return real_sigaction(signal, new, old);
            }
            let mut action = *new;
            action.sa_mask = set_of(without_ours(first_word(&action.sa_mask)));
            return real_sigaction(signal, &raw const action, old);
        };
        let before = give(wanted);
        if !new.is_null() {
            keep(wanted, &*new);
        }
        if !old.is_null() {
            *old = before;
        }
        0
    }
}

/// Stands in front of the C library's.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signal: c_int, handler: usize) -> usize {
    // SAFETY: plain data, and the program's own call.
    unsafe {
        if wanted(signal).is_none() {
            return real!(c"signal" as fn(c_int, usize) -> usize)(signal, handler);
        }
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = (zeroed(), zeroed());
        new.sa_sigaction = handler;
        new.sa_flags = libc::SA_RESTART;
        sigaction(signal, &raw const new, &raw mut old);
        old.sa_sigaction
    }
}

/// The kernel's `struct sigaction` on x86-64 (arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// `rt_sigaction` by number. `None`: it goes to the kernel as it is.
///
/// # Safety
///
/// `args` are those of the system call, from the program.
pub(crate) unsafe fn take_sigaction(args: &[usize; 6]) -> Option<isize> {
    let signal = args[0] as c_int;
    let (new, old) = (args[1] as *const KernelAction, args[2] as *mut KernelAction);
    // SAFETY: the pointers are null or the program's; the kernel would read and write there, too.
    unsafe {
        let Some(wanted) = wanted(signal) else {
            if new.is_null() {
                return None;
            }
            let KernelAction { handler, flags, restorer, mask } = *new;
            let action = KernelAction { handler, flags, restorer, mask: without_ours(mask) };
            return Some(syscall!(libc::SYS_rt_sigaction, signal, &raw const action, old, args[3]));
        };
        let before = give(wanted);
        if !new.is_null() {
            wanted.flags.store((*new).flags as i32, Ordering::Relaxed);
            wanted.mask.store(without_ours((*new).mask), Ordering::Relaxed);
            wanted.handler.store((*new).handler, Ordering::Release);
        }
        if !old.is_null() {
            *old = KernelAction {
                handler: before.sa_sigaction,
                flags: before.sa_flags as u32 as u64,
                restorer: 0,
                mask: first_word(&before.sa_mask),
            };
        }
        Some(0)
    }
}

/// `rt_sigprocmask` of interrupted code, on the mask that it will have when it goes on.
///
/// # Safety
///
/// `args` are those of the system call, from the program; `mask` is that of its context.
pub(crate) unsafe fn change_mask(args: &[usize; 6], mask: &mut libc::sigset_t) -> isize {
    let (how, new, old) = (args[0] as c_int, args[1] as *const u64, args[2] as *mut u64);
    let now = first_word(mask);
    // SAFETY: the pointers are null or the program's; the kernel would read and write there, too.
    unsafe {
        let wanted = if new.is_null() { None } else { Some(*new) };
        if !old.is_null() {
            *old = now;
        }
        let next = match (wanted, how) {
            (None, _) => now,
            (Some(set), libc::SIG_BLOCK) => now | set,
            (Some(set), libc::SIG_UNBLOCK) => now & !set,
            (Some(set), libc::SIG_SETMASK) => set,
            _ => return -(libc::EINVAL as isize),
        };
        *mask = set_of(without_ours(next));
    }
    0
}

/// Defines the two functions that change a thread's mask.
macro_rules! mask {
    ($($name:ident, $real:literal;)+) => {$(
        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            how: c_int,
            set: *const libc::sigset_t,
            old: *mut libc::sigset_t,
        ) -> c_int {
            // SAFETY: the program's own call: the pointers are null or valid.
            unsafe {
                let next = real!($real as fn(
                    c_int, *const libc::sigset_t, *mut libc::sigset_t
                ) -> c_int);
                if set.is_null() || how == libc::SIG_UNBLOCK {
                    return next(how, set, old);
                }
                let set = set_of(without_ours(first_word(&*set)));
                next(how, &raw const set, old)
            }
        }
    )+};
}

mask! {
    sigprocmask, c"sigprocmask";
    pthread_sigmask, c"pthread_sigmask";
}

/// Unblocks the three, for a thread that may have come with them blocked.
pub(crate) fn unblock() {
    let set = OURS.iter().fold(0, |set, signal| set | bit(*signal));
    // SAFETY: reads the set there.
    let result = unsafe {
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_UNBLOCK, &raw const set, 0, size_of_val(&set))
    };
    let _ = answer(result);
}

/// Runs `f` with all other signals blocked, so that no handler interrupts it.
///
/// But for the two of the C library's own (nptl, internal-signals.h): with them it cancels threads
/// and sets their user, and waits for each of them, also for one that was made in here.
pub(crate) fn undisturbed<T>(f: impl FnOnce() -> T) -> T {
    let set = without_ours(u64::MAX) & !(bit(32) | bit(33));
    let mut before = 0u64;
    let bytes = size_of::<u64>();
    // SAFETY: reads and writes the sets there.
    unsafe {
        let (set, before) = (&raw const set, &raw mut before);
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, set, before, bytes);
    }
    let result = f();
    // SAFETY: as above.
    unsafe {
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const before, 0, bytes);
    }
    result
}

fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// The set without our three.
pub(crate) fn without_ours(set: u64) -> u64 {
    OURS.iter().fold(set, |set, signal| set & !bit(*signal))
}

fn all_but_ours() -> libc::sigset_t {
    set_of(without_ours(u64::MAX))
}

/// The 64 signals that there are; a `sigset_t` has room for more.
pub(crate) fn first_word(set: &libc::sigset_t) -> u64 {
    // SAFETY: a sigset_t is an array of words.
    unsafe { ptr::from_ref(set).cast::<u64>().read() }
}

fn set_of(word: u64) -> libc::sigset_t {
    // SAFETY: plain data, for which zeros are valid; its first word is that of the 64 signals.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        (&raw mut set).cast::<u64>().write(word);
        set
    }
}
