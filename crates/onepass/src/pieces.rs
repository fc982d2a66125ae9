//! What a tier is made of, and how it is called under the fault guard.
//!
//! Only what touches foreign memory runs under the guard: nothing else may fault, and what runs
//! under it must not own anything (see [`guarded`]).

use crate::fault::guarded;
use crate::{Across, Fault, Run};

/// Bytes of a word: the unit that is never torn (ONCE-2).
pub(crate) const WORD: usize = 8;

/// The loops that a tier is made of.
///
/// All but `sum` of stable bytes run under the fault guard and are abandoned in the middle when they
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

    /// Whether [`sum`](Self::sum) loads each byte of its source once, in whole words: then it may
    /// be foreign, at a word boundary. Else it is first loaded to memory of ours.
    const LOADS_ONCE: bool;

    /// Does what the run says.
    ///
    /// # Safety
    ///
    /// [`Run`]'s promises; the source is foreign only if [`LOADS_ONCE`](Self::LOADS_ONCE).
    unsafe fn sum(run: &Run);

    /// Does what the run across columns says, if this tier has a loop for it.
    ///
    /// # Safety
    ///
    /// [`Across`]'s promises; the sources are foreign only if [`LOADS_ONCE`](Self::LOADS_ONCE).
    const ACROSS: Option<unsafe fn(&Across)> = None;

    /// XORs `src` into `dst`, as far as the shorter of them reaches. This and what follows is for
    /// stable bytes; only called where the machine has the tier.
    fn xor_into(dst: &mut [u8], src: &[u8]);

    /// Adds `c * src` to `dst`, as far as the shorter of them reaches.
    fn mul_xor_into(dst: &mut [u8], src: &[u8], c: u8);

    /// Multiplies each byte by `c`.
    fn scale(buf: &mut [u8], c: u8);

    /// P and Q of columns; all have the length of P.
    fn parities(columns: &[&[u8]], p: &mut [u8], q: &mut [u8]);
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
