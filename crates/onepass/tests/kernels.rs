//! Every tier computes what the bytewise definitions say, whatever the alignment and length.

use onepass::{BLOCK, Kernels, Parity, Tier, available_tiers, guard, guard_of_xor};
use proptest::prelude::*;
use stableio_onepass as onepass;

/// The CRC as the specification defines it: bit by bit.
fn naive_guard(bytes: &[u8]) -> u64 {
    let polynomial = 0xad93_d235_94c9_3659_u64.reverse_bits();
    !bytes.iter().fold(u64::MAX, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| (crc >> 1) ^ (polynomial * (crc & 1)))
    })
}

/// Bytes without a pattern, different for each seed (the generator is splitmix64).
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    };
    std::iter::repeat_with(&mut word).flatten().take(len).collect()
}

/// The parity modes.
#[derive(Debug, Clone, Copy)]
enum Mode {
    None,
    Set,
    Xor,
}

impl Mode {
    fn of(self, parity: &mut [u8]) -> Parity {
        match self {
            Mode::None => Parity::None,
            Mode::Set => Parity::Set(parity.as_mut_ptr()),
            Mode::Xor => Parity::Xor(parity.as_mut_ptr()),
        }
    }

    /// What parity must be after taking up `data`.
    fn expected(self, before: &[u8], data: &[u8]) -> Vec<u8> {
        match self {
            Mode::None => before.to_vec(),
            Mode::Set => data.to_vec(),
            Mode::Xor => before.iter().zip(data).map(|(p, d)| p ^ d).collect(),
        }
    }
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::None), Just(Mode::Set), Just(Mode::Xor)]
}

/// Bytes around each destination that must stay as they are.
const MARGIN: usize = 64;
const UNTOUCHED: u8 = 0xa5;

/// A destination with margins, at an offset from a 64-byte boundary.
struct Destination {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Destination {
    fn new(offset: usize, len: usize) -> Destination {
        let bytes = vec![UNTOUCHED; len + 3 * MARGIN + offset];
        let start = bytes.as_ptr().align_offset(64) + MARGIN + offset;
        Destination { bytes, start, len }
    }

    fn with(offset: usize, content: &[u8]) -> Destination {
        let mut new = Destination::new(offset, content.len());
        new.content().copy_from_slice(content);
        new
    }

