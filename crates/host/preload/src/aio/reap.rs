//! Events: from the kernel's ring to the program, by `io_getevents` or by the visible ring.
//!
//! Who takes events from H finishes them, and then either hands them to the program, whose
//! `io_getevents` it is in, or publishes them. A thread that waits in `io_getevents` waits on H; so
//! what is published meanwhile could miss it. Therefore:
//!
//! - **AIO-4** A waiter counts itself, then looks at the visible ring, then waits. A publisher
//!   publishes, then looks for waiters; if there are any it *kicks*: I/Os of no length make H have
//!   events, which wake them, and belong to nobody. Who takes such an event and is no waiter, or
//!   leaves others waiting, kicks again.

use core::mem::MaybeUninit;
use core::sync::atomic::{Ordering, fence};

use libc::timespec;
use stableio_onepass as onepass;

use super::abi::{Event, IOCB_CMD_PREAD, Iocb, SigSet};
use super::agent;
use super::context::{Context, Held};
use super::finish::{KICK, finish, tell};
use crate::calls::SYS_IO_PGETEVENTS;
use crate::gate::syscall;

/// Events that are handled at once: 1 KiB of stack.
const BATCH: usize = 32;

const NO_TIME: timespec = timespec { tv_sec: 0, tv_nsec: 0 };

/// What a program waits for.
pub(super) struct Want {
    pub(super) min: i64,
    pub(super) max: i64,
    /// The program's array.
    pub(super) events: usize,
    /// How long; `None`: for ever.
    pub(super) time: Option<timespec>,
    /// The signal mask to wait with, if not the thread's.
    pub(super) mask: Option<u64>,
}

/// `io_getevents` and `io_pgetevents`.
pub(super) fn get_events(context: &Held, want: &Want) -> isize {
    if want.min < 0 || want.min > want.max {
        return -(libc::EINVAL as isize);
    }
    let (min, max) = (want.min as usize, want.max as usize);
    let clock = Clock::of(want.time);
    let mut batch = Batch::NEW;
    let mut got = 0;
    let error = loop {
        let room = BATCH.min(max - got);
        let target = batch.at(want.events, got);
        batch.take_visible(context, room);
        if batch.count > 0 {
            match batch.deliver(context, target) {
                Ok(()) => got += batch.count,
                Err(error) => break error,
            }
            continue;
        }
        let missing = min.saturating_sub(got);
        let left = if missing == 0 { Some(NO_TIME) } else { clock.left() };
        let blocks = left.is_none_or(|left| left.tv_sec != 0 || left.tv_nsec != 0);
        if room == 0 || !blocks && !context.has_events() {
            break 0;
        }
        let result = if blocks {
            wait(context, missing.min(room), room, left, want.mask, &mut batch)
        } else {
            let result = batch.fill(context, 0, room, Some(NO_TIME), None);
            if batch.kicked {
                wake_waiters(context);
            }
            result
        };
        if context.is_dying() {
            break -(libc::EINVAL as isize);
        }
        match result {
            Ok(0) if !blocks || clock.is_over() => break 0,
            Ok(_) => {}
            Err(error) => break error,
        }
        match batch.deliver(context, target) {
            Ok(()) => got += batch.count,
            Err(error) => break error,
        }
    };
    // As from the kernel: an error is not told if there is something else to tell.
    if got > 0 { got as isize } else { error }
}

