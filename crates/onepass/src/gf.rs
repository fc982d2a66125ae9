//! The field of Q: GF(2^8) with the polynomial `0x11d` and the generator 2.
//!
//! For the data blocks `D_k` of a row, by column:
//!
//! ```text
//! P = D_0 + D_1 + D_2 + ...            P is their sum, and a sum is XOR
//! Q = D_0 + g*D_1 + g^2*D_2 + ...      byte by byte, g = 2
//! ```
//!
//! Any two of data, P and Q can be made from the others, for up to [`MAX_COLUMNS`] columns: as far
//! as the powers of `g` differ. Linux md and ISA-L compute the same Q.
//!
//! Source: H. P. Anvin, "The mathematics of RAID-6", 2004-2011.
//!
//! Here are numbers and stable memory only. Q of foreign memory is made by the kernels that load
//! it (ONCE-1); see [`crate::Parities`].

use crate::Kernels;

/// Data columns that Q can tell apart.
pub const MAX_COLUMNS: usize = 255;

/// `a * b`.
pub const fn mul(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    exp(LOG[a as usize] as usize + LOG[b as usize] as usize)
}

/// `1 / a`.
///
/// # Panics
///
/// If `a` is zero.
pub const fn inv(a: u8) -> u8 {
    assert!(a != 0, "zero has no inverse");
    exp(MAX_COLUMNS - LOG[a as usize] as usize)
}

/// `2^k`: the coefficient of column `k` in Q. It repeats itself after [`MAX_COLUMNS`].
pub const fn exp(k: usize) -> u8 {
    EXP[k % MAX_COLUMNS]
}

/// Adds `c * src` to `dst`, byte by byte: takes a block up in Q, or out of it.
///
/// # Panics
///
/// If the lengths differ.
pub fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
    assert_eq!(dst.len(), src.len(), "sum of unequal lengths");
    (Kernels::chosen().mul_xor_into)(dst, src, c);
}

/// Multiplies each byte by `c`.
pub fn scale(buf: &mut [u8], c: u8) {
    (Kernels::chosen().scale)(buf, c);
}

/// P and Q of stable columns, without guards.
///
/// # Panics
///
/// If the lengths differ, or if there are more columns than [`MAX_COLUMNS`].
pub fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    assert!(columns.len() <= MAX_COLUMNS, "{} columns", columns.len());
    let is_equal = |len: usize| len == p.len();
    assert!(columns.iter().all(|c| is_equal(c.len())) && is_equal(q.len()), "unequal lengths");
    (Kernels::chosen().parities)(columns, p, q);
}

/// Makes two missing data blocks from P and Q, of which all the other data has been taken out.
///
/// `p_minus` becomes the data of column `x`, `q_minus` that of column `y`.
///
/// # Panics
///
/// If the lengths differ, or if the columns are the same or not below [`MAX_COLUMNS`].
pub fn reconstruct_two(p_minus: &mut [u8], q_minus: &mut [u8], x: usize, y: usize) {
    assert!(x != y && x.max(y) < MAX_COLUMNS, "columns {x} and {y}");
    // P = D_x + D_y and Q = g^x*D_x + g^y*D_y, so that Q + g^x*P = (g^x + g^y) * D_y.
    mul_xor_into(q_minus, p_minus, exp(x));
    scale(q_minus, inv(exp(x) ^ exp(y)));
    crate::xor_into(p_minus, q_minus);
}

/// Makes a missing data block from Q, of which all the other data has been taken out: what is
/// left when P is missing too. `q_minus` becomes the data of column `x`.
///
/// # Panics
///
/// If the column is not below [`MAX_COLUMNS`].
pub fn reconstruct_from_q(q_minus: &mut [u8], x: usize) {
    assert!(x < MAX_COLUMNS, "column {x}");
    scale(q_minus, inv(exp(x)));
}

/// The polynomial without its leading term: what `x^8` is equal to.
const POLYNOMIAL: u8 = 0x1d;

/// Doubles each byte of a word.
pub(crate) const fn double_each(word: u64) -> u64 {
    const fn each(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    // One for each byte whose highest bit falls out, and then all ones. (No multiplication: there
    // is none of 64 bits in the vectors that this shall be compiled to.)
    let carry = word >> 7 & each(1);
    let carried = (carry << 8).wrapping_sub(carry);
    (word << 1 & each(0xfe)) ^ (carried & each(POLYNOMIAL))
}

/// The powers of 2.
static EXP: [u8; MAX_COLUMNS] = {
    let (mut powers, mut k) = ([1; MAX_COLUMNS], 1);
    while k < MAX_COLUMNS {
        powers[k] = double_each(powers[k - 1] as u64) as u8;
        k += 1;
    }
    powers
};

/// Of which power of 2 each number but zero is.
static LOG: [u8; 256] = {
    let (mut logs, mut k) = ([0; 256], 0);
    while k < MAX_COLUMNS {
        logs[EXP[k] as usize] = k as u8;
        k += 1;
    }
    logs
};

/// Multiplication by each number in the forms that vector instructions want it in.
#[cfg(target_arch = "x86_64")]
pub(crate) mod tables {
    /// As a matrix of bits, for `gf2p8affineqb`: bit `i` of the product is the parity of the bits
    /// that byte `7 - i` has in common with the other factor.
    pub(crate) static MATRICES: [u64; 256] = {
        let (mut matrices, mut c) = ([0; 256], 0);
        while c < 256 {
            let (mut power, mut column) = (c as u8, 0);
            while column < 8 {
                // `power` is c * 2^column: what bit `column` of the other factor adds.
                let mut row = 0;
                while row < 8 {
                    matrices[c] |= ((power >> row & 1) as u64) << ((7 - row) * 8 + column);
                    row += 1;
                }
                power = super::double_each(power as u64) as u8;
                column += 1;
            }
            c += 1;
        }
        matrices
    };

    /// As the products with the lower and with the upper half of the other factor, for `pshufb`.
    pub(crate) static NIBBLES: [[[u8; 16]; 2]; 256] = {
        let (mut tables, mut c) = ([[[0; 16]; 2]; 256], 0);
        while c < 256 {
            let (mut power, mut bit) = (c as u8, 0);
            while bit < 8 {
                let (half, weight) = (bit / 4, 1 << (bit % 4));
                let mut nibble = 0;
                while nibble < 16 {
                    if nibble & weight != 0 {
                        tables[c][half][nibble] ^= power;
                    }
                    nibble += 1;
                }
                power = super::double_each(power as u64) as u8;
                bit += 1;
            }
            c += 1;
        }
        tables
    };
}
