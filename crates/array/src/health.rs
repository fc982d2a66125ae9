//! What happened to an array: counters and events, for `status`.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Events kept.
const EVENTS: usize = 64;

/// Counters of an array; shared between its worker and whoever asks.
#[derive(Debug, Default)]
pub struct Health {
    /// By role.
    pub members: Vec<MemberHealth>,
    /// Reads whose buffer did not match where the member's data did: the
    /// buffer was changed in flight. Nobody's fault below.
    pub benign_mismatches: AtomicU64,
    /// Blocks brought back from redundancy and written again.
    pub blocks_mended: AtomicU64,
    /// Tuples or pages of tuples brought back from their copy.
    pub tuples_mended: AtomicU64,
    /// Reads of blocks that nothing brings back.
    pub lost_reads: AtomicU64,
    /// Rows looked at after the array was not shut down.
    pub rows_recovered: AtomicU64,
    /// Blocks that were lost in such a recovery.
    pub blocks_lost: AtomicU64,
    events: Mutex<VecDeque<String>>,
    observer: Mutex<Option<Observer>>,
}

struct Observer(Box<dyn Fn(&str) + Send>);

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observer")
    }
}

/// Counters of a member.
#[derive(Debug, Default)]
pub struct MemberHealth {
    /// Where it is, as the user named it.
    pub name: String,
    /// Whether it takes part.
    pub in_sync: AtomicBool,
    /// Reads that it failed.
    pub read_errors: AtomicU64,
    /// Writes that it failed.
    pub write_errors: AtomicU64,
    /// Blocks that did not match their guard, privately read under the row's
    /// token: its fault.
    pub mismatches: AtomicU64,
}

impl Health {
    /// For members of these names, by role.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let member = |name| MemberHealth { name, ..MemberHealth::default() };
        Self { members: names.into_iter().map(member).collect(), ..Self::default() }
    }

    /// Notes an event, for `status` and for whoever observes.
    pub fn event(&self, text: String) {
        if let Some(observer) = &*lock(&self.observer) {
            (observer.0)(&text);
        }
        let mut events = lock(&self.events);
        if events.len() == EVENTS {
            events.pop_front();
        }
        events.push_back(text);
    }

    /// Calls `observer` with each event from now on.
    pub fn observe(&self, observer: impl Fn(&str) + Send + 'static) {
        *lock(&self.observer) = Some(Observer(Box::new(observer)));
    }

    /// The last events, oldest first.
    pub fn events(&self) -> Vec<String> {
        lock(&self.events).iter().cloned().collect()
    }

    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