/// Waits for events on H, as one of its waiters (AIO-4).
fn wait(
    context: &Context,
    min: usize,
    max: usize,
    time: Option<timespec>,
    mask: Option<u64>,
    batch: &mut Batch,
) -> Result<usize, isize> {
    context.waiters.fetch_add(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    let result = if context.visible() > 0 || context.is_dying() {
        batch.count = 0;
        Ok(1)
    } else {
        // Others may get at the events before us where there are others.
        let min = if context.peeked_at.load(Ordering::Relaxed) != 0 { 1 } else { min };
        batch.fill(context, min, max, time, mask)
    };
    let others = context.waiters.fetch_sub(1, Ordering::SeqCst) - 1;
    if others > 0 && context.visible() > 0 {
        kick(context);
    }
    if others == 0 {
        agent::ring(context);
    }
    result
}

/// Publishes what H has; waits for something if `waits`. Returns what the kernel said last.
pub(super) fn drain(context: &Context, waits: bool) -> isize {
    if context.is_interrupted() {
        return 0;
    }
    let mut batch = Batch::NEW;
    let mut first = waits;
    while first || context.has_events() {
        let time = if first { None } else { Some(NO_TIME) };
        match batch.fill(context, usize::from(first), BATCH, time, None) {
            Ok(0) => return 0,
            Err(error) => return error,
            Ok(_) => {}
        }
        first = false;
        batch.publish(context);
        if wake_waiters(context) {
            // They get the rest themselves, and what wakes them.
            return 0;
        }
    }
    0
}

/// Kicks those who wait, if there are any: something was published, or a kick was taken (AIO-4).
fn wake_waiters(context: &Context) -> bool {
    fence(Ordering::SeqCst);
    let any = context.waiters.load(Ordering::SeqCst) > 0;
    if any {
        kick(context);
    }
    any
}

/// After `io_submit`: publishes what the kernel has done, much of it at once. That is for programs
/// that look at the ring, and for all others because memory that is free early is used again while
/// it is still in the processor's caches. Not while somebody waits on H, who gets it there.
pub(super) fn after_submit(context: &Context) {
    if context.waiters.load(Ordering::SeqCst) == 0 {
        drain(context, false);
    }
}

/// Finishes, for nobody, what H has, waiting a little for it: the program destroys the context.
pub(super) fn discard(context: &Context) {
    let little = timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    let mut batch = Batch::NEW;
    if batch.fill(context, 1, BATCH, Some(little), None).is_ok() {
        tell(batch.resfds());
    }
}

/// Wakes all who wait on H, however many events they wait for.
pub(super) fn kick(context: &Context) {
    // SAFETY: makes and closes a file of no length, of which the kernel reads nothing to nowhere
    // before `io_submit` comes back.
    unsafe {
        let fd = syscall!(libc::SYS_memfd_create, c"".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return;
        }
        let iocb = Iocb {
            data: KICK,
            key: 0,
            rw_flags: 0,
            opcode: IOCB_CMD_PREAD,
            reqprio: 0,
            fildes: fd as u32,
            buf: 0,
            nbytes: 0,
            offset: 0,
            reserved2: 0,
            flags: 0,
            resfd: 0,
        };
        let iocbs = [&raw const iocb; BATCH];
        syscall!(libc::SYS_io_submit, context.kernel(), iocbs.len(), iocbs.as_ptr());
        syscall!(libc::SYS_close, fd);
    }
}

/// Finished events on their way to the program.
struct Batch {
    /// The first `count` are there. Not set before: it is made twice for each I/O.
    room: [MaybeUninit<Event>; BATCH],
    /// Their eventfds, or -1.
    resfds: [MaybeUninit<i32>; BATCH],
    count: usize,
    /// Whether a kick was among them.
    kicked: bool,
}

impl Batch {
    const NEW: Batch = Batch {
        room: [MaybeUninit::uninit(); BATCH],
        resfds: [MaybeUninit::uninit(); BATCH],
        count: 0,
        kicked: false,
    };

    fn events(&self) -> &[Event] {
        // SAFETY: the first `count` are there.
        unsafe { core::slice::from_raw_parts(self.room.as_ptr().cast(), self.count) }
    }

    fn resfds(&self) -> &[i32] {
        // SAFETY: the first `count` are there.
        unsafe { core::slice::from_raw_parts(self.resfds.as_ptr().cast(), self.count) }
    }

    /// Adds a finished event: there is room while the events that were taken are gone through.
    fn push(&mut self, event: Event, resfd: i32) {
        self.room[self.count].write(event);
        self.resfds[self.count].write(resfd);
        self.count += 1;
    }

    /// Takes events from the visible ring, whose eventfds were told when they were published.
    fn take_visible(&mut self, context: &Context, max: usize) {
        self.count = context.take_visible(&mut self.room[..max]);
        self.resfds[..self.count].fill(MaybeUninit::new(-1));
    }

    /// Takes events from H, and finishes them. Returns how many there were, which may be more than
    /// the program is to have.
    fn fill(
        &mut self,
        context: &Context,
        min: usize,
        max: usize,
        time: Option<timespec>,
        mask: Option<u64>,
    ) -> Result<usize, isize> {
        (self.count, self.kicked) = (0, false);
        let (kernel, into) = (context.kernel(), self.room.as_mut_ptr());
        let time = time.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
        // SAFETY: `into` has room for `BATCH` events, and `max` is no more; the others are null or
        // valid for reads.
        let result = unsafe {
            match &mask {
                None => syscall!(libc::SYS_io_getevents, kernel, min, max, into, time),
                Some(mask) => {
                    let set = SigSet { mask: core::ptr::from_ref(mask) as usize, size: 8 };
                    let set = &raw const set;
                    syscall!(SYS_IO_PGETEVENTS, kernel, min, max, into, time, set)
                }
            }
        };
        let got = usize::try_from(result).map_err(|_| result)?;
        for i in 0..got.min(BATCH) {
            // SAFETY: the kernel has written so many. None is overwritten before it is read, as no
            // more are pushed than were read.
            let event = unsafe { self.room[i].assume_init() };
            self.kicked |= event.data == KICK;
            if let Some((event, resfd)) = finish(context, &event) {
                self.push(event, resfd);
            }
        }
        Ok(got)
    }

    /// Where the program's event of this number goes.
    fn at(&self, events: usize, number: usize) -> usize {
        events.wrapping_add(number.wrapping_mul(size_of::<Event>()))
    }

    /// Hands the events to the program, at `to`. If they can not be written there, they are
    /// published: the program may ask again.
    fn deliver(&mut self, context: &Context, to: usize) -> Result<(), isize> {
        let events = self.events();
        let (from, bytes) = (events.as_ptr().cast(), size_of_val(events));
        // SAFETY: the program's memory is foreign, and may be inaccessible; ours holds so much.
        let copied = unsafe { onepass::copy_out(from, to as *mut u8, bytes) };
        if copied.is_err() {
            self.publish(context);
            wake_waiters(context);
            return Err(-(libc::EFAULT as isize));
        }
        tell(self.resfds());
        Ok(())
    }

    /// Puts the events into the visible ring, and tells their eventfds.
    fn publish(&mut self, context: &Context) {
        if self.count == 0 {
            return;
        }
        context.publish(self.events());
        tell(self.resfds());
    }
}

/// How long a program still wants to wait.
struct Clock {
    /// `CLOCK_MONOTONIC` in nanoseconds; `None`: there is no end.
    end: Option<i128>,
    whole: Option<timespec>,
}

impl Clock {
    fn of(time: Option<timespec>) -> Clock {
        let end = time.filter(|time| time.tv_sec != 0 || time.tv_nsec != 0);
        Clock { end: end.map(|time| now() + nanoseconds(time)), whole: time }
    }

    fn left(&self) -> Option<timespec> {
        let Some(end) = self.end else { return self.whole };
        let left = (end - now()).max(0);
        Some(timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        })
    }

    fn is_over(&self) -> bool {
        self.end.is_some_and(|end| end <= now())
    }
}

fn now() -> i128 {
    let mut now = NO_TIME;
    // SAFETY: writes the time there; answered without a system call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    nanoseconds(now)
}

fn nanoseconds(time: timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}
