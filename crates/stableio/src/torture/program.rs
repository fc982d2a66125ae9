//! The program: buffers that it fills, writes, and changes while they are
//! being written.
//!
//! ```text
//! word, before it is multiplied:   63      56 55        38 37            0
//!                                  | buffer  | index      | count        |
//! ```
//!
//! `index` is the word's place in its buffer; `count` grows with each batch of
//! words that is stored there. Times an odd number, modulo 2^64, so that each
//! part of a word depends on all of `count`: a word put together of two says
//! nothing that was ever stored.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};
use std::thread;

use smallvec::SmallVec;
use stableio_mem::{ForeignBuf, Segment};
use stableio_testkit::vhost::SharedMemory;

use super::bed::Bed;
use super::plan::{BUFFER, Piece, Pieces, Random, SEGMENTS};

/// Writes in flight on each way in.
pub(super) const DEPTH: usize = 32;
/// Words that a mutator stores before it turns to the next buffer.
const BATCH: usize = 64;
/// Most mutators for the buffers of one way in.
const MUTATORS: usize = 4;

const WORD: usize = 8;
const TAG_SHIFT: u32 = 56;
const INDEX_SHIFT: u32 = 38;
const COUNT_MASK: u64 = (1 << INDEX_SHIFT) - 1;
/// Two to the 64th by the golden ratio, odd.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// What undoes it. Newton's iteration doubles the right bits with each step.
const GATHER: u64 = {
    let (mut inverse, mut step) = (SPREAD, 0);
    while step < 5 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(SPREAD.wrapping_mul(inverse)));
        step += 1;
    }
    inverse
};
const _: () = assert!(SPREAD.wrapping_mul(GATHER) == 1);
const _: () = assert!(BUFFER / WORD <= 1 << (TAG_SHIFT - INDEX_SHIFT) && 2 * DEPTH <= 1 << 8);

/// The program's memory, for both ways in.
pub(super) struct Program {
    /// For the library.
    pub(super) library: Arc<[Buffer]>,
    /// For the guest: its memory is the guest's.
    pub(super) guest: Arc<[Buffer]>,
    /// Mutators pass it with every round over their buffers.
    gate: RwLock<()>,
}

/// Memory of one request at a time.
pub(super) struct Buffer {
    memory: Arc<SharedMemory>,
    /// Where it begins in the memory, in bytes.
    at: usize,
    tag: u8,
    /// Whether it is being written or read into.
    in_flight: AtomicBool,
    /// Batches that were stored. Follows `hand.count` once the words are
    /// there.
    count: AtomicU64,
    hand: Mutex<Hand>,
}

/// What whoever stores words holds.
#[derive(Default)]
struct Hand {
    count: u64,
    /// The words of the write.
    words: SmallVec<[Range<usize>; SEGMENTS]>,
}

impl Program {
    pub(super) fn new(bed: &Bed) -> anyhow::Result<Self> {
        let library = SharedMemory::new(DEPTH * BUFFER)?;
        let buffers = |memory: &Arc<SharedMemory>, first: usize| {
            let buffer = |i| Buffer::new(memory.clone(), i * BUFFER, (first + i) as u8);
            (0..DEPTH).map(buffer).collect()
        };
        Ok(Self {
            library: buffers(&library, 0),
            guest: buffers(bed.guest.memory(), DEPTH),
            gate: RwLock::new(()),
        })
    }

    /// Changes what is in flight as long as `body` runs.
    pub(super) fn run<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        // The worker wants a processor too.
        let spare = thread::available_parallelism().map_or(1, usize::from).saturating_sub(1);
        let mutators = (spare / 2).clamp(1, MUTATORS);
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(stop);
            for (seed, buffers) in [&self.library, &self.guest].into_iter().enumerate() {
                for first in 0..mutators {
                    let random = Random::new((seed * MUTATORS + first) as u64);
                    scope.spawn(move || self.mutate(buffers, first, mutators, random, stop));
                }
            }
            body()
        })
    }

    /// No buffer changes until the guard is dropped.
    pub(super) fn rest(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The buffer of a tag.
    pub(super) fn buffer(&self, tag: u8) -> &Buffer {
        let tag = usize::from(tag);
        if tag < DEPTH { &self.library[tag] } else { &self.guest[tag - DEPTH] }
    }

    /// A mutator: each `step`th buffer from `first` on, again and again.
    fn mutate(
        &self,
        buffers: &[Buffer],
        first: usize,
        step: usize,
        mut random: Random,
        stop: &AtomicBool,
    ) {
        while !stop.load(Ordering::Relaxed) {
            let open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            for buffer in buffers.iter().skip(first).step_by(step) {
                buffer.change(&mut random);
            }
            drop(open);
            // All that is in flight has changed. Where there are few
            // processors, whoever waits for one may go first.
            thread::yield_now();
        }
    }
}

impl Buffer {
    fn new(memory: Arc<SharedMemory>, at: usize, tag: u8) -> Self {
        let (in_flight, count, hand) = Default::default();
        Self { memory, at, tag, in_flight, count, hand }
    }

    /// Its number among all buffers.
    pub(super) fn tag(&self) -> u8 {
        self.tag
    }

