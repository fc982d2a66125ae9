//! `stableio torture`: the claim of this project as a command.
//!
//! It builds an array, exports it, and writes to it, as a library and as a
//! guest, from memory that other threads change all the time. Then it looks
//! for damage, and says so.
//!
//! | file | what |
//! |---|---|
//! | `plan.rs` | where a round writes, and from what shapes of memory |
//! | `program.rs` | the program: buffers, and threads that change them |
//! | `writers.rs` | its two ways in: the library, and a guest's virtqueue |
//! | `bed.rs` | the array and its export |
//! | `audit.rs` | the members' files, looked at without the array's engine |
//! | `oracle.rs` | what the array must read as |
//! | `report.rs` | the table, the exit code |
//!
//! A round writes all over the array, and reads some of it back into memory that changes on, with what was there before left between
//! and beside the writes; then everything is at rest and is looked at: first
//! the members' files, since reading through the array would mend what it
//! finds, then the array.
//!
//! TORTURE-1: a write counts as raced if a word of its memory was stored
//! after it was begun and before its completion was seen. Nothing on its way
//! waits for that to happen.
//!
//! TORTURE-2: no two writes of a round share a byte, so that what a round
//! leaves can be laid to its writes one by one.
//!
//! TORTURE-3: every word that a write may have stored is known: the program
//! fills a buffer before each write, and each word says whose it is and when
//! it was stored.

mod audit;
mod bed;
mod oracle;
mod plan;
mod program;
mod report;
mod writers;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use stableio_array::Level;
use stableio_block::path::{Stage, Traffic};
use stableio_mem::BLOCK;

pub(crate) use report::{Progress, Report, print};

use audit::Findings;
use bed::Bed;
use oracle::Oracle;
use plan::{Plan, Random};
use program::Program;
use writers::{Done, Order, Ways, Write};

/// What to do.
#[derive(Debug, Clone)]
pub(crate) struct TortureOptions {
    /// Redundancy of the array.
    pub(crate) level: Level,
    /// Its members; `None` for the fewest that show all that the level does.
    pub(crate) members: Option<usize>,
    /// Faults of the first member.
    pub(crate) faults: Option<String>,
    /// Seed of the faults.
    pub(crate) seed: u64,
    /// When it has been enough.
    pub(crate) until: Until,
    /// Declare the memory stable, which is a lie: the twin that must fail.
    pub(crate) unprotected: bool,
    /// Where to build the array; `None` for memory, if it can be had.
    pub(crate) dir: Option<PathBuf>,
    /// Bytes that the array offers, about.
    pub(crate) size: u64,
}

/// When it has been enough.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// After so long, what is looked at in the end not included.
    Elapsed(Duration),
    /// After so many raced writes.
    Raced(u64),
}

impl TortureOptions {
    /// An array large enough that a round has thousands of writes, small
    /// enough that looking at all of it takes a fraction of a second.
    pub(crate) const SIZE: u64 = 128 << 20;
}

impl Default for TortureOptions {
    fn default() -> Self {
        Self {
            level: Level::Raid5,
            members: None,
            faults: None,
            seed: 1,
            until: Until::Elapsed(Duration::from_secs(10)),
            unprotected: false,
            dir: None,
            size: Self::SIZE,
        }
    }
}

