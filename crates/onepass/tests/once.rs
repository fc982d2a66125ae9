//! Once-loading, with a thread that really rewrites the source all the time.
//!
//! The twin test loads twice, as storage does that checksums a buffer and then sends it, and must
//! be seen to store a block with a guard that does not belong to it.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use onepass::{
    BLOCK, Column, Format, Guard, Interval, Kernels, Parities, Parity, RowParity, Segment,
    available_tiers, gf, guard, tier,
};
use stableio_onepass as onepass;
use support::{sample, stabilize};

const BLOCKS: usize = 8;
const WORDS: usize = (BLOCKS + 1) * BLOCK / 8;
const TRIES: usize = 20_000;

/// Foreign memory for the test: one block longer than what is read, to leave room for offsets.
#[repr(align(64))]
struct Shared([AtomicU64; WORDS]);

static MEMORIES: [Shared; 4] = [const { Shared([const { AtomicU64::new(0) }; WORDS]) }; 4];

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
                    stabilize(
                        kernels,
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
                unsafe { sample(kernels, memory.wrapping_add(offset), &mut guards, parities) }
                    .expect("memory is there");
                let expected: Vec<u64> = parity.chunks(BLOCK).map(guard).collect();
                assert_eq!(guards, *expected, "guards belong to parity");
                assert_q_of(&mut q, &parity);
                assert_words_whole(&parity, offset);
            }
        }
    });
}

/// Foreign bytes that the test of many goes through: few where the compiler does not optimise.
const VOLUME: usize = if cfg!(debug_assertions) { 30_000_000 } else { 1_100_000_000 };

/// The interval that lies in `copy` and its guard, if they do not fit.
fn misfit(format: Format, copy: &[u8], guards: &[u64]) -> Option<usize> {
    let intervals = copy.chunks(format.interval.bytes()).zip(guards);
    intervals.enumerate().find(|(_, (i, guard))| format.guard.of(i) != **guard).map(|(at, _)| at)
}

/// Rows of two columns, scattered, in every format and on every tier.
#[test]
fn guards_and_parities_of_rows_always_fit_the_copies() {
    const LEN: usize = 4 * BLOCK;
    while_rewritten(&MEMORIES[2], |memory| {
        let mut copies = [vec![0; LEN], vec![0; LEN]];
        let (mut p, mut q) = (vec![0; LEN], vec![0; LEN]);
        let (mut done, mut attempt) = (0, 0);
        while done < VOLUME {
            for guard in Guard::ALL {
                for interval in Interval::ALL {
                    let format = Format { guard, interval };
                    for tier in available_tiers() {
                        attempt += 1;
                        let kernels = Kernels::of(*tier).expect("available");
                        // Straight, and cut inside of a word and of an interval.
                        let at = [0, 8, 3][attempt % 3];
                        let cut = [LEN, 1000, 4096, 5][attempt % 4];
                        let second = memory.wrapping_add(LEN);
                        let sources = [memory, second].map(|start| {
                            let start = start.wrapping_add(at);
                            let rest = start.wrapping_add(cut);
                            [
                                Segment { addr: start, len: cut },
                                Segment { addr: rest, len: LEN - cut },
                            ]
                        });
                        let intervals = format.guards_of(LEN);
                        let mut guards = vec![vec![0; intervals]; 4];
                        let [first, second, of_p, of_q] = &mut guards[..] else { unreachable!() };
                        let [to_first, to_second] = &mut copies;
                        let mut row = [
                            Column::foreign(&sources[0], to_first.as_mut_ptr(), first),
                            Column::foreign(&sources[1], to_second.as_mut_ptr(), second),
                        ];
                        let p_place = RowParity { to: p.as_mut_ptr(), guards: of_p };
                        let q_place = RowParity { to: q.as_mut_ptr(), guards: of_q };
                        // SAFETY: the memory is one block longer than what is loaded; it lives
                        // forever, and is accessed by atomics and by the kernel only. The rest is
                        // ours.
                        unsafe {
                            onepass::row_with(
                                kernels,
                                format,
                                &mut row,
                                Some(p_place),
                                Some(q_place),
                            )
                        }
                        .expect("memory is there");
                        for (bytes, guards) in copies.iter().chain([&p, &q]).zip(&guards) {
                            assert_eq!(misfit(format, bytes, guards), None, "{tier:?} {format:?}");
                        }
                        onepass::xor_into(&mut p, &copies[0]);
                        assert!(p == copies[1], "P belongs to the copies: {tier:?} {format:?}");
                        onepass::xor_into(&mut q, &copies[0]);
                        gf::reconstruct_from_q(&mut q, 1);
                        assert!(q == copies[1], "Q belongs to the copies: {tier:?} {format:?}");
                        done += 2 * LEN;
                    }
                }
            }
        }
    });
}

/// The twin: the same check of a kernel that loads each interval once for the copy, and again for
/// the guard.
#[test]
fn a_kernel_that_loads_twice_is_caught() {
    fn kernel(src: *const u8, copy: &mut [u8]) -> u64 {
        let word = |at: usize| {
            // SAFETY: inside the memory, which is accessed by atomics and volatile loads only.
            unsafe { src.wrapping_add(at).cast::<u64>().read_volatile().to_ne_bytes() }
        };
        for at in (0..copy.len()).step_by(8) {
            copy[at..at + 8].copy_from_slice(&word(at));
        }
        guard(&(0..copy.len()).step_by(8).flat_map(word).collect::<Vec<_>>())
    }
    while_rewritten(&MEMORIES[3], |memory| {
        let mut copy = vec![0; BLOCK];
        let is_caught = (0..VOLUME / BLOCK).any(|attempt| {
            let found = kernel(memory.wrapping_add(attempt % BLOCKS * BLOCK), &mut copy);
            misfit(Format::NATIVE, &copy, &[found]).is_some()
        });
        assert!(is_caught, "the race that the other tests are about was never seen");
    });
}

/// The twin for Q: P from one load, Q from another.
#[test]
fn parities_of_two_loads_do_not() {
    while_rewritten(&MEMORIES[1], |memory| {
        let (mut p, mut q) = (vec![0; BLOCKS * BLOCK], vec![0; BLOCKS * BLOCK]);
        let mut guards = [0; BLOCKS];
        let kernels = Kernels::of(tier()).expect("available");
        let differs = (0..TRIES).any(|_| {
            let only_p = Parities::only_p(Parity::Set(p.as_mut_ptr()));
            let only_q = Parities::only_q(Parity::Set(q.as_mut_ptr()), gf::exp(COLUMN));
            // SAFETY: as in the first test.
            unsafe {
                sample(kernels, memory, &mut guards, only_p).expect("memory is there");
                thread::yield_now();
                sample(kernels, memory, &mut guards, only_q).expect("memory is there");
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
        let kernels = Kernels::of(tier()).expect("available");
        let differs = (0..TRIES).any(|_| {
            // SAFETY: as in the first test.
            unsafe {
                onepass::copy_in(memory, copy.as_mut_ptr(), copy.len()).expect("memory is there");
                // With one processor, the other thread needs it to do its work.
                thread::yield_now();
                sample(kernels, memory, &mut guards, Parities::NONE).expect("memory is there");
            }
            guards != *copy.chunks(BLOCK).map(guard).collect::<Vec<_>>()
        });
        assert!(differs, "the race that the other tests are about was never seen");
    });
}
