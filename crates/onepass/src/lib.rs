//! Copy, guards and parity in one pass: every foreign byte is loaded exactly once.
//!
//! This crate is the bottom of the tree: raw addresses in, numbers out. It knows nothing of
//! buffers, pools or devices; it allocates nothing and keeps nothing after a call returns.
//!
//! *Foreign* memory may be changed by anybody at any time, and may vanish: its owner can truncate
//! the file behind the mapping. *Stable* memory is ours, and nobody writes to it during the call.
//! What the kernels promise about foreign memory:
//!
//! - **ONCE-1** Every foreign byte of the range is loaded exactly once, and no byte outside the
//!   range is loaded. Guard, parity and copy are all made from what that one load returned, so
//!   they agree with each other whatever the owner does meanwhile.
//! - **ONCE-2** Every naturally aligned 8-byte word lying wholly inside the range is loaded
//!   (stored, in [`copy_out`] and [`zero_out`]) by one instruction that does not tear it. What a
//!   racing program reads back is therefore, word by word, something that it stored.
//! - **ONCE-3** Foreign memory that vanishes ends the call with a [`Fault`], never the process.
//!
//! ONCE-1 is why no foreign byte is ever reached through a reference, a slice or a SIMD intrinsic:
//! all of them are ordinary loads, and the compiler may repeat an ordinary load instead of keeping
//! its result in a register. Here they are volatile loads or inline assembly.
//!
//! | file          | what it hides                                                       |
//! |---------------|---------------------------------------------------------------------|
//! | `tier.rs`     | which instruction set does the work                                 |
//! | `by_block.rs` | load a block, then compute on the copy; words across block edges    |
//! | `portable.rs` | the loops in plain Rust, for every machine                          |
//! | `avx512.rs`   | the fused loop: load, store, CRC, P and Q without leaving registers |
//! | `guard.rs`    | the CRC: its algebra and its constants                              |
//! | `gf.rs`       | the field that Q is computed in; blocks made from P and Q           |
//! | `fault.rs`    | memory that vanishes: recovery from SIGBUS and SIGSEGV              |

#[cfg(not(all(
    target_os = "linux",
    target_endian = "little",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
compile_error!("stableio-onepass recovers from faults on Linux, x86_64 or aarch64, only");

#[cfg(target_arch = "x86_64")]
mod avx512;
mod by_block;
pub mod fault;
pub mod gf;
mod guard;
mod hint;
mod portable;
mod tier;

use std::fmt;

pub use guard::{guard, guard_of_xor, guard_of_zeros};
pub use hint::prefetch;
#[doc(hidden)]
pub use tier::Kernels;
pub use tier::{Tier, available_tiers, tier};

/// The protection interval in bytes: what one guard covers.
pub const BLOCK: usize = 4096;

/// Foreign memory vanished, or was not accessible, in the middle of a call (EFAULT).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address whose access faulted, inside the foreign range of the call.
    pub addr: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "foreign memory is not accessible at {:#x}", self.addr)
    }
}

impl std::error::Error for Fault {}

/// What happens to one parity of a run of blocks.
///
/// Block `i` of the run goes to the parity bytes `[i * BLOCK, (i + 1) * BLOCK)`. The pointer
/// stays the caller's: the kernels write through it during the call and do not keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parity {
    /// No parity.
    None,
    /// Parity becomes the data: the first member of a row. Parity bytes are written, never read,
    /// so they need not be initialised.
    Set(*mut u8),
    /// The data is XORed into parity, whose bytes must be initialised.
    Xor(*mut u8),
}

impl Parity {
    /// The parity of block `index` of the run.
    pub(crate) fn block(self, index: usize) -> Parity {
        // Wrapping, so that this can be safe: whoever writes through the pointer knows that it
        // lies within the caller's parity.
        match self {
            Parity::None => Parity::None,
            Parity::Set(p) => Parity::Set(p.wrapping_add(index * BLOCK)),
            Parity::Xor(p) => Parity::Xor(p.wrapping_add(index * BLOCK)),
        }
    }
}

/// What happens to the parities of a run of blocks that lie in one column of their rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parities {
    /// P takes up the data as it is.
    pub p: Parity,
    /// Q takes up the data times `coefficient`.
    pub q: Parity,
    /// `g^k` for data column `k`: [`gf::exp`]. Without Q it means nothing.
    pub coefficient: u8,
}

impl Parities {
    /// No parity.
    pub const NONE: Parities = Parities::only_p(Parity::None);

    /// P without Q.
    pub const fn only_p(p: Parity) -> Parities {
        Parities { p, q: Parity::None, coefficient: 0 }
    }

    /// Q without P.
    pub const fn only_q(q: Parity, coefficient: u8) -> Parities {
        Parities { p: Parity::None, q, coefficient }
    }

    /// The parities of block `index` of the run.
    pub(crate) fn block(self, index: usize) -> Parities {
        Parities { p: self.p.block(index), q: self.q.block(index), ..self }
    }
}

/// Copies `guards.len()` blocks of foreign memory to `dst`, and computes the guard of each and
/// the parities on the way.
///
/// Everything is made from one load of each byte (ONCE-1): on return `guards[i]` is the guard of
/// block `i` of `dst`, P has changed by exactly the bytes of `dst`, and Q by their multiples.
///
/// # Errors
///
/// [`Fault`] if `src` was not accessible. `dst`, `guards` and the parities are then initialised as
/// far as they were before, but their contents are unspecified: a parity may have taken up a part
/// of the data and must be thrown away.
///
/// # Safety
///
/// - `src` is the start of `guards.len() * BLOCK` bytes of address space, of any alignment, in
///   which nothing but foreign memory lies. They may be inaccessible.
/// - `dst` is valid for writes of as many bytes, of any alignment; so is the pointer of each
///   parity, and for reads of initialised bytes too if it is [`Parity::Xor`].
/// - `src`, `dst`, `guards`, P and Q do not overlap, and nobody else touches any but the first
///   during the call.
/// - This thread does not block SIGBUS and SIGSEGV.
pub unsafe fn stabilize_blocks(
    src: *const u8,
    dst: *mut u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().stabilize_blocks)(src, dst, guards, parities) }
}

