//! The guards: three CRCs of a protection interval, their algebra and their constants.
//!
//! | guard        | polynomial          | initial, added at the end | bits       | of `"123456789"`    |
//! |--------------|---------------------|---------------------------|------------|---------------------|
//! | CRC-16/T10   | `8bb7`              | zeros                     | as they are| `d0db`              |
//! | CRC-32C      | `1edc6f41`          | ones                      | reflected  | `e3069283`          |
//! | CRC-64/NVME  | `ad93d235_94c93659` | ones                      | reflected  | `ae8b1486_0a799888` |
//!
//! Sources: T10 SBC-4, section 4.22.4 (CRC-16); RFC 3720, section 12.1 (CRC-32C); NVM Express NVM
//! Command Set Specification, revision 1.0d, section 5.2.1.3 (all three).
//!
//! A CRC is affine over GF(2): `guard(a ^ b) = guard(a) ^ guard(b) ^ guard(0)` for blocks of one
//! length. [`Format::guard_of_xor`] is that rule for any number of blocks.

use crc_fast::CrcAlgorithm;

use crate::BLOCK;

/// Which CRC guards an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guard {
    /// CRC-16/T10-DIF: SCSI, and NVMe with 16-bit guards.
    Crc16T10Dif,
    /// CRC-32C (Castagnoli).
    Crc32c,
    /// CRC-64/NVME: what this project stores itself.
    Crc64Nvme,
}

impl Guard {
    /// All of them.
    pub const ALL: [Guard; 3] = [Guard::Crc16T10Dif, Guard::Crc32c, Guard::Crc64Nvme];

    /// The guard of stable bytes, of any length. It fills the low bits.
    pub fn of(self, bytes: &[u8]) -> u64 {
        let algorithm = match self {
            Guard::Crc16T10Dif => CrcAlgorithm::Crc16T10Dif,
            Guard::Crc32c => CrcAlgorithm::Crc32Iscsi,
            Guard::Crc64Nvme => CrcAlgorithm::Crc64Nvme,
        };
        crc_fast::checksum(algorithm, bytes)
    }
}

/// How many bytes one guard covers: a logical block of the storage that keeps the guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interval {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

impl Interval {
    /// Both of them.
    pub const ALL: [Interval; 2] = [Interval::B512, Interval::B4096];

    /// Its length.
    pub const fn bytes(self) -> usize {
        match self {
            Interval::B512 => 512,
            Interval::B4096 => 4096,
        }
    }
}

/// What the guards of some bytes are: which CRC, and of how many bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// The CRC.
    pub guard: Guard,
    /// What one guard covers.
    pub interval: Interval,
}

impl Format {
    /// What this project stores itself: CRC-64/NVME of each [`BLOCK`].
    pub const NATIVE: Format = Format { guard: Guard::Crc64Nvme, interval: Interval::B4096 };

    /// The number of guards of `len` bytes; the last one may cover less than an interval.
    pub const fn guards_of(self, len: usize) -> usize {
        len.div_ceil(self.interval.bytes())
    }

    /// The guard of an interval of zeros.
    pub fn guard_of_zeros(self) -> u64 {
        const fn of(crc: &Algorithm) -> [u64; 2] {
            [crc.of_zeros(Interval::B512.bytes()), crc.of_zeros(Interval::B4096.bytes())]
        }
        let [short, long] = match self.guard {
            // Without ones to start from, zeros leave zeros.
            Guard::Crc16T10Dif => [0, 0],
            Guard::Crc32c => const { of(&CRC32C) },
            Guard::Crc64Nvme => const { of(&CRC64_NVME) },
        };
        match self.interval {
            Interval::B512 => short,
            Interval::B4096 => long,
        }
    }

    /// The guard of the XOR of some whole intervals, from their guards: the guard of P from those
    /// of its data.
    ///
    /// The initial and final ones add `guard(0)` once per interval. Of these an odd number leaves
    /// the one that belongs there; an even number cancels out, and it must be put back. No
    /// intervals at all XOR to zeros, whose guard is what comes out.
    pub fn guard_of_xor(self, guards: impl IntoIterator<Item = u64>) -> u64 {
        let (mut xor, mut even) = (0, true);
        for guard in guards {
            xor ^= guard;
            even = !even;
        }
        if even { xor ^ self.guard_of_zeros() } else { xor }
    }
}

