//! Ends of writes that meet in a stripe, on members that tell what reached
//! them.

mod support;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use stableio_array::array::ArrayOptions;
use stableio_array::geometry::LOG_AT;
use stableio_array::{Array, Attached, Geometry, Level, assemble, probe};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Body, Device, Error, Kind, Limits, Op, OpName, Outcome, Request};
use stableio_block::{Stack, Ticket};
use stableio_mem::StableBuf;
use support::{Bed, Open, Random};

/// Raid6 over five: three columns of 64 KiB.
const STRIPE: u64 = 192 << 10;
/// Of the log: one more than may be missing.
const COPIES: u64 = 3;

/// A member that notes what is done to it, and fails writes to a range.
struct Watched {
    below: FileDevice,
    member: usize,
    seen: Seen,
    fails: Arc<Mutex<Range<u64>>>,
}

type Seen = Arc<Mutex<Vec<(usize, OpName, Range<u64>)>>>;

impl Device for Watched {
    fn limits(&self) -> &Limits {
        self.below.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let (op, at, len) = request.op.range();
        let range = at..at + len;
        self.seen.lock().unwrap().push((self.member, op, range.clone()));
        let fails = self.fails.lock().unwrap().clone();
        if op == OpName::Write && fails.start < range.end && range.start < fails.end {
            let kind = Kind::System(5);
            return Ticket::ready(Err(Error { kind, op, device: "watched".into(), at, len }));
        }
        self.below.submit(request)
    }
}

struct Stage {
    bed: Bed,
    open: Open,
    seen: Seen,
    fails: Arc<Mutex<Range<u64>>>,
    oracle: Vec<u8>,
    /// By the filling.
    joined_before: u64,
}

impl Stage {
    /// An array full of data, with nothing in its log.
    fn new(seed: u64) -> Self {
        let bed = Bed::new(Level::Raid6, 5, 65536);
        let (seen, fails) = (Seen::default(), Arc::new(Mutex::new(0..0)));
        let probes: Vec<_> = bed.members.iter().map(|m| probe(m).unwrap()).collect();
        let attached = bed.members.iter().enumerate().map(|(member, path)| {
            let handle = bed.worker.handle().clone();
            let below = FileDevice::open(path, &OpenOptions::default(), handle).unwrap();
            let (seen, fails) = (seen.clone(), fails.clone());
            let device: Arc<dyn Device> = Arc::new(Watched { below, member, seen, fails });
            Attached { name: format!("m{member}"), device: Some(device), incoming: None }
        });
        let (options, worker) = (ArrayOptions::default(), bed.worker.handle());
        let assembly = assemble(&probes, None).unwrap();
        let array = Array::over(&assembly, attached.collect(), options, worker).unwrap();
        let (device, pool) = (array.device().clone(), bed.pool.clone());
        let stack = Stack::new("t", device, pool, worker.clone());
        let open = Open { array, stack };
        let oracle = Random(seed).bytes(open.size());
        open.write(0, oracle.clone()).unwrap();
        open.array.device().checkpoint().wait().unwrap();
        seen.lock().unwrap().clear();
        let mut stage = Self { bed, open, seen, fails, oracle, joined_before: 0 };
        stage.joined_before = stage.joined();
        stage
    }

    /// Writes from each of `edges` to the next, submitted together; what came
    /// of each.
    fn stream(&mut self, edges: &[u64], random: &mut Random) -> Vec<Result<(), Kind>> {
        self.together(edges.windows(2).map(|edge| edge[0]..edge[1]).collect(), random)
    }

    fn together(&mut self, ranges: Vec<Range<u64>>, random: &mut Random) -> Vec<Result<(), Kind>> {
        let mut requests = Vec::new();
        for range in ranges {
            let bytes = random.bytes((range.end - range.start) as usize);
            self.oracle[range.start as usize..range.end as usize].copy_from_slice(&bytes);
            let body = Body::Stable(StableBuf::from_owned(bytes));
            requests.push(Request::write(range.start, body, false));
        }
        self.submit(requests)
    }