/// Computes guards and parities of foreign memory where it lies, without copying it.
///
/// This is for memory that is promised to be stable, and for verifying in place: the guards
/// belong to the bytes as they were loaded (once, ONCE-1), and say nothing about the bytes that
/// are there afterwards.
///
/// # Errors
///
/// [`Fault`] if `src` was not accessible; `guards` and parities are then unspecified, as in
/// [`stabilize_blocks`].
///
/// # Safety
///
/// As [`stabilize_blocks`], without `dst`.
pub unsafe fn sample_blocks(
    src: *const u8,
    guards: &mut [u64],
    parities: Parities,
) -> Result<(), Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().sample_blocks)(src, guards, parities) }
}

/// Computes guards and parities of our own, stable memory.
///
/// # Panics
///
/// If `data.len() != guards.len() * BLOCK`.
///
/// # Safety
///
/// The pointer of each parity is valid for writes of `data.len()` bytes (and for reads of
/// initialised bytes if it is [`Parity::Xor`]), overlaps neither `data` nor `guards` nor the other
/// parity, and nobody else touches those bytes during the call.
pub unsafe fn stable_blocks(data: &[u8], guards: &mut [u64], parities: Parities) {
    assert_eq!(data.len(), guards.len() * BLOCK, "one guard per block");
    // SAFETY: the lengths agree; the caller's promise about parity is the kernel's.
    unsafe { (Kernels::chosen().stable_blocks)(data, guards, parities) }
}

/// Computes the guards of stable blocks that follow each other.
///
/// # Panics
///
/// If `data.len() != guards.len() * BLOCK`.
pub fn guards_of(data: &[u8], guards: &mut [u64]) {
    // SAFETY: there is no parity to write to.
    unsafe { stable_blocks(data, guards, Parities::NONE) }
}

/// Adds a stable block times `coefficient` to a sum, and computes the block's guard on the way:
/// 1 for a term of P, [`gf::exp`] for one of Q.
///
/// # Panics
///
/// If either has not the length of a block.
pub fn add_block(sum: &mut [u8], block: &[u8], coefficient: u8) -> u64 {
    assert_eq!(sum.len(), BLOCK, "one block");
    let (to, mut guard) = (Parity::Xor(sum.as_mut_ptr()), [0]);
    let parities = match coefficient {
        1 => Parities::only_p(to),
        _ => Parities::only_q(to, coefficient),
    };
    // SAFETY: `sum` is a block of initialised bytes that nobody else holds.
    unsafe { stable_blocks(block, &mut guard, parities) };
    guard[0]
}

/// Copies `len` bytes of foreign memory to `dst`, each loaded once.
///
/// # Errors
///
/// [`Fault`] if `src` was not accessible; a part of `dst` may have been written.
///
/// # Safety
///
/// - `src` is the start of `len` bytes of address space in which nothing but foreign memory lies.
/// - `dst` is valid for writes of `len` bytes, does not overlap `src`, and nobody else touches it
///   during the call. Neither needs an alignment.
/// - This thread does not block SIGBUS and SIGSEGV.
pub unsafe fn copy_in(src: *const u8, dst: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().copy_in)(src, dst, len) }
}

/// Copies `len` stable bytes out into foreign memory, each stored once.
///
/// # Errors
///
/// [`Fault`] if `dst` was not accessible or not writable; a part of it may have been written.
///
/// # Safety
///
/// - `src` is valid for reads of `len` initialised bytes that nobody changes during the call.
/// - `dst` is the start of `len` bytes of address space in which nothing but foreign memory lies;
///   it does not overlap `src`. Neither needs an alignment.
/// - This thread does not block SIGBUS and SIGSEGV.
pub unsafe fn copy_out(src: *const u8, dst: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().copy_out)(src, dst, len) }
}

/// Writes `len` zeros to foreign memory, each stored once.
///
/// # Errors
///
/// [`Fault`] if `dst` was not accessible or not writable; a part of it may have been written.
///
/// # Safety
///
/// As [`copy_out`], without `src`.
pub unsafe fn zero_out(dst: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().zero_out)(dst, len) }
}

/// Whether any of `len` bytes of foreign memory, each loaded once, differs from its counterpart in
/// `copy`.
///
/// The answer is about the bytes as they were loaded, and says nothing about those that are there
/// afterwards.
///
/// # Errors
///
/// [`Fault`] if `src` was not accessible.
///
/// # Safety
///
/// - `src` is the start of `len` bytes of address space in which nothing but foreign memory lies.
/// - `copy` is valid for reads of `len` initialised bytes that nobody changes during the call.
/// - This thread does not block SIGBUS and SIGSEGV.
pub unsafe fn differ(src: *const u8, copy: *const u8, len: usize) -> Result<bool, Fault> {
    // SAFETY: the caller's promises are those of the kernel.
    unsafe { (Kernels::chosen().differ)(src, copy, len) }
}

/// XORs stable bytes into `dst`.
///
/// # Panics
///
/// If the lengths differ.
pub fn xor_into(dst: &mut [u8], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "XOR of unequal lengths");
    (Kernels::chosen().xor_into)(dst, src);
}
