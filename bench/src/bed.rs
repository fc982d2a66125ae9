//! What load in this process goes to: arrays of ours on files in memory, and a file itself.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use stableio_array::array::ArrayOptions;
use stableio_array::{
    Array, Assembly, Attached, CreateOptions, Level, assemble, create, probe, superblock,
};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Device, Handle, Stack, Worker};
use stableio_mem::Pool;
use stableio_testkit::Scratch;

use crate::load::{Load, Order, Until, What};

/// Memory for what is under way.
const POOL_BYTES: usize = 256 << 20;
const CHUNK_BYTES: u64 = 64 << 10;
/// What a member needs beside its data: superblocks, log, tuples.
const BESIDE_DATA: u64 = 32 << 20;
/// The same of a member whose log has its full size.
const BESIDE_DATA_OF_LARGE: u64 = 128 << 20;
/// From this size on the log does.
const LARGE_MEMBER_BYTES: u64 = 4 << 30;

/// The shape of an array, and what it is opened with.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) level: Level,
    pub(crate) members: usize,
    /// Bytes that it can hold, at least.
    pub(crate) bytes: u64,
    pub(crate) log: bool,
    /// What power failure does not tear on a member.
    pub(crate) atomic_unit: u32,
    /// Bytes for cached tuples.
    pub(crate) tuples: usize,
    /// Members larger than what is needed, and sparse: the log is then as
    /// large as that of any disk.
    pub(crate) large: bool,
}

impl Shape {
    /// With a log, on members that write blocks of 4 KiB whole, as most disks do.
    pub(crate) fn new(level: Level, members: usize, bytes: u64) -> Self {
        let tuples = ArrayOptions::default().page_cache;
        Self { level, members, bytes, log: true, atomic_unit: 4096, tuples, large: false }
    }

    fn member_bytes(&self) -> u64 {
        if self.large { LARGE_MEMBER_BYTES } else { self.written_bytes() }
    }

    /// Bytes of a member that are ever written.
    fn written_bytes(&self) -> u64 {
        let beside = if self.large { BESIDE_DATA_OF_LARGE } else { BESIDE_DATA };
        let columns = match self.level {
            Level::Raid1 => 1,
            level => self.members - level.parities(),
        };
        // Tuples take less than a hundredth of it.
        self.bytes / columns as u64 / 100 * 102 + beside
    }

    /// Bytes on all members together.
    pub(crate) fn bytes_on_members(&self) -> u64 {
        self.written_bytes() * self.members as u64
    }

    /// Makes an array of new files in `dir`; gives them, by role.
    pub(crate) fn create(&self, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
        fs::create_dir_all(dir)?;
        let members: Vec<_> = (0..self.members).map(|i| dir.join(format!("m{i}"))).collect();
        create(&CreateOptions {
            name: "bench".to_owned(),
            level: self.level,
            chunk: CHUNK_BYTES,
            member_size: Some(self.member_bytes()),
            members: members.clone(),
            force: false,
            log: self.log,
            checksums: true,
            atomic_unit: Some(self.atomic_unit),
        })?;
        Ok(members)
    }
}

/// What belongs together.
pub(crate) fn assembly(members: &[PathBuf]) -> anyhow::Result<Assembly> {
    let probes = members.iter().map(|member| probe(member)).collect::<Result<Vec<_>, _>>()?;
    Ok(assemble(&probes, None)?)
}

/// An open array and the way to it.
pub(crate) struct Bed {
    pub(crate) array: Array,
    pub(crate) stack: Stack,
    /// Removed with it.
    _dir: Scratch,
}

impl Bed {
    /// A new array on files in memory; `wrap` puts something over each.
    pub(crate) fn new(
        shape: Shape,
        worker: &Worker,
        wrap: impl Fn(Arc<dyn Device>, &Handle) -> Arc<dyn Device>,
    ) -> anyhow::Result<Self> {
        let dir = in_memory(shape.bytes_on_members())?;
        let members = shape.create(&dir.path("array"))?;
        let assembly = assembly(&members)?;
        let attached = members.iter().map(|path| {
            let device: Arc<dyn Device> = Arc::new(file(path, worker)?);
            let device = Some(wrap(device, worker.handle()));
            Ok(Attached { name: path.display().to_string(), device, incoming: None })
        });
        let attached = attached.collect::<anyhow::Result<_>>()?;
        let options = ArrayOptions { page_cache: shape.tuples, ..ArrayOptions::default() };
        let array = Array::over(&assembly, attached, options, worker.handle())?;
        // As when it is served: rebuild and scrub see that there are requests.
        let stack = stack(array.device().clone(), worker)?.with_traffic(array.traffic().clone());
        fill(&stack, shape.bytes)?;
        Ok(Self { array, stack, _dir: dir })
    }

    /// On the files themselves.
    pub(crate) fn on_files(shape: Shape, worker: &Worker) -> anyhow::Result<Self> {
        Self::new(shape, worker, |device, _| device)
    }

    /// All data and parity of all members, by the geometry.
    pub(crate) fn bytes_of_rows(&self) -> u64 {
        let superblock::Superblock { geometry, .. } = self.array.superblock();
        geometry.stripes * geometry.chunk_bytes() * geometry.members as u64
    }

    /// All that the array can hold.
    pub(crate) fn fill_all(&self) -> anyhow::Result<()> {
        fill(&self.stack, self.stack.limits().size)
    }
}

/// A file with `bytes` written to it, as a device, with the way to it.
pub(crate) fn file_stack(path: &Path, bytes: u64, worker: &Worker) -> anyhow::Result<Stack> {
    write_file(path, bytes)?;
    stack(Arc::new(file(path, worker)?), worker)
}

/// A file that has its blocks.
pub(crate) fn write_file(path: &Path, bytes: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let piece = vec![0x5a; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(piece.len() as u64);
        file.write_all(&piece[..now as usize])?;
        left -= now;
    }
    file.sync_all()
}

pub(crate) fn file(path: &Path, worker: &Worker) -> anyhow::Result<FileDevice> {
    Ok(FileDevice::open(path, &OpenOptions::default(), worker.handle().clone())?)
}

pub(crate) fn stack(device: Arc<dyn Device>, worker: &Worker) -> anyhow::Result<Stack> {
    Ok(Stack::new("bench", device, Pool::new(POOL_BYTES)?, worker.handle().clone()))
}

/// A directory in memory with this much room.
pub(crate) fn in_memory(bytes: u64) -> anyhow::Result<Scratch> {
    let dir = Scratch::with_room(bytes)?;
    ensure!(dir.is_in_memory(), "/dev/shm has no room for {} MiB", bytes >> 20);
    Ok(dir)
}

/// Writes all of it once, so that every sample finds the same.
fn fill(stack: &Stack, bytes: u64) -> anyhow::Result<()> {
    let (block, area) = (64 << 10, bytes.next_multiple_of(64 << 10).min(stack.limits().size));
    let load = Load { what: What::Write, order: Order::Sequential, block, depth: 4, area };
    // The last requests of a load overlap with none of its first.
    load.begin(stack, Until::Requests(area / block as u64))?.wait()?;
    Ok(())
}

/// Waits until `done`, which is looked at often.
pub(crate) fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
