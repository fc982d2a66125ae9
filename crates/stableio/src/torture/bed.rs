//! The array that is tortured, and its export.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use stableio_array::array::ArrayOptions;
use stableio_array::geometry::Geometry;
use stableio_array::{Array, Assembly, Attached, CreateOptions, Level, assemble, create, probe};
use stableio_block::dev::{FaultDevice, Faults, FileDevice, OpenOptions};
use stableio_block::{Device, Stack, Worker};
use stableio_front::vhost_user_blk::{Options as ExportOptions, VhostUserBlk};
use stableio_mem::{Grant, Pool};
use stableio_testkit::vhost::Guest;
use tempfile::TempDir;

use super::TortureOptions;
use super::plan::BUFFER;
use super::program::DEPTH;

const CHUNK: u64 = 64 << 10;
/// Buffer memory of the stack, as `serve` has it. The largest writes wait for
/// it now and then.
const POOL: usize = 64 << 20;
/// Where arrays are built if nothing else is said, and it is in memory.
const MEMORY: &str = "/dev/shm";

/// An array with an export and a guest, which go in this order.
pub(super) struct Bed {
    pub(super) guest: Guest,
    export: VhostUserBlk,
    pub(super) stack: Stack,
    array: Array,
    pub(super) geometry: Geometry,
    pub(super) members: Vec<PathBuf>,
    /// Of the first member.
    faults: Option<Arc<Faults>>,
    worker: Worker,
    dir: TempDir,
}

/// The members of a closed array, until they are removed.
pub(super) struct Members {
    paths: Vec<PathBuf>,
    /// The member with faults.
    pub(super) faulty: Option<usize>,
    _dir: TempDir,
}

impl std::ops::Deref for Members {
    type Target = [PathBuf];

    fn deref(&self) -> &[PathBuf] {
        &self.paths
    }
}

impl Bed {
    pub(super) fn new(options: &TortureOptions) -> anyhow::Result<Self> {
        let dir = scratch(options.dir.as_deref())?;
        let members = make_members(options, dir.path())?;
        let worker = Worker::start("torture").context("cannot start a worker")?;
        let probes: Result<Vec<_>, _> = members.iter().map(|member| probe(member)).collect();
        let assembly = assemble(&probes?, None)?;
        let faults = faults(options)?;
        let array = open(&assembly, faults.as_ref(), &worker)?;
        let pool = Pool::new(POOL)?;
        let mut stack =
            Stack::new("torture", array.device().clone(), pool, worker.handle().clone())
                .with_traffic(array.traffic().clone());
        if options.unprotected {
            stack = stack.with_grant(Grant::by_administrator());
        }
        let socket = dir.path().join("guest");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let export = VhostUserBlk::start(
            listener,
            stack.clone(),
            ExportOptions {
                serial: "torture".into(),
                queues: 1,
                queue_size: 256,
                read_only: false,
                log: Arc::new(|line: &str| eprintln!("{line}")),
            },
        )?;
        let guest = Guest::connect(&socket, 1, DEPTH * BUFFER)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let geometry = array.superblock().geometry;
        Ok(Self { guest, export, stack, array, geometry, members, faults, worker, dir })
    }

    /// Blocks and tuples that the array itself found to be wrong so far; with
    /// injected faults that is what it is to do.
    pub(super) fn mended(&self) -> u64 {
        let health = self.array.health();
        if self.faults.is_some() {
            return 0;
        }
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mismatches: u64 = health.members.iter().map(|m| get(&m.mismatches)).sum();
        // A block that was mended was charged to a member, too.
        mismatches.max(get(&health.blocks_mended)) + get(&health.tuples_mended)
    }

    /// What was charged to members that have no faults, and what was lost.
    pub(super) fn charged(&self) -> u64 {
        let health = self.array.health();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut charged = get(&health.blocks_lost);
        for (role, member) in health.members.iter().enumerate() {
            if Some(role) == self.faulty() {
                continue;
            }
            charged += get(&member.read_errors) + get(&member.write_errors);
            charged += u64::from(!member.in_sync.load(Ordering::Relaxed));
            if self.faults.is_some() {
                charged += get(&member.mismatches);
            }
        }
        charged
    }

    /// The directory that it all lies in.
    pub(super) fn place(&self) -> &Path {
        self.dir.path()
    }

    /// The member with faults.
    pub(super) fn faulty(&self) -> Option<usize> {
        self.faults.as_ref().map(|_| 0)
    }

