//! The field against its definition, and blocks made from P and Q.

use onepass::gf::{self, MAX_COLUMNS};
use proptest::prelude::*;
use stableio_onepass as onepass;

/// `a * b` bit by bit: each bit of `b`, from the highest one, doubles what there is, and adds `a`.
fn naive_mul(a: u8, b: u8) -> u8 {
    (0..8).rev().fold(0, |product, bit| {
        let doubled = u16::from(product) << 1;
        let reduced = if doubled > 0xff { doubled ^ 0x11d } else { doubled };
        reduced as u8 ^ if b >> bit & 1 == 1 { a } else { 0 }
    })
}

#[test]
fn the_table_is_the_multiplication() {
    for a in 0..=u8::MAX {
        for b in 0..=u8::MAX {
            assert_eq!(gf::mul(a, b), naive_mul(a, b), "{a} * {b}");
        }
    }
}

#[test]
fn every_number_but_zero_has_an_inverse() {
    for a in 1..=u8::MAX {
        assert_eq!(naive_mul(a, gf::inv(a)), 1, "{a}");
    }
    assert!(std::panic::catch_unwind(|| gf::inv(0)).is_err());
}

#[test]
fn every_column_has_a_coefficient_of_its_own() {
    let mut power = 1;
    let mut seen = [false; 256];
    for k in 0..MAX_COLUMNS {
        assert_eq!(gf::exp(k), power, "2^{k}");
        assert!(!std::mem::replace(&mut seen[usize::from(power)], true));
        power = naive_mul(power, 2);
    }
    assert_eq!((power, gf::exp(MAX_COLUMNS)), (1, 1));
}

/// `Q` of the bytes 1 to 4, by hand: `1 ^ 2*2 ^ 4*3 ^ 8*4`, and a product that is reduced.
#[test]
fn values_by_hand() {
    let mut q = [0];
    for (k, byte) in [1_u8, 2, 3, 4].into_iter().enumerate() {
        gf::mul_xor_into(&mut q, &[byte], gf::exp(k));
    }
    assert_eq!(q, [1 ^ 4 ^ 12 ^ 32]);
    assert_eq!(gf::mul(0x80, 2), 0x1d);
    assert_eq!(gf::exp(8), 0x1d);
}

/// A row of any bytes, and its P and Q, byte by byte.
fn row(columns: usize, len: usize, seed: u64) -> (Vec<Vec<u8>>, Vec<u8>, Vec<u8>) {
    let mut state = seed | 1;
    let mut byte = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let data: Vec<Vec<u8>> =
        (0..columns).map(|_| std::iter::repeat_with(&mut byte).take(len).collect()).collect();
    let (mut p, mut q) = (vec![0; len], vec![0; len]);
    // Horner's rule: from the last column on, Q doubles.
    for column in data.iter().rev() {
        for (i, byte) in column.iter().enumerate() {
            p[i] ^= byte;
            q[i] = naive_mul(q[i], 2) ^ byte;
        }
    }
    (data, p, q)
}

/// P and Q without the columns that are not missing.
fn minus(data: &[Vec<u8>], missing: &[usize], p: &mut [u8], q: &mut [u8]) {
    for (k, column) in data.iter().enumerate().filter(|(k, _)| !missing.contains(k)) {
        onepass::xor_into(p, column);
        gf::mul_xor_into(q, column, gf::exp(k));
    }
}

fn assert_any_two_come_back(columns: usize, len: usize, seed: u64) {
    let (data, p, q) = row(columns, len, seed);
    for x in 0..columns {
        for y in (0..columns).filter(|y| *y != x) {
            let (mut p, mut q) = (p.clone(), q.clone());
            minus(&data, &[x, y], &mut p, &mut q);
            gf::reconstruct_two(&mut p, &mut q, x, y);
            assert!(p == data[x] && q == data[y], "{x} and {y} of {columns}");
        }
        let (mut p, mut q) = (p.clone(), q.clone());
        minus(&data, &[x], &mut p, &mut q);
        gf::reconstruct_from_q(&mut q, x);
        assert!(p == data[x], "{x} of {columns} from P");
        assert!(q == data[x], "{x} of {columns} from Q");
    }
}

#[test]
fn any_two_of_up_to_fourteen_columns_come_back() {
    for columns in 1..=14 {
        assert_any_two_come_back(columns, onepass::BLOCK, columns as u64);
    }
}

#[test]
fn any_two_of_the_most_columns_come_back() {
    assert_any_two_come_back(MAX_COLUMNS, 1, 7);
}

/// The twin: without Q's coefficients the columns could not be told apart.
#[test]
fn two_sums_of_one_kind_bring_nothing_back() {
    let (data, mut p, _) = row(4, 64, 3);
    for known in [0, 3] {
        onepass::xor_into(&mut p, &data[known]);
    }
    let mut q = p.clone();
    gf::reconstruct_two(&mut p, &mut q, 1, 2);
    assert!(p != data[1] && q != data[2]);
}

#[test]
fn columns_that_cannot_be_are_refused() {
    for (x, y) in [(3, 3), (0, MAX_COLUMNS), (MAX_COLUMNS, 0)] {
        let refused = std::panic::catch_unwind(|| gf::reconstruct_two(&mut [0], &mut [0], x, y));
        assert!(refused.is_err(), "{x} and {y}");
    }
    assert!(std::panic::catch_unwind(|| gf::reconstruct_from_q(&mut [0], MAX_COLUMNS)).is_err());
}

proptest! {
    #[test]
    fn a_row_of_any_length_comes_back(seed: u64, columns in 2_usize..15, len in 0_usize..300) {
        assert_any_two_come_back(columns, len, seed);
    }
}
