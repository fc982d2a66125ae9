//! Arrays over files, against a byte array as oracle.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_array::array::ArrayOptions;
use stableio_array::{Array, CreateOptions, Level, assemble, create, probe};
use stableio_block::{Body, Error, Into, Kind, Op, Reply, Request, Stack, Worker};
use stableio_mem::{ForeignBuf, Pool, Segment, StableBuf};
use tempfile::TempDir;

struct Bed {
    dir: TempDir,
    members: Vec<PathBuf>,
    worker: Worker,
    pool: Arc<Pool>,
}

struct Open {
    array: Array,
    stack: Stack,
}

/// A small generator (xorshift64*), so that a failure names its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

impl Bed {
    fn new(level: Level, members: usize, chunk: u64) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let members: Vec<_> = (0..members).map(|i| dir.path().join(format!("m{i}"))).collect();
        let options = CreateOptions {
            name: "t".into(),
            level,
            chunk,
            member_size: Some(8 << 20),
            members: members.clone(),
            force: false,
        };
        create(&options).unwrap();
        Self {
            dir,
            members,
            worker: Worker::start("t").unwrap(),
            pool: Pool::new(64 << 20).unwrap(),
        }
    }

    fn open(&self) -> Open {
        self.open_some(&(0..self.members.len()).collect::<Vec<_>>())
    }

    fn open_some(&self, which: &[usize]) -> Open {
        let probes: Vec<_> = which.iter().map(|i| probe(&self.members[*i]).unwrap()).collect();
        let assembly = assemble(&probes, None).unwrap();
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
    fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let Reply::Data(data) = self.stack.submit(Request::read_owned(at, len)).wait()? else {
            panic!()
        };
        Ok(data.to_vec())
    }

    fn write(&self, at: u64, bytes: Vec<u8>) -> Result<(), Error> {
        self.stack
            .submit(Request::write(at, Body::Stable(StableBuf::from_owned(bytes)), false))
            .wait()
            .map(drop)
    }

    fn op(&self, op: Op) -> Result<Reply, Error> {
        self.stack.submit(Request { op, memory: None }).wait()
    }

    fn size(&self) -> usize {
        self.stack.limits().size as usize
    }

    /// Everything reads as the oracle says.
    fn check(&self, oracle: &[u8]) {
        for at in (0..oracle.len()).step_by(1 << 20) {
            let len = (1 << 20).min(oracle.len() - at);
            let got = self.read(at as u64, len).unwrap();
            if let Some(i) = (0..len).find(|i| got[*i] != oracle[at + i]) {
                panic!("byte {} is {:#x}, not {:#x}", at + i, got[i], oracle[at + i]);
            }
        }
    }

    fn close(self) {
        self.array.close().unwrap();
    }
}

/// A foreign buffer over bytes that this test owns.
fn foreign(bytes: Arc<Vec<u8>>, cuts: &[usize]) -> ForeignBuf {
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
fn play(open: &Open, oracle: &mut [u8], random: &mut Random, steps: usize) {
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

#[test]
fn random_operations_match_a_byte_array() {
    for (level, members, chunk, seed) in [
        (Level::Raid5, 3, 65536, 1),
        (Level::Raid5, 5, 4096, 2),
        (Level::Raid5, 4, 32768, 3),
        (Level::Raid5, 16, 8192, 4),
        (Level::Single, 1, 65536, 5),
    ] {
        let bed = Bed::new(level, members, chunk);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(seed);
        play(&open, &mut oracle, &mut random, 300);
        open.check(&oracle);
        open.close();
        // Once more, from what is on the members.
        let open = bed.open();
        open.check(&oracle);
        play(&open, &mut oracle, &mut random, 100);
        open.check(&oracle);
        assert_eq!(open.array.health().benign_mismatches.load(Ordering::Relaxed), 0, "seed {seed}");
        open.close();
        assert_eq!(bed.pool.used(), 0, "seed {seed}");
    }
}

#[test]
fn serves_and_writes_with_any_member_missing() {
    for gone in 0..4 {
        let bed = Bed::new(Level::Raid5, 4, 16384);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(gone + 77);
        play(&open, &mut oracle, &mut random, 150);
        open.close();
        std::fs::remove_file(&bed.members[gone as usize]).unwrap();
        let left: Vec<_> = (0..4).filter(|m| *m != gone as usize).collect();
        let open = bed.open_some(&left);
        open.check(&oracle);
        play(&open, &mut oracle, &mut random, 200);
        open.check(&oracle);
        open.close();
        let open = bed.open_some(&left);
        open.check(&oracle);
        open.close();
    }
}

fn flip(path: &Path, random: &mut Random, count: usize, first: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len() - 4096;
    for _ in 0..count {
        let at = first + random.below(len - first);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << random.below(8))], at).unwrap();
    }
}

