//! What a server says of itself: the answer to `status`, which is also what
//! `status --json` prints.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use stableio_array::health::{HowFar, MemberHealth, Progress};
use stableio_array::{ArrayDevice, Health, Superblock};
use stableio_block::path::{Stage, Traffic};
use stableio_block::{Handle, Issuer};
use stableio_mem::{BLOCK, Pool};

/// What a server knows of itself.
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) started: Instant,
    pub(crate) array: Option<ServedArray>,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) size: u64,
    pub(crate) exports: Vec<String>,
    pub(crate) issuers: Vec<Arc<Issuer>>,
}

/// What is served, where it is an array.
pub(crate) struct ServedArray {
    /// As it was opened.
    pub(crate) superblock: Superblock,
    pub(crate) health: Arc<Health>,
    pub(crate) device: Arc<ArrayDevice>,
    pub(crate) worker: Handle,
}

/// How an array is, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// An image as it is, of which nothing is known.
    Raw,
    /// All members are in sync and nothing is lost.
    Healthy,
    /// Members are missing, as the redundancy absorbs.
    Degraded,
    /// More members are missing than that, or blocks are lost.
    Damaged,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: u64,
    pub(crate) state: State,
    pub(crate) level: Option<String>,
    pub(crate) size_bytes: u64,
    pub(crate) chunk_bytes: Option<u64>,
    pub(crate) members: Vec<MemberReport>,
    pub(crate) rebuild: Option<ProgressReport>,
    pub(crate) scrub: Option<ProgressReport>,
    /// Whether blocks have checksums; `None` where there is no array.
    pub(crate) checksums: Option<bool>,
    /// `None` without a log.
    pub(crate) log: Option<LogReport>,
    pub(crate) benign_mismatches: u64,
    pub(crate) blocks_mended: u64,
    pub(crate) blocks_differed: u64,
    pub(crate) tuples_mended: u64,
    pub(crate) lost_reads: u64,
    pub(crate) rows_recovered: u64,
    pub(crate) blocks_lost: u64,
    pub(crate) reads: u64,
    pub(crate) read_bytes: u64,
    pub(crate) writes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) writes_stabilized: u64,
    pub(crate) writes_promised: u64,
    pub(crate) failed: u64,
    pub(crate) pool_bytes: u64,
    pub(crate) pool_used_bytes: u64,
    /// Requests by the stage in which they wait now.
    pub(crate) waiting: Vec<(String, usize)>,
    pub(crate) exports: Vec<String>,
    pub(crate) issuers: Vec<IssuerReport>,
    pub(crate) events: Vec<String>,
    /// The number of the last event.
    pub(crate) last_event: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MemberReport {
    pub(crate) role: usize,
    pub(crate) name: String,
    pub(crate) in_sync: bool,
    /// The member that is being filled to take its place.
    pub(crate) filling: Option<String>,
    pub(crate) read_errors: u64,
    pub(crate) write_errors: u64,
    pub(crate) mismatches: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LogReport {
    pub(crate) used_blocks: u64,
    pub(crate) blocks: u64,
}

/// How far a rebuild or a scrub is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProgressReport {
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) bytes_per_second: f64,
    pub(crate) seconds_left: f64,
    pub(crate) paused: bool,
}

/// A source of requests: an export, or a queue of one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct IssuerReport {
    pub(crate) name: String,
    pub(crate) benign_mismatches: u64,
    pub(crate) reads_privately: bool,
}

impl State {
    pub(crate) fn word(self) -> &'static str {
        match self {
            State::Raw => "AS IT IS",
            State::Healthy => "HEALTHY",
            State::Degraded => "DEGRADED",
            State::Damaged => "DAMAGED",
        }
    }
}

