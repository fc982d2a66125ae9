//! Contexts: what the program has, and what the kernel has, of each.
//!
//! ```text
//!  the program's aio_context_t          hidden
//!        │                                 │
//!        v                                 v
//!   visible ring (ours, aio_ring)     the kernel's ring (H)
//!        ^                                 │
//!        └── publish ── shadows: finish <──┘
//! ```
//!
//! A context is a place in a table. It, its memory and H stay while anybody holds it ([`hold`]):
//! `io_destroy` takes it from the program, and the last holder takes it down.

use core::mem::MaybeUninit;
use core::ops::Deref;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use stableio_onepass as onepass;

use super::abi::{
    AIO_RING_COMPAT_FEATURES, AIO_RING_INCOMPAT_FEATURES, AIO_RING_MAGIC, Event, Iocb, Ring,
};
use super::finish::{Shadow, What};
use crate::free::Free;
use crate::gate::syscall;
use crate::pool::PAGE;
use crate::process;

/// Most contexts of a process.
const CONTEXTS: usize = 1024;
/// Events that the visible ring has room for beyond what the kernel's has: each thread that is in
/// `io_submit` may overrun [`Context::full`] by one.
const SLACK: u32 = 64;

/// A context of the program's.
pub(super) struct Context {
    /// [`FREE`], [`LIVE`] or [`DYING`], and below it how many hold the context.
    state: AtomicU64,
    /// H: the kernel's context, and the address of its ring.
    kernel: AtomicUsize,
    /// Our mapping: the visible ring, then the shadows.
    mapping: AtomicUsize,
    bytes: AtomicUsize,
    /// How many shadows there are; as many I/Os as the kernel takes.
    shadows: AtomicU32,
    /// Room of the visible ring, a power of two.
    nr: AtomicU32,
    /// Shadows that were ever used.
    used: AtomicU32,
    /// Shadows that were used and are free.
    free: Free,
    /// I/Os that the program submitted and has not got events of, but for those in the ring.
    pub(super) in_flight: AtomicU32,
    /// Those of them that need nothing when they end.
    pub(super) carefree: AtomicU32,
    /// Threads of the program that wait in the kernel for events of H.
    pub(super) waiters: AtomicU32,
    /// Threads of the program that are in `io_submit`, where there is an agent.
    pub(super) submitting: AtomicU32,
    /// What the agent sleeps on: changed whenever it may have something to do.
    pub(super) bell: AtomicU32,
    /// 1: it sleeps.
    pub(super) asleep: AtomicU32,
    /// 1 when the program was seen to look at the visible ring, or to wait on an eventfd.
    pub(super) peeked_at: AtomicU32,
    /// The thread that changes the visible ring; 0: none. See
    /// [`Context::is_interrupted`].
    lock: AtomicU32,
    /// Where we last left or saw the visible ring's head.
    head: AtomicU32,
    /// Changes when `io_submit` is called.
    pub(super) calls: AtomicU32,
    /// What the watch saw when it last looked.
    pub(super) seen: Seen,
}

/// What the watch, and nobody else, keeps of a context.
pub(super) struct Seen {
    /// Head of H's ring.
    pub(super) head: AtomicU32,
    pub(super) calls: AtomicU32,
    /// How stale the event at that head is.
    pub(super) stale: AtomicU32,
}

const FREE: u64 = 0;
const LIVE: u64 = 1 << 32;
const DYING: u64 = 2 << 32;
const STATE: u64 = 3 << 32;

static TABLE: [Context; CONTEXTS] = [const { Context::NEW }; CONTEXTS];
/// Places of contexts, by their addresses; each may be wrong.
static HINTS: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
/// Places that were ever used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// A context that stays while this lives.
pub(super) struct Held(&'static Context);

impl Held {
    /// For somebody else to hold, by [`Held::from_raw`].
    pub(super) fn into_raw(self) -> &'static Context {
        let context = self.0;
        core::mem::forget(self);
        context
    }

    /// # Safety
    ///
    /// From [`Held::into_raw`], once for each.
    pub(super) unsafe fn from_raw(context: &'static Context) -> Held {
        Held(context)
    }
}

impl Clone for Held {
    fn clone(&self) -> Held {
        self.0.state.fetch_add(1, Ordering::Relaxed);
        Held(self.0)
    }
}

impl Deref for Held {
    type Target = Context;

    fn deref(&self) -> &Context {
        self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(1, Ordering::AcqRel) == DYING | 1 {
            self.0.take_down();
        }
    }
}