/// Tortures an array and says what came of it. Damage is a result, not an
/// error.
///
/// # Errors
///
/// When it could not be done: no memory, no place, no export.
pub(crate) fn run(
    options: &TortureOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> anyhow::Result<Report> {
    let mut bed = Bed::new(options)?;
    let watch = Watch::start(bed.stack.traffic().clone(), bed.place().to_owned());
    let program = Program::new(&bed)?;
    let mut report = Report::new(options, bed.members.len());
    let mut oracle = Oracle::fill(&bed.stack).context("cannot fill the array")?;
    let began = Instant::now();
    program.run(|| -> anyhow::Result<()> {
        for round in 1.. {
            torture(round, options, began, &mut bed, &program, &mut oracle, &mut report, progress)?;
            let enough = match options.until {
                Until::Elapsed(time) => began.elapsed() >= time,
                Until::Raced(writes) => report.raced >= writes,
            };
            if enough {
                break;
            }
        }
        Ok(())
    })?;
    // Once more what every round has looked at, from an array that is closed.
    drop(watch);
    report.charged = bed.charged();
    report.faults_hit = bed.faults_hit();
    let members = bed.close()?;
    let findings = audit::audit(&members, members.faulty)?;
    report.note_damage(&findings);
    report.elapsed = began.elapsed();
    Ok(report)
}

/// A round: writes, then looks.
#[expect(clippy::too_many_arguments, reason = "all that a run has, on loan for one step of it")]
fn torture(
    round: u64,
    options: &TortureOptions,
    began: Instant,
    bed: &mut Bed,
    program: &Program,
    oracle: &mut Oracle,
    report: &mut Report,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> anyhow::Result<()> {
    let plan = Plan::new(bed.stack.limits().size, &bed.geometry, &mut Random::new(round));
    let order = Order {
        lots: plan.lots(),
        deadline: match options.until {
            Until::Elapsed(time) => Some(began + time),
            Until::Raced(_) => None,
        },
        most_raced: match options.until {
            Until::Elapsed(_) => u64::MAX,
            Until::Raced(writes) => writes - report.raced,
        },
    };
    let mended = bed.mended();
    let start = Instant::now();
    let Done { writes, reads } = {
        let (raced, done) = (report.raced, report.writes);
        let ways = Ways { stack: &bed.stack, queue: &mut bed.guest.queues()[0], program };
        ways.write(&order, &mut |now| {
            progress(&Progress {
                elapsed: began.elapsed(),
                until: options.until,
                writes: done + now.writes,
                raced: raced + now.raced,
                report,
            });
        })?
    };
    report.writing += start.elapsed();

    let _rest = program.rest();
    bed.settle()?;
    let findings = audit::audit(&bed.members, bed.faulty())?;
    report.mended += bed.mended() - mended;
    let seen = oracle.look(&bed.stack, program, &writes)?;
    report.note_round(&writes, &findings, &seen, &bed.geometry);
    report.note_reads(reads);
    // What a round has damaged must not be laid to the next one.
    let damaged: BTreeSet<u64> = findings
        .stripes(&bed.geometry)
        .chain(seen.unreadable.iter().map(|block| bed.geometry.place(*block).stripe))
        .collect();
    oracle.restore(&bed.stack, &bed.geometry, &damaged).context("cannot clear up the damage")
}

/// Sees that nothing settles any more: a request that nobody answers is the
/// worst damage, and whoever waits for it never comes back to report it.
struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Longer than any fault lasts that a member is not left out for.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Looks until it is dropped. `place` goes with a run that hangs.
    fn start(traffic: Arc<Traffic>, place: PathBuf) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (mut last, mut since) = (0, Instant::now());
            let second = Duration::from_secs(1);
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(second) {
                let waiting = Stage::ALL.iter().map(|stage| (stage, traffic.waiting(*stage)));
                let waiting: Vec<_> =
                    waiting.filter(|(_, n)| *n > 0).map(|(s, n)| format!("{n} in {s:?}")).collect();
                let now = traffic.requests();
                if now != last || waiting.is_empty() {
                    (last, since) = (now, Instant::now());
                }
                if since.elapsed() < Self::PATIENCE {
                    continue;
                }
                Progress::clear();
                eprintln!("stableio: HANGS after {now} requests: {}", waiting.join(", "));
                let _ = std::fs::remove_dir_all(&place);
                // Threads that wait for these requests can not be ended in
                // good order.
                std::process::exit(1);
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The blocks that a range of bytes touches.
fn blocks(at: u64, len: usize) -> Range<u64> {
    at / BLOCK as u64..(at + len as u64).div_ceil(BLOCK as u64)
}

impl Write {
    /// The blocks that it touches.
    fn blocks(&self) -> Range<u64> {
        blocks(self.lot.at, self.lot.len)
    }
}

impl Findings {
    /// The stripes that something was found in.
    fn stripes(&self, geometry: &stableio_array::Geometry) -> impl Iterator<Item = u64> {
        let rows = u64::from(geometry.chunk_blocks);
        let blocks = self.bad_blocks.iter().map(|block| geometry.place(*block).stripe);
        blocks.chain(self.bad_rows.iter().map(move |row| row / rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(level: Level, unprotected: bool) -> Report {
        let until = Until::Raced(2000);
        let size = 32 << 20;
        let options =
            TortureOptions { level, unprotected, until, size, ..TortureOptions::default() };
        let report = run(&options, &mut |_| {}).unwrap();
        assert!(report.raced >= 2000, "{report:?}");
        report
    }

    #[test]
    fn what_is_protected_is_not_damaged() {
        for level in Level::ALL {
            let report = short(level, false);
            assert!(!report.is_damaged(), "{report:?}");
            assert_eq!(report.neighbours_exposed, 0, "{report:?}");
            assert_eq!(report.exit_code(), 0, "{report:?}");
        }
    }

    /// The twin: the same, with the memory declared stable.
    #[test]
    fn what_is_declared_stable_and_is_not_is_damaged() {
        let report = short(Level::Raid5, true);
        assert!(report.damaged * 100 >= report.raced, "{report:?}");
        assert!(report.bad_rows > 0 && report.neighbours_exposed > 0, "{report:?}");
        assert_eq!(report.exit_code(), 1);

        let report = short(Level::Single, true);
        assert!(report.damaged * 100 >= report.raced, "{report:?}");
        assert_eq!(report.bad_rows, 0, "no parity: {report:?}");
    }
}
