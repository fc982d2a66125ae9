//! The fused loop across columns of a row: at each place the vectors of some columns are loaded, and
//! stored, folded and taken up in P and Q, out of the same registers. So is Q itself, once all
//! columns are in it.
//!
//! A column has one lane only: the folds of different columns do not wait for each other. What the
//! loop is generic over, and how it gets compiled, is as in `fused.rs`.

use crate::fused::{self, Crc, Crc16T10Dif, Crc32c, Crc64Nvme, Move, Vectors};
use crate::{ABREAST, Across, Guard, Parities, Parity, Place};

/// Does what the run says, in the loop that is compiled for it.
///
/// # Safety
///
/// [`Across`]'s promises, and those of [`Vectors`]. What of the sources is foreign is guarded, and
/// a fault may abandon this: it owns nothing.
pub(crate) unsafe fn sum<T: Vectors>(run: &Across) {
    // SAFETY: the caller's promises.
    unsafe {
        match run.format.guard {
            Guard::Crc16T10Dif => T::across::<Crc16T10Dif>(run),
            Guard::Crc32c => T::across::<Crc32c>(run),
            Guard::Crc64Nvme => T::across::<Crc64Nvme>(run),
        }
    }
}

/// The loop over the intervals of a run.
///
/// # Safety
///
/// That of [`sum`].
#[inline(always)]
pub(crate) unsafe fn pass<T: Vectors, K: Crc>(run: &Across) {
    let bytes = run.format.interval.bytes();
    // In locals, because what is stored through the pointers might change what lies in memory.
    let Across { columns, parities, q_guards, intervals, .. } = *run;
    // SAFETY: of the machine's features only.
    let (two, first, by_step) = unsafe {
        let by_step = Move::<T, K>::by(const { fused::constants::<T, K>(T::BYTES) });
        (T::factor(2), T::factor(parities.coefficient), by_step)
    };
    for index in 0..intervals {
        let from = index * bytes;
        // SAFETY: at + BYTES <= bytes, and index < intervals: all of this lies in the caller's
        // ranges.
        unsafe {
            let (mut sums, mut q_sum) = step::<T, K>(&columns, parities, two, first, from);
            for sum in &mut sums {
                *sum = fused::started::<T, K>(*sum);
            }
            q_sum = fused::started::<T, K>(q_sum);
            let mut at = T::BYTES;
            while at < bytes {
                let (next, q_next) = step::<T, K>(&columns, parities, two, first, from + at);
                for (sum, next) in sums.iter_mut().zip(next) {
                    *sum = by_step.onto(*sum, next);
                }
                if !q_guards.is_null() {
                    q_sum = by_step.onto(q_sum, q_next);
                }
                at += T::BYTES;
            }
            for (place, sum) in columns.iter().zip(sums) {
                place.guards.add(index).write(fused::reduce::<T, K, 1>([sum]));
            }
            if !q_guards.is_null() {
                q_guards.add(index).write(fused::reduce::<T, K, 1>([q_sum]));
            }
        }
    }
}

/// Loads a vector of each column from `at` on, puts them where they belong, and returns them and
/// what Q has become, ready to be folded.
///
/// # Safety
///
/// That of [`pass`], for the vectors at `at`.
#[inline(always)]
unsafe fn step<T: Vectors, K: Crc>(
    columns: &[Place; ABREAST],
    parities: Parities,
    two: T::Factor,
    first: T::Factor,
    at: usize,
) -> ([T::Vector; ABREAST], T::Vector) {
    // SAFETY: each place that is named has a vector at `at`, of initialised bytes if they are to
    // be read.
    unsafe {
        let mut data = [T::load_once(columns[0].src.wrapping_add(at)); ABREAST];
        for k in 1..ABREAST {
            data[k] = T::load_once(columns[k].src.wrapping_add(at));
        }
        // Horner's rule: from the last column on, Q doubles.
        let (mut p, mut q) = (data[ABREAST - 1], data[ABREAST - 1]);
        for k in (0..ABREAST - 1).rev() {
            p = T::xor(p, data[k]);
            q = T::xor(T::times(two, q), data[k]);
        }
        q = T::times(first, q);
        if let Parity::Xor(to) = parities.q {
            q = T::xor(q, T::load(to.wrapping_add(at)));
        }
        if let Parity::Xor(to) = parities.p {
            p = T::xor(p, T::load(to.wrapping_add(at)));
        }
        // All loads come before the stores, for the same reason as in `fused.rs`.
        fused::put::<T, 1>(parities.p, at, [p]);
        fused::put::<T, 1>(parities.q, at, [q]);
        for (data, column) in data.iter_mut().zip(columns) {
            if !column.copy.is_null() {
                T::store(column.copy.wrapping_add(at), *data);
            }
            *data = fused::ordered::<T, K>(*data);
        }
        (data, fused::ordered::<T, K>(q))
    }
}
