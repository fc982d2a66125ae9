//! Foreign mappings that code of others reads through plain pointers.
//!
//! The table is read by a signal handler, which may interrupt anything: it is a fixed number of
//! slots of atomics, each a sequence lock of its own. `state` only ever counts up, through
//! free, claimed and live to the next free; a reader that finds it live, and unchanged after it
//! has read the range, has read two ends that belong together.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// The most regions that can be registered at a time.
pub const CAPACITY: usize = 1024;

/// A registered foreign mapping; dropping it unregisters it, and must come before the unmapping.
#[derive(Debug)]
pub struct Region {
    slot: &'static Slot,
}

/// Registers the foreign mapping of `len` bytes at `addr`, which this process has made.
///
/// From now on a SIGBUS inside it does not kill the process: the page that is gone is replaced by
/// a private page of zeros, and [`Region::faulted`] says so. Regions may overlap; a fault marks
/// all that it hits. `None` if [`CAPACITY`] regions are registered, or if the range is empty or
/// runs over the end of the address space.
///
/// The mapping stays the caller's. Unmapping it while the region is registered is a bug: whatever
/// is mapped there next would have its faults hidden.
pub fn register(addr: usize, len: usize) -> Option<Region> {
    let end = addr.checked_add(len).filter(|end| *end > addr)?;
    super::install();
    let slot = SLOTS.iter().find(|slot| slot.claim())?;
    slot.publish(addr, end);
    Some(Region { slot })
}

impl Region {
    /// Whether a part of the mapping has vanished since it was registered.
    ///
    /// Once true, it stays true. Ask *after* reading the mapping: what was read before this says
    /// false was really there.
    pub fn faulted(&self) -> bool {
        // Pairs with the release in `mend`; without it, the reads of the mapping that the caller
        // wants to judge could be done after this one.
        fence(Ordering::Acquire);
        self.slot.faulted.load(Ordering::Acquire)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.slot.state.fetch_add(STATES - LIVE, Ordering::Release);
    }
}

/// Repairs a SIGBUS at `addr` if it lies in a region; false if it does not, or cannot be repaired.
///
/// Async-signal-safe, and keeps `errno`.
pub(super) fn mend(addr: usize, page: usize) -> bool {
    // A mapping of huge pages can only be replaced by whole ones, so a page that is too small is
    // refused, and the next size is tried. Never more than lies in the region.
    const HUGE: [usize; 2] = [2 << 20, 1 << 30];
    let mut bounds = None;
    for slot in &SLOTS {
        if let Some((start, end)) =
            slot.range().filter(|(start, end)| (*start..*end).contains(&addr))
        {
            // Marked before the page appears: who has read its zeros finds the mark.
            slot.faulted.store(true, Ordering::Release);
            bounds = Some((start, end));
        }
    }
    let Some((start, end)) = bounds else { return false };
    // The region may begin or end inside a page; the page is replaced all the same.
    if map_zeros(addr & !(page - 1), page) {
        return true;
    }
    HUGE.into_iter().any(|size| {
        let first = addr & !(size - 1);
        first >= start && size <= end - first && map_zeros(first, size)
    })
}

/// One entry of the table.
#[derive(Debug)]
struct Slot {
    /// [`FREE`], [`CLAIMED`] or [`LIVE`], modulo [`STATES`].
    state: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    faulted: AtomicBool,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;
const LIVE: usize = 2;
/// A power of two, so that the count may wrap around.
const STATES: usize = 4;

static SLOTS: [Slot; CAPACITY] = [const {
    Slot {
        state: AtomicUsize::new(FREE),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
    }
}; CAPACITY];

impl Slot {
    /// Takes the slot if it is free.
    fn claim(&self) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        state % STATES == FREE
            && self
                .state
                .compare_exchange(state, state + CLAIMED, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    /// Makes the claimed slot live over `[start, end)`.
    fn publish(&self, start: usize, end: usize) {
        // The writer's half of the sequence lock: who sees one of the new ends also sees that the
        // state has moved on.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.faulted.store(false, Ordering::Relaxed);
        self.state.fetch_add(LIVE - CLAIMED, Ordering::Release);
    }

    /// The range of a live slot.
    fn range(&self) -> Option<(usize, usize)> {
        let before = self.state.load(Ordering::Acquire);
        let range = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let after = self.state.load(Ordering::Relaxed);
        (before == after && before % STATES == LIVE).then_some(range)
    }
}

/// Maps private zeros over `[addr, addr + len)`, keeping `errno`.
fn map_zeros(addr: usize, len: usize) -> bool {
    // SAFETY: `errno` is this thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; a signal handler must leave it as it was.
    let saved = unsafe { *errno };
    // SAFETY: the range belongs to a registered mapping, whose owner has handed it to us for this;
    // what was there is gone. The raw system call, because only that is async-signal-safe.
    let mapped = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            addr,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    // SAFETY: as above.
    unsafe { *errno = saved };
    mapped != -1
}
