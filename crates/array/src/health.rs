//! What happened to an array: counters and events, for `status`.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Events kept.
const EVENTS: usize = 256;

/// Events of a kind that are told in a [`WINDOW`].
const TOLD: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Kinds of events that may come in thousands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Often {
    ReadError,
    Mended,
    Lost,
    Tuple,
    Differed,
}

impl Often {
    fn name(self) -> &'static str {
        match self {
            Often::ReadError => "read errors",
            Often::Mended => "mended blocks",
            Often::Lost => "lost blocks",
            Often::Tuple => "mended tuples",
            Often::Differed => "blocks that differed",
        }
    }
}

/// By kind: when the window began, events told in it, and not told.
type Windows = [(Option<Instant>, u32, u64); 5];

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
    /// Copies and parity that a scrub without checksums found to differ from
    /// the data of their row.
    pub blocks_differed: AtomicU64,
    /// Tuples or pages of tuples brought back from their copy.
    pub tuples_mended: AtomicU64,
    /// Reads of blocks that nothing brings back.
    pub lost_reads: AtomicU64,
    /// Stripes that the ends of two writes covered together (JOIN-1).
    pub stripes_joined: AtomicU64,
    /// Rows looked at after the array was not shut down.
    pub rows_recovered: AtomicU64,
    /// Blocks that were lost: in such a recovery, or found so by a rebuild.
    pub blocks_lost: AtomicU64,
    /// A member that is being filled.
    pub rebuild: Progress,
    /// A scrub.
    pub scrub: Progress,
    /// Blocks of the log in use, and of all.
    pub log_used: AtomicU64,
    /// Blocks that the log has; 0 without one.
    pub log_blocks: AtomicU64,
    events: Mutex<Events>,
    windows: Mutex<Windows>,
    observer: Mutex<Option<Observer>>,
}

/// The last events.
#[derive(Debug, Default)]
struct Events {
    /// How many there were, those that are forgotten too.
    count: u64,
    last: VecDeque<Event>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number, from 1 on, since the array was opened.
    pub number: u64,
    /// When.
    pub time: SystemTime,
    /// What.
    pub text: String,
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
    name: Mutex<String>,
    /// Where the member is that is being filled to take its place.
    next: Mutex<Option<String>>,
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

/// How far long work is.
#[derive(Debug, Default)]
pub struct Progress {
    active: AtomicBool,
    paused: AtomicBool,
    zones: AtomicU64,
    done: AtomicU64,
    first: AtomicU64,
    zone_bytes: AtomicU64,
    began: Mutex<Option<Instant>>,
}

/// How far long work is, at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HowFar {
    /// Bytes on members that are done with, of all.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes a second since it began.
    pub rate: f64,
    /// Seconds that are left at that rate.
    pub seconds_left: f64,
    /// Whether it is paused.
    pub paused: bool,
}

impl Progress {
    pub(crate) fn begin(&self, zones: u64, zone_bytes: u64) {
        self.zones.store(zones, Ordering::Relaxed);
        self.zone_bytes.store(zone_bytes, Ordering::Relaxed);
        self.first.store(u64::MAX, Ordering::Relaxed);
        *lock(&self.began) = Some(Instant::now());
        self.active.store(true, Ordering::Relaxed);
    }

    pub(crate) fn at(&self, zone: u64) {
        self.first.fetch_min(zone, Ordering::Relaxed);
        self.done.store(zone, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.active.store(false, Ordering::Relaxed);
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// How far it is; `None` while there is none.
    pub fn how_far(&self) -> Option<HowFar> {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let began = (*lock(&self.began)).filter(|_| self.active.load(Ordering::Relaxed))?;
        let bytes = get(&self.zone_bytes);
        let (done, total) = (get(&self.done) * bytes, get(&self.zones) * bytes);
        let here = get(&self.done).saturating_sub(get(&self.first)) * bytes;
        let rate = here as f64 / began.elapsed().as_secs_f64().max(1e-3);
        let left = total.saturating_sub(done) as f64;
        let paused = self.paused.load(Ordering::Relaxed);
        Some(HowFar { done, total, rate, seconds_left: left / rate.max(1.0), paused })
    }
}

impl MemberHealth {
    fn new(name: String) -> Self {
        Self { name: Mutex::new(name), ..Self::default() }
    }

    /// Where it is, as the user named it.
    pub fn name(&self) -> String {
        lock(&self.name).clone()
    }

    /// Where the member is that is being filled to take its place.
    pub fn next(&self) -> Option<String> {
        lock(&self.next).clone()
    }

    pub(crate) fn set_next(&self, name: Option<String>) {
        *lock(&self.next) = name;
    }

    /// The one that was filled is the member from now on.
    pub(crate) fn take_over(&self) {
        if let Some(name) = self.next() {
            *lock(&self.name) = name;
        }
        for counter in [&self.read_errors, &self.write_errors, &self.mismatches] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

impl Health {
    /// For members of these names, by role.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self { members: names.into_iter().map(MemberHealth::new).collect(), ..Self::default() }
    }

    /// Notes an event, for `status` and for whoever observes.
    pub fn event(&self, text: String) {
        if let Some(observer) = &*lock(&self.observer) {
            (observer.0)(&text);
        }
        let mut events = lock(&self.events);
        if events.last.len() == EVENTS {
            events.last.pop_front();
        }
        events.count += 1;
        let number = events.count;
        events.last.push_back(Event { number, time: SystemTime::now(), text });
    }

    /// Notes an event of a kind that may come in thousands: so many of a kind
    /// in a while are told, then how many were not. Counters count all.
    pub(crate) fn often(&self, kind: Often, text: impl FnOnce() -> String) {
        let untold = {
            let mut windows = lock(&self.windows);
            let (began, told, untold) = &mut windows[kind as usize];
            if began.is_none_or(|began| began.elapsed() > WINDOW) {
                (*began, *told) = (Some(Instant::now()), 0);
            }
            *told += 1;
            if *told > TOLD {
                *untold += 1;
                return;
            }
            std::mem::take(untold)
        };
        if untold > 0 {
            self.event(format!("{untold} more {} were not told", kind.name()));
        }
        self.event(text());
    }

    /// Calls `observer` with each event from now on.
    pub fn observe(&self, observer: impl Fn(&str) + Send + 'static) {
        *lock(&self.observer) = Some(Observer(Box::new(observer)));
    }

    /// The last events, oldest first.
    pub fn events(&self) -> Vec<String> {
        lock(&self.events).last.iter().map(|event| event.text.clone()).collect()
    }

    /// The same with their numbers and times: those after number `after`.
    pub fn events_after(&self, after: u64) -> Vec<Event> {
        lock(&self.events).last.iter().filter(|event| event.number > after).cloned().collect()
    }

    /// The number of the last event; 0 before the first.
    pub fn last_event(&self) -> u64 {
        lock(&self.events).count
    }

    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
