//! What the doors give is what lay there: bytes, guards, parity, verdicts, for
//! segments of any address, length and number, into pools in any number of
//! pieces. Nobody writes to the foreign memory meanwhile; `racing.rs` is about
//! that.

mod support;

use std::sync::Arc;

use mem::{BLOCK, Grant, Pass, Pool, PoolBuf, RowShape, StableBuf, Update, doors};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use stableio_mem as mem;
use stableio_onepass as onepass;
use support::{Mapping, Random, assert_sums, naive_mul, noise, pool_in_pieces};

/// Bytes of foreign memory that segments are cut from.
const FOREIGN: usize = 256 << 10;
/// More than half of it is free: more than the longest request and its parity take.
const POOL: usize = 4 << 20;

type Segments = Vec<(usize, usize)>;

/// Offsets and lengths: odd ones, sectors, pages, empty ones, and the same
/// range named twice.
fn any_segments() -> impl Strategy<Value = Segments> {
    let offset = prop_oneof![
        0..FOREIGN,
        (0..FOREIGN / 512).prop_map(|sector| sector * 512),
        (0..FOREIGN / BLOCK).prop_map(|page| page * BLOCK),
    ];
    let len = prop_oneof![
        Just(0),
        1..64_usize,
        1..3 * BLOCK,
        (1..40_usize).prop_map(|sectors| sectors * 512),
        (1..12_usize).prop_map(|pages| pages * BLOCK),
    ];
    vec((offset, len, 1..=2_usize), 0..8).prop_map(|segments| {
        let clipped = segments.into_iter().map(|(offset, len, times)| {
            std::iter::repeat_n((offset, len.min(FOREIGN - offset)), times)
        });
        clipped.flatten().collect()
    })
}

fn any_at() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0..1000_u64).prop_map(|sector| sector * 512),
        1 => (0..100_u64).prop_map(|block| block * BLOCK as u64),
        1 => 0..500_000_u64,
    ]
}

fn any_pass() -> impl Strategy<Value = Pass> {
    let columns = prop_oneof![3 => 1..5_u32, 1 => 5..15_u32];
    let rows = (1..6_u32, columns, 1..3_u8)
        .prop_map(|(chunk_blocks, columns, parities)| RowShape { chunk_blocks, columns, parities });
    (prop::bool::weighted(0.8), prop::option::weighted(0.7, rows), any::<bool>())
        .prop_map(|(guards, rows, streams)| Pass { guards, rows, streams })
}

/// Foreign memory, what it holds, and a pool in pieces.
struct Stage {
    foreign: Arc<Mapping>,
    contents: Vec<u8>,
    pool: Arc<Pool>,
    taken: Vec<PoolBuf>,
}

impl Stage {
    fn new(seed: u64) -> Self {
        let contents = noise(seed, FOREIGN);
        let foreign = Mapping::holding(&contents);
        let (pool, taken) = pool_in_pieces(POOL, seed);
        Self { foreign, contents, pool, taken }
    }

    fn reserve(&self, bytes: usize) -> mem::Reservation {
        self.pool.try_reserve(bytes).expect("the pool is larger").expect("half of it is free")
    }

    /// Stable bytes that begin `lead` bytes into a buffer of the pool.
    fn stable(&self, lead: usize, bytes: &[u8]) -> StableBuf {
        let mut buf = self.reserve(lead + bytes.len()).take(lead + bytes.len());
        buf.copy_from(lead, bytes);
        buf.freeze().slice(lead..lead + bytes.len())
    }

    /// Panics if anything is left of what the test took.
    fn assert_nothing_left(self) {
        drop(self.taken);
        assert_eq!(self.pool.used(), 0, "all memory went back");
        assert_eq!(Arc::strong_count(&self.foreign), 1, "all handles are gone");
    }
}

/// Where each byte of the segments lies in the foreign memory, in order.
fn places(segments: &Segments) -> Vec<usize> {
    segments.iter().flat_map(|&(offset, len)| offset..offset + len).collect()
}

fn payload(segments: &Segments, contents: &[u8]) -> Vec<u8> {
    places(segments).into_iter().map(|place| contents[place]).collect()
}

