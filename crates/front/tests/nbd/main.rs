//! The NBD server from outside: what it stores, and what it survives.

mod client;
mod hostile;
mod tools;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::WRITE_ZEROES;
use client::{Ask, BLOCK_STATUS, Client, DF, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, TRIM};
use stableio_block::dev::{FileDevice, OpenOptions, RamDevice};
use stableio_block::{
    Device, Error, Handle, Kind, Limits, OpName, Outcome, Request, Stack, Ticket, Worker, ring,
};
use stableio_front::nbd::{Export, NbdServer, Options};
use stableio_front::socket::{Listener, UnixOptions};
use stableio_mem::Pool;
use stableio_testkit::Scratch;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const EIO: u32 = 5;

/// A server, and what to look at from behind.
struct Served {
    server: Option<NbdServer>,
    pool: Arc<Pool>,
    lines: Arc<Mutex<Vec<String>>>,
    path: PathBuf,
    _worker: Worker,
    _scratch: Scratch,
}

impl Served {
    fn ram() -> Self {
        Self::with(Options::default(), |worker, _| Arc::new(ram(worker)))
    }

    fn file() -> Self {
        Self::with(Options::default(), |worker, scratch| {
            let image = scratch.sparse("disk", SIZE).unwrap();
            let options = OpenOptions::default();
            Arc::new(FileDevice::open(&image, &options, worker.handle().clone()).unwrap())
        })
    }

    fn with(options: Options, device: impl FnOnce(&Worker, &Scratch) -> Arc<dyn Device>) -> Self {
        let scratch = Scratch::new().unwrap();
        let worker = Worker::start("nbd").unwrap();
        let pool = Pool::new(64 << 20).unwrap();
        let handle = worker.handle().clone();
        let stack = Stack::new("disk", device(&worker, &scratch), pool.clone(), handle.clone());
        let path = scratch.path("nbd.sock");
        let listener = Listener::unix(&path, &UnixOptions::default()).unwrap();
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = lines.clone();
        let log = Arc::new(move |line: &str| log.lock().unwrap().push(line.into()));
        let export = Export::of("disk", stack).unwrap().with(|info| Ok(info.with_fast_zero()));
        let options = Options { log, ..options };
        let server = NbdServer::start(vec![export.unwrap()], listener, &handle, options);
        Self { server: Some(server), pool, lines, path, _worker: worker, _scratch: scratch }
    }

    fn connect(&self, ask: Ask) -> Client {
        Client::connect(&self.path, ask).unwrap()
    }

    /// Waits until all clients are gone and no memory is held for them.
    fn wait_until_quiet(&self) {
        let server = self.server.as_ref().unwrap();
        wait_until("all is quiet", || server.clients() == 0 && self.pool.used() == 0);
    }

    fn logged(&self, text: &str) -> bool {
        self.lines.lock().unwrap().iter().any(|line| line.contains(text))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

fn ram(worker: &Worker) -> RamDevice {
    RamDevice::new(SIZE, worker.handle().clone()).unwrap()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came to be that {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// xorshift64*: replayed by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }

    /// A range of 512-byte units inside `0..len`, mostly short.
    fn range(&mut self, len: u64) -> Range<u64> {
        let most = [8, 64, 3000][self.below(3) as usize];
        let units = len / 512;
        let from = self.below(units);
        let count = 1 + self.below(most.min(units - from));
        from * 512..(from + count) * 512
    }
}

/// Does `count` random requests inside `region` and compares with a byte array.
fn against_oracle(client: &mut Client, region: Range<u64>, seed: u64, count: usize) {
    let mut random = Random(seed);
    let mut oracle = vec![0; (region.end - region.start) as usize];
    for step in 0..count {
        let range = random.range(region.end - region.start);
        let (at, len) = (region.start + range.start, (range.end - range.start) as u32);
        let bytes = range.start as usize..range.end as usize;
        let flags = if random.below(4) == 0 { FUA } else { 0 };
        let context = format!("seed {seed}, step {step}, {at}+{len}");
        match random.below(10) {
            0..4 => {
                let data = random.bytes(len as usize);
                assert_eq!(client.write(flags, at, &data).unwrap(), Ok(vec![]), "{context}");
                oracle[bytes].copy_from_slice(&data);
            }
            4..8 => {
                let data = client.read(at, len).unwrap().expect(&context);
                assert!(data == oracle[bytes], "{context}");
            }
            8 => {
                let flags = flags | [0, NO_HOLE, FAST_ZERO][random.below(3) as usize];
                assert_eq!(client.call(WRITE_ZEROES, flags, at, len).unwrap(), Ok(vec![]));
                oracle[bytes].fill(0);
            }
            _ => {
                assert_eq!(client.call(TRIM, flags, at, len).unwrap(), Ok(vec![]), "{context}");
                // Dropped or not: both are right. From here on it counts.
                let data = client.read(at, len).unwrap().expect(&context);
                oracle[bytes].copy_from_slice(&data);
                assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), Ok(vec![]), "{context}");
            }
        }
    }
}

#[test]
fn what_is_read_is_what_was_written() {
    for served in [Served::ram(), Served::file()] {
        for (seed, ask) in [(1, Ask::Simple), (2, Ask::Structured)] {
            let mut client = served.connect(ask);
            assert_eq!(client.size, SIZE);
            assert_eq!(client.call(WRITE_ZEROES, 0, 0, SIZE as u32).unwrap(), Ok(vec![]));
            against_oracle(&mut client, 512..5 * MIB, seed, 150);
            client.begin(client::DISC, 0, 0, 0).unwrap();
            client.wait_for_end();
        }
        served.wait_until_quiet();
        assert!(served.lines.lock().unwrap().is_empty(), "{:?}", served.lines);
    }
}

#[test]
fn connections_do_not_disturb_each_other() {
    let served = Served::file();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let served = &served;
            scope.spawn(move || {
                let ask = if number % 2 == 0 { Ask::Simple } else { Ask::Structured };
                // Neighbours meet inside a block of 4096 bytes.
                let from = number * 3 * MIB + 512 * number;
                let region = from..from + 3 * MIB + 512;
                against_oracle(&mut served.connect(ask), region, 100 + number, 100);
            });
        }
    });
    served.wait_until_quiet();
}

