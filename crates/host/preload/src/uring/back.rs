//! The ring behind a ring: I/Os whose completion this library has to see before the program does.
//!
//! ```text
//! the program's SQ ─ submit ─> back SQ ─ kernel ─> back CQ ─ reap ─> io.end ─ MSG_RING ─> its CQ
//! ```
//!
//! Entries go in on the thread that submits them, so that the kernel knows them as that thread's.
//! Completions are taken by whoever looks first: the agent, a thread of ours that waits for them,
//! or a thread of the program that is about to submit or to wait.
//!
//! - **BACK-1** A completion is posted to the program once, and after `end` has looked at it.
//! - **BACK-2** Under `sq`: the queue's tail, `free` and the operations that are in it. Under
//!   `cq`: the queue's head. Nothing waits for an I/O while it holds either.
//! - **BACK-4** The agent takes nothing while somebody else is about to wait for it: the other
//!   would wait for what has come. (That a second thread of the program takes it, the other's
//!   patience makes good.)
//! - **BACK-3** The place of an operation is used again as late as can be: its message to the
//!   program can be repeated if the kernel had no memory for it.

use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use super::abi::{
    CQE_SKIP_SUCCESS, Cqe, ENTER_EXT_ARG, ENTER_GETEVENTS, OP_MSG_RING, OP_NOP, Params,
    REGISTER_FILES_UPDATE2, REGISTER_FILES2, RSRC_REGISTER_SPARSE, RsrcRegister, RsrcUpdate,
    SETUP_CQSIZE, SETUP_SUBMIT_ALL, Sqe,
};
use super::lock::Lock;
use super::map::{Map, memory, patch, unmap};
use crate::gate::{call_with_cookie, syscall};
use crate::io::{Dir, Io};
use crate::process;
use crate::session;
use crate::signals;
use crate::uncached;

/// Entries of the submission queue.
const ENTRIES: u32 = 256;
/// Operations that a ring has under way at most; a power of two, below `MESSAGE`.
pub(super) const OPERATIONS: usize = 4096;
/// Completions that are taken at once.
const BATCH: usize = 32;
/// The same under `detect`.
const WATCHED_BATCH: usize = 4;
/// Where descriptors of ours begin: above what programs reach by counting.
const HIGH: usize = 1000;

/// How long the agent sleeps while the program's threads take its place: the longest that a
/// completion may wait for it when they stop. Nanoseconds.
const LEADERS_NAP_NS: i64 = 100_000;
/// How long a thread of the program waits in the agent's place. Nanoseconds.
const LEADERS_PATIENCE_NS: i64 = 10_000_000;
/// A short wait for memory, or for others. Nanoseconds.
pub(super) const NAP_NS: i64 = 50_000;

/// In `user_data`: the message about the operation, not the operation.
const MESSAGE: u64 = 1 << 32;
/// `user_data` of what only wakes the agent.
const WAKE: u64 = u64::MAX;

const NO_IO: u32 = u32::MAX;

/// `struct io_uring_getevents_arg` of linux/io_uring.h.
#[repr(C)]
struct GetEvents {
    mask: u64,
    mask_len: u32,
    pad: u32,
    time: u64,
}

/// What is known of an entry of the back ring.
#[derive(Clone, Copy)]
pub(super) struct Operation {
    /// The program's.
    pub(super) user_data: u64,
    io: u32,
    /// What the program hears, once it has ended.
    result: i32,
    /// It is not told of success.
    silent: bool,
    pub(super) after: After,
}

/// What is to be done when an operation has ended, before the program hears of it.
#[derive(Clone, Copy)]
pub(super) enum After {
    Nothing,
    /// It went through the page cache: there is something to write back, and to drop.
    Settle {
        fd: i32,
        dir: Dir,
        offset: i64,
    },
}

impl Operation {
    pub(super) fn new(sqe: &Sqe, io: Option<Io>, after: After) -> Operation {
        Operation {
            user_data: sqe.user_data,
            io: io.map_or(NO_IO, Io::index),
            result: 0,
            silent: sqe.flags & CQE_SKIP_SUCCESS != 0,
            after,
        }
    }
}

/// Under `sq`.
struct Queue {
    map: Map,
    /// All operations, and behind them a queue of the numbers of those that are free.
    memory: usize,
    free_head: u32,
    free_tail: u32,
}

