//! How opening an array grows with its size and with what its log holds: the time until it can be
//! used, and the memory that it then takes.
//!
//! Each array is written to and left by a process of its own, which closes it or just ends; each
//! opening is a process of its own, too, so that its memory is nobody else's. Members are sparse
//! files in memory: there is no medium to wait for.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use stableio_array::array::ArrayOptions;
use stableio_array::geometry::LOG_AT;
use stableio_array::{Array, Attached, Geometry, Level};
use stableio_block::{Device, Handle, Limits, Op, Outcome, Request, Ticket, Worker, exec, ring};
use stableio_mem::BLOCK;
use stableio_testkit::copy_sparse;

use crate::bed::{self, Shape};
use crate::load::{Load, Order, Until, What};

pub(crate) const NAME: &str = "growth";
pub(crate) const ABOUT: &str = "opening a raid5 of three members: time until usable, and memory";

/// Openings of each; the medians are shown.
const ROUNDS: usize = 3;
/// Room for what is really written.
const ROOM: u64 = 2 << 30;
/// A log that does not fill any further by then is full.
const PATIENCE: Duration = Duration::from_secs(2);

const SIZES: [(&str, u64); 3] = [("1 GiB", 1 << 30), ("100 GiB", 100 << 30), ("10 TiB", 10 << 40)];

/// How an array was left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Closed,
    /// The process ended, with this share of the log in use, in percent.
    Crashed(u64),
}

const ENDS: [Left; 4] = [Left::Closed, Left::Crashed(10), Left::Crashed(50), Left::Crashed(100)];

/// A line of the table; also its JSON.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Grown {
    pub(crate) family: &'static str,
    pub(crate) size: &'static str,
    pub(crate) left: String,
    /// Blocks of the log in use, of all, in percent.
    pub(crate) log_percent: f64,
    pub(crate) open_ms: f64,
    pub(crate) resident_mib: f64,
    pub(crate) rows_recovered: u64,
}

/// What an opening says.
#[derive(Serialize, Deserialize)]
struct Opened {
    open_ms: f64,
    resident_kib: u64,
    rows_recovered: u64,
}

pub(crate) fn run() -> anyhow::Result<Vec<Grown>> {
    let mut lines = Vec::new();
    for (size, bytes) in SIZES {
        for left in ENDS {
            let line =
                grow(size, bytes, left).with_context(|| format!("{size}, {}", left.in_words()))?;
            eprintln!("growth/{size}, {}: {:.1} ms", line.left, line.open_ms);
            lines.push(line);
        }
    }
    Ok(lines)
}

fn grow(size: &'static str, bytes: u64, left: Left) -> anyhow::Result<Grown> {
    let dir = bed::in_memory(ROOM)?;
    let members = Shape::new(Level::Raid5, 3, bytes).create(&dir.path("array"))?;
    let percent = match left {
        Left::Closed => "closed".to_owned(),
        Left::Crashed(percent) => percent.to_string(),
    };
    part(&[&"write", &percent.as_str()], &members)?;
    let geometry = bed::assembly(&members)?.superblock.geometry;
    // Closing empties the log; what lies in its slots then is of no use.
    let used = if left == Left::Closed { 0 } else { slots_used(&members, &geometry)? };
    let mut openings = Vec::new();
    for round in 0..ROUNDS {
        // An opening changes what it opens.
        let there = dir.path(&format!("copy{round}"));
        fs::create_dir(&there)?;
        let copies = members.iter().map(|from| {
            let to = there.join(from.file_name().expect("a file"));
            copy_sparse(from, &to).map(|()| to)
        });
        let copies = copies.collect::<io::Result<Vec<_>>>()?;
        let said = part(&[&"open"], &copies)?;
        openings.push(serde_json::from_str::<Opened>(said.trim())?);
        fs::remove_dir_all(&there)?;
    }
    openings.sort_by(|a, b| a.open_ms.total_cmp(&b.open_ms));
    let median = &openings[ROUNDS / 2];
    let mut resident: Vec<_> = openings.iter().map(|o| o.resident_kib).collect();
    resident.sort_unstable();
    Ok(Grown {
        family: NAME,
        size,
        left: left.in_words().to_owned(),
        log_percent: used as f64 * 100.0 / f64::from(geometry.log_blocks),
        open_ms: median.open_ms,
        resident_mib: resident[ROUNDS / 2] as f64 / 1024.0,
        rows_recovered: median.rows_recovered,
    })
}

impl Left {
    fn in_words(self) -> &'static str {
        match self {
            Left::Closed => "closed",
            Left::Crashed(10) => "crashed, log 10 % full",
            Left::Crashed(50) => "crashed, log 50 % full",
            Left::Crashed(_) => "crashed, log full",
        }
    }
}

