//! `run` and `detect` against a program that changes its buffers while it writes from them, and
//! knows when it did (`tests/programs/racer.c`).
//!
//! The storage is XFS on zram, which reads the data more than once: without help it stores what
//! nobody wrote.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use serde_json::Value;
use stableio_testkit::racer::{Log, Racer, Summary};
use stableio_testkit::{Child, Mounted, Scratch, quick, stableio};

/// Room for the writes of a test, and the file system.
const DEVICE_BYTES: u64 = 1 << 30;

/// The racer on storage that reads twice.
struct Bed {
    racer: Racer,
    fs: Mounted,
    scratch: Scratch,
}

impl Bed {
    fn new() -> io::Result<Option<Bed>> {
        let Some(racer) = Racer::build()? else { return Ok(None) };
        let Some(fs) = Mounted::xfs_on_zram(DEVICE_BYTES)? else { return Ok(None) };
        Ok(Some(Bed { racer, fs, scratch: Scratch::new()? }))
    }

    /// Runs the racer under `stableio WORDS --`.
    fn run(&self, words: &[&str], options: &[String]) -> io::Result<Summary> {
        let mut command = stableio(&self.scratch)?;
        command.args(words).arg("--").arg(self.racer.path()).args(options);
        command.arg(self.fs.path().join("file"));
        let ended = Child::spawn(command, &self.scratch)?.wait()?;
        if !ended.status.success() {
            return Err(io::Error::other(format!("{words:?} {options:?}: {ended:?}")));
        }
        ended.stdout.parse()
    }

    /// Runs it under `detect`, and returns the report as well.
    fn detect(&self, options: &[String]) -> io::Result<(Summary, Report)> {
        let path = self.scratch.path("report.json");
        let summary = self.run(&["detect", "--report", utf8(&path)], options)?;
        let report = serde_json::from_slice(&std::fs::read(path)?)?;
        Ok((summary, Report(report)))
    }
}

/// What `detect --report` wrote.
struct Report(Value);

