//! The doors while a program really writes to the memory that it passed.
//!
//! Two twins take the protection away and must be seen to fail: one loads
//! twice (DOOR-1), one loads words in two halves (DOOR-2).

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mem::{BLOCK, Grant, Pass, RowShape, doors};
use stableio_mem as mem;
use support::{Mapping, assert_sums, pool_in_pieces};

const WORD: usize = 8;
const PAGES: usize = 10;

/// The program: it writes every word of its memory again and again.
///
/// ```text
/// byte    0    1    2    3    4    5    6    7
///       count0 count1 count2 index0 index1 count2 count1 count0
/// ```
///
/// `index` is the word's place, `count` says how often it was written. The
/// count reads the same from both ends, lowest byte outside: however a word is
/// cut, halves of different counts do not fit.
struct Program {
    memory: Arc<Mapping>,
    /// The count that is being written: no word has a higher one.
    count: AtomicU64,
    stop: AtomicBool,
}

fn word(index: usize, count: u64) -> u64 {
    let [i0, i1, ..] = index.to_le_bytes();
    let [c0, c1, c2, ..] = count.to_le_bytes();
    u64::from_le_bytes([c0, c1, c2, i0, i1, c2, c1, c0])
}

/// The count that a word was written with, if the program ever stored it at
/// `index`, where it has come to `count` by now.
fn written(found: u64, index: usize, count: u64) -> Option<u64> {
    let [c0, c1, c2, ..] = found.to_le_bytes();
    let its = u64::from_le_bytes([c0, c1, c2, 0, 0, 0, 0, 0]);
    (word(index, its) == found && its <= count).then_some(its)
}

