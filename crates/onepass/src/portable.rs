//! The loops in plain Rust: volatile words, `crc-fast`, and an XOR that the compiler vectorises.

use crate::by_block::{Pieces, WORD, to_word_boundary};
use crate::guard::guard;
use crate::{BLOCK, Parities, Parity, gf};

/// The pieces that run on every machine.
pub(crate) struct Portable;

impl Pieces for Portable {
    unsafe fn load(src: *const u8, dst: *mut u8, len: usize) {
        let head = to_word_boundary(src, len);
        let tail = len - (len - head) % WORD;
        // SAFETY: 0 <= head <= tail <= len cut both ranges in three; the middle is a number of
        // words that starts at a word boundary of `src`.
        unsafe {
            load_bytes(src, dst, head);
            let (src_words, dst_words) = (src.add(head).cast::<u64>(), dst.add(head).cast::<u64>());
            for i in 0..(tail - head) / WORD {
                dst_words.add(i).write_unaligned(src_words.add(i).read_volatile());
            }
            load_bytes(src.add(tail), dst.add(tail), len - tail);
        }
    }

    unsafe fn store(src: *const u8, dst: *mut u8, len: usize) {
        let head = to_word_boundary(dst, len);
        let tail = len - (len - head) % WORD;
        // SAFETY: as in `load`, with the boundaries taken at `dst`.
        unsafe {
            store_bytes(src, dst, head);
            let (src_words, dst_words) = (src.add(head).cast::<u64>(), dst.add(head).cast::<u64>());
            for i in 0..(tail - head) / WORD {
                dst_words.add(i).write_volatile(src_words.add(i).read_unaligned());
            }
            store_bytes(src.add(tail), dst.add(tail), len - tail);
        }
    }

    unsafe fn zero(dst: *mut u8, len: usize) {
        let head = to_word_boundary(dst, len);
        let tail = len - (len - head) % WORD;
        // SAFETY: as in `store`; every index is below `len`.
        unsafe {
            (0..head).for_each(|i| dst.add(i).write_volatile(0));
            let words = dst.add(head).cast::<u64>();
            (0..(tail - head) / WORD).for_each(|i| words.add(i).write_volatile(0));
            (tail..len).for_each(|i| dst.add(i).write_volatile(0));
        }
    }

    unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> bool {
        let head = to_word_boundary(src, len);
        let tail = len - (len - head) % WORD;
        let mut difference = 0;
        // SAFETY: as in `load`; every index is below `len`.
        unsafe {
            let byte = |i| u64::from(src.add(i).read_volatile() ^ copy.add(i).read());
            (0..head).for_each(|i| difference |= byte(i));
            for at in (head..tail).step_by(WORD) {
                let word = src.add(at).cast::<u64>().read_volatile();
                difference |= word ^ copy.add(at).cast::<u64>().read_unaligned();
            }
            (tail..len).for_each(|i| difference |= byte(i));
        }
        difference != 0
    }

    unsafe fn stable(block: &[u8], parities: Parities) -> u64 {
        let Parities { p, q, coefficient } = parities;
        // SAFETY: both are valid for a block, initialised if they are to be read, and overlap
        // neither it nor each other; nobody else touches them during the call.
        unsafe {
            match p {
                Parity::None => {}
                Parity::Set(p) => p.copy_from_nonoverlapping(block.as_ptr(), BLOCK),
                Parity::Xor(p) => xor_into(std::slice::from_raw_parts_mut(p, BLOCK), block),
            }
            match q {
                Parity::None => {}
                Parity::Set(q) => {
                    q.copy_from_nonoverlapping(block.as_ptr(), BLOCK);
                    scale(std::slice::from_raw_parts_mut(q, BLOCK), coefficient);
                }
                Parity::Xor(q) => {
                    let q = std::slice::from_raw_parts_mut(q, BLOCK);
                    mul_xor_into(q, block, coefficient);
                }
            }
        }
        guard(block)
    }
}

/// XORs `src` into `dst`, as far as the shorter of them reaches.
pub(crate) fn xor_into(dst: &mut [u8], src: &[u8]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d ^= s;
    }
}

/// Adds `c * src` to `dst`, as far as the shorter of them reaches.
pub(crate) fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
    let len = dst.len().min(src.len());
    let (dst, dst_rest) = dst[..len].as_chunks_mut::<GROUP>();
    let (src, src_rest) = src[..len].as_chunks::<GROUP>();
    for (d, s) in dst.iter_mut().zip(src) {
        xor_into(d, &product(s, c));
    }
    for (d, s) in dst_rest.iter_mut().zip(src_rest) {
        *d ^= gf::mul(*s, c);
    }
}

/// Multiplies each byte by `c`.
pub(crate) fn scale(buf: &mut [u8], c: u8) {
    let (groups, rest) = buf.as_chunks_mut::<GROUP>();
    groups.iter_mut().for_each(|group| *group = product(group, c));
    rest.iter_mut().for_each(|byte| *byte = gf::mul(*byte, c));
}

/// Bytes that are multiplied together: enough words for the compiler to make vectors of them.
const GROUP: usize = 8 * WORD;

/// `c * data`, by doubling (Horner's rule), from the highest bit of `c` that is set.
fn product(data: &[u8; GROUP], c: u8) -> [u8; GROUP] {
    let (words, _) = data.as_chunks::<WORD>();
    let mut sums = [0; GROUP / WORD];
    for bit in (0..8 - c.leading_zeros()).rev() {
        let taken = 0_u64.wrapping_sub(u64::from(c >> bit & 1));
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = gf::double_each(*sum) ^ (u64::from_ne_bytes(*word) & taken);
        }
    }
    let mut product = [0; GROUP];
    let (words, _) = product.as_chunks_mut::<WORD>();
    words.iter_mut().zip(sums).for_each(|(word, sum)| *word = sum.to_ne_bytes());
    product
}

/// Copies less than a word of foreign memory, byte by byte.
///
/// # Safety
///
/// That of [`Pieces::load`].
unsafe fn load_bytes(src: *const u8, dst: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: i < len; `src` is guarded and `dst` is valid.
        unsafe { dst.add(i).write(src.add(i).read_volatile()) };
    }
}

/// Copies less than a word to foreign memory, byte by byte.
///
/// # Safety
///
/// That of [`Pieces::store`].
unsafe fn store_bytes(src: *const u8, dst: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: i < len; `src` is valid and `dst` is guarded.
        unsafe { dst.add(i).write_volatile(src.add(i).read()) };
    }
}
