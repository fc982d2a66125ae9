//! `stableio status`: a running server answers its owner over a private
//! socket, with one JSON document a connection.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use stableio_array::{Health, Superblock};
use stableio_block::path::{Stage, Traffic};
use stableio_front::socket::{Listener, UnixOptions};
use stableio_mem::{Bytes, Pool};

use crate::table;

/// What a server knows of itself.
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) started: Instant,
    pub(crate) superblock: Option<Superblock>,
    pub(crate) health: Option<Arc<Health>>,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) size: u64,
    pub(crate) exports: Vec<String>,
}

/// The answer; also what `--json` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    name: String,
    pid: u32,
    uptime_seconds: u64,
    /// `optimal`, `degraded`, `failed`, or `raw` for an image as it is.
    state: String,
    level: Option<String>,
    size_bytes: u64,
    chunk_bytes: Option<u64>,
    members: Vec<MemberReport>,
    benign_mismatches: u64,
    blocks_mended: u64,
    tuples_mended: u64,
    lost_reads: u64,
    rows_recovered: u64,
    blocks_lost_in_crash: u64,
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
    writes_stabilized: u64,
    writes_promised: u64,
    failed: u64,
    pool_bytes: u64,
    pool_used_bytes: u64,
    /// Requests by the stage in which they wait now.
    waiting: Vec<(String, usize)>,
    exports: Vec<String>,
    events: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct MemberReport {
    name: String,
    in_sync: bool,
    read_errors: u64,
    write_errors: u64,
    mismatches: u64,
}

impl Served {
    fn report(&self) -> Report {
        let health = self.health.as_deref();
        let count = |pick: fn(&Health) -> &std::sync::atomic::AtomicU64| {
            health.map_or(0, |h| pick(h).load(Relaxed))
        };
        let members: Vec<MemberReport> = health
            .iter()
            .flat_map(|h| &h.members)
            .map(|m| MemberReport {
                name: m.name.clone(),
                in_sync: m.in_sync.load(Relaxed),
                read_errors: m.read_errors.load(Relaxed),
                write_errors: m.write_errors.load(Relaxed),
                mismatches: m.mismatches.load(Relaxed),
            })
            .collect();
        let missing = members.iter().filter(|m| !m.in_sync).count();
        let state = match &self.superblock {
            None => "raw",
            Some(_) if missing == 0 => "optimal",
            Some(sb) if missing <= sb.geometry.level.redundancy() => "degraded",
            Some(_) => "failed",
        };
        let t = &self.traffic;
        Report {
            name: self.name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state: state.to_owned(),
            level: self.superblock.as_ref().map(|sb| sb.geometry.level.name().to_owned()),
            size_bytes: self.size,
            chunk_bytes: self.superblock.as_ref().map(|sb| sb.geometry.chunk_bytes()),
            members,
            benign_mismatches: count(|h| &h.benign_mismatches),
            blocks_mended: count(|h| &h.blocks_mended),
            tuples_mended: count(|h| &h.tuples_mended),
            lost_reads: count(|h| &h.lost_reads),
            rows_recovered: count(|h| &h.rows_recovered),
            blocks_lost_in_crash: count(|h| &h.blocks_lost),
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
            events: health.map(Health::events).unwrap_or_default(),
        }
    }
}

