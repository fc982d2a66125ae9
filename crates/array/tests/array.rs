//! Arrays over files, against a byte array as oracle.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_array::superblock::Id;
use stableio_array::{Level, assemble, probe};
use stableio_block::{Kind, Op, Reply};
use support::{Bed, Open, Random, flip, open_redundancy, play, wait_until};

#[test]
fn random_operations_match_a_byte_array() {
    for (level, members, chunk, seed) in [
        (Level::Raid5, 3, 65536, 1),
        (Level::Raid5, 5, 4096, 2),
        (Level::Raid5, 4, 32768, 3),
        (Level::Raid5, 16, 8192, 4),
        (Level::Single, 1, 65536, 5),
        (Level::Raid1, 2, 65536, 6),
        (Level::Raid1, 4, 16384, 7),
        (Level::Raid6, 4, 65536, 8),
        (Level::Raid6, 7, 8192, 9),
        (Level::Raid6, 16, 4096, 10),
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
fn serves_and_writes_with_any_members_missing() {
    let raid6 = (0..5).flat_map(|a| (0..a).map(move |b| (Level::Raid6, 5, vec![a, b])));
    let raid5 = (0..4).map(|gone| (Level::Raid5, 4, vec![gone]));
    let raid1 = (0..3).map(|left| (Level::Raid1, 3, (0..3).filter(|m| *m != left).collect()));
    for (i, (level, members, gone)) in raid5.chain(raid1).chain(raid6).enumerate() {
        let bed = Bed::new(level, members, 16384);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(i as u64 + 77);
        play(&open, &mut oracle, &mut random, 100);
        open.close();
        let left: Vec<_> = (0..members).filter(|m| !gone.contains(m)).collect();
        gone.iter().for_each(|m| std::fs::remove_file(&bed.members[*m]).unwrap());
        let open = bed.open_some(&left);
        open.check(&oracle);
        play(&open, &mut oracle, &mut random, 150);
        open.check(&oracle);
        open.close();
        let open = bed.open_some(&left);
        open.check(&oracle);
        open.close();
    }
}

/// A member of each level is replaced while everybody goes on; then as many
/// others as may are taken away, so that the new one is needed.
#[test]
fn a_replaced_member_has_everything() {
    for (level, members, chunk) in [
        (Level::Raid1, 2, 65536),
        (Level::Raid5, 3, 65536),
        (Level::Raid5, 5, 4096),
        (Level::Raid6, 5, 16384),
        (Level::Single, 1, 65536),
    ] {
        // With two missing, both are made of the others.
        let most = if level == Level::Single { 0 } else { level.parities().max(1) };
        for missing in 0..=most {
            let bed = Bed::new(level, members, chunk);
            let open = bed.open();
            let mut oracle = vec![0; open.size()];
            let mut random = Random(members as u64);
            play(&open, &mut oracle, &mut random, 100);
            let device = open.array.device();
            for role in 0..missing {
                device.begin_remove(role).wait().unwrap();
                play(&open, &mut oracle, &mut random, 50);
            }
            let new = bed.dir.path().join("new");
            let geometry = open.array.superblock().geometry;
            stableio_array::prepare_replacement(&new, &geometry, false).unwrap();
            let file = stableio_block::dev::FileDevice::open(
                &new,
                &stableio_block::dev::OpenOptions::default(),
                bed.worker.handle().clone(),
            );
            device
                .begin_replace(0, Id::random(), Arc::new(file.unwrap()), "new".into())
                .wait()
                .unwrap();
            let busy = device.begin_scrub().wait();
            let health = open.array.health();
            assert!(busy.is_err() || health.rebuild.how_far().is_none());
            while health.rebuild.how_far().is_some() {
                play(&open, &mut oracle, &mut random, 3);
            }
            assert!(health.members[0].in_sync.load(Ordering::Relaxed), "{:?}", health.events());
            assert_eq!(health.members[0].name(), "new");
            open.check(&oracle);
            open.close();
            let others = &bed.members[missing.max(1)..];
            let mut left: Vec<_> = [new].into_iter().chain(others.to_vec()).collect();
            left.truncate(members - geometry.redundancy());
            let probes: Vec<_> = left.iter().map(|m| probe(m).unwrap()).collect();
            let open = bed.open_probes(&probes);
            open.check(&oracle);
            assert_eq!(open.array.health().blocks_lost.load(Ordering::Relaxed), 0);
            open.close();
        }
    }
}

/// What was written without a member that comes back soon is in the log.
#[test]
fn a_member_that_comes_back_catches_up() {
    for (level, members) in [(Level::Raid1, 2), (Level::Raid5, 3), (Level::Raid6, 4)] {
        let bed = Bed::new(level, members, 65536);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(5);
        play(&open, &mut oracle, &mut random, 60);
        open.close();
        let left: Vec<_> = (1..members).collect();
        let open = bed.open_some(&left);
        for i in 0..5u64 {
            let bytes = random.bytes(20480);
            let at = (i << 20) as usize % (oracle.len() - bytes.len()) / 4096 * 4096;
            oracle[at..at + bytes.len()].copy_from_slice(&bytes);
            open.write(at as u64, bytes).unwrap();
        }
        open.close();
        let open = bed.open();
        let health = open.array.health();
        wait_until("catching up", || health.members[0].in_sync.load(Ordering::Relaxed));
        let events = health.events();
        assert!(events.iter().any(|e| e.contains("catch up")), "{events:?}");
        open.check(&oracle);
        open.close();
        let most: Vec<_> = (0..members - open_redundancy(level, members)).collect();
        let open = bed.open_some(&most);
        open.check(&oracle);
        open.close();
    }
}

/// A scrub mends what reads would not look at.
#[test]
fn a_scrub_mends_data_parity_and_tuples() {
    for (level, members) in [(Level::Raid1, 3), (Level::Raid5, 3), (Level::Raid6, 5)] {
        let bed = Bed::new(level, members, 65536);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(11);
        play(&open, &mut oracle, &mut random, 200);
        open.close();
        flip(&bed.members[1], &mut random, 200, 0);
        let open = bed.open();
        open.scrub();
        let health = open.array.health();
        let mended = health.blocks_mended.load(Ordering::Relaxed);
        assert!(mended > 20, "{mended} mended, {:?}", health.events());
        assert_eq!(health.blocks_lost.load(Ordering::Relaxed), 0);
        open.scrub();
        let again = health.blocks_mended.load(Ordering::Relaxed);
        assert_eq!(again, mended, "mended once: {:?}", health.events());
        open.close();
        // The others are not needed.
        let most: Vec<_> = (1..=members - open_redundancy(level, members)).collect();
        let open = bed.open_some(&most);
        open.check(&oracle);
        open.close();
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

/// A read looks at the tuples beside its block first; where these say that
/// there is nothing, the others are asked (PAGE-5).
#[test]
fn a_member_that_lost_its_tuples_hides_nothing() {
    for (level, members) in [(Level::Raid1, 2), (Level::Raid5, 3), (Level::Raid6, 5)] {
        let bed = Bed::new(level, members, 65536);
        let oracle = fill_all(&bed);
        for (member, damaged) in [vec![0; 4096], Random(6).bytes(4096)].iter().enumerate() {
            overwrite_tuples(&bed, member, damaged);
            let open = bed.open();
            assert_eq!(wrong_blocks(&open, &oracle), 0, "{level:?}");
            let mended = open.array.health().tuples_mended.load(Ordering::Relaxed);
            assert!(mended > 0, "{:?}", open.array.health().events());
            open.close();
            let open = bed.open();
            open.check(&oracle);
            assert_eq!(open.array.health().tuples_mended.load(Ordering::Relaxed), 0);
            open.close();
        }
    }
}

#[cfg(feature = "twins")]
#[test]
fn without_the_others_a_member_that_lost_its_tuples_hides_data() {
    use stableio_array::twin::{Protection, without};
    let bed = Bed::new(Level::Raid5, 3, 65536);
    let oracle = fill_all(&bed);
    overwrite_tuples(&bed, 0, &[0; 4096]);
    let open = bed.open();
    let taken = || async { without(Some(Protection::BlankCopies)) };
    bed.worker.handle().spawn(taken).wait_opt();
    assert!(wrong_blocks(&open, &oracle) > 100);
    open.close();
}

/// Data everywhere.
fn fill_all(bed: &Bed) -> Vec<u8> {
    let open = bed.open();
    let oracle = Random(5).bytes(open.size());
    for (i, part) in oracle.chunks(1 << 20).enumerate() {
        open.write((i as u64) << 20, part.to_vec()).unwrap();
    }
    open.close();
    oracle
}

fn overwrite_tuples(bed: &Bed, member: usize, page: &[u8]) {
    let geometry = probe(&bed.members[member]).unwrap().superblock.geometry;
    let file = File::options().write(true).open(&bed.members[member]).unwrap();
    for number in 0..geometry.pages() {
        file.write_all_at(page, geometry.page_at(number)).unwrap();
    }
}

/// Blocks that read as something else.
fn wrong_blocks(open: &Open, oracle: &[u8]) -> usize {
    let blocks = oracle.chunks(4096).enumerate();
    let wrong = |(i, block): &(usize, &[u8])| open.read_there(*i as u64 * 4096).unwrap() != *block;
    blocks.filter(wrong).count()
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
fn a_member_that_comes_back_is_stale() {
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

/// MEND-2: damage that agrees with itself is still damage.
#[test]
fn the_same_damage_on_data_and_parity_is_an_error_never_wrong_data() {
    for (level, members) in [(Level::Raid1, 2), (Level::Raid5, 3), (Level::Raid6, 5)] {
        let bed = Bed::new(level, members, 65536);
        let open = bed.open();
        let oracle: Vec<u8> = Random(3).bytes(1 << 20);
        open.write(0, oracle.clone()).unwrap();
        let data_at = open.array.superblock().geometry.data_at();
        open.close();
        let bad = if level == Level::Raid6 { 3 } else { 2 };
        for member in &bed.members[..bad] {
            let file = File::options().read(true).write(true).open(member).unwrap();
            for block in 0..200 {
                let (at, mut byte) = (data_at + block * 4096 + 99, [0]);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            }
        }
        let open = bed.open();
        let mut lost = 0;
        for (i, want) in oracle.chunks(4096).enumerate() {
            match open.read(i as u64 * 4096, 4096) {
                Ok(bytes) => assert!(bytes == want, "{level:?}: block {i} is something else"),
                Err(error) => lost += u64::from(error.kind == Kind::Lost),
            }
        }
        assert!(lost > 0);
        open.close();
    }
}