/// The context that the program names; `None` if it is none of ours.
pub(super) fn hold(address: usize) -> Option<Held> {
    let at = |place: usize| {
        hold_at(place).filter(|held| held.mapping.load(Ordering::Relaxed) == address)
    };
    // Where one of this address was found last: rings begin with pages.
    let hint = &HINTS[address / PAGE % HINTS.len()];
    if let Some(held) = at(hint.load(Ordering::Relaxed) as usize) {
        return Some(held);
    }
    let mut place = 0u32;
    // SAFETY: the program's memory is foreign, and may be inaccessible; ours holds four bytes.
    // The first word of a ring is its number, which here is its place.
    unsafe { onepass::copy_in(address as *const u8, (&raw mut place).cast(), 4) }.ok()?;
    let held = at(place as usize)?;
    hint.store(place, Ordering::Relaxed);
    Some(held)
}

/// The context in this place, if it is live.
pub(super) fn hold_at(place: usize) -> Option<Held> {
    let context = TABLE.get(place)?;
    let live = |now: u64| (now & STATE == LIVE).then_some(now + 1);
    context.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, live).ok()?;
    Some(Held(context))
}

/// How many places there are to look at.
pub(super) fn places() -> usize {
    USED.load(Ordering::Acquire).min(CONTEXTS)
}

/// A forked child has none of its parent's contexts, nor their memory.
pub(super) fn after_fork() {
    for context in &TABLE[..places()] {
        context.state.store(FREE, Ordering::Relaxed);
        context.mapping.store(0, Ordering::Relaxed);
    }
    USED.store(0, Ordering::Relaxed);
}

/// Makes a context around the kernel's `kernel`. Returns what the program is to have for it; `None`
/// if there is no room.
pub(super) fn make(kernel: usize) -> Option<usize> {
    let (place, context) = claim()?;
    // SAFETY: the kernel maps its ring there for the life of its context.
    let theirs = unsafe { &*(kernel as *const Ring) };
    let shadows = theirs.nr.load(Ordering::Relaxed);
    let nr = (shadows + SLACK).next_power_of_two();
    let ring_bytes = (size_of::<Ring>() + nr as usize * size_of::<Event>()).next_multiple_of(PAGE);
    let bytes = ring_bytes + shadows as usize * size_of::<Shadow>();
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, where the kernel likes it; a child does not get it, as it does not get
    // the kernel's rings.
    let mapping = unsafe {
        let mapping = syscall!(libc::SYS_mmap, 0, bytes, prot, flags, -1isize, 0);
        if mapping < 0 {
            context.state.store(FREE, Ordering::Release);
            return None;
        }
        syscall!(libc::SYS_madvise, mapping, bytes, libc::MADV_DONTFORK);
        mapping as usize
    };
    context.kernel.store(kernel, Ordering::Relaxed);
    context.mapping.store(mapping, Ordering::Relaxed);
    context.bytes.store(bytes, Ordering::Relaxed);
    context.shadows.store(shadows, Ordering::Relaxed);
    context.nr.store(nr, Ordering::Relaxed);
    context.free.clear();
    for counter in [
        &context.used,
        &context.in_flight,
        &context.carefree,
        &context.waiters,
        &context.submitting,
        &context.asleep,
        &context.peeked_at,
        &context.lock,
        &context.head,
        &context.calls,
        &context.seen.stale,
    ] {
        counter.store(0, Ordering::Relaxed);
    }
    let ring = context.ring();
    ring.id.store(place as u32, Ordering::Relaxed);
    ring.nr.store(nr, Ordering::Relaxed);
    ring.magic.store(AIO_RING_MAGIC, Ordering::Relaxed);
    ring.compat_features.store(AIO_RING_COMPAT_FEATURES, Ordering::Relaxed);
    ring.incompat_features.store(AIO_RING_INCOMPAT_FEATURES, Ordering::Relaxed);
    ring.header_length.store(size_of::<Ring>() as u32, Ordering::Relaxed);
    context.state.store(LIVE, Ordering::Release);
    Some(mapping)
}

