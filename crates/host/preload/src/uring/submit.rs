//! What is done with each entry that a program submits.
//!
//! ```text
//! look ──> plan: read, judge, begin ──> hand over: patch, the kernel takes, unpatch ──> keep
//!   ^         a chain at a time                                        │
//!   └────────────── memory was short: the rest ───────────────────────┘
//! ```

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use libc::iovec;
use stableio_session::Engine;

use super::abi::{
    ASYNC, CQE_F_MORE, CQE_SKIP_SUCCESS, ENTER_GETEVENTS, ENTER_REGISTERED_RING, FIXED_FILE,
    IO_DRAIN, IO_HARDLINK, IO_LINK, OP_NOP, OP_READ, OP_READ_FIXED, OP_READ_MULTISHOT, OP_READV,
    OP_READV_FIXED, OP_WRITE, OP_WRITE_FIXED, OP_WRITEV, OP_WRITEV_FIXED, SETUP_DEFER_TASKRUN,
    SETUP_IOPOLL, SQE_WORDS, Sqe,
};
use super::back::{After, NAP_NS, OPERATIONS, Operation, nap};
use super::files::Files;
use super::map::{Map, load, memory, patch, unmap, unpatch};
use super::seen::Seen;
use super::{FOREIGN_COMPLETIONS, Ring, injects};
use crate::files::{self, File};
use crate::gate::syscall;
use crate::io::{self, Dir, Io, Request};
use crate::session;
use crate::site::Caller;
use crate::sync;

/// A longer transfer is cut: the program sees a short count, as from a kernel that stopped there.
const LONGEST: usize = 32 << 20;
/// How often memory is waited for, a nap each time, before the program is asked to come again.
pub(super) const PATIENCE: u32 = 100_000;

/// A ring, as its lock guards it.
pub(super) struct Inner {
    map: Map,
    seen: Seen,
    pub(super) files: Files,
    /// Room for a [`Plan`] of each entry.
    plans: usize,
    /// Up to where completions were looked at.
    looked: u32,
    /// Whether what `seen` says can be relied on (SEEN-2).
    pub(super) counted: bool,
    /// Where an order by `IOSQE_IO_DRAIN`, which the ring behind knows nothing of, is kept.
    drains: Drains,
}

/// Who sees to it that nothing overtakes an entry that asks for that.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drains {
    Nowhere,
    /// The kernel, among the entries of the program's ring.
    InKernel,
    /// This library: the next entry waits until all have completed.
    Here,
}

/// How often completions are waited for to keep an order, a nap each time.
const DRAIN_PATIENCE: u32 = 20_000;

/// What is done with an entry.
pub(super) struct Plan {
    at: &'static [AtomicU64; SQE_WORDS],
    pub(super) before: Sqe,
    pub(super) after: Sqe,
    pub(super) file: File,
    pub(super) way: Way,
    /// Whether its completion can be told from all others.
    pub(super) alone: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Way {
    /// It goes to the kernel, as it is or with another content.
    Native,
    /// Native, and a transfer on a file that is open for direct I/O: it is counted.
    Counted(Dir),
    /// A bounced write, to be.
    Bounce,
    /// A bounced write, its copy made.
    InPlace(Io),
    /// For the ring behind, to be.
    Mediate(After),
    /// The same, begun.
    Behind { sqe: Sqe, io: Option<Io>, after: After },
    /// This descriptor has been opened for it.
    Opened(i32),
    /// Once the kernel has it, registered files are others.
    Update,
}

impl Inner {
    pub(super) const NONE: Inner = Inner {
        map: Map::NONE,
        seen: Seen::NONE,
        files: Files::NONE,
        plans: 0,
        looked: 0,
        counted: false,
        drains: Drains::Nowhere,
    };

    /// For a ring with this memory; it is given back if there is none for the rest.
    pub(super) fn new(map: Map) -> Option<Inner> {
        let (seen, plans) = (Seen::new(map.cq_entries), memory(bytes_of_plans(&map)));
        let mut inner = Inner { map, ..Inner::NONE };
        inner.seen = seen.unwrap_or(Seen::NONE);
        inner.plans = plans.unwrap_or(0);
        inner.looked = map.cq_tail();
        inner.counted = seen.is_some();
        if plans.is_none() {
            inner.free();
            return None;
        }
        Some(inner)
    }