/// The CRC-64/NVME of stable bytes: of one block, or of anything shorter or longer.
pub fn guard(block: &[u8]) -> u64 {
    Guard::Crc64Nvme.of(block)
}

/// [`Format::guard_of_zeros`] of [`Format::NATIVE`].
pub fn guard_of_zeros() -> u64 {
    Format::NATIVE.guard_of_zeros()
}

/// [`Format::guard_of_xor`] of [`Format::NATIVE`].
pub fn guard_of_xor(guards: impl IntoIterator<Item = u64>) -> u64 {
    Format::NATIVE.guard_of_xor(guards)
}

const _: () = assert!(Format::NATIVE.interval.bytes() == BLOCK);

/// A CRC as its specification defines it.
#[derive(Debug)]
pub(crate) struct Algorithm {
    /// Bits of the CRC, and degree of the polynomial.
    pub(crate) width: u32,
    /// The polynomial without its leading term; bit `i` is the coefficient of `x^i`.
    polynomial: u64,
    /// Whether the lowest bit of a byte comes first, and that of the CRC stands for the highest
    /// power.
    pub(crate) is_reflected: bool,
    /// Whether the CRC starts from ones, and ones are added at the end; else zeros.
    pub(crate) has_ones: bool,
}

#[cfg(target_arch = "x86_64")]
pub(crate) const CRC16_T10_DIF: Algorithm =
    Algorithm { width: 16, polynomial: 0x8bb7, is_reflected: false, has_ones: false };
pub(crate) const CRC32C: Algorithm =
    Algorithm { width: 32, polynomial: 0x1edc_6f41, is_reflected: true, has_ones: true };
pub(crate) const CRC64_NVME: Algorithm =
    Algorithm { width: 64, polynomial: 0xad93_d235_94c9_3659, is_reflected: true, has_ones: true };

impl Algorithm {
    /// A CRC's worth of ones.
    pub(crate) const fn ones(&self) -> u64 {
        u64::MAX >> (64 - self.width)
    }

    /// The CRC of zeros, of a CRC that is reflected and has ones.
    const fn of_zeros(&self, len: usize) -> u64 {
        assert!(self.is_reflected && self.has_ones);
        let polynomial = self.scaled().reverse_bits();
        // One step of the bitwise CRC per bit, with no input to add.
        let (mut crc, mut bit) = (self.ones(), 0);
        while bit < len * 8 {
            crc = (crc >> 1) ^ (polynomial * (crc & 1));
            bit += 1;
        }
        crc ^ self.ones()
    }

    /// The polynomial times the power of `x` that makes its degree 64, without the leading term.
    ///
    /// `M * x^64 mod P*x^(64-w)` is `(M * x^w mod P) * x^(64-w)`. So every CRC is the upper `w`
    /// coefficients of a remainder of 64, and one algorithm serves all of them.
    const fn scaled(&self) -> u64 {
        self.polynomial << (64 - self.width)
    }
}

/// Constants of folding with carry-less multiplication, modulo the scaled polynomial.
///
/// Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
/// Instruction", Intel white paper 323102, 2009.
///
/// The bytes of a vector are folded in registers of 128 bits, two halves of 64. In memory order the
/// first half holds the higher powers.
///
/// - *Reflected*: bit `i` of a half is the coefficient of `x^(63 - i)`; the first bytes lie in the
///   lower half as they are loaded. The product of two halves fills 127 bits; read as a reflected
///   register of 128 it comes out one power too high: `clmul(a, b)` stands for `A * B * x`. Every
///   constant is therefore one power lower than the power that it multiplies by.
/// - *Not reflected*: bit `i` is the coefficient of `x^i`. The bytes of a register are put in the
///   opposite order after they are loaded; then the first ones lie in the upper half.
#[cfg(target_arch = "x86_64")]
impl Algorithm {
    /// `[k_low, k_high]` that move a 128-bit register up by `distance` bits:
    /// `V * x^distance = clmul(low(V), k_low) ^ clmul(high(V), k_high)`, modulo the polynomial.
    pub(crate) const fn fold_by(&self, distance: u32) -> [i64; 2] {
        if self.is_reflected {
            let powers = [self.power(distance + 64 - 1), self.power(distance - 1)];
            [powers[0].reverse_bits() as i64, powers[1].reverse_bits() as i64]
        } else {
            [self.power(distance) as i64, self.power(distance + 64) as i64]
        }
    }

