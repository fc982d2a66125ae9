//! `stableio serve`: an array, or an image as it is, until a signal.
//!
//! SERVE-1: sockets are made before a member is opened for writing, so that a
//! wrong path changes nothing.
//!
//! SERVE-2: at the end exports stop first, their requests settle, then the
//! array is flushed and marked as shut down.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use stableio_array::array::ArrayOptions;
use stableio_array::superblock::BadSuperblock;
use stableio_array::{Array, AssembleError, Assembly, OpenError, Superblock};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::path::Traffic;
use stableio_block::{Device, Issuer, Radius, Stack, Worker};
use stableio_front::nbd::{Export, NbdServer};
use stableio_front::socket::{Listener, SocketError};
use stableio_front::vhost_user_blk::{self, VhostUserBlk};
use stableio_mem::{Bytes, Grant, Pool};

use crate::export::{Address, ExportSpec, Protocol, hints};
use crate::metrics::Opened;
use crate::report::{Served, ServedArray};
use crate::{ReadsArg, ServeArgs, control, members};

/// The least memory that every shape of request fits into.
const LEAST_POOL: u64 = 16 << 20;
/// How long to wait for a server that was just killed.
const PATIENCE: Duration = Duration::from_secs(2);
/// Entries of a virtqueue, at most.
const QUEUE_SIZE: u16 = 256;

/// What is served, and how to end it.
struct Source {
    name: String,
    device: Arc<dyn Device>,
    traffic: Arc<Traffic>,
    superblock: Option<Superblock>,
    array: Option<Array>,
    notes: Vec<String>,
}

/// A running export.
enum Running {
    Nbd { server: NbdServer, issuers: Vec<Arc<Issuer>> },
    Vhost { server: VhostUserBlk, _socket: Listener },
}

pub(crate) fn run(args: ServeArgs) -> Result<ExitCode> {
    if args.pool.0 < LEAST_POOL {
        bail!("--pool {}: at least {} is needed", args.pool, Bytes(LEAST_POOL));
    }
    // Before any thread runs, so that all inherit it: signals are waited for.
    let signals = Signals::block();
    let plan = Plan::of(&args)?;
    plan.allows(&args.exports)?;
    let names = names(&args.exports, &plan.name())?;
    let listeners = listeners(&args.exports)?;
    let metrics = args.metrics.as_ref().map(Opened::of).transpose()?;
    let worker = Worker::start("stableio-0").context("start a worker (io_uring)")?;
    let source = match &plan {
        Plan::Raw(path) => open_raw(path, plan.name(), &args, &worker)?,
        Plan::Array(assembly) => open_array(assembly, &args, &worker)?,
    };
    for note in &source.notes {
        eprintln!("stableio: {note}");
    }
    if let Some(array) = &source.array {
        array.health().observe(|event| eprintln!("stableio: {event}"));
    }
    let pool = Pool::new(args.pool.0 as usize).context("reserve the buffer pool")?;
    let mut stack =
        Stack::new(&source.name, source.device.clone(), pool.clone(), worker.handle().clone())
            .with_traffic(source.traffic.clone());
    if args.reads == ReadsArg::Eager {
        stack = stack.with_eager_reads();
    }
    let running = start(&args.exports, &names, listeners, &stack, &worker)?;

    let served = Arc::new(Served {
        name: source.name.clone(),
        started: Instant::now(),
        array: source.array.as_ref().map(|array| ServedArray {
            superblock: array.superblock().clone(),
            health: array.health().clone(),
            device: array.device().clone(),
            worker: worker.handle().clone(),
        }),
        issuers: running.iter().flat_map(Running::issuers).cloned().collect(),
        traffic: source.traffic.clone(),
        pool,
        size: stack.limits().size,
        exports: args
            .exports
            .iter()
            .zip(&names)
            .flat_map(|(spec, name)| hints(spec, name))
            .collect(),
    });
    let control = control::Server::start(served.clone());
    if let Err(error) = &control {
        eprintln!("stableio: status will not be answered: {error:#}");
    }
    let metrics = metrics.map(|metrics| metrics.start(served)).transpose()?;
    announce(&source, &args.exports, &names);

    let signal = signals.wait();
    eprintln!("stableio: {signal}: letting requests settle, then flushing");
    drop((control, metrics));
    for export in running {
        match export {
            Running::Nbd { server, .. } => server.stop(),
            Running::Vhost { server, .. } => server.stop(),
        }
    }
    finish(source, &stack)?;
    eprintln!("stableio: shut down cleanly");
    Ok(ExitCode::SUCCESS)
}

/// What to serve, checked without opening anything for writing.
enum Plan {
    Array(Box<Assembly>),
    Raw(PathBuf),
}