impl Report {
    fn total(&self, name: &str) -> u64 {
        self.0["totals"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }

    /// The functions in the stack of each place, by its number.
    fn stacks(&self) -> HashMap<u64, Vec<String>> {
        let sites = self.0["sites"].as_array().expect("sites");
        let stacks = sites.iter().map(|site| {
            let frames = site["stack"].as_array().expect("a stack").iter();
            let functions = frames.filter_map(|frame| frame["function"].as_str());
            (site["id"].as_u64().expect("an id"), functions.map(str::to_owned).collect())
        });
        stacks.collect()
    }

    /// Where writes whose buffer changed lie in the file, and their place in the program.
    fn changed(&self) -> HashMap<u64, u64> {
        let findings = self.0["findings"].as_array().expect("findings").iter();
        let changed = findings.filter(|finding| finding["kind"] == "changed");
        changed
            .map(|finding| {
                let offset = finding["offset"].as_u64().expect("an offset");
                (offset, finding["site"].as_u64().expect("a place"))
            })
            .collect()
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

fn options(engine: &str, more: &[&str]) -> Vec<String> {
    let engine = format!("--engine={engine}");
    [engine].into_iter().chain(more.iter().map(|option| (*option).to_owned())).collect()
}

/// Linux 7.0 bounces there itself, and nothing is ever bad.
fn kernel_bounces() -> io::Result<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let major = release.split('.').next().and_then(|number| number.parse::<u32>().ok());
    Ok(major.is_some_and(|major| major >= 7))
}

/// 100,000 raced writes of an engine: nothing bad under each policy that protects, and the twin
/// without protection.
fn nothing_bad(engine: &str) -> io::Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    let count = if quick() { "--count=10000" } else { "--count=100000" };
    let race = options(engine, &["--verify", count]);
    for policy in ["auto", "bounce", "uncached"] {
        let summary = bed.run(&["run", "--policy", policy], &race)?;
        assert_eq!(summary.bad_blocks, Some(0), "{policy}: {}", summary.json);
        assert_eq!((summary.errors, summary.short), (0, 0), "{policy}: {}", summary.json);
    }
    let summary = bed.run(&["run", "--policy", "off"], &race)?;
    let bad = summary.bad_blocks.expect("it verified");
    assert!(bad > 100 || kernel_bounces()?, "off: {}", summary.json);
    Ok(())
}

/// What the log says changed in flight is found, in the function that submitted it, and nothing
/// where nothing changed.
///
/// Returns how many were found, of how many that the log was sure of: on a busy machine the mutator
/// may sleep through a run.
fn found(bed: &Bed, engine: &str, load: [&str; 3]) -> io::Result<(u64, u64)> {
    let [block, count, mutator] = load;
    let log_path = bed.scratch.path("log");
    let log_option = format!("--log={}", log_path.display());
    // Each write at its own offset, by which it is known; and sure of what is in the middle of a
    // call only, as looking at the memory takes a part of it.
    let plain = [block, count, mutator, "--span=512M", "--margin=35", &log_option];
    let (summary, report) = bed.detect(&options(engine, &plain))?;
    assert_eq!(report.total("watched"), summary.writes, "{}", report.0["totals"]);
    assert_eq!(report.total("unwatched"), 0);
    let (changed, stacks) = (report.changed(), report.stacks());
    let log = Log::read(&log_path)?;
    let (mut expected, mut seen) = (0, 0);
    let function = format!("submit_{engine}");
    for write in log.changed() {
        expected += 1;
        let Some(site) = changed.get(&write.offset) else { continue };
        seen += 1;
        assert!(stacks[site].contains(&function), "{function} not in {:?}", stacks[site]);
    }

    let clean = [block, count, mutator, "--mode=clean"];
    let (summary, report) = bed.detect(&options(engine, &clean))?;
    assert_eq!(summary.clean, summary.writes, "{}", summary.json);
    assert_eq!(report.total("watched"), summary.writes);
    assert_eq!((report.total("changed"), report.total("reused")), (0, 0), "{}", report.0);
    println!("{engine} {load:?}: {seen} found of {expected}");
    Ok((seen, expected))
}

fn changes_are_found(engine: &str) -> io::Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    let (mut seen, mut sure) = (0, 0);
    for mutator in ["--mutator=thread", "--mutator=process"] {
        for (block, count) in [
            ("--block=4K", "--count=10000"),
            ("--block=64K", "--count=2000"),
            ("--block=1M", "--count=200"),
        ] {
            let of = found(&bed, engine, [block, count, mutator])?;
            (seen, sure) = (seen + of.0, sure + of.1);
        }
    }
    assert!(sure > 500, "{engine}: too little changed to show anything: {sure}");
    assert!(seen * 100 >= sure * 99, "{engine}: {seen} found of {sure}");
    Ok(())
}

macro_rules! engines {
    ($($engine:ident)+) => {$(
        mod $engine {
            use super::*;

            #[test]
            fn nothing_bad_in_raced_writes() -> io::Result<()> {
                nothing_bad(stringify!($engine))
            }

            #[test]
            fn changes_are_found() -> io::Result<()> {
                super::changes_are_found(stringify!($engine))
            }
        }
    )+};
}

engines!(sync vsync syscall inline posixaio libaio liburing uring);

/// One buffer twice in a request, and in two requests at once: nothing bad, nothing lost.
#[test]
fn odd_requests_are_protected() -> io::Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    for engine in ["vsync", "libaio", "liburing", "uring"] {
        for mode in ["twice", "overlap", "revert"] {
            // Of a synchronous engine, two threads.
            let threads = if engine == "vsync" { "--threads=2" } else { "--threads=1" };
            let mode = format!("--mode={mode}");
            let race = options(engine, &["--verify", "--count=20000", threads, &mode]);
            let summary = bed.run(&["run", "--policy", "bounce"], &race)?;
            assert_eq!(summary.bad_blocks, Some(0), "{engine} {mode}: {}", summary.json);
            assert_eq!(summary.errors, 0, "{engine} {mode}: {}", summary.json);
        }
    }
    for engine in ["liburing", "uring"] {
        let race = options(engine, &["--verify", "--count=20000", "--fixed", "--wait"]);
        let summary = bed.run(&["run"], &race)?;
        assert_eq!(summary.bad_blocks, Some(0), "{engine} --fixed: {}", summary.json);
    }
    Ok(())
}

