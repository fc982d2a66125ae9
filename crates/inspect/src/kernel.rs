//! Versions of the kernel, and what changed with which.

use std::fmt;

use serde::{Serialize, Serializer};

/// A version of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kernel {
    major: u16,
    minor: u16,
    /// Of the stable series; a distribution's may stand still at 0.
    patch: u16,
}

/// XFS copies what it writes directly to a device that needs stable data, and
/// what it reads from one.
pub(crate) const XFS_BOUNCES: Kernel = Kernel::new(7, 0);
/// btrfs writes through the page cache what has checksums.
pub(crate) const BTRFS_FALLS_BACK: Kernel = Kernel::new(6, 14);
/// The same, in a stable series.
const BTRFS_FALLS_BACK_STABLE: [Kernel; 1] = [Kernel { major: 6, minor: 12, patch: 77 }];
/// btrfs copies instead, in both directions.
pub(crate) const BTRFS_BOUNCES: Kernel = Kernel::new(7, 3);
/// dm-integrity, dm-crypt and dm-verity read a block again, privately, before
/// they call it bad.
const DM_RECHECKS: Kernel = Kernel::new(6, 8);
const DM_RECHECKS_STABLE: [Kernel; 3] = [
    Kernel { major: 6, minor: 1, patch: 80 },
    Kernel { major: 6, minor: 6, patch: 19 },
    Kernel { major: 6, minor: 7, patch: 7 },
];

impl Kernel {
    pub(crate) const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor, patch: 0 }
    }

    /// The version in a release, as `6.18.44-generic`.
    pub fn parse(release: &str) -> Option<Self> {
        let end = release.find(|c: char| !c.is_ascii_digit() && c != '.');
        let mut numbers = release[..end.unwrap_or(release.len())].split('.').map(str::parse);
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self { major, minor, patch })
    }

    /// Since when btrfs falls back here, if it does.
    pub(crate) fn btrfs_falls_back(self) -> Option<Self> {
        self.since(BTRFS_FALLS_BACK, &BTRFS_FALLS_BACK_STABLE)
    }

    pub(crate) fn dm_rechecks(self) -> bool {
        self.since(DM_RECHECKS, &DM_RECHECKS_STABLE).is_some()
    }

    fn since(self, mainline: Self, stable: &[Self]) -> Option<Self> {
        let series = |k: &Self| (k.major, k.minor) == (self.major, self.minor) && self >= *k;
        if self >= mainline { Some(mainline) } else { stable.iter().copied().find(series) }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, patch } = self;
        match patch {
            0 => write!(f, "{major}.{minor}"),
            _ => write!(f, "{major}.{minor}.{patch}"),
        }
    }
}

impl Serialize for Kernel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_parsed_and_ordered() {
        let parse = |text| Kernel::parse(text).unwrap();
        assert_eq!(parse("6.18.44-fc-v669"), Kernel { major: 6, minor: 18, patch: 44 });
        assert_eq!(parse("7.0-rc3"), Kernel::new(7, 0));
        assert_eq!(parse("6.1.0-18-amd64").to_string(), "6.1");
        assert!(parse("6.9.12") < parse("6.10"));
        for garbage in ["", "6", "six.one", "6.", ".", "99999999.1", "6.-1"] {
            assert_eq!(Kernel::parse(garbage), None, "{garbage}");
        }
    }

    #[test]
    fn what_was_ported_back_counts_in_its_series_only() {
        let falls_back = |text| Kernel::parse(text).unwrap().btrfs_falls_back();
        assert_eq!(falls_back("6.12.76"), None);
        assert_eq!(falls_back("6.12.77").unwrap().to_string(), "6.12.77");
        assert_eq!(falls_back("6.13.99"), None);
        assert_eq!(falls_back("6.18.1"), Some(BTRFS_FALLS_BACK));
        let rechecks = |text| Kernel::parse(text).unwrap().dm_rechecks();
        assert!(
            !rechecks("6.6.18") && rechecks("6.6.19") && !rechecks("6.5.99") && rechecks("6.8")
        );
    }
}
