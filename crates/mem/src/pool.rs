//! Buffer memory: aligned, bounded, reserved for a request all at once.
//!
//! POOL-1: what all buffers and reservations hold together never exceeds the
//! size that the pool was made with. Load makes requests wait, not memory grow.
//!
//! POOL-2: a request reserves everything that it may need, payload, parity
//! and scratch, in one step and before it takes any lock. Nobody waits for
//! memory while holding memory, so waiting can not become a deadlock.
//!
//! POOL-3: reservations are granted in the order in which they were asked
//! for; a large one is not starved by small ones.
//!
//! POOL-4: a reservation is kept in whole blocks, and a buffer may consist of
//! several extents, so fragmentation can not break a reservation.

mod buddy;

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;

use crate::error::PoolTooSmall;
use crate::foreign::{Segment, Segments, clip};
use crate::sg::SgList;
use crate::stable::{Inner, Keep, StableBuf};
use crate::units::BLOCK;
use buddy::Buddy;

/// A bounded arena of buffers.
pub struct Pool {
    arena: Arena,
    blocks: usize,
    state: Mutex<State>,
}

struct State {
    buddy: Buddy,
    /// Blocks neither in a buffer nor promised to a reservation.
    unreserved: usize,
    waiters: VecDeque<Waiter>,
    next_waiter: u64,
}

struct Waiter {
    id: u64,
    blocks: usize,
    granted: bool,
    waker: Option<Waker>,
}

/// An anonymous mapping, unmapped when dropped.
struct Arena {
    addr: usize,
    len: usize,
}

impl Pool {
    /// A pool of at least `bytes`, rounded up to 1 MiB.
    ///
    /// The memory is mapped, not touched: an idle pool costs address space.
    ///
    /// # Errors
    ///
    /// The system's, when the mapping is refused.
    pub fn new(bytes: usize) -> std::io::Result<Arc<Self>> {
        let len = bytes.max(1).next_multiple_of(buddy::LARGEST * BLOCK);
        let arena = Arena::map(len)?;
        let blocks = len / BLOCK;
        let state = State {
            buddy: Buddy::new(blocks),
            unreserved: blocks,
            waiters: VecDeque::new(),
            next_waiter: 0,
        };
        Ok(Arc::new(Self { arena, blocks, state: Mutex::new(state) }))
    }

    /// Bytes in all.
    pub fn size(&self) -> usize {
        self.blocks * BLOCK
    }

    /// Bytes in use or reserved now.
    pub fn used(&self) -> usize {
        (self.blocks - self.lock().unreserved) * BLOCK
    }

    /// The arena, for registering it with the kernel once.
    pub fn arena(&self) -> Segment {
        Segment { addr: self.arena.addr, len: self.arena.len }
    }

    /// Waits until `bytes` are free and reserves them (POOL-2, POOL-3).
    ///
    /// # Errors
    ///
    /// At once when the whole pool is smaller than that.
    pub async fn reserve(self: &Arc<Self>, bytes: usize) -> Result<Reservation, PoolTooSmall> {
        let blocks = self.fits(bytes)?;
        Ok(Reserve { pool: self, blocks, id: None }.await)
    }

    /// Reserves `bytes` if they are free and nobody waits.
    ///
    /// # Errors
    ///
    /// When the whole pool is smaller than that. `Ok(None)` means: not now.
    pub fn try_reserve(
        self: &Arc<Self>,
        bytes: usize,
    ) -> Result<Option<Reservation>, PoolTooSmall> {
        let blocks = self.fits(bytes)?;
        let mut state = self.lock();
        if !state.waiters.is_empty() || state.unreserved < blocks {
            return Ok(None);
        }
        state.unreserved -= blocks;
        Ok(Some(Reservation { pool: self.clone(), blocks }))
    }

    fn fits(&self, bytes: usize) -> Result<usize, PoolTooSmall> {
        let blocks = bytes.div_ceil(BLOCK);
        if blocks > self.blocks {
            return Err(PoolTooSmall { need: blocks * BLOCK, size: self.size() });
        }
        Ok(blocks)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere while the lock was held would be a bug in the
        // few lines below; the counters are sound at every step.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn give_back(&self, extents: &[Segment], blocks: usize) {
        let mut state = self.lock();
        for extent in extents {
            state.buddy.free((extent.addr - self.arena.addr) / BLOCK, extent.len / BLOCK);
        }
        state.unreserved += blocks;
        let granted = state.grant();
        drop(state);
        granted.into_iter().for_each(Waker::wake);
    }
}

