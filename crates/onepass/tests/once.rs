//! Once-loading, with a thread that really rewrites the source all the time.
//!
//! The twin test loads twice, as storage does that checksums a buffer and then sends it, and must
//! be seen to store a block with a guard that does not belong to it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use onepass::{BLOCK, Kernels, Parities, Parity, available_tiers, gf, guard};
use stableio_onepass as onepass;

const BLOCKS: usize = 8;
const WORDS: usize = (BLOCKS + 1) * BLOCK / 8;
const TRIES: usize = 20_000;

/// Foreign memory for the test: one block longer than what is read, to leave room for offsets.
#[repr(align(64))]
struct Shared([AtomicU64; WORDS]);

static MEMORIES: [Shared; 2] = [const { Shared([const { AtomicU64::new(0) }; WORDS]) }; 2];

/// Runs `victim` while a thread rewrites `memory` word by word. All eight bytes of a word are
/// equal, and change with each round: a torn word is one with unequal bytes.
fn while_rewritten(memory: &'static Shared, victim: impl FnOnce(*const u8)) {
    let (started, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0_u8;
            while !stop.load(Ordering::Relaxed) {
                value = value.wrapping_add(1);
                for word in &memory.0 {
                    word.store(u64::from_ne_bytes([value; 8]), Ordering::Relaxed);
                }
                started.store(true, Ordering::Relaxed);
            }
        });
        // The thread ends even if the victim's assertions fail; else the scope would never.
        let _stop = StopOnDrop(&stop);
        while !started.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        victim((&raw const memory.0).cast());
    });
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Panics unless each whole word of `copy`, whose first byte came from `offset` bytes behind a
/// word boundary, is one that was stored.
fn assert_words_whole(copy: &[u8], offset: usize) {
    let to_first_word = offset.wrapping_neg() % 8;
    for word in copy[to_first_word..].chunks_exact(8) {
        assert!(word.iter().all(|byte| *byte == word[0]), "torn word: {word:02x?}");
    }
}

/// The column that the tests play.
const COLUMN: usize = 13;

/// Panics unless `q` was made of the bytes of `data`.
fn assert_q_of(q: &mut [u8], data: &[u8]) {
    gf::reconstruct_from_q(q, COLUMN);
    assert!(q == data, "Q belongs to the data");
}

#[test]
fn what_is_loaded_once_fits_together() {
    while_rewritten(&MEMORIES[0], |memory| {
        let mut copy = vec![0; BLOCKS * BLOCK];
        let mut parity = vec![0; BLOCKS * BLOCK];
        let mut q = vec![0; BLOCKS * BLOCK];
        let mut guards = [0; BLOCKS];
        for attempt in 0..TRIES {
            for kernels in available_tiers().iter().map(|tier| Kernels::of(*tier).unwrap()) {
                // Word-aligned, cache-line-aligned, and neither.
                let offset = [0, 8, 3, 56][attempt % 4];
                let parities = Parities {
                    p: Parity::Set(parity.as_mut_ptr()),
                    q: Parity::Set(q.as_mut_ptr()),
                    coefficient: gf::exp(COLUMN),
                };
                // SAFETY: the memory is one block longer than what is loaded; it lives forever, and
                // is accessed by atomics and by the kernel only. The rest is ours.
                unsafe {
                    (kernels.stabilize_blocks)(
                        memory.wrapping_add(offset),
                        copy.as_mut_ptr(),
                        &mut guards,
                        parities,
                    )
                }
                .expect("memory is there");
                let expected: Vec<u64> = copy.chunks(BLOCK).map(guard).collect();
                assert_eq!(guards, *expected, "guards belong to the copy");
                assert!(parity == copy, "parity belongs to the copy");
                assert_q_of(&mut q, &copy);
                assert_words_whole(&copy, offset);
            }
        }
    });
}

#[test]
fn what_is_sampled_in_place_fits_together() {
    // There is no copy to compare with, but parity is one: of the same single load.
    while_rewritten(&MEMORIES[0], |memory| {
        let mut parity = vec![0; BLOCKS * BLOCK];
        let mut q = vec![0; BLOCKS * BLOCK];
        let mut guards = [0; BLOCKS];
        for attempt in 0..TRIES / 4 {
            for kernels in available_tiers().iter().map(|tier| Kernels::of(*tier).unwrap()) {
                let offset = [0, 8, 3, 56][attempt % 4];
                let parities = Parities {
                    p: Parity::Set(parity.as_mut_ptr()),
                    q: Parity::Set(q.as_mut_ptr()),
                    coefficient: gf::exp(COLUMN),
                };
                // SAFETY: as in the test above.
                unsafe {
                    (kernels.sample_blocks)(memory.wrapping_add(offset), &mut guards, parities)
                }
                .expect("memory is there");
                let expected: Vec<u64> = parity.chunks(BLOCK).map(guard).collect();
                assert_eq!(guards, *expected, "guards belong to parity");
                assert_q_of(&mut q, &parity);
                assert_words_whole(&parity, offset);
            }
        }
    });
}

/// The twin for Q: P from one load, Q from another.
#[test]
fn parities_of_two_loads_do_not() {
    while_rewritten(&MEMORIES[1], |memory| {
        let (mut p, mut q) = (vec![0; BLOCKS * BLOCK], vec![0; BLOCKS * BLOCK]);
        let mut guards = [0; BLOCKS];
        let differs = (0..TRIES).any(|_| {
            let only_p = Parities::only_p(Parity::Set(p.as_mut_ptr()));
            let only_q = Parities::only_q(Parity::Set(q.as_mut_ptr()), gf::exp(COLUMN));
            // SAFETY: as in the first test.
            unsafe {
                onepass::sample_blocks(memory, &mut guards, only_p).expect("memory is there");
                thread::yield_now();
                onepass::sample_blocks(memory, &mut guards, only_q).expect("memory is there");
            }
            gf::reconstruct_from_q(&mut q, COLUMN);
            p != q
        });
        assert!(differs, "the race that the other tests are about was never seen");
    });
}

#[test]
fn what_is_loaded_twice_does_not() {
    while_rewritten(&MEMORIES[1], |memory| {
        let mut copy = vec![0; BLOCKS * BLOCK];
        let mut guards = [0; BLOCKS];
        let differs = (0..TRIES).any(|_| {
            // SAFETY: as in the first test.
            unsafe {
                onepass::copy_in(memory, copy.as_mut_ptr(), copy.len()).expect("memory is there");
                // With one processor, the other thread needs it to do its work.
                thread::yield_now();
                onepass::sample_blocks(memory, &mut guards, Parities::NONE)
                    .expect("memory is there");
            }
            guards != *copy.chunks(BLOCK).map(guard).collect::<Vec<_>>()
        });
        assert!(differs, "the race that the other tests are about was never seen");
    });
}
