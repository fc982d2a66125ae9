//! Load a block of foreign memory, then compute on the copy: for sources of any alignment.
//!
//! A tier brings the [`Pieces`]; what is put together of them here is right for every tier. Only
//! the loads and stores of foreign memory run under the fault guard: they are the only ones that
//! may fault, and what runs under it must not own anything (see [`guarded`]).

use crate::fault::guarded;
use crate::{BLOCK, Fault, Parities};

/// Bytes of a word: the unit that is never torn (ONCE-2).
pub(crate) const WORD: usize = 8;

/// The loops that a tier is made of.
///
/// `load`, `store` and `zero` run under the fault guard and are abandoned in the middle when they
/// fault: implementations own nothing, allocate nothing, take no lock and do not panic. "Foreign"
/// here: the range may be inaccessible, and the access then ends in the fault guard.
pub(crate) trait Pieces {
    /// Copies `len` foreign bytes at `src` to `dst`, keeping ONCE-1 and ONCE-2.
    ///
    /// # Safety
    ///
    /// `dst` is valid for writes of `len` bytes; `src` is foreign and guarded by the caller.
    unsafe fn load(src: *const u8, dst: *mut u8, len: usize);

    /// Copies `len` stable bytes at `src` to foreign memory at `dst`, keeping ONCE-2.
    ///
    /// # Safety
    ///
    /// `src` is valid for reads of `len` bytes; `dst` is foreign and guarded by the caller.
    unsafe fn store(src: *const u8, dst: *mut u8, len: usize);

    /// Writes `len` zeros to foreign memory at `dst`, keeping ONCE-2.
    ///
    /// # Safety
    ///
    /// `dst` is foreign and guarded by the caller.
    unsafe fn zero(dst: *mut u8, len: usize);

    /// Whether any of the `len` foreign bytes at `src`, each loaded once, differs from its
    /// counterpart at `copy`.
    ///
    /// # Safety
    ///
    /// `copy` is valid for reads of `len` bytes; `src` is foreign and guarded by the caller.
    unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> bool;

    /// The guard of one stable block, which is also taken up in the parities.
    ///
    /// # Safety
    ///
    /// `block` has [`BLOCK`] bytes; each parity is valid for as many, and overlaps neither `block`
    /// nor the other one.
    unsafe fn stable(block: &[u8], parities: Parities) -> u64;
}

/// [`crate::stabilize_blocks`]: each block is computed on while its copy is still in L1.
///
/// # Safety
///
/// That of [`crate::stabilize_blocks`].
pub(crate) unsafe fn stabilize<P: Pieces>(
    src: *const u8,
    dst: *mut u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    let total = guards.len() * BLOCK;
    let mut loaded = 0;
    for (index, guard) in guards.iter_mut().enumerate() {
        let start = index * BLOCK;
        let next = whole_words(src, start + BLOCK).min(total);
        // SAFETY: loaded <= next <= total, so this is a part of the caller's `src` and `dst`.
        unsafe { copy_in::<P>(src.wrapping_add(loaded), dst.add(loaded), next - loaded)? };
        loaded = next;
        // SAFETY: `dst` is ours, and its first `loaded >= start + BLOCK` bytes have been written.
        let block = unsafe { std::slice::from_raw_parts(dst.add(start), BLOCK) };
        // SAFETY: the parities cover every block of the run and do not overlap `dst`.
        *guard = unsafe { P::stable(block, parities.block(index)) };
    }
    Ok(())
}

/// [`crate::sample_blocks`], through a buffer of one block on the stack.
///
/// # Safety
///
/// That of [`crate::sample_blocks`].
pub(crate) unsafe fn sample<P: Pieces>(
    src: *const u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    let total = guards.len() * BLOCK;
    let mut bounce = [0_u8; BLOCK + WORD];
    // The bytes of `src` that have been loaded; those of the next block lie in front of `bounce`.
    let mut loaded = 0;
    for (index, guard) in guards.iter_mut().enumerate() {
        let start = index * BLOCK;
        let next = whole_words(src, start + BLOCK).min(total);
        let free = &mut bounce[loaded - start..next - start];
        // SAFETY: `free` has next - loaded bytes; loaded <= next <= total, so that the source is
        // a part of the caller's.
        unsafe { copy_in::<P>(src.wrapping_add(loaded), free.as_mut_ptr(), free.len())? };
        loaded = next;
        // SAFETY: the parities cover every block of the run; they cannot overlap our stack.
        *guard = unsafe { P::stable(&bounce[..BLOCK], parities.block(index)) };
        // The end of the word across the edge belongs to the next block.
        bounce.copy_within(BLOCK.., 0);
    }
    Ok(())
}

/// [`crate::stable_blocks`].
///
/// # Safety
///
/// That of [`crate::stable_blocks`].
pub(crate) unsafe fn stable<P: Pieces>(data: &[u8], guards: &mut [u64], parities: Parities) {
    for (index, (block, guard)) in data.chunks_exact(BLOCK).zip(guards).enumerate() {
        // SAFETY: a chunk is one block; the parities cover every block of the run.
        *guard = unsafe { P::stable(block, parities.block(index)) };
    }
}

/// [`crate::copy_in`].
///
/// # Safety
///
/// That of [`crate::copy_in`].
pub(crate) unsafe fn copy_in<P: Pieces>(
    src: *const u8,
    dst: *mut u8,
    len: usize,
) -> Result<(), Fault> {
    // SAFETY: `dst` is valid by the caller's promise, `src` is the guarded range, and `load` is
    // made to be abandoned.
    unsafe { guarded(src, len, move || P::load(src, dst, len)) }
}

/// [`crate::copy_out`].
///
/// # Safety
///
/// That of [`crate::copy_out`].
pub(crate) unsafe fn copy_out<P: Pieces>(
    src: *const u8,
    dst: *mut u8,
    len: usize,
) -> Result<(), Fault> {
    // SAFETY: `src` is valid by the caller's promise, `dst` is the guarded range, and `store` is
    // made to be abandoned.
    unsafe { guarded(dst, len, move || P::store(src, dst, len)) }
}

/// [`crate::zero_out`].
///
/// # Safety
///
/// That of [`crate::zero_out`].
pub(crate) unsafe fn zero_out<P: Pieces>(dst: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: `dst` is the guarded range, and `zero` is made to be abandoned.
    unsafe { guarded(dst, len, move || P::zero(dst, len)) }
}

/// [`crate::differ`].
///
/// # Safety
///
/// That of [`crate::differ`].
pub(crate) unsafe fn differ<P: Pieces>(
    src: *const u8,
    copy: *const u8,
    len: usize,
) -> Result<bool, Fault> {
    let mut found = false;
    let answer = &raw mut found;
    // SAFETY: `copy` is valid by the caller's promise, `src` is the guarded range, and `differ` is
    // made to be abandoned; the answer is our local.
    unsafe { guarded(src, len, move || *answer = P::differ(src, copy, len))? };
    Ok(found)
}

/// The bytes from foreign `start` to its next word boundary, but at most `len`.
pub(crate) fn to_word_boundary(start: *const u8, len: usize) -> usize {
    (start.addr().wrapping_neg() % WORD).min(len)
}

/// `len`, lengthened to the next word boundary of foreign memory at `src`.
///
/// If `src` is not word-aligned, a word lies across the edge of each two blocks. Loading block by
/// block would tear it; so the load runs ahead to the end of that word.
fn whole_words(src: *const u8, len: usize) -> usize {
    len + to_word_boundary(src.wrapping_add(len), WORD)
}