/// The bytes of a buffer's blocks that do not belong to it: in front of the
/// payload at `at`, and behind it.
fn padding(copy: &StableBuf, at: u64) -> Vec<u8> {
    let segments = copy.source().segments().to_vec();
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else { return Vec::new() };
    let lead = (at % BLOCK as u64) as usize;
    let end = last.addr + last.len;
    let around = [(first.addr - lead, lead), (end, end.next_multiple_of(BLOCK) - end)];
    let pieces = around.into_iter().map(|(addr, len)| {
        // SAFETY: `copy` holds its blocks whole, and nobody writes to them.
        unsafe { std::slice::from_raw_parts(addr as *const u8, len) }
    });
    pieces.flatten().copied().collect()
}

proptest! {
    /// Also says that `Pass` knows what a request takes, to the byte.
    #[test]
    fn stabilize_copies_sums_and_pads(
        segments in any_segments(), at in any_at(), pass in any_pass(), seed: u64,
    ) {
        let stage = Stage::new(seed);
        let payload = payload(&segments, &stage.contents);
        let need = Pass::payload_bytes(at, payload.len()) + pass.parity_bytes(at, payload.len());
        let mut memory = stage.reserve(need);

        let foreign = stage.foreign.buf(&segments);
        prop_assert_eq!(foreign.len(), payload.len());
        let (copy, sums) = doors::stabilize(foreign, at, pass, &mut memory).unwrap();

        if pass.guards {
            prop_assert_eq!(memory.left(), 0);
        }
        prop_assert!(copy.to_vec() == payload);
        prop_assert!(copy.is_congruent(at, BLOCK));
        prop_assert!(padding(&copy, at).iter().all(|&byte| byte == 0));
        assert_sums(&sums, &payload, at, pass);

        drop((copy, sums, memory));
        stage.assert_nothing_left();
    }

    #[test]
    fn what_is_loaded_is_what_lay_there(segments in any_segments(), seed: u64) {
        let stage = Stage::new(seed);
        let payload = payload(&segments, &stage.contents);
        let mut loaded = vec![0; payload.len()];
        doors::load(stage.foreign.buf(&segments), &mut loaded).unwrap();
        prop_assert!(loaded == payload);
        stage.assert_nothing_left();
    }

    #[test]
    fn sums_are_the_same_wherever_the_bytes_lie(
        segments in any_segments(), at in any_at(), pass in any_pass(), seed: u64,
    ) {
        let stage = Stage::new(seed);
        let payload = payload(&segments, &stage.contents);
        let mut memory = stage.reserve(3 * pass.parity_bytes(at, payload.len()));

        let promised = doors::promise(stage.foreign.buf(&segments), Grant::by_administrator());
        assert_sums(&promised.sums(at, pass, &mut memory).unwrap(), &payload, at, pass);
        let in_pieces = stage.stable((at % BLOCK as u64) as usize, &payload);
        assert_sums(&doors::sums_of_stable(&in_pieces, at, pass, &mut memory), &payload, at, pass);
        let in_one = StableBuf::from_owned(payload.clone());
        assert_sums(&doors::sums_of_stable(&in_one, at, pass, &mut memory), &payload, at, pass);

        if pass.guards {
            prop_assert_eq!(memory.left(), 0);
        }
        drop((promised, in_pieces, in_one, memory));
        stage.assert_nothing_left();
    }

    #[test]
    fn blocks_are_taken_up_in_parity(
        segments in any_segments(), from in 0..3 * BLOCK, before in 0..4_usize, behind in 0..4_usize,
        coefficient: u8, (together, is_delta, is_promised) in any::<(bool, bool, bool)>(), seed: u64,
    ) {
        let stage = Stage::new(seed);
        let payload = payload(&segments, &stage.contents);
        let from = from.min(payload.len());
        let blocks = (payload.len() - from) / BLOCK;
        let mut expected = noise(!seed, (before + blocks + behind) * BLOCK);
        let mut expected_q = expected.clone();
        let mut parity = stage.reserve(expected.len()).take(expected.len());
        parity.copy_from(0, &expected);
        let mut q = stage.reserve(expected.len()).take(expected.len());
        q.copy_from(0, &expected);

        let promised = doors::promise(stage.foreign.buf(&segments), Grant::only_own_data());
        // Where parity holds something of the column already, that goes out.
        let old = noise(seed ^ 1, blocks * BLOCK);
        let old = is_delta.then(|| (stage.stable(0, &old), old));
        let stable = (!is_promised).then(|| stage.stable(0, &payload[from..from + blocks * BLOCK]));
        let take_up = |p, q| {
            let (old, at) = (old.as_ref().map(|(old, _)| old), before * BLOCK);
            let update = Update { p, q, coefficient, at, old };
            match &stable {
                Some(stable) => update.take_up(stable),
                None => promised.take_up(from, blocks, update).unwrap(),
            }
        };
        if together {
            take_up(Some(&mut parity), Some(&mut q));
        } else {
            take_up(Some(&mut parity), None);
            take_up(None, Some(&mut q));
        }

        let data = &payload[from..from + blocks * BLOCK];
        let old = old.map_or(vec![0; data.len()], |(_, old)| old);
        for (i, change) in data.iter().zip(old).map(|(byte, old)| byte ^ old).enumerate() {
            expected[before * BLOCK + i] ^= change;
            expected_q[before * BLOCK + i] ^= naive_mul(coefficient, change);
        }
        prop_assert!(parity.freeze().to_vec() == expected);
        prop_assert!(q.freeze().to_vec() == expected_q);
        drop((promised, stable));
        stage.assert_nothing_left();
    }

    #[test]
    fn a_verdict_names_exactly_the_changed_blocks(
        segments in any_segments(), from in 0..3 * BLOCK, changes in vec((any::<Index>(), 1..=255_u8), 0..6),
        seed: u64,
    ) {
        let mut stage = Stage::new(seed);
        let before = payload(&segments, &stage.contents);
        let from = from.min(before.len());
        let expected: Vec<u64> = before[from..].chunks_exact(BLOCK).map(onepass::guard).collect();
        let foreign = stage.foreign.buf(&segments);
        let verdict = doors::verify_in_place(&foreign, from, &expected).unwrap();
        prop_assert!(verdict.is_good() && verdict.mismatches().is_empty());

        // A change shows in every block that names the place, not only in one.
        let places = places(&segments);
        for (index, difference) in changes {
            if !places.is_empty() {
                stage.contents[places[index.index(places.len())]] ^= difference;
            }
        }
        stage.foreign.write(0, &stage.contents);
        let after = payload(&segments, &stage.contents);
        let blocks = before[from..].chunks_exact(BLOCK).zip(after[from..].chunks_exact(BLOCK));
        let changed: Vec<u32> =
            (0..).zip(blocks).filter(|(_, (old, new))| old != new).map(|(i, _)| i).collect();
        let verdict = doors::verify_in_place(&foreign, from, &expected).unwrap();
        prop_assert_eq!(verdict.mismatches(), &changed);
        prop_assert_eq!(verdict.is_good(), changed.is_empty());

        drop(foreign);
        stage.assert_nothing_left();
    }

    #[test]
    fn what_goes_out_touches_its_range_only(
        segments in any_segments(), range: (Index, Index), lead in 0..2 * BLOCK, seed: u64,
    ) {
        let mut stage = Stage::new(seed);
        let foreign = stage.foreign.buf(&segments);
        let (a, b) = (range.0.index(foreign.len() + 1), range.1.index(foreign.len() + 1));
        let (to, end) = (a.min(b), a.max(b));

        let bytes = noise(!seed, end - to);
        doors::copy_out(&stage.stable(lead, &bytes), &foreign, to).unwrap();
        // In order: where segments overlap, the later one stays.
        for (place, byte) in places(&segments)[to..end].iter().zip(&bytes) {
            stage.contents[*place] = *byte;
        }
        prop_assert!(stage.foreign.bytes() == stage.contents);

        let half = to + (end - to) / 2;
        doors::zero_out(&foreign, to, half - to).unwrap();
        for place in &places(&segments)[to..half] {
            stage.contents[*place] = 0;
        }
        prop_assert!(stage.foreign.bytes() == stage.contents);

        drop(foreign);
        stage.assert_nothing_left();
    }
}

