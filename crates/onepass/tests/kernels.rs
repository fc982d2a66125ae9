//! Every tier computes what the bytewise definitions say, whatever the alignment and length.

mod support;

use onepass::{BLOCK, Format, Kernels, Parities, Pass, Tier, available_tiers, guard, guard_of_xor};
use proptest::prelude::*;
use stableio_onepass as onepass;
use support::{Mode, any_mode, naive_mul, noise, sample, stabilize};

/// The CRC as the specification defines it: bit by bit.
fn naive_guard(bytes: &[u8]) -> u64 {
    let polynomial = 0xad93_d235_94c9_3659_u64.reverse_bits();
    !bytes.iter().fold(u64::MAX, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| (crc >> 1) ^ (polynomial * (crc & 1)))
    })
}

/// What the kernels are to do with P and Q, and the oracle of it.
#[derive(Debug, Clone)]
struct Wanted {
    p: (Mode, Destination),
    q: (Mode, Destination),
    coefficient: u8,
}

impl Wanted {
    fn parities(&mut self) -> Parities {
        let (p, q) = (
            self.p.0.of(self.p.1.content().as_mut_ptr()),
            self.q.0.of(self.q.1.content().as_mut_ptr()),
        );
        Parities { p, q, coefficient: self.coefficient }
    }

    /// Panics unless P and Q are those `before`, after taking up `data`.
    fn check(&self, before: &Wanted, data: &[u8]) {
        let product: Vec<u8> = data.iter().map(|d| naive_mul(*d, self.coefficient)).collect();
        for (after, before, data) in [(&self.p, &before.p, data), (&self.q, &before.q, &product)] {
            after.1.check(&after.0.expected(before.1.read(), data));
        }
    }
}

/// Bytes around each destination that must stay as they are.
const MARGIN: usize = 64;
const UNTOUCHED: u8 = 0xa5;

/// A destination with margins, at an offset from a 64-byte boundary.
#[derive(Debug)]
struct Destination {
    bytes: Vec<u8>,
    offset: usize,
    start: usize,
    len: usize,
}

impl Destination {
    fn new(offset: usize, len: usize) -> Destination {
        let bytes = vec![UNTOUCHED; len + 3 * MARGIN + offset];
        let start = bytes.as_ptr().align_offset(64) + MARGIN + offset;
        Destination { bytes, offset, start, len }
    }

    fn with(offset: usize, content: &[u8]) -> Destination {
        let mut new = Destination::new(offset, content.len());
        new.content().copy_from_slice(content);
        new
    }