/// A change that is undone before the write completes escapes, as the summary says.
#[test]
fn what_is_undone_is_not_seen() -> io::Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    let (summary, report) = bed.detect(&options("sync", &["--mode=revert", "--count=5000"]))?;
    assert!(report.0["not_seen"].as_str().is_some_and(|said| said.contains("undone")));
    // A look may fall between a change and its undoing. Not all do.
    assert!(report.total("changed") < summary.writes, "{}", report.0["totals"]);
    Ok(())
}

/// As many writes are in flight under `bounce` as without: asynchronous I/O stays asynchronous.
#[test]
fn depth_is_as_without() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let Some(fs) = Mounted::on_loop("ext4", DEVICE_BYTES)? else { return Ok(()) };
    let bed = Bed { racer, fs, scratch: Scratch::new()? };
    for engine in ["libaio", "liburing", "uring", "posixaio"] {
        let load = options(
            engine,
            &["--depth=32", "--batch=32", "--block=64K", "--count=4000", "--mutator=none"],
        );
        let plain = bed.run(&["run", "--policy", "off"], &load)?;
        let bounced = bed.run(&["run", "--policy", "bounce"], &load)?;
        assert_eq!(bounced.max_in_flight, plain.max_in_flight, "{engine}: {}", bounced.json);
        assert_eq!(plain.max_in_flight, 32, "{engine}: {}", plain.json);
        // What it saw unfinished when it looked: not all of it done one after the other.
        let (with, without) = (bounced.max_pending, plain.max_pending);
        assert!(with * 4 >= without * 3, "{engine}: {with} pending, without {without}");
    }
    Ok(())
}

/// btrfs verifies direct reads in the program's memory: whoever changes that sees errors of data
/// that is whole. From private memory nobody does.
#[test]
fn reads_that_are_verified_below_do_not_fail() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let Some(fs) = Mounted::on_loop("btrfs", DEVICE_BYTES)? else { return Ok(()) };
    let (scratch, file) = (Scratch::new()?, fs.path().join("file"));
    std::fs::write(&file, vec![0x5a; 64 << 20])?;
    std::fs::File::open(&file)?.sync_all()?;
    let failed = |policy: &str| -> io::Result<u64> {
        let mut command = stableio(&scratch)?;
        command.args(["run", "--policy", policy, "--"]).arg(racer.reader());
        // Of 1 MiB: while they are summed there is time to change them.
        command.arg(&file).args(["1000", "1048576"]);
        let ended = Child::spawn(command, &scratch)?.wait()?;
        let json: Value = serde_json::from_str(&ended.stdout)?;
        assert_eq!(json["short"], 0, "{policy}: {ended:?}");
        json["failed"].as_u64().ok_or_else(|| io::Error::other(format!("{ended:?}")))
    };
    for policy in ["auto", "bounce", "uncached"] {
        assert_eq!(failed(policy)?, 0, "{policy}");
    }
    assert!(failed("off")? > 0 || kernel_bounces()?);
    Ok(())
}

/// A second I/O into a buffer that is in flight is a finding of its own; two writes from one are
/// none.
#[test]
fn a_read_into_a_buffer_in_flight_is_found() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let Some(fs) = Mounted::on_loop("ext4", DEVICE_BYTES)? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let (report, file) = (scratch.path("report.json"), fs.path().join("file"));
    for (second, expected) in [("read", 200), ("write", 0), ("elsewhere", 0)] {
        let mut command = stableio(&scratch)?;
        command.args(["detect", "--error-exitcode", "9", "--report", utf8(&report), "--"]);
        command.arg(racer.reuser()).arg(&file).args([second, "200"]);
        let ended = Child::spawn(command, &scratch)?.wait()?;
        let report = Report(serde_json::from_slice(&std::fs::read(&report)?)?);
        assert_eq!(report.total("reused"), expected, "{second}: {}", report.0);
        assert_eq!(ended.status.code(), Some(if expected > 0 { 9 } else { 0 }), "{ended:?}");
    }
    Ok(())
}