#[test]
fn many_requests_are_under_way_at_once() {
    let served = Served::file();
    for ask in [Ask::Simple, Ask::Structured] {
        let mut client = served.connect(ask);
        let mut random = Random(7);
        let data = random.bytes(200 * 4096);
        for (block, data) in data.chunks(4096).enumerate() {
            client.begin_write(0, block as u64 * 4096, data).unwrap();
        }
        for _ in 0..200 {
            assert_eq!(client.answer().unwrap().1, Ok(vec![]));
        }
        let mut blocks = std::collections::HashMap::new();
        for _ in 0..200 {
            let block = random.below(200);
            blocks.insert(client.begin(READ, 0, block * 4096, 4096).unwrap(), block as usize);
        }
        for _ in 0..200 {
            let (cookie, answer) = client.answer().unwrap();
            let block = blocks.remove(&cookie).expect("each is answered once");
            assert!(answer.unwrap() == data[block * 4096..][..4096], "block {block}");
        }
    }
}

/// A disk whose last block takes its time.
struct Late {
    disk: Arc<RamDevice>,
    worker: Handle,
}

impl Device for Late {
    fn limits(&self) -> &Limits {
        self.disk.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        if request.op.range().1 < SIZE - 512 {
            return self.disk.submit(request);
        }
        let disk = self.disk.clone();
        self.worker.spawn(move || async move {
            ring::sleep(Duration::from_millis(5)).await;
            disk.submit(request).await
        })
    }
}

#[test]
fn large_requests_are_answered_whole() {
    let served = Served::with(Options::default(), |worker, _| {
        Arc::new(Late { disk: Arc::new(ram(worker)), worker: worker.handle().clone() })
    });
    let data = Random(3).bytes(20 * MIB as usize);
    for (ask, flags) in [(Ask::Simple, 0), (Ask::Structured, 0), (Ask::Structured, DF)] {
        let mut client = served.connect(ask);
        assert_eq!(client.write(FUA, 512, &data).unwrap(), Ok(vec![]));
        // Others under way; they must not be answered inside of it.
        let late = client.begin(READ, 0, SIZE - 512, 512).unwrap();
        let large = client.begin(READ, flags, 512, data.len() as u32).unwrap();
        let small = client.begin(READ, 0, 512, 512).unwrap();
        for _ in 0..3 {
            let (cookie, answer) = client.answer().unwrap();
            let answer = answer.unwrap();
            match cookie {
                cookie if cookie == late => assert!(answer == [0; 512]),
                cookie if cookie == large => assert!(answer == data),
                cookie => assert!(cookie == small && answer == data[..512]),
            }
        }
    }
    served.wait_until_quiet();
}

#[test]
fn holes_are_told() {
    let served = Served::file();
    let mut client = served.connect(Ask::Structured);
    assert_eq!(client.write(0, MIB, &[1; 8192]).unwrap(), Ok(vec![]));
    let status = client.call(BLOCK_STATUS, 0, 0, 4 * MIB as u32).unwrap().unwrap();
    let be = |n: u64| (n as u32).to_be_bytes();
    let hole = 3;
    let want = [MIB, hole, 8192, 0, 3 * MIB - 8192, hole].map(be).concat();
    assert_eq!(status, want);
    let one = 1 << 3;
    let status = client.call(BLOCK_STATUS, one, MIB, MIB as u32).unwrap().unwrap();
    assert_eq!(status, [8192, 0].map(be).concat());
}

