//! What the tests share: foreign memory that its owner changes and takes away,
//! a pool in pieces, and oracles that are too simple to be wrong.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use mem::{BLOCK, ForeignBuf, Pass, Pool, PoolBuf, RowShape, Segment, StableBuf, Sums};
use stableio_mem as mem;
use stableio_onepass as onepass;

/// A shared mapping of a file in memory, as a client hands it over.
///
/// It is the keep-alive of the handles made of it, so that its strong count
/// tells whether any of them is left.
pub(crate) struct Mapping {
    file: OwnedFd,
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is accessed by raw, volatile or atomic accesses only, and
// stays where it is until the last owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Arc<Mapping> {
        // SAFETY: a valid name; the descriptor that comes back is ours alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"foreign".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        resize(&file, len);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: maps where nothing is.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Arc::new(Mapping { file, start: start.cast(), len })
    }

    /// A mapping that holds `bytes`.
    pub(crate) fn holding(bytes: &[u8]) -> Arc<Mapping> {
        let mapping = Mapping::new(bytes.len());
        mapping.write(0, bytes);
        mapping
    }

    pub(crate) fn addr(&self) -> usize {
        self.start.expose_provenance()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A pointer to byte `offset`, for accesses that do without protection.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.wrapping_add(offset)
    }

    /// The owner writes.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping; no references to it exist.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) };
    }

    /// What the owner finds there.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut all = vec![0; self.len];
        // SAFETY: inside the mapping; no references to it exist.
        unsafe { ptr::copy_nonoverlapping(self.start, all.as_mut_ptr(), self.len) };
        all
    }

    /// The owner truncates the file: what lies behind `len` vanishes.
    pub(crate) fn truncate(&self, len: usize) {
        resize(&self.file, len);
    }

    /// Changes what may be done to `range`, in whole pages.
    pub(crate) fn protect(&self, range: Range<usize>, access: i32) {
        assert!(range.end <= self.len);
        // SAFETY: our mapping; nobody relies on access to it.
        let done =
            unsafe { libc::mprotect(self.start.add(range.start).cast(), range.len(), access) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// A handle of the segments (offset, length).
    pub(crate) fn buf(self: &Arc<Self>, segments: &[(usize, usize)]) -> ForeignBuf {
        assert!(segments.iter().all(|(offset, len)| offset + len <= self.len));
        let segments =
            segments.iter().map(|&(offset, len)| Segment { addr: self.addr() + offset, len });
        // SAFETY: the segments lie in the mapping, which `self` keeps; nobody
        // has a reference to its bytes.
        unsafe { ForeignBuf::new(segments, self.clone()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nobody uses any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

fn resize(file: &OwnedFd, len: usize) {
    // SAFETY: a system call without memory.
    let done = unsafe { libc::ftruncate(file.as_raw_fd(), len as libc::off_t) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Bytes without a pattern, different for each seed (the generator is
/// splitmix64).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    std::iter::repeat_with(|| random.next().to_le_bytes()).flatten().take(len).collect()
}

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// What a pool's memory holds before anybody uses it in a test: neither zero,
/// as padding must be, nor likely in a payload.
pub(crate) const OLD: u8 = 0xEE;

/// A pool of which so many single blocks are taken that no more than three
/// free ones lie together: what it gives has many extents. More than half of
/// it is free, and full of [`OLD`].
pub(crate) fn pool_in_pieces(bytes: usize, seed: u64) -> (Arc<Pool>, Vec<PoolBuf>) {
    let pool = Pool::new(bytes).unwrap();
    let mut all = pool.try_reserve(pool.size()).unwrap().unwrap();
    let (mut random, mut free) = (Random(seed), 0);
    let taken = (0..pool.size() / BLOCK)
        .map(|_| {
            let mut block = all.take(BLOCK);
            block.pieces_mut().for_each(|piece| piece.fill(OLD));
            block
        })
        // Collected first: a block freed now would be given out again.
        .collect::<Vec<_>>()
        .into_iter()
        .filter(|_| {
            let is_last = free == 0;
            free = if is_last { 1 + random.below(3) } else { free - 1 };
            is_last
        })
        .collect();
    (pool, taken)
}

/// Panics unless `sums` is what `pass` asks for, of `payload` at `at`.
pub(crate) fn assert_sums(sums: &Sums, payload: &[u8], at: u64, pass: Pass) {
    if !pass.guards {
        assert!(sums.guards.is_empty() && sums.spans.is_empty());
        assert!(sums.parity.is_none() && sums.q.is_none());
        assert!(sums.parity_guards.is_empty() && sums.q_guards.is_empty());
        return;
    }
    let blocks = whole_blocks(payload, at);
    let guards: Vec<u64> = blocks.iter().map(|(_, block)| onepass::guard(block)).collect();
    assert_eq!(sums.guards.as_slice(), guards, "a guard of every whole block");
    assert_eq!(sums.first_block, at.div_ceil(BLOCK as u64));
    let expected = pass.rows.map_or(BTreeMap::new(), |shape| naive_parities(&blocks, shape));
    let rows = placed_rows(sums);
    let part = |of: fn(&Parities) -> &Vec<u8>| -> Vec<_> { expected.values().map(of).collect() };
    assert!(rows.keys().eq(expected.keys()), "parity of exactly the full rows");
    assert!(placed(&rows, sums.parity.as_ref()).iter().eq(part(|row| &row.p)), "P of the rows");
    if pass.rows.is_some_and(|shape| shape.parities == 2) {
        assert!(placed(&rows, sums.q.as_ref()).iter().eq(part(|row| &row.q)), "Q of the rows");
    } else {
        assert!(sums.q.is_none(), "Q that nobody asked for");
    }
    assert_eq!(sums.parity_guards.as_slice(), guards_of(&sums.parity), "a guard of every P");
    assert_eq!(sums.q_guards.as_slice(), guards_of(&sums.q), "a guard of every Q");
    let bytes = |parity: &Option<StableBuf>| parity.as_ref().map_or(0, |parity| parity.len());
    assert_eq!(bytes(&sums.parity) + bytes(&sums.q), pass.parity_bytes(at, payload.len()));
}

/// The guards of a parity's blocks.
fn guards_of(parity: &Option<StableBuf>) -> Vec<u64> {
    let bytes = parity.as_ref().map_or(Vec::new(), |parity| parity.to_vec());
    bytes.chunks(BLOCK).map(onepass::guard).collect()
}

/// The whole blocks of a payload that goes to `at`, with their numbers.
fn whole_blocks(payload: &[u8], at: u64) -> Vec<(u64, &[u8])> {
    let first = at.div_ceil(BLOCK as u64);
    let head = (first * BLOCK as u64 - at) as usize;
    let whole = payload.get(head..).unwrap_or(&[]).chunks_exact(BLOCK);
    (first..).zip(whole).collect()
}

/// P and Q of a row.
struct Parities {
    p: Vec<u8>,
    q: Vec<u8>,
}

/// P and Q by stripe and row, of those rows whose every block is there.
fn naive_parities(blocks: &[(u64, &[u8])], shape: RowShape) -> BTreeMap<(u64, u64), Parities> {
    let mut rows = BTreeMap::<(u64, u64), Vec<&[u8]>>::new();
    for (number, block) in blocks {
        let within = number % shape.stripe_blocks();
        let row = (number / shape.stripe_blocks(), within % u64::from(shape.chunk_blocks));
        rows.entry(row).or_default().push(block);
    }
    rows.retain(|_, blocks| blocks.len() == shape.columns as usize);
    let of_bytes = |blocks: &[&[u8]], sum: fn(u8, u8) -> u8| {
        (0..BLOCK).map(|i| blocks.iter().rev().fold(0, |s, b| sum(s, b[i]))).collect()
    };
    let parities = |blocks: Vec<&[u8]>| Parities {
        p: of_bytes(&blocks, |sum, byte| sum ^ byte),
        // Horner's rule: from the last column on, Q doubles.
        q: of_bytes(&blocks, |sum, byte| naive_mul(sum, 2) ^ byte),
    };
    rows.into_iter().map(|(row, blocks)| (row, parities(blocks))).collect()
}

/// `a * b` in GF(2^8) with the polynomial 0x11d, bit by bit.
pub(crate) fn naive_mul(a: u8, b: u8) -> u8 {
    (0..8).rev().fold(0, |product, bit| {
        let doubled = u16::from(product) << 1;
        let reduced = if doubled > 0xff { doubled ^ 0x11d } else { doubled };
        reduced as u8 ^ if b >> bit & 1 == 1 { a } else { 0 }
    })
}

/// Where the parity of each stripe and row lies, by the spans of `sums`.
fn placed_rows(sums: &Sums) -> BTreeMap<(u64, u64), usize> {
    let rows = sums.spans.iter().flat_map(|span| {
        let places = (span.at..).step_by(BLOCK);
        span.rows.clone().zip(places).map(|(row, at)| ((span.stripe, u64::from(row)), at))
    });
    rows.collect()
}

/// The blocks of a parity in the order of the rows.
fn placed(rows: &BTreeMap<(u64, u64), usize>, parity: Option<&StableBuf>) -> Vec<Vec<u8>> {
    let bytes = parity.map_or(Vec::new(), |parity| parity.to_vec());
    rows.values().map(|at| bytes[*at..at + BLOCK].to_vec()).collect()
}
