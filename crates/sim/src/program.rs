//! A program that changes the memory of its requests while they are under
//! way.
//!
//! Every word that it stores says which buffer and which place it was stored
//! to, and for the how manieth time:
//!
//! ```text
//! bit   0        18       28         46        64
//!       | count  | buffer | index    | count   |
//! ```
//!
//! PROG-1: the count is at both ends. A word put together from bytes of two
//! stores either has two counts that differ, or is one of the two.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use stableio_mem::{ForeignBuf, Segment};

use crate::random::Random;

/// Bytes of a word.
pub const WORD: usize = 8;
/// Bytes of the largest buffer.
pub const LARGEST: usize = WORD << INDEX_BITS;

const COUNT_BITS: u32 = 18;
const BUFFER_BITS: u32 = 10;
const INDEX_BITS: u32 = 18;
/// Words of a buffer that are rewritten at a time, at most; of a long one its
/// part by this number.
const BURST: usize = 64;

/// The program: its buffers, and which of them it is changing.
#[derive(Default)]
pub struct Program {
    racing: RefCell<Vec<Rc<Buffer>>>,
    buffers: RefCell<u16>,
}

/// A buffer of the program's.
pub struct Buffer {
    number: u16,
    memory: Arc<Memory>,
    /// By word, how often it was stored after the first time.
    counts: RefCell<Vec<u32>>,
}

/// A mapping that is reached by raw pointers only, as memory is that others
/// change.
struct Memory {
    addr: usize,
    len: usize,
}

/// Segments of a buffer that a request was made of, and what they held then.
pub struct Source {
    buffer: Rc<Buffer>,
    segments: Vec<Segment>,
    /// The counts when the request was made: older words are too old.
    counts: Vec<u32>,
}

fn word(buffer: u16, index: usize, count: u32) -> u64 {
    let (buffer, index, count) = (u64::from(buffer), index as u64, u64::from(count));
    count
        | buffer << COUNT_BITS
        | index << (COUNT_BITS + BUFFER_BITS)
        | count << (COUNT_BITS + BUFFER_BITS + INDEX_BITS)
}

impl Program {
    /// A new buffer of `len` bytes, with the first word stored everywhere.
    ///
    /// # Panics
    ///
    /// When `len` is more than [`LARGEST`], or the program has too many.
    pub fn buffer(&self, len: usize) -> Rc<Buffer> {
        let number = {
            let mut buffers = self.buffers.borrow_mut();
            *buffers = (*buffers + 1) % (1 << BUFFER_BITS);
            *buffers
        };
        assert!(len <= LARGEST, "{len} bytes are more words than have numbers");
        let memory = Arc::new(Memory::map(len));
        let buffer = Buffer { number, memory, counts: RefCell::new(vec![0; len / WORD]) };
        (0..len / WORD).for_each(|index| buffer.store(index, 0));
        Rc::new(buffer)
    }

    /// Memory for a request of `len` bytes, in up to five segments all over a
    /// buffer of its own that begin and end at multiples of `align`; sometimes
    /// one part of it is named twice.
    pub fn scattered(&self, len: usize, align: usize, random: &mut Random) -> Source {
        let mut parts: Vec<(usize, usize)> = Vec::new();
        let (mut left, mut slot) = (len, 0);
        while left > 0 {
            let again = parts.first().copied().filter(|(_, len)| *len <= left);
            if let Some(first) = again.filter(|_| random.one_in(4)) {
                parts.push(first);
                left -= first.1;
                continue;
            }
            // Each part has a slot of its own, and begins anywhere in it.
            let last = parts.len() >= 4;
            let part = if last { left } else { random.between(1, left).next_multiple_of(align) };
            parts.push((slot + random.below(4096) as usize / align * align, part));
            slot += (part + 4096).next_multiple_of(4096);
            left -= part;
        }
        self.buffer(slot).source(&parts)
    }

    /// From now on the program keeps changing this buffer.
    pub fn race(&self, buffer: &Rc<Buffer>) {
        self.racing.borrow_mut().push(buffer.clone());
    }

