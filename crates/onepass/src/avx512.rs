//! 512-bit vectors: AVX-512 (F, BW, VL) with VPCLMULQDQ, with GFNI or without.
//!
//! Foreign loads are inline assembly: the compiler must not repeat them (ONCE-1). A 512-bit load
//! is taken to be a single access to each aligned 8-byte word in it (ONCE-2). The manuals promise
//! single access only up to 16 bytes; every x86 with AVX-512 moves data between core and cache
//! in units that are whole aligned words, also where the load lies across two cache lines. The
//! racing test in `tests/once.rs` would see it torn.
//!
//! What does not fill a vector is loaded and stored under a mask: bytes outside of it are not
//! accessed, and do not fault.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::fused::{self, Crc, Vectors};
use crate::gf::tables;
use crate::pieces::{Pieces, to_word_boundary};
use crate::{Across, Run, across, portable};

/// Whether this machine can run `Avx512<GFNI>`.
pub(crate) fn is_available<const GFNI: bool>() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("vpclmulqdq")
        && (!GFNI || is_x86_feature_detected!("gfni"))
}

/// The tier; GFNI if one instruction multiplies the bytes of a vector. Only used where
/// [`is_available`].
pub(crate) struct Avx512<const GFNI: bool>;

/// Bytes of a register.
const VECTOR: usize = 64;

/// The truth table of a XOR of three.
const XOR3: i32 = 0x96;

/// Registers that are folded independently of each other.
const LANES: usize = 4;