/// A free place, claimed: dying, so that nobody else can hold it.
fn claim() -> Option<(usize, &'static Context)> {
    let (place, context) = TABLE.iter().enumerate().find(|(_, context)| {
        let state = &context.state;
        state.compare_exchange(FREE, DYING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    })?;
    USED.fetch_max(place + 1, Ordering::AcqRel);
    Some((place, context))
}

impl Context {
    #[expect(clippy::declare_interior_mutable_const, reason = "only to fill the table")]
    const NEW: Context = Context {
        state: AtomicU64::new(FREE),
        kernel: AtomicUsize::new(0),
        mapping: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        shadows: AtomicU32::new(0),
        nr: AtomicU32::new(0),
        used: AtomicU32::new(0),
        free: Free::new(),
        in_flight: AtomicU32::new(0),
        carefree: AtomicU32::new(0),
        waiters: AtomicU32::new(0),
        submitting: AtomicU32::new(0),
        bell: AtomicU32::new(0),
        asleep: AtomicU32::new(0),
        peeked_at: AtomicU32::new(0),
        lock: AtomicU32::new(0),
        head: AtomicU32::new(0),
        calls: AtomicU32::new(0),
        seen: Seen { head: AtomicU32::new(0), calls: AtomicU32::new(0), stale: AtomicU32::new(0) },
    };

    /// H.
    pub(super) fn kernel(&self) -> usize {
        self.kernel.load(Ordering::Relaxed)
    }

    /// The kernel's ring, as the peekers know it: its head and tail are hints.
    pub(super) fn kernel_ring(&self) -> &Ring {
        // SAFETY: H, and the mapping of its ring, stay while anybody holds the context.
        unsafe { &*(self.kernel() as *const Ring) }
    }

    /// Whether the kernel has events for us: a hint.
    pub(super) fn has_events(&self) -> bool {
        let ring = self.kernel_ring();
        ring.head.load(Ordering::Relaxed) != ring.tail.load(Ordering::Acquire)
    }

    /// Whether the program has taken it down.
    pub(super) fn is_dying(&self) -> bool {
        self.state.load(Ordering::Acquire) & STATE == DYING
    }

    /// Whether I/Os are under way whose end we have to see.
    pub(super) fn has_cares(&self) -> bool {
        // Between the two, one that needs nothing may end, and look like one that does: once.
        let carefree = self.carefree.load(Ordering::Acquire);
        self.in_flight.load(Ordering::Acquire) > carefree
    }

    /// Takes it from the program: nobody else gets hold of it. False if somebody else has.
    pub(super) fn condemn(&self) -> bool {
        let dying = |now: u64| (now & STATE == LIVE).then_some(now & !STATE | DYING);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, dying).is_ok()
    }

    /// How many hold it.
    pub(super) fn holders(&self) -> u32 {
        self.state.load(Ordering::Acquire) as u32
    }

    /// By its last holder.
    fn take_down(&self) {
        let (mapping, bytes) =
            (self.mapping.swap(0, Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        // SAFETY: the kernel's context is ours, and its I/Os are waited for here; then nobody uses
        // the mapping, because nobody holds the context.
        unsafe {
            syscall!(libc::SYS_io_destroy, self.kernel());
            syscall!(libc::SYS_munmap, mapping, bytes);
        }
        self.state.store(FREE, Ordering::Release);
    }

    // The visible ring.

    fn ring(&self) -> &Ring {
        // SAFETY: the mapping begins with the ring, which is made of atomics, and stays while
        // anybody holds the context. The program may write there what it likes.
        unsafe { &*(self.mapping.load(Ordering::Relaxed) as *const Ring) }
    }

    /// Room of the visible ring. Not as the program may have overwritten it (AIO-6).
    fn nr(&self) -> u32 {
        self.nr.load(Ordering::Relaxed)
    }

    /// A place in the visible ring, whatever the number: by its power of two, as this is asked
    /// several times for each I/O.
    fn place(&self, number: u32) -> u32 {
        number & self.nr().wrapping_sub(1)
    }

    fn events(&self) -> *mut Event {
        let ring = ptr::from_ref(self.ring()).cast_mut();
        // SAFETY: the events follow the head, inside of the mapping.
        unsafe { ring.add(1).cast() }
    }

    /// Events that the program has not taken from the visible ring.
    pub(super) fn visible(&self) -> u32 {
        let ring = self.ring();
        let tail = ring.tail.load(Ordering::Acquire);
        self.place(tail.wrapping_sub(ring.head.load(Ordering::Acquire)))
    }

    /// Whether the program has moved the visible ring's head itself: it reads the ring.
    pub(super) fn head_was_moved(&self) -> bool {
        let moved =
            || self.ring().head.load(Ordering::Relaxed) != self.head.load(Ordering::Relaxed);
        moved() && self.locked(moved).unwrap_or(false)
    }

    /// Puts events into the visible ring. They fit, unless the program has written nonsense to its
    /// head: then those that do not are dropped, as the program dropped the room for them. Not by a
    /// handler that [`Context::is_interrupted`].
    pub(super) fn publish(&self, events: &[Event]) {
        self.locked(|| {
            let ring = self.ring();
            let mut tail = self.place(ring.tail.load(Ordering::Relaxed));
            let room = self.nr() - 1 - self.visible();
            for event in events.iter().take(room as usize) {
                // SAFETY: `tail` is below `nr`, so this lies in the mapping; the program does not
                // read it before it sees the new tail.
                unsafe { self.events().add(tail as usize).write_volatile(*event) };
                tail = self.place(tail + 1);
            }
            // AIO-3: the events before the tail that says that they are there.
            ring.tail.store(tail, Ordering::Release);
        });
    }

    /// Takes events from the visible ring; returns how many.
    pub(super) fn take_visible(&self, into: &mut [MaybeUninit<Event>]) -> usize {
        if self.visible() == 0 || into.is_empty() {
            return 0;
        }
        let taken = self.locked(|| {
            let ring = self.ring();
            let mut head = self.place(ring.head.load(Ordering::Acquire));
            let count = (self.visible() as usize).min(into.len());
            for event in &mut into[..count] {
                // SAFETY: as in `publish`. Plain numbers, for which any bytes are valid.
                event.write(unsafe { self.events().add(head as usize).read_volatile() });
                head = self.place(head + 1);
            }
            self.head.store(head, Ordering::Relaxed);
            ring.head.store(head, Ordering::Release);
            count
        });
        taken.unwrap_or(0)
    }

    /// Whether this is a signal handler that has interrupted its own thread while that changed the
    /// visible ring: it must not wait for what it interrupted, and goes without the ring.
    pub(super) fn is_interrupted(&self) -> bool {
        let holder = self.lock.load(Ordering::Relaxed);
        holder != 0 && holder == process::thread_id()
    }

    /// Runs `f` while no other thread changes the visible ring. `None` if [`Context::is_interrupted`].
    fn locked<T>(&self, f: impl FnOnce() -> T) -> Option<T> {
        let us = process::thread_id();
        loop {
            match self.lock.compare_exchange(0, us, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break,
                Err(holder) if holder == us => return None,
                Err(_) => {
                    // SAFETY: a system call without memory.
                    unsafe { syscall!(libc::SYS_sched_yield) };
                }
            }
        }
        let result = f();
        self.lock.store(0, Ordering::Release);
        Some(result)
    }

    // The shadows.

    fn shadows(&self) -> u32 {
        self.shadows.load(Ordering::Relaxed)
    }

    /// Whether the kernel's own context would have no room: what the program has not taken from its
    /// ring counts.
    pub(super) fn full(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) + self.visible() >= self.shadows() - 1
    }

    fn shadow_at(&self, index: u32) -> *mut Shadow {
        let mapping = self.mapping.load(Ordering::Relaxed);
        let ring_bytes = size_of::<Ring>() + self.nr() as usize * size_of::<Event>();
        let first = (mapping + ring_bytes.next_multiple_of(PAGE)) as *mut Shadow;
        // SAFETY: below `shadows`, which all callers see to: inside of the mapping.
        unsafe { first.add(index as usize) }
    }

    /// The shadow that an event of the kernel's is about. `None`: it is about nothing.
    pub(super) fn shadow(&self, data: u64) -> Option<&Shadow> {
        let index = u32::try_from(data).ok().filter(|index| *index < self.shadows())?;
        // SAFETY: in the mapping, and written when it was taken, by whoever had the kernel say this
        // number.
        Some(unsafe { &*self.shadow_at(index) })
    }

    /// Shadows that may be in use.
    pub(super) fn used_shadows(&self) -> impl Iterator<Item = &Shadow> {
        (0..self.used.load(Ordering::Acquire).min(self.shadows()))
            .filter_map(|index| self.shadow(u64::from(index)))
    }

    /// Takes a free shadow; `None` if there is none. Memory that was never used is zeros, which is a
    /// shadow that is free.
    pub(super) fn take_shadow(&self) -> Option<u32> {
        let next = |index| Some(&self.shadow(u64::from(index))?.next);
        self.free.take(next).or_else(|| {
            let fresh = |used| Some(used + 1).filter(|used| *used <= self.shadows());
            self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fresh).ok()
        })
    }

    /// Gives it back.
    pub(super) fn give_shadow(&self, index: u32) {
        if let Some(shadow) = self.shadow(u64::from(index)) {
            self.free.give(index, &shadow.next);
        }
    }

    /// Fills a shadow that the caller has taken. Returns its iocb, which the kernel may be given.
    pub(super) fn fill(&self, index: u32, iocb: Iocb, what: What) -> *mut Iocb {
        // Taken from the list, so it is there.
        let Some(shadow) = self.shadow(u64::from(index)) else { return ptr::null_mut() };
        // SAFETY: taken by the caller, so that nobody else touches the two before `state` says that
        // there is something, nor the kernel before it is given the iocb.
        unsafe {
            shadow.iocb.get().write(iocb);
            shadow.what.get().write(what);
        }
        shadow.state.store(Shadow::IN_FLIGHT, Ordering::Release);
        shadow.iocb.get()
    }
}
