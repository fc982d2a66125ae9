//! Memory that somebody else may change at any time.

use std::any::Any;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::sg::SgList;

/// Whatever must live as long as the addresses of a [`ForeignBuf`] are used:
/// a guest's memory map, a program's allocation.
pub type KeepAlive = Arc<dyn Any + Send + Sync>;

/// One contiguous range of addresses, laid out as `struct iovec`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first byte's address. A number: following it takes a door.
    pub addr: usize,
    /// Bytes.
    pub len: usize,
}

impl Segment {
    /// The same range for a pass, which may follow its address.
    pub(crate) fn range(self) -> stableio_onepass::Segment {
        stableio_onepass::Segment { addr: self.addr as *const u8, len: self.len }
    }
}

/// Bytes of a word: what a program stores, and a door loads, whole.
pub(crate) const WORD: usize = 8;

pub(crate) type Segments = SmallVec<[Segment; 2]>;

/// A handle of foreign memory: address ranges, in the order of the request,
/// and what keeps them alive.
///
/// The handle gives out no reference and no slice (MEM-2). It is not `Clone`:
/// a door that samples it consumes it, so the same handle can not be sampled
/// twice (MEM-1). Two handles may alias: a guest may name one page twice.
/// Aliases are harmless, as each handle's bytes are loaded once and used as
/// loaded.
#[derive(Debug)]
pub struct ForeignBuf {
    segments: Segments,
    len: usize,
    keep: KeepAlive,
}

impl ForeignBuf {
    /// A handle of `segments`, in this order, kept alive by `keep`.
    ///
    /// # Safety
    ///
    /// Until the last clone of `keep` is dropped, every address of `segments`
    /// lies in a mapping of this process that is neither unmapped nor handed
    /// to the Rust allocator. The bytes may change at any time and may fault
    /// (the file behind them may shrink); nobody may hold a Rust reference to
    /// them while the handle lives.
    pub unsafe fn new(segments: impl IntoIterator<Item = Segment>, keep: KeepAlive) -> Self {
        let segments: Segments = segments.into_iter().filter(|s| s.len > 0).collect();
        let len = segments.iter().map(|s| s.len).sum();
        Self { segments, len, keep }
    }

    /// Bytes in all segments together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to read or write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `at` bytes off into a handle of their own.
    ///
    /// # Panics
    ///
    /// When `at` is more than [`len`](Self::len).
    pub fn split_to(&mut self, at: usize) -> ForeignBuf {
        assert!(at <= self.len, "split at {at} of {} bytes", self.len);
        let mut front = Segments::new();
        let mut left = at;
        let mut whole = 0;
        for segment in &mut self.segments {
            if left >= segment.len {
                left -= segment.len;
                front.push(*segment);
                whole += 1;
                continue;
            }
            if left > 0 {
                front.push(Segment { addr: segment.addr, len: left });
                segment.addr += left;
                segment.len -= left;
            }
            break;
        }
        self.segments.drain(..whole);
        self.len -= at;
        ForeignBuf { segments: front, len: at, keep: self.keep.clone() }
    }

    /// The naturally aligned word of the memory that a cut at byte `at` would
    /// go through, if there is one inside a segment: the byte of the buffer
    /// where it begins, and its address.
    pub(crate) fn word_at(&self, at: usize) -> Option<(usize, usize)> {
        let mut start = 0;
        let segment = self.segments.iter().find(|s| {
            start += s.len;
            at < start
        })?;
        start -= segment.len;
        let word = (segment.addr + at - start) & !(WORD - 1);
        let cut = word < segment.addr + at - start;
        let inside = word >= segment.addr && word + WORD <= segment.addr + segment.len;
        (cut && inside).then(|| (start + word - segment.addr, word))
    }

    /// Splits at `at`, with the bytes from `start` on, which were loaded, in
    /// place of the memory that they came from.
    pub(crate) fn split_around(&mut self, at: usize, start: usize, word: [u8; WORD]) -> ForeignBuf {
        let loaded = Arc::new((word, self.keep.clone()));
        let addr = loaded.0.as_ptr() as usize;
        let keep: KeepAlive = loaded;
        let mut front = self.split_to(start);
        drop(self.split_to(WORD));
        let (before, after) = (at - start, start + WORD - at);
        front.segments.push(Segment { addr, len: before });
        front.len += before;
        self.segments.insert(0, Segment { addr: addr + before, len: after });
        self.len += after;
        (front.keep, self.keep) = (keep.clone(), keep);
        front
    }