    /// Gives all memory back.
    pub(super) fn free(&mut self) {
        unmap(self.plans, bytes_of_plans(&self.map));
        self.map.unmap();
        self.seen.free();
        self.files.free();
        *self = Inner::NONE;
    }

    fn plan_at(&self, i: u32) -> *mut Plan {
        (self.plans as *mut Plan).wrapping_add(i as usize)
    }

    pub(super) fn plan_of(&mut self, i: u32) -> &mut Plan {
        // SAFETY: there is room for one for each entry of the queue, and `read_chain` has written
        // those that are asked for.
        unsafe { &mut *self.plan_at(i) }
    }

    /// Submits up to `args[1]` entries. `None`: there are none, and the kernel may say so itself.
    pub(super) fn submit(
        &mut self,
        ring: &'static Ring,
        args: &[usize; 6],
        caller: Caller,
    ) -> Option<isize> {
        let wanted = args[1] as u32;
        let (mut sum, mut waits) = (0u32, 0);
        loop {
            self.look();
            let head = self.map.sq_head();
            let there = self.map.sq_tail().load(Ordering::Acquire).wrapping_sub(head);
            let count = there.min(wanted - sum).min(self.map.sq_entries);
            if count == 0 {
                return (sum > 0).then_some(sum as isize);
            }
            let planned = self.plan(ring, head, count, args, caller);
            if planned == 0 && self.map.sqe(head).is_none() {
                // The kernel drops it.
                let dropped = self.kernel_takes(args, 1);
                return Some(if sum > 0 { sum as isize } else { dropped });
            }
            if planned == 0 {
                waits += 1;
                if waits > PATIENCE {
                    let again = -(libc::EAGAIN as isize);
                    return Some(if sum > 0 { sum as isize } else { again });
                }
                self.make_progress(ring, args);
                continue;
            }
            let taken = self.hand_over(ring, args, planned);
            if taken < 0 {
                return Some(if sum > 0 { sum as isize } else { taken });
            }
            sum += taken as u32;
            if (taken as u32) < planned || planned == count {
                return Some(sum as isize);
            }
        }
    }

    /// Whether the program polls for completions of devices.
    pub(super) fn polls(&self) -> bool {
        self.map.flags & SETUP_IOPOLL != 0
    }

    /// Whether completions can come from the ring behind alone.
    pub(super) fn waits_behind(&self, behind: u32) -> bool {
        self.counted && behind > 0 && self.seen.total <= behind
    }

    /// Helps I/Os under way to end, and waits a little.
    fn make_progress(&mut self, ring: &Ring, args: &[usize; 6]) {
        if ring.back.reap() == 0 {
            if self.map.flags & SETUP_DEFER_TASKRUN != 0 {
                // Completions are posted by this thread, when it asks for them.
                let flags = args[3] as u32 & ENTER_REGISTERED_RING | ENTER_GETEVENTS;
                // SAFETY: waits for nothing.
                unsafe { syscall!(libc::SYS_io_uring_enter, args[0], 0, 0, flags, 0, 0) };
            }
            nap(NAP_NS);
        }
        self.look();
    }

    /// Looks at completions since the last time, and gives back what is not needed any more.
    pub(super) fn look(&mut self) {
        let tail = self.map.cq_tail();
        if FOREIGN_COMPLETIONS.load(Ordering::Relaxed) {
            self.counted = false;
        }
        while self.counted && self.looked != tail {
            let Some((cqe, places)) = self.map.cqe(self.looked) else {
                // More came between two calls than the ring holds.
                self.counted = false;
                break;
            };
            self.looked = self.looked.wrapping_add(places);
            if cqe.flags & CQE_F_MORE == 0
                && !self.map.is_filler(&cqe)
                && let Some(io) = self.seen.leave(cqe.user_data)
            {
                io.end(cqe.res as isize);
            }
        }
    }

    /// Waits, within limits, until no copy is under I/O. Whether that is so.
    pub(super) fn drain(&mut self) -> bool {
        for _ in 0..PATIENCE / 5 {
            self.look();
            if self.seen.ios == 0 || !self.counted {
                break;
            }
            nap(NAP_NS);
        }
        self.seen.ios == 0
    }

