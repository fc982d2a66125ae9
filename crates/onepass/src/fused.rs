//! The fused loop: each vector is loaded once, and stored, folded into the CRC, XORed into P and
//! multiplied into Q out of the same register.
//!
//! One loop for all: it is compiled for each instruction set ([`Vectors`]), each CRC ([`Crc`]), each
//! way of storing and with or without parity. A tier says what its vectors are, and no more.
//!
//! The CRC is folded in several registers, *lanes*, that do not depend on each other, because a
//! fold waits for the one before it. See [`Algorithm::fold_by`] for the algebra.
//!
//! How it gets compiled for an instruction set: everything generic is `inline(always)` into
//! [`Vectors::pass`], which a tier implements as a function with its features enabled. So the
//! vectors never cross a function's border, where they would go through memory. Closures would be
//! functions without the features: here are loops instead.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use crate::guard::{Algorithm, CRC16_T10_DIF, CRC32C, CRC64_NVME};
use crate::{Across, Guard, Parities, Parity, Run};

/// A CRC as a type, to compile the loop for.
pub(crate) trait Crc {
    const CRC: Algorithm;
}

pub(crate) struct Crc16T10Dif;
pub(crate) struct Crc32c;
pub(crate) struct Crc64Nvme;

impl Crc for Crc16T10Dif {
    const CRC: Algorithm = CRC16_T10_DIF;
}

impl Crc for Crc32c {
    const CRC: Algorithm = CRC32C;
}

impl Crc for Crc64Nvme {
    const CRC: Algorithm = CRC64_NVME;
}

/// The vectors of an instruction set, and the loop compiled for them.
///
/// # Safety
///
/// Every function needs a machine with the instruction set of the implementation. Those that take
/// addresses need [`Vectors::BYTES`] valid bytes there, of any alignment if not said otherwise.
pub(crate) trait Vectors {
    /// A register; some 128-bit registers side by side.
    type Vector: Copy;
    /// A number of the field of Q, ready to multiply vectors by.
    type Factor: Copy;
    /// Bytes of a register.
    const BYTES: usize;

    /// [`pass`], with the features of the instruction set enabled.
    unsafe fn pass<K: Crc, const STORE: u8, const PARITY: bool>(run: &Run);
    /// [`across::pass`](crate::across::pass), with the features of the instruction set enabled.
    unsafe fn across<K: Crc>(run: &Across);
    /// [`parities`], with the features of the instruction set enabled.
    unsafe fn parities(columns: &[&[u8]], p: *mut u8, q: *mut u8, len: usize);

