//! Protections that a test can take away, to see that it would fail without.
//! In builds without the feature `twins` nothing can.

/// Something that keeps data whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// LOG-1: the log is durable before the data is written.
    Log,
    /// RECOVER-1: no guard is computed from the medium.
    LoggedGuards,
    /// WRITE-1: parity is made of old blocks that matched their tuples.
    VerifiedParity,
    /// MEND-1: a private read is made under the row's token.
    RowToken,
    /// WRITE-4: without checksums the log has the content of every write.
    LoggedContent,
    /// TOKEN-2: without checksums reads hold their rows.
    ReadToken,
    /// LOG-2: the log forgets nothing before tuples are on their pages.
    TuplesBeforeTail,
    /// PAGE-5: that there is no data is not believed of one copy.
    BlankCopies,
    /// RECOVER-3: content in the log counts only up to the last write of a
    /// row that has not all of it there.
    ContentBackwards,
    /// RECOVER-4: what is older than a flushed version, or than a discard, is
    /// no version.
    FlushedVersions,
    /// MEMBER-2: what is written to a zone that an incoming member has goes
    /// there too.
    WritesToIncoming,
    /// TEND-1: a zone is filled under the token of its rows.
    ZoneToken,
    /// TEND-2: a zone is flushed before the superblocks say that it is there.
    FlushedZones,
}

#[cfg(feature = "twins")]
mod taken {
    use super::Protection;
    use std::cell::Cell;

    thread_local! {
        static WITHOUT: Cell<Option<Protection>> = const { Cell::new(None) };
    }

    /// From now on this thread's arrays do without it.
    pub fn without(protection: Option<Protection>) {
        WITHOUT.set(protection);
    }

    pub(crate) fn lacks(protection: Protection) -> bool {
        WITHOUT.get() == Some(protection)
    }
}

#[cfg(feature = "twins")]
pub(crate) use taken::lacks;
#[cfg(feature = "twins")]
pub use taken::without;

#[cfg(not(feature = "twins"))]
pub(crate) const fn lacks(_: Protection) -> bool {
    false
}