#[test]
fn flipped_bytes_of_one_member_are_mended() {
    for seed in 1..6 {
        let bed = Bed::new(Level::Raid5, 3, 65536);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(seed);
        play(&open, &mut oracle, &mut random, 200);
        open.close();
        // All over the member: superblocks, tuples, data, parity.
        flip(&bed.members[1], &mut random, 100, 0);
        let open = bed.open();
        open.check(&oracle);
        let mended = open.array.health().blocks_mended.load(Ordering::Relaxed);
        assert!(mended > 5, "seed {seed}: {mended} mended, {:?}", open.array.health().events());
        assert!(open.array.health().members[1].mismatches.load(Ordering::Relaxed) >= mended);
        assert_eq!(open.array.health().members[0].mismatches.load(Ordering::Relaxed), 0);
        open.check(&oracle);
        assert_eq!(
            open.array.health().blocks_mended.load(Ordering::Relaxed),
            mended,
            "mended once"
        );
        // Writes go over damaged parity too.
        play(&open, &mut oracle, &mut random, 100);
        open.check(&oracle);
        open.close();
    }
}

#[test]
fn damage_beyond_redundancy_is_an_error_never_wrong_data() {
    let bed = Bed::new(Level::Raid5, 3, 65536);
    let open = bed.open();
    let mut oracle = vec![0; open.size()];
    let mut random = Random(9);
    play(&open, &mut oracle, &mut random, 200);
    open.close();
    for member in 0..2 {
        flip(&bed.members[member], &mut random, 1000, 4096);
    }
    let open = bed.open();
    let mut lost = 0;
    for at in (0..oracle.len()).step_by(4096) {
        match open.read(at as u64, 4096) {
            Ok(bytes) => assert!(bytes == oracle[at..at + 4096], "block {at}"),
            Err(error) => {
                assert_eq!(error.kind, Kind::Lost);
                lost += 1;
            }
        }
    }
    assert!(lost > 0);
    open.close();
}

#[test]
fn a_member_that_comes_back_is_stale_and_left_out() {
    let bed = Bed::new(Level::Raid5, 3, 65536);
    let open = bed.open();
    open.write(0, vec![1; 65536]).unwrap();
    open.close();
    let open = bed.open_some(&[0, 2]);
    open.write(0, vec![2; 65536]).unwrap();
    open.close();
    let probes: Vec<_> = bed.members.iter().map(|m| probe(m).unwrap()).collect();
    let assembly = assemble(&probes, None).unwrap();
    assert!(assembly.members[1].is_none());
    assert!(assembly.notes.iter().any(|n| n.contains("stale")), "{:?}", assembly.notes);
    let open = bed.open();
    assert_eq!(open.read(0, 65536).unwrap(), vec![2; 65536]);
    open.close();
}

#[test]
fn unwritten_ranges_are_told() {
    let bed = Bed::new(Level::Raid5, 3, 65536);
    let open = bed.open();
    open.write(1 << 20, vec![1; 100_352]).unwrap();
    let Reply::Map(map) = open.op(Op::Map { at: 0, len: 2 << 20 }).unwrap() else { panic!() };
    let told: Vec<_> = map.iter().map(|e| (e.data, e.len)).collect();
    assert_eq!(told, [(false, 1 << 20), (true, 102_400), (false, (1 << 20) - 102_400)]);
    open.op(Op::Discard { at: 1 << 20, len: 1 << 20 }).unwrap();
    let Reply::Map(map) = open.op(Op::Map { at: 0, len: 2 << 20 }).unwrap() else { panic!() };
    assert_eq!(map.len(), 1);
    assert_eq!(open.read(1 << 20, 4096).unwrap(), vec![0; 4096]);
    open.close();
    drop(bed.dir);
}