    /// It leaves the buffer alone again.
    pub fn rest(&self, buffer: &Rc<Buffer>) {
        let mut racing = self.racing.borrow_mut();
        if let Some(i) = racing.iter().position(|b| Rc::ptr_eq(b, buffer)) {
            racing.remove(i);
        }
    }

    /// Its turn (SIM-3): it rewrites some words of each racing buffer.
    pub fn turn(&self, random: &mut Random) {
        for buffer in self.racing.borrow().iter() {
            let words = buffer.len() / WORD;
            let first = random.below(words as u64) as usize;
            let end = words.min(first + random.between(1, BURST.max(words / BURST)));
            (first..end).for_each(|index| buffer.store_next(index));
        }
    }
}

impl Buffer {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.memory.len
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.memory.len == 0
    }

    /// Parts of the buffer, as offset and length, as the memory of a request.
    /// A part may come twice.
    pub fn source(self: &Rc<Self>, parts: &[(usize, usize)]) -> Source {
        let segment = |&(from, len): &(usize, usize)| {
            assert!(from + len <= self.len(), "{from}+{len} of {} bytes", self.len());
            Segment { addr: self.memory.addr + from, len }
        };
        Source {
            buffer: self.clone(),
            segments: parts.iter().map(segment).collect(),
            counts: self.counts.borrow().clone(),
        }
    }

    /// What is in it now.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        load(self.memory.addr, &mut bytes);
        bytes
    }

    fn store(&self, index: usize, count: u32) {
        let place = (self.memory.addr + index * WORD) as *mut u64;
        // SAFETY: the index was made from the buffer's length; the word is
        // aligned and mapped, and nobody holds a reference to it.
        unsafe { place.write_volatile(word(self.number, index, count)) };
    }

    fn store_next(&self, index: usize) {
        let mut counts = self.counts.borrow_mut();
        counts[index] += 1;
        assert!(counts[index] < 1 << COUNT_BITS, "a word's counts have run out");
        self.store(index, counts[index]);
    }
}

impl Source {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The buffer.
    pub fn buffer(&self) -> &Rc<Buffer> {
        &self.buffer
    }

    /// A handle for a request.
    pub fn handle(&self) -> ForeignBuf {
        let keep = self.buffer.memory.clone();
        // SAFETY: `keep` holds the mapping that the segments lie in; it is
        // never given to an allocator, and reached by raw pointers only.
        unsafe { ForeignBuf::new(self.segments.iter().copied(), keep) }
    }

    /// Whether `found`, stored as the request's bytes from `from` on, can be
    /// what it loaded (CHECK-4): for each aligned word of the program's memory
    /// that lies whole in a segment, one that was stored there since.
    ///
    /// # Errors
    ///
    /// The first word that can not.
    pub fn explains(&self, from: usize, found: &[u8]) -> Result<(), String> {
        let counts = self.buffer.counts.borrow();
        let mut start = 0;
        for segment in &self.segments {
            let end = start + segment.len;
            let first = segment.addr.next_multiple_of(WORD);
            for addr in (first..segment.addr + segment.len).step_by(WORD) {
                let at = start + addr - segment.addr;
                if at < from || at + WORD > end.min(from + found.len()) {
                    continue;
                }
                let bytes = &found[at - from..at - from + WORD];
                let found = u64::from_le_bytes(bytes.try_into().expect("a word"));
                let index = (addr - self.buffer.memory.addr) / WORD;
                let count = (found & ((1 << COUNT_BITS) - 1)) as u32;
                let stored = found == word(self.buffer.number, index, count);
                if !stored || !(self.counts[index]..=counts[index]).contains(&count) {
                    return Err(format!(
                        "{found:#018x} was never stored in word {index} of buffer {}",
                        self.buffer.number
                    ));
                }
            }
            start = end;
        }
        Ok(())
    }
}

