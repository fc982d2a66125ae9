//! Scatter-gather lists: what one system call reads from or fills.

use smallvec::SmallVec;

use crate::foreign::{ForeignBuf, KeepAlive, Segment};

/// Address ranges for the kernel, in order, and what keeps them alive.
///
/// A list holds no right to look at the bytes in this process: it is how
/// memory that a door already sampled, that its owner promised, or that is
/// sampled only once, by the kernel, reaches a member.
#[derive(Default)]
pub struct SgList {
    segments: SmallVec<[Segment; 4]>,
    keep: SmallVec<[KeepAlive; 2]>,
    len: usize,
}

impl SgList {
    /// A list of `segments`, all kept alive by `keep`.
    pub(crate) fn of(segments: impl IntoIterator<Item = Segment>, keep: KeepAlive) -> Self {
        let segments: SmallVec<[Segment; 4]> = segments.into_iter().collect();
        let len = segments.iter().map(|s| s.len).sum();
        Self { segments, keep: smallvec::smallvec![keep], len }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address ranges, laid out as the kernel's `struct iovec`.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Puts `other` behind this list; neighbours in memory are joined.
    pub fn append(&mut self, other: SgList) {
        for segment in other.segments {
            match self.segments.last_mut() {
                Some(last) if last.addr + last.len == segment.addr => last.len += segment.len,
                _ => self.segments.push(segment),
            }
        }
        self.keep.extend(other.keep);
        self.len += other.len;
    }

    /// The same ranges once more, for going on where the kernel stopped.
    pub fn duplicate(&self) -> SgList {
        Self { segments: self.segments.clone(), keep: self.keep.clone(), len: self.len }
    }

    /// Keeps `keep` until the list is dropped, which is when the kernel is
    /// done with it.
    pub fn hold(&mut self, keep: KeepAlive) {
        self.keep.push(keep);
    }

    /// Drops the first `bytes`: the kernel did them already.
    pub fn advance(&mut self, bytes: usize) {
        let left = self.len - bytes;
        match left {
            0 => self.segments.clear(),
            _ => self.segments = crate::foreign::clip(&self.segments, bytes, left).collect(),
        }
        self.len = left;
    }

    /// Cuts the list after `at` bytes; gives the rest.
    pub fn split_off(&mut self, at: usize) -> SgList {
        let mut rest = self.duplicate();
        rest.advance(at);
        self.truncate(at);
        rest
    }

    /// Drops all but the first `bytes`.
    pub fn truncate(&mut self, bytes: usize) {
        if bytes < self.len {
            self.segments = crate::foreign::clip(&self.segments, 0, bytes).collect();
            self.len = bytes;
        }
    }

    /// Whether every segment begins and ends at a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments.iter().all(|s| (s.addr | s.len).is_multiple_of(align))
    }
}

impl From<ForeignBuf> for SgList {
    /// Passes foreign memory on untouched, to be sampled once, by the kernel.
    fn from(buf: ForeignBuf) -> Self {
        let (segments, _, keep) = buf.into_parts();
        Self::of(segments, keep)
    }
}

impl std::fmt::Debug for SgList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SgList({} bytes in {} segments)", self.len, self.segments.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn both_ends_are_cut_at_any_byte() {
        let segments = [(100, 10), (300, 15)].map(|(addr, len)| Segment { addr, len });
        let list = SgList::of(segments, Arc::new(()));
        let addresses = |list: &SgList| -> Vec<usize> {
            list.segments().iter().flat_map(|s| s.addr..s.addr + s.len).collect()
        };
        let all = addresses(&list);
        for at in 0..=25 {
            let (mut front, mut back) = (list.duplicate(), list.duplicate());
            front.truncate(at);
            back.advance(at);
            assert_eq!((front.len(), back.len()), (at, 25 - at));
            assert_eq!([addresses(&front), addresses(&back)].concat(), all, "cut at {at}");
        }
        let mut whole = list.duplicate();
        whole.truncate(26);
        assert_eq!(addresses(&whole), all);
    }
}