    /// Plans entries from `head` on, chain by chain. How many, until memory was short, or the rest
    /// has to wait.
    fn plan(
        &mut self,
        ring: &'static Ring,
        head: u32,
        count: u32,
        args: &[usize; 6],
        caller: Caller,
    ) -> u32 {
        let mut planned = 0;
        while planned < count {
            let len = self.read_chain(head, planned, count);
            if len == 0 {
                return planned;
            }
            let chain = planned..planned + len;
            let drains = chain.clone().any(|i| self.plan_of(i).before.flags & IO_DRAIN != 0);
            let alone = self.drains == Drains::Here
                || drains && (session::detects() || ring.back.is_ready());
            if alone && !self.waited(ring, &chain, args) {
                self.undo(chain);
                return planned;
            }
            self.judge(ring, chain.clone());
            let mediates = self.mediates(&chain);
            if self.drains == Drains::InKernel && mediates && !self.waited(ring, &chain, args)
                || !self.begin(ring, chain.clone(), caller)
            {
                self.undo(chain);
                return planned;
            }
            planned += len;
            if drains && alone {
                self.drains = Drains::Here;
                return planned;
            }
            if drains {
                self.drains = Drains::InKernel;
            }
        }
        planned
    }

    /// Whether any entry of a chain goes to the ring behind.
    pub(super) fn mediates(&mut self, chain: &Range<u32>) -> bool {
        chain.clone().any(|i| matches!(self.plan_of(i).way, Way::Mediate(_)))
    }

    /// Waits, within limits, until all that was submitted before a chain has completed. False, at
    /// once, if something is planned before it: that is to be submitted first.
    ///
    /// `IOSQE_IO_DRAIN` orders entries of one ring; where some of them go to the ring behind, the
    /// order is kept by waiting here, before and after the entry that asks for it.
    fn waited(&mut self, ring: &Ring, chain: &Range<u32>, args: &[usize; 6]) -> bool {
        if chain.start > 0 {
            return false;
        }
        let own = chain.clone().filter(|i| {
            let flags = self.plan_of(*i).before.flags;
            flags & CQE_SKIP_SUCCESS == 0
        });
        let own = own.count() as u32;
        for _ in 0..DRAIN_PATIENCE {
            self.look();
            if ring.back.in_flight() == 0 && (self.seen.total <= own || !self.counted) {
                for i in chain.clone() {
                    // A ring that has had silent entries refuses the flag.
                    self.plan_of(i).after.flags &= !IO_DRAIN;
                }
                self.drains = Drains::Nowhere;
                return true;
            }
            self.make_progress(ring, args);
        }
        // What is under way is no file I/O, and may take for ever. The kernel says what it thinks.
        self.drains = Drains::Nowhere;
        true
    }

    /// Reads the entries of a chain (URING-1), and takes note of them. How many: 0 where an index
    /// is none.
    fn read_chain(&mut self, head: u32, first: u32, count: u32) -> u32 {
        let mut i = first;
        while i < count {
            let Some(at) = self.map.sqe(head.wrapping_add(i)) else { break };
            let before = load(at);
            let plan = Plan {
                at,
                before,
                after: before,
                file: File::PLAIN,
                way: Way::Native,
                alone: self.enter(&before),
            };
            // SAFETY: room for one for each entry of the queue.
            unsafe { self.plan_at(i).write(plan) };
            i += 1;
            if before.flags & (IO_LINK | IO_HARDLINK) == 0 {
                break;
            }
        }
        i - first
    }

    /// Takes note that an entry is being submitted. Whether it is the only one with its
    /// `user_data`, and will complete where we see it.
    fn enter(&mut self, sqe: &Sqe) -> bool {
        let silent = sqe.flags & CQE_SKIP_SUCCESS != 0;
        let alone = self.seen.enter(sqe.user_data, silent);
        // Without room for it, later completions would be misunderstood.
        self.counted &= alone.is_some();
        // More than fit could overwrite each other unseen.
        alone == Some(true) && !silent && self.seen.total <= self.map.cq_entries
    }

    /// Begins the I/Os of a chain. False, with nothing begun that the plans do not say, if memory
    /// is short.
    fn begin(&mut self, ring: &'static Ring, chain: Range<u32>, caller: Caller) -> bool {
        if self.mediates(&chain)
            && !ring.back.has_room(OPERATIONS.min(self.map.sq_entries as usize))
        {
            return false;
        }
        chain.clone().all(|i| self.begin_one(i, caller))
    }