impl State {
    /// Grants what fits, oldest first, and stops at the first that does not.
    ///
    /// Returns whom to wake once the lock is released: a waker is the code of
    /// somebody's executor, which may come back here, even with a buffer that
    /// it drops.
    #[must_use]
    fn grant(&mut self) -> SmallVec<[Waker; 4]> {
        let mut granted = SmallVec::new();
        for waiter in self.waiters.iter_mut().skip_while(|w| w.granted) {
            if waiter.blocks > self.unreserved {
                break;
            }
            self.unreserved -= waiter.blocks;
            waiter.granted = true;
            granted.extend(waiter.waker.take());
        }
        granted
    }
}

struct Reserve<'a> {
    pool: &'a Arc<Pool>,
    blocks: usize,
    id: Option<u64>,
}

impl Future for Reserve<'_> {
    type Output = Reservation;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reservation> {
        let (blocks, mut state) = (self.blocks, self.pool.lock());
        let id = self.id.unwrap_or(state.next_waiter);
        if self.id.is_none() {
            state.next_waiter += 1;
            state.waiters.push_back(Waiter { id, blocks, granted: false, waker: None });
            // Whoever stands in front was granted before if it fits, so this
            // is about us alone, who run.
            let granted = state.grant();
            debug_assert!(granted.is_empty(), "POOL-3: nobody was overlooked");
        }
        let index = state.waiters.iter().position(|w| w.id == id).expect("still queued");
        if state.waiters[index].granted {
            state.waiters.remove(index);
            drop(state);
            self.id = None;
            let pool = self.pool.clone();
            self.blocks = 0;
            return Poll::Ready(Reservation { pool, blocks });
        }
        let earlier = state.waiters[index].waker.replace(cx.waker().clone());
        drop(state);
        // Not under the lock either, as in `State::grant`.
        drop(earlier);
        self.id = Some(id);
        Poll::Pending
    }
}

impl Drop for Reserve<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut state = self.pool.lock();
        let Some(index) = state.waiters.iter().position(|w| w.id == id) else { return };
        let waiter = state.waiters.remove(index).expect("just found");
        if waiter.granted {
            state.unreserved += waiter.blocks;
        }
        let granted = state.grant();
        drop(state);
        granted.into_iter().for_each(Waker::wake);
    }
}

/// The right to take buffers of so many blocks, now, without waiting.
pub struct Reservation {
    pool: Arc<Pool>,
    blocks: usize,
}

impl Reservation {
    /// Bytes that can still be taken.
    pub fn left(&self) -> usize {
        self.blocks * BLOCK
    }

    /// A part of the reservation as one of its own.
    ///
    /// # Panics
    ///
    /// When less is left: the reservation was computed wrong (POOL-2).
    pub fn split(&mut self, bytes: usize) -> Reservation {
        let blocks = bytes.div_ceil(BLOCK);
        assert!(blocks <= self.blocks, "POOL-2: split {blocks} of {} reserved blocks", self.blocks);
        self.blocks -= blocks;
        Reservation { pool: self.pool.clone(), blocks }
    }

