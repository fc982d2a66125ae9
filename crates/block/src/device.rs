//! Something that takes requests.

use crate::Outcome;
use crate::exec::Ticket;
use crate::limits::Limits;
use crate::request::Request;

/// A device. Both methods may be called from any thread.
///
/// DEV-1: `submit` hands the request to a task that the device's worker owns.
/// Dropping the ticket detaches; it never aborts what was begun.
///
/// DEV-2: every request settles exactly once, with an error if need be.
///
/// DEV-3: what is durable is what a write with FUA, or a flush that began
/// after the write settled, covered.
///
/// DEV-4: overlapping requests have no order, but never mix inside a block.
///
/// Range and alignment of what comes through a [`Stack`](crate::Stack) have
/// been checked, and foreign memory is stable where the limits ask for it.
pub trait Device: Send + Sync {
    /// What it demands and offers; the same at each call.
    fn limits(&self) -> &Limits;

    /// Takes the request over and begins it.
    fn submit(&self, request: Request) -> Ticket<Outcome>;
}
