//! The fused loop: each 64 bytes are loaded once, and stored, folded into the CRC, XORed into P and
//! multiplied into Q out of the same register.
//!
//! Foreign loads are inline assembly: the compiler must not repeat them (ONCE-1). A 512-bit load
//! is taken to be a single access to each aligned 8-byte word in it (ONCE-2). The manuals promise
//! single access only up to 16 bytes; every x86 with AVX-512 moves data between core and cache
//! in units that are whole aligned words, also where the load lies across two cache lines. The
//! racing test in `tests/once.rs` would see it torn.
//!
//! The CRC is folded in [`LANES`] independent registers, because a fold waits for the one before
//! it. See [`folding`] for the algebra.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::by_block::{self, Pieces, WORD, to_word_boundary};
use crate::fault::guarded;
use crate::gf::tables;
use crate::guard::folding;
use crate::portable::{self, Portable};
use crate::{BLOCK, Fault, Parities, Parity};

/// Whether this machine can run the functions of this module.
pub(crate) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("vpclmulqdq")
}

/// The plain copies, and what is needed for sources that are not word-aligned. Only used where
/// [`is_available`].
pub(crate) struct Avx512;

/// [`crate::stabilize_blocks`].
///
/// # Safety
///
/// That of [`crate::stabilize_blocks`], and [`is_available`].
pub(crate) unsafe fn stabilize(
    src: *const u8,
    dst: *mut u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    if !src.addr().is_multiple_of(WORD) {
        // SAFETY: the caller's promises.
        return unsafe { by_block::stabilize::<Avx512>(src, dst, guards, parities) };
    }
    let (first, blocks) = (guards.as_mut_ptr(), guards.len());
    // SAFETY: `src` is the guarded range; the rest is the caller's promise. `run` owns nothing.
    unsafe {
        guarded(src, blocks * BLOCK, move || run::<true, true>(src, dst, first, blocks, parities))
    }
}

/// [`crate::sample_blocks`].
///
/// # Safety
///
/// That of [`crate::sample_blocks`], and [`is_available`].
pub(crate) unsafe fn sample(
    src: *const u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    if !src.addr().is_multiple_of(WORD) {
        // SAFETY: the caller's promises.
        return unsafe { by_block::sample::<Avx512>(src, guards, parities) };
    }
    let (first, blocks) = (guards.as_mut_ptr(), guards.len());
    let nowhere = std::ptr::null_mut();
    // SAFETY: as in `stabilize`; without STORE nothing is written to `nowhere`.
    unsafe {
        guarded(src, blocks * BLOCK, move || {
            run::<true, false>(src, nowhere, first, blocks, parities)
        })
    }
}

/// [`crate::stable_blocks`].
///
/// # Safety
///
/// That of [`crate::stable_blocks`], `data.len() == guards.len() * BLOCK`, and [`is_available`].
pub(crate) unsafe fn stable(data: &[u8], guards: &mut [u64], parities: Parities) {
    let nowhere = std::ptr::null_mut();
    // SAFETY: `data` has a block for each guard; without STORE nothing is written to `nowhere`.
    unsafe {
        run::<false, false>(data.as_ptr(), nowhere, guards.as_mut_ptr(), guards.len(), parities)
    }
}

/// XORs `src` into `dst`, as far as the shorter of them reaches. Only called where
/// [`is_available`].
pub(crate) fn xor_into(dst: &mut [u8], src: &[u8]) {
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

/// Adds `c * src` to `dst`, as far as the shorter of them reaches. Only called where
/// [`is_available`].
pub(crate) fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8) {
    #[target_feature(enable = "avx512f,avx512bw")]
    fn vectors(dst: &mut [u8], src: &[u8], c: u8) {
        let factor = Factor::new(c);
        let (mut d, mut s) = (dst.chunks_exact_mut(VECTOR), src.chunks_exact(VECTOR));
        for (d, s) in (&mut d).zip(&mut s) {
            // SAFETY: a chunk has the bytes of a vector; neither needs an alignment.
            unsafe { put::<XOR>(d.as_mut_ptr(), factor.times(load(s.as_ptr()))) };
        }
        portable::mul_xor_into(d.into_remainder(), s.remainder(), c);
    }
    let len = dst.len().min(src.len());
    // SAFETY: the machine has AVX-512.
    unsafe { vectors(&mut dst[..len], &src[..len], c) }
}

