//! Foreign memory in segments, loaded in order: who loads what, and which words are kept whole.

use crate::pieces::WORD;
use crate::{Fault, Kernels};

/// A piece of address space in which nothing but foreign memory lies. It may be inaccessible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts; of any alignment.
    pub addr: *const u8,
    /// Its length; may be zero.
    pub len: usize,
}

impl Segment {
    /// `len`, shortened to the last word boundary if otherwise the first `len` bytes ended inside
    /// a word that lies wholly in the segment.
    pub(crate) fn to_whole_words(self, len: usize) -> usize {
        let cut = self.addr.wrapping_add(len).addr() % WORD;
        let cuts_whole_word = cut > 0 && cut <= len && len - cut + WORD <= self.len;
        if cuts_whole_word { len - cut } else { len }
    }
}

/// The bytes of all segments.
pub(crate) fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.len).sum()
}

/// Foreign bytes that have not been loaded yet, in order.
///
/// Whoever loads them takes the cursor, or a part that was split off from it: no byte is in two of
/// them (ONCE-1). A word that a cut goes through is loaded by the cut, whole (ONCE-2), and each
/// side has its bytes of what was loaded.
///
/// ```text
///   head      straight from the segments                 tail
///   .....678  12345678  12345678  ..  12345678  12345678  123.....
/// ```
#[derive(Debug)]
pub struct Cursor<'a> {
    head: Loaded,
    /// The segments from the current one on.
    segments: &'a [Segment],
    /// The bytes of the current one that have been taken.
    offset: usize,
    /// How many bytes are still to be loaded from the segments. No word that lies wholly in a
    /// segment lies partly in them.
    straight: usize,
    tail: Loaded,
}

impl<'a, S: AsRef<[Segment]> + ?Sized> From<&'a S> for Cursor<'a> {
    fn from(segments: &'a S) -> Cursor<'a> {
        Cursor::new(segments.as_ref())
    }
}

impl<'a> Cursor<'a> {
    /// All bytes of the segments.
    #[inline]
    pub fn new(segments: &'a [Segment]) -> Cursor<'a> {
        let straight = total(segments);
        Cursor { head: Loaded::NONE, segments, offset: 0, straight, tail: Loaded::NONE }
    }

    /// How many bytes there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.head.len() + self.straight + self.tail.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the first `len` bytes off into a cursor of their own.
    ///
    /// # Errors
    ///
    /// [`Fault`] if the cut goes through a word that is not accessible.
    ///
    /// # Panics
    ///
    /// If there are not so many.
    ///
    /// # Safety
    ///
    /// Nothing but foreign memory lies in the segments; this thread does not block SIGBUS and
    /// SIGSEGV.
    #[inline]
    pub unsafe fn split_to(&mut self, len: usize) -> Result<Cursor<'a>, Fault> {
        // Small requests are taken whole, by each who passes them on.
        if len == self.len() {
            return Ok(std::mem::replace(self, Cursor::new(&[])));
        }
        if len == 0 {
            return Ok(Cursor::new(&[]));
        }
        // SAFETY: the caller's promises.
        unsafe { self.cut_to(len) }
    }