    /// Takes a buffer of `len` bytes; what it holds is left over from earlier.
    ///
    /// # Panics
    ///
    /// When the reservation is smaller: it was computed wrong (POOL-2).
    pub fn take(&mut self, len: usize) -> PoolBuf {
        let blocks = len.div_ceil(BLOCK);
        assert!(blocks <= self.blocks, "POOL-2: took {blocks} of {} reserved blocks", self.blocks);
        self.blocks -= blocks;
        let base = self.pool.arena.addr;
        let mut extents = Segments::new();
        self.pool.lock().buddy.allocate(blocks, |first, count| {
            let extent = Segment { addr: base + first * BLOCK, len: count * BLOCK };
            match extents.last_mut() {
                Some(last) if last.addr + last.len == extent.addr => last.len += extent.len,
                _ => extents.push(extent),
            }
        });
        let keep = Keep::Pool(Backing { pool: self.pool.clone() });
        PoolBuf { inner: Arc::new(Inner { extents, len, keep }) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.blocks > 0 {
            self.pool.give_back(&[], self.blocks);
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reservation({} bytes)", self.left())
    }
}

/// The pool that a buffer's extents go back to.
pub(crate) struct Backing {
    pool: Arc<Pool>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Keep::Pool(Backing { pool }) = &self.keep {
            let blocks = self.extents.iter().map(|e| e.len).sum::<usize>() / BLOCK;
            pool.give_back(&self.extents, blocks);
        }
    }
}

/// A buffer of the pool's that we alone hold and may write.
///
/// [`freeze`](Self::freeze) makes it a [`StableBuf`]. Until then only this
/// handle reaches the memory, and the kernel where a [`target`](Self::target)
/// was lent to it.
pub struct PoolBuf {
    inner: Arc<Inner>,
}

impl PoolBuf {
    /// Bytes asked for; the last block's rest is padding.
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// Whether no bytes were asked for.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// The contiguous pieces, in order.
    pub fn pieces_mut(&mut self) -> impl Iterator<Item = &mut [u8]> + '_ {
        self.range_mut(0..self.inner.len)
    }

    /// The contiguous pieces of a part, in order.
    pub fn range_mut(&mut self, range: Range<usize>) -> impl Iterator<Item = &mut [u8]> + '_ {
        let len = self.inner.len;
        assert!(range.start <= range.end && range.end <= len, "{range:?} of {len} bytes");
        self.pieces_with_padding(range)
    }

    fn pieces_with_padding(&mut self, range: Range<usize>) -> impl Iterator<Item = &mut [u8]> + '_ {
        clip(&self.inner.extents, range.start, range.end - range.start).map(|piece| {
            // SAFETY: the extents are ours alone (the pool gave them out and
            // takes them back only when `inner` is dropped; `inner` is shared
            // with nobody but a lent target, which nobody but the kernel
            // follows), mapped and initialised (anonymous memory is zero at
            // first), and the pieces of one iteration do not overlap.
            unsafe { std::slice::from_raw_parts_mut(piece.addr as *mut u8, piece.len) }
        })
    }

    /// The bytes `at..at + len`, which must be contiguous.
    ///
    /// # Panics
    ///
    /// When they are not, or not all in the buffer. A block that begins at a
    /// block boundary always is.
    pub fn contiguous(&self, at: usize, len: usize) -> &[u8] {
        let piece = clip(&self.inner.extents, at, self.inner.len.saturating_sub(at)).next();
        let piece = piece.filter(|piece| len <= piece.len).expect("in one extent");
        // SAFETY: as in `pieces_with_padding`; who borrows the buffer writes
        // nothing.
        unsafe { std::slice::from_raw_parts(piece.addr as *const u8, len) }
    }

    /// Copies `bytes` to offset `at`.
    ///
    /// # Panics
    ///
    /// When they do not fit.
    pub fn copy_from(&mut self, at: usize, mut bytes: &[u8]) {
        for piece in self.range_mut(at..at + bytes.len()) {
            let (now, later) = bytes.split_at(piece.len());
            piece.copy_from_slice(now);
            bytes = later;
        }
    }

    /// Writes zeros to a part.
    pub fn zero(&mut self, range: Range<usize>) {
        self.range_mut(range).for_each(|piece| piece.fill(0));
    }

    /// Writes zeros to all padding: what lies outside `payload`, up to the
    /// end of the last block. Old memory must not leak to a device.
    pub fn zero_outside(&mut self, payload: Range<usize>) {
        let whole = self.inner.extents.iter().map(|e| e.len).sum::<usize>();
        self.pieces_with_padding(0..payload.start).for_each(|piece| piece.fill(0));
        self.pieces_with_padding(payload.end..whole).for_each(|piece| piece.fill(0));
    }

    /// Lends a part to the kernel, to be filled. Until the list is dropped
    /// the caller leaves that part alone.
    pub fn target(&mut self, range: Range<usize>) -> SgList {
        assert!(
            range.start <= range.end && range.end <= self.inner.len,
            "{range:?} of {}",
            self.inner.len
        );
        SgList::of(
            clip(&self.inner.extents, range.start, range.end - range.start),
            self.inner.clone(),
        )
    }

    /// The address of byte `at`, from which on the buffer is contiguous for
    /// `len` bytes: shortened to the end of the extent, if that is nearer.
    ///
    /// # Panics
    ///
    /// When `at` is behind the buffer's end.
    pub(crate) fn place(&mut self, at: usize, len: &mut usize) -> *mut u8 {
        let piece = clip(&self.inner.extents, at, self.inner.len - at).next();
        let piece = piece.expect("inside the buffer");
        *len = piece.len.min(*len);
        piece.addr as *mut u8
    }

    /// No more writing: the buffer becomes stable, without a copy.
    ///
    /// # Panics
    ///
    /// When a lent target is still out: the kernel might write to it yet.
    pub fn freeze(self) -> StableBuf {
        let mut inner = self.inner;
        // `get_mut` also orders us after a lent target's drop elsewhere.
        let alone = Arc::get_mut(&mut inner).is_some();
        assert!(alone, "frozen while the kernel may still fill it");
        StableBuf::from_inner(inner)
    }
}