/// Multiplies each byte by `c`. Only called where [`is_available`].
pub(crate) fn scale(buf: &mut [u8], c: u8) {
    #[target_feature(enable = "avx512f,avx512bw")]
    fn vectors(buf: &mut [u8], c: u8) {
        let factor = Factor::new(c);
        let mut chunks = buf.chunks_exact_mut(VECTOR);
        for chunk in &mut chunks {
            // SAFETY: a chunk has the bytes of a vector; it needs no alignment.
            unsafe { put::<SET>(chunk.as_mut_ptr(), factor.times(load(chunk.as_ptr()))) };
        }
        portable::scale(chunks.into_remainder(), c);
    }
    // SAFETY: the machine has AVX-512.
    unsafe { vectors(buf, c) }
}

impl Pieces for Avx512 {
    unsafe fn load(src: *const u8, dst: *mut u8, len: usize) {
        let head = to_word_boundary(src, len);
        // SAFETY: the machine has AVX-512. The ranges are cut in three parts; the middle one
        // starts at a word boundary of `src`, and the last one where a vector ended, at another.
        unsafe {
            Portable::load(src, dst, head);
            let body = load_vectors(src.add(head), dst.add(head), len - head);
            Portable::load(src.add(head + body), dst.add(head + body), len - head - body);
        }
    }

    unsafe fn store(src: *const u8, dst: *mut u8, len: usize) {
        let head = to_word_boundary(dst, len);
        // SAFETY: as in `load`, with the boundaries taken at `dst`.
        unsafe {
            Portable::store(src, dst, head);
            let body = store_vectors(src.add(head), dst.add(head), len - head);
            Portable::store(src.add(head + body), dst.add(head + body), len - head - body);
        }
    }

    unsafe fn zero(dst: *mut u8, len: usize) {
        let head = to_word_boundary(dst, len);
        // SAFETY: as in `store`.
        unsafe {
            Portable::zero(dst, head);
            let body = zero_vectors(dst.add(head), len - head);
            Portable::zero(dst.add(head + body), len - head - body);
        }
    }

    unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> bool {
        let head = to_word_boundary(src, len);
        // SAFETY: as in `load`.
        unsafe {
            let body = head + (len - head) / STEP * STEP;
            differ_vectors(src.add(head), copy.add(head), body - head)
                | Portable::differ(src, copy, head)
                | Portable::differ(src.add(body), copy.add(body), len - body)
        }
    }

    unsafe fn stable(block: &[u8], parities: Parities) -> u64 {
        let mut guard = 0;
        // SAFETY: one block, one guard; the caller's promise about the parities.
        unsafe { stable(block, std::slice::from_mut(&mut guard), parities) };
        guard
    }
}

/// Bytes of a register.
const VECTOR: usize = 64;

/// Registers that are folded independently of each other.
const LANES: usize = 4;

/// Bytes that one step of the loop takes.
const STEP: usize = LANES * VECTOR;

/// The parity modes, as constants that a loop can be compiled for.
const NONE: u8 = 0;
const SET: u8 = 1;
const XOR: u8 = 2;

/// Where the bytes of a run go, apart from the guards.
#[derive(Clone, Copy)]
struct Places {
    dst: *mut u8,
    p: *mut u8,
    q: *mut u8,
}

impl Places {
    /// The places of what lies `bytes` further on.
    fn at(self, bytes: usize) -> Places {
        // Wrapping, because those that nothing is written to may point nowhere.
        let Places { dst, p, q } = self;
        Places { dst: dst.wrapping_add(bytes), p: p.wrapping_add(bytes), q: q.wrapping_add(bytes) }
    }
}

/// Picks the loop that is compiled for this kind of P.
///
/// # Safety
///
/// `src` has `blocks` blocks: guarded foreign memory at a word boundary if FOREIGN, else stable.
/// `guards` is valid for `blocks` guards; `dst`, if STORE, and the parities for as many blocks.
/// None of them overlap. The machine has AVX-512. A fault may abandon this: it owns nothing.
unsafe fn run<const FOREIGN: bool, const STORE: bool>(
    src: *const u8,
    dst: *mut u8,
    guards: *mut u64,
    blocks: usize,
    parities: Parities,
) {
    let nowhere = std::ptr::null_mut();
    let places = |p| Places { dst, p, q: nowhere };
    let (q, c) = (parities.q, parities.coefficient);
    // SAFETY: the caller's promises; without P nothing is written to `nowhere`.
    unsafe {
        match parities.p {
            Parity::None => {
                run_q::<FOREIGN, STORE, NONE>(src, places(nowhere), guards, blocks, q, c);
            }
            Parity::Set(p) => run_q::<FOREIGN, STORE, SET>(src, places(p), guards, blocks, q, c),
            Parity::Xor(p) => run_q::<FOREIGN, STORE, XOR>(src, places(p), guards, blocks, q, c),
        }
    }
}

