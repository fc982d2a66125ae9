//! 256-bit vectors: AVX2 with VPCLMULQDQ, or with PCLMULQDQ alone.
//!
//! Foreign loads are inline assembly, as in `avx512.rs`, and for the same reasons. There are no
//! masks here: what does not fill a vector is loaded by words and bytes.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::fused::{self, Crc, Vectors};
use crate::gf::tables;
use crate::pieces::{Pieces, to_word_boundary};
use crate::portable::{self, Portable};
use crate::{Across, Run, across};

/// Whether this machine can run `Avx2<WIDE>`.
pub(crate) fn is_available<const WIDE: bool>() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("pclmulqdq")
        && (!WIDE || is_x86_feature_detected!("vpclmulqdq"))
}

/// The tier; WIDE if one instruction multiplies without carry in both halves of a vector. Only
/// used where [`is_available`].
pub(crate) struct Avx2<const WIDE: bool>;

/// Bytes of a register.
const VECTOR: usize = 32;

/// Registers that are folded independently of each other.
const LANES: usize = 4;

impl<const WIDE: bool> Vectors for Avx2<WIDE> {
    type Vector = __m256i;
    type Factor = Factor;
    const BYTES: usize = VECTOR;

    #[target_feature(enable = "avx2,pclmulqdq")]
    unsafe fn pass<K: Crc, const STORE: u8, const PARITY: bool>(run: &Run) {
        // SAFETY: the caller's promises.
        unsafe { fused::pass::<Self, K, LANES, STORE, PARITY>(run) }
    }

