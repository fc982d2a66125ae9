//! Which instruction set does the work: found out once, when the first kernel is called.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::avx512::{self, Avx512};
use crate::portable::{self, Portable};
use crate::{Fault, Parities, by_block};

/// An implementation of the kernels. All of them compute the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Plain Rust and the `crc-fast` crate: every machine.
    Portable,
    /// One fused loop over 512-bit registers: AVX-512 (F, BW, VL) with VPCLMULQDQ, and with GFNI
    /// where there is one.
    Avx512,
}

/// The tier that the kernels of this process use.
///
/// The best one that the machine has, or [`Tier::Portable`] if the environment says
/// `STABLEIO_SIMD=portable` when this is first asked. It never changes afterwards.
pub fn tier() -> Tier {
    static CHOSEN: OnceLock<Tier> = OnceLock::new();
    *CHOSEN.get_or_init(|| match std::env::var("STABLEIO_SIMD").as_deref() {
        Ok("portable") => Tier::Portable,
        _ => *available_tiers().last().expect("Portable is always there"),
    })
}

/// The tiers that this machine can run, slowest first.
pub fn available_tiers() -> &'static [Tier] {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_available() {
        return &[Tier::Portable, Tier::Avx512];
    }
    &[Tier::Portable]
}

/// The kernels of one tier, with the contracts of the functions of the same names in the crate's
/// root and in [`crate::gf`]; for tests and benches, which compare tiers within one process.
#[doc(hidden)]
#[allow(missing_docs, clippy::type_complexity)]
pub struct Kernels {
    pub stabilize_blocks: unsafe fn(*const u8, *mut u8, &mut [u64], Parities) -> Result<(), Fault>,
    pub sample_blocks: unsafe fn(*const u8, &mut [u64], Parities) -> Result<(), Fault>,
    /// Does not check the lengths: `data.len() == guards.len() * BLOCK` is the caller's duty.
    pub stable_blocks: unsafe fn(&[u8], &mut [u64], Parities),
    pub copy_in: unsafe fn(*const u8, *mut u8, usize) -> Result<(), Fault>,
    pub copy_out: unsafe fn(*const u8, *mut u8, usize) -> Result<(), Fault>,
    pub zero_out: unsafe fn(*mut u8, usize) -> Result<(), Fault>,
    pub differ: unsafe fn(*const u8, *const u8, usize) -> Result<bool, Fault>,
    /// XORs as many bytes as the shorter of the two slices has.
    pub xor_into: fn(&mut [u8], &[u8]),
    /// Adds the products of as many bytes as the shorter of the two slices has.
    pub mul_xor_into: fn(&mut [u8], &[u8], u8),
    pub scale: fn(&mut [u8], u8),
}

impl Kernels {
    /// The kernels that the crate's functions use.
    pub(crate) fn chosen() -> &'static Kernels {
        Kernels::table(tier())
    }

    /// The kernels of `tier`, or `None` if this machine cannot run them.
    pub fn of(tier: Tier) -> Option<&'static Kernels> {
        available_tiers().contains(&tier).then(|| Kernels::table(tier))
    }

    /// The table of a tier that is known to be available.
    fn table(tier: Tier) -> &'static Kernels {
        match tier {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => &AVX512,
            _ => &PORTABLE,
        }
    }
}

static PORTABLE: Kernels = Kernels {
    stabilize_blocks: by_block::stabilize::<Portable>,
    sample_blocks: by_block::sample::<Portable>,
    stable_blocks: by_block::stable::<Portable>,
    copy_in: by_block::copy_in::<Portable>,
    copy_out: by_block::copy_out::<Portable>,
    zero_out: by_block::zero_out::<Portable>,
    differ: by_block::differ::<Portable>,
    xor_into: portable::xor_into,
    mul_xor_into: portable::mul_xor_into,
    scale: portable::scale,
};

#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = Kernels {
    stabilize_blocks: avx512::stabilize,
    sample_blocks: avx512::sample,
    stable_blocks: avx512::stable,
    copy_in: by_block::copy_in::<Avx512>,
    copy_out: by_block::copy_out::<Avx512>,
    zero_out: by_block::zero_out::<Avx512>,
    differ: by_block::differ::<Avx512>,
    xor_into: avx512::xor_into,
    mul_xor_into: avx512::mul_xor_into,
    scale: avx512::scale,
};
