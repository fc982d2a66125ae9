//! One thread's io_uring: operations as futures.
//!
//! RING-1: the ring owns what an operation reads from or fills until the
//! kernel is done with it. Dropping the future detaches: the operation goes
//! on, and its memory is released when its completion arrives.
//!
//! RING-2: at most [`SLOTS`] operations are under way; more wait for a slot.
//! So completions never overflow and memory is bounded.
//!
//! RING-3: when a ring is dropped it waits for every operation under way.
//! What waits for an event ([`poll`], [`sleep`]) touches no memory and is
//! cancelled when its future or the ring is dropped, so that this wait ends.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use stableio_mem::{Segment, SgList};

use crate::sync::Condition;

/// Operations under way at once.
pub const SLOTS: usize = 2048;

/// Marks the completion of a cancellation, which nobody waits for.
const CANCELLED: u64 = u64::MAX;

/// `IORING_ENTER_GETEVENTS`: with deferred task work, completions are only
/// posted when asked for.
const ENTER_GETEVENTS: u32 = 1;

thread_local! {
    static RING: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// The ring of a worker's thread.
pub(crate) struct Ring {
    io: RefCell<IoUring>,
    /// Never moved: the kernel follows pointers into the slots.
    slots: RefCell<Box<[Slot]>>,
    free: RefCell<Vec<u16>>,
    freed: Condition,
    queued: Cell<bool>,
    in_kernel: Cell<usize>,
}

/// What the kernel may follow while an operation runs, and who waits.
#[derive(Default)]
struct Slot {
    list: SgList,
    time: types::Timespec,
    waker: Option<Waker>,
    result: Option<i32>,
    detached: bool,
    /// Waits for an event that may never come.
    idle: bool,
}

impl Ring {
    /// A ring for this thread, which alone submits to it.
    pub(crate) fn new() -> io::Result<Rc<Self>> {
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(2 * SLOTS as u32)
            .build(256)
            // Kernels before 6.1 know neither flag.
            .or_else(|_| IoUring::builder().setup_cqsize(2 * SLOTS as u32).build(256))?;
        let slots: Vec<Slot> = (0..SLOTS).map(|_| Slot::default()).collect();
        Ok(Rc::new(Self {
            io: RefCell::new(io),
            slots: RefCell::new(slots.into_boxed_slice()),
            free: RefCell::new((0..SLOTS as u16).rev().collect()),
            freed: Condition::default(),
            queued: Cell::new(false),
            in_kernel: Cell::new(0),
        }))
    }

    /// Makes this the thread's ring while `body` runs.
    pub(crate) fn enter<T>(self: &Rc<Self>, body: impl FnOnce() -> T) -> T {
        struct Leave(Option<Rc<Ring>>);
        impl Drop for Leave {
            fn drop(&mut self) {
                RING.with(|r| *r.borrow_mut() = self.0.take());
            }
        }
        let _leave = Leave(RING.with(|r| r.borrow_mut().replace(self.clone())));
        body()
    }

    /// Submits what is queued, waits for a completion if `wait`, and wakes
    /// whoever waits for those that arrived.
    pub(crate) fn turn(&self, wait: bool) -> io::Result<()> {
        let mut io = self.io.borrow_mut();
        if wait || self.queued.replace(false) || self.in_kernel.get() > 0 {
            let queued = io.submission().len() as u32;
            let want = u32::from(wait);
            // SAFETY: no argument is passed beside the numbers; the queued
            // entries point into slots that stay until their completion
            // (RING-1).
            let entered = unsafe {
                io.submitter().enter::<libc::sigset_t>(queued, want, ENTER_GETEVENTS, None)
            };
            match entered {
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(e) => return Err(e),
            }
        }
        let mut slots = self.slots.borrow_mut();
        let mut wakers: smallvec::SmallVec<[Waker; 32]> = smallvec::SmallVec::new();
        let mut freed = false;
        for completion in io.completion() {
            self.in_kernel.set(self.in_kernel.get() - 1);
            if completion.user_data() == CANCELLED {
                continue;
            }
            let slot = &mut slots[completion.user_data() as usize];
            slot.list = SgList::default();
            if slot.detached {
                *slot = Slot::default();
                self.free.borrow_mut().push(completion.user_data() as u16);
                freed = true;
                continue;
            }
            slot.result = Some(completion.result());
            wakers.extend(slot.waker.take());
        }
        drop((slots, io));
        wakers.into_iter().for_each(Waker::wake);
        if freed {
            self.freed.notify();
        }
        Ok(())
    }

    /// Queues an operation. `entry` gets the slot's place to point into.
    fn push(&self, index: u16, list: SgList, entry: impl FnOnce(&mut Slot) -> squeue::Entry) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[index as usize];
        slot.list = list;
        let entry = entry(slot).user_data(u64::from(index));
        drop(slots);
        self.queue(&entry);
    }

    /// Tells the kernel to give up the operation in a slot. Its completion
    /// arrives as any other.
    fn cancel(&self, index: u16) {
        self.queue(&opcode::AsyncCancel::new(u64::from(index)).build().user_data(CANCELLED));
    }

    fn queue(&self, entry: &squeue::Entry) {
        let mut io = self.io.borrow_mut();
        if io.submission().is_full() {
            // A full queue is handed over early; completions wait for `turn`.
            if let Err(e) = io.submit() {
                assert!(
                    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)),
                    "submit: {e}"
                );
            }
        }
        // SAFETY: the entry points nowhere, or only into its slot, which does
        // not move (a boxed slice), and to memory that `slot.list` keeps alive until
        // the completion arrives (RING-1).
        let pushed = unsafe { io.submission().push(entry) };
        pushed.expect("the queue was just emptied");
        self.queued.set(true);
        self.in_kernel.set(self.in_kernel.get() + 1);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let idle: Vec<u16> = {
            let slots = self.slots.borrow();
            let waits = |slot: &Slot| slot.idle && slot.result.is_none();
            (0..SLOTS as u16).filter(|&index| waits(&slots[index as usize])).collect()
        };
        idle.into_iter().for_each(|index| self.cancel(index));
        while self.in_kernel.get() > 0 {
            if self.turn(true).is_err() {
                // The kernel may still write to our memory: leak it.
                std::mem::forget(std::mem::take(&mut *self.slots.borrow_mut()));
                return;
            }
        }
    }
}