    #[target_feature(enable = "avx2,pclmulqdq")]
    unsafe fn across<K: Crc>(run: &Across) {
        // SAFETY: the caller's promises.
        unsafe { across::pass::<Self, K>(run) }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn parities(columns: &[&[u8]], p: *mut u8, q: *mut u8, len: usize) {
        // SAFETY: the caller's promises.
        unsafe { fused::parities::<Self>(columns, p, q, len) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_once(src: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { load_once(src) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(src: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { load(src) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(dst: *mut u8, data: __m256i) {
        // SAFETY: the caller's promise.
        unsafe { store(dst, data) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn stream(dst: *mut u8, data: __m256i) {
        // SAFETY: the caller's promise, alignment included; `fused::sum` puts the fence behind.
        unsafe { _mm256_stream_si256(dst.cast(), data) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
        _mm256_xor_si256(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn swap(data: __m256i) -> __m256i {
        let order = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm256_shuffle_epi8(data, _mm256_broadcastsi128_si256(order))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn everywhere([low, high]: [i64; 2]) -> __m256i {
        _mm256_set_epi64x(high, low, high, low)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn first(word: u64) -> __m256i {
        _mm256_set_epi64x(0, 0, 0, word as i64)
    }

    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq")]
    unsafe fn fold(sum: __m256i, by: __m256i, next: __m256i) -> __m256i {
        if !WIDE {
            let [low, high] = [_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum)];
            // Folds are by the same distance everywhere.
            let by = _mm256_castsi256_si128(by);
            return _mm256_xor_si256(_mm256_set_m128i(moved(high, by), moved(low, by)), next);
        }
        let (low, high): (__m256i, __m256i);
        // SAFETY: computes with registers only; the machine has VPCLMULQDQ. In assembly, so that it
        // can stand in the functions that are compiled for machines without.
        unsafe {
            asm!(
                "vpclmulqdq {low}, {sum}, {by}, 0x00",
                "vpclmulqdq {high}, {sum}, {by}, 0x11",
                low = out(ymm_reg) low,
                high = lateout(ymm_reg) high,
                sum = in(ymm_reg) sum,
                by = in(ymm_reg) by,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        _mm256_xor_si256(_mm256_xor_si256(low, high), next)
    }

    const FOLDS_BYTES: bool = false;

    unsafe fn fold_bytes(_: __m256i, _: __m256i, _: __m256i, _: __m256i) -> __m256i {
        unreachable!("not among the instructions of this tier")
    }

    #[inline]
    #[target_feature(enable = "avx2,pclmulqdq")]
    unsafe fn join(sum: __m256i, [[low, high], ..]: [[i64; 2]; 3]) -> __m128i {
        let first = moved(_mm256_castsi256_si128(sum), _mm_set_epi64x(high, low));
        _mm_xor_si128(first, _mm256_extracti128_si256::<1>(sum))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn factor(c: u8) -> Factor {
        Factor::new(c)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn times(factor: Factor, data: __m256i) -> __m256i {
        factor.times(data)
    }
}

impl<const WIDE: bool> Pieces for Avx2<WIDE> {
    const LOADS_ONCE: bool = true;
    const ACROSS: Option<unsafe fn(&Across)> = Some(across::sum::<Self>);

    unsafe fn load(src: *const u8, dst: *mut u8, len: usize) {
        let (head, tail) = ends(src, len);
        // SAFETY: the machine has AVX2. The ranges are cut in three parts; the middle one starts
        // at a word boundary of `src`, and the last one where a vector ended, at another.
        unsafe {
            Portable::load(src, dst, head);
            load_vectors(src.add(head), dst.add(head), tail - head);
            Portable::load(src.add(tail), dst.add(tail), len - tail);
        }
    }

    unsafe fn store(src: *const u8, dst: *mut u8, len: usize) {
        let (head, tail) = ends(dst, len);
        // SAFETY: as in `load`, with the boundaries taken at `dst`.
        unsafe {
            Portable::store(src, dst, head);
            store_vectors(src.add(head), dst.add(head), tail - head);
            Portable::store(src.add(tail), dst.add(tail), len - tail);
        }
    }

    unsafe fn zero(dst: *mut u8, len: usize) {
        // SAFETY: the caller's promises. Nobody waits for zeros: they are for measurements.
        unsafe { Portable::zero(dst, len) }
    }

    unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> bool {
        let (head, tail) = ends(src, len);
        // SAFETY: as in `load`.
        unsafe {
            differ_vectors(src.add(head), copy.add(head), tail - head)
                | Portable::differ(src, copy, head)
                | Portable::differ(src.add(tail), copy.add(tail), len - tail)
        }
    }

    unsafe fn sum(run: &Run) {
        // SAFETY: the caller's promises.
        unsafe { fused::sum::<Self>(run) }
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

/// XORs `src` into `dst`, as far as the shorter of them reaches.
fn xor_into(dst: &mut [u8], src: &[u8]) {
    #[target_feature(enable = "avx2")]
    fn vectors(dst: &mut [u8], src: &[u8]) {
        portable::xor_into(dst, src);
    }
    // SAFETY: the machine has AVX2.
    unsafe { vectors(dst, src) }
}

/// Adds `c * src` to `dst`, as far as the shorter of them reaches.
fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
    #[target_feature(enable = "avx2")]
    fn vectors(dst: &mut [u8], src: &[u8], c: u8) {
        let factor = Factor::new(c);
        let (mut d, mut s) = (dst.chunks_exact_mut(VECTOR), src.chunks_exact(VECTOR));
        for (d, s) in (&mut d).zip(&mut s) {
            // SAFETY: a chunk has the bytes of a vector; neither needs an alignment.
            unsafe {
                let sum = _mm256_xor_si256(load(d.as_ptr()), factor.times(load(s.as_ptr())));
                store(d.as_mut_ptr(), sum);
            }
        }
        portable::mul_xor_into(d.into_remainder(), s.remainder(), c);
    }
    let len = dst.len().min(src.len());
    // SAFETY: the machine has AVX2.
    unsafe { vectors(&mut dst[..len], &src[..len], c) }
}

/// Multiplies each byte by `c`.
fn scale(buf: &mut [u8], c: u8) {
    #[target_feature(enable = "avx2")]
    fn vectors(buf: &mut [u8], c: u8) {
        let factor = Factor::new(c);
        let mut chunks = buf.chunks_exact_mut(VECTOR);
        for chunk in &mut chunks {
            // SAFETY: a chunk has the bytes of a vector; it needs no alignment.
            unsafe { store(chunk.as_mut_ptr(), factor.times(load(chunk.as_ptr()))) };
        }
        portable::scale(chunks.into_remainder(), c);
    }
    // SAFETY: the machine has AVX2.
    unsafe { vectors(buf, c) }
}

/// P and Q of stable columns.
fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    let whole = if columns.is_empty() { 0 } else { p.len() - p.len() % (2 * VECTOR) };
    // SAFETY: the machine has AVX2; all have this length.
    unsafe { <Avx2<false> as Vectors>::parities(columns, p.as_mut_ptr(), q.as_mut_ptr(), whole) };
    portable::parities_from(whole, columns, p, q);
}

/// A number of the field, ready to multiply vectors by: its products with each lower and with each
/// upper half of a byte.
#[derive(Clone, Copy)]
pub(crate) struct Factor([__m256i; 2]);

impl Factor {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(c: u8) -> Factor {
        let [low, high] = &tables::NIBBLES[usize::from(c)];
        // SAFETY: a table has 16 bytes.
        let everywhere = |table: &[u8; 16]| unsafe {
            _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()))
        };
        Factor([everywhere(low), everywhere(high)])
    }

    /// Multiplies each byte of `data`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn times(self, data: __m256i) -> __m256i {
        let half = _mm256_set1_epi8(0x0f);
        let low = _mm256_and_si256(data, half);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(data), half);
        let [of_low, of_high] = self.0;
        _mm256_xor_si256(_mm256_shuffle_epi8(of_low, low), _mm256_shuffle_epi8(of_high, high))
    }
}

/// Moves 128 bits up by the distance that `by` stands for.
#[inline]
#[target_feature(enable = "sse2,pclmulqdq")]
fn moved(sum: __m128i, by: __m128i) -> __m128i {
    let low = _mm_clmulepi64_si128::<0x00>(sum, by);
    let high = _mm_clmulepi64_si128::<0x11>(sum, by);
    _mm_xor_si128(low, high)
}

/// How foreign memory is accessed: words and bytes up to a word boundary, whole vectors, and the
/// rest. No word lies across two of them (ONCE-2).
fn ends(foreign: *const u8, len: usize) -> (usize, usize) {
    let head = to_word_boundary(foreign, len);
    (head, len - (len - head) % VECTOR)
}

/// Copies foreign bytes, each loaded once; `len` is a number of vectors.
///
/// # Safety
///
/// That of [`Pieces::load`]; `src` is at a word boundary.
#[target_feature(enable = "avx2")]
unsafe fn load_vectors(src: *const u8, dst: *mut u8, len: usize) {
    for at in (0..len).step_by(VECTOR) {
        // SAFETY: at + VECTOR <= len.
        unsafe { store(dst.add(at), load_once(src.add(at))) };
    }
}

/// Copies bytes to foreign memory; `len` is a number of vectors.
///
/// # Safety
///
/// That of [`Pieces::store`]; `dst` is at a word boundary.
#[target_feature(enable = "avx2")]
unsafe fn store_vectors(src: *const u8, dst: *mut u8, len: usize) {
    for at in (0..len).step_by(VECTOR) {
        // SAFETY: at + VECTOR <= len.
        unsafe { store_once(dst.add(at), load(src.add(at))) };
    }
}

/// Whether foreign bytes, each loaded once, differ from a copy; `len` is a number of vectors.
///
/// # Safety
///
/// That of [`Pieces::differ`]; `src` is at a word boundary.
#[target_feature(enable = "avx2")]
unsafe fn differ_vectors(src: *const u8, copy: *const u8, len: usize) -> bool {
    let mut difference = _mm256_setzero_si256();
    for at in (0..len).step_by(VECTOR) {
        // SAFETY: at + VECTOR <= len.
        let (data, copy) = unsafe { (load_once(src.add(at)), load(copy.add(at))) };
        difference = _mm256_or_si256(difference, _mm256_xor_si256(data, copy));
    }
    _mm256_testz_si256(difference, difference) == 0
}

/// Loads a vector of foreign bytes, once.
///
/// # Safety
///
/// `src` is guarded foreign memory of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_once(src: *const u8) -> __m256i {
    let data;
    // SAFETY: reads the vector at `src` and changes nothing but its output. Without `pure` the
    // compiler may neither repeat nor leave out what this does.
    unsafe {
        asm!(
            "vmovdqu {data}, [{src}]",
            src = in(reg) src,
            data = lateout(ymm_reg) data,
            options(readonly, nostack, preserves_flags),
        );
    }
    data
}

/// Stores a vector to foreign memory, once.
///
/// # Safety
///
/// `dst` is guarded foreign memory of [`VECTOR`] bytes at a word boundary.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_once(dst: *mut u8, data: __m256i) {
    // SAFETY: writes the VECTOR bytes at `dst` and nothing else.
    unsafe {
        asm!(
            "vmovdqu [{dst}], {data}",
            dst = in(reg) dst,
            data = in(ymm_reg) data,
            options(nostack, preserves_flags),
        );
    }
}

/// Loads a vector of stable bytes.
///
/// # Safety
///
/// `src` is valid for reads of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(src: *const u8) -> __m256i {
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe { _mm256_loadu_si256(src.cast()) }
}

/// Stores a vector to memory of ours.
///
/// # Safety
///
/// `dst` is valid for writes of [`VECTOR`] bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(dst: *mut u8, data: __m256i) {
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe { _mm256_storeu_si256(dst.cast(), data) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gf;

    #[test]
    fn multiplying_agrees_with_the_table() {
        if !is_available::<false>() {
            return;
        }
        for c in 0..=u8::MAX {
            let data: [u8; 256] = std::array::from_fn(|i| i as u8);
            let mut product = data;
            scale(&mut product, c);
            assert_eq!(product, data.map(|byte| gf::mul(c, byte)), "{c}");
        }
    }
}