/// The ring behind a ring.
pub(super) struct Back {
    ready: AtomicBool,
    closing: AtomicBool,
    fd: AtomicI32,
    /// The program's ring.
    target: AtomicI32,
    in_flight: AtomicU32,
    /// Those whose completion nobody has taken.
    unseen: AtomicU32,
    /// How often a thread of the program has taken the agent's place since the agent last looked.
    led: AtomicU32,
    sq: Lock,
    cq: Lock,
    queue: UnsafeCell<Queue>,
}

// SAFETY: `queue` is touched under `sq`; its map does not change while the ring is ready.
unsafe impl Sync for Back {}

const MEMORY: usize = OPERATIONS * (size_of::<Operation>() + size_of::<u32>());

impl Back {
    pub(super) const fn new() -> Back {
        let queue = Queue { map: Map::NONE, memory: 0, free_head: 0, free_tail: 0 };
        Back {
            ready: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            fd: AtomicI32::new(-1),
            target: AtomicI32::new(-1),
            in_flight: AtomicU32::new(0),
            unseen: AtomicU32::new(0),
            led: AtomicU32::new(0),
            sq: Lock::new(),
            cq: Lock::new(),
            queue: UnsafeCell::new(queue),
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// A descriptor of the program's ring; negative: none.
    pub(super) fn target(&self) -> i32 {
        self.target.load(Ordering::Relaxed)
    }

    /// Operations that the program has not heard of yet.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Makes the ring and its agent, for the program's ring behind `target`. The caller holds that
    /// ring's lock. False if the kernel refuses.
    pub(super) fn make(&'static self, target: i32) -> bool {
        if self.is_ready() {
            return true;
        }
        let mut params = Params {
            flags: SETUP_CQSIZE | SETUP_SUBMIT_ALL,
            // Room for each operation and for each message that failed.
            cq_entries: 2 * OPERATIONS as u32,
            ..Params::ZERO
        };
        let dup = libc::F_DUPFD_CLOEXEC;
        // SAFETY: the kernel fills the parameters; the rest goes without memory.
        unsafe {
            let made = call_with_cookie(
                libc::SYS_io_uring_setup,
                [ENTRIES as usize, (&raw mut params) as usize, 0, 0, 0],
            );
            if made < 0 {
                return false;
            }
            let Some(map) = Map::new(made as i32, &params) else {
                syscall!(libc::SYS_close, made);
                return false;
            };
            let mut fd = syscall!(libc::SYS_fcntl, made, dup, HIGH);
            let mut ours = syscall!(libc::SYS_fcntl, target, dup, HIGH);
            if fd < 0 {
                fd = made;
            } else {
                syscall!(libc::SYS_close, made);
            }
            if ours < 0 {
                ours = syscall!(libc::SYS_fcntl, target, dup, 0);
            }
            let room = memory(MEMORY);
            let (Some(memory), 0..) = (room, ours) else {
                map.unmap();
                syscall!(libc::SYS_close, fd);
                if ours >= 0 {
                    syscall!(libc::SYS_close, ours);
                }
                return false;
            };
            map.number_array();
            *self.queue.get() = Queue { map, memory, free_head: 0, free_tail: OPERATIONS as u32 };
            for i in 0..OPERATIONS {
                (*self.queue.get()).free_at(i as u32).write(i as u32);
            }
            self.fd.store(fd as i32, Ordering::Relaxed);
            self.target.store(ours as i32, Ordering::Relaxed);
        }
        self.closing.store(false, Ordering::Relaxed);
        self.in_flight.store(0, Ordering::Relaxed);
        self.unseen.store(0, Ordering::Relaxed);
        self.ready.store(true, Ordering::Release);
        if !process::spawn(agent, core::ptr::from_ref(self).cast_mut().cast()) {
            self.free();
            return false;
        }
        true
    }

    fn map(&self) -> Map {
        // SAFETY: written by `make` before the ring was ready.
        unsafe { (*self.queue.get()).map }
    }

    fn enter(&self, submit: u32, wait: u32) -> isize {
        let flags = if wait > 0 { ENTER_GETEVENTS } else { 0 };
        let fd = self.fd.load(Ordering::Relaxed);
        // SAFETY: the entries that are submitted point to memory that lives until they complete:
        // that of their `Io`, or the program's own.
        unsafe { syscall!(libc::SYS_io_uring_enter, fd, submit, wait, flags, 0, 0) }
    }

    /// Whether so many operations can be submitted.
    pub(super) fn has_room(&self, count: usize) -> bool {
        let _held = self.sq.take();
        // SAFETY: under `sq` (BACK-2).
        let queue = unsafe { &*self.queue.get() };
        queue.free_tail.wrapping_sub(queue.free_head) as usize >= count
    }

    /// Submits operations; there is room ([`Back::has_room`], under the lock of the program's
    /// ring, under which all come here). Each entry's `user_data` is set here.
    pub(super) fn submit<'a>(&self, operations: impl Iterator<Item = (Sqe, Operation)> + 'a) {
        let _held = self.sq.take();
        // SAFETY: under `sq` (BACK-2).
        let queue = unsafe { &mut *self.queue.get() };
        let (mut waiting, mut linked) = (0, false);
        for (mut sqe, operation) in operations {
            // A chain must not be cut by the end of a submission.
            if waiting == ENTRIES || (waiting > ENTRIES / 2 && !linked) {
                self.flush(waiting);
                waiting = 0;
            }
            linked = sqe.flags & (super::abi::IO_LINK | super::abi::IO_HARDLINK) != 0;
            let number = queue.take_free();
            sqe.user_data = u64::from(number);
            // SAFETY: inside of the memory that `make` mapped; the place was free.
            unsafe { *queue.operation(number) = operation };
            self.in_flight.fetch_add(1, Ordering::AcqRel);
            self.unseen.fetch_add(1, Ordering::Relaxed);
            queue.push(&sqe);
            waiting += 1;
        }
        self.flush(waiting);
    }

    /// Has the kernel take so many entries. Under `sq`.
    fn flush(&self, mut waiting: u32) {
        while waiting > 0 {
            match self.enter(waiting, 0) {
                taken @ 1.. => waiting -= (taken as u32).min(waiting),
                // The program closed what it did not open.
                error if error == -(libc::EBADF as isize) => return,
                // For want of memory, or while completions overflow.
                _ => nap(NAP_NS),
            }
        }
    }

    /// Has the agent hold back for a while: a thread of the program is about to look again.
    pub(super) fn replaces_agent(&self) {
        self.led.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits for a completion in the agent's place, on a thread that would have to wait for the
    /// agent to pass it on. The kernel's result; `None`: there is nothing to wait for, any more.
    pub(super) fn lead(&self, mask: u64, mask_len: u32) -> Option<isize> {
        // Before it looks: from now on the agent takes nothing (BACK-4).
        self.replaces_agent();
        let map = self.map();
        {
            let _held = self.cq.take();
            let empty = map.cq_head().load(Ordering::Relaxed) == map.cq_tail();
            if !empty || self.unseen.load(Ordering::Relaxed) == 0 {
                return None;
            }
        }
        let time = libc::timespec { tv_sec: 0, tv_nsec: LEADERS_PATIENCE_NS };
        let arg = GetEvents { mask, mask_len, pad: 0, time: (&raw const time) as u64 };
        let (flags, fd) = (ENTER_GETEVENTS | ENTER_EXT_ARG, self.fd.load(Ordering::Relaxed));
        // SAFETY: waits; the signal mask is the program's own argument.
        let result = unsafe {
            let size = size_of_val(&arg);
            syscall!(libc::SYS_io_uring_enter, fd, 0, 1, flags, &raw const arg, size)
        };
        (result != -(libc::ETIME as isize)).then_some(result)
    }

    /// Takes completions that are there, and has the program hear of them. How many.
    pub(super) fn reap(&self) -> usize {
        self.reap_as(false)
    }

    fn reap_as(&self, agent: bool) -> usize {
        if !self.is_ready() {
            return 0;
        }
        let mut batch = [Cqe { user_data: 0, res: 0, flags: 0 }; BATCH];
        // What changes between the look at the memory and the message is not found, although the
        // program was not told yet: that is to be short.
        let most = if session::detects() { WATCHED_BATCH } else { BATCH };
        let mut sum = 0;
        loop {
            let count = self.take_completions(&mut batch[..most], agent);
            if count == 0 {
                return sum;
            }
            for cqe in &mut batch[..count] {
                self.finish(cqe);
            }
            self.post(&batch[..count]);
            sum += count;
        }
    }

    fn take_completions(&self, batch: &mut [Cqe], agent: bool) -> usize {
        let map = self.map();
        if map.cq_head().load(Ordering::Relaxed) == map.cq_tail() {
            return 0;
        }
        let Some(_held) = self.cq.try_take() else { return 0 };
        if agent && self.led.load(Ordering::SeqCst) > 0 {
            return 0;
        }
        let (mut head, tail) = (map.cq_head().load(Ordering::Relaxed), map.cq_tail());
        let mut count = 0;
        while head != tail && count < batch.len() {
            if let Some((cqe, _)) = map.cqe(head)
                && cqe.user_data != WAKE
            {
                batch[count] = cqe;
                count += 1;
            }
            head = head.wrapping_add(1);
        }
        map.cq_head().store(head, Ordering::Release);
        let operations = batch[..count].iter().filter(|cqe| cqe.user_data & MESSAGE == 0);
        self.unseen.fetch_sub(operations.count() as u32, Ordering::Relaxed);
        count
    }

    /// Ends the I/O of a completed operation (BACK-1).
    fn finish(&self, cqe: &mut Cqe) {
        if cqe.user_data & MESSAGE != 0 {
            return;
        }
        // SAFETY: the operation has completed and is its reaper's until it is given back.
        let operation = unsafe { &mut *(*self.queue.get()).operation(cqe.user_data as u32) };
        let mut result = cqe.res as isize;
        if let After::Settle { fd, dir, offset } = operation.after
            && result > 0
        {
            result = uncached::settle(fd, dir, offset, result);
        }
        if let Some(io) = Io::from_index(operation.io) {
            result = io.end(result);
        }
        operation.result = result as i32;
    }

    /// Sends the program the results.
    fn post(&self, batch: &[Cqe]) {
        let _held = self.sq.take();
        // SAFETY: under `sq` (BACK-2).
        let queue = unsafe { &mut *self.queue.get() };
        let (mut waiting, mut ended) = (0, 0);
        for cqe in batch {
            let number = cqe.user_data as u32;
            let is_message = cqe.user_data & MESSAGE != 0;
            // SAFETY: inside of the memory that `make` mapped, and written by `submit`.
            let operation = unsafe { *queue.operation(number) };
            if is_message && given_up(cqe.res) {
                continue;
            }
            if is_message || !(operation.silent && operation.result >= 0) {
                queue.push(&self.message(number, &operation));
                waiting += 1;
            }
            if !is_message {
                queue.give_free(number);
                ended += 1;
            }
        }
        self.flush(waiting);
        self.in_flight.fetch_sub(ended, Ordering::AcqRel);
    }

    /// `IORING_OP_MSG_RING` (io_uring_enter(2)): posts `len` as result and `off` as `user_data`.
    fn message(&self, number: u32, operation: &Operation) -> Sqe {
        Sqe {
            opcode: OP_MSG_RING,
            flags: CQE_SKIP_SUCCESS,
            fd: self.target.load(Ordering::Relaxed),
            off: operation.user_data,
            len: operation.result as u32,
            user_data: MESSAGE | u64::from(number),
            ..Sqe::ZERO
        }
    }

    /// Has place `index` of the ring's files mean the same as in the program's ring.
    pub(super) fn set_file(&self, index: u32, fd: i32) -> bool {
        let update = RsrcUpdate {
            offset: index,
            resv: 0,
            data: (&raw const fd) as u64,
            tags: 0,
            nr: 1,
            resv2: 0,
        };
        self.register(REGISTER_FILES_UPDATE2, (&raw const update) as usize, size_of_val(&update))
            == 1
    }

    /// Makes places for so many files.
    pub(super) fn make_files(&self, nr: u32) -> bool {
        let files = RsrcRegister { nr, flags: RSRC_REGISTER_SPARSE, resv2: 0, data: 0, tags: 0 };
        let size = size_of_val(&files);
        self.register(REGISTER_FILES2, (&raw const files) as usize, size) == 0
    }

    pub(super) fn register(&self, operation: u32, arg: usize, count: usize) -> isize {
        let fd = self.fd.load(Ordering::Relaxed);
        // SAFETY: `arg` is what the operation asks for, of this size.
        unsafe { syscall!(libc::SYS_io_uring_register, fd, operation, arg, count) }
    }

    /// The program's ring is gone: the agent ends when all operations have.
    pub(super) fn close(&self) {
        // Under the lock, so that the agent, which sees the mark at once, does not unmap what is
        // being used here.
        let _held = self.sq.take();
        self.closing.store(true, Ordering::Release);
        // SAFETY: under `sq` (BACK-2).
        let queue = unsafe { &mut *self.queue.get() };
        queue.push(&Sqe { opcode: OP_NOP, user_data: WAKE, ..Sqe::ZERO });
        self.flush(1);
    }

    fn free(&self) {
        drop(self.sq.take());
        // SAFETY: nobody else uses the ring any more: its operations have ended, and the record of
        // the program's ring is not given out before `ready` is false.
        unsafe {
            let queue = &mut *self.queue.get();
            queue.map.unmap();
            unmap(queue.memory, MEMORY);
            queue.map = Map::NONE;
            for fd in [&self.fd, &self.target] {
                syscall!(libc::SYS_close, fd.swap(-1, Ordering::Relaxed));
            }
        }
        self.ready.store(false, Ordering::Release);
    }

    /// In a forked child: lets go of what it inherited, of which nothing is its own.
    pub(super) fn after_fork(&self) {
        self.sq.reset();
        self.cq.reset();
        if self.is_ready() {
            self.free();
        }
    }
}

/// Whether a message that failed can never arrive: nobody is there to see it.
fn given_up(error: i32) -> bool {
    matches!(-error, libc::EBADFD | libc::EBADF | libc::EOWNERDEAD)
}

impl Queue {
    fn operation(&self, number: u32) -> *mut Operation {
        (self.memory as *mut Operation).wrapping_add(number as usize & (OPERATIONS - 1))
    }

    fn free_at(&self, position: u32) -> *mut u32 {
        let first = self.memory + OPERATIONS * size_of::<Operation>();
        (first as *mut u32).wrapping_add(position as usize & (OPERATIONS - 1))
    }

    fn take_free(&mut self) -> u32 {
        // SAFETY: inside of the memory that `make` mapped, and filled by `make` or `give_free`.
        let number = unsafe { *self.free_at(self.free_head) };
        self.free_head = self.free_head.wrapping_add(1);
        number
    }

    fn give_free(&mut self, number: u32) {
        // SAFETY: as above.
        unsafe { *self.free_at(self.free_tail) = number };
        self.free_tail = self.free_tail.wrapping_add(1);
    }

    /// Puts an entry into the queue, in which there is room: each holder of `sq` flushes what it
    /// pushed, at most `ENTRIES`.
    fn push(&mut self, sqe: &Sqe) {
        let tail = self.map.sq_tail().load(Ordering::Relaxed);
        if let Some(entry) = self.map.sqe(tail) {
            patch(entry, &super::map::load(entry), sqe);
        }
        self.map.sq_tail().store(tail.wrapping_add(1), Ordering::Release);
    }
}

/// Waits for completions, for as long as the program has the ring.
extern "C" fn agent(back: *mut c_void) -> *mut c_void {
    // SAFETY: `make` passed a static.
    let back: &'static Back = unsafe { &*back.cast::<Back>() };
    loop {
        // While the program's threads look themselves, two would wake up for each completion.
        while back.led.swap(0, Ordering::Relaxed) > 0 {
            nap(LEADERS_NAP_NS);
        }
        back.reap_as(true);
        // Before it waits: it may just have taken what was to wake it.
        if back.closing.load(Ordering::Acquire) && back.in_flight() == 0 {
            signals::undisturbed(|| back.free());
            return core::ptr::null_mut();
        }
        back.enter(0, 1);
    }
}

/// Lets others go on, for so many nanoseconds.
pub(super) fn nap(ns: i64) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: ns };
    // SAFETY: reads the time there.
    unsafe { syscall!(libc::SYS_nanosleep, &raw const time, 0) };
}
