//! Protections, each of which can be taken away: a search that finds nothing
//! without one of them could not have found anything.

use std::str::FromStr;

use stableio_array::twin;
use stableio_block::exec;

/// Something that keeps the rules, and that a twin does without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Foreign memory is copied once; without it, it is declared stable, which
    /// is a lie.
    Stabilize,
    /// A dropped ticket detaches; without it, it aborts its request.
    TicketsThatDetach,
    /// What was not shut down is recovered; without it, it is opened as it is.
    Recovery,
    /// Members that flush; without it, they say so and do not.
    Flushes,
    /// The array's own.
    Array(twin::Protection),
}

impl Protection {
    /// All that can be taken away.
    pub const ALL: [Protection; 17] = [
        Protection::Stabilize,
        Protection::TicketsThatDetach,
        Protection::Recovery,
        Protection::Flushes,
        Protection::Array(twin::Protection::Log),
        Protection::Array(twin::Protection::LoggedGuards),
        Protection::Array(twin::Protection::VerifiedParity),
        Protection::Array(twin::Protection::RowToken),
        Protection::Array(twin::Protection::TuplesBeforeTail),
        Protection::Array(twin::Protection::BlankCopies),
        Protection::Array(twin::Protection::ContentBackwards),
        Protection::Array(twin::Protection::FlushedVersions),
        Protection::Array(twin::Protection::WritesToIncoming),
        Protection::Array(twin::Protection::ZoneToken),
        Protection::Array(twin::Protection::FlushedZones),
        Protection::Array(twin::Protection::LoggedContent),
        Protection::Array(twin::Protection::ReadToken),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Protection::Stabilize => "stabilize",
            Protection::TicketsThatDetach => "tickets-that-detach",
            Protection::Recovery => "recovery",
            Protection::Flushes => "flushes",
            Protection::Array(twin::Protection::Log) => "log",
            Protection::Array(twin::Protection::LoggedGuards) => "logged-guards",
            Protection::Array(twin::Protection::VerifiedParity) => "verified-parity",
            Protection::Array(twin::Protection::RowToken) => "row-token",
            Protection::Array(twin::Protection::TuplesBeforeTail) => "tuples-before-tail",
            Protection::Array(twin::Protection::BlankCopies) => "blank-copies",
            Protection::Array(twin::Protection::ContentBackwards) => "content-backwards",
            Protection::Array(twin::Protection::FlushedVersions) => "flushed-versions",
            Protection::Array(twin::Protection::WritesToIncoming) => "writes-to-incoming",
            Protection::Array(twin::Protection::ZoneToken) => "zone-token",
            Protection::Array(twin::Protection::FlushedZones) => "flushed-zones",
            Protection::Array(twin::Protection::LoggedContent) => "logged-content",
            Protection::Array(twin::Protection::ReadToken) => "read-token",
        }
    }

    /// Takes it away from what runs on this thread, as far as the thread
    /// decides: the others are taken away by the world, when it opens.
    pub fn take_from_thread(self) {
        match self {
            Protection::TicketsThatDetach => exec::abort_dropped_tickets(true),
            Protection::Array(protection) => twin::without(Some(protection)),
            Protection::Stabilize | Protection::Recovery | Protection::Flushes => {}
        }
    }
}

impl FromStr for Protection {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|protection| protection.name() == name);
        found.ok_or_else(|| format!("not a protection; there are {}", names()))
    }
}
