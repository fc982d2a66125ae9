//! Each kind of fault is seen to do what it says, over a RAM disk.

use std::sync::{Arc, Mutex};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use stableio_block::dev::fault::{EVERYWHERE, Fault, How, Ops, Rule};
use stableio_block::dev::{FaultDevice, Faults, RamDevice};
use stableio_block::exec::Executor;
use stableio_block::{
    Body, Device, Error, Into, Kind, Limits, Op, Outcome, Reply, Request, Ticket, Worker,
};
use stableio_mem::{ForeignBuf, Grant, Pool, Segment, SgList, StableBuf, doors};

const SIZE: u64 = 1 << 20;
const K4: u64 = 4096;

/// A device with faults, the medium below it, and what drives both.
struct Bed {
    device: FaultDevice,
    medium: Arc<RamDevice>,
    faults: Arc<Faults>,
    pool: Arc<Pool>,
    _worker: Worker,
}

impl Bed {
    fn new(rules: &str) -> Self {
        Self::over(Faults::parse(rules, 1).unwrap())
    }

    fn over(faults: Arc<Faults>) -> Self {
        let worker = Worker::start("t").unwrap();
        let medium = Arc::new(RamDevice::new(SIZE, worker.handle().clone()).unwrap());
        let device = FaultDevice::new(medium.clone(), faults.clone(), worker.handle().clone());
        Self { device, medium, faults, pool: Pool::new(4 << 20).unwrap(), _worker: worker }
    }

    fn write(&self, at: u64, byte: u8, len: usize) -> Outcome {
        self.device.submit(filled(at, byte, len)).wait()
    }

    fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        read(&self.device, &self.pool, at, len)
    }

    /// What lies on the medium, past all faults.
    fn below(&self, at: u64, len: usize) -> Vec<u8> {
        read(&*self.medium, &self.pool, at, len).unwrap()
    }
}

fn filled(at: u64, byte: u8, len: usize) -> Request {
    Request::write(at, Body::Stable(StableBuf::from_owned(vec![byte; len])), false)
}

fn read(device: &dyn Device, pool: &Arc<Pool>, at: u64, len: usize) -> Result<Vec<u8>, Error> {
    match device.submit(owned(pool, at, len)).wait()? {
        Reply::Data(data) => Ok(data.to_vec()),
        other => panic!("{other:?}"),
    }
}

fn owned(pool: &Arc<Pool>, at: u64, len: usize) -> Request {
    Request::read_owned(at, len).with_memory(pool.try_reserve(len).unwrap().unwrap())
}

fn kind<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Kind {
    outcome.unwrap_err().kind
}

/// Bits that differ from a fill.
fn turned(bytes: &[u8], fill: u8) -> u32 {
    bytes.iter().map(|b| (b ^ fill).count_ones()).sum()
}

const EIO: Kind = Kind::System(libc::EIO);

#[test]
fn without_rules_everything_passes() {
    let bed = Bed::over(Faults::new(1));
    bed.write(0, 7, 8192).unwrap();
    bed.device.submit(Request::flush()).wait().unwrap();
    assert_eq!(bed.read(0, 8192).unwrap(), [7; 8192]);
    let op = Op::WriteZeroes { at: 0, len: K4, fua: true };
    bed.device.submit(Request::of(op)).wait().unwrap();
    let op = Op::Discard { at: K4, len: 512 };
    bed.device.submit(Request::of(op)).wait().unwrap();
    assert_eq!(bed.below(0, 8192), [vec![0; 4096 + 512], vec![7; 4096 - 512]].concat());
    assert_eq!(bed.faults.hits(), Default::default());
    assert_eq!(bed.device.limits(), bed.medium.limits());
}

#[test]
fn errors_come_so_often_there_and_never_reach_the_medium() {
    let bed = Bed::new("write-error=ENOSPC@4K+4K:2,flush-error:1");
    let full = Kind::System(libc::ENOSPC);
    bed.write(0, 1, 4096).unwrap();
    assert_eq!(kind(bed.write(0, 2, 8192)), full);
    assert_eq!(bed.read(0, 8192).unwrap(), [vec![1; 4096], vec![0; 4096]].concat());
    let zeros = Op::WriteZeroes { at: K4 + 512, len: 512, fua: false };
    assert_eq!(kind(bed.device.submit(Request::of(zeros)).wait()), full);
    bed.write(K4, 3, 4096).unwrap();
    assert_eq!(kind(bed.device.submit(Request::flush()).wait()), EIO);
    bed.device.submit(Request::flush()).wait().unwrap();
    assert_eq!(bed.faults.hits().error, 3);
    // Rules come and go while it works.
    let rule = bed.faults.add("read-error".parse().unwrap());
    assert_eq!(kind(bed.read(0, 512)), EIO);
    assert_eq!(bed.faults.hits_of(rule), Some(1));
    assert!(bed.faults.remove(rule) && !bed.faults.remove(rule));
    assert_eq!(bed.faults.hits_of(rule), None);
    bed.read(0, 512).unwrap();
}