    /// Loads foreign bytes by one instruction that is executed once (ONCE-1, ONCE-2).
    unsafe fn load_once(src: *const u8) -> Self::Vector;
    unsafe fn load(src: *const u8) -> Self::Vector;
    unsafe fn store(dst: *mut u8, data: Self::Vector);
    /// Stores past the caches. `dst` is aligned to a register.
    unsafe fn stream(dst: *mut u8, data: Self::Vector);
    unsafe fn xor(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Puts the bytes of each 128-bit register in the opposite order.
    unsafe fn swap(data: Self::Vector) -> Self::Vector;
    /// The two halves in every 128-bit register.
    unsafe fn everywhere(halves: [i64; 2]) -> Self::Vector;
    /// A vector whose first eight bytes are these; the others are zeros.
    unsafe fn first(word: u64) -> Self::Vector;
    /// Moves each 128-bit register of `sum` up by the distance that `by` stands for; adds `next`.
    unsafe fn fold(sum: Self::Vector, by: Self::Vector, next: Self::Vector) -> Self::Vector;
    /// Whether [`fold_bytes`](Self::fold_bytes) is there, and faster than [`fold`](Self::fold).
    const FOLDS_BYTES: bool;
    /// Multiplies the bytes of each half of 64 bits by the bit matrix in that half of `straight`,
    /// and those of the other half by that of `crossed`; adds both, and `next`. Matrices are as
    /// `gf2p8affineqb` takes them.
    unsafe fn fold_bytes(
        sum: Self::Vector,
        straight: Self::Vector,
        crossed: Self::Vector,
        next: Self::Vector,
    ) -> Self::Vector;
    /// Moves every 128-bit register onto the last one; `by[i]` is `fold_by(128 * (i + 1))`.
    unsafe fn join(sum: Self::Vector, by: [[i64; 2]; 3]) -> __m128i;
    unsafe fn factor(c: u8) -> Self::Factor;
    /// Multiplies each byte.
    unsafe fn times(factor: Self::Factor, data: Self::Vector) -> Self::Vector;
}

/// The ways of storing the copy, as constants that a loop can be compiled for.
pub(crate) const NOWHERE: u8 = 0;
pub(crate) const CACHED: u8 = 1;
pub(crate) const STREAMED: u8 = 2;

/// Does what the run says, in the loop that is compiled for it.
///
/// # Safety
///
/// [`Run`]'s promises, and those of [`Vectors`]. What of the source is foreign is guarded, and a
/// fault may abandon this: it owns nothing.
pub(crate) unsafe fn sum<T: Vectors>(run: &Run) {
    // SAFETY: the caller's promises.
    unsafe {
        match run.format.guard {
            Guard::Crc16T10Dif => sum_of::<T, Crc16T10Dif>(run),
            Guard::Crc32c => sum_of::<T, Crc32c>(run),
            Guard::Crc64Nvme => sum_of::<T, Crc64Nvme>(run),
        }
    }
}

/// # Safety
///
/// That of [`sum`].
unsafe fn sum_of<T: Vectors, K: Crc>(run: &Run) {
    let parity = (run.parities.p, run.parities.q) != (Parity::None, Parity::None);
    let streams = run.streams && run.copy.addr().is_multiple_of(T::BYTES);
    // SAFETY: the caller's promises; STORE is NOWHERE if there is no copy, and STREAMED only if
    // that is aligned.
    unsafe {
        match (run.copy.is_null(), streams, parity) {
            (true, _, false) => T::pass::<K, NOWHERE, false>(run),
            (true, _, true) => T::pass::<K, NOWHERE, true>(run),
            (false, false, false) => T::pass::<K, CACHED, false>(run),
            (false, false, true) => T::pass::<K, CACHED, true>(run),
            (false, true, parity) => {
                if parity {
                    T::pass::<K, STREAMED, true>(run);
                } else {
                    T::pass::<K, STREAMED, false>(run);
                }
                // Streamed stores are not ordered with others; whoever is told that the copy is
                // there must see it.
                _mm_sfence();
            }
        }
    }
}

/// The loop over the intervals of a run.
///
/// # Safety
///
/// That of [`sum`], and STORE and PARITY fit the run.
#[inline(always)]
pub(crate) unsafe fn pass<T: Vectors, K, const LANES: usize, const STORE: u8, const PARITY: bool>(
    run: &Run,
) where
    K: Crc,
{
    let bytes = run.format.interval.bytes();
    // SAFETY: of the machine's features only.
    let factor = if PARITY { Some(unsafe { T::factor(run.parities.coefficient) }) } else { None };
    // In locals, because what is stored through the pointers might change what lies in memory.
    let Run { src, copy, old, parities, guards, intervals, .. } = *run;
    for index in 0..intervals {
        let at = index * bytes;
        let here = Places {
            src: src.wrapping_add(at),
            copy: copy.wrapping_add(at),
            old: if PARITY && !old.is_null() { old.wrapping_add(at) } else { std::ptr::null() },
            parities: if PARITY { parities.at(at) } else { Parities::NONE },
        };
        // SAFETY: index < intervals, so this interval and its guard lie in the caller's ranges.
        unsafe {
            let guard = interval::<T, K, LANES, STORE, PARITY>(here, bytes, factor);
            guards.add(index).write(guard);
        }
    }
}

/// Where an interval comes from and goes to; as in [`Run`].
#[derive(Clone, Copy)]
struct Places {
    src: *const u8,
    copy: *mut u8,
    old: *const u8,
    parities: Parities,
}

/// The loop over one interval; returns its guard.
///
/// # Safety
///
/// That of [`pass`], for one interval of that many bytes.
#[inline(always)]
unsafe fn interval<T: Vectors, K: Crc, const LANES: usize, const STORE: u8, const PARITY: bool>(
    places: Places,
    bytes: usize,
    factor: Option<T::Factor>,
) -> u64 {
    let step_bytes = LANES * T::BYTES;
    const { assert!(512 % (LANES * T::BYTES) == 0, "an interval is a number of steps") };
    // SAFETY: at + step_bytes <= bytes; the rest is the caller's promise.
    unsafe {
        let by_step = Move::<T, K>::by(const { constants::<T, K>(LANES * T::BYTES) });
        let mut sums = step::<T, K, LANES, STORE, PARITY>(places, 0, factor);
        sums[0] = started::<T, K>(sums[0]);
        let mut at = step_bytes;
        while at < bytes {
            let next = step::<T, K, LANES, STORE, PARITY>(places, at, factor);
            for lane in 0..LANES {
                sums[lane] = by_step.onto(sums[lane], next[lane]);
            }
            at += step_bytes;
        }
        reduce::<T, K, LANES>(sums)
    }
}

/// Loads a vector for each lane from `at` on, puts them where they belong, and returns them, ready
/// to be folded.
///
/// # Safety
///
/// That of [`pass`], for one step.
#[inline(always)]
unsafe fn step<T: Vectors, K: Crc, const LANES: usize, const STORE: u8, const PARITY: bool>(
    places: Places,
    at: usize,
    factor: Option<T::Factor>,
) -> [T::Vector; LANES] {
    // SAFETY: each place that is named has a step's bytes from `at` on, initialised ones if they
    // are to be read.
    unsafe {
        let src = places.src.wrapping_add(at);
        let mut data = [T::load_once(src); LANES];
        for (lane, data) in data.iter_mut().enumerate().skip(1) {
            *data = T::load_once(src.wrapping_add(lane * T::BYTES));
        }
        if let Some(factor) = factor {
            take_up::<T, LANES>(places, at, data, factor);
        }
        // Behind the parities: a load may be taken to depend on a store to the same place of
        // another page, and parity lies there as a rule.
        if STORE != NOWHERE {
            for (lane, data) in data.into_iter().enumerate() {
                let dst = places.copy.wrapping_add(at + lane * T::BYTES);
                if STORE == STREAMED { T::stream(dst, data) } else { T::store(dst, data) }
            }
        }
        for data in &mut data {
            *data = ordered::<T, K>(*data);
        }
        data
    }
}

/// The first bytes of an interval, with what the CRC starts from.
///
/// # Safety
///
/// That of [`Vectors`].
#[inline(always)]
pub(crate) unsafe fn started<T: Vectors, K: Crc>(first: T::Vector) -> T::Vector {
    // To start from ones is to add them to the first bits.
    const { assert!(K::CRC.is_reflected || !K::CRC.has_ones, "the first bits are low") };
    // SAFETY: the caller's promise.
    if K::CRC.has_ones { unsafe { T::xor(first, T::first(K::CRC.ones())) } } else { first }
}

/// Bytes as they are loaded, in the order in which they are folded.
///
/// # Safety
///
/// That of [`Vectors`].
#[inline(always)]
pub(crate) unsafe fn ordered<T: Vectors, K: Crc>(data: T::Vector) -> T::Vector {
    let in_order = const { K::CRC.is_reflected || folds_bytes::<T, K>() };
    // SAFETY: the caller's promise.
    if in_order { data } else { unsafe { T::swap(data) } }
}

/// Takes vectors up in the parities.
///
/// What is to be done is looked up for each step, so that there need not be a loop for each mode:
/// the branches are the same for the whole run.
///
/// # Safety
///
/// That of [`step`].
#[inline(always)]
unsafe fn take_up<T: Vectors, const LANES: usize>(
    places: Places,
    at: usize,
    mut data: [T::Vector; LANES],
    factor: T::Factor,
) {
    // SAFETY: as in `step`.
    unsafe {
        if !places.old.is_null() {
            data = add::<T, LANES>(places.old.wrapping_add(at), data);
        }
        // All loads come before the stores, for the same reason as in `step`.
        let p = match places.parities.p {
            Parity::Xor(p) => add::<T, LANES>(p.wrapping_add(at), data),
            _ => data,
        };
        if places.parities.q != Parity::None {
            let mut q = data;
            for data in &mut q {
                *data = T::times(factor, *data);
            }
            if let Parity::Xor(to) = places.parities.q {
                q = add::<T, LANES>(to.wrapping_add(at), q);
            }
            put::<T, LANES>(places.parities.q, at, q);
        }
        put::<T, LANES>(places.parities.p, at, p);
    }
}

/// Adds what lies at `from`.
///
/// # Safety
///
/// That of [`step`].
#[inline(always)]
unsafe fn add<T: Vectors, const LANES: usize>(
    from: *const u8,
    mut data: [T::Vector; LANES],
) -> [T::Vector; LANES] {
    for (lane, data) in data.iter_mut().enumerate() {
        // SAFETY: as in `step`.
        *data = unsafe { T::xor(*data, T::load(from.wrapping_add(lane * T::BYTES))) };
    }
    data
}

/// Stores what a parity becomes, if there is one.
///
/// # Safety
///
/// That of [`step`].
#[inline(always)]
pub(crate) unsafe fn put<T: Vectors, const LANES: usize>(
    parity: Parity,
    at: usize,
    data: [T::Vector; LANES],
) {
    if let Parity::Set(to) | Parity::Xor(to) = parity {
        for (lane, data) in data.into_iter().enumerate() {
            // SAFETY: as in `step`.
            unsafe { T::store(to.wrapping_add(at + lane * T::BYTES), data) };
        }
    }
}

/// P and Q of stable columns, without guards: all columns of a place at once, so that sums stay in
/// registers.
///
/// # Safety
///
/// There is a column. Every one has `len` bytes, a number of times 2 * [`Vectors::BYTES`]; P and Q
/// are valid for writes of as many. The machine has the instruction set.
#[inline(always)]
pub(crate) unsafe fn parities<T: Vectors>(columns: &[&[u8]], p: *mut u8, q: *mut u8, len: usize) {
    let Some((last, others)) = columns.split_last() else { return };
    // SAFETY: at + 2 * BYTES <= len.
    unsafe {
        let two = T::factor(2);
        for at in (0..len).step_by(2 * T::BYTES) {
            let last = last.as_ptr().add(at);
            let mut p_sum = [T::load(last), T::load(last.add(T::BYTES))];
            let mut q_sum = p_sum;
            // Horner's rule: from the last column on, Q doubles.
            for column in others.iter().rev() {
                for lane in 0..2 {
                    let data = T::load(column.as_ptr().add(at + lane * T::BYTES));
                    p_sum[lane] = T::xor(p_sum[lane], data);
                    q_sum[lane] = T::xor(T::times(two, q_sum[lane]), data);
                }
            }
            for lane in 0..2 {
                T::store(p.add(at + lane * T::BYTES), p_sum[lane]);
                T::store(q.add(at + lane * T::BYTES), q_sum[lane]);
            }
        }
    }
}

/// Whether the lanes of a CRC are folded by bytes, in the order in which they are loaded; else by
/// halves of 128-bit registers, which are swapped first if the CRC is not reflected.
const fn folds_bytes<T: Vectors, K: Crc>() -> bool {
    T::FOLDS_BYTES && K::CRC.width <= 16
}

/// What moves a lane up by some bytes: constants for every 128-bit register.
pub(crate) const fn constants<T: Vectors, K: Crc>(bytes: usize) -> [[i64; 2]; 2] {
    let distance = 8 * bytes as u32;
    if folds_bytes::<T, K>() {
        K::CRC.fold_bytes_by(distance)
    } else {
        [K::CRC.fold_by(distance), [0, 0]]
    }
}

/// [`constants`], in registers.
pub(crate) struct Move<T: Vectors, K>([T::Vector; 2], PhantomData<K>);

impl<T: Vectors, K: Crc> Move<T, K> {
    /// # Safety
    ///
    /// That of [`Vectors`].
    #[inline(always)]
    pub(crate) unsafe fn by([first, second]: [[i64; 2]; 2]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Move([T::everywhere(first), T::everywhere(second)], PhantomData) }
    }

