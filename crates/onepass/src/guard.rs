//! The guard: CRC-64/NVME of one protection interval, its algebra and its constants.
//!
//! NVM Express NVM Command Set Specification, revision 1.0d, section 5.2.1.3.4: polynomial
//! `ad93d235_94c93659`, initial value all ones, input and output reflected, output inverted.
//! Check value of `"123456789"`: `ae8b1486_0a799888`.
//!
//! A CRC is affine over GF(2): `guard(a ^ b) = guard(a) ^ guard(b) ^ guard(0)` for blocks of one
//! length. [`guard_of_xor`] is that rule for any number of blocks.

use crc_fast::CrcAlgorithm;

use crate::BLOCK;

/// The guard of stable bytes: of one block, or of anything shorter or longer.
pub fn guard(block: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, block)
}

/// The guard of one block of zeros.
pub fn guard_of_zeros() -> u64 {
    GUARD_OF_ZEROS
}

/// The guard of the XOR of some blocks, from their guards: the guard of P from those of its data.
///
/// The inverted initial and final values add `guard(0)` once per block. Of these an odd number
/// leaves the one that belongs there; an even number cancels out, and it must be put back. No
/// blocks at all XOR to zeros, whose guard is what comes out.
pub fn guard_of_xor(guards: impl IntoIterator<Item = u64>) -> u64 {
    let (mut xor, mut even) = (0, true);
    for guard in guards {
        xor ^= guard;
        even = !even;
    }
    if even { xor ^ GUARD_OF_ZEROS } else { xor }
}

/// The generator polynomial without its leading term; bit `i` is the coefficient of `x^i`.
const POLYNOMIAL: u64 = 0xad93_d235_94c9_3659;

const GUARD_OF_ZEROS: u64 = {
    // One step of the bitwise reflected CRC per bit of the block, with no input to add.
    let (mut crc, mut bit) = (u64::MAX, 0);
    while bit < BLOCK * 8 {
        crc = (crc >> 1) ^ (POLYNOMIAL.reverse_bits() * (crc & 1));
        bit += 1;
    }
    !crc
};

/// Constants of folding with carry-less multiplication.
///
/// Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
/// Instruction", Intel white paper 323102, 2009.
///
/// CRC-64/NVME is reflected: bit `i` of a 64-bit register is the coefficient of `x^(63 - i)`, and
/// of two registers the one with the earlier bytes holds the higher powers. The product of two
/// 64-bit registers fills 127 bits; read as a reflected 128-bit register it comes out one power
/// too high: `clmul(a, b)` stands for `A * B * x`. Every constant below is therefore one power
/// lower than the power that it multiplies by.
#[cfg(target_arch = "x86_64")]
pub(crate) mod folding {
    use super::POLYNOMIAL;

    /// `[k_low, k_high]` that move a 128-bit register up by `distance` bits:
    /// `V * x^distance = clmul(low(V), k_low) ^ clmul(high(V), k_high)`, modulo the polynomial.
    ///
    /// `low(V)` holds the earlier bytes, that is the powers from 64 up.
    pub(crate) const fn by(distance: u32) -> [i64; 2] {
        [power(distance + 64 - 1), power(distance - 1)]
    }

    /// `floor(x^128 / P)` divided by `x`, for Barrett's reduction (see [`POLYNOMIAL_OVER_X`]).
    ///
    /// The quotient itself has 65 coefficients. The last one can go: it adds less than `x^64` to a
    /// product of which only the powers from `x^64` up are kept.
    pub(crate) const BARRETT_OVER_X: i64 = {
        // Schoolbook division; the leading step, x^128 - x^64 * P, is already taken.
        let (mut remainder, mut quotient, mut step) = (POLYNOMIAL, 0_u64, 0);
        while step < 64 {
            let carry = remainder >> 63;
            quotient = quotient << 1 | carry;
            remainder = (remainder << 1) ^ (POLYNOMIAL * carry);
            step += 1;
        }
        (1 << 63 | quotient >> 1).reverse_bits() as i64
    };

    /// `P` divided by `x`, without the remainder 1: `q * P = clmul(q, POLYNOMIAL_OVER_X) + q`.
    pub(crate) const POLYNOMIAL_OVER_X: i64 = (1 << 63 | POLYNOMIAL >> 1).reverse_bits() as i64;

    /// `x^exponent` modulo the polynomial, reflected.
    const fn power(exponent: u32) -> i64 {
        let (mut value, mut step) = (1_u64, 0);
        while step < exponent {
            value = (value << 1) ^ (POLYNOMIAL * (value >> 63));
            step += 1;
        }
        value.reverse_bits() as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_value() {
        assert_eq!(guard(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    /// The same specification, section 5.2.1.3.5: blocks of 4096 bytes.
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
                assert_eq!(crate::add_block(&mut sum, block, coefficient), guard);
                crate::gf::mul_xor_into(&mut want, block, coefficient);
            }
            assert_eq!(sum, want);
        }
    }

    #[test]
    fn zeros() {
        assert_eq!(guard_of_zeros(), guard(&[0; BLOCK]));
        assert_eq!(guard_of_xor([]), guard_of_zeros());
    }
}