#[test]
fn a_bad_block_is_healed_by_writing_it() {
    let bed = Bed::new("latent@8K+8K");
    assert_eq!(kind(bed.read(0, 8192 + 512)), EIO);
    assert_eq!(kind(bed.read(8192 + 4096, 4096)), EIO);
    bed.read(0, 8192).unwrap();
    bed.read(16384, 4096).unwrap();
    bed.write(0, 1, 8192).unwrap();
    assert_eq!(kind(bed.read(8192, 512)), EIO, "its neighbour was written");
    // The middle first: both ends stay bad.
    bed.write(8192 + 2048, 2, 4096).unwrap();
    assert_eq!(bed.read(8192 + 2048, 4096).unwrap(), [2; 4096]);
    assert_eq!(bed.faults.bad(), [8192..8192 + 2048, 16384 - 2048..16384]);
    let zeros = Op::WriteZeroes { at: 8192, len: 2048, fua: false };
    bed.device.submit(Request::of(zeros)).wait().unwrap();
    assert_eq!(kind(bed.read(8192, 8192)), EIO);
    bed.write(16384 - 2048, 3, 2048).unwrap();
    bed.read(8192, 8192).unwrap();
    assert!(bed.faults.bad().is_empty());
    assert_eq!(bed.faults.hits().latent, 4);
    // A write that fails, or that never arrives, heals nothing.
    let bad = bed.faults.add("latent@0+4K".parse().unwrap());
    for lie in ["write-lost:1", "write-error:1"] {
        bed.faults.add(lie.parse().unwrap());
        let _ = bed.write(0, 4, 4096);
        assert_eq!(kind(bed.read(0, 512)), EIO, "{lie}");
    }
    bed.faults.remove(bad);
    bed.read(0, 512).unwrap();
}

#[test]
fn a_block_goes_bad_by_chance_and_stays_so() {
    let bed = Bed::new("latent@16K+64K:1");
    bed.read(0, 16384).unwrap();
    assert_eq!(kind(bed.read(0, 65536)), EIO);
    let [bad] = &bed.faults.bad()[..] else { panic!("{:?}", bed.faults.bad()) };
    assert!(bad.start >= 16384 && bad.end <= 65536 && bad.end - bad.start == K4, "{bad:?}");
    assert_eq!(kind(bed.read(bad.start, 4096)), EIO);
    bed.write(bad.start, 1, 4096).unwrap();
    bed.read(0, 65536).unwrap();
}

#[test]
fn one_bit_turns_over_on_the_medium() {
    let bed = Bed::new("write-flip:1");
    bed.write(4096, 0xa5, 16384).unwrap();
    assert_eq!(turned(&bed.below(4096, 16384), 0xa5), 1);
    assert_eq!(turned(&bed.below(0, 4096), 0), 0);
    assert_eq!(turned(&bed.below(4096 + 16384, 4096), 0), 0);
    bed.write(4096, 0xa5, 16384).unwrap();
    assert_eq!(turned(&bed.below(4096, 16384), 0xa5), 0, "the rule is used up");
    bed.faults.add("read-flip@8K+512:2".parse().unwrap());
    let seen = bed.read(4096, 16384).unwrap();
    assert_eq!(turned(&seen, 0xa5), 1);
    assert_eq!(turned(&seen[4096..4096 + 512], 0xa5), 1, "in the rule's range");
    assert_eq!(bed.below(4096, 16384), seen, "at rest");
    bed.read(4096, 16384).unwrap();
    assert!([0, 2].contains(&turned(&bed.below(4096, 16384), 0xa5)));
    assert_eq!(bed.faults.hits().flip, 3);
    assert_eq!(bed.pool.used(), 0);
}