    fn begin_one(&mut self, i: u32, caller: Caller) -> bool {
        let plan = self.plan_of(i);
        // As it is to be so far: a flag may have been taken off.
        let (before, file) = (plan.after, plan.file);
        let after = match plan.way {
            Way::Bounce => None,
            Way::Mediate(after) => Some(after),
            _ => return true,
        };
        let transfer = dir_of(before.opcode).filter(|dir| io::concerns(file, *dir));
        let Some(dir) = transfer.filter(|_| !file.is_uncached()) else {
            let sqe = dir_of(before.opcode).map_or(before, |dir| unregistered(&before, dir));
            self.put_behind(i, sqe, None, after.unwrap_or(After::Nothing));
            return true;
        };
        match begin_io(&before, dir, file, caller) {
            Ok(io) => {
                let moved = on_memory(&before, dir, io.iovs());
                match after {
                    Some(after) => self.put_behind(i, moved, Some(io), after),
                    None => {
                        let plan = self.plan_of(i);
                        (plan.after, plan.way) = (moved, Way::InPlace(io));
                    }
                }
                true
            }
            Err(error) if error == -(libc::EAGAIN as isize) => false,
            Err(_) if session::detects() => {
                // The program gets what it would have got.
                sync::unwatched(dir);
                self.put_behind(i, unregistered(&before, dir), None, After::Nothing);
                true
            }
            Err(error) => {
                let plan = self.plan_of(i);
                (plan.after, plan.way) = (failure(&before, -error as i32), Way::Native);
                true
            }
        }
    }

    /// Has an entry go to the ring behind, and a silent nothing in its place.
    fn put_behind(&mut self, i: u32, mut sqe: Sqe, io: Option<Io>, after: After) {
        sqe.flags &= FIXED_FILE | IO_LINK | IO_HARDLINK | ASYNC;
        // It is known to the program's ring only, and of no meaning for a file that is open.
        sqe.personality = 0;
        let plan = self.plan_of(i);
        plan.after = Sqe {
            opcode: OP_NOP,
            flags: CQE_SKIP_SUCCESS,
            user_data: plan.before.user_data,
            ..Sqe::ZERO
        };
        plan.way = Way::Behind { sqe, io, after };
    }

    /// Has the kernel take planned entries, and keeps account of what it took. Its result.
    fn hand_over(&mut self, ring: &'static Ring, args: &[usize; 6], planned: u32) -> isize {
        for i in 0..planned {
            let Plan { at, before, after, .. } = self.plan_of(i);
            patch(at, before, after);
        }
        let taken = self.kernel_takes(args, planned);
        for i in 0..planned {
            let Plan { at, before, after, .. } = self.plan_of(i);
            unpatch(at, before, after);
        }
        let took = taken.max(0) as u32;
        for i in 0..took {
            self.keep(ring, i);
        }
        self.undo(took..planned);
        let behind = (0..took).filter_map(|i| {
            let plan = self.plan_of(i);
            let Way::Behind { sqe, io, after } = plan.way else { return None };
            Some((sqe, Operation::new(&plan.before, io, after)))
        });
        if ring.back.is_ready() {
            ring.back.submit(behind);
        }
        taken
    }

    /// Has the kernel take entries as they lie there.
    fn kernel_takes(&self, args: &[usize; 6], count: u32) -> isize {
        let flags = args[3] as u32 & ENTER_REGISTERED_RING;
        // SAFETY: the program's own call, without its waiting.
        unsafe { syscall!(libc::SYS_io_uring_enter, args[0], count, 0, flags, 0, 0) }
    }

    /// The kernel has taken this entry.
    fn keep(&mut self, ring: &'static Ring, i: u32) {
        let plan = self.plan_of(i);
        let (before, file) = (plan.before, plan.file);
        match plan.way {
            Way::InPlace(io) => self.seen.attach(before.user_data, io),
            Way::Counted(dir) => {
                // Its result is not seen; what is wrong with it the program learns.
                file.count(dir, bytes_of(&before));
            }
            Way::Update => {
                let (first, count) = (before.off as u32, before.len);
                self.files.set_list(first, before.addr, count, || ring.make_back());
            }
            _ => {}
        }
    }

