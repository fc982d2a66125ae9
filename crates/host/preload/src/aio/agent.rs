//! Two kinds of threads, for programs that learn of events without asking.
//!
//! A program may look at the ring, or wait on an eventfd, and never call `io_getevents`. The kernel
//! would put the events before it by itself; here somebody has to.
//!
//! - The *watch*, one thread, looks at all contexts each few milliseconds while there are I/Os under
//!   way: events that lie in H look after look it publishes. So nobody waits in vain. It
//!   also sees that a program reads the ring.
//! - An *agent*, one thread per context that is peeked at: by such a reader, or with an eventfd. It
//!   waits on H, and publishes at once. While the program waits on H itself, or is submitting, the
//!   agent stands aside.
//!
//! They have no signals, and no memory of the program's but what they finish.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use super::context::{self, Context, Held};
use super::reap;
use crate::gate::syscall;
use crate::process;

/// Looks at nothing under way after which the watch sleeps until it is woken.
const IDLE_LOOKS: u32 = 16;
/// Milliseconds between two looks: few while something is stale, and twice as many after each look
/// that finds nothing so, because most programs ask by themselves.
const PAUSES: core::ops::RangeInclusive<u32> = 1..=16;

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
    let (mut idle, mut pause) = (0, *PAUSES.start());
    loop {
        let seen = look_at_all();
        idle = if seen.busy { 0 } else { idle + 1 };
        pause = if seen.stale { *PAUSES.start() } else { (2 * pause).min(*PAUSES.end()) };
        if idle < IDLE_LOOKS {
            let nanoseconds = i64::from(pause) * 1_000_000;
            let time = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
            // SAFETY: reads the time there.
            unsafe { syscall!(libc::SYS_nanosleep, &raw const time, 0) };
            continue;
        }
        ASLEEP.store(1, Ordering::SeqCst);
        // Whoever submits raises `in_flight` before it looks whether we sleep, so one of us sees the
        // other.
        if !look_at_all().busy {
            wait_while(&ASLEEP, 1);
        }
        ASLEEP.store(0, Ordering::SeqCst);
        (idle, pause) = (0, *PAUSES.start());
    }
}

/// What the watch saw.
struct Look {
    /// Something is under way.
    busy: bool,
    /// Some event waits to be asked for.
    stale: bool,
}

fn look_at_all() -> Look {
    let mut all = Look { busy: false, stale: false };
    for place in 0..context::places() {
        if let Some(context) = context::hold_at(place) {
            let one = look_at(&context);
            all.busy |= one.busy;
            all.stale |= one.stale;
        }
    }
    all
}

fn look_at(context: &Held) -> Look {
    let in_flight = || context.in_flight.load(Ordering::SeqCst) != 0;
    if !in_flight() && context.visible() == 0 {
        return Look { busy: false, stale: false };
    }
    if context.head_was_moved() {
        is_peeked_at(context);
    }
    if is_stale(context) {
        reap::drain(context, false);
    }
    Look { busy: in_flight(), stale: context.seen.stale.load(Ordering::Relaxed) != 0 }
}

/// Whether H has an event that has lain there for so long that nobody is about to ask for it: at
/// three looks, or at ten if the program is busy submitting.
fn is_stale(context: &Context) -> bool {
    const ENOUGH: u32 = 10;
    let seen = &context.seen;
    let (head, calls) =
        (context.kernel_ring().head.load(Ordering::Relaxed), context.calls.load(Ordering::Relaxed));
    let moved = seen.head.swap(head, Ordering::Relaxed) != head;
    let busy = seen.calls.swap(calls, Ordering::Relaxed) != calls;
    if moved || !context.has_events() || context.waiters.load(Ordering::SeqCst) > 0 {
        seen.stale.store(0, Ordering::Relaxed);
        return false;
    }
    let more = if busy { 1 } else { ENOUGH / 2 };
    seen.stale.fetch_add(more, Ordering::Relaxed) + more >= ENOUGH
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
    // SAFETY: from `is_peeked_at`, for this thread alone; contexts are static.
    let context = unsafe { Held::from_raw(&*context.cast::<Context>()) };
    loop {
        let bell = context.bell.load(Ordering::SeqCst);
        if context.is_dying() {
            break;
        }
        if has_work(&context) {
            let result = reap::drain(&context, true);
            if result < 0 && result != -(libc::EINTR as isize) {
                break;
            }
            continue;
        }
        // Who rings changes the bell first, so that either it sees that we sleep, or we see the bell.
        context.asleep.store(1, Ordering::SeqCst);
        wait_while(&context.bell, bell);
        context.asleep.store(0, Ordering::SeqCst);
    }
    ptr::null_mut()
}

/// Whether the agent is to wait on H: there is something to wait for, nobody else waits, and nobody
/// is submitting. What a call does at once it also publishes itself, before it comes back, as the
/// kernel does; programs may rely on that (QEMU calls itself without end if it is not so).
fn has_work(context: &Context) -> bool {
    context.waiters.load(Ordering::SeqCst) == 0
        && context.submitting.load(Ordering::SeqCst) == 0
        && context.in_flight.load(Ordering::SeqCst) != 0
}

/// Tells the agent, if there is one, that it may have something to do.
pub(super) fn ring(context: &Context) {
    if context.peeked_at.load(Ordering::Relaxed) == 0 {
        return;
    }
    context.bell.fetch_add(1, Ordering::SeqCst);
    if context.asleep.load(Ordering::SeqCst) != 0 {
        wake(&context.bell);
    }
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
