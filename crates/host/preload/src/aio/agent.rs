//! Two kinds of threads, for programs that learn of events without asking.
//!
//! A program may look at the ring, or wait on an eventfd, and never call `io_getevents`. The kernel
//! would put the events before it by itself; here somebody has to.
//!
//! - The *watch*, one thread, looks at all contexts each millisecond while there are I/Os under
//!   way: events that lay in H from one look to the next it publishes. So nobody waits in vain. It
//!   also sees that a program reads the ring.
//! - An *agent*, one thread per context that is peeked at: by such a reader, or with an eventfd. It
//!   waits on H, and publishes at once. While the program waits on H itself the agent stands aside.
//!
//! They have no signals, and no memory of the program's but what they finish.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use super::context::{self, Context, Held};
use super::reap;
use crate::gate::syscall;
use crate::process;

/// Looks without work after which the watch sleeps until it is woken.
const IDLE_LOOKS: u32 = 100;

/// 1: there is a watch.
static WATCH: AtomicU32 = AtomicU32::new(0);
/// 1: it sleeps.
static ASLEEP: AtomicU32 = AtomicU32::new(0);

/// Starts the watch, if there is none.
pub(super) fn start_watch() {
    if WATCH.swap(1, Ordering::AcqRel) == 0 && !process::spawn(watch, ptr::null_mut()) {
        WATCH.store(0, Ordering::Release);
    }
}

/// Wakes it, after [`Context::in_flight`] was raised.
pub(super) fn wake_watch() {
    if ASLEEP.load(Ordering::SeqCst) != 0 && ASLEEP.swap(0, Ordering::SeqCst) != 0 {
        wake(&ASLEEP);
    }
}

/// A forked child has no such threads.
pub(super) fn after_fork() {
    WATCH.store(0, Ordering::Relaxed);
    ASLEEP.store(0, Ordering::Relaxed);
}

extern "C" fn watch(_: *mut c_void) -> *mut c_void {
    obey_setxid();
    let mut idle = 0;
    loop {
        idle = if look_at_all() { 0 } else { idle + 1 };
        if idle < IDLE_LOOKS {
            let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            // SAFETY: reads the time there.
            unsafe { syscall!(libc::SYS_nanosleep, &raw const time, 0) };
            continue;
        }
        ASLEEP.store(1, Ordering::SeqCst);
        // Whoever submits raises `in_flight` before it looks whether we sleep, so one of us sees the
        // other.
        if !look_at_all() {
            wait_while(&ASLEEP, 1);
        }
        ASLEEP.store(0, Ordering::SeqCst);
        idle = 0;
    }
}

/// False if nothing is under way.
fn look_at_all() -> bool {
    let mut busy = false;
    for place in 0..context::places() {
        if let Some(context) = context::hold_at(place) {
            busy |= look_at(&context);
        }
    }
    busy
}

fn look_at(context: &Held) -> bool {
    if context.in_flight.load(Ordering::SeqCst) == 0 && context.visible() == 0 {
        return false;
    }
    if context.head_was_moved() {
        is_peeked_at(context);
    }
    let now = match context.has_events() && context.waiters.load(Ordering::SeqCst) == 0 {
        true => i64::from(context.kernel_ring().head.load(Ordering::Relaxed)) + 1,
        false => 0,
    };
    let before = context.stale.swap(now, Ordering::Relaxed);
    if now != 0 && now == before {
        reap::drain(context, false);
    }
    context.in_flight.load(Ordering::SeqCst) != 0
}

/// Takes note that the program learns of events without asking for them, and starts the agent.
pub(super) fn is_peeked_at(context: &Held) {
    if context.peeked_at.swap(1, Ordering::SeqCst) != 0 {
        return;
    }
    let context = context.clone().into_raw();
    if !process::spawn(agent, ptr::from_ref(context).cast_mut().cast()) {
        // The watch does it, a millisecond later.
        // SAFETY: from `into_raw`, and nobody else's.
        drop(unsafe { Held::from_raw(context) });
    }
}

extern "C" fn agent(context: *mut c_void) -> *mut c_void {
    obey_setxid();
    // SAFETY: from `is_peeked_at`, for this thread alone; contexts are static.
    let context = unsafe { Held::from_raw(&*context.cast::<Context>()) };
    while !context.is_dying() {
        match context.waiters.load(Ordering::SeqCst) {
            0 => {
                let result = reap::drain(&context, true);
                if result < 0 && result != -(libc::EINTR as isize) {
                    break;
                }
            }
            waiters => wait_while(&context.waiters, waiters),
        }
    }
    ptr::null_mut()
}

/// Wakes an agent that stands aside.
pub(super) fn go_on(context: &Context) {
    wake(&context.waiters);
}

/// Lets the C library's `setuid` and its like reach this thread, which blocks all signals: they
/// would wait for it for ever (nptl: SIGSETXID).
fn obey_setxid() {
    const SIGSETXID: u32 = 33;
    let set = 1u64 << (SIGSETXID - 1);
    // SAFETY: reads the set there.
    unsafe {
        syscall!(libc::SYS_rt_sigprocmask, libc::SIG_UNBLOCK, &raw const set, 0, size_of_val(&set))
    };
}

fn wait_while(word: &AtomicU32, value: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is static.
    unsafe { syscall!(libc::SYS_futex, word.as_ptr(), operation, value, 0) };
}

fn wake(word: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is static.
    unsafe { syscall!(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}