impl<const GFNI: bool> Vectors for Avx512<GFNI> {
    type Vector = __m512i;
    type Factor = Factor<GFNI>;
    const BYTES: usize = VECTOR;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
    unsafe fn pass<K: Crc, const STORE: u8, const PARITY: bool>(run: &Run) {
        // SAFETY: the caller's promises.
        unsafe { fused::pass::<Self, K, LANES, STORE, PARITY>(run) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
    unsafe fn across<K: Crc>(run: &Across) {
        // SAFETY: the caller's promises.
        unsafe { across::pass::<Self, K>(run) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn parities(columns: &[&[u8]], p: *mut u8, q: *mut u8, len: usize) {
        // SAFETY: the caller's promises.
        unsafe { fused::parities::<Self>(columns, p, q, len) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_once(src: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { load_once(src) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(src: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { load(src) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(dst: *mut u8, data: __m512i) {
        // SAFETY: the caller's promise.
        unsafe { store(dst, data) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn stream(dst: *mut u8, data: __m512i) {
        // SAFETY: the caller's promise, alignment included; `fused::sum` puts the fence behind.
        unsafe { _mm512_stream_si512(dst.cast(), data) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn swap(data: __m512i) -> __m512i {
        let order = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_shuffle_epi8(data, _mm512_broadcast_i32x4(order))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn everywhere([low, high]: [i64; 2]) -> __m512i {
        _mm512_broadcast_i32x4(_mm_set_epi64x(high, low))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn first(word: u64) -> __m512i {
        _mm512_zextsi128_si512(_mm_set_epi64x(0, word as i64))
    }

    #[inline]
    #[target_feature(enable = "avx512f,vpclmulqdq")]
    unsafe fn fold(sum: __m512i, by: __m512i, next: __m512i) -> __m512i {
        let low = _mm512_clmulepi64_epi128::<0x00>(sum, by);
        let high = _mm512_clmulepi64_epi128::<0x11>(sum, by);
        _mm512_ternarylogic_epi64::<XOR3>(low, high, next)
    }

    const FOLDS_BYTES: bool = GFNI;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn fold_bytes(
        sum: __m512i,
        straight: __m512i,
        crossed: __m512i,
        next: __m512i,
    ) -> __m512i {
        const OTHER_HALF: i32 = 0b01_00_11_10;
        let other = _mm512_shuffle_epi32::<OTHER_HALF>(sum);
        // SAFETY: folding by bytes is for machines with GFNI.
        let (straight, crossed) = unsafe { (affine(sum, straight), affine(other, crossed)) };
        _mm512_ternarylogic_epi64::<XOR3>(straight, crossed, next)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,vpclmulqdq")]
    unsafe fn join(sum: __m512i, [by_one, by_two, by_three]: [[i64; 2]; 3]) -> __m128i {
        let ([k0, k1], [k2, k3], [k4, k5]) = (by_three, by_two, by_one);
        let by = _mm512_set_epi64(0, 0, k5, k4, k3, k2, k1, k0);
        // The last quarter stays where it is.
        let last = _mm512_maskz_mov_epi64(0b1100_0000, sum);
        // SAFETY: the caller's promise about the machine.
        let sum = unsafe { Self::fold(sum, by, last) };
        let (low, high) = (_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64::<1>(sum));
        let half = _mm256_xor_si256(low, high);
        _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn factor(c: u8) -> Factor<GFNI> {
        Factor::new(c)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn times(factor: Factor<GFNI>, data: __m512i) -> __m512i {
        factor.times(data)
    }
}

impl<const GFNI: bool> Pieces for Avx512<GFNI> {
    const LOADS_ONCE: bool = true;
    const ACROSS: Option<unsafe fn(&Across)> = Some(across::sum::<Self>);

    unsafe fn load(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the machine has AVX-512; the caller's promises.
        unsafe { load_all(src, dst, len) }
    }

    unsafe fn store(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: as above.
        unsafe { store_all(src, dst, len) }
    }

    unsafe fn zero(dst: *mut u8, len: usize) {
        // SAFETY: as above.
        unsafe { zero_all(dst, len) }
    }

    unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> bool {
        // SAFETY: as above.
        unsafe { differ_all(src, copy, len) }
    }

    unsafe fn sum(run: &Run) {
        // SAFETY: as above.
        unsafe { fused::sum::<Self>(run) }
    }

    fn xor_into(dst: &mut [u8], src: &[u8]) {
        xor_into(dst, src);
    }

    fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
        mul_xor_into::<GFNI>(dst, src, c);
    }

    fn scale(buf: &mut [u8], c: u8) {
        scale::<GFNI>(buf, c);
    }

    fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
        parities::<GFNI>(columns, p, q);
    }
}

/// XORs `src` into `dst`, as far as the shorter of them reaches.
fn xor_into(dst: &mut [u8], src: &[u8]) {
    #[target_feature(enable = "avx512f")]
    fn vectors(dst: &mut [u8], src: &[u8]) {
        let (mut d, mut s) = (dst.chunks_exact_mut(VECTOR), src.chunks_exact(VECTOR));
        for (d, s) in (&mut d).zip(&mut s) {
            // SAFETY: a chunk has the bytes of a vector; neither needs an alignment.
            unsafe {
                let sum = _mm512_xor_si512(load(d.as_ptr()), load(s.as_ptr()));
                _mm512_storeu_si512(d.as_mut_ptr().cast(), sum);
            }
        }
        portable::xor_into(d.into_remainder(), s.remainder());
    }
    let len = dst.len().min(src.len());
    // SAFETY: the machine has AVX-512.
    unsafe { vectors(&mut dst[..len], &src[..len]) }
}

/// Adds `c * src` to `dst`, as far as the shorter of them reaches.
fn mul_xor_into<const GFNI: bool>(dst: &mut [u8], src: &[u8], c: u8) {
    #[target_feature(enable = "avx512f,avx512bw")]
    fn vectors<const GFNI: bool>(dst: &mut [u8], src: &[u8], c: u8) {
        let factor = Factor::<GFNI>::new(c);
        let (mut d, mut s) = (dst.chunks_exact_mut(VECTOR), src.chunks_exact(VECTOR));
        for (d, s) in (&mut d).zip(&mut s) {
            // SAFETY: a chunk has the bytes of a vector; neither needs an alignment.
            unsafe {
                let sum = _mm512_xor_si512(load(d.as_ptr()), factor.times(load(s.as_ptr())));
                store(d.as_mut_ptr(), sum);
            }
        }
        portable::mul_xor_into(d.into_remainder(), s.remainder(), c);
    }
    let len = dst.len().min(src.len());
    // SAFETY: the machine has AVX-512.
    unsafe { vectors::<GFNI>(&mut dst[..len], &src[..len], c) }
}

/// Multiplies each byte by `c`.
fn scale<const GFNI: bool>(buf: &mut [u8], c: u8) {
    #[target_feature(enable = "avx512f,avx512bw")]
    fn vectors<const GFNI: bool>(buf: &mut [u8], c: u8) {
        let factor = Factor::<GFNI>::new(c);
        let mut chunks = buf.chunks_exact_mut(VECTOR);
        for chunk in &mut chunks {
            // SAFETY: a chunk has the bytes of a vector; it needs no alignment.
            unsafe { store(chunk.as_mut_ptr(), factor.times(load(chunk.as_ptr()))) };
        }
        portable::scale(chunks.into_remainder(), c);
    }
    // SAFETY: the machine has AVX-512.
    unsafe { vectors::<GFNI>(buf, c) }
}

/// P and Q of stable columns.
fn parities<const GFNI: bool>(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    let whole = if columns.is_empty() { 0 } else { p.len() - p.len() % (2 * VECTOR) };
    // SAFETY: the machine has AVX-512; all have this length.
    unsafe { <Avx512<GFNI> as Vectors>::parities(columns, p.as_mut_ptr(), q.as_mut_ptr(), whole) };
    portable::parities_from(whole, columns, p, q);
}

/// A number of the field, ready to multiply vectors by.
#[derive(Clone, Copy)]
pub(crate) struct Factor<const GFNI: bool> {
    /// For the instruction of GFNI.
    matrix: __m512i,
    /// Without it: the products with each lower and with each upper half of a byte.
    nibbles: [__m512i; 2],
}

impl<const GFNI: bool> Factor<GFNI> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(c: u8) -> Self {
        let nibbles = &tables::NIBBLES[usize::from(c)];
        // SAFETY: a table has 16 bytes.
        let everywhere = |table: &[u8; 16]| unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        Factor {
            matrix: _mm512_set1_epi64(tables::MATRICES[usize::from(c)] as i64),
            nibbles: [
                _mm512_broadcast_i32x4(everywhere(&nibbles[0])),
                _mm512_broadcast_i32x4(everywhere(&nibbles[1])),
            ],
        }
    }

    /// Multiplies each byte of `data`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn times(self, data: __m512i) -> __m512i {
        if GFNI {
            // SAFETY: the machine has GFNI.
            return unsafe { affine(data, self.matrix) };
        }
        let half = _mm512_set1_epi8(0x0f);
        let low = _mm512_and_si512(data, half);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(data), half);
        let [of_low, of_high] = self.nibbles;
        _mm512_xor_si512(_mm512_shuffle_epi8(of_low, low), _mm512_shuffle_epi8(of_high, high))
    }
}

/// Multiplies each byte by the bit matrix in its 64 bits of `matrix`. In assembly, so that it can
/// stand in the loops that are compiled for machines without GFNI.
///
/// # Safety
///
/// The machine has GFNI.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn affine(data: __m512i, matrix: __m512i) -> __m512i {
    let product;
    // SAFETY: computes with registers only.
    unsafe {
        asm!(
            "vgf2p8affineqb {product}, {data}, {matrix}, 0",
            product = lateout(zmm_reg) product,
            data = in(zmm_reg) data,
            matrix = in(zmm_reg) matrix,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    product
}

/// Loads a vector of foreign bytes, once.
///
/// # Safety
///
/// `src` is guarded foreign memory of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_once(src: *const u8) -> __m512i {
    let data;
    // SAFETY: reads the vector at `src` and changes nothing but its output. Without `pure` the
    // compiler may neither repeat nor leave out what this does.
    unsafe {
        asm!(
            "vmovdqu64 {data}, [{src}]",
            src = in(reg) src,
            data = lateout(zmm_reg) data,
            options(readonly, nostack, preserves_flags),
        );
    }
    data
}

/// Loads a vector of stable bytes.
///
/// # Safety
///
/// `src` is valid for reads of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(src: *const u8) -> __m512i {
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe { _mm512_loadu_si512(src.cast()) }
}

/// Stores a vector to memory of ours.
///
/// # Safety
///
/// `dst` is valid for writes of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(dst: *mut u8, data: __m512i) {
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe { _mm512_storeu_si512(dst.cast(), data) }
}

/// The lowest `len` bytes of a vector, fewer than all.
#[inline]
fn mask(len: usize) -> __mmask64 {
    (1 << len) - 1
}

/// [`Pieces::load`].
///
/// # Safety
///
/// That of [`Pieces::load`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_all(src: *const u8, dst: *mut u8, len: usize) {
    let (head, tail) = ends(src, len);
    // SAFETY: the parts lie in both ranges, one behind the other.
    unsafe {
        store_masked(dst, head, load_masked_once(src, head));
        for at in (head..tail).step_by(VECTOR) {
            store(dst.add(at), load_once(src.add(at)));
        }
        let left = len - tail;
        store_masked(dst.wrapping_add(tail), left, load_masked_once(src.wrapping_add(tail), left));
    }
}

/// [`Pieces::store`].
///
/// # Safety
///
/// That of [`Pieces::store`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn store_all(src: *const u8, dst: *mut u8, len: usize) {
    let (head, tail) = ends(dst, len);
    // SAFETY: the parts lie in both ranges, one behind the other.
    unsafe {
        store_masked_once(dst, head, load_masked(src, head));
        for at in (head..tail).step_by(VECTOR) {
            store_once(dst.add(at), load(src.add(at)));
        }
        let left = len - tail;
        store_masked_once(dst.wrapping_add(tail), left, load_masked(src.wrapping_add(tail), left));
    }
}

/// [`Pieces::zero`].
///
/// # Safety
///
/// That of [`Pieces::zero`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn zero_all(dst: *mut u8, len: usize) {
    let (head, tail) = ends(dst, len);
    let zeros = _mm512_setzero_si512();
    // SAFETY: the parts lie in the range, one behind the other.
    unsafe {
        store_masked_once(dst, head, zeros);
        for at in (head..tail).step_by(VECTOR) {
            store_once(dst.add(at), zeros);
        }
        store_masked_once(dst.wrapping_add(tail), len - tail, zeros);
    }
}

/// [`Pieces::differ`].
///
/// # Safety
///
/// That of [`Pieces::differ`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn differ_all(src: *const u8, copy: *const u8, len: usize) -> bool {
    let (head, tail) = ends(src, len);
    // SAFETY: the parts lie in both ranges, one behind the other.
    unsafe {
        let mut difference = _mm512_xor_si512(load_masked_once(src, head), load_masked(copy, head));
        for at in (head..tail).step_by(VECTOR) {
            let here = _mm512_xor_si512(load_once(src.add(at)), load(copy.add(at)));
            difference = _mm512_or_si512(difference, here);
        }
        let (src, copy, left) = (src.wrapping_add(tail), copy.wrapping_add(tail), len - tail);
        let here = _mm512_xor_si512(load_masked_once(src, left), load_masked(copy, left));
        difference = _mm512_or_si512(difference, here);
        _mm512_test_epi64_mask(difference, difference) != 0
    }
}

/// How foreign memory is accessed: a first part of less than a vector up to a word boundary, whole
/// vectors, and a last part of less than one. No word lies across two of them (ONCE-2).
fn ends(foreign: *const u8, len: usize) -> (usize, usize) {
    let head = to_word_boundary(foreign, len);
    (head, len - (len - head) % VECTOR)
}

/// Loads less than a vector of foreign bytes, once.
///
/// # Safety
///
/// `src` is guarded foreign memory of `len` bytes; `len` < [`VECTOR`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_masked_once(src: *const u8, len: usize) -> __m512i {
    let data;
    // SAFETY: reads the `len` bytes at `src`, no others, and changes nothing but its output.
    unsafe {
        asm!(
            "vmovdqu8 {data}{{{mask}}}{{z}}, [{src}]",
            src = in(reg) src,
            mask = in(kreg) mask(len),
            data = lateout(zmm_reg) data,
            options(readonly, nostack, preserves_flags),
        );
    }
    data
}

/// Stores less than a vector to foreign memory, once.
///
/// # Safety
///
/// `dst` is guarded foreign memory of `len` bytes; `len` < [`VECTOR`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn store_masked_once(dst: *mut u8, len: usize, data: __m512i) {
    // SAFETY: writes the `len` bytes at `dst` and nothing else.
    unsafe {
        asm!(
            "vmovdqu8 [{dst}]{{{mask}}}, {data}",
            dst = in(reg) dst,
            mask = in(kreg) mask(len),
            data = in(zmm_reg) data,
            options(nostack, preserves_flags),
        );
    }
}

/// Loads less than a vector of stable bytes.
///
/// # Safety
///
/// `src` is valid for reads of `len` bytes; `len` < [`VECTOR`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_masked(src: *const u8, len: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_maskz_loadu_epi8(mask(len), src.cast()) }
}

/// Stores less than a vector to memory of ours.
///
/// # Safety
///
/// `dst` is valid for writes of `len` bytes; `len` < [`VECTOR`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn store_masked(dst: *mut u8, len: usize, data: __m512i) {
    // SAFETY: the caller's promise.
    unsafe { _mm512_mask_storeu_epi8(dst.cast(), mask(len), data) }
}

/// Stores a vector to foreign memory, once.
///
/// # Safety
///
/// `dst` is guarded foreign memory of [`VECTOR`] bytes at a word boundary.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_once(dst: *mut u8, data: __m512i) {
    // SAFETY: writes the VECTOR bytes at `dst` and nothing else.
    unsafe {
        asm!(
            "vmovdqu64 [{dst}], {data}",
            dst = in(reg) dst,
            data = in(zmm_reg) data,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gf;

    #[test]
    fn both_ways_of_multiplying_agree_with_the_table() {
        fn check<const GFNI: bool>() {
            for c in 0..=u8::MAX {
                let data: [u8; 256] = std::array::from_fn(|i| i as u8);
                let mut product = data;
                scale::<GFNI>(&mut product, c);
                assert_eq!(product, data.map(|byte| gf::mul(c, byte)), "{c}, GFNI: {GFNI}");
            }
        }
        if is_available::<false>() {
            check::<false>();
        }
        if is_available::<true>() {
            check::<true>();
        }
    }
}