    /// `[straight, crossed]` that move a 128-bit register of a CRC of 16 bits up by `distance`
    /// bits, without carry-less multiplication; not reflected, bytes as they are loaded.
    ///
    /// Byte `i` of the first half and byte `i` of the second are, but for `x^(56 - 8i)`, the
    /// polynomial `first * x^64 + second`. Modulo P that is a linear map from 16 bits to 16. It is
    /// one to one (or this does not compile), so there are two bytes that stand for
    /// `(first * x^64 + second) * x^distance`, and they depend on the two by four matrices of
    /// 8 x 8 bits, the same for every `i`. Those from a half to itself are `straight`, those from
    /// the other half `crossed`, each at the half that it leads to.
    pub(crate) const fn fold_bytes_by(&self, distance: u32) -> [[i64; 2]; 2] {
        assert!(self.width == 16 && !self.is_reflected);
        // Bit k of a pair is bit k of the second byte, bit 8 + k of the first.
        const PAIR: [u32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 64, 65, 66, 67, 68, 69, 70, 71];
        let pair_of = self.pairs(PAIR);
        let (mut straight, mut crossed, mut from) = ([0_u64; 2], [0_u64; 2], 0);
        while from < 16 {
            let (mut pair, mut rest, mut bit) = (0, self.remainder(PAIR[from] + distance), 0);
            while rest > 0 {
                pair ^= pair_of[bit] * (rest & 1);
                (rest, bit) = (rest >> 1, bit + 1);
            }
            let mut to = 0;
            while to < 16 {
                // The first half is the lower one in a register.
                let half = 1 - to / 8;
                // Row `to` of a matrix is byte `7 - to`; its bit `from` is in that column.
                let place = (pair >> to & 1) << (8 * (7 - to % 8) + from % 8);
                if to / 8 == from / 8 {
                    straight[half] |= place;
                } else {
                    crossed[half] |= place;
                }
                to += 1;
            }
            from += 1;
        }
        [[straight[0] as i64, straight[1] as i64], [crossed[0] as i64, crossed[1] as i64]]
    }

    /// For each `i` below 16, a set of these powers of `x` (as bits) whose sum is `x^i` modulo P.
    const fn pairs(&self, powers: [u32; 16]) -> [u64; 16] {
        // Gauss and Jordan: from what the powers are to single bits. A row is a remainder and the
        // set that it is the sum of.
        let (mut rows, mut row) = ([(0, 0); 16], 0);
        while row < 16 {
            rows[row] = (self.remainder(powers[row]), 1 << row);
            row += 1;
        }
        let mut bit = 0;
        while bit < 16 {
            let mut pivot = bit;
            while rows[pivot].0 >> bit & 1 == 0 {
                pivot += 1;
            }
            (rows[bit], rows[pivot]) = (rows[pivot], rows[bit]);
            let mut row = 0;
            while row < 16 {
                if row != bit && rows[row].0 >> bit & 1 == 1 {
                    rows[row] = (rows[row].0 ^ rows[bit].0, rows[row].1 ^ rows[bit].1);
                }
                row += 1;
            }
            bit += 1;
        }
        let (mut sets, mut bit) = ([0; 16], 0);
        while bit < 16 {
            sets[bit] = rows[bit].1;
            bit += 1;
        }
        sets
    }

    /// `x^exponent` modulo the polynomial.
    const fn remainder(&self, exponent: u32) -> u64 {
        self.power(exponent + 64 - self.width) >> (64 - self.width)
    }

