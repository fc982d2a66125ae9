//! What the tests of this crate share: an array over files, a byte array as
//! oracle, and random operations on both.

#![allow(dead_code, reason = "no test uses everything")]

pub(crate) mod golden;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use stableio_array::array::ArrayOptions;
use stableio_array::{Array, CreateOptions, Level, assemble, create, probe};
use stableio_block::{Body, Error, Into, Op, Reply, Request, Stack, Worker};
use stableio_mem::{ForeignBuf, Pool, Segment, StableBuf};
use tempfile::TempDir;

pub(crate) struct Bed {
    pub(crate) dir: TempDir,
    pub(crate) members: Vec<PathBuf>,
    pub(crate) worker: Worker,
    pub(crate) pool: Arc<Pool>,
}

pub(crate) struct Open {
    pub(crate) array: Array,
    pub(crate) stack: Stack,
}

/// A small generator (xorshift64*), so that a failure names its seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

impl Bed {
    pub(crate) fn new(level: Level, members: usize, chunk: u64) -> Self {
        Self::of_size(level, members, chunk, 8 << 20)
    }

    pub(crate) fn of_size(level: Level, members: usize, chunk: u64, size: u64) -> Self {
        Self::made(level, members, chunk, size, true)
    }

    /// One whose blocks have no checksums.
    pub(crate) fn plain(level: Level, members: usize, chunk: u64) -> Self {
        Self::made(level, members, chunk, 8 << 20, false)
    }

    pub(crate) fn made(
        level: Level,
        members: usize,
        chunk: u64,
        size: u64,
        checksums: bool,
    ) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let members: Vec<_> = (0..members).map(|i| dir.path().join(format!("m{i}"))).collect();
        let options = CreateOptions {
            name: "t".into(),
            level,
            chunk,
            member_size: Some(size),
            members: members.clone(),
            force: false,
            log: true,
            checksums,
            atomic_unit: None,
        };
        create(&options).unwrap();
        Self::around(dir, members)
    }

    /// Of members that exist.
    pub(crate) fn around(dir: TempDir, members: Vec<PathBuf>) -> Self {
        Self {
            dir,
            members,
            worker: Worker::start("t").unwrap(),
            pool: Pool::new(64 << 20).unwrap(),
        }
    }

    pub(crate) fn open(&self) -> Open {
        self.open_some(&(0..self.members.len()).collect::<Vec<_>>())
    }

    pub(crate) fn open_some(&self, which: &[usize]) -> Open {
        let probes: Vec<_> = which.iter().map(|i| probe(&self.members[*i]).unwrap()).collect();
        self.open_probes(&probes)
    }

    pub(crate) fn open_probes(&self, probes: &[stableio_array::Probe]) -> Open {
        let assembly = assemble(probes, None).unwrap();
        let array = Array::open(&assembly, ArrayOptions::default(), self.worker.handle()).unwrap();
        let stack = Stack::new(
            "t",
            array.device().clone(),
            self.pool.clone(),
            self.worker.handle().clone(),
        );
        Open { array, stack: stack.with_traffic(Arc::default()) }
    }
}

impl Open {
    pub(crate) fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let most = self.stack.limits().max_transfer as usize;
        let mut all = Vec::new();
        while all.len() < len {
            let part = most.min(len - all.len());
            let read = Request::read_owned(at + all.len() as u64, part);
            let Reply::Data(data) = self.stack.submit(read).wait()? else { panic!() };
            all.extend_from_slice(&data.to_vec());
        }
        Ok(all)
    }

    /// The same for one block by a request that begins on the worker, as those
    /// of front ends do.
    pub(crate) fn read_there(&self, at: u64) -> Result<Vec<u8>, Error> {
        let stack = self.stack.clone();
        let read = move || async move { stack.submit(Request::read_owned(at, 4096)).await };
        let Reply::Data(data) = self.stack.worker().spawn(read).wait()? else { panic!() };
        Ok(data.to_vec())
    }

    pub(crate) fn write(&self, at: u64, bytes: Vec<u8>) -> Result<(), Error> {
        self.stack
            .submit(Request::write(at, Body::Stable(StableBuf::from_owned(bytes)), false))
            .wait()
            .map(drop)
    }

    pub(crate) fn op(&self, op: Op) -> Result<Reply, Error> {
        self.stack.submit(Request::of(op)).wait()
    }

    pub(crate) fn size(&self) -> usize {
        self.stack.limits().size as usize
    }

    /// Everything reads as the oracle says.
    pub(crate) fn check(&self, oracle: &[u8]) {
        for at in (0..oracle.len()).step_by(1 << 20) {
            let len = (1 << 20).min(oracle.len() - at);
            let got = self.read(at as u64, len).unwrap();
            if let Some(i) = (0..len).find(|i| got[*i] != oracle[at + i]) {
                panic!("byte {} is {:#x}, not {:#x}", at + i, got[i], oracle[at + i]);
            }
        }
    }

    /// A scrub from begin to end. It has ended when another can begin; its
    /// progress is none also before it has begun.
    pub(crate) fn scrub(&self) {
        let device = self.array.device();
        wait_until("an earlier scrub", || device.begin_scrub().wait().is_ok());
        wait_until("scrub", || device.begin_scrub().wait().is_ok());
    }

    pub(crate) fn close(self) {
        self.array.close().unwrap();
    }
}

