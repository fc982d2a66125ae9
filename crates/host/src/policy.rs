//! What a session does with the direct I/O of a file.

use stableio_session::Effect;

use crate::verdict::{Known, Verdict};

/// What `stableio run` was told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Private memory where the stack below a file samples twice or may do so, else nothing.
    Auto,
    /// Private memory for every file.
    Bounce,
    /// Through the page cache and out of it again.
    Uncached,
    /// No direct I/O where the stack samples twice or may do so.
    Refuse,
    /// Nothing, for `detect`.
    Watch,
}

/// What is done with the writes of a file, and whether its reads go to private memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Treatment {
    pub(crate) effect: Effect,
    pub(crate) private_reads: bool,
}

impl Treatment {
    pub(crate) const UNTOUCHED: Treatment =
        Treatment { effect: Effect::Untouched, private_reads: false };

    /// Whether a program without the library may do it by itself.
    pub(crate) fn is_nothing(self) -> bool {
        self == Treatment::UNTOUCHED
    }
}

impl Policy {
    /// What this policy does with a file of which this is known. *Unknown means stabilize.*
    pub(crate) fn treat(self, verdict: &Verdict) -> Treatment {
        if !verdict.is_storage {
            return Treatment::UNTOUCHED;
        }
        let twice = verdict.samples_twice != Known::No;
        let effect = match self {
            Policy::Auto if twice => Effect::Bounce,
            Policy::Bounce => Effect::Bounce,
            Policy::Uncached => Effect::Uncached,
            Policy::Refuse if twice => Effect::Refuse,
            Policy::Auto | Policy::Refuse | Policy::Watch => Effect::Untouched,
        };
        let private_reads = match (self, effect) {
            (Policy::Auto | Policy::Bounce, Effect::Bounce) => verdict.verifies_reads != Known::No,
            (Policy::Auto, _) => verdict.verifies_reads == Known::Yes,
            _ => false,
        };
        Treatment { effect, private_reads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Effect::{Bounce, Refuse, Uncached, Untouched};
    use Known::{No, Unknown, Yes};

    #[test]
    fn every_policy_treats_every_verdict_as_documented() {
        // Policy, samples twice, verifies reads: effect, private reads.
        let table = [
            (Policy::Auto, Yes, Yes, Bounce, true),
            (Policy::Auto, Yes, No, Bounce, false),
            (Policy::Auto, Unknown, Unknown, Bounce, true),
            (Policy::Auto, No, No, Untouched, false),
            (Policy::Auto, No, Unknown, Untouched, false),
            (Policy::Auto, No, Yes, Untouched, true),
            (Policy::Bounce, No, No, Bounce, false),
            (Policy::Bounce, No, Unknown, Bounce, true),
            (Policy::Uncached, No, Yes, Uncached, false),
            (Policy::Refuse, Yes, No, Refuse, false),
            (Policy::Refuse, Unknown, No, Refuse, false),
            (Policy::Refuse, No, Yes, Untouched, false),
            (Policy::Watch, Yes, Yes, Untouched, false),
        ];
        for (policy, samples_twice, verifies_reads, effect, private_reads) in table {
            let reason = String::new();
            let verdict = Verdict { is_storage: true, samples_twice, verifies_reads, reason };
            let want = Treatment { effect, private_reads };
            assert_eq!(policy.treat(&verdict), want, "{policy:?} {verdict:?}");
            let verdict = Verdict { is_storage: false, ..verdict };
            assert_eq!(policy.treat(&verdict), Treatment::UNTOUCHED, "{policy:?} {verdict:?}");
        }
    }
}