    /// For Barrett's reduction: `floor(x^128 / P)`, which has 65 coefficients, without one of
    /// them.
    ///
    /// Not reflected: without the leading one. Reflected: divided by `x`, without the last one,
    /// which adds less than `x^64` to a product of which only the powers from `x^64` up are kept.
    pub(crate) const fn barrett(&self) -> i64 {
        // Schoolbook division; the leading step, x^128 - x^64 * P, is already taken.
        let (mut remainder, mut quotient, mut step) = (self.scaled(), 0_u64, 0);
        while step < 64 {
            let carry = remainder >> 63;
            quotient = quotient << 1 | carry;
            remainder = (remainder << 1) ^ (self.scaled() * carry);
            step += 1;
        }
        self.without_one_coefficient(quotient)
    }

    /// For Barrett's reduction: the scaled polynomial, without the coefficient that
    /// [`barrett`](Self::barrett) leaves out.
    pub(crate) const fn divisor(&self) -> i64 {
        self.without_one_coefficient(self.scaled())
    }

    /// Whether the last coefficient, which a reflected [`divisor`](Self::divisor) leaves out, is 1.
    pub(crate) const fn divisor_ends_in_one(&self) -> bool {
        self.scaled() & 1 == 1
    }

    /// `x^64 + lower`, of which only 64 coefficients fit.
    const fn without_one_coefficient(&self, lower: u64) -> i64 {
        if self.is_reflected { (1 << 63 | lower >> 1).reverse_bits() as i64 } else { lower as i64 }
    }

    /// `x^exponent` modulo the scaled polynomial.
    const fn power(&self, exponent: u32) -> u64 {
        let (mut value, mut step) = (1_u64, 0);
        while step < exponent {
            value = (value << 1) ^ (self.scaled() * (value >> 63));
            step += 1;
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Parities, Parity, Pass};

    #[test]
    fn check_values() {
        let values = Guard::ALL.map(|guard| guard.of(b"123456789"));
        assert_eq!(values, [0xd0db, 0xe306_9283, 0xae8b_1486_0a79_9888]);
    }

    /// NVM Command Set Specification, section 5.2.1.3.5: blocks of 4096 bytes.
    #[test]
    fn vectors_of_the_specification() {
        let guard_of = |byte: fn(usize) -> u8| guard(&std::array::from_fn::<u8, BLOCK, _>(byte));
        assert_eq!(guard_of(|_| 0), 0x6482_d367_eb22_b64e);
        assert_eq!(guard_of(|_| 0xff), 0xc0dd_ba73_02ec_a3ac);
        assert_eq!(guard_of(|i| i as u8), 0x3e72_9f5f_6750_449c);
        assert_eq!(guard_of(|i| !(i as u8)), 0x9a2d_f64b_8e9e_517e);
    }

    #[test]
    fn blocks_that_follow_each_other_and_sums_of_them() {
        let data: Vec<u8> = (0..3 * BLOCK).map(|i| (i * 7 + i / BLOCK) as u8).collect();
        let mut guards = [0; 3];
        crate::guards_of(&data, &mut guards);
        let blocks = || data.chunks_exact(BLOCK);
        assert_eq!(guards.to_vec(), blocks().map(guard).collect::<Vec<_>>());
        for coefficient in [1, 2, 29] {
            let (mut sum, mut want) = (vec![5; BLOCK], vec![5; BLOCK]);
            for (block, guard) in blocks().zip(guards) {
                let parities = Parities::only_q(Parity::Xor(sum.as_mut_ptr()), coefficient);
                let mut found = [0];
                // SAFETY: the sum is a block of ours.
                unsafe {
                    Pass { parities, ..Pass::guards(Format::NATIVE) }.stable(block, &mut found)
                };
                assert_eq!(found, [guard]);
                crate::gf::mul_xor_into(&mut want, block, coefficient);
            }
            assert_eq!(sum, want);
        }
    }

    #[test]
    fn zeros() {
        for guard in Guard::ALL {
            for interval in Interval::ALL {
                let format = Format { guard, interval };
                assert_eq!(format.guard_of_zeros(), guard.of(&vec![0; interval.bytes()]));
                assert_eq!(format.guard_of_xor([]), format.guard_of_zeros());
            }
        }
    }
}
