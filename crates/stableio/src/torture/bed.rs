//! The array that is tortured, and its export.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context;
use stableio_array::array::ArrayOptions;
use stableio_array::geometry::{GUARDS_AT, Geometry};
use stableio_array::{Array, CreateOptions, Level, assemble, create, probe};
use stableio_block::{Stack, Worker};
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
    worker: Worker,
    dir: TempDir,
}

/// The members of a closed array, until they are removed.
pub(super) struct Members {
    paths: Vec<PathBuf>,
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
        let array = Array::open(&assembly, ArrayOptions::default(), worker.handle())?;
        let pool = Pool::new(POOL)?;
        let mut stack =
            Stack::new("torture", array.device().clone(), pool, worker.handle().clone());
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
        Ok(Self { guest, export, stack, array, geometry, members, worker, dir })
    }

    /// Blocks and tuples that the array itself found to be wrong so far.
    pub(super) fn mended(&self) -> u64 {
        let health = self.array.health();
        let mismatches = health.members.iter().map(|m| m.mismatches.load(Ordering::Relaxed));
        mismatches.sum::<u64>() + health.tuples_mended.load(Ordering::Relaxed)
    }

    /// Closes everything; leaves the members.
    pub(super) fn close(self) -> anyhow::Result<Members> {
        let Self { guest, export, stack, array, geometry: _, members: paths, worker, dir } = self;
        drop(guest);
        export.stop();
        drop(stack);
        array.close().context("cannot close the array")?;
        drop(worker);
        Ok(Members { paths, _dir: dir })
    }
}

fn make_members(options: &TortureOptions, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let least = *options.level.members().start();
    let count = options.members.unwrap_or(least);
    let columns = count.saturating_sub(options.level.redundancy()).max(1) as u64;
    // Beside the data: superblocks, log, and tuples, of at most 32 bytes a
    // block and column.
    let data = (options.size / columns).next_multiple_of(CHUNK);
    let member_size = data + GUARDS_AT + data / 128 * columns + (1 << 20);
    let paths: Vec<PathBuf> = (0..count).map(|i| dir.join(format!("member-{i}"))).collect();
    create(&CreateOptions {
        name: "torture".into(),
        level: options.level,
        chunk: CHUNK,
        member_size: Some(member_size),
        members: paths.clone(),
        force: false,
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
        Level::Raid5 => format!("{} of {members}", level.name()),
    }
}