/// Picks the loop that is compiled for this kind of Q, for which `places` has none.
///
/// # Safety
///
/// That of [`run`].
unsafe fn run_q<const FOREIGN: bool, const STORE: bool, const P: u8>(
    src: *const u8,
    places: Places,
    guards: *mut u64,
    blocks: usize,
    q: Parity,
    c: u8,
) {
    let with = |q| Places { q, ..places };
    // SAFETY: the caller's promises; without Q nothing is written there.
    unsafe {
        match q {
            Parity::None => pass::<FOREIGN, STORE, P, NONE>(src, places, guards, blocks, c),
            Parity::Set(q) => pass::<FOREIGN, STORE, P, SET>(src, with(q), guards, blocks, c),
            Parity::Xor(q) => pass::<FOREIGN, STORE, P, XOR>(src, with(q), guards, blocks, c),
        }
    }
}

/// The loop over the blocks of a run.
///
/// # Safety
///
/// That of [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
unsafe fn pass<const FOREIGN: bool, const STORE: bool, const P: u8, const Q: u8>(
    src: *const u8,
    places: Places,
    guards: *mut u64,
    blocks: usize,
    coefficient: u8,
) {
    let factor = Factor::new(coefficient);
    for index in 0..blocks {
        let at = index * BLOCK;
        // SAFETY: index < blocks, so this block and its guard lie in the caller's ranges.
        unsafe {
            let guard = block::<FOREIGN, STORE, P, Q>(src.add(at), places.at(at), factor);
            guards.add(index).write(guard);
        }
    }
}

/// The loop over one block; returns its guard.
///
/// # Safety
///
/// That of [`run`], for one block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
unsafe fn block<const FOREIGN: bool, const STORE: bool, const P: u8, const Q: u8>(
    src: *const u8,
    places: Places,
    factor: Factor,
) -> u64 {
    const { assert!(BLOCK.is_multiple_of(STEP)) };
    let by_step = everywhere(const { folding::by(8 * STEP as u32) });
    // SAFETY: the first step of the block.
    let mut sums = unsafe { step::<FOREIGN, STORE, P, Q>(src, places, factor) };
    // The initial value, all ones, is an addition to the first 64 bits of the block.
    sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_set_epi64x(0, -1)));
    for at in (STEP..BLOCK).step_by(STEP) {
        // SAFETY: at + STEP <= BLOCK.
        let next = unsafe { step::<FOREIGN, STORE, P, Q>(src.add(at), places.at(at), factor) };
        for (sum, next) in sums.iter_mut().zip(next) {
            *sum = fold(*sum, by_step, next);
        }
    }
    !reduce(sums)
}

/// Loads [`STEP`] bytes, puts them where they belong, and returns them.
///
/// # Safety
///
/// That of [`run`], for one step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn step<const FOREIGN: bool, const STORE: bool, const P: u8, const Q: u8>(
    src: *const u8,
    places: Places,
    factor: Factor,
) -> [__m512i; LANES] {
    // SAFETY: `src` has STEP bytes, guarded if they are foreign.
    let data = unsafe { if FOREIGN { load_step_once(src) } else { load_step(src) } };
    for (lane, data) in data.into_iter().enumerate() {
        let Places { dst, p, q } = places.at(lane * VECTOR);
        // SAFETY: each place that is named has STEP bytes, initialised ones if they are to be read.
        unsafe {
            if STORE {
                put::<SET>(dst, data);
            }
            put::<P>(p, data);
            if Q != NONE {
                put::<Q>(q, factor.times(data));
            }
        }
    }
    data
}

/// Stores a vector to memory of ours, or XORs it into what lies there, or does nothing.
///
/// # Safety
///
/// Unless MODE is [`NONE`], `at` is valid for writes of [`VECTOR`] bytes; for reads of initialised
/// ones too if it is [`XOR`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put<const MODE: u8>(at: *mut u8, data: __m512i) {
    if MODE == NONE {
        return;
    }
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe {
        let sum = if MODE == XOR { _mm512_xor_si512(load(at), data) } else { data };
        _mm512_storeu_si512(at.cast(), sum);
    }
}

/// A number of the field, ready to multiply vectors by.
#[derive(Clone, Copy)]
struct Factor {
    /// Whether the machine has the instruction that takes `matrix`; else the nibbles serve.
    has_gfni: bool,
    matrix: __m512i,
    nibbles: [__m512i; 2],
}