impl std::fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PoolBuf({} bytes in {} extents)", self.inner.len, self.inner.extents.len())
    }
}

impl Arena {
    fn map(len: usize) -> std::io::Result<Self> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's
        // choice touches no memory of ours.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { addr: addr as usize, len })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length. Every buffer holds the
        // pool, so none is left.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    struct Flag(std::sync::atomic::AtomicUsize);
    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    #[test]
    fn reservations_are_granted_in_order_and_given_back() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut all = pool.try_reserve(1 << 20).unwrap().unwrap();
        assert!(pool.try_reserve(1).unwrap().is_none());
        assert!(pool.try_reserve((1 << 20) + 1).is_err());

        let flag = Arc::new(Flag(0.into()));
        let waker = Waker::from(flag.clone());
        let mut cx = Context::from_waker(&waker);
        let mut large = Box::pin(pool.reserve(1 << 19));
        let mut small = Box::pin(pool.reserve(4096));
        assert!(large.as_mut().poll(&mut cx).is_pending());
        assert!(small.as_mut().poll(&mut cx).is_pending());
        // One block would do for `small`, but `large` came first (POOL-3).
        let buf = all.take(1 << 18);
        drop(all.split(4096));
        assert!(small.as_mut().poll(&mut cx).is_pending());
        // A waiter that gives up makes room for the next.
        drop(large);
        assert!(matches!(small.as_mut().poll(&mut cx), Poll::Ready(Ok(_))));
        drop((small, buf, all));
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn fragmentation_does_not_break_a_reservation() {
        let pool = Pool::new(1 << 20).unwrap();
        let mut all = pool.try_reserve(1 << 20).unwrap().unwrap();
        let blocks: Vec<_> = (0..256).map(|_| all.take(4096)).collect();
        // Free every other block: nothing of two blocks is contiguous.
        let kept: Vec<_> =
            blocks.into_iter().enumerate().filter(|(i, _)| i % 2 == 0).map(|(_, b)| b).collect();
        let mut rest = pool.try_reserve(128 * 4096).unwrap().unwrap();
        let mut buf = rest.take(128 * 4096 - 5);
        assert_eq!(buf.pieces_mut().map(|p| p.len()).sum::<usize>(), 128 * 4096 - 5);
        assert_eq!(buf.inner.extents.len(), 128);
        drop((kept, buf, rest, all));
        assert_eq!(pool.used(), 0);
        let mut again = pool.try_reserve(1 << 20).unwrap().unwrap();
        assert_eq!(again.take(1 << 20).inner.extents.len(), 1, "buddies were merged");
    }

    #[test]
    fn padding_is_zeroed() {
        let pool = Pool::new(1 << 20).unwrap();
        for _ in 0..2 {
            let mut buf = pool.try_reserve(8192).unwrap().unwrap().take(8192);
            buf.pieces_mut().for_each(|p| p.fill(0xAA));
            buf.zero_outside(512..4608);
            let bytes = buf.freeze().to_vec();
            for (i, byte) in bytes.iter().enumerate() {
                assert_eq!(*byte, if (512..4608).contains(&i) { 0xAA } else { 0 }, "byte {i}");
            }
        }
    }
}
