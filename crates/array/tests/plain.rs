//! Arrays without checksums: the same answers as with them, as long as members
//! that say nothing are right; a scrub says where that can not be.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_array::superblock::Id;
use stableio_array::{CreateError, CreateOptions, Level, create, prepare_replacement, probe};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Body, Kind, Request};
use stableio_mem::{ForeignBuf, Grant, Segment};
use support::{
    Bed, Open, Random, extract, flip, foreign, open_redundancy, play, python_missing, wait_until,
};

const SHAPES: [(Level, usize, u64); 6] = [
    (Level::Single, 1, 65536),
    (Level::Raid1, 2, 65536),
    (Level::Raid1, 3, 8192),
    (Level::Raid5, 3, 65536),
    (Level::Raid5, 5, 4096),
    (Level::Raid6, 5, 16384),
];

/// Every set of members that may be missing, the whole redundancy used up.
fn missing(level: Level, members: usize) -> Vec<Vec<usize>> {
    let most = open_redundancy(level, members);
    let sets = (0..1u32 << members).filter(|set| set.count_ones() as usize == most);
    sets.map(|set| (0..members).filter(|m| set >> m & 1 == 1).collect()).collect()
}

fn others(members: usize, gone: &[usize]) -> Vec<usize> {
    (0..members).filter(|m| !gone.contains(m)).collect()
}

/// Writes of blocks, of parts of blocks and of whole rows, few enough that the
/// log still has them all.
fn write_a_little(open: &Open, oracle: &mut [u8], random: &mut Random) {
    for len in [512, 4096, 1536, 20480, 8192, 65536, 4096, 2560] {
        let at = random.below(40 * 8) as usize * 512;
        let bytes = random.bytes(len);
        oracle[at..at + len].copy_from_slice(&bytes);
        open.write(at as u64, bytes).unwrap();
    }
}

#[test]
fn random_operations_match_a_byte_array_whoever_is_missing() {
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate() {
        for gone in missing(level, members) {
            let bed = Bed::plain(level, members, chunk);
            let open = bed.open();
            assert!(!open.array.superblock().checksums);
            let mut oracle = vec![0; open.size()];
            let mut random = Random(i as u64 + 1);
            play(&open, &mut oracle, &mut random, 60);
            open.check(&oracle);
            open.close();
            let left = others(members, &gone);
            let open = bed.open_some(&left);
            open.check(&oracle);
            play(&open, &mut oracle, &mut random, 60);
            open.check(&oracle);
            open.close();
            let open = bed.open_some(&left);
            open.check(&oracle);
            let health = open.array.health();
            assert_eq!(health.blocks_mended.load(Ordering::Relaxed), 0, "{:?}", health.events());
            open.close();
            assert_eq!(bed.pool.used(), 0);
        }
    }
}

/// RECOVER-5: power fails, every sector of data and tuples that was written
/// since the last flush is old or new, each for itself, and members are lost
/// with it.
#[test]
fn torn_writes_are_replayed_whoever_is_missing() {
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate() {
        for gone in [vec![]].into_iter().chain(missing(level, members)) {
            let bed = Bed::plain(level, members, chunk);
            let open = bed.open();
            let mut oracle = vec![0; open.size()];
            let mut random = Random(i as u64 + 21);
            play(&open, &mut oracle, &mut random, 30);
            open.op(stableio_block::Op::Flush).unwrap();
            open.array.device().checkpoint().wait().unwrap();
            let read_all = || bed.members.iter().map(|m| std::fs::read(m).unwrap());
            let before: Vec<_> = read_all().collect();
            write_a_little(&open, &mut oracle, &mut random);
            let mut after: Vec<_> = read_all().collect();
            let g = open.array.superblock().geometry;
            let region = g.guards_at() as usize..g.second_superblock_at() as usize;
            let mut torn = 0;
            for (after, before) in after.iter_mut().zip(&before) {
                let sectors = after[region.clone()].chunks_exact_mut(512);
                for (new, old) in sectors.zip(before[region.clone()].chunks_exact(512)) {
                    if new != old && random.below(2) == 0 {
                        new.copy_from_slice(old);
                        torn += 1;
                    }
                }
            }
            assert!(torn > 20, "{torn}");
            open.close();
            for (path, bytes) in bed.members.iter().zip(&after) {
                std::fs::write(path, bytes).unwrap();
            }
            let left = others(members, &gone);
            if i % 2 == 1 && !python_missing() {
                let paths: Vec<_> = left.iter().map(|m| bed.members[*m].clone()).collect();
                let (code, image, said) = extract(&paths, &[]);
                assert_eq!(code, 0, "{said}");
                assert!(image == oracle, "{level:?} without {gone:?}: {said}");
            }
            let open = bed.open_some(&left);
            let health = open.array.health();
            assert!(health.rows_recovered.load(Ordering::Relaxed) > 0);
            assert_eq!(health.blocks_lost.load(Ordering::Relaxed), 0);
            open.check(&oracle);
            // Parity is that of what is there.
            open.scrub();
            assert_eq!(health.blocks_differed.load(Ordering::Relaxed), 0, "{:?}", health.events());
            open.check(&oracle);
            open.close();
        }
    }
}