    /// Fills the memory of the next write, and lets it be changed. Gives the
    /// count that the words carry now; none of them will carry a lower one.
    pub(super) fn prepare(&self, pieces: &Pieces) -> u64 {
        let mut hand = self.hand();
        hand.words = pieces.iter().map(|p| p.at / WORD..(p.at + p.len).div_ceil(WORD)).collect();
        let count = hand.count + 1;
        for index in hand.words.iter().cloned().flatten() {
            self.store(index, count);
        }
        self.publish(&mut hand, count);
        self.in_flight.store(true, Ordering::Relaxed);
        count
    }

    /// Lets the same memory be changed again. Gives the count so far.
    pub(super) fn stay(&self) -> u64 {
        self.in_flight.store(true, Ordering::Relaxed);
        self.count()
    }

    /// The write is done: whatever happens to the memory now is late.
    pub(super) fn land(&self) -> u64 {
        let count = self.count();
        self.in_flight.store(false, Ordering::Relaxed);
        count
    }

    /// Batches stored so far.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// A piece of it, for the library.
    pub(super) fn foreign(&self, pieces: &Pieces) -> ForeignBuf {
        let base = self.memory.words().as_ptr() as usize + self.at;
        let segments = pieces.iter().map(|p| Segment { addr: base + p.at, len: p.len });
        // SAFETY: the pieces lie in the buffer, and this in the mapping, which
        // `memory` keeps; it was never the allocator's. The references to it
        // are to atomics, made for single loads and stores.
        unsafe { ForeignBuf::new(segments, self.memory.clone()) }
    }

    /// A piece of it, for the guest's ring.
    pub(super) fn segment(&self, piece: &Piece) -> stableio_testkit::vhost::Segment {
        stableio_testkit::vhost::Segment { at: self.at + piece.at, len: piece.len }
    }

    /// Words that the program never stored for a write: `bytes` is what was
    /// found where `pieces` was written. Only words that lie in a piece whole
    /// must be whole.
    pub(super) fn strangers(&self, pieces: &Pieces, bytes: &[u8], counts: Range<u64>) -> u64 {
        let mut strangers = 0;
        let mut done = 0;
        for piece in pieces {
            let found = &bytes[done..done + piece.len];
            done += piece.len;
            let first = piece.at.next_multiple_of(WORD);
            let Some(found) = found.get(first - piece.at..) else { continue };
            for (i, word) in found.as_chunks::<WORD>().0.iter().enumerate() {
                let word = u64::from_ne_bytes(*word).wrapping_mul(GATHER);
                let place = word & !COUNT_MASK;
                let fits =
                    place == self.place(first / WORD + i) && counts.contains(&(word & COUNT_MASK));
                strangers += u64::from(!fits);
            }
        }
        strangers
    }

    /// Stores a batch of words of the write in flight, if there is one and
    /// nobody else is at it.
    fn change(&self, random: &mut Random) {
        if !self.in_flight.load(Ordering::Relaxed) {
            return;
        }
        let Ok(mut hand) = self.hand.try_lock() else { return };
        let words = hand.words[random.below(hand.words.len() as u64) as usize].clone();
        let count = hand.count + 1;
        // In order from anywhere, or in strides.
        let len = words.len();
        let stride =
            if len > 2 && random.below(2) == 0 { 1 + random.below(len as u64 - 1) } else { 1 };
        let mut at = random.below(len as u64) as usize;
        for _ in 0..len.min(BATCH) {
            self.store(words.start + at, count);
            at += stride as usize;
            if at >= len {
                at -= len;
            }
        }
        self.publish(&mut hand, count);
    }

    fn hand(&self) -> MutexGuard<'_, Hand> {
        self.hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, hand: &mut Hand, count: u64) {
        hand.count = count;
        self.count.store(count, Ordering::Release);
    }

    fn store(&self, index: usize, count: u64) {
        let word = (self.place(index) | count & COUNT_MASK).wrapping_mul(SPREAD);
        self.memory.words()[self.at / WORD + index].store(word, Ordering::Relaxed);
    }

    /// Tag and index of a word.
    fn place(&self, index: usize) -> u64 {
        u64::from(self.tag) << TAG_SHIFT | (index as u64) << INDEX_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_were_not_stored_are_told_from_those_that_were() {
        let memory = SharedMemory::new(2 * BUFFER).unwrap();
        let buffer = Buffer::new(memory.clone(), BUFFER, 7);
        let pieces = Pieces::from_slice(&[Piece { at: 3, len: 100 }, Piece { at: 200, len: 412 }]);
        let first = buffer.prepare(&pieces);
        let earlier = memory.load(BUFFER..BUFFER + 1024);
        let mut random = Random::new(1);
        while buffer.count() < 50 {
            buffer.change(&mut random);
        }
        let counts = first..buffer.count() + 1;
        let whole = memory.load(BUFFER..BUFFER + 1024);
        let data = |bytes: &[u8]| [&bytes[3..103], &bytes[200..612]].concat();
        assert_eq!(buffer.strangers(&pieces, &data(&whole), counts.clone()), 0);
        // Older than the write is strange, and so is each way to tear a word.
        assert!(buffer.strangers(&pieces, &data(&earlier), first + 1..counts.end) > 40);
        for cut in 1..WORD {
            let mut torn = whole.clone();
            torn[8..8 + cut].copy_from_slice(&earlier[8..8 + cut]);
            assert_ne!(torn, whole);
            assert_eq!(buffer.strangers(&pieces, &data(&torn), counts.clone()), 1, "cut at {cut}");
        }
        let mut moved = whole.clone();
        moved.copy_within(16..24, 8);
        assert_eq!(buffer.strangers(&pieces, &data(&moved), counts), 1);
    }
}