/// The tests above would show little if the pool gave one extent each.
#[test]
fn the_pool_really_is_in_pieces() {
    let stage = Stage::new(1);
    let copy = stage.stable(0, &noise(2, 64 * BLOCK));
    assert!(copy.pieces().count() > 20, "{} extents for 64 blocks", copy.pieces().count());
}

/// A request and its neighbour, split off from one handle, sum up like one.
#[test]
fn split_requests_are_stabilized_like_one() {
    let stage = Stage::new(3);
    let segments = vec![(5, 3 * BLOCK), (100_000, 7), (8192, 2 * BLOCK + 11)];
    let payload = payload(&segments, &stage.contents);
    let pass = Pass { guards: true, rows: None, streams: false };
    let mut random = Random(4);
    for _ in 0..100 {
        let cut = random.below(payload.len() + 1);
        let at = 512 * random.below(20) as u64;
        let mut rest = stage.foreign.buf(&segments);
        let front = rest.split_to(cut);
        let mut from = 0;
        for part in [front, rest] {
            let bytes = &payload[from..from + part.len()];
            let at = at + from as u64;
            let mut memory = stage.reserve(Pass::payload_bytes(at, part.len()));
            let (copy, sums) = doors::stabilize(part, at, pass, &mut memory).unwrap();
            assert!(copy.to_vec() == bytes);
            assert_sums(&sums, bytes, at, pass);
            from += bytes.len();
        }
    }
    stage.assert_nothing_left();
}