#[test]
fn a_torn_write_ends_at_a_multiple_of_its_unit() {
    for (rules, unit, silent) in
        [("torn", 512, false), ("torn=4K", 4096, false), ("torn-silent=4K", 4096, true)]
    {
        let bed = Bed::new(rules);
        let mut lengths = Vec::new();
        for round in 1..40 {
            let outcome = bed.write(4096, round, 16384);
            match silent {
                true => assert!(matches!(outcome, Ok(Reply::Done))),
                false => assert_eq!(kind(outcome), EIO),
            }
            let got = bed.below(4096, 16384);
            let landed = got.iter().take_while(|b| **b == round).count();
            assert!(!got[landed..].contains(&round) && landed.is_multiple_of(unit));
            assert!(landed < 16384);
            lengths.push(landed);
        }
        lengths.sort_unstable();
        lengths.dedup();
        assert!(lengths.len() >= 4, "{rules}: {lengths:?}");
        assert_eq!(bed.faults.hits().torn, 39);
        let zeros = Op::WriteZeroes { at: 0, len: SIZE, fua: false };
        let _ = bed.device.submit(Request::of(zeros)).wait();
        assert_eq!(bed.faults.hits().torn, 40);
    }
}

#[test]
fn a_lost_write_reports_success() {
    let bed = Bed::new("lost:1");
    bed.write(0, 1, 4096).unwrap();
    assert_eq!(bed.below(0, 4096), [0; 4096]);
    bed.write(0, 2, 4096).unwrap();
    assert_eq!(bed.below(0, 4096), [2; 4096]);
    bed.faults.add("flush-lost".parse().unwrap());
    bed.faults.add("flush-error".parse().unwrap());
    bed.device.submit(Request::flush()).wait().unwrap();
    bed.write(0, 3, 4096).unwrap();
    assert_eq!(bed.below(0, 4096), [3; 4096]);
    assert_eq!((bed.faults.hits().lost, bed.faults.hits().error), (2, 0));
}

#[test]
fn what_stalls_lets_the_worker_go_on() {
    let bed = Bed::new("stall@0+4K");
    let stuck = |byte| bed.device.submit(filled(0, byte, 4096));
    let first = stuck(1);
    // The worker serves others meanwhile, whoever waits.
    for i in 1..20 {
        bed.write(i * K4, 9, 4096).unwrap();
    }
    bed.device.submit(Request::flush()).wait().unwrap();
    assert_eq!(bed.faults.stalled(), 1);
    assert_eq!(bed.below(0, 4096), [0; 4096]);
    bed.faults.release();
    first.wait().unwrap();
    assert_eq!(bed.below(0, 4096), [1; 4096]);
    // Released is who waited; the rule stays until it is removed.
    let second = stuck(2);
    let third = bed.device.submit(owned(&bed.pool, 0, 4096));
    bed.write(K4, 9, 4096).unwrap();
    assert_eq!((bed.faults.stalled(), bed.faults.hits().stall), (2, 3));
    bed.faults.clear();
    second.wait().unwrap();
    third.wait().unwrap();
    assert_eq!(bed.faults.stalled(), 0);
    bed.read(0, 4096).unwrap();
}

#[test]
fn release_from_another_thread_is_never_missed() {
    let bed = Bed::new("stall");
    for round in 0..300 {
        let ticket = bed.device.submit(filled(0, round as u8, 512));
        let faults = bed.faults.clone();
        let other = std::thread::spawn(move || {
            while faults.stalled() == 0 {
                std::hint::spin_loop();
            }
            faults.release();
        });
        ticket.wait().unwrap();
        other.join().unwrap();
    }
}

/// Everything that the simulator has: an executor without a ring.
struct Bare {
    executor: Executor,
    device: FaultDevice,
    medium: Arc<RamDevice>,
    faults: Arc<Faults>,
    pool: Arc<Pool>,
}

impl Bare {
    fn new(rules: &str, seed: u64) -> Self {
        let executor = Executor::new(|| {});
        let faults = Faults::parse(rules, seed).unwrap();
        let medium = Arc::new(RamDevice::new(SIZE, executor.handle()).unwrap());
        let device = FaultDevice::new(medium.clone(), faults.clone(), executor.handle());
        Self { executor, device, medium, faults, pool: Pool::new(1 << 20).unwrap() }
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        self.executor.enter(|| self.device.submit(request))
    }

    fn run(&self) {
        self.executor.enter(|| while self.executor.run(64) {});
    }

    fn below(&self, at: u64, len: usize) -> Vec<u8> {
        let ticket = self.executor.enter(|| self.medium.submit(owned(&self.pool, at, len)));
        self.run();
        let Ok(Reply::Data(data)) = ticket.wait() else { panic!("a RAM disk never fails") };
        data.to_vec()
    }
}