    fn submit(&self, requests: Vec<Request>) -> Vec<Result<(), Kind>> {
        let stack = self.open.stack.clone();
        let all = self.open.stack.worker().spawn(move || async move {
            let tickets: Vec<_> = requests.into_iter().map(|r| stack.submit(r)).collect();
            let mut outcomes = Vec::new();
            for ticket in tickets {
                outcomes.push(ticket.await.map(drop).map_err(|error| error.kind));
            }
            Ok::<_, Error>(outcomes)
        });
        all.wait().unwrap()
    }

    fn joined(&self) -> u64 {
        let joined = self.open.array.health().stripes_joined.load(Ordering::Relaxed);
        joined - self.joined_before
    }

    fn geometry(&self) -> Geometry {
        self.open.array.superblock().geometry
    }

    /// What was done to the chunks of a stripe.
    fn seen_in(&self, stripe: u64) -> Vec<(usize, OpName)> {
        let g = self.geometry();
        let chunk = g.member_offset(stripe, 0)..g.member_offset(stripe + 1, 0);
        let seen = self.seen.lock().unwrap();
        let inside = seen.iter().filter(|(_, _, at)| at.start < chunk.end && chunk.start < at.end);
        inside.map(|(member, op, _)| (*member, *op)).collect()
    }

    /// Blocks that the log took.
    fn logged(&self) -> u64 {
        let guards_at = self.geometry().guards_at();
        let seen = self.seen.lock().unwrap();
        let log = seen
            .iter()
            .filter(|(_, op, at)| *op == OpName::Write && (LOG_AT..guards_at).contains(&at.start));
        log.map(|(_, _, at)| at.end - at.start).sum::<u64>() / 4096 / COPIES
    }

    /// Everything reads as the oracle, by any three members.
    fn check(self) {
        self.open.check(&self.oracle);
        self.open.close();
        for gone in [[0, 1], [1, 3], [2, 4]] {
            let left: Vec<_> = (0..5).filter(|m| !gone.contains(m)).collect();
            let dir = tempfile::tempdir_in(self.bed.dir.path()).unwrap();
            let copies: Vec<_> = left.iter().map(|m| dir.path().join(format!("m{m}"))).collect();
            for (member, copy) in left.iter().zip(&copies) {
                std::fs::copy(&self.bed.members[*member], copy).unwrap();
            }
            let bed = Bed::around(dir, copies);
            let open = bed.open();
            open.check(&self.oracle);
            open.close();
        }
    }
}

/// The first write of a stream does not know that it is one; from the second
/// on, ends and beginnings are whole stripes.
#[test]
fn two_ends_are_one_full_stripe() {
    let mut stage = Stage::new(1);
    let edge = |stripes: u64, more: u64| stripes * STRIPE + more;
    let edges = [0, edge(1, 4096), edge(3, 65536), edge(5, 100 << 10), edge(7, 0)];
    let done = stage.stream(&edges, &mut Random(2));
    assert_eq!(done, [Ok(()), Ok(()), Ok(()), Ok(())]);
    assert_eq!(stage.joined(), 2);
    for stripe in [3, 5] {
        let mut seen = stage.seen_in(stripe);
        seen.sort_unstable_by_key(|(member, _)| *member);
        let writes: Vec<_> = (0..5).map(|member| (member, OpName::Write)).collect();
        assert_eq!(seen, writes, "stripe {stripe} was read, or written in parts");
    }
    // Of content the log has only that of a row of stripe 1, which is written
    // in two parts: a block of data and two, and the parity of each.
    let logged = stage.logged();
    assert!((3 + 4..24).contains(&logged), "{logged} blocks were logged");
    stage.check();
}

