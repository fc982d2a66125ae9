//! The loops in plain Rust: volatile words, `crc-fast`, and an XOR that the compiler vectorises.

use crate::BLOCK;
use crate::Parity;
use crate::by_block::{Pieces, WORD, to_word_boundary};
use crate::guard::guard;

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

    unsafe fn stable(block: &[u8], parity: Parity) -> u64 {
        match parity {
            Parity::None => {}
            // SAFETY: parity is valid for a block and does not overlap it.
            Parity::Set(p) => unsafe { p.copy_from_nonoverlapping(block.as_ptr(), BLOCK) },
            // SAFETY: as above, and it is initialised; nobody else touches it during the call.
            Parity::Xor(p) => xor_into(unsafe { std::slice::from_raw_parts_mut(p, BLOCK) }, block),
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