impl Program {
    /// Runs `victim` while the program writes.
    fn run(victim: impl FnOnce(&Program)) {
        let program = Program {
            memory: Mapping::new(PAGES * BLOCK),
            count: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        };
        program.write_all(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !program.stop.load(Ordering::Relaxed) {
                    let count = program.count.load(Ordering::Relaxed) + 1;
                    assert!(count < 1 << 24, "a word has no room for more");
                    program.count.store(count, Ordering::SeqCst);
                    program.write_all(count);
                }
            });
            // The thread ends even if the victim's assertions fail; else the
            // scope would never.
            let _stop = StopOnDrop(&program.stop);
            while program.count.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            victim(&program);
        });
    }

    fn write_all(&self, count: u64) {
        for index in 0..PAGES * BLOCK / WORD {
            // SAFETY: an aligned word of the mapping, accessed by atomics and
            // by the doors only.
            let place = unsafe { AtomicU64::from_ptr(self.memory.at(index * WORD).cast()) };
            place.store(word(index, count), Ordering::Relaxed);
        }
    }

    /// The counts in `copy`, which was loaded from `segments`: of each aligned
    /// word that lies inside one of them. `Err` is a word that was never there.
    fn counts(&self, copy: &[u8], segments: &[(usize, usize)]) -> Result<Vec<u64>, String> {
        let now = self.count.load(Ordering::SeqCst);
        let mut counts = Vec::new();
        let mut from = 0;
        for &(offset, len) in segments {
            let end = (offset + len) / WORD * WORD;
            for place in (offset.next_multiple_of(WORD)..end).step_by(WORD) {
                let bytes = &copy[from + place - offset..][..WORD];
                let found = u64::from_le_bytes(bytes.try_into().unwrap());
                let count = written(found, place / WORD, now)
                    .ok_or_else(|| format!("{found:#018x} was never stored at {place:#x}"))?;
                counts.push(count);
            }
            from += len;
        }
        Ok(counts)
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Tries until `attempt` says that it has seen the race. A machine that is
/// busy with other things needs many tries; it has 20 seconds.
fn assert_seen(what: &str, mut attempt: impl FnMut(usize) -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    let mut tries = 0;
    while !attempt(tries) {
        tries += 1;
        assert!(Instant::now() < end, "{what} was not seen in {tries} tries");
        // With one processor, the program needs it to do its work.
        if tries % 64 == 0 {
            thread::yield_now();
        }
    }
}

/// Requests by the shapes that make a difference: whole pages; a page twice;
/// words that the blocks of the device do not cut; words that they do cut, in
/// long and in short segments.
const REQUESTS: [(u64, &[(usize, usize)]); 6] = [
    (0, &[(0, 8 * BLOCK)]),
    (0, &[(0, 2 * BLOCK), (3 * BLOCK, BLOCK), (3 * BLOCK, BLOCK), (4 * BLOCK, 4 * BLOCK)]),
    (512, &[(8, 4 * BLOCK), (5 * BLOCK + 512, 2 * BLOCK - 16), (16, 1024)]),
    (0, &[(3, 8 * BLOCK)]),
    (4 * BLOCK as u64 - 1, &[(0, 8 * BLOCK + 2)]),
    (1, &[(5, 1000), (2001, 3001), (BLOCK + 1, 2 * BLOCK), (5 * BLOCK, 17), (99, 4 * BLOCK)]),
];

const PASS: Pass = Pass {
    guards: true,
    rows: Some(RowShape { chunk_blocks: 2, columns: 2, parities: 2 }),
    streams: true,
};

#[test]
fn what_is_stabilized_fits_together_and_was_all_stored() {
    let (pool, taken) = pool_in_pieces(1 << 20, 1);
    Program::run(|program| {
        let mut mixed = 0;
        for attempt in 0..12_000 {
            let (at, segments) = REQUESTS[attempt % REQUESTS.len()];
            let foreign = program.memory.buf(segments);
            let len = foreign.len();
            let need = Pass::payload_bytes(at, len) + PASS.parity_bytes(at, len);
            let mut memory = pool.try_reserve(need).unwrap().unwrap();
            let (copy, sums) = doors::stabilize(foreign, at, PASS, &mut memory).unwrap();

            let copy = copy.to_vec();
            assert_sums(&sums, &copy, at, PASS);
            let counts = program.counts(&copy, segments).unwrap_or_else(|torn| {
                panic!("attempt {attempt}, {segments:x?} to {at}: {torn}");
            });
            mixed += usize::from(counts.iter().any(|count| *count != counts[0]));
        }
        assert!(mixed > 0, "no copy was taken while the program wrote");
    });
    drop(taken);
    assert_eq!(pool.used(), 0);
}

/// DOOR-1's twin: the memory is declared stable though it is not, copied, and
/// summed where it lies.
#[test]
fn what_is_copied_and_then_summed_does_not_fit_together() {
    let (pool, _taken) = pool_in_pieces(1 << 20, 2);
    let (at, segments) = REQUESTS[0];
    Program::run(|program| {
        let both = || {
            let len = program.memory.buf(segments).len();
            let need = Pass::payload_bytes(at, len) + 2 * PASS.parity_bytes(at, len);
            let mut memory = pool.try_reserve(need).unwrap().unwrap();
            let plain = Pass::default();
            let (copy, _) =
                doors::stabilize(program.memory.buf(segments), at, plain, &mut memory).unwrap();
            let promised = doors::promise(program.memory.buf(segments), Grant::only_own_data());
            let sums = promised.sums(at, PASS, &mut memory).unwrap();
            let right = doors::sums_of_stable(&copy, at, PASS, &mut memory);
            let parity = |sums: &mem::Sums| sums.parity.as_ref().unwrap().to_vec();
            let q = |sums: &mem::Sums| sums.q.as_ref().unwrap().to_vec();
            (sums.guards != right.guards, parity(&sums) != parity(&right), q(&sums) != q(&right))
        };
        assert_seen("a guard that does not fit the copy", |_| both().0);
        assert_seen("parity that does not fit the copy", |_| both().1);
        assert_seen("Q that does not fit the copy", |_| both().2);
    });
}

/// DOOR-2's twin: a request is cut in the middle of a word, and its parts are
/// stabilized one after the other.
#[test]
fn what_is_loaded_in_halves_was_not_all_stored() {
    let (pool, _taken) = pool_in_pieces(1 << 20, 3);
    Program::run(|program| {
        assert_seen("a torn word", |attempt| {
            let cut = 1 + attempt % (WORD - 1);
            let mut back = program.memory.buf(&[(0, 2 * WORD)]);
            let front = back.split_to(cut);
            let mut copy = Vec::new();
            for (at, part) in [(0, front), (cut as u64, back)] {
                let mut memory = pool.try_reserve(BLOCK).unwrap().unwrap();
                let (half, _) = doors::stabilize(part, at, Pass::default(), &mut memory).unwrap();
                copy.extend(half.to_vec());
            }
            program.counts(&copy, &[(0, 2 * WORD)]).is_err()
        });
    });
}

/// A promise that is broken gives sums of something that nobody may have
/// stored, but one sampling of each byte: with one column, parity is the data
/// as it was loaded, and the guards are its guards. So is Q, whose first
/// coefficient is one.
#[test]
fn what_is_sampled_fits_together_though_the_promise_is_broken() {
    let (pool, _taken) = pool_in_pieces(1 << 20, 4);
    let rows = RowShape { chunk_blocks: 3, columns: 1, parities: 2 };
    let pass = Pass { guards: true, rows: Some(rows), streams: false };
    Program::run(|program| {
        for (at, segments) in REQUESTS.iter().cycle().take(2_000) {
            let promised = doors::promise(program.memory.buf(segments), Grant::only_own_data());
            let mut memory =
                pool.try_reserve(pass.parity_bytes(*at, promised.len())).unwrap().unwrap();
            let sums = promised.sums(*at, pass, &mut memory).unwrap();
            let loaded = sums.parity.unwrap().to_vec();
            let guards: Vec<u64> = loaded.chunks(BLOCK).map(stableio_onepass::guard).collect();
            assert_eq!(sums.guards.as_slice(), guards);
            assert!(sums.q.unwrap().to_vec() == loaded);
        }
    });
}