impl Plan {
    fn of(args: &ServeArgs) -> Result<Self> {
        let Some(path) = &args.raw else {
            let assembly = members::plan(&args.members, args.trust_member.as_deref())?;
            return Ok(Plan::Array(Box::new(assembly)));
        };
        match stableio_array::probe(path) {
            Ok(_) => {
                bail!("{}: is a member of an array; serve the array, without --raw", path.display())
            }
            Err(
                AssembleError::NotAMember { why: BadSuperblock::NotOurs, .. }
                | AssembleError::TooShort { .. },
            ) => {}
            Err(error @ (AssembleError::Open { .. } | AssembleError::WrongType(_))) => {
                return Err(error.into());
            }
            Err(error) => {
                bail!("{}: is a damaged member of an array, not an image: {error}", path.display())
            }
        }
        Ok(Plan::Raw(path.clone()))
    }

    /// Whether it may be served so. A promise that is broken is found out by
    /// checksums only, before it damages more than the guest's own blocks.
    fn allows(&self, exports: &[ExportSpec]) -> Result<()> {
        let promise = |spec: &&ExportSpec| {
            matches!(spec.protocol, Protocol::VhostUserBlk { stable: true, .. })
        };
        match self {
            Plan::Array(assembly) if !assembly.superblock.checksums => {
                match exports.iter().find(promise) {
                    None => Ok(()),
                    Some(_) => bail!(
                        "'{}' has no checksums, and does not take buffers=stable: nothing would \
                         find out that a guest changed one",
                        assembly.superblock.name
                    ),
                }
            }
            _ => Ok(()),
        }
    }

    /// The array's name, or one made of the image's.
    fn name(&self) -> String {
        let path = match self {
            Plan::Array(assembly) => return assembly.superblock.name.clone(),
            Plan::Raw(path) => path,
        };
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
        let name: String = stem.chars().map(plain).take(64).collect();
        let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        if name.is_empty() { "raw".to_owned() } else { name.to_owned() }
    }
}

fn open_array(assembly: &Assembly, args: &ServeArgs, worker: &Worker) -> Result<Source> {
    let options = ArrayOptions {
        page_cache: args.tuple_cache.0 as usize,
        patience: (args.patience > 0).then_some(args.patience),
        ..ArrayOptions::default()
    };
    let open = || Array::open(assembly, options, worker.handle());
    let in_use = |error: &OpenError| matches!(error, OpenError::Assemble(AssembleError::InUse(_)));
    let array = patiently(open, in_use)?;
    let mut notes = array.notes().to_vec();
    notes.extend(array.health().events());
    Ok(Source {
        name: array.superblock().name.clone(),
        device: array.device().clone(),
        traffic: array.traffic().clone(),
        superblock: Some(array.superblock().clone()),
        array: Some(array),
        notes,
    })
}

fn open_raw(path: &Path, name: String, args: &ServeArgs, worker: &Worker) -> Result<Source> {
    let read_only = args.exports.iter().all(|e| e.read_only);
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let open = || FileDevice::open(path, &options, worker.handle().clone());
    let device =
        patiently(open, |error| error.errno() == libc::EBUSY).map_err(|error| {
            match error.errno() {
                libc::EBUSY => AssembleError::InUse(path.into()).into(),
                _ => anyhow::Error::from(error),
            }
        })?;
    let limits = device.limits();
    if limits.size == 0 {
        bail!(
            "{}: has less than a block of {} bytes: there is nothing to serve",
            path.display(),
            limits.logical
        );
    }
    let mut notes = device.notes().to_vec();
    notes.push(foreign_memory(&device));
    let traffic = Arc::default();
    Ok(Source { name, device: Arc::new(device), traffic, superblock: None, array: None, notes })
}

/// What becomes of a guest's memory, and why (FILE-1).
fn foreign_memory(device: &FileDevice) -> String {
    let becomes = match device.limits().write_radius {
        Radius::Nobody => "written as it is, where it is aligned",
        Radius::Issuer | Radius::Everyone => "copied once before it is written",
    };
    format!("a guest's memory is {becomes}: {}", device.storage())
}

/// Tries again for a moment what a server that was just killed may still hold:
/// the kernel lets go of its ring's files, locks and sockets a little later.
fn patiently<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    is_in_use: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(error) if is_in_use(&error) && begun.elapsed() < PATIENCE => {
                std::thread::sleep(PATIENCE / 40)
            }
            done => return done,
        }
    }
}

/// SERVE-1. NBD exports of the same address share a listener.
fn listeners(exports: &[ExportSpec]) -> Result<Vec<Option<Listener>>> {
    let mut seen: Vec<&ExportSpec> = Vec::new();
    let mut listeners = Vec::new();
    for spec in exports {
        if let Some(first) = seen.iter().find(|s| s.address == spec.address) {
            if first.protocol != Protocol::Nbd || spec.protocol != Protocol::Nbd {
                bail!(
                    "two exports at one address: only NBD exports, of different names, can share one"
                );
            }
            listeners.push(None);
            continue;
        }
        seen.push(spec);
        let listen = || match &spec.address {
            Address::Unix(path) => Listener::unix(path, &spec.access),
            Address::Tcp(address) => Listener::tcp(*address, false),
        };
        let listener = patiently(listen, |error| matches!(error, SocketError::InUse(_)))?;
        if let Some(note) = listener.note() {
            eprintln!("stableio: {note}");
        }
        listeners.push(Some(listener));
    }
    Ok(listeners)
}