    /// Moves a lane up, and adds what comes next.
    ///
    /// # Safety
    ///
    /// That of [`Vectors`].
    #[inline(always)]
    pub(crate) unsafe fn onto(&self, sum: T::Vector, next: T::Vector) -> T::Vector {
        let [first, second] = self.0;
        // SAFETY: the caller's promise.
        unsafe {
            if const { folds_bytes::<T, K>() } {
                T::fold_bytes(sum, first, second, next)
            } else {
                T::fold(sum, first, next)
            }
        }
    }
}

/// The guard of what the lanes hold one after the other.
///
/// # Safety
///
/// That of [`Vectors`].
#[inline(always)]
pub(crate) unsafe fn reduce<T: Vectors, K: Crc, const LANES: usize>(
    mut sums: [T::Vector; LANES],
) -> u64 {
    const { assert!(LANES.is_power_of_two()) };
    // Neighbours are joined, until there is one.
    let by = const {
        [
            constants::<T, K>(T::BYTES),
            constants::<T, K>(2 * T::BYTES),
            constants::<T, K>(4 * T::BYTES),
        ]
    };
    // SAFETY: of the machine's features only.
    let sum = unsafe {
        for (round, by) in by.into_iter().enumerate().take(LANES.ilog2() as usize) {
            let by = Move::<T, K>::by(by);
            for lane in 0..LANES >> (round + 1) {
                sums[lane] = by.onto(sums[2 * lane], sums[2 * lane + 1]);
            }
        }
        let quarters = const { [K::CRC.fold_by(128), K::CRC.fold_by(256), K::CRC.fold_by(384)] };
        T::join(if const { folds_bytes::<T, K>() } { T::swap(sums[0]) } else { sums[0] }, quarters)
    };
    // SAFETY: every instruction set with vectors has these two.
    let rest = unsafe { if K::CRC.is_reflected { reflected::<K>(sum) } else { plain::<K>(sum) } };
    if K::CRC.has_ones { rest ^ K::CRC.ones() } else { rest }
}