    /// These entries were not taken.
    fn undo(&mut self, plans: Range<u32>) {
        for i in plans {
            let plan = self.plan_of(i);
            let before = plan.before;
            match plan.way {
                Way::InPlace(io) | Way::Behind { io: Some(io), .. } => io.cancel(),
                Way::Opened(fd) => {
                    files::close(fd);
                }
                _ => {}
            }
            if before.flags & CQE_SKIP_SUCCESS == 0 {
                // If another with the same `user_data` has completed, this was the last of them.
                if let Some(io) = self.seen.leave(before.user_data) {
                    io.end(0);
                }
            }
        }
    }
}

fn bytes_of_plans(map: &Map) -> usize {
    map.sq_entries as usize * size_of::<Plan>()
}

/// The direction, if it is a transfer between memory and a file.
pub(super) fn dir_of(opcode: u8) -> Option<Dir> {
    match opcode {
        OP_READ | OP_READV | OP_READ_FIXED | OP_READV_FIXED | OP_READ_MULTISHOT => Some(Dir::Read),
        OP_WRITE | OP_WRITEV | OP_WRITE_FIXED | OP_WRITEV_FIXED => Some(Dir::Write),
        _ => None,
    }
}

fn is_vector(opcode: u8) -> bool {
    matches!(opcode, OP_READV | OP_WRITEV | OP_READV_FIXED | OP_WRITEV_FIXED)
}

/// Bytes that a transfer is about.
pub(super) fn bytes_of(sqe: &Sqe) -> isize {
    if !is_vector(sqe.opcode) {
        return sqe.len as isize;
    }
    sync::with_vector(sqe.addr as *const iovec, sqe.len as usize, |segs| {
        segs.iter().fold(0isize, |sum, seg| sum.saturating_add(seg.iov_len as isize))
    })
}

/// Begins the I/O that an entry asks for.
fn begin_io(sqe: &Sqe, dir: Dir, file: File, caller: Caller) -> Result<Io, isize> {
    let mut begun = Err(-(libc::EINVAL as isize));
    let mut begin = |segs: &[iovec]| {
        let (engine, offset) = (Engine::Uring, sqe.off);
        let mut first = [iovec { iov_base: core::ptr::null_mut(), iov_len: 0 }];
        let segs = match cut(segs, &mut first) {
            _ if session::detects() => segs,
            0 if !segs.is_empty() => &first,
            count => &segs[..count],
        };
        begun = io::begin(&Request { dir, engine, file, segs, offset, caller });
        0
    };
    if is_vector(sqe.opcode) {
        let error = sync::with_vector(sqe.addr as *const iovec, sqe.len as usize, begin);
        return if error < 0 { Err(error) } else { begun };
    }
    begin(&[iovec { iov_base: sqe.addr as *mut _, iov_len: sqe.len as usize }]);
    begun
}

/// As much of a vector as goes at once.
fn cut(segs: &[iovec], by: &mut [iovec; 1]) -> usize {
    let mut sum = 0usize;
    let fits = segs.iter().take_while(|seg| {
        sum = sum.saturating_add(seg.iov_len);
        sum <= LONGEST
    });
    let count = fits.count();
    if count == 0
        && let Some(first) = segs.first()
    {
        by[0] = iovec { iov_len: LONGEST, ..*first };
    }
    count
}

/// The entry with memory that need not be registered.
fn unregistered(sqe: &Sqe, dir: Dir) -> Sqe {
    let pick = |read, write| if dir == Dir::Read { read } else { write };
    let opcode =
        if is_vector(sqe.opcode) { pick(OP_READV, OP_WRITEV) } else { pick(OP_READ, OP_WRITE) };
    Sqe { opcode, buf_index: 0, ..*sqe }
}

/// The entry on other memory, which is not registered.
fn on_memory(sqe: &Sqe, dir: Dir, segs: &'static [iovec]) -> Sqe {
    let pick = |read, write| if dir == Dir::Read { read } else { write };
    let (opcode, addr, len) = match segs {
        [one] if !is_vector(sqe.opcode) => {
            (pick(OP_READ, OP_WRITE), one.iov_base as u64, one.iov_len)
        }
        _ => (pick(OP_READV, OP_WRITEV), segs.as_ptr() as u64, segs.len()),
    };
    // Member by member, and only where it differs: words that were written in parts are slow to
    // read again as a whole.
    let mut moved = *sqe;
    moved.addr = addr;
    if moved.opcode != opcode {
        (moved.opcode, moved.buf_index) = (opcode, 0);
    }
    if moved.len != len as u32 {
        moved.len = len as u32;
    }
    moved
}

/// The entry as one that fails with this error.
pub(super) fn failure(sqe: &Sqe, error: i32) -> Sqe {
    if injects() {
        return sqe.with_result(-error);
    }
    // An operation that there is not: EINVAL, the best that such a kernel can say.
    Sqe { opcode: u8::MAX, ..sqe.with_result(0) }
}