#[test]
fn without_a_ring_all_faults_work() {
    let bare = Bare::new("stall@0+4K,flip@4K+4K,torn=4K@64K+64K", 3);
    let stuck = bare.submit(filled(0, 1, 4096));
    let flipped = bare.submit(filled(K4, 2, 4096));
    let torn = bare.submit(filled(65536, 3, 65536));
    bare.run();
    assert_eq!(bare.faults.stalled(), 1);
    flipped.wait().unwrap();
    assert_eq!(kind(torn.wait()), EIO);
    assert_eq!(turned(&bare.below(K4, 4096), 2), 1);
    assert_eq!(bare.below(0, 4096), [0; 4096]);
    bare.faults.release();
    bare.run();
    stuck.wait().unwrap();
    assert_eq!(bare.below(0, 4096), [1; 4096]);
}

/// Bits of one block that differ from what was written while a read turned a
/// bit of it over, in every order in which tasks may have their turn. `past`
/// writes to the medium, past the device that keeps both apart.
fn turned_while_written(seed: u64, past: bool) -> u32 {
    let bare = Bare::new("read-flip@0+4K", seed);
    bare.submit(filled(0, 1, 4096));
    bare.run();
    let reader = bare.submit(owned(&bare.pool, 0, 4096));
    let writer = match past {
        true => bare.executor.enter(|| bare.medium.submit(filled(0, 2, 4096))),
        false => bare.submit(filled(0, 2, 4096)),
    };
    let late = bare.submit(owned(&bare.pool, 0, 4096));
    let mut choice = seed;
    bare.executor.enter(|| {
        while bare.executor.run_one(|ready| {
            choice = choice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e);
            (choice >> 33) as usize % ready
        }) {}
    });
    [reader, writer, late].into_iter().for_each(|ticket| drop(ticket.wait().unwrap()));
    turned(&bare.below(0, 4096), 2)
}

/// FAULT-2.
#[test]
fn a_bit_that_turns_over_undoes_no_write() {
    let turned: Vec<u32> = (0..300).map(|seed| turned_while_written(seed, false)).collect();
    assert!(turned.iter().all(|bits| *bits <= 2), "the block of before is back: {turned:?}");
    assert!(turned.iter().any(|bits| *bits > 0), "no seed turned a bit after the write");
}

#[test]
fn twin_a_bit_that_turns_over_across_a_write_undoes_it() {
    assert!((0..300).any(|seed| turned_while_written(seed, true) > 2));
}

#[test]
fn chances_depend_on_the_seed_alone() {
    let hits = |seed| {
        let bare = Bare::new("read-error@0+64K:1/3,write-error:1/10,torn-silent:1/10", seed);
        let failed: Vec<bool> = (0..2000u64)
            .map(|i| {
                let ticket = match i % 2 {
                    0 => bare.submit(owned(&bare.pool, 0, 512)),
                    _ => bare.submit(filled(65536, i as u8, 4096)),
                };
                bare.run();
                ticket.wait().is_err()
            })
            .collect();
        (failed, bare.faults.hits(), bare.below(65536, 4096))
    };
    let first = hits(1);
    assert_eq!(first, hits(1));
    assert_ne!(first.0, hits(2).0);
    let failed = |odd: usize| first.0.iter().skip(odd).step_by(2).filter(|f| **f).count();
    assert!((250..420).contains(&failed(0)), "{} of 1000 are no third", failed(0));
    assert!((60..150).contains(&failed(1)), "{} of 1000 are no tenth", failed(1));
    assert_eq!(first.1.error, (failed(0) + failed(1)) as u64);
    assert!((50..140).contains(&first.1.torn), "{}", first.1);
}

#[test]
fn the_first_rule_that_acts_is_the_only_one() {
    let faults = Faults::new(1);
    let rule = |fault, how| Rule { ops: Ops::ANY, range: EVERYWHERE, how, fault };
    // `Lost` has no reads; a chance of none never comes.
    faults.add(rule(Fault::Error(5), How::OneIn(0)));
    faults.add(rule(Fault::Lost, How::Next(1)));
    faults.add(rule(Fault::Error(6), How::Next(2)));
    faults.add(rule(Fault::Error(7), How::Always));
    let bed = Bed::over(faults);
    assert_eq!(kind(bed.read(0, 512)), Kind::System(6));
    bed.write(0, 1, 512).unwrap();
    assert_eq!(kind(bed.write(0, 1, 512)), Kind::System(6));
    assert_eq!(kind(bed.write(0, 1, 512)), Kind::System(7));
    assert_eq!(kind(bed.device.submit(Request::flush()).wait()), Kind::System(7));
}