/// Answers `status` until it is dropped.
pub(crate) struct Server {
    socket: Arc<Listener>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens in the user's private directory.
    pub(crate) fn start(served: Served) -> Result<Self> {
        let dir = directory()?;
        let first = dir.join(format!("{}.sock", served.name));
        let socket = match Listener::unix(&first, &UnixOptions::default()) {
            Ok(socket) => socket,
            // Another array of the same name is served too.
            Err(_) => {
                let second = dir.join(format!("{}.{}.sock", served.name, std::process::id()));
                Listener::unix(&second, &UnixOptions::default())?
            }
        };
        let socket = Arc::new(socket);
        let listener = UnixListener::from(socket.as_fd().try_clone_to_owned()?);
        listener.set_nonblocking(false)?;
        let thread = std::thread::Builder::new().name("status".into()).spawn(move || {
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => answer(stream, &served),
                    Err(_) => return,
                }
            }
        })?;
        Ok(Self { socket, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket.shut();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The socket's mode keeps others out; this says so again, by who they are.
fn answer(mut stream: UnixStream, served: &Served) {
    let own = rustix::process::geteuid();
    let peer = rustix::net::sockopt::socket_peercred(&stream);
    if !peer.is_ok_and(|p| p.uid == own || p.uid.is_root()) {
        return;
    }
    let _ = stream.set_write_timeout(Some(Duration::from_secs(2)));
    if let Ok(bytes) = serde_json::to_vec(&served.report()) {
        let _ = stream.write_all(&bytes);
    }
}

/// The user's directory for status sockets, made if it is not there.
fn directory() -> Result<PathBuf> {
    let uid = rustix::process::geteuid();
    let dir = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_dir() => PathBuf::from(dir).join("stableio"),
        _ if uid.is_root() => PathBuf::from("/run/stableio"),
        _ => PathBuf::from(format!("/tmp/stableio-{}", uid.as_raw())),
    };
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(dir.display().to_string()),
    }
    let meta = std::fs::symlink_metadata(&dir).with_context(|| dir.display().to_string())?;
    if !meta.is_dir() || meta.uid() != uid.as_raw() || meta.permissions().mode() & 0o077 != 0 {
        bail!(
            "{}: must be a directory of yours that nobody else may enter (mode 0700)",
            dir.display()
        );
    }
    Ok(dir)
}

pub(crate) fn run(name: Option<&str>, as_json: bool) -> Result<ExitCode> {
    let mut reports = Vec::new();
    let dir = directory()?;
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "sock") {
            // One that nobody answers is left over from a crash.
            if let Ok(report) = ask(&path) {
                reports.push(report);
            }
        }
    }
    reports.retain(|r: &Report| name.is_none_or(|name| r.name == name));
    reports.sort_by(|a, b| a.name.cmp(&b.name));
    if as_json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else if reports.is_empty() && name.is_none() {
        println!("nothing is served by you");
    }
    if let (Some(name), true) = (name, reports.is_empty()) {
        bail!("'{name}' is not served by you");
    }
    if !as_json {
        reports.iter().for_each(print);
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(path: &Path) -> Result<Report> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut bytes = Vec::new();
    Read::by_ref(&mut stream).take(1 << 20).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn print(r: &Report) {
    let level = r.level.as_deref().unwrap_or("image as it is");
    println!(
        "{}: {}, {level}, {}, pid {}, up {} s",
        r.name,
        r.state.to_uppercase(),
        Bytes(r.size_bytes),
        r.pid,
        r.uptime_seconds
    );
    if !r.members.is_empty() {
        let mut members =
            table::table(["MEMBER", "STATE", "READ ERRORS", "WRITE ERRORS", "BAD BLOCKS"]);
        for m in &r.members {
            let state = if m.in_sync { "in sync" } else { "MISSING" };
            members.add_row([
                m.name.clone(),
                state.to_owned(),
                m.read_errors.to_string(),
                m.write_errors.to_string(),
                m.mismatches.to_string(),
            ]);
        }
        println!("{members}");
        println!(
            "mended: {} blocks, {} tuples; lost reads: {}; recovered after a crash: {} rows, {} blocks lost; \
             buffers changed during reads: {}",
            r.blocks_mended,
            r.tuples_mended,
            r.lost_reads,
            r.rows_recovered,
            r.blocks_lost_in_crash,
            r.benign_mismatches
        );
    }
    println!(
        "reads: {} ({}); writes: {} ({}), {} copied once, {} from memory declared stable; failed: {}",
        r.reads,
        Bytes(r.read_bytes),
        r.writes,
        Bytes(r.written_bytes),
        r.writes_stabilized,
        r.writes_promised,
        r.failed
    );
    println!("memory: {} of {} in use", Bytes(r.pool_used_bytes), Bytes(r.pool_bytes));
    let waiting: Vec<_> =
        r.waiting.iter().filter(|(_, n)| *n > 0).map(|(s, n)| format!("{n} in {s}")).collect();
    if !waiting.is_empty() {
        println!("waiting: {}", waiting.join(", "));
    }
    r.exports.iter().for_each(|line| println!("  {line}"));
    r.events.iter().for_each(|event| println!("  event: {event}"));
}