/// The CRC of 128 bits, reflected: `V * x^64 mod P`.
#[inline]
#[target_feature(enable = "sse2,pclmulqdq")]
fn reflected<K: Crc>(sum: __m128i) -> u64 {
    // The later half needs no folding to be moved up by 64 bits; it still fits. With the folded
    // earlier half it makes U * x^64 + W, of the same remainder.
    let [by_64, _] = const { K::CRC.fold_by(64) };
    let early = _mm_clmulepi64_si128::<0x00>(sum, _mm_set_epi64x(0, by_64));
    let sum = _mm_xor_si128(early, _mm_srli_si128::<8>(sum));

    // Barrett: q = floor(U * x^64 / P), and what remains is W + q * P, of which the powers from
    // x^64 up cancel out.
    let (over, divisor) = const { (K::CRC.barrett(), K::CRC.divisor()) };
    let quotient = _mm_clmulepi64_si128::<0x00>(sum, _mm_set_epi64x(0, over));
    let product = _mm_clmulepi64_si128::<0x00>(quotient, _mm_set_epi64x(0, divisor));
    let mut rest = _mm_srli_si128::<8>(_mm_xor_si128(sum, product));
    if const { K::CRC.divisor_ends_in_one() } {
        rest = _mm_xor_si128(rest, quotient);
    }
    // The highest powers, which are the CRC, are the lowest bits.
    _mm_cvtsi128_si64(rest) as u64 & const { K::CRC.ones() }
}

/// The CRC of 128 bits, not reflected; as [`reflected`].
#[inline]
#[target_feature(enable = "sse2,pclmulqdq")]
fn plain<K: Crc>(sum: __m128i) -> u64 {
    let [_, by_64] = const { K::CRC.fold_by(64) };
    let early = _mm_clmulepi64_si128::<0x01>(sum, _mm_set_epi64x(0, by_64));
    let sum = _mm_xor_si128(early, _mm_slli_si128::<8>(sum));

    // The leading one of floor(x^128 / P), which `barrett` leaves out, adds U itself.
    let (over, divisor) = const { (K::CRC.barrett(), K::CRC.divisor()) };
    let product = _mm_clmulepi64_si128::<0x01>(sum, _mm_set_epi64x(0, over));
    let quotient = _mm_xor_si128(product, sum);
    let product = _mm_clmulepi64_si128::<0x01>(quotient, _mm_set_epi64x(0, divisor));
    let rest = _mm_xor_si128(product, sum);
    _mm_cvtsi128_si64(rest) as u64 >> const { 64 - K::CRC.width }
}