impl Served {
    pub(crate) fn report(&self) -> Report {
        let health = self.array.as_ref().map(|array| &*array.health);
        let count =
            |pick: fn(&Health) -> &AtomicU64| health.map_or(0, |health| pick(health).load(Relaxed));
        let geometry = self.array.as_ref().map(|array| array.superblock.geometry);
        let members = health.map(|health| &health.members[..]).unwrap_or_default();
        let t = &self.traffic;
        Report {
            name: self.name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state: self.array.as_ref().map_or(State::Raw, ServedArray::state),
            level: geometry.map(|g| g.level.name().to_owned()),
            size_bytes: self.size,
            chunk_bytes: geometry.map(|g| g.chunk_bytes()),
            members: members.iter().enumerate().map(MemberReport::of).collect(),
            rebuild: health.and_then(|health| ProgressReport::of(&health.rebuild)),
            scrub: health.and_then(|health| ProgressReport::of(&health.scrub)),
            checksums: self.array.as_ref().map(|array| array.superblock.checksums),
            log: self.array.as_ref().filter(|array| array.superblock.log).map(|array| LogReport {
                used_blocks: count(|h| &h.log_used),
                blocks: u64::from(array.superblock.geometry.log_blocks),
            }),
            benign_mismatches: count(|h| &h.benign_mismatches),
            blocks_mended: count(|h| &h.blocks_mended),
            blocks_differed: count(|h| &h.blocks_differed),
            tuples_mended: count(|h| &h.tuples_mended),
            lost_reads: count(|h| &h.lost_reads),
            rows_recovered: count(|h| &h.rows_recovered),
            blocks_lost: count(|h| &h.blocks_lost),
            reads: t.reads.load(Relaxed),
            read_bytes: t.read_bytes.load(Relaxed),
            writes: t.writes.load(Relaxed),
            written_bytes: t.written_bytes.load(Relaxed),
            writes_stabilized: t.stabilized.load(Relaxed),
            writes_promised: t.promised.load(Relaxed),
            failed: t.failed.load(Relaxed),
            pool_bytes: self.pool.size() as u64,
            pool_used_bytes: self.pool.used() as u64,
            waiting: Stage::ALL
                .iter()
                .map(|s| (format!("{s:?}").to_lowercase(), t.waiting(*s)))
                .collect(),
            exports: self.exports.clone(),
            issuers: self.issuers.iter().map(|issuer| IssuerReport::of(issuer)).collect(),
            events: health.map(Health::events).unwrap_or_default(),
            last_event: health.map_or(0, Health::last_event),
        }
    }
}

impl ServedArray {
    fn state(&self) -> State {
        let out = |member: &&MemberHealth| !member.in_sync.load(Relaxed);
        let missing = self.health.members.iter().filter(out).count();
        let lost = [&self.health.blocks_lost, &self.health.lost_reads];
        if missing > self.superblock.geometry.redundancy()
            || lost.iter().any(|count| count.load(Relaxed) > 0)
        {
            State::Damaged
        } else if missing > 0 {
            State::Degraded
        } else {
            State::Healthy
        }
    }
}

impl Report {
    /// Blocks and tuples mended, reads of lost blocks, and blocks that differed
    /// in scrubs, so far.
    pub(crate) fn mending(&self) -> [u64; 4] {
        [self.blocks_mended, self.tuples_mended, self.lost_reads, self.blocks_differed]
    }
}

impl MemberReport {
    fn of((role, member): (usize, &MemberHealth)) -> Self {
        Self {
            role,
            name: member.name(),
            in_sync: member.in_sync.load(Relaxed),
            filling: member.next(),
            read_errors: member.read_errors.load(Relaxed),
            write_errors: member.write_errors.load(Relaxed),
            mismatches: member.mismatches.load(Relaxed),
        }
    }

    /// `in sync`, `MISSING`, and how far the one is that takes its place.
    pub(crate) fn state(&self, rebuild: Option<&ProgressReport>) -> String {
        let own = if self.in_sync { "in sync" } else { "MISSING" };
        match &self.filling {
            Some(next) => {
                let percent = rebuild.map_or(0.0, ProgressReport::percent);
                format!("{own}, {next} filling {percent:.0} %")
            }
            None => own.to_owned(),
        }
    }
}

impl ProgressReport {
    fn of(progress: &Progress) -> Option<Self> {
        let HowFar { done, total, rate, seconds_left, paused } = progress.how_far()?;
        Some(Self {
            done_bytes: done,
            total_bytes: total,
            bytes_per_second: rate,
            seconds_left,
            paused,
        })
    }

    pub(crate) fn percent(&self) -> f64 {
        self.done_bytes as f64 * 100.0 / self.total_bytes.max(1) as f64
    }

    /// For a person: how far, how fast, how long still.
    pub(crate) fn line(&self) -> String {
        let percent = self.percent();
        if self.paused {
            return format!("{percent:.1} %, PAUSED");
        }
        let rate = self.bytes_per_second / f64::from(1 << 20);
        let left = match self.seconds_left as u64 {
            _ if rate < 0.01 => "no rate yet".to_owned(),
            s @ 0..120 => format!("{s} s left"),
            s @ 120..7200 => format!("{} min left", s / 60),
            s => format!("{} h left", s / 3600),
        };
        format!("{percent:.1} %, {rate:.1} MiB/s, {left}")
    }
}

impl LogReport {
    pub(crate) fn line(&self) -> String {
        let percent = self.used_blocks * 100 / self.blocks.max(1);
        format!("{percent} % of {}", stableio_mem::Bytes(self.blocks * BLOCK as u64))
    }
}

impl IssuerReport {
    fn of(issuer: &Issuer) -> Self {
        Self {
            name: issuer.name().to_owned(),
            benign_mismatches: issuer.benign_mismatches(),
            reads_privately: issuer.reads_privately(),
        }
    }
}
