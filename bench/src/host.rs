//! What `run` and `detect` cost a program: fio with them and without, on the same file.
//!
//! On tmpfs, where nothing but software is in the way: it takes direct I/O, and has neither a
//! medium to wait for nor rules of alignment. On XFS over a loop device, `uncached` beside
//! `bounce`: what kernels made people pay when they gave direct I/O up.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use stableio_testkit::{Mounted, Scratch, fio_under, require_tool, stableio_bin};

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare};

pub(crate) const NAME: &str = "host";
pub(crate) const ABOUT: &str = "programs under run and detect, against the same without";

const AREA_BYTES: u64 = 256 << 20;
/// Room on the loop device for the area and the file system.
const DEVICE_BYTES: u64 = 1 << 30;

/// How fio submits.
#[derive(Clone, Copy)]
struct Engine {
    name: &'static str,
    depth: &'static str,
}

const PSYNC: Engine = Engine { name: "psync", depth: "1" };
const LIBAIO: Engine = Engine { name: "libaio", depth: "32" };
const IO_URING: Engine = Engine { name: "io_uring", depth: "32" };

/// What fio runs under.
#[derive(Clone, Copy)]
enum Under {
    Bounce,
    Uncached,
    Detect,
}

struct Load {
    name: &'static str,
    engine: Engine,
    under: Under,
    block: &'static str,
    target: Option<f64>,
}

const fn load(
    name: &'static str,
    engine: Engine,
    under: Under,
    block: &'static str,
    target: Option<f64>,
) -> Load {
    Load { name, engine, under, block, target }
}

const ON_TMPFS: [Load; 18] = [
    load("psync-bounce-4k", PSYNC, Under::Bounce, "4k", Some(0.9)),
    load("psync-bounce-64k", PSYNC, Under::Bounce, "64k", Some(0.9)),
    load("psync-bounce-1m", PSYNC, Under::Bounce, "1m", Some(0.75)),
    load("psync-detect-4k", PSYNC, Under::Detect, "4k", Some(0.85)),
    load("psync-detect-64k", PSYNC, Under::Detect, "64k", Some(0.75)),
    load("psync-detect-1m", PSYNC, Under::Detect, "1m", Some(0.6)),
    load("libaio-bounce-4k", LIBAIO, Under::Bounce, "4k", Some(0.9)),
    load("libaio-bounce-64k", LIBAIO, Under::Bounce, "64k", Some(0.9)),
    load("libaio-bounce-1m", LIBAIO, Under::Bounce, "1m", Some(0.75)),
    load("libaio-detect-4k", LIBAIO, Under::Detect, "4k", Some(0.85)),
    load("libaio-detect-64k", LIBAIO, Under::Detect, "64k", Some(0.75)),
    load("libaio-detect-1m", LIBAIO, Under::Detect, "1m", Some(0.6)),
    load("io_uring-bounce-4k", IO_URING, Under::Bounce, "4k", Some(0.9)),
    load("io_uring-bounce-64k", IO_URING, Under::Bounce, "64k", Some(0.9)),
    load("io_uring-bounce-1m", IO_URING, Under::Bounce, "1m", Some(0.75)),
    load("io_uring-detect-4k", IO_URING, Under::Detect, "4k", Some(0.85)),
    load("io_uring-detect-64k", IO_URING, Under::Detect, "64k", Some(0.75)),
    load("io_uring-detect-1m", IO_URING, Under::Detect, "1m", Some(0.6)),
];

/// Reported only: what falling back costs, and what bouncing does.
const ON_LOOP: [Load; 6] = [
    load("xfs-libaio-bounce-4k", LIBAIO, Under::Bounce, "4k", None),
    load("xfs-libaio-uncached-4k", LIBAIO, Under::Uncached, "4k", None),
    load("xfs-io_uring-bounce-64k", IO_URING, Under::Bounce, "64k", None),
    load("xfs-io_uring-uncached-64k", IO_URING, Under::Uncached, "64k", None),
    load("xfs-io_uring-bounce-1m", IO_URING, Under::Bounce, "1m", None),
    load("xfs-io_uring-uncached-1m", IO_URING, Under::Uncached, "1m", None),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    require_tool("fio").context("fio is not installed")?;
    let scratch = Scratch::with_room(2 * AREA_BYTES)?;
    let mut rows = measure(plan, &ON_TMPFS, &scratch.path("area"))?;
    match Mounted::on_loop("xfs", DEVICE_BYTES)? {
        Some(xfs) => rows.extend(measure(plan, &ON_LOOP, &xfs.path().join("area"))?),
        None => eprintln!("host: no XFS on a loop device here, its rows are left out"),
    }
    Ok(rows)
}

fn measure(plan: &Plan, loads: &[Load], file: &Path) -> anyhow::Result<Vec<Row>> {
    fill(file)?;
    let rows = loads.iter().map(|load| {
        let case = Case {
            family: NAME,
            name: load.name,
            unit: if load.block == "4k" { Unit::OpsPerS } else { Unit::MibPerS },
            target: load.target,
        };
        let unit = case.unit;
        let mut ours: Side<Vec<OsString>> = match plan.peers_only {
            true => Err("left out (--peers-only)".to_owned()),
            false => load.under.launcher().map_err(|error| error.to_string()),
        };
        let peer_name = format!("fio {}, plain", load.engine.name);
        compare(case, &mut ours, &mut Ok(Vec::new()), &peer_name, |launcher| {
            load.sample(launcher, file, plan.sample, unit)
        })
    });
    Ok(rows.collect())
}

impl Under {
    fn launcher(self) -> io::Result<Vec<OsString>> {
        let words: &[&str] = match self {
            Under::Bounce => &["run", "--policy", "bounce", "--"],
            Under::Uncached => &["run", "--policy", "uncached", "--"],
            Under::Detect => &["detect", "--"],
        };
        let binary = OsString::from(stableio_bin()?);
        Ok([binary].into_iter().chain(words.iter().map(OsString::from)).collect())
    }
}

impl Load {
    fn sample(
        &self,
        launcher: &[OsString],
        file: &Path,
        runtime: Duration,
        unit: Unit,
    ) -> io::Result<f64> {
        let runtime = runtime.as_secs().to_string();
        let timed = [("time_based", "1"), ("runtime", runtime.as_str()), ("norandommap", "1")];
        let file = file.to_string_lossy();
        let area = AREA_BYTES.to_string();
        let job = [
            ("ioengine", self.engine.name),
            ("iodepth", self.engine.depth),
            ("rw", "randwrite"),
            ("bs", self.block),
            ("direct", "1"),
            ("filename", file.as_ref()),
            ("size", area.as_str()),
        ];
        let report = fio_under(launcher, &[&job[..], &timed].concat())?;
        Ok(match unit {
            Unit::OpsPerS => report.iops,
            Unit::MibPerS => report.bytes_per_s / f64::from(1 << 20),
            Unit::GbPerS => report.bytes_per_s / 1e9,
        })
    }
}

/// Writes the file once, so that every sample finds the same.
fn fill(file: &Path) -> anyhow::Result<()> {
    let file = file.to_string_lossy();
    let area = AREA_BYTES.to_string();
    let job = [
        ("ioengine", "psync"),
        ("rw", "write"),
        ("bs", "1m"),
        ("direct", "1"),
        ("filename", file.as_ref()),
        ("size", area.as_str()),
    ];
    fio_under(&[], &job).context("cannot write the file to be measured")?;
    Ok(())
}