/// This program as a process of its own that does one part of the work.
fn part(what: &[&dyn AsRef<str>], members: &[PathBuf]) -> anyhow::Result<String> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(NAME);
    for word in what {
        command.arg("--part").arg(word.as_ref());
    }
    for member in members {
        command.arg("--part").arg(member);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What such a process does.
pub(crate) fn do_part(words: &[String]) -> anyhow::Result<()> {
    let paths = |from: usize| words[from..].iter().map(PathBuf::from).collect::<Vec<_>>();
    match words[0].as_str() {
        "write" => write(&words[1], &paths(2)),
        "open" => open(&paths(1)),
        other => bail!("no part is called {other:?}"),
    }
}

/// Opens an array and says what that took.
fn open(members: &[PathBuf]) -> anyhow::Result<()> {
    let worker = Worker::start("growth")?;
    let before = resident_kib()?;
    let began = Instant::now();
    let array = Array::open(&bed::assembly(members)?, ArrayOptions::default(), worker.handle())?;
    let open_ms = began.elapsed().as_secs_f64() * 1e3;
    let rows_recovered = array.health().rows_recovered.load(Ordering::Relaxed);
    let resident_kib = resident_kib()?.saturating_sub(before);
    println!("{}", serde_json::to_string(&Opened { open_ms, resident_kib, rows_recovered })?);
    array.close()?;
    Ok(())
}

/// Writes small blocks all over an array until its log is as full as wanted, and ends.
fn write(wanted: &str, members: &[PathBuf]) -> anyhow::Result<()> {
    let worker = Worker::start("growth")?;
    let held = Arc::new(AtomicBool::new(false));
    let attached = members.iter().map(|path| {
        let (inner, held) = (Arc::new(bed::file(path, &worker)?), held.clone());
        let device = HeldFlushes { inner, held, worker: worker.handle().clone() };
        Ok(Attached {
            name: path.display().to_string(),
            device: Some(Arc::new(device)),
            incoming: None,
        })
    });
    let attached = attached.collect::<anyhow::Result<_>>()?;
    let assembly = bed::assembly(members)?;
    let geometry = assembly.superblock.geometry;
    let array = Array::over(&assembly, attached, ArrayOptions::default(), worker.handle())?;
    let stack = bed::stack(array.device().clone(), &worker)?;
    let area = stack.limits().size / BLOCK as u64 * BLOCK as u64;
    let load = Load { what: What::Write, order: Order::Random, block: BLOCK, depth: 32, area };
    let blocks = u64::from(geometry.log_blocks);
    if wanted == "closed" {
        load.begin(&stack, Until::Requests(blocks / 4))?.wait()?;
        array.close()?;
        return Ok(());
    }
    let wanted = blocks * wanted.parse::<u64>()? / 100;
    // From now on the log is not emptied.
    held.store(true, Ordering::Relaxed);
    while slots_used(members, &geometry)? < wanted {
        let step = load.begin(&stack, Until::Requests((blocks / 100).max(1)))?;
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || done.send(step.wait()));
        match ended.recv_timeout(PATIENCE) {
            Ok(result) => drop(result?),
            Err(_) => break,
        }
    }
    // As a crash does: nothing is settled, nothing is dropped.
    std::process::exit(0);
}

/// Slots of the log that hold something. In a new array whose log was never emptied these are
/// all that were used.
fn slots_used(members: &[PathBuf], geometry: &Geometry) -> io::Result<u64> {
    let files = members.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    let mut used = 0;
    for slot in 0..u64::from(geometry.log_blocks) {
        for file in &files {
            let mut head = [0; 8];
            file.read_exact_at(&mut head, LOG_AT + slot * BLOCK as u64)?;
            if head != [0; 8] {
                used += 1;
                break;
            }
        }
    }
    Ok(used)
}

/// KiB of this process in memory.
fn resident_kib() -> anyhow::Result<u64> {
    let mut status = String::new();
    File::open(Path::new("/proc/self/status"))?.read_to_string(&mut status)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let figure = line.and_then(|line| line.split_whitespace().next());
    Ok(figure.context("no VmRSS in /proc/self/status")?.parse()?)
}

/// A device whose flushes do not come back while they are held, so that a log over it fills.
struct HeldFlushes {
    inner: Arc<dyn Device>,
    held: Arc<AtomicBool>,
    worker: Handle,
}

impl Device for HeldFlushes {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        if !matches!(request.op, Op::Flush) || !self.held.load(Ordering::Relaxed) {
            return self.inner.submit(request);
        }
        let inner = self.inner.clone();
        let never = move || async move {
            ring::sleep(Duration::from_secs(3600)).await;
            inner.submit(request).await
        };
        match self.worker.is_here() {
            true => exec::spawn_begun(never()),
            false => self.worker.spawn(never),
        }
    }
}