    /// Whether every segment begins and ends at a multiple of `align` bytes,
    /// so that the kernel takes it for direct I/O as it is.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments.iter().all(|s| (s.addr | s.len).is_multiple_of(align))
    }

    /// The address ranges, for a system call that reads or fills them.
    ///
    /// This is how a device that samples once passes foreign memory on
    /// untouched. Numbers only: loading them in this process is a door's
    /// business.
    pub fn for_kernel(&self) -> &[Segment] {
        &self.segments
    }

    /// The segments of the range `from..from + len`, clipped.
    pub(crate) fn range(&self, from: usize, len: usize) -> impl Iterator<Item = Segment> + '_ {
        debug_assert!(from + len <= self.len);
        clip(&self.segments, from, len)
    }

    /// A part of the buffer as a destination for the kernel to fill.
    ///
    /// Destinations only: one read may fill parts of a buffer by several
    /// operations. Whoever samples takes the handle itself.
    pub fn target(&self, from: usize, len: usize) -> SgList {
        assert!(from + len <= self.len, "{from}+{len} of {} bytes", self.len);
        SgList::of(self.range(from, len), self.keep.clone())
    }

    pub(crate) fn into_parts(self) -> (Segments, usize, KeepAlive) {
        (self.segments, self.len, self.keep)
    }
}

/// The parts of `segments` that lie in `from..from + len` of their sum.
pub(crate) fn clip(
    segments: &[Segment],
    from: usize,
    len: usize,
) -> impl Iterator<Item = Segment> + '_ {
    let end = from + len;
    let mut at = 0;
    segments.iter().filter_map(move |segment| {
        let (start, stop) = (at.max(from), (at + segment.len).min(end));
        let clipped = Segment {
            addr: segment.addr + start.saturating_sub(at),
            len: stop.saturating_sub(start),
        };
        at += segment.len;
        (clipped.len > 0).then_some(clipped)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buf(segments: &[(usize, usize)]) -> ForeignBuf {
        // SAFETY: nothing follows these addresses; the tests look at numbers.
        unsafe {
            ForeignBuf::new(segments.iter().map(|&(addr, len)| Segment { addr, len }), Arc::new(()))
        }
    }

    #[test]
    fn splitting_keeps_order_and_sum() {
        for at in 0..=30 {
            let mut rest = buf(&[(100, 10), (200, 0), (300, 15), (400, 5)]);
            let front = rest.split_to(at);
            assert_eq!((front.len(), rest.len()), (at, 30 - at));
            let all: Vec<usize> = front
                .segments
                .iter()
                .chain(&rest.segments)
                .flat_map(|s| s.addr..s.addr + s.len)
                .collect();
            let want: Vec<usize> = (100..110).chain(300..315).chain(400..405).collect();
            assert_eq!(all, want, "split at {at}");
        }
    }

    #[test]
    fn a_cut_through_a_word_hands_both_parts_what_was_loaded() {
        let bytes: Arc<Vec<u64>> = Arc::new((0..8).map(|i| 0x1111_1111_1111_1111 * i).collect());
        let base = bytes.as_ptr() as usize;
        let whole = |offset: usize, len: usize| {
            let segment = Segment { addr: base + offset, len };
            // SAFETY: the vector is the keep-alive and nobody writes to it.
            unsafe { ForeignBuf::new([segment], bytes.clone()) }
        };
        let content = |buf: ForeignBuf| {
            let mut bytes = vec![0; buf.len()];
            crate::doors::load(buf, &mut bytes).unwrap();
            bytes
        };
        for offset in 0..9 {
            for at in 0..40 {
                let mut rest = whole(offset, 40);
                let front = crate::doors::split_words(&mut rest, at).unwrap();
                assert_eq!((front.len(), rest.len()), (at, 40 - at));
                let both = [content(front), content(rest)].concat();
                assert_eq!(both, content(whole(offset, 40)), "{offset} cut at {at}");
            }
        }
        let mut rest = whole(3, 40);
        let front = crate::doors::split_words(&mut rest, 17).unwrap();
        let end = front.segments.last().unwrap();
        assert_eq!(end.addr + end.len, rest.segments[0].addr, "one private word");
        assert!(!(base..base + 64).contains(&end.addr));
    }

    #[test]
    fn ranges_are_clipped() {
        let b = buf(&[(100, 10), (300, 15)]);
        let r: Vec<_> = b.range(8, 4).map(|s| (s.addr, s.len)).collect();
        assert_eq!(r, [(108, 2), (300, 2)]);
        assert!(b.range(25, 0).next().is_none());
    }
}