impl Factor {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(c: u8) -> Factor {
        let nibbles = &tables::NIBBLES[usize::from(c)];
        // SAFETY: a table has 16 bytes.
        let everywhere = |table: &[u8; 16]| unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        Factor {
            has_gfni: is_x86_feature_detected!("gfni"),
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
        if self.has_gfni {
            let product;
            // SAFETY: computes with registers only; the machine has GFNI. In assembly, so that it
            // can stand in the loops that are compiled for machines without.
            unsafe {
                asm!(
                    "vgf2p8affineqb {product}, {data}, {matrix}, 0",
                    product = lateout(zmm_reg) product,
                    data = in(zmm_reg) data,
                    matrix = in(zmm_reg) self.matrix,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            return product;
        }
        let half = _mm512_set1_epi8(0x0f);
        let low = _mm512_and_si512(data, half);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(data), half);
        let [of_low, of_high] = self.nibbles;
        _mm512_xor_si512(_mm512_shuffle_epi8(of_low, low), _mm512_shuffle_epi8(of_high, high))
    }
}

/// Loads [`STEP`] foreign bytes, once.
///
/// # Safety
///
/// `src` is guarded foreign memory of STEP bytes at a word boundary.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_step_once(src: *const u8) -> [__m512i; LANES] {
    let (a, b, c, d);
    // SAFETY: reads the STEP bytes at `src` and changes nothing but its outputs. Without `pure` the
    // compiler may neither repeat nor leave out what this does.
    unsafe {
        asm!(
            "vmovdqu64 {a}, [{src}]",
            "vmovdqu64 {b}, [{src} + 64]",
            "vmovdqu64 {c}, [{src} + 128]",
            "vmovdqu64 {d}, [{src} + 192]",
            src = in(reg) src,
            a = out(zmm_reg) a,
            b = out(zmm_reg) b,
            c = out(zmm_reg) c,
            d = out(zmm_reg) d,
            options(readonly, nostack, preserves_flags),
        );
    }
    [a, b, c, d]
}

/// Loads [`STEP`] stable bytes.
///
/// # Safety
///
/// `src` is valid for reads of STEP bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_step(src: *const u8) -> [__m512i; LANES] {
    // SAFETY: four vectors, as the caller promises.
    unsafe { [load(src), load(src.add(64)), load(src.add(128)), load(src.add(192))] }
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

/// Copies as many foreign bytes as make whole steps, each loaded once; returns how many.
///
/// # Safety
///
/// That of [`Pieces::load`]; `src` is at a word boundary.
#[target_feature(enable = "avx512f")]
unsafe fn load_vectors(src: *const u8, dst: *mut u8, len: usize) -> usize {
    let body = len - len % STEP;
    for at in (0..body).step_by(STEP) {
        // SAFETY: at + STEP <= len.
        let data = unsafe { load_step_once(src.add(at)) };
        for (lane, data) in data.into_iter().enumerate() {
            // SAFETY: `dst` has STEP bytes there.
            unsafe { put::<SET>(dst.add(at + lane * VECTOR), data) };
        }
    }
    body
}

/// Whether foreign bytes, each loaded once, differ from a copy; `len` is a number of steps.
///
/// # Safety
///
/// That of [`Pieces::differ`]; `src` is at a word boundary.
#[target_feature(enable = "avx512f")]
unsafe fn differ_vectors(src: *const u8, copy: *const u8, len: usize) -> bool {
    let mut difference = _mm512_setzero_si512();
    for at in (0..len).step_by(STEP) {
        // SAFETY: at + STEP <= len.
        let data = unsafe { load_step_once(src.add(at)) };
        for (lane, data) in data.into_iter().enumerate() {
            // SAFETY: `copy` has STEP bytes there.
            let copy = unsafe { load(copy.add(at + lane * VECTOR)) };
            difference = _mm512_or_si512(difference, _mm512_xor_si512(data, copy));
        }
    }
    _mm512_test_epi64_mask(difference, difference) != 0
}

/// Copies as many bytes as make whole vectors to foreign memory; returns how many.
///
/// # Safety
///
/// That of [`Pieces::store`]; `dst` is at a word boundary.
#[target_feature(enable = "avx512f")]
unsafe fn store_vectors(src: *const u8, dst: *mut u8, len: usize) -> usize {
    let body = len - len % VECTOR;
    for at in (0..body).step_by(VECTOR) {
        // SAFETY: at + VECTOR <= len.
        unsafe { store_once(dst.add(at), load(src.add(at))) };
    }
    body
}

/// Writes zeros to as much foreign memory as makes whole vectors; returns how many bytes.
///
/// # Safety
///
/// That of [`Pieces::zero`]; `dst` is at a word boundary.
#[target_feature(enable = "avx512f")]
unsafe fn zero_vectors(dst: *mut u8, len: usize) -> usize {
    let body = len - len % VECTOR;
    for at in (0..body).step_by(VECTOR) {
        // SAFETY: at + VECTOR <= len.
        unsafe { store_once(dst.add(at), _mm512_setzero_si512()) };
    }
    body
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

/// Moves each 128 bits of `sum` up by the distance that `by` stands for, and adds `next`.
#[inline]
#[target_feature(enable = "avx512f,vpclmulqdq")]
fn fold(sum: __m512i, by: __m512i, next: __m512i) -> __m512i {
    const XOR3: i32 = 0x96;
    let low = _mm512_clmulepi64_epi128::<0x00>(sum, by);
    let high = _mm512_clmulepi64_epi128::<0x11>(sum, by);
    _mm512_ternarylogic_epi64::<XOR3>(low, high, next)
}

/// The CRC, not yet inverted, of what the registers hold one after the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
fn reduce(sums: [__m512i; LANES]) -> u64 {
    let [a, b, c, d] = sums;
    let by_vector = everywhere(const { folding::by(512) });
    let by_two_vectors = everywhere(const { folding::by(1024) });
    let (ab, cd) = (fold(a, by_vector, b), fold(c, by_vector, d));
    reduce_vector(fold(ab, by_two_vectors, cd))
}

/// The CRC, not yet inverted, of what one register holds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,pclmulqdq,vpclmulqdq")]
fn reduce_vector(sum: __m512i) -> u64 {
    // The first three quarters move onto the last one; the last one stays where it is.
    let [[k0, k1], [k2, k3], [k4, k5]] =
        const { [folding::by(384), folding::by(256), folding::by(128)] };
    let by_quarters = _mm512_set_epi64(0, 0, k5, k4, k3, k2, k1, k0);
    let last = _mm512_maskz_mov_epi64(0b1100_0000, sum);
    let sum = fold(sum, by_quarters, last);
    let half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64::<1>(sum));
    let sum = _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));

    // The CRC is V * x^64 mod P. The lower half of V needs no folding to be moved up by 64 bits; it
    // still fits. With the folded upper half it makes U * x^64 + W, of the same remainder.
    let [by_64, _] = const { folding::by(64) };
    let low = _mm_clmulepi64_si128::<0x00>(sum, _mm_set_epi64x(0, by_64));
    let sum = _mm_xor_si128(low, _mm_srli_si128::<8>(sum));

    // Barrett: q = floor(U * x^64 / P), and what remains is W + q * P, of which the powers from
    // x^64 up cancel out.
    let [over, polynomial] = [folding::BARRETT_OVER_X, folding::POLYNOMIAL_OVER_X];
    let quotient = _mm_clmulepi64_si128::<0x00>(sum, _mm_set_epi64x(0, over));
    let product = _mm_clmulepi64_si128::<0x00>(quotient, _mm_set_epi64x(0, polynomial));
    let rest = _mm_srli_si128::<8>(_mm_xor_si128(sum, product));
    _mm_cvtsi128_si64(_mm_xor_si128(rest, quotient)) as u64
}

