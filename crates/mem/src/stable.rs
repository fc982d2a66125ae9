//! Memory that nobody changes while we hold it.

use std::ops::Range;
use std::sync::Arc;

use crate::foreign::{KeepAlive, Segment, Segments, clip};
use crate::pool::Backing;
use crate::sg::SgList;
use crate::units::BLOCK;

/// Bytes that nobody changes: a slice of a buffer, shared by count.
///
/// Cloning and slicing copy no bytes. The memory goes back to its pool when
/// the last slice is dropped.
#[derive(Clone)]
pub struct StableBuf {
    inner: Arc<Inner>,
    from: usize,
    len: usize,
}

/// Extents in order; every one but the last is a whole number of blocks, so a
/// block that begins at a multiple of the block size is contiguous.
pub(crate) struct Inner {
    pub(crate) extents: Segments,
    pub(crate) len: usize,
    pub(crate) keep: Keep,
}

/// What owns the extents; held for its drop.
pub(crate) enum Keep {
    /// Returns them to the pool.
    Pool(Backing),
    /// Frees the memory.
    Owned(#[expect(dead_code, reason = "held for its drop")] KeepAlive),
}

impl StableBuf {
    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self { from: 0, len: inner.len, inner }
    }

    /// Takes over memory of the caller's own, without copying it.
    ///
    /// `Vec<u8>`, `Box<[u8]>`, `&'static [u8]`: whatever is passed is moved in
    /// and dropped with the last slice.
    pub fn from_owned<T: AsRef<[u8]> + Send + Sync + 'static>(owned: T) -> Self {
        let keep = Arc::new(owned);
        let bytes: &[u8] = (*keep).as_ref();
        let extent = Segment { addr: bytes.as_ptr() as usize, len: bytes.len() };
        let inner = Inner {
            extents: Segments::from_slice(&[extent]),
            len: extent.len,
            keep: Keep::Owned(keep),
        };
        Self { len: extent.len, inner: Arc::new(inner), from: 0 }
    }

    /// Buffers as one, in their order; no bytes are copied.
    ///
    /// # Panics
    ///
    /// When a block would lie in two pieces: every piece of every buffer must
    /// be whole blocks.
    pub fn joined(parts: Vec<StableBuf>) -> Self {
        let extents: Segments =
            parts.iter().flat_map(|p| clip(&p.inner.extents, p.from, p.len)).collect();
        assert!(extents.iter().all(|e| e.len.is_multiple_of(BLOCK)), "whole blocks: {extents:?}");
        let len = extents.iter().map(|e| e.len).sum();
        let keep = Keep::Owned(Arc::new(parts));
        Self::from_inner(Arc::new(Inner { extents, len, keep }))
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part `range` of this slice; no bytes are copied.
    ///
    /// # Panics
    ///
    /// When the range does not lie in the slice.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {} bytes",
            self.len
        );
        Self {
            inner: self.inner.clone(),
            from: self.from + range.start,
            len: range.end - range.start,
        }
    }

    /// The contiguous pieces, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> + '_ {
        clip(&self.inner.extents, self.from, self.len).map(|piece| {
            // SAFETY: `clip` stays inside the extents, which `keep` keeps
            // allocated and initialised as long as `self.inner` lives; nobody
            // writes to them any more (only a `PoolBuf`, consumed to make
            // this, could).
            unsafe { std::slice::from_raw_parts(piece.addr as *const u8, piece.len) }
        })
    }

    /// The bytes `from..from + len` of the slice, which must be contiguous.
    ///
    /// # Panics
    ///
    /// When the range crosses from one extent into the next. A block that
    /// begins at a block boundary of the buffer never does.
    pub fn contiguous(&self, from: usize, len: usize) -> &[u8] {
        assert!(from + len <= self.len, "{from}+{len} of {} bytes", self.len);
        if len == 0 {
            return &[];
        }
        let piece = clip(&self.inner.extents, self.from + from, len).next().expect("in range");
        assert_eq!(piece.len, len, "the bytes {from}+{len} cross an extent");
        // SAFETY: as in `pieces`.
        unsafe { std::slice::from_raw_parts(piece.addr as *const u8, piece.len) }
    }

    /// The address of byte `at`, from which on the bytes are contiguous for
    /// `len` bytes: shortened to the end of the extent, if that is nearer.
    ///
    /// # Panics
    ///
    /// When `at` is behind the slice's end.
    pub(crate) fn place(&self, at: usize, len: &mut usize) -> *const u8 {
        assert!(at < self.len, "byte {at} of {}", self.len);
        let piece = clip(&self.inner.extents, self.from + at, self.len - at).next();
        let piece = piece.expect("inside the slice");
        *len = piece.len.min(*len);
        piece.addr as *const u8
    }

    /// Whether every piece begins and ends at a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.pieces().all(|p| (p.as_ptr() as usize | p.len()).is_multiple_of(align))
    }

    /// Whether the byte that stands for device offset `at` lies at the same
    /// offset inside a block of this buffer, with no block cut by an extent.
    pub fn is_congruent(&self, at: u64, block: usize) -> bool {
        let lead = (at % block as u64) as usize;
        let single = self.inner.extents.len() == 1;
        single || (self.from % block == lead)
    }

    /// The bytes as a source for the kernel.
    pub fn source(&self) -> SgList {
        SgList::of(clip(&self.inner.extents, self.from, self.len), self.inner.clone())
    }

    /// The bytes in a vector of their own: for tests and for small things.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len);
        self.pieces().for_each(|piece| all.extend_from_slice(piece));
        all
    }
}

impl std::fmt::Debug for StableBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StableBuf({} of {} bytes at {})", self.len, self.inner.len, self.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_and_free() {
        let b = StableBuf::from_owned((0..100u8).collect::<Vec<_>>());
        let s = b.slice(10..20).slice(5..10);
        drop(b);
        assert_eq!(s.to_vec(), [15, 16, 17, 18, 19]);
        assert_eq!(s.contiguous(1, 2), [16, 17]);
        assert!(s.slice(2..2).is_empty());
    }

    #[test]
    fn joined_buffers_are_one() {
        let b = StableBuf::from_owned((0..3 * BLOCK).map(|i| (i / 100) as u8).collect::<Vec<_>>());
        let (front, back) = (b.slice(0..BLOCK), b.slice(BLOCK..3 * BLOCK));
        let swapped = StableBuf::joined(vec![back.clone(), front.clone()]);
        assert_eq!(swapped.to_vec(), [back.to_vec(), front.to_vec()].concat());
        assert_eq!(swapped.contiguous(2 * BLOCK + 5, 7), front.contiguous(5, 7));
        let cut = vec![b.slice(0..100), b.slice(100..BLOCK)];
        let joined = std::panic::AssertUnwindSafe(|| StableBuf::joined(cut));
        assert!(std::panic::catch_unwind(joined).is_err());
    }
}
