//! Who sends requests: an export, a queue of one.
//!
//! ISSUER-1: a program that keeps changing the buffers of its reads costs
//! each of them a second read. It reads privately for a while instead, and an
//! event names it; nobody below is blamed.

use std::sync::atomic::{AtomicU64, Ordering};

/// So many changed buffers within [`WINDOW`] reads make an offender.
const OFFENCES: u64 = 8;
/// Reads after which old offences are forgotten.
const WINDOW: u64 = 4096;
/// Reads for which an offender reads privately.
const PRIVATE: u64 = 16384;

/// A source of requests, and what is known of it.
#[derive(Debug, Default)]
pub struct Issuer {
    name: String,
    reads: AtomicU64,
    /// Reads whose buffer was changed before it was verified.
    benign: AtomicU64,
    offences: AtomicU64,
    /// The number of the read at which the offences began to count.
    since: AtomicU64,
    /// The number of the read up to which it reads privately.
    private_until: AtomicU64,
}

impl Issuer {
    /// One of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads whose buffer was changed before it was verified.
    pub fn benign_mismatches(&self) -> u64 {
        self.benign.load(Ordering::Relaxed)
    }

    /// Counts a read into foreign memory; says whether it should be private.
    pub(crate) fn begin_read(&self) -> bool {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        number < self.private_until.load(Ordering::Relaxed)
    }

    /// Whether it reads privately now.
    pub fn reads_privately(&self) -> bool {
        self.reads.load(Ordering::Relaxed) < self.private_until.load(Ordering::Relaxed)
    }

    /// Counts a buffer that was changed before it was verified. Gives what to
    /// say when that makes it an offender.
    pub fn changed_its_buffer(&self) -> Option<String> {
        self.benign.fetch_add(1, Ordering::Relaxed);
        let reads = self.reads.load(Ordering::Relaxed);
        if reads.saturating_sub(self.since.load(Ordering::Relaxed)) > WINDOW {
            self.since.store(reads, Ordering::Relaxed);
            self.offences.store(0, Ordering::Relaxed);
        }
        let offences = self.offences.fetch_add(1, Ordering::Relaxed) + 1;
        if offences < OFFENCES || self.reads_privately() {
            return None;
        }
        self.offences.store(0, Ordering::Relaxed);
        self.private_until.store(reads + PRIVATE, Ordering::Relaxed);
        Some(format!(
            "{}: keeps changing the buffers of its reads; the next {PRIVATE} are read privately",
            self.name
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offender_reads_privately_for_a_while() {
        let issuer = Issuer::new("vm");
        for _ in 1..OFFENCES {
            assert!(!issuer.begin_read());
            assert_eq!(issuer.changed_its_buffer(), None);
        }
        assert!(issuer.changed_its_buffer().is_some_and(|event| event.starts_with("vm: ")));
        assert_eq!(issuer.changed_its_buffer(), None, "said once");
        for _ in 0..PRIVATE {
            assert!(issuer.begin_read());
        }
        assert!(!issuer.begin_read());
        assert_eq!(issuer.benign_mismatches(), OFFENCES + 1);
        // Offences long ago do not count.
        for _ in 0..4 * OFFENCES {
            for _ in 0..WINDOW / 2 {
                issuer.begin_read();
            }
            assert_eq!(issuer.changed_its_buffer(), None);
        }
    }
}
