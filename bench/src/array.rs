//! Arrays on files in memory beside one such file: what rows, checksums and the log leave of it.
//!
//! Both sides take the same load, from the same kind of memory, on the same worker. With no
//! medium to wait for, what is measured is software and memory bandwidth: an array that writes
//! each byte one and a half times can not be as fast as a file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use stableio_array::superblock::Id;
use stableio_array::{Level, TendError, prepare_replacement};
use stableio_block::{Stack, Worker};
use stableio_testkit::{Mounted, Scratch};

use crate::Plan;
use crate::bed::{self, Bed, Shape};
use crate::compare::{Case, Row, Side, Unit, compare};
use crate::load::{Load, Order, What};

pub(crate) const NAME: &str = "array";
pub(crate) const ABOUT: &str = "arrays on files in memory, against one such file";

const PEER: &str = "one file";
const BTRFS: &str = "btrfs, checksums on, on a loop device";

/// Load stays in this much: more than caches hold.
const AREA_BYTES: u64 = 512 << 20;
/// Where tuples are not to be cached.
const LARGE_AREA_BYTES: u64 = 1 << 30;
/// Room for a file of [`AREA_BYTES`] that is written anew again and again.
const BTRFS_BYTES: u64 = 2 << 30;
/// Tuples that a small cache holds: of some MiB of data.
const FEW_TUPLES: usize = 64 << 10;

const WRITE_1M: Load = Load {
    what: What::Write,
    order: Order::Sequential,
    block: 1 << 20,
    depth: 8,
    area: AREA_BYTES,
};
const READ_1M: Load = Load { what: What::Read, ..WRITE_1M };
const COPY_1M: Load = Load { what: What::Copy, ..WRITE_1M };
const WRITE_4K: Load =
    Load { what: What::Write, order: Order::Random, block: 4 << 10, depth: 32, area: AREA_BYTES };
const READ_4K: Load = Load { what: What::Read, ..WRITE_4K };

struct Try {
    name: &'static str,
    level: Level,
    members: usize,
    load: Load,
    cached: bool,
    target: f64,
}

const fn on(name: &'static str, (level, members): (Level, usize), load: Load, target: f64) -> Try {
    Try { name, level, members, load, cached: true, target }
}

const SINGLE: (Level, usize) = (Level::Single, 1);
const RAID1: (Level, usize) = (Level::Raid1, 2);
const RAID5: (Level, usize) = (Level::Raid5, 3);
const RAID6: (Level, usize) = (Level::Raid6, 5);

const TRIES: [Try; 9] = [
    on("single-write-1m", SINGLE, WRITE_1M, 0.6),
    on("raid5-write-1m", RAID5, WRITE_1M, 0.6),
    on("raid6-write-1m", RAID6, WRITE_1M, 0.6),
    on("raid1-write-1m", RAID1, WRITE_1M, 0.45),
    on("single-randread-4k", SINGLE, READ_4K, 0.8),
    on("raid5-randread-4k", RAID5, READ_4K, 0.8),
    Try {
        cached: false,
        ..on("raid5-randread-4k-uncached", RAID5, Load { area: LARGE_AREA_BYTES, ..READ_4K }, 0.45)
    },
    on("raid1-randwrite-4k-qd32", RAID1, WRITE_4K, 0.35),
    on("raid5-randwrite-4k-qd32", RAID5, WRITE_4K, 0.12),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let worker = Worker::start("bench")?;
    let dir = bed::in_memory(LARGE_AREA_BYTES)?;
    let file = bed::file_stack(&dir.path("file"), LARGE_AREA_BYTES, &worker)?;
    let mut rows = Vec::new();
    for attempt in TRIES.iter().filter(|t| plan.wants(t.name)) {
        rows.push(attempt.row(plan, &worker, &file)?);
    }
    if plan.wants(OVER_BTRFS) {
        rows.extend(over_btrfs(plan, &worker)?);
    }
    if plan.wants(SCRUB) {
        rows.push(scrub(plan, &worker, &file)?);
    }
    if plan.wants(REBUILD) {
        rows.push(rebuild(plan, &worker, &file)?);
    }
    for (name, load) in BESIDE_SCRUB.into_iter().filter(|(name, _)| plan.wants(name)) {
        rows.push(beside_scrub(plan, &worker, name, load)?);
    }
    Ok(rows)
}