    /// [`split_to`](Self::split_to) where there is something on both sides.
    ///
    /// # Safety
    ///
    /// As there.
    unsafe fn cut_to(&mut self, len: usize) -> Result<Cursor<'a>, Fault> {
        let (mut front, cut) = self.part(len);
        if cut > 0 {
            // SAFETY: the caller's promises.
            front.tail = unsafe { self.load_word(Kernels::chosen(), cut)? };
        }
        Ok(front)
    }

    /// Loads the next `len` bytes, in order: a fault is the first that there is.
    ///
    /// # Safety
    ///
    /// That of [`load`](Self::load), for `len` bytes.
    pub(crate) unsafe fn load_next(
        &mut self,
        kernels: &Kernels,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), Fault> {
        let (front, cut) = self.part(len);
        // SAFETY: the caller's promises; the bytes of the word are the last of `len`.
        unsafe {
            front.load_with(kernels, dst)?;
            if cut > 0 {
                self.load_word(kernels, cut)?.copy_to(dst.add(len - cut));
            }
        }
        Ok(())
    }

    /// Takes the next `len` bytes off, but for the first bytes of a word that is cut thereby: says
    /// how many.
    fn part(&mut self, len: usize) -> (Cursor<'a>, usize) {
        assert!(len <= self.len(), "{len} of {} bytes", self.len());
        let head = self.head.split_to(len);
        let straight = (len - head.len()).min(self.straight);
        let (segments, offset) = (self.segments, self.offset);
        self.skip(straight);
        let cut = self.cut();
        self.offset -= cut;
        self.straight += cut;
        let tail = self.tail.split_to(len - head.len() - straight);
        (Cursor { head, segments, offset, straight: straight - cut, tail }, cut)
    }

    /// Loads the next word, and takes its first `len` bytes off.
    ///
    /// # Safety
    ///
    /// That of [`split_to`](Self::split_to); the word lies in the current segment.
    unsafe fn load_word(&mut self, kernels: &Kernels, len: usize) -> Result<Loaded, Fault> {
        let mut word = [0; WORD];
        // SAFETY: the caller's promises; the word is ours.
        unsafe { (kernels.copy_in)(self.take(WORD), word.as_mut_ptr(), WORD)? };
        self.head = Loaded { word, from: 0, end: WORD as u8 };
        Ok(self.head.split_to(len))
    }

    /// Loads all bytes.
    ///
    /// # Errors
    ///
    /// [`Fault`] if a segment was not accessible; a part of `dst` may have been written.
    ///
    /// # Safety
    ///
    /// As [`split_to`](Self::split_to); and `dst` is valid for writes of [`len`](Self::len) bytes,
    /// does not overlap the segments, and nobody else touches it during the call.
    pub unsafe fn load(self, dst: *mut u8) -> Result<(), Fault> {
        // SAFETY: the caller's promises.
        unsafe { self.load_with(Kernels::chosen(), dst) }
    }

    /// [`load`](Self::load) on a tier.
    ///
    /// # Safety
    ///
    /// As there.
    pub(crate) unsafe fn load_with(mut self, kernels: &Kernels, dst: *mut u8) -> Result<(), Fault> {
        // SAFETY: `dst` has room for the bytes of head, segments and tail.
        unsafe {
            let mut to = self.head.copy_to(dst);
            while self.straight > 0 {
                let Segment { addr, len } = self.current();
                (kernels.copy_in)(addr, to, len)?;
                self.skip(len);
                to = to.add(len);
            }
            self.tail.copy_to(to);
        }
        Ok(())
    }

    /// How many of the next bytes lie one after the other from a word boundary on. Nothing has
    /// been loaded of them.
    pub(crate) fn ahead(&mut self) -> usize {
        let next = self.current();
        let is_straight = self.head.len() == 0 && next.addr.addr().is_multiple_of(WORD);
        if is_straight { next.len } else { 0 }
    }

    /// The address of the next `len` bytes, which are [`ahead`](Self::ahead), whole words: the
    /// caller loads them.
    pub(crate) fn take(&mut self, len: usize) -> *const u8 {
        let next = self.current();
        assert!(self.head.len() == 0 && len <= next.len, "inside a segment");
        self.skip(len);
        next.addr
    }

    /// What is left of the current segment; nothing only if nothing is left of any.
    fn current(&mut self) -> Segment {
        self.skip(0);
        match self.segments.first() {
            Some(first) if self.straight > 0 => {
                let len = self.straight.min(first.len - self.offset);
                Segment { addr: first.addr.wrapping_add(self.offset), len }
            }
            _ => Segment { addr: std::ptr::null(), len: 0 },
        }
    }

    /// Moves over bytes of the segments, into the segment that the next one is in.
    fn skip(&mut self, len: usize) {
        self.straight -= len;
        self.offset += len;
        while let [first, rest @ ..] = self.segments
            && self.offset >= first.len
        {
            self.offset -= first.len;
            self.segments = rest;
        }
    }

    /// How many bytes of the word that the next byte is in lie before that, if the word lies wholly
    /// in its segment; else none.
    fn cut(&self) -> usize {
        let Some(first) = self.segments.first().filter(|_| self.straight > 0) else { return 0 };
        let before = first.addr.wrapping_add(self.offset).addr() % WORD;
        let is_whole = before <= self.offset && self.offset - before + WORD <= first.len;
        if is_whole { before } else { 0 }
    }
}

/// The bytes `from..end` of a word that was loaded.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    word: [u8; WORD],
    from: u8,
    end: u8,
}

impl Loaded {
    const NONE: Loaded = Loaded { word: [0; WORD], from: 0, end: 0 };

    fn len(&self) -> usize {
        usize::from(self.end - self.from)
    }

    /// Takes the first `len` bytes off, or all, if there are less.
    fn split_to(&mut self, len: usize) -> Loaded {
        let front = Loaded { end: self.from + len.min(self.len()) as u8, ..*self };
        self.from = front.end;
        front
    }

    /// Copies the bytes to `dst`, and says where the next ones go.
    ///
    /// # Safety
    ///
    /// `dst` is valid for writes of as many bytes.
    unsafe fn copy_to(&self, dst: *mut u8) -> *mut u8 {
        let bytes = &self.word[usize::from(self.from)..usize::from(self.end)];
        // SAFETY: the caller's promise.
        unsafe {
            dst.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            dst.add(bytes.len())
        }
    }
}
