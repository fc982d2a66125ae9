//! What lies under a file, as far as a policy needs to know it.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Stat};
use stableio_inspect::{Host, Tristate};

/// Yes, no, or nobody can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Yes,
    No,
    Unknown,
}

/// What is known of the storage below a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// As [`is_storage`] has it.
    pub(crate) is_storage: bool,
    /// Whether the data of a direct write is sampled more than once.
    pub(crate) samples_twice: Known,
    /// Whether direct reads are verified while they lie in the reader's memory.
    pub(crate) verifies_reads: Known,
    /// How this is known, in a line.
    pub(crate) reason: String,
}

impl Verdict {
    /// Of a file that can not be looked at.
    pub(crate) fn unknown(reason: String) -> Verdict {
        let (samples_twice, verifies_reads) = (Known::Unknown, Known::Unknown);
        Verdict { is_storage: true, samples_twice, verifies_reads, reason }
    }
}

/// Pipes, sockets and terminals know O_DIRECT too; what it means there is not our concern.
pub(crate) fn is_storage(stat: &Stat) -> bool {
    use FileType::{BlockDevice, Directory, RegularFile};
    matches!(FileType::from_raw_mode(stat.st_mode), RegularFile | Directory | BlockDevice)
}

/// Looks at the file, which may be open as a mere path (`O_PATH`).
pub(crate) fn verdict(file: BorrowedFd<'_>, stat: &Stat) -> Verdict {
    if is_storage(stat) {
        return inspect(file);
    }
    Verdict {
        is_storage: false,
        samples_twice: Known::No,
        verifies_reads: Known::No,
        reason: "no storage: a pipe, socket or character device".to_owned(),
    }
}

fn inspect(file: BorrowedFd<'_>) -> Verdict {
    // Asked each time: file systems come and go.
    match Host::this().of_file(&file) {
        Ok(report) => Verdict {
            is_storage: true,
            samples_twice: report.samples_writes_twice().into(),
            verifies_reads: report.verifies_reads().into(),
            reason: report.reason(),
        },
        Err(error) => Verdict::unknown(error.to_string()),
    }
}

impl From<Tristate> for Known {
    fn from(tristate: Tristate) -> Known {
        match tristate {
            Tristate::Yes => Known::Yes,
            Tristate::No => Known::No,
            Tristate::Unknown => Known::Unknown,
        }
    }
}
