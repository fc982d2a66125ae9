//! Private, aligned, pooled memory for copies.
//!
//! One region per process, reserved when the library is loaded and bounded by the session
//! (`--pool`). It is cut into slots of powers of two, 4 KiB to 64 MiB, as they are asked for; a slot
//! keeps its size. Each size has a stack of free slots.
//!
//! - **SLOT-1** Taking and giving back is lock-free: hooks run in signal handlers, and a handler
//!   may interrupt a hook at any instruction.
//! - **SLOT-2** A child has none of its parent's memory: it is not copied by `fork` (which would
//!   copy pages under I/O), and the child makes its own region ([`after_fork`]).

use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use stableio_session::POOL_LEAST;

use crate::free::Free;
use crate::gate::syscall;

/// Alignment and smallest size of a slot.
pub(crate) const PAGE: usize = 4096;
/// The largest slot.
pub(crate) const LARGEST: usize = PAGE << (SIZES - 1);
const _: () = assert!(LARGEST as u64 == POOL_LEAST, "it fits the smallest pool");

const SIZES: usize = 15;
/// Most pages that a region has: 16 GiB.
const MOST_PAGES: usize = 1 << 22;

/// A piece of memory out of the pool. It is given back by [`Slot::release`], not by going out of
/// scope: who holds it may be a record in a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    start: usize,
    size: u8,
}

impl Slot {
    /// A slot of at least `len` bytes; `None` if all that the session allows is in use.
    pub(crate) fn take(len: usize) -> Option<Slot> {
        if len > LARGEST {
            return None;
        }
        let size = (len.max(PAGE).next_power_of_two() / PAGE).trailing_zeros() as usize;
        let pool = &POOL;
        pool.pop(size)
            .or_else(|| pool.cut(size))
            .or_else(|| (size + 1..SIZES).find_map(|larger| pool.pop(larger)))
    }

    /// Gives it back.
    pub(crate) fn release(self) {
        POOL.push(self);
    }

    /// Its first byte, aligned to [`PAGE`].
    pub(crate) fn start(self) -> *mut u8 {
        self.start as *mut u8
    }
}

struct Pool {
    /// First address; 0 before [`reserve`].
    base: AtomicUsize,
    /// Pages of the region.
    pages: AtomicUsize,
    /// Pages that have been cut off.
    cut: AtomicUsize,
    /// Of each size: the first pages of its free slots.
    free: [Free; SIZES],
}

static POOL: Pool = Pool {
    base: AtomicUsize::new(0),
    pages: AtomicUsize::new(0),
    cut: AtomicUsize::new(0),
    free: [const { Free::new() }; SIZES],
};

/// For each page that begins a free slot: the next free slot of its size. Not in the slots
/// themselves, because a kernel may still read one that was given back on error.
static NEXT: AtomicUsize = AtomicUsize::new(0);

impl Pool {
    fn next_of(&self, page: u32) -> &AtomicU32 {
        let table = NEXT.load(Ordering::Relaxed) as *const AtomicU32;
        // SAFETY: `reserve` mapped one entry for each page before any slot was cut, and `page` is
        // one of the region's.
        unsafe { &*table.add(page as usize) }
    }

    fn pop(&self, size: usize) -> Option<Slot> {
        let page = self.free[size].take(|page| Some(self.next_of(page)))?;
        let start = self.base.load(Ordering::Relaxed) + page as usize * PAGE;
        Some(Slot { start, size: size as u8 })
    }

    fn push(&self, slot: Slot) {
        let page = ((slot.start - self.base.load(Ordering::Relaxed)) / PAGE) as u32;
        self.free[usize::from(slot.size)].give(page, self.next_of(page));
    }

    fn cut(&self, size: usize) -> Option<Slot> {
        let pages = 1 << size;
        let all = self.pages.load(Ordering::Relaxed);
        let first = self
            .cut
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |cut| {
                Some(cut + pages).filter(|end| *end <= all)
            })
            .ok()?;
        let start = self.base.load(Ordering::Relaxed) + first * PAGE;
        Some(Slot { start, size: size as u8 })
    }
}

/// Reserves the region: address space now, memory as it is used. False if the kernel refuses.
pub(crate) fn reserve(bytes: u64) -> bool {
    let pages = (bytes as usize / PAGE).clamp(LARGEST / PAGE, MOST_PAGES);
    let (Some(base), Some(next)) = (map(pages * PAGE), map(pages * size_of::<AtomicU32>())) else {
        return false;
    };
    // SAFETY: our own mapping. Pages under I/O must not be copied by fork.
    unsafe { syscall!(libc::SYS_madvise, base, pages * PAGE, libc::MADV_DONTFORK) };
    NEXT.store(next, Ordering::Relaxed);
    POOL.base.store(base, Ordering::Relaxed);
    POOL.cut.store(0, Ordering::Relaxed);
    POOL.free.iter().for_each(Free::clear);
    POOL.pages.store(pages, Ordering::Release);
    true
}

/// Gives a forked child a region of its own (SLOT-2). Only the calling thread is there.
pub(crate) fn after_fork() {
    let pages = POOL.pages.load(Ordering::Relaxed);
    if pages == 0 {
        return;
    }
    let next = NEXT.load(Ordering::Relaxed);
    // SAFETY: the parent's table, of which this process has a copy that nobody uses any more.
    unsafe { syscall!(libc::SYS_munmap, next, pages * size_of::<AtomicU32>()) };
    if !reserve((pages * PAGE) as u64) {
        POOL.pages.store(0, Ordering::Release);
    }
}

/// Anonymous memory of our own.
fn map(bytes: usize) -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, where the kernel likes it.
    let at = unsafe { syscall!(libc::SYS_mmap, ptr::null::<u8>(), bytes, prot, flags, -1isize, 0) };
    usize::try_from(at).ok()
}
