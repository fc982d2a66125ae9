//! Many worlds on many threads, in the order of their seeds.
//!
//! FLEET-1: where worlds have findings, the smallest such seed is told: no
//! smaller one is left out, whichever thread was first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::check::Finding;
use crate::coverage::Coverage;
use crate::play::{Options, Report, play};

/// Which worlds, and how long.
#[derive(Debug, Clone, Copy)]
pub struct Voyage {
    /// The first seed.
    pub from: u64,
    /// How many.
    pub seeds: u64,
    /// Threads.
    pub jobs: usize,
    /// No world is begun after this long.
    pub limit: Option<Duration>,
    /// Whether to go on after findings.
    pub keep_going: bool,
    /// How they are played.
    pub options: Options,
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Worlds that ended.
    pub done: u64,
    /// Worlds with findings.
    pub findings: u64,
    /// Since it began.
    pub elapsed: Duration,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Log {
    /// Worlds that ended.
    pub done: u64,
    /// Worlds with findings.
    pub findings: u64,
    /// What happened in all of them.
    pub coverage: Coverage,
    /// The smallest seed with findings, and these.
    pub first: Option<(u64, Vec<Finding>)>,
}

impl Progress {
    /// Worlds a second.
    pub fn rate(&self) -> f64 {
        self.done as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Plays all worlds, or those up to the first with findings; calls `tell` each
/// `period`, and once at the end.
pub fn sail(voyage: Voyage, period: Duration, mut tell: impl FnMut(Progress)) -> Log {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let running = Mutex::new((voyage.jobs.max(1), Log::default()));
    let ended = Condvar::new();
    let began = Instant::now();
    let crew = || {
        loop {
            let late = voyage.limit.is_some_and(|limit| began.elapsed() >= limit);
            if late || stop.load(Ordering::Relaxed) {
                break;
            }
            // Ascending: whoever took a smaller seed ends it (FLEET-1).
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= voyage.seeds {
                break;
            }
            let seed = voyage.from + i;
            let report = play(seed, voyage.options);
            let ends = !report.findings.is_empty() && !voyage.keep_going;
            stop.fetch_or(ends, Ordering::Relaxed);
            lock(&running).1.add(seed, report);
        }
        lock(&running).0 -= 1;
        ended.notify_all();
    };
    std::thread::scope(|scope| {
        for _ in 0..voyage.jobs.max(1) {
            scope.spawn(crew);
        }
        loop {
            let (state, _) = ended
                .wait_timeout_while(lock(&running), period, |(crew, _)| *crew > 0)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            let (crew, log) = &*state;
            let (left, done, findings) = (*crew, log.done, log.findings);
            drop(state);
            tell(Progress { done, findings, elapsed: began.elapsed() });
            if left == 0 {
                break;
            }
        }
    });
    running.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).1
}

impl Log {
    fn add(&mut self, seed: u64, report: Report) {
        self.done += 1;
        self.coverage.merge(&report.coverage);
        if report.findings.is_empty() {
            return;
        }
        self.findings += 1;
        if self.first.as_ref().is_none_or(|(first, _)| seed < *first) {
            self.first = Some((seed, report.findings));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