#[test]
fn a_replaced_member_has_everything() {
    for (level, members, chunk) in SHAPES {
        // With two removed, both are made of the others.
        for removed in 0..=open_redundancy(level, members).min(2) {
            let bed = Bed::plain(level, members, chunk);
            let open = bed.open();
            let mut oracle = vec![0; open.size()];
            let mut random = Random(members as u64);
            play(&open, &mut oracle, &mut random, 60);
            let device = open.array.device();
            for role in 0..removed {
                device.begin_remove(role).wait().unwrap();
                play(&open, &mut oracle, &mut random, 30);
            }
            let new = bed.dir.path().join("new");
            prepare_replacement(&new, &open.array.superblock().geometry, false).unwrap();
            let handle = bed.worker.handle().clone();
            let file = FileDevice::open(&new, &OpenOptions::default(), handle).unwrap();
            device.begin_replace(0, Id::random(), Arc::new(file), "new".into()).wait().unwrap();
            let health = open.array.health();
            while health.rebuild.how_far().is_some() {
                play(&open, &mut oracle, &mut random, 3);
            }
            wait_until("in sync", || health.members[0].in_sync.load(Ordering::Relaxed));
            open.scrub();
            assert_eq!(health.blocks_differed.load(Ordering::Relaxed), 0, "{:?}", health.events());
            open.close();
            // As many others as may be are missing: the new one is needed.
            let least = members - open_redundancy(level, members);
            let paths = [&new].into_iter().chain(&bed.members[removed.max(1)..]).take(least);
            let probes: Vec<_> = paths.map(|m| probe(m).unwrap()).collect();
            let open = bed.open_probes(&probes);
            open.check(&oracle);
            open.close();
        }
    }
}

/// COMPARE-1: what changes on a member in silence is not noticed on reading;
/// a scrub counts it and says so, and afterwards everybody reads the same.
#[test]
fn a_scrub_finds_what_differs_and_lets_the_data_decide() {
    for (level, members, chunk) in SHAPES.into_iter().filter(|s| s.0 != Level::Single) {
        for victim in 0..members {
            let bed = Bed::plain(level, members, chunk);
            let open = bed.open();
            let mut random = Random(victim as u64 + 5);
            let all = random.bytes(open.size());
            for (i, part) in all.chunks(1 << 20).enumerate() {
                open.write((i << 20) as u64, part.to_vec()).unwrap();
            }
            let data_at = open.array.superblock().geometry.data_at();
            open.close();
            flip(&bed.members[victim], &mut random, 50, data_at);
            let open = bed.open();
            open.read(0, open.size()).unwrap();
            let health = open.array.health();
            assert_eq!(health.blocks_mended.load(Ordering::Relaxed), 0);
            open.scrub();
            let differed = health.blocks_differed.load(Ordering::Relaxed);
            assert!(differed > 20, "{level:?}: {differed}");
            let said = |event: &String| event.contains("nothing says which was right");
            assert!(health.events().iter().any(said), "{:?}", health.events());
            open.scrub();
            assert_eq!(health.blocks_differed.load(Ordering::Relaxed), differed, "made anew");
            let content = open.read(0, open.size()).unwrap();
            open.close();
            let gone = missing(level, members);
            let open = bed.open_some(&others(members, &gone[victim % gone.len()]));
            open.check(&content);
            open.close();
        }
    }
}

/// Without a log only where there is no redundancy that could suffer.
#[test]
fn neither_log_nor_checksums_is_for_single_only() {
    for (level, members) in [(Level::Single, 1), (Level::Raid1, 2), (Level::Raid5, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..members).map(|i| dir.path().join(format!("m{i}"))).collect();
        let made = create(&CreateOptions {
            name: "t".into(),
            level,
            chunk: 65536,
            member_size: Some(8 << 20),
            members: paths.clone(),
            force: false,
            log: false,
            checksums: false,
            atomic_unit: None,
        });
        if level != Level::Single {
            assert!(matches!(made, Err(CreateError::NeitherLogNorChecksums(l)) if l == level));
            assert!(paths.iter().all(|path| !path.exists()));
            continue;
        }
        let bed = Bed::around(dir, paths);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        play(&open, &mut oracle, &mut Random(9), 150);
        open.check(&oracle);
        open.close();
        let open = bed.open();
        open.check(&oracle);
        open.close();
    }
}

/// Nothing would find out that a promise was broken.
#[test]
fn memory_is_not_taken_by_a_promise() {
    let bed = Bed::plain(Level::Raid5, 3, 65536);
    let open = bed.open();
    let trusting = open.stack.clone().with_grant(Grant::by_administrator());
    let bytes = Arc::new(vec![7; 3 * 4096]);
    let addr = (bytes.as_ptr() as usize).next_multiple_of(4096);
    let segments = vec![Segment { addr, len: 8192 }];
    // SAFETY: they are inside of what `bytes` keeps alive, and nobody uses it.
    let aligned = unsafe { ForeignBuf::new(segments, bytes.clone()) };
    let error = trusting.submit(Request::write(0, Body::Foreign(aligned), false)).wait();
    assert_eq!(error.unwrap_err().kind, Kind::Unsupported);
    // What is not whole blocks is copied all the same.
    let body = Body::Foreign(foreign(bytes, &[]));
    trusting.submit(Request::write(512, body, false)).wait().unwrap();
    open.close();
}

/// The bytes of the superblock and of the tuples: no guard anywhere.
#[test]
fn tuples_say_that_they_keep_no_guard() {
    let bed = Bed::plain(Level::Single, 1, 65536);
    let open = bed.open();
    open.write(0, vec![5; 4096]).unwrap();
    let at = open.array.superblock().geometry.guards_at();
    open.close();
    let member = File::open(&bed.members[0]).unwrap();
    let mut checksum = [9];
    member.read_exact_at(&mut checksum, 75).unwrap();
    assert_eq!(checksum, [0]);
    let mut tuple = [9; 16];
    member.read_exact_at(&mut tuple, at + 32).unwrap();
    assert_eq!(tuple, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0]);
}
