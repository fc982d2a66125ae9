//! What worlds went through: a drama that never happened proves nothing.

use std::fmt;

/// Something that a world may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names that are printed")]
pub enum Event {
    ProcessDeaths,
    PowerFailures,
    CrashesInLogWrites,
    CrashesInDataWrites,
    CrashesInGuardWrites,
    CrashesInSuperblockWrites,
    CrashesWhileDegraded,
    CrashesInRecovery,
    CrashesInFlushes,
    TornLogBlocks,
    TornDataBlocks,
    TornGuardBlocks,
    CrashesInRebuild,
    CrashesInScrubs,
    MembersLostInACrash,
    StaleMembersLeftOut,
    SplitBrainsRefused,
    SplitBrainsTrusted,
    Extractions,
    Closes,
    DeadMembers,
    StalledMembers,
    FailedWrites,
    FailedReads,
    UnreadableBlocks,
    FlippedBits,
    BlankedBlocks,
    Rebuilds,
    FaultsDuringRebuild,
    WritesDuringRebuild,
    CaughtUp,
    Scrubs,
    BlocksMended,
    PrivateRereads,
    LostBlocks,
    RowsRecovered,
    Writes,
    FuaWrites,
    Flushes,
    Discards,
    DiscardedRowsPartlyRewritten,
    DroppedTickets,
    StripesJoined,
    Reads,
    RacingReads,
    WorldsWithoutChecksums,
}

impl Event {
    /// All, in the order in which they are printed.
    pub const ALL: [Event; Event::WorldsWithoutChecksums as usize + 1] = [
        Event::ProcessDeaths,
        Event::PowerFailures,
        Event::CrashesInLogWrites,
        Event::CrashesInDataWrites,
        Event::CrashesInGuardWrites,
        Event::CrashesInSuperblockWrites,
        Event::CrashesWhileDegraded,
        Event::CrashesInRecovery,
        Event::CrashesInFlushes,
        Event::TornLogBlocks,
        Event::TornDataBlocks,
        Event::TornGuardBlocks,
        Event::CrashesInRebuild,
        Event::CrashesInScrubs,
        Event::MembersLostInACrash,
        Event::StaleMembersLeftOut,
        Event::SplitBrainsRefused,
        Event::SplitBrainsTrusted,
        Event::Extractions,
        Event::Closes,
        Event::DeadMembers,
        Event::StalledMembers,
        Event::FailedWrites,
        Event::FailedReads,
        Event::UnreadableBlocks,
        Event::FlippedBits,
        Event::BlankedBlocks,
        Event::Rebuilds,
        Event::FaultsDuringRebuild,
        Event::WritesDuringRebuild,
        Event::CaughtUp,
        Event::Scrubs,
        Event::BlocksMended,
        Event::PrivateRereads,
        Event::LostBlocks,
        Event::RowsRecovered,
        Event::Writes,
        Event::FuaWrites,
        Event::Flushes,
        Event::Discards,
        Event::DiscardedRowsPartlyRewritten,
        Event::DroppedTickets,
        Event::StripesJoined,
        Event::Reads,
        Event::RacingReads,
        Event::WorldsWithoutChecksums,
    ];

    /// Those that many worlds must go through at least once in a hundred.
    pub const NEEDED: [Event; 13] = [
        Event::CrashesInLogWrites,
        Event::TornLogBlocks,
        Event::TornDataBlocks,
        Event::CrashesWhileDegraded,
        Event::CrashesInRecovery,
        Event::FaultsDuringRebuild,
        Event::CrashesInRebuild,
        Event::PrivateRereads,
        Event::LostBlocks,
        Event::DiscardedRowsPartlyRewritten,
        Event::StripesJoined,
        Event::SplitBrainsRefused,
        Event::WorldsWithoutChecksums,
    ];

    /// Its name, as it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Event::ProcessDeaths => "process deaths",
            Event::PowerFailures => "power failures",
            Event::CrashesInLogWrites => "crashes inside a log write",
            Event::CrashesInDataWrites => "crashes inside a data write",
            Event::CrashesInGuardWrites => "crashes inside a guard write",
            Event::CrashesInSuperblockWrites => "crashes inside a superblock write",
            Event::CrashesWhileDegraded => "crashes while degraded",
            Event::CrashesInRecovery => "crashes during recovery",
            Event::CrashesInFlushes => "crashes during a flush",
            Event::TornLogBlocks => "torn log blocks",
            Event::TornDataBlocks => "torn data blocks",
            Event::TornGuardBlocks => "torn guard blocks",
            Event::CrashesInRebuild => "crashes during a rebuild",
            Event::CrashesInScrubs => "crashes during a scrub",
            Event::MembersLostInACrash => "members lost in a crash",
            Event::StaleMembersLeftOut => "stale members left out",
            Event::SplitBrainsRefused => "split brains refused",
            Event::SplitBrainsTrusted => "split brains, one side trusted",
            Event::Extractions => "arrays extracted",
            Event::Closes => "closes",
            Event::DeadMembers => "members that died",
            Event::StalledMembers => "members that stalled",
            Event::FailedWrites => "write errors",
            Event::FailedReads => "transient read errors",
            Event::UnreadableBlocks => "unreadable blocks",
            Event::FlippedBits => "flipped bits",
            Event::BlankedBlocks => "blocks that became zeros",
            Event::Rebuilds => "rebuilds",
            Event::FaultsDuringRebuild => "faults during a rebuild",
            Event::WritesDuringRebuild => "writes during a rebuild",
            Event::CaughtUp => "members that caught up",
            Event::Scrubs => "scrubs",
            Event::BlocksMended => "blocks mended",
            Event::PrivateRereads => "private re-reads",
            Event::LostBlocks => "lost blocks",
            Event::RowsRecovered => "rows recovered",
            Event::Writes => "writes",
            Event::FuaWrites => "writes with FUA",
            Event::Flushes => "flushes",
            Event::Discards => "discards and writes of zeros",
            Event::DiscardedRowsPartlyRewritten => "discarded rows partly rewritten",
            Event::DroppedTickets => "dropped tickets",
            Event::StripesJoined => "stripes joined of two writes",
            Event::Reads => "reads",
            Event::RacingReads => "racing reads",
            Event::WorldsWithoutChecksums => "worlds without checksums",
        }
    }
}

/// How often worlds went through what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage([u64; Event::ALL.len()]);

impl Default for Coverage {
    fn default() -> Self {
        Self([0; Event::ALL.len()])
    }
}

impl Coverage {
    /// Once more.
    pub fn note(&mut self, event: Event) {
        self.add(event, 1);
    }

    /// So often.
    pub fn add(&mut self, event: Event, count: u64) {
        self.0[event as usize] += count;
    }

    /// How often.
    pub fn count(&self, event: Event) -> u64 {
        self.0[event as usize]
    }

    /// What another world went through, too.
    pub fn merge(&mut self, other: &Coverage) {
        self.0.iter_mut().zip(other.0).for_each(|(own, other)| *own += other);
    }

    /// What so many worlds went through too rarely.
    pub fn too_rare(&self, worlds: u64) -> impl Iterator<Item = Event> + '_ {
        Event::NEEDED.into_iter().filter(move |event| self.count(*event) < worlds / 100)
    }

    /// Names and counts, in order.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Event::ALL.iter().map(|event| (event.name(), self.count(*event)))
    }
}

/// A table.
impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows().try_for_each(|(name, count)| writeln!(f, "{name:36} {count:>12}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_stands_once_in_its_place() {
        for (i, event) in Event::ALL.iter().enumerate() {
            assert_eq!(*event as usize, i, "{event:?}");
        }
    }
}