impl Try {
    fn row(&self, plan: &Plan, worker: &Worker, file: &Stack) -> anyhow::Result<Row> {
        let unit = if self.load.block == 4 << 10 { Unit::OpsPerS } else { Unit::MibPerS };
        let case = Case { family: NAME, name: self.name, unit, target: Some(self.target) };
        let shape = Shape::new(self.level, self.members, self.load.area);
        let mut shape = Shape { large: true, ..shape };
        if !self.cached {
            shape.tuples = FEW_TUPLES;
        }
        let bed = plan.ours(|| Bed::on_files(shape, worker))?;
        let mut side = bed.as_ref().map(|bed| bed.stack.clone()).map_err(String::clone);
        let row = compare(case, &mut side, &mut plan.peer(file.clone()), PEER, |stack| {
            Ok(unit.of(self.load.run(stack, plan.sample)?, self.load.block))
        });
        close(bed)?;
        Ok(row)
    }
}

const OVER_BTRFS: &str = "raid5-randwrite-4k-over-btrfs";

/// The other way to have checksums: a file system that copies on write.
fn over_btrfs(plan: &Plan, worker: &Worker) -> anyhow::Result<Option<Row>> {
    let Some(btrfs) = Mounted::on_loop_in_memory("btrfs", BTRFS_BYTES)? else {
        eprintln!("array/{OVER_BTRFS}: left out; it needs root, mkfs.btrfs and a loop device");
        return Ok(None);
    };
    let case = Case { family: NAME, name: OVER_BTRFS, unit: Unit::OpsPerS, target: Some(4.0) };
    let file = bed::file_stack(&btrfs.path().join("file"), AREA_BYTES, worker)?;
    let shape = Shape { large: true, ..Shape::new(Level::Raid5, 3, AREA_BYTES) };
    let bed = plan.ours(|| Bed::on_files(shape, worker))?;
    let mut side = bed.as_ref().map(|bed| bed.stack.clone()).map_err(String::clone);
    let mut peer = plan.peer(file);
    let row = compare(case, &mut side, &mut peer, BTRFS, |stack| {
        Ok(Unit::OpsPerS.of(WRITE_4K.run(stack, plan.sample)?, WRITE_4K.block))
    });
    close(bed)?;
    Ok(Some(row))
}

const SCRUB: &str = "scrub";
const REBUILD: &str = "rebuild";