    /// What the injected faults hit.
    pub(super) fn faults_hit(&self) -> Option<String> {
        let faults = self.faults.as_ref()?;
        let out = !self.array.health().members[0].in_sync.load(Ordering::Relaxed);
        Some(format!("{}{}", faults.hits(), if out { "; it was left out" } else { "" }))
    }

    /// Brings all that the array knows to its members, for who looks there.
    pub(super) fn settle(&self) -> anyhow::Result<()> {
        crate::control::settled(self.array.device().checkpoint())
    }

    /// Closes everything; leaves the members.
    pub(super) fn close(self) -> anyhow::Result<Members> {
        let faulty = self.faulty();
        let Self { guest, export, stack, array, geometry: _, members: paths, faults, worker, dir } =
            self;
        if let Some(faults) = faults {
            faults.clear();
        }
        drop(guest);
        export.stop();
        drop(stack);
        array.close().context("cannot close the array")?;
        drop(worker);
        Ok(Members { paths, faulty, _dir: dir })
    }
}

/// The rules of `--faults`.
fn faults(options: &TortureOptions) -> anyhow::Result<Option<Arc<Faults>>> {
    let Some(spec) = &options.faults else { return Ok(None) };
    if options.level == Level::Single {
        bail!("--faults: a single member has nobody who makes up for its faults: choose a --level");
    }
    Ok(Some(Faults::parse(spec, options.seed)?))
}

/// Opens the members, the first of them with faults.
fn open(
    assembly: &Assembly,
    faults: Option<&Arc<Faults>>,
    worker: &Worker,
) -> anyhow::Result<Array> {
    let mut attached = Vec::new();
    for (role, path) in assembly.members.iter().enumerate() {
        let path = path.as_ref().context("an array was just made of all its members")?;
        let handle = worker.handle().clone();
        let file = FileDevice::open(path, &OpenOptions::default(), handle.clone())?;
        let device: Arc<dyn Device> = match faults.filter(|_| role == 0) {
            Some(faults) => Arc::new(FaultDevice::new(Arc::new(file), faults.clone(), handle)),
            None => Arc::new(file),
        };
        attached.push(Attached {
            name: path.display().to_string(),
            device: Some(device),
            incoming: None,
        });
    }
    // One that stalls is waited for, but not for ever.
    let patience = faults.map(|_| 5);
    let options = ArrayOptions { patience, ..ArrayOptions::default() };
    Ok(Array::over(assembly, attached, options, worker.handle())?)
}

fn make_members(options: &TortureOptions, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let least = match options.level {
        // With one column there would be no sums to speak of.
        Level::Raid6 => 5,
        level => *level.members().start(),
    };
    let count = options.members.unwrap_or(least);
    let columns = match options.level {
        Level::Single | Level::Raid1 => 1,
        level => count.saturating_sub(level.parities()).max(1) as u64,
    };
    // Beside the data: superblocks, a log of a sixty-fourth, and tuples, of
    // at most 64 bytes a block and column.
    let data = (options.size / columns).next_multiple_of(CHUNK);
    let member_size = data + data / 32 + data / 64 * columns + (2 << 20);
    let paths: Vec<PathBuf> = (0..count).map(|i| dir.join(format!("member-{i}"))).collect();
    create(&CreateOptions {
        name: "torture".into(),
        level: options.level,
        chunk: CHUNK,
        member_size: Some(member_size),
        members: paths.clone(),
        force: false,
        log: true,
        checksums: true,
        atomic_unit: None,
    })?;
    Ok(paths)
}

/// A directory that goes with its handle; in memory if it can be.
fn scratch(dir: Option<&Path>) -> anyhow::Result<TempDir> {
    let make =
        |parent: &Path| tempfile::Builder::new().prefix("stableio-torture-").tempdir_in(parent);
    match dir {
        Some(dir) => {
            make(dir).with_context(|| format!("cannot make a directory in {}", dir.display()))
        }
        None => make(Path::new(MEMORY))
            .or_else(|_| make(&std::env::temp_dir()))
            .context("cannot make a temporary directory; name a place with --dir"),
    }
}

/// The level's name with its members, for the report.
pub(super) fn describe(level: Level, members: usize) -> String {
    match level {
        Level::Single => level.name().to_owned(),
        Level::Raid1 | Level::Raid5 | Level::Raid6 => format!("{} of {members}", level.name()),
    }
}