/// A foreign buffer over bytes that this test owns.
pub(crate) fn foreign(bytes: Arc<Vec<u8>>, cuts: &[usize]) -> ForeignBuf {
    let base = bytes.as_ptr() as usize;
    let mut edges: Vec<usize> =
        cuts.iter().map(|c| c % bytes.len()).chain([0, bytes.len()]).collect();
    edges.sort_unstable();
    let segments: Vec<_> =
        edges.windows(2).map(|w| Segment { addr: base + w[0], len: w[1] - w[0] }).collect();
    // SAFETY: `bytes` keeps the addresses alive; while the request runs
    // nobody uses the vector through a reference.
    unsafe { ForeignBuf::new(segments, bytes) }
}

/// Random operations of all kinds and shapes.
pub(crate) fn play(open: &Open, oracle: &mut [u8], random: &mut Random, steps: usize) {
    for _ in 0..steps {
        let len = match random.below(4) {
            0 => 512 * (1 + random.below(16)),
            1 => 4096 * (1 + random.below(8)),
            2 => 65536 * (1 + random.below(8)),
            _ => 512 * (1 + random.below(4000)),
        } as usize;
        let at = (random.below((oracle.len() - len) as u64) / 512 * 512) as usize;
        match random.below(10) {
            0..=3 => {
                let bytes = random.bytes(len);
                oracle[at..at + len].copy_from_slice(&bytes);
                open.write(at as u64, bytes).unwrap();
            }
            4 | 5 => {
                let bytes = Arc::new(random.bytes(len));
                oracle[at..at + len].copy_from_slice(&bytes);
                let cuts: Vec<usize> =
                    (0..random.below(5)).map(|_| random.next() as usize).collect();
                let body = Body::Foreign(foreign(bytes, &cuts));
                open.stack
                    .submit(Request::write(at as u64, body, random.below(8) == 0))
                    .wait()
                    .unwrap();
            }
            6 => {
                oracle[at..at + len].fill(0);
                open.op(Op::WriteZeroes { at: at as u64, len: len as u64, fua: false }).unwrap();
            }
            7 => {
                let bytes = Arc::new(vec![0xEE; len]);
                let cuts: Vec<usize> =
                    (0..random.below(5)).map(|_| random.next() as usize / 512 * 512).collect();
                let read =
                    Op::Read { at: at as u64, into: Into::Foreign(foreign(bytes.clone(), &cuts)) };
                open.op(read).unwrap();
                assert!(bytes[..] == oracle[at..at + len], "foreign read at {at}+{len}");
            }
            8 => drop(open.op(Op::Flush).unwrap()),
            _ => assert!(
                open.read(at as u64, len.min(1 << 20)).unwrap()
                    == oracle[at..at + len.min(1 << 20)]
            ),
        }
    }
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !done() {
        assert!(begun.elapsed().as_secs() < 60, "{what}: not after a minute");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

pub(crate) fn open_redundancy(level: Level, members: usize) -> usize {
    if level == Level::Raid1 { members - 1 } else { level.parities() }
}

pub(crate) fn flip(path: &Path, random: &mut Random, count: usize, first: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len() - 4096;
    for _ in 0..count {
        let at = first + random.below(len - first);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << random.below(8))], at).unwrap();
    }
}

/// Says so if there is no Python to run `tools/extract.py` with.
pub(crate) fn python_missing() -> bool {
    let missing = Command::new("python3").arg("--version").output().is_err();
    if missing {
        assert!(std::env::var_os("STABLEIO_NO_SKIP").is_none(), "python3 is missing");
        eprintln!("skipped: python3 is missing");
    }
    missing
}

/// What `tools/extract.py` makes of these members: exit code, image, what it
/// said.
pub(crate) fn extract(members: &[PathBuf], options: &[&str]) -> (i32, Vec<u8>, String) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/extract.py");
    let mut command = Command::new("python3");
    let out = command.arg(tool).args(options).arg("-o").arg(&image).args(members).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stderr, out.stdout].concat()).into_owned();
    (out.status.code().unwrap(), std::fs::read(image).unwrap_or_default(), said)
}