/// Notes what arrives and looks at no memory.
struct Recorder {
    limits: Limits,
    seen: Mutex<Vec<(&'static str, Vec<Segment>)>>,
}

impl Device for Recorder {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, Request { op, memory, .. }: Request) -> Ticket<Outcome> {
        let (name, list) = match op {
            Op::Write { body, .. } => {
                let name = match &body {
                    Body::Stable(_) => "stable",
                    Body::Promised(_) => "promised",
                    Body::Foreign(_) => "foreign",
                    Body::Segments(_) => "segments",
                };
                (name, body.into_segments())
            }
            Op::Read { into: Into::Foreign(buf), .. } => ("into foreign", buf.into()),
            Op::Read { into: Into::Segments(list), .. } => ("into segments", list),
            Op::Read { into: Into::Pool(len), .. } => {
                let mut buf = memory.unwrap().take(len);
                buf.zero(0..len);
                return Ticket::ready(Ok(Reply::Data(buf.freeze())));
            }
            _ => return Ticket::ready(Ok(Reply::Done)),
        };
        self.seen.lock().unwrap().push((name, list.segments().to_vec()));
        Ticket::ready(Ok(Reply::Done))
    }
}

/// Pages that nobody can look at.
struct Forbidden(usize);
const PAGES: usize = 64 << 10;

impl Forbidden {
    fn new() -> Arc<Self> {
        // SAFETY: a fresh anonymous mapping touches no memory of ours.
        let addr = unsafe {
            mmap_anonymous(std::ptr::null_mut(), PAGES, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        Arc::new(Self(addr.unwrap() as usize))
    }

    /// All of it, the second half first.
    fn buf(self: &Arc<Self>) -> ForeignBuf {
        let half = PAGES / 2;
        let segments = [half, 0].map(|from| Segment { addr: self.0 + from, len: half });
        // SAFETY: mapped until the last handle drops `self`; nobody refers to it.
        unsafe { ForeignBuf::new(segments, self.clone()) }
    }
}

impl Drop for Forbidden {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no handle is left.
        unsafe { munmap(self.0 as *mut _, PAGES).unwrap() }
    }
}

type As<T> = fn(ForeignBuf) -> T;

/// MEM-1: whoever looks at the memory dies of it.
#[test]
fn memory_goes_down_as_it_came_and_is_never_looked_at() {
    let memory = Forbidden::new();
    let half = PAGES / 2;
    let whole: Vec<Segment> =
        [half, 0].map(|from| Segment { addr: memory.0 + from, len: half }).into();
    let bare = Executor::new(|| {});
    let limits = RamDevice::new(SIZE, bare.handle()).unwrap().limits().clone();
    for rules in ["torn=4K", "torn-silent", "flip", "latent@0+4K", "stall:1/2", "lost", "error"] {
        let below = Arc::new(Recorder { limits: limits.clone(), seen: Mutex::default() });
        let faults = Faults::parse(rules, 5).unwrap();
        let device = FaultDevice::new(below.clone(), faults.clone(), bare.handle());
        let bodies: [(&str, As<Body>); 3] = [
            ("foreign", Body::Foreign),
            ("promised", |b| Body::Promised(doors::promise(b, Grant::by_administrator()))),
            ("segments", |b| Body::Segments(SgList::from(b))),
        ];
        let intos: [(&str, As<Into>); 2] = [
            ("into foreign", Into::Foreign),
            ("into segments", |b| Into::Segments(SgList::from(b))),
        ];
        let mut requests: Vec<(&str, Request)> = Vec::new();
        for _ in 0..10 {
            for (name, body) in bodies {
                requests.push((name, Request::write(0, body(memory.buf()), false)));
            }
            for (name, into) in intos {
                let op = Op::Read { at: 8192, into: into(memory.buf()) };
                requests.push((name, Request::of(op)));
            }
        }
        for (name, request) in requests {
            let ticket = bare.enter(|| device.submit(request));
            bare.enter(|| while bare.run(64) {});
            faults.release();
            bare.enter(|| while bare.run(64) {});
            let _ = ticket.wait();
            let mut seen = std::mem::take(&mut *below.seen.lock().unwrap());
            // The blocks with a bit turned over are the device's own.
            seen.retain(|(name, _)| *name != "stable");
            let write = !name.starts_with("into");
            let torn = rules.starts_with("torn") && write;
            let stopped = rules == "error" || (rules == "lost" && write);
            assert!(torn || seen.len() == usize::from(!stopped), "{rules} {name}: {seen:?}");
            for (arrived, segments) in &seen {
                assert_eq!(*arrived, name, "{rules}");
                let len: usize = segments.iter().map(|s| s.len).sum();
                let first = segments[0].len.min(half);
                assert_eq!(segments[0], Segment { addr: memory.0 + half, len: first });
                assert!(if torn { len < PAGES } else { *segments == whole }, "{rules}");
            }
        }
    }
    assert_eq!(Arc::strong_count(&memory), 1, "every handle was dropped");
}