/// An array that looks after itself, or a file under a load that moves as many bytes.
enum Tended<'a> {
    Array(&'a Bed),
    File(&'a Stack),
}

/// All bytes that a scrub reads.
fn scrub(plan: &Plan, worker: &Worker, file: &Stack) -> anyhow::Result<Row> {
    tend(plan, worker, file, SCRUB, READ_1M, |bed| {
        let began = Instant::now();
        let health = bed.array.health();
        let before = health.events().len();
        bed.array.device().begin_scrub().wait().map_err(io::Error::other)?;
        bed::wait_until(|| health.events().len() > before);
        expect_event(bed, "the scrub has looked at everything")?;
        Ok(bed.bytes_of_rows() as f64 / began.elapsed().as_secs_f64())
    })
}

/// All bytes that a rebuild reads and writes. The new member's file has its blocks already, as
/// that of the peer has.
fn rebuild(plan: &Plan, worker: &Worker, file: &Stack) -> anyhow::Result<Row> {
    const ROLE: usize = 2;
    tend(plan, worker, file, REBUILD, COPY_1M, |bed| {
        let geometry = bed.array.superblock().geometry;
        let spare = Scratch::with_room(geometry.member_size)?;
        let path = spare.path("spare");
        bed::write_file(&path, geometry.member_size)?;
        prepare_replacement(&path, &geometry, true).map_err(io::Error::other)?;
        let device = Arc::new(bed::file(&path, worker).map_err(io::Error::other)?);
        let array = bed.array.device();
        array.begin_remove(ROLE).wait().map_err(io::Error::other)?;
        let member = &bed.array.health().members[ROLE];
        let began = Instant::now();
        array
            .begin_replace(ROLE, Id::random(), device, "spare".to_owned())
            .wait()
            .map_err(io::Error::other)?;
        bed::wait_until(|| member.next().is_none());
        let took = began.elapsed().as_secs_f64();
        match member.in_sync.load(Ordering::Relaxed) {
            true => Ok(bed.bytes_of_rows() as f64 / took),
            false => Err(io::Error::other("the new member was left out")),
        }
    })
}

const BESIDE_SCRUB: [(&str, Load); 2] =
    [("randread-4k-beside-scrub", READ_4K), ("randwrite-4k-beside-scrub", WRITE_4K)];

/// A load on an array that is looked through all the while, and the same load on the same array
/// alone.
fn beside_scrub(
    plan: &Plan,
    worker: &Worker,
    name: &'static str,
    load: Load,
) -> anyhow::Result<Row> {
    let case = Case { family: NAME, name, unit: Unit::OpsPerS, target: Some(0.5) };
    let bed = Bed::on_files(Shape::new(Level::Raid5, 3, AREA_BYTES), worker)?;
    bed.fill_all()?;
    let (mut beside, mut alone) = (plan.ours(|| Ok(true))?, plan.peer(false));
    let row = compare(case, &mut beside, &mut alone, "the same alone", |scrubs| {
        let rate = match scrubs {
            true => while_scrubbing(&bed, || load.run(&bed.stack, plan.sample))?,
            false => load.run(&bed.stack, plan.sample)?,
        };
        Ok(Unit::OpsPerS.of(rate, load.block))
    });
    bed.array.close()?;
    Ok(row)
}

/// Runs `load` while one scrub after the other looks through the array.
fn while_scrubbing<T: Send>(
    bed: &Bed,
    load: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let array = bed.array.device();
    let scrub = || match array.begin_scrub().wait() {
        Ok(()) | Err(TendError::Busy(_)) => Ok(()),
        Err(error) => Err(io::Error::other(error)),
    };
    scrub()?;
    let loaded = thread::scope(|scope| {
        let load = scope.spawn(load);
        while !load.is_finished() {
            scrub()?;
            thread::sleep(Duration::from_millis(1));
        }
        load.join().expect("a load does not panic")
    })?;
    array.stop_scrub().wait().map_err(io::Error::other)?;
    Ok(loaded)
}

fn tend(
    plan: &Plan,
    worker: &Worker,
    file: &Stack,
    name: &'static str,
    load: Load,
    tend: impl Fn(&Bed) -> io::Result<f64>,
) -> anyhow::Result<Row> {
    let case = Case { family: NAME, name, unit: Unit::MibPerS, target: Some(0.7) };
    let bed = plan.ours(|| {
        let bed = Bed::on_files(Shape::new(Level::Raid5, 3, AREA_BYTES), worker)?;
        bed.fill_all()?;
        Ok(bed)
    })?;
    let mut side = bed.as_ref().map(Tended::Array).map_err(String::clone);
    let row = compare(case, &mut side, &mut plan.peer(Tended::File(file)), PEER, |side| {
        let rate = match side {
            Tended::Array(bed) => tend(bed)?,
            Tended::File(stack) => load.run(stack, plan.sample)?,
        };
        Ok(Unit::MibPerS.of(rate, load.block))
    });
    close(bed)?;
    Ok(row)
}

fn expect_event(bed: &Bed, what: &str) -> io::Result<()> {
    let events = bed.array.health().events();
    match events.last() {
        Some(event) if event == what => Ok(()),
        other => Err(io::Error::other(format!("{what:?} was to come, not {other:?}"))),
    }
}

pub(crate) fn close(bed: Side<Bed>) -> anyhow::Result<()> {
    if let Ok(bed) = bed {
        bed.array.close()?;
    }
    Ok(())
}
