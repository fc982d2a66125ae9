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
//! | file             | what it hides                                                         |
//! |------------------|-----------------------------------------------------------------------|
//! | `pass.rs`        | one column: copy, guards, parity, verification; what is fused, what not |
//! | `row.rs`         | full rows: in which order columns are taken                           |
//! | `reconstruct.rs` | members that are missing, made from the others                        |
//! | `segments.rs`    | foreign memory in pieces; words across the edges of intervals         |
//! | `guard.rs`       | the CRCs: their algebra and their constants                           |
//! | `gf.rs`          | the field that Q is computed in; blocks made from P and Q             |
//! | `tier.rs`        | which instruction set does the work                                   |
//! | `pieces.rs`      | what a tier is made of                                                |
//! | `fused.rs`       | the fused loop: load, store, CRC, P and Q without leaving registers   |
//! | `across.rs`      | the same across columns: P and Q are made and guarded in registers     |
//! | `avx512.rs`, `avx2.rs` | the vectors that it is compiled for                             |
//! | `portable.rs`    | the loops in plain Rust, for every machine                            |
//! | `fault.rs`       | memory that vanishes: recovery from SIGBUS and SIGSEGV                |

#[cfg(not(all(
    target_os = "linux",
    target_endian = "little",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
compile_error!("stableio-onepass recovers from faults on Linux, x86_64 or aarch64, only");

#[cfg(target_arch = "x86_64")]
mod across;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod fault;
#[cfg(target_arch = "x86_64")]
mod fused;
pub mod gf;
mod guard;
mod hint;
mod pass;
mod pieces;
mod portable;
mod reconstruct;
mod row;
mod segments;
mod tier;

use std::fmt;

pub use guard::{Format, Guard, Interval, guard, guard_of_xor, guard_of_zeros};
pub use hint::prefetch;
pub use pass::{Pass, verify, verify_foreign, verify_out};
#[doc(hidden)]
pub use pass::{verify_foreign_with, verify_out_with, verify_with};
#[doc(hidden)]
pub use reconstruct::reconstruct_with;
pub use reconstruct::{Member, Mismatch, Missing, Survivor, reconstruct};
#[doc(hidden)]
pub use row::row_with;
pub use row::{Column, RowParity, row};
pub use segments::{Cursor, Segment};
#[doc(hidden)]
pub use tier::Kernels;
pub use tier::{NoSuchTier, Tier, asked_tier, available_tiers, tier};

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
    /// The same parity, for the next column of the row.
    pub(crate) fn added_to(self) -> Parity {
        match self {
            Parity::Set(p) => Parity::Xor(p),
            other => other,
        }
    }

    /// The parity of what lies `bytes` further on.
    pub(crate) fn at(self, bytes: usize) -> Parity {
        // Wrapping, so that this can be safe: whoever writes through the pointer knows that it
        // lies within the caller's parity.
        match self {
            Parity::None => Parity::None,
            Parity::Set(p) => Parity::Set(p.wrapping_add(bytes)),
            Parity::Xor(p) => Parity::Xor(p.wrapping_add(bytes)),
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

    /// The parities of what lies `bytes` further on.
    pub(crate) fn at(self, bytes: usize) -> Parities {
        Parities { p: self.p.at(bytes), q: self.q.at(bytes), ..self }
    }
}

/// Whole intervals that lie one after the other: the work of one call of a kernel.
///
/// The source has `intervals` intervals, `guards` as many guards; copy (if not null), `old` (if not
/// null) and parities are as long as the source. What [`Pass::foreign`] asks for holds for them.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    format: Format,
    src: *const u8,
    copy: *mut u8,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no such stores there"))]
    streams: bool,
    old: *const u8,
    parities: Parities,
    guards: *mut u64,
    intervals: usize,
}

/// Columns that are taken at once. They, their copies, P and Q are as a rule in the same places of
/// their pages, which share a set of the L1 cache: six lines fit, ten (four columns) do not
/// (ADR 0014).
pub(crate) const ABREAST: usize = 2;

/// Whole intervals of neighbouring columns of a row with Q: the work of one call across columns.
///
/// Each source has `intervals` intervals, and so have its copy (if not null) and the parities, of
/// which `coefficient` is that of the first column.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no such loops there"))]
pub(crate) struct Across {
    format: Format,
    columns: [Place; ABREAST],
    parities: Parities,
    /// Where the guards of Q as it is left behind go, if not null.
    q_guards: *mut u64,
    intervals: usize,
}

/// Where intervals of a column come from, and go to.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no such loops there"))]
pub(crate) struct Place {
    src: *const u8,
    copy: *mut u8,
    guards: *mut u64,
}

impl Run {
    /// The addresses of what lies `bytes` further on, but for the guards.
    fn at(&self, bytes: usize) -> Run {
        Run {
            src: self.src.wrapping_add(bytes),
            copy: if self.copy.is_null() { self.copy } else { self.copy.wrapping_add(bytes) },
            old: if self.old.is_null() { self.old } else { self.old.wrapping_add(bytes) },
            parities: self.parities.at(bytes),
            ..*self
        }
    }
}

/// Computes the guards of stable blocks that follow each other.
///
/// # Panics
///
/// If `data.len() != guards.len() * BLOCK`.
pub fn guards_of(data: &[u8], guards: &mut [u64]) {
    assert_eq!(data.len(), guards.len() * BLOCK, "one guard per block");
    // SAFETY: only guards are written.
    unsafe { Pass::guards(Format::NATIVE).stable(data, guards) }
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