/// An operation under way; gives the kernel's result.
struct Operation {
    ring: Rc<Ring>,
    index: u16,
}

impl Future for Operation {
    type Output = i32;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let mut slots = self.ring.slots.borrow_mut();
        let slot = &mut slots[self.index as usize];
        match slot.result {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut slots = self.ring.slots.borrow_mut();
        let slot = &mut slots[self.index as usize];
        if slot.result.is_none() {
            slot.detached = true;
            slot.waker = None;
            let idle = slot.idle;
            drop(slots);
            if idle {
                self.ring.cancel(self.index);
            }
            return;
        }
        *slot = Slot::default();
        drop(slots);
        self.ring.free.borrow_mut().push(self.index);
        self.ring.freed.notify();
    }
}

async fn operate(list: SgList, entry: impl FnOnce(&mut Slot) -> squeue::Entry) -> io::Result<u32> {
    let ring = RING.with(|r| r.borrow().clone()).expect("on a worker's thread");
    let free = ring.free.borrow_mut().pop();
    let index = match free {
        Some(index) => index,
        None => ring.freed.wait_for(|| ring.free.borrow_mut().pop()).await,
    };
    ring.push(index, list, entry);
    let result = Operation { ring, index }.await;
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u32) }
}

/// Whether this thread has a ring: a simulated one has none, nor a clock.
pub fn is_here() -> bool {
    RING.with(|r| r.borrow().is_some())
}

/// Hands what this thread has queued to the kernel now, not at its next look
/// at the ring: for transfers that another thread of the kernel's carries out
/// while this one goes on.
pub fn submit() {
    let ring = RING.with(|r| r.borrow().clone());
    if let Some(ring) = ring {
        // What is refused now is taken at the next turn.
        let _ = ring.io.borrow().submit();
    }
}

/// Ranges that one call takes; the rest is left, and done by the next.
fn count(segments: &[Segment]) -> u32 {
    segments.len().min(libc::UIO_MAXIOV as usize) as u32
}

fn fd(fd: RawFd) -> types::Fd {
    types::Fd(fd)
}

/// Reads at `at` into the list; gives the bytes read. `file` must stay open
/// until then.
pub async fn read(file: RawFd, into: SgList, at: u64) -> io::Result<u32> {
    operate(into, |slot| match slot.list.segments() {
        [one] => {
            opcode::Read::new(fd(file), one.addr as *mut u8, one.len as u32).offset(at).build()
        }
        many => opcode::Readv::new(fd(file), many.as_ptr().cast(), count(many)).offset(at).build(),
    })
    .await
}

/// Writes the list at `at`; gives the bytes written. `durable` adds
/// `RWF_DSYNC`.
pub async fn write(file: RawFd, from: SgList, at: u64, durable: bool) -> io::Result<u32> {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    operate(from, |slot| match slot.list.segments() {
        [one] => opcode::Write::new(fd(file), one.addr as *const u8, one.len as u32)
            .offset(at)
            .rw_flags(flags)
            .build(),
        many => opcode::Writev::new(fd(file), many.as_ptr().cast(), count(many))
            .offset(at)
            .rw_flags(flags)
            .build(),
    })
    .await
}

/// Makes a file's data durable.
pub async fn sync(file: RawFd) -> io::Result<()> {
    let flags = types::FsyncFlags::DATASYNC;
    operate(SgList::default(), |_| opcode::Fsync::new(fd(file)).flags(flags).build())
        .await
        .map(drop)
}

/// `fallocate(2)`.
pub async fn fallocate(file: RawFd, mode: i32, at: u64, len: u64) -> io::Result<()> {
    operate(SgList::default(), |_| {
        opcode::Fallocate::new(fd(file), len).offset(at).mode(mode).build()
    })
    .await
    .map(drop)
}

/// Waits until a file is ready for `events` (`POLLIN`, `POLLOUT`).
pub async fn poll(file: BorrowedFd<'_>, events: i16) -> io::Result<()> {
    let file = file.as_raw_fd();
    operate(SgList::default(), |slot| {
        slot.idle = true;
        opcode::PollAdd::new(fd(file), events as u32).build()
    })
    .await
    .map(drop)
}

/// Waits for a while.
pub async fn sleep(time: Duration) {
    let done = operate(SgList::default(), |slot| {
        slot.idle = true;
        slot.time = types::Timespec::from(time);
        opcode::Timeout::new(&raw const slot.time).build()
    });
    // A timeout that runs out completes with ETIME.
    let _ = done.await;
}