/// What goes past the caches is what would have stayed in them.
#[test]
fn large_copies_are_right_wherever_they_go() {
    let len = (1 << 20) + 3 * BLOCK;
    let contents = noise(11, len);
    let foreign = Mapping::holding(&contents);
    let shape = RowShape { chunk_blocks: 4, columns: 3, parities: 1 };
    for (rows, at) in [(None, 0), (Some(shape), 0), (Some(shape), 5 * 512)] {
        for cuts in [vec![(0, len)], vec![(0, 70_001), (70_001, len - 70_001)]] {
            let pass = Pass { guards: true, rows, streams: true };
            let pool = Pool::new(4 << 20).unwrap();
            let mut memory = pool.try_reserve(pool.size()).unwrap().unwrap();
            let (copy, sums) = doors::stabilize(foreign.buf(&cuts), at, pass, &mut memory).unwrap();
            assert!(copy.to_vec() == contents);
            assert_sums(&sums, &contents, at, pass);
        }
    }
}

/// The owner may forget its memory as soon as it has passed it: the handle, or
/// the list that the kernel works on, is then the last to hold it.
#[test]
fn a_handle_keeps_its_memory() {
    let payload = noise(7, 4 * BLOCK);
    let segments = [(0, 4 * BLOCK)];
    let pass = Pass { guards: true, rows: None, streams: false };
    let pool = Pool::new(1 << 20).unwrap();
    let mut memory = pool.try_reserve(pool.size()).unwrap().unwrap();
    let alone = || Mapping::holding(&payload).buf(&segments);

    let (copy, sums) = doors::stabilize(alone(), 0, pass, &mut memory).unwrap();
    assert!(copy.to_vec() == payload);
    let promised = doors::promise(alone(), Grant::only_own_data());
    assert_eq!(promised.sums(0, pass, &mut memory).unwrap().guards, sums.guards);
    assert!(doors::verify_in_place(&alone(), 0, &sums.guards).unwrap().is_good());

    let shared = Mapping::holding(&payload);
    let list = mem::SgList::from(shared.buf(&segments));
    let again = list.duplicate();
    drop(list);
    assert_eq!(Arc::strong_count(&shared), 2);
    drop(again);
    let foreign = shared.buf(&segments);
    let target = foreign.target(0, BLOCK);
    drop(foreign);
    assert_eq!(Arc::strong_count(&shared), 2);
    drop(target);
    assert_eq!(Arc::strong_count(&shared), 1);
}

/// Blocks that lie across two pieces cannot be summed where they lie.
#[test]
#[should_panic(expected = "not congruent")]
fn what_is_not_congruent_is_not_summed() {
    let stage = Stage::new(8);
    let shifted = stage.stable(512, &noise(9, 64 * BLOCK));
    assert!(!shifted.is_congruent(0, BLOCK));
    let pass = Pass { guards: true, rows: None, streams: false };
    doors::sums_of_stable(&shifted, 0, pass, &mut stage.reserve(BLOCK));
}

#[test]
#[should_panic(expected = "of 4096 bytes")]
fn what_does_not_fit_is_not_copied_out() {
    let stage = Stage::new(5);
    let foreign = stage.foreign.buf(&[(0, BLOCK)]);
    let _ = doors::copy_out(&stage.stable(0, &[1; 512]), &foreign, BLOCK - 511);
}

#[test]
#[should_panic(expected = "of 4096 bytes")]
fn what_does_not_fit_is_not_zeroed() {
    let stage = Stage::new(6);
    let _ = doors::zero_out(&stage.foreign.buf(&[(0, BLOCK)]), BLOCK - 511, 512);
}