    fn content(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    fn read(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    fn check(&self, expected: &[u8]) {
        let (before, rest) = self.bytes.split_at(self.start);
        let (content, behind) = rest.split_at(self.len);
        assert!(content == expected, "wrong content");
        assert!(before.iter().chain(behind).all(|b| *b == UNTOUCHED), "wrote outside the range");
    }
}

impl Clone for Destination {
    /// At the same offset.
    fn clone(&self) -> Destination {
        Destination::with(self.offset, self.read())
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
        seed: u64, blocks in 0_usize..6, modes in (any_mode(), any_mode()), coefficient: u8,
        src_offset in 0_usize..72, dst_offset in 0_usize..72,
        p_offset in 0_usize..72, q_offset in 0_usize..72,
    ) {
        let len = blocks * BLOCK;
        let data = noise(seed, len);
        let before = Wanted {
            p: (modes.0, Destination::with(p_offset, &noise(!seed, len))),
            q: (modes.1, Destination::with(q_offset, &noise(!seed ^ 1, len))),
            coefficient,
        };
        let expected: Vec<u64> = data.chunks(BLOCK).map(naive_guard).collect();
        let mut src = Destination::with(src_offset, &data);

        each_tier(|tier, kernels| {
            let mut dst = Destination::new(dst_offset, len);
            let mut parities = before.clone();
            let mut guards = vec![0; blocks];
            // SAFETY: `dst`, P and Q are as long as the source, and nobody else has any of them.
            unsafe {
                stabilize(
                    kernels,
                    src.content().as_ptr(), dst.content().as_mut_ptr(), &mut guards,
                    parities.parities(),
                )
            }.expect("memory is there");
            assert_eq!(guards, expected, "stabilize of {tier:?}");
            dst.check(&data);
            parities.check(&before, &data);

            let mut parities = before.clone();
            let mut guards = vec![0; blocks];
            let src_start = src.content().as_ptr();
            // SAFETY: as above.
            unsafe { sample(kernels, src_start, &mut guards, parities.parities()) }
                .expect("memory is there");
            assert_eq!(guards, expected, "sample of {tier:?}");
            parities.check(&before, &data);

            let mut parities = before.clone();
            let mut guards = vec![0; blocks];
            // SAFETY: as above.
            unsafe {
                let pass = Pass { parities: parities.parities(), ..Pass::guards(Format::NATIVE) };
                pass.stable_with(kernels, src.content(), &mut guards);
            }
            assert_eq!(guards, expected, "stable of {tier:?}");
            parities.check(&before, &data);
        });
        src.check(&data);
    }

    /// The columns of a row, one after the other, as the passes of a write do it.
    #[test]
    fn parities_of_rows(
        seed: u64, columns in 1_usize..15, blocks in 1_usize..4, offset in 0_usize..72,
    ) {
        let len = blocks * BLOCK;
        let data: Vec<_> = (0..columns).map(|k| noise(seed ^ k as u64, len)).collect();
        let powers = std::iter::successors(Some(1), |power| Some(naive_mul(*power, 2)));
        let (mut p, mut q) = (vec![0; len], vec![0; len]);
        for (data, power) in data.iter().zip(powers) {
            for (i, byte) in data.iter().enumerate() {
                p[i] ^= byte;
                q[i] ^= naive_mul(power, *byte);
            }
        }
        each_tier(|tier, kernels| {
            for kernel in 0..3 {
                let (mut our_p, mut our_q) = (Destination::new(0, len), Destination::new(8, len));
                for (k, data) in data.iter().enumerate() {
                    let mode = if k == 0 { Mode::Set } else { Mode::Xor };
                    let parities = Parities {
                        p: mode.of(our_p.content().as_mut_ptr()),
                        q: mode.of(our_q.content().as_mut_ptr()),
                        coefficient: onepass::gf::exp(k),
                    };
                    let mut src = Destination::with(offset, data);
                    let (mut dst, mut guards) = (vec![0; len], vec![0; blocks]);
                    let start = src.content().as_ptr();
                    let (dst, guards) = (dst.as_mut_ptr(), &mut guards);
                    // SAFETY: as above.
                    unsafe {
                        match kernel {
                            0 => stabilize(kernels, start, dst, guards, parities),
                            1 => sample(kernels, start, guards, parities),
                            _ => {
                                let pass = Pass { parities, ..Pass::guards(Format::NATIVE) };
                                pass.stable_with(kernels, src.content(), guards);
                                Ok(())
                            }
                        }
                    }
                    .unwrap_or_else(|fault| panic!("{tier:?}: {fault}"));
                }
                our_p.check(&p);
                our_q.check(&q);
            }
        });
    }

    #[test]
    fn multiples(
        seed: u64, len in 0_usize..1500, c: u8, src_offset in 0_usize..72, dst_offset in 0_usize..72,
    ) {
        let (data, old) = (noise(seed, len), noise(!seed, len));
        let product: Vec<u8> = data.iter().map(|d| naive_mul(c, *d)).collect();
        let mut src = Destination::with(src_offset, &data);
        each_tier(|_, kernels| {
            let mut dst = Destination::with(dst_offset, &old);
            (kernels.mul_xor_into)(dst.content(), src.content(), c);
            dst.check(&Mode::Xor.expected(&old, &product));

            let mut dst = Destination::with(dst_offset, &data);
            (kernels.scale)(dst.content(), c);
            dst.check(&product);
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
    let short = std::panic::catch_unwind(|| onepass::gf::mul_xor_into(&mut [0; 8], &[0; 9], 1));
    assert!(short.is_err());
    let data = [0; BLOCK + 1];
    let odd = std::panic::catch_unwind(|| onepass::guards_of(&data, &mut [0]));
    assert!(odd.is_err());
}