/// The two constants of a fold in every 128 bits of a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn everywhere([low, high]: [i64; 2]) -> __m512i {
    _mm512_broadcast_i32x4(_mm_set_epi64x(high, low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gf;

    /// On one machine the loops only ever take one of the two ways.
    #[test]
    fn both_ways_of_multiplying_agree_with_the_table() {
        #[target_feature(enable = "avx512f,avx512bw")]
        fn product(c: u8, data: &[u8; VECTOR], has_gfni: bool) -> [u8; VECTOR] {
            let factor = Factor { has_gfni, ..Factor::new(c) };
            let mut product = [0; VECTOR];
            // SAFETY: both have the bytes of a vector.
            unsafe { put::<SET>(product.as_mut_ptr(), factor.times(load(data.as_ptr()))) };
            product
        }
        if !is_available() {
            return;
        }
        for c in 0..=u8::MAX {
            for first in (0..=u8::MAX).step_by(VECTOR) {
                let data = std::array::from_fn(|i| first + i as u8);
                let expected = data.map(|byte| gf::mul(c, byte));
                // SAFETY: the machine has AVX-512.
                assert_eq!(unsafe { product(c, &data, false) }, expected, "nibbles of {c}");
                if is_x86_feature_detected!("gfni") {
                    // SAFETY: as above, and GFNI.
                    assert_eq!(unsafe { product(c, &data, true) }, expected, "matrix of {c}");
                }
            }
        }
    }
}
