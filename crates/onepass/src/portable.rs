//! The loops in plain Rust: volatile words, `crc-fast`, and an XOR that the compiler vectorises.

use crate::pieces::{Pieces, WORD, to_word_boundary};
use crate::{BLOCK, Parity, Run, gf};

/// The pieces that run on every machine.
pub(crate) struct Portable;

impl Pieces for Portable {
    const LOADS_ONCE: bool = false;

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

    unsafe fn sum(run: &Run) {
        let bytes = run.format.interval.bytes();
        for index in 0..run.intervals {
            // SAFETY: this interval of the caller's ranges, none of which is foreign: see
            // `LOADS_ONCE`.
            unsafe {
                let guard = interval(&run.at(index * bytes), bytes);
                run.guards.add(index).write(guard);
            }
        }
    }

    fn xor_into(dst: &mut [u8], src: &[u8]) {
        xor_into(dst, src);
    }

    fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
        mul_xor_into(dst, src, c);
    }

    fn scale(buf: &mut [u8], c: u8) {
        scale(buf, c);
    }

    fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
        parities(columns, p, q);
    }
}

/// One interval of a run over stable memory, or less; returns its guard.
///
/// # Safety
///
/// That of [`Pieces::sum`], for one interval of that many bytes.
pub(crate) unsafe fn interval(run: &Run, len: usize) -> u64 {
    // SAFETY: the caller's source, initialised and not changed by anybody.
    let data = unsafe { std::slice::from_raw_parts(run.src, len) };
    if !run.copy.is_null() {
        // SAFETY: the copy has room for as many bytes, somewhere else.
        unsafe { run.copy.copy_from_nonoverlapping(run.src, len) };
    }
    let mut room;
    let change = if run.old.is_null() {
        data
    } else {
        // SAFETY: as many initialised bytes.
        let old = unsafe { std::slice::from_raw_parts(run.old, len) };
        room = [0; BLOCK];
        let change = &mut room[..len];
        change.copy_from_slice(data);
        xor_into(change, old);
        change
    };
    // SAFETY: the parities have room for as many bytes, initialised if they are to be read, and
    // overlap nothing else.
    unsafe {
        take_up(run.parities.p, change, None);
        take_up(run.parities.q, change, Some(run.parities.coefficient));
    }
    run.format.guard.of(data)
}

/// Takes stable bytes up in a parity, times a factor if there is one.
///
/// # Safety
///
/// The parity is valid for as many bytes, initialised ones if they are to be read; they overlap
/// nothing.
unsafe fn take_up(parity: Parity, data: &[u8], factor: Option<u8>) {
    let len = data.len();
    // SAFETY: the caller's promise; `Set` makes the bytes initialised before they are a slice.
    unsafe {
        match (parity, factor) {
            (Parity::None, _) => {}
            (Parity::Set(to), factor) => {
                to.copy_from_nonoverlapping(data.as_ptr(), len);
                if let Some(factor) = factor {
                    scale(std::slice::from_raw_parts_mut(to, len), factor);
                }
            }
            (Parity::Xor(to), None) => xor_into(std::slice::from_raw_parts_mut(to, len), data),
            (Parity::Xor(to), Some(factor)) => {
                mul_xor_into(std::slice::from_raw_parts_mut(to, len), data, factor);
            }
        }
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

/// P and Q of columns of one length.
fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    parities_from(0, columns, p, q);
}

/// P and Q of what lies from `start` on in each column.
pub(crate) fn parities_from(start: usize, columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    let len = p.len();
    for at in (start..len).step_by(BLOCK) {
        let here = at..len.min(at + BLOCK);
        let (p, q) = (&mut p[here.clone()], &mut q[here.clone()]);
        p.fill(0);
        q.fill(0);
        // Horner's rule: from the last column on, Q doubles.
        for column in columns.iter().rev() {
            scale(q, 2);
            xor_into(q, &column[here.clone()]);
            xor_into(p, &column[here.clone()]);
        }
    }
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
