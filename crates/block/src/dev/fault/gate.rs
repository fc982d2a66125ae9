//! Keeps the change of a bit apart from writes of the same bytes.
//!
//! To turn a bit over its block is read and written back. A write that landed
//! in between would be undone: that is lost data, not a flipped bit.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

use super::rules::overlap;
use super::wakers::Wakers;

/// The ranges that are being written, in the order in which they came.
#[derive(Default)]
pub(super) struct Gate {
    lines: Mutex<Lines>,
    left: Wakers,
}

#[derive(Default)]
struct Lines {
    next: u64,
    busy: Vec<Busy>,
}

struct Busy {
    id: u64,
    range: Range<u64>,
    alone: bool,
}

/// A place in the line, until it is dropped.
pub(super) struct Pass {
    gate: Arc<Gate>,
    id: u64,
}

impl Gate {
    /// Waits for what came before, overlaps, and excludes it: writes exclude
    /// only what is `alone`. Nobody holds one place while waiting for another.
    pub(super) async fn enter(self: &Arc<Self>, range: Range<u64>, alone: bool) -> Pass {
        let pass = self.queue(range, alone);
        std::future::poll_fn(|cx| {
            if self.lock().is_free(pass.id) {
                return Poll::Ready(());
            }
            self.left.add(cx.waker());
            // Who left between the two looks woke nobody.
            if self.lock().is_free(pass.id) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        pass
    }

    fn queue(self: &Arc<Self>, range: Range<u64>, alone: bool) -> Pass {
        let mut lines = self.lock();
        let id = lines.next;
        lines.next += 1;
        lines.busy.push(Busy { id, range, alone });
        Pass { gate: self.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Lines {
    fn is_free(&self, id: u64) -> bool {
        let mine = self.busy.iter().position(|busy| busy.id == id).expect("until it is dropped");
        let me = &self.busy[mine];
        let excludes =
            |other: &Busy| (other.alone || me.alone) && overlap(&other.range, &me.range).is_some();
        !self.busy[..mine].iter().any(excludes)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lock().busy.retain(|busy| busy.id != self.id);
        self.gate.left.wake();
    }
}