#[test]
fn an_end_that_meets_none_is_written_by_itself() {
    let mut stage = Stage::new(3);
    let mut random = Random(4);
    let edges = [0, 400 << 10, 800 << 10, 1200 << 10];
    // Nobody else is under way.
    for edges in edges.windows(2) {
        assert_eq!(stage.stream(edges, &mut random), [Ok(())]);
    }
    assert_eq!(stage.joined(), 0);
    // The last one waits for a next that does not come.
    let at = 1600 << 10;
    let done = stage.stream(&[at, at + (400 << 10), at + (800 << 10)], &mut random);
    assert_eq!(done, [Ok(()), Ok(())]);
    assert_eq!(stage.joined(), 0);
    stage.check();
}

/// JOIN-2: ends with a gap between them, or a block in common, stay two.
#[test]
fn ends_that_do_not_fit_are_not_joined() {
    for (seed, shift) in [(5, -4096i64), (6, 4096)] {
        let mut stage = Stage::new(seed);
        let third = (800 << 10) as i64 + shift;
        let ranges = vec![0..400 << 10, 400 << 10..800 << 10, third as u64..1200 << 10];
        let old = stage.oracle.clone();
        let done = stage.together(ranges, &mut Random(seed + 100));
        assert_eq!(done, [Ok(()), Ok(()), Ok(())]);
        assert_eq!(stage.joined(), 0);
        if shift < 0 {
            // The block in common is that of either.
            let at = third as usize;
            let block = stage.open.read(third as u64, 4096).unwrap();
            assert!(block != old[at..at + 4096], "it is of none");
            stage.oracle[at..at + 4096].copy_from_slice(&block);
        }
        stage.check();
    }
}

/// JOIN-2: both writes fail where the stripe of both fails.
#[test]
fn what_fails_fails_both() {
    let mut stage = Stage::new(7);
    let g = stage.geometry();
    let stripe = (800 << 10) / STRIPE;
    *stage.fails.lock().unwrap() = g.member_offset(stripe, 0)..g.member_offset(stripe + 1, 0);
    let done = stage.stream(&[0, 400 << 10, 800 << 10, 1200 << 10], &mut Random(8));
    assert_eq!(stage.joined(), 1);
    assert!(
        matches!(done[1..], [Err(Kind::Degraded { .. }), Err(Kind::Degraded { .. })]),
        "{done:?}"
    );
    assert!(stage.seen_in(stripe).iter().all(|(_, op)| *op == OpName::Write));
}

/// Small writes and discards of the same stripes meanwhile: every block is
/// that of one of them, and every row fits.
#[test]
fn others_in_the_same_stripe_change_nothing() {
    let mut stage = Stage::new(9);
    let mut random = Random(10);
    for round in 0..40 {
        let mut requests = Vec::new();
        let mut at = random.below(8) * 4096;
        for _ in 0..4 {
            let len = 2 * STRIPE + random.below(STRIPE / 4096) * 4096;
            let body = Body::Stable(StableBuf::from_owned(random.bytes(len as usize)));
            requests.push(Request::write(at, body, random.below(4) == 0));
            let near = (at + len - 8192 + random.below(32) * 512) / 512 * 512;
            let small = 512 * (1 + random.below(20));
            requests.push(match random.below(3) {
                0 => Request::of(Op::Discard { at: near / 4096 * 4096, len: 8192 }),
                _ => {
                    let bytes = random.bytes(small as usize);
                    Request::write(near, Body::Stable(StableBuf::from_owned(bytes)), false)
                }
            });
            at += len;
        }
        let done = stage.submit(requests);
        assert!(done.iter().all(Result::is_ok), "round {round}: {done:?}");
    }
    assert!(stage.joined() > 20, "{}", stage.joined());
    let size = stage.open.size();
    stage.oracle = stage.open.read(0, size).unwrap();
    stage.open.scrub();
    let health = stage.open.array.health();
    assert_eq!(health.blocks_mended.load(Ordering::Relaxed), 0, "{:?}", health.events());
    stage.check();
}