impl Memory {
    fn map(len: usize) -> Self {
        // SAFETY: a fresh anonymous mapping touches no memory of ours.
        let addr = unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), len, rights, MapFlags::PRIVATE)
        };
        Self { addr: addr.expect("memory for a buffer") as usize, len }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; whoever has an address in
        // it holds the `Arc`.
        let _ = unsafe { munmap(self.addr as *mut _, self.len) };
    }
}

/// Loads bytes as a device does: aligned words whole, what is left by byte.
pub(crate) fn load(addr: usize, into: &mut [u8]) {
    let (words_at, tail_at) = parts(addr, into.len());
    let byte = |at: usize| {
        // SAFETY: the caller's range is mapped and kept alive; a byte is
        // always aligned. Volatile: others may store to it.
        unsafe { ((addr + at) as *const u8).read_volatile() }
    };
    for (at, place) in into[..words_at].iter_mut().enumerate() {
        *place = byte(at);
    }
    for (i, place) in into[words_at..tail_at].chunks_exact_mut(WORD).enumerate() {
        // SAFETY: as above; the word is aligned, as `parts` cuts there.
        let word = unsafe { ((addr + words_at + i * WORD) as *const u64).read_volatile() };
        place.copy_from_slice(&word.to_ne_bytes());
    }
    for (at, place) in into[tail_at..].iter_mut().enumerate() {
        *place = byte(tail_at + at);
    }
}

/// Stores bytes as a device does.
pub(crate) fn store(addr: usize, from: &[u8]) {
    let (words_at, tail_at) = parts(addr, from.len());
    let store_byte = |at: usize| {
        // SAFETY: as in `load`; the owner asked for these bytes.
        unsafe { ((addr + at) as *mut u8).write_volatile(from[at]) }
    };
    (0..words_at).for_each(store_byte);
    for (i, bytes) in from[words_at..tail_at].chunks_exact(WORD).enumerate() {
        let word = u64::from_ne_bytes(bytes.try_into().expect("a word"));
        // SAFETY: as above; the word is aligned, as `parts` cuts there.
        unsafe { ((addr + words_at + i * WORD) as *mut u64).write_volatile(word) };
    }
    (tail_at..from.len()).for_each(store_byte);
}

/// Where, in `len` bytes from `addr` on, the aligned words begin and end.
fn parts(addr: usize, len: usize) -> (usize, usize) {
    let words_at = (addr.next_multiple_of(WORD) - addr).min(len);
    (words_at, len - (len - words_at) % WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PROG-1, and words from elsewhere or from before the request.
    #[test]
    fn words_that_were_never_stored_are_seen() {
        let program = Program::default();
        let (buffer, other) = (program.buffer(4096), program.buffer(4096));
        (0..512).for_each(|i| buffer.store_next(i));
        let source = buffer.source(&[(3, 2000), (3, 2000)]);
        (0..512).for_each(|i| buffer.store_next(i));
        let now = buffer.to_vec();
        let twice = [&now[3..2003], &now[3..2003]].concat();
        assert_eq!(source.explains(0, &twice), Ok(()));
        assert_eq!(source.explains(512, &twice[512..1024]), Ok(()));

        let older = buffer.source(&[(3, 2000), (3, 2000)]);
        (0..512).for_each(|i| buffer.store_next(i));
        assert!(buffer.source(&[(0, 4096)]).explains(0, &now).is_err(), "too old");
        assert!(older.explains(0, &twice).is_ok());
        assert!(source.explains(0, &other.to_vec()).is_err(), "another buffer's");
        // The two halves of different stores.
        let later = buffer.to_vec();
        for cut in 1..WORD {
            let mut torn = now.clone();
            torn[WORD..WORD + cut].copy_from_slice(&later[WORD..WORD + cut]);
            let whole = torn[WORD..2 * WORD] == later[WORD..2 * WORD]
                || torn[WORD..2 * WORD] == now[WORD..2 * WORD];
            let fits = buffer.source(&[(0, 4096)]).counts.len() == 512
                && Source { counts: vec![0; 512], ..buffer.source(&[(0, 4096)]) }
                    .explains(0, &torn)
                    .is_ok();
            assert_eq!(fits, whole, "cut after byte {cut}");
        }
    }
}