    fn content(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    fn check(&self, expected: &[u8]) {
        let (before, rest) = self.bytes.split_at(self.start);
        let (content, behind) = rest.split_at(self.len);
        assert!(content == expected, "wrong content");
        assert!(before.iter().chain(behind).all(|b| *b == UNTOUCHED), "wrote outside the range");
    }
}

/// Calls `check` with the kernels of each tier of this machine.
fn each_tier(mut check: impl FnMut(Tier, &Kernels)) {
    for tier in available_tiers() {
        check(*tier, Kernels::of(*tier).expect("available"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn stabilize_and_sample(
        seed: u64, blocks in 0_usize..6, mode in any_mode(),
        src_offset in 0_usize..72, dst_offset in 0_usize..72, parity_offset in 0_usize..72,
    ) {
        let len = blocks * BLOCK;
        let data = noise(seed, len);
        let old_parity = noise(!seed, len);
        let expected: Vec<u64> = data.chunks(BLOCK).map(naive_guard).collect();
        let mut src = Destination::with(src_offset, &data);

        each_tier(|tier, kernels| {
            let mut dst = Destination::new(dst_offset, len);
            let mut parity = Destination::with(parity_offset, &old_parity);
            let mut guards = vec![0; blocks];
            // SAFETY: `dst` and parity are as long as the source, and nobody else has any of them.
            unsafe {
                (kernels.stabilize_blocks)(
                    src.content().as_ptr(), dst.content().as_mut_ptr(), &mut guards,
                    mode.of(parity.content()),
                )
            }.expect("memory is there");
            assert_eq!(guards, expected, "stabilize_blocks of {tier:?}");
            dst.check(&data);
            parity.check(&mode.expected(&old_parity, &data));

            let mut parity = Destination::with(parity_offset, &old_parity);
            let mut guards = vec![0; blocks];
            let src_start = src.content().as_ptr();
            // SAFETY: as above.
            unsafe { (kernels.sample_blocks)(src_start, &mut guards, mode.of(parity.content())) }
                .expect("memory is there");
            assert_eq!(guards, expected, "sample_blocks of {tier:?}");
            parity.check(&mode.expected(&old_parity, &data));

            let mut parity = Destination::with(parity_offset, &old_parity);
            let mut guards = vec![0; blocks];
            // SAFETY: as above.
            unsafe {
                (kernels.stable_blocks)(src.content(), &mut guards, mode.of(parity.content()));
            }
            assert_eq!(guards, expected, "stable_blocks of {tier:?}");
            parity.check(&mode.expected(&old_parity, &data));
        });
        src.check(&data);
    }

    #[test]
    fn copies(
        seed: u64, len in 0_usize..1500, src_offset in 0_usize..72, dst_offset in 0_usize..72,
    ) {
        let data = noise(seed, len);
        let mut src = Destination::with(src_offset, &data);
        each_tier(|_, kernels| {
            let mut dst = Destination::new(dst_offset, len);
            // SAFETY: both have `len` bytes, and nobody else has them.
            unsafe { (kernels.copy_in)(src.content().as_ptr(), dst.content().as_mut_ptr(), len) }
                .expect("memory is there");
            dst.check(&data);

            let mut dst = Destination::new(dst_offset, len);
            // SAFETY: as above.
            unsafe { (kernels.copy_out)(src.content().as_ptr(), dst.content().as_mut_ptr(), len) }
                .expect("memory is there");
            dst.check(&data);
            // SAFETY: as above.
            unsafe { (kernels.zero_out)(dst.content().as_mut_ptr(), len) }.expect("memory is there");
            dst.check(&vec![0; len]);

            let mut dst = Destination::with(dst_offset, &data);
            // SAFETY: both have `len` bytes, and nobody else has them.
            let mut differ = |at: Option<usize>| unsafe {
                let changed = dst.content();
                at.inspect(|at| changed[*at] ^= 1);
                let answer =
                    (kernels.differ)(src.content().as_ptr(), changed.as_ptr(), changed.len());
                at.inspect(|at| changed[*at] ^= 1);
                answer.expect("memory is there")
            };
            assert!(!differ(None));
            for at in 0..len {
                assert!(differ(Some(at)), "a change at {at} of {len}");
            }

            let mut dst = Destination::with(dst_offset, &noise(!seed, len));
            (kernels.xor_into)(dst.content(), src.content());
            dst.check(&Mode::Xor.expected(&noise(!seed, len), &data));
        });
    }

    #[test]
    fn guards_of_any_length(seed: u64, len in 0_usize..3 * BLOCK) {
        let data = noise(seed, len);
        prop_assert_eq!(guard(&data), naive_guard(&data));
    }

    #[test]
    fn guard_of_parity_follows_from_the_guards(seed: u64, count in 0_usize..17) {
        let blocks: Vec<_> = (0..count).map(|i| noise(seed ^ i as u64, BLOCK)).collect();
        let mut parity = vec![0; BLOCK];
        for block in &blocks {
            onepass::xor_into(&mut parity, block);
        }
        prop_assert_eq!(guard_of_xor(blocks.iter().map(|b| guard(b))), naive_guard(&parity));
    }
}

#[test]
fn check_value_of_the_definition() {
    assert_eq!(naive_guard(b"123456789"), 0xae8b_1486_0a79_9888);
}

#[test]
fn lengths_that_differ_are_refused() {
    let short = std::panic::catch_unwind(|| onepass::xor_into(&mut [0; 8], &[0; 9]));
    assert!(short.is_err());
    let data = [0; BLOCK + 1];
    // SAFETY: no parity.
    let odd = std::panic::catch_unwind(|| unsafe {
        onepass::stable_blocks(&data, &mut [0], Parity::None);
    });
    assert!(odd.is_err());
}