/// The names of the exports: given, or the source's.
fn names(exports: &[ExportSpec], default: &str) -> Result<Vec<String>> {
    let names: Vec<String> =
        exports.iter().map(|e| e.name.clone().unwrap_or_else(|| default.to_owned())).collect();
    for (i, name) in names.iter().enumerate() {
        let same = |j: &usize| names[*j] == *name && exports[*j].address == exports[i].address;
        if (0..i).any(|j| same(&j)) {
            bail!("two exports called '{name}' at one address: give each a name=");
        }
    }
    Ok(names)
}

fn start(
    exports: &[ExportSpec],
    names: &[String],
    listeners: Vec<Option<Listener>>,
    stack: &Stack,
    worker: &Worker,
) -> Result<Vec<Running>> {
    let log: vhost_user_blk::Log = Arc::new(|line: &str| eprintln!("stableio: {line}"));
    let mut running = Vec::new();
    for ((spec, name), listener) in exports.iter().zip(names).zip(listeners) {
        // The first of those that share an address serves them all.
        let Some(listener) = listener else { continue };
        match &spec.protocol {
            Protocol::Nbd => {
                let (mut shared, mut issuers) = (Vec::new(), Vec::new());
                for (other, name) in
                    exports.iter().zip(names).filter(|(e, _)| e.address == spec.address)
                {
                    let stack = issued(stack, "nbd", name);
                    issuers.push(stack.issuer().clone());
                    let export = Export::of(name, stack)?;
                    let export = if other.read_only {
                        export.with(|info| Ok(info.with_read_only()))?
                    } else {
                        export
                    };
                    shared.push(export);
                }
                let options =
                    stableio_front::nbd::Options { log: log.clone(), ..Default::default() };
                let server = NbdServer::start(shared, listener, worker.handle(), options);
                running.push(Running::Nbd { server, issuers });
            }
            Protocol::VhostUserBlk { queues, stable } => {
                let stack = issued(stack, "vhost-user-blk", name);
                let stack = match stable {
                    true => stack.with_grant(Grant::by_administrator()),
                    false => stack,
                };
                let options = vhost_user_blk::Options {
                    serial: name.clone(),
                    queues: *queues,
                    queue_size: QUEUE_SIZE,
                    read_only: spec.read_only,
                    log: log.clone(),
                };
                let socket = UnixListener::from(listener.as_fd().try_clone_to_owned()?);
                let server = VhostUserBlk::start(socket, stack, options)?;
                running.push(Running::Vhost { server, _socket: listener });
            }
        }
    }
    Ok(running)
}

/// The same stack for an export, which is told apart by this name.
fn issued(stack: &Stack, kind: &str, name: &str) -> Stack {
    stack.for_issuer(Arc::new(Issuer::new(format!("{kind} {name}"))))
}

impl Running {
    fn issuers(&self) -> &[Arc<Issuer>] {
        match self {
            Running::Nbd { issuers, .. } => issuers,
            Running::Vhost { server, .. } => server.issuers(),
        }
    }
}

fn announce(source: &Source, exports: &[ExportSpec], names: &[String]) {
    let what = match &source.superblock {
        Some(sb) => format!("{} of {} members", sb.geometry.level.name(), sb.geometry.members),
        None => "as it is".to_owned(),
    };
    println!("serving '{}' ({what}), {}", source.name, Bytes(source.device.limits().size));
    for (spec, name) in exports.iter().zip(names) {
        for line in hints(spec, name) {
            println!("  {line}");
        }
        if matches!(spec.protocol, Protocol::VhostUserBlk { stable: true, .. }) {
            println!(
                "  (its buffers are declared stable: a guest that changes them in flight can damage data)"
            );
        }
    }
    println!("Ctrl-C or SIGTERM ends it");
    use std::io::Write;
    let _ = std::io::stdout().flush();
}

/// SERVE-2.
fn finish(source: Source, stack: &Stack) -> Result<()> {
    match source.array {
        Some(array) => array.close().context("the array could not be shut down cleanly")?,
        None => drop(stack.submit(stableio_block::Request::flush()).wait().context("flush")?),
    }
    Ok(())
}

/// SIGINT and SIGTERM, taken by waiting instead of by a handler.
pub(crate) struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them in this thread and all that it will start.
    pub(crate) fn block() -> Self {
        // SAFETY: `set` is initialised by `sigemptyset` before it is used;
        // the calls touch nothing else.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            Self(set)
        }
    }

    /// Waits for the first; gives its name.
    pub(crate) fn wait(&self) -> &'static str {
        let mut signal = 0;
        // SAFETY: the set was made by `block`.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        if signal == libc::SIGINT { "interrupted" } else { "terminated" }
    }
}

/// For `demo`: serves the members in a directory.
pub(crate) fn demo_args(members: Vec<PathBuf>, exports: Vec<ExportSpec>) -> ServeArgs {
    ServeArgs {
        members,
        raw: None,
        exports,
        trust_member: None,
        pool: Bytes(64 << 20),
        tuple_cache: Bytes(32 << 20),
        patience: 30,
        reads: ReadsArg::Direct,
        metrics: None,
    }
}