/// A disk whose bytes from 4 MiB to 5 MiB can not be reached.
struct Rotten(RamDevice);

impl Device for Rotten {
    fn limits(&self) -> &Limits {
        self.0.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let (op, at, len) = request.op.range();
        if op == OpName::Flush || at >= 5 * MIB || at + len <= 4 * MIB {
            return self.0.submit(request);
        }
        let (kind, device) = (Kind::System(EIO as i32), "/secret/path".into());
        Ticket::ready(Err(Error { kind, op, device, at, len }))
    }
}

#[test]
fn errors_reach_their_request_and_no_other() {
    let served = Served::with(Options::default(), |worker, _| Arc::new(Rotten(ram(worker))));
    for ask in [Ask::Simple, Ask::Structured] {
        let mut client = served.connect(ask);
        let bad = 4 * MIB + 512;
        assert_eq!(client.read(bad, 512).unwrap(), Err(EIO));
        assert_eq!(client.write(0, bad, &[0; 512]).unwrap(), Err(EIO));
        assert_eq!(client.write(0, 3 * MIB, &vec![0; 3 * MIB as usize]).unwrap(), Err(EIO));
        for kind in [TRIM, WRITE_ZEROES] {
            assert_eq!(client.call(kind, 0, bad, 512).unwrap(), Err(EIO));
        }
        if ask == Ask::Structured {
            // A piece of it can be read, which is no answer.
            assert_eq!(client.read(3 * MIB, 3 * MIB as u32).unwrap(), Err(EIO));
            assert_eq!(client.call(BLOCK_STATUS, 0, bad, 512).unwrap(), Err(EIO));
            assert!(client.message.starts_with("map: "), "{}", client.message);
            assert!(!client.message.contains("secret"), "{}", client.message);
        }
        assert_eq!(client.read(0, 512).unwrap(), Ok(vec![0; 512]));
        // Before a reply has begun it can still be an error ...
        assert_eq!(client.call(READ, 0, 4 * MIB, 2 * MIB as u32).unwrap(), Err(EIO));
    }
    // ... and afterwards only the end of the connection.
    let mut client = served.connect(Ask::Simple);
    client.begin(READ, 0, 3 * MIB, 2 * MIB as u32).unwrap();
    client.wait_for_end();
    served.wait_until_quiet();
    assert!(served.logged("/secret/path") && served.logged("reply had begun"));
}

#[test]
fn a_stop_lets_requests_settle_and_removes_the_socket() {
    let mut served = Served::file();
    let mut client = served.connect(Ask::Structured);
    let mut idle = served.connect(Ask::Simple);
    let mut greeted = std::os::unix::net::UnixStream::connect(&served.path).unwrap();
    assert_eq!(client.write(0, 0, &[7; 4096]).unwrap(), Ok(vec![]));
    for _ in 0..100 {
        client.begin(READ, 0, 0, 4096).unwrap();
    }
    let started = Instant::now();
    served.server.take().unwrap().stop();
    assert!(started.elapsed() < Duration::from_secs(4), "nobody was waited for");
    assert!(!served.path.exists());
    while let Ok((_, answer)) = client.answer() {
        assert_eq!(answer, Ok(vec![7; 4096]));
    }
    idle.wait_for_end();
    std::io::Read::read_to_end(&mut greeted, &mut Vec::new()).unwrap();
    assert_eq!(served.pool.used(), 0);
}

#[test]
fn exports_fit_their_device() {
    let worker = Worker::start("nbd").unwrap();
    let pool = Pool::new(1 << 20).unwrap();
    let device = Arc::new(ram(&worker));
    let stack = Stack::new("disk", device, pool, worker.handle().clone());
    let export = Export::of("disk", stack.clone()).unwrap();
    let blocks = export.info().blocks();
    assert_eq!((blocks.minimum, blocks.preferred, blocks.max_payload), (512, 4096, 32 << 20));
    let larger = stableio_front::nbd::ExportInfo::new("disk", SIZE + 512, blocks).unwrap();
    assert!(Export::new(larger, stack.clone()).is_err());
    let finer = stableio_front::nbd::BlockSizes { minimum: 1, ..blocks };
    let finer = stableio_front::nbd::ExportInfo::new("disk", SIZE, finer).unwrap();
    assert!(Export::new(finer, stack).is_err());
}
