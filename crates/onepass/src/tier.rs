//! Which instruction set does the work: found out once, when the first kernel is called.

use std::fmt;
use std::sync::OnceLock;

use crate::pieces::{self, Pieces};
use crate::portable::Portable;
use crate::{Across, Fault, Run};
#[cfg(target_arch = "x86_64")]
use crate::{
    avx2::{self, Avx2},
    avx512::{self, Avx512},
};

/// An implementation of the kernels. All of them compute the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Plain Rust and the `crc-fast` crate: every machine.
    Portable,
    /// One fused loop over 256-bit registers: AVX2 with PCLMULQDQ.
    Avx2,
    /// The same, with VPCLMULQDQ.
    Avx2Vpclmul,
    /// One fused loop over 512-bit registers: AVX-512 (F, BW, VL) with VPCLMULQDQ.
    Avx512,
    /// The same, with GFNI.
    Avx512Gfni,
}

impl Tier {
    const ALL: [Tier; 5] =
        [Tier::Portable, Tier::Avx2, Tier::Avx2Vpclmul, Tier::Avx512, Tier::Avx512Gfni];

    /// What the environment calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Portable => "portable",
            Tier::Avx2 => "avx2-pclmul",
            Tier::Avx2Vpclmul => "avx2-vpclmul",
            Tier::Avx512 => "avx512-shuffle",
            Tier::Avx512Gfni => "avx512-gfni",
        }
    }
}

/// The tier that the kernels of this process use. It never changes after it is first asked for.
///
/// The best one that the machine has, or what the environment asks for: `STABLEIO_ONEPASS` is the
/// [name](Tier::name) of a tier, or what that begins with (`avx2`, `avx512`) for the best of several.
///
/// # Panics
///
/// If the environment asks for what this machine cannot run: nobody is to measure another tier
/// than the one that was asked for. A program calls [`asked_tier`] first, to say so.
pub fn tier() -> Tier {
    static CHOSEN: OnceLock<Tier> = OnceLock::new();
    *CHOSEN.get_or_init(|| asked_tier().unwrap_or_else(|error| panic!("{error}")))
}

/// What [`tier`] gives.
///
/// # Errors
///
/// If the environment asks for what this machine cannot run.
pub fn asked_tier() -> Result<Tier, NoSuchTier> {
    let asked = std::env::var_os("STABLEIO_ONEPASS").unwrap_or_default();
    let asked = asked.to_string_lossy().into_owned();
    let fits = |tier: &&Tier| {
        tier.name().split_once('-').is_some_and(|(kind, _)| kind == asked)
            || asked.is_empty()
            || tier.name() == asked
    };
    available_tiers().iter().rfind(fits).copied().ok_or(NoSuchTier { asked })
}

/// The environment asks for a tier that this machine does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoSuchTier {
    asked: String,
}

impl fmt::Display for NoSuchTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = available_tiers().iter().map(|tier| tier.name()).collect();
        let (asked, names) = (&self.asked, names.join(", "));
        write!(f, "STABLEIO_ONEPASS={asked}: this machine has no such tier; it has {names}")
    }
}

impl std::error::Error for NoSuchTier {}

/// The tiers that this machine can run, slowest first.
pub fn available_tiers() -> &'static [Tier] {
    static AVAILABLE: OnceLock<Vec<Tier>> = OnceLock::new();
    AVAILABLE.get_or_init(|| Tier::ALL.into_iter().filter(|tier| is_available(*tier)).collect())
}

#[cfg(target_arch = "x86_64")]
fn is_available(tier: Tier) -> bool {
    match tier {
        Tier::Portable => true,
        Tier::Avx2 => avx2::is_available::<false>(),
        Tier::Avx2Vpclmul => avx2::is_available::<true>(),
        Tier::Avx512 => avx512::is_available::<false>(),
        Tier::Avx512Gfni => avx512::is_available::<true>(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn is_available(tier: Tier) -> bool {
    tier == Tier::Portable
}

/// The kernels of one tier. The functions of the crate's root are methods here, with the same
/// contracts: for tests and benches, which compare tiers within one process.
#[doc(hidden)]
#[allow(missing_docs)]
pub struct Kernels {
    /// [`Pieces::LOADS_ONCE`].
    pub(crate) loads_once: bool,
    pub(crate) sum: unsafe fn(&Run),
    /// [`Pieces::ACROSS`].
    pub(crate) across: Option<unsafe fn(&Across)>,
    pub copy_in: unsafe fn(*const u8, *mut u8, usize) -> Result<(), Fault>,
    pub copy_out: unsafe fn(*const u8, *mut u8, usize) -> Result<(), Fault>,
    pub zero_out: unsafe fn(*mut u8, usize) -> Result<(), Fault>,
    pub differ: unsafe fn(*const u8, *const u8, usize) -> Result<bool, Fault>,
    /// XORs as many bytes as the shorter of the two slices has.
    pub xor_into: fn(&mut [u8], &[u8]),
    /// Adds the products of as many bytes as the shorter of the two slices has.
    pub mul_xor_into: fn(&mut [u8], &[u8], u8),
    pub scale: fn(&mut [u8], u8),
    /// All have the length of P.
    pub parities: fn(&[&[u8]], &mut [u8], &mut [u8]),
}

impl Kernels {
    /// The kernels that the crate's functions use.
    pub(crate) fn chosen() -> &'static Kernels {
        Kernels::table(tier())
    }

    /// The kernels of `tier`, or `None` if this machine cannot run them.
    pub fn of(tier: Tier) -> Option<&'static Kernels> {
        is_available(tier).then(|| Kernels::table(tier))
    }

    /// The table of a tier that is known to be available.
    #[cfg(target_arch = "x86_64")]
    fn table(tier: Tier) -> &'static Kernels {
        match tier {
            Tier::Portable => &PORTABLE,
            Tier::Avx2 => const { &Kernels::made_of::<Avx2<false>>() },
            Tier::Avx2Vpclmul => const { &Kernels::made_of::<Avx2<true>>() },
            Tier::Avx512 => const { &Kernels::made_of::<Avx512<false>>() },
            Tier::Avx512Gfni => const { &Kernels::made_of::<Avx512<true>>() },
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn table(_: Tier) -> &'static Kernels {
        &PORTABLE
    }

    const fn made_of<P: Pieces>() -> Kernels {
        Kernels {
            loads_once: P::LOADS_ONCE,
            sum: P::sum,
            across: P::ACROSS,
            copy_in: pieces::copy_in::<P>,
            copy_out: pieces::copy_out::<P>,
            zero_out: pieces::zero_out::<P>,
            differ: pieces::differ::<P>,
            xor_into: P::xor_into,
            mul_xor_into: P::mul_xor_into,
            scale: P::scale,
            parities: P::parities,
        }
    }
}

static PORTABLE: Kernels = Kernels::made_of::<Portable>();
