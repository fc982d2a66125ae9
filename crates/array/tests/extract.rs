//! `tools/extract.py`, which knows the format from docs/format.md alone, takes
//! out of the members what the engine wrote.

mod support;

use std::path::{Path, PathBuf};

use stableio_array::Level;
use stableio_block::Op;
use support::{Bed, Open, Random, extract, flip, open_redundancy, play, python_missing};

const SHAPES: [(Level, usize, u64); 8] = [
    (Level::Single, 1, 65536),
    (Level::Raid1, 2, 65536),
    (Level::Raid1, 3, 4096),
    (Level::Raid5, 3, 65536),
    (Level::Raid5, 4, 4096),
    (Level::Raid5, 5, 16384),
    (Level::Raid6, 4, 65536),
    (Level::Raid6, 5, 8192),
];

/// Random operations over the first MiB and random places; little data.
fn fill(open: &Open, oracle: &mut [u8], random: &mut Random, steps: usize) {
    for _ in 0..steps {
        let most = [8, 40, 160][random.below(3) as usize];
        let len = 512 * (1 + random.below(most));
        let most = if random.below(2) == 0 { 1 << 20 } else { oracle.len() as u64 };
        let at = random.below(most - len) / 512 * 512;
        let bytes = &mut oracle[at as usize..(at + len) as usize];
        match random.below(8) {
            0 => {
                bytes.fill(0);
                open.op(Op::WriteZeroes { at, len, fua: false }).unwrap();
            }
            1 => drop(open.op(Op::Flush).unwrap()),
            _ => {
                bytes.copy_from_slice(&random.bytes(len as usize));
                open.write(at, bytes.to_vec()).unwrap();
            }
        }
    }
}

fn assert_same(image: &[u8], oracle: &[u8], what: &str) {
    assert_eq!(image.len(), oracle.len(), "{what}");
    if let Some(i) = (0..oracle.len()).find(|i| image[*i] != oracle[*i]) {
        panic!("{what}: byte {i} is {:#x}, not {:#x}", image[i], oracle[i]);
    }
}

/// The data of these members is what the oracle says.
fn assert_extracts(members: &[PathBuf], oracle: &[u8], what: &str) -> String {
    let (code, image, said) = extract(members, &[]);
    assert_eq!(code, 0, "{what}: {said}");
    assert_same(&image, oracle, &format!("{what}: {said}"));
    said
}

/// Every set of as many members as are needed at least.
fn fewest(bed: &Bed, level: Level) -> Vec<Vec<PathBuf>> {
    let n = bed.members.len();
    let keep = n - open_redundancy(level, n);
    (0..1u32 << n)
        .filter(|set| set.count_ones() as usize == keep)
        .map(|set| (0..n).filter(|i| set >> i & 1 == 1).map(|i| bed.members[i].clone()).collect())
        .collect()
}

#[test]
fn the_image_is_what_was_written() {
    if python_missing() {
        return;
    }
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate() {
        let what = format!("{level:?} of {members}, chunk {chunk}");
        let bed = Bed::of_size(level, members, chunk, 4 << 20);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(i as u64 + 1);
        fill(&open, &mut oracle, &mut random, 40);
        open.close();
        let said = assert_extracts(&bed.members, &oracle, &what);
        assert!(
            said.contains(" 0 mended, 0 lost (0 reconstructed") && said.contains(", 0 copies"),
            "{said}"
        );
        for left in fewest(&bed, level).iter().step_by(2) {
            assert_extracts(left, &oracle, &format!("{what}, only {left:?}"));
        }
        if open_redundancy(level, members) > 0 {
            flip(&bed.members[members - 1], &mut random, 400, 4096);
            let said = assert_extracts(&bed.members, &oracle, &format!("{what}, flipped"));
            assert!(!said.contains(", 0 copies"), "{said}");
        }
    }
}

/// The members as they lie there while the array serves: their tuples are
/// only in the log.
#[test]
fn the_log_is_replayed() {
    if python_missing() {
        return;
    }
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate() {
        let what = format!("{level:?} of {members}, chunk {chunk}, not shut down");
        let bed = Bed::of_size(level, members, chunk, 4 << 20);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(i as u64 + 100);
        fill(&open, &mut oracle, &mut random, 35);
        let copies = copy_all(&bed.members, &bed.dir.path().join("copy"));
        let said = assert_extracts(&copies, &oracle, &what);
        assert!(said.contains("was not shut down"), "{said}");
        let left = &copies[open_redundancy(level, members)..];
        assert_extracts(left, &oracle, &format!("{what}, only {left:?}"));
        open.close();
    }
}

/// Without a member from the start, and not shut down either; then the member
/// that was away is stale.
#[test]
fn degraded_arrays_and_stale_members() {
    if python_missing() {
        return;
    }
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate().skip(1) {
        let what = format!("{level:?} of {members}, chunk {chunk}, degraded");
        let bed = Bed::of_size(level, members, chunk, 4 << 20);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(i as u64 + 200);
        fill(&open, &mut oracle, &mut random, 20);
        open.close();
        let gone = i % members;
        let left: Vec<_> = (0..members).filter(|m| *m != gone).collect();
        let open = bed.open_some(&left);
        fill(&open, &mut oracle, &mut random, 20);
        let copies = copy_all(&bed.members, &bed.dir.path().join("copy"));
        let said = assert_extracts(&copies, &oracle, &what);
        assert!(said.contains("stale: left out"), "{said}");
        open.close();
        assert_extracts(&bed.members, &oracle, &what);
    }
}

/// After a power failure every block on every member is as before or after
/// what was written since the last flush, but the log is there: every block of
/// the array is one of its versions, as the engine finds it too. A member that
/// went in the same event may take blocks with it, never change them.
#[test]
fn a_power_failure_leaves_old_or_new() {
    if python_missing() {
        return;
    }
    for (i, (level, members, chunk)) in SHAPES.into_iter().enumerate() {
        let what = format!("{level:?} of {members}, chunk {chunk}, torn");
        let bed = Bed::of_size(level, members, chunk, 4 << 20);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(i as u64 + 300);
        fill(&open, &mut oracle, &mut random, 20);
        // A checkpoint, so that none comes in between.
        open.close();
        let open = bed.open();
        let before = read_all(&bed.members);
        let mut versions: Vec<Vec<Vec<u8>>> =
            oracle.chunks(4096).map(|block| vec![block.to_vec()]).collect();
        for _ in 0..8 {
            let first = random.below(64) as usize;
            let len = 1 + random.below(5) as usize;
            let bytes = random.bytes(len * 4096);
            for (block, content) in versions[first..].iter_mut().zip(bytes.chunks(4096)) {
                block.push(content.to_vec());
            }
            open.write(first as u64 * 4096, bytes).unwrap();
        }
        let mut torn = read_all(&bed.members);
        let data_at = open.array.superblock().geometry.data_at() as usize;
        open.close();
        for (new, old) in torn.iter_mut().zip(&before) {
            let end = new.len() - 4096;
            let blocks = new[data_at..end].chunks_mut(4096).zip(old[data_at..end].chunks(4096));
            blocks.filter(|_| random.below(2) == 0).for_each(|(new, old)| new.copy_from_slice(old));
        }
        for missing in [0, open_redundancy(level, members)] {
            let left = missing..members;
            bed.members
                .iter()
                .zip(&torn)
                .for_each(|(to, bytes)| std::fs::write(to, bytes).unwrap());
            let (code, image, said) = extract(&bed.members[left.clone()], &[]);
            assert!(code == 0 || code == 2 && missing > 0, "{what}: {said}");
            let open = bed.open_some(&left.collect::<Vec<_>>());
            for (block, (got, versions)) in image.chunks(4096).zip(&versions).enumerate() {
                let lost = said.contains(&format!("lost: block {block},"));
                assert!(lost || versions.iter().any(|v| v == got), "{what}: block {block}: {said}");
                let engine = open.read(block as u64 * 4096, 4096);
                assert_eq!(engine.is_err(), lost, "{what}: block {block}");
                assert!(lost || engine.unwrap() == got, "{what}: block {block}");
            }
            open.close();
        }
    }
}

/// A member that has lost all writes of a while, data and tuples: its tuples
/// are whole and fit its data, but others are newer.
#[test]
fn newer_tuples_count() {
    if python_missing() {
        return;
    }
    for (level, members) in [(Level::Raid1, 2), (Level::Raid5, 3), (Level::Raid6, 4)] {
        let bed = Bed::of_size(level, members, 8192, 4 << 20);
        let open = bed.open();
        let mut oracle = vec![0; open.size()];
        let mut random = Random(400);
        fill(&open, &mut oracle, &mut random, 20);
        let guards_at = open.array.superblock().geometry.guards_at() as usize;
        open.close();
        let old = read_all(&bed.members);
        let open = bed.open();
        fill(&open, &mut oracle, &mut random, 20);
        open.close();
        let mut lost = std::fs::read(&bed.members[0]).unwrap();
        let end = lost.len() - 4096;
        lost[guards_at..end].copy_from_slice(&old[0][guards_at..end]);
        std::fs::write(&bed.members[0], lost).unwrap();
        assert_extracts(&bed.members, &oracle, &format!("{level:?}"));
    }
}

/// Beyond the redundancy: said, never other data. Members that were written
/// apart are refused.
#[test]
fn what_cannot_be_had_is_said() {
    if python_missing() {
        return;
    }
    let bed = Bed::of_size(Level::Raid5, 3, 65536, 4 << 20);
    let open = bed.open();
    let mut oracle = vec![0; open.size()];
    let mut random = Random(7);
    play(&open, &mut oracle, &mut random, 20);
    open.close();
    let (code, _, said) = extract(&bed.members[..1], &[]);
    assert_eq!(code, 1, "{said}");
    for member in 0..2 {
        flip(&bed.members[member], &mut random, 1000, 4096);
    }
    let (code, image, said) = extract(&bed.members, &[]);
    assert_eq!(code, 2, "{said}");
    assert_eq!(image.len(), oracle.len());
    for (block, (got, want)) in image.chunks(4096).zip(oracle.chunks(4096)).enumerate() {
        let lost = said.contains(&format!("lost: block {block},"));
        assert!(
            if lost { got.iter().all(|b| *b == 0) } else { got == want },
            "block {block}: {said}"
        );
    }
    assert_eq!(extract(&bed.members, &["--ignore-lost"]).0, 0);

    let bed = Bed::of_size(Level::Raid1, 2, 65536, 4 << 20);
    for member in 0..2 {
        let open = bed.open_some(&[member]);
        open.write(0, vec![member as u8 + 1; 4096]).unwrap();
        open.close();
        if member == 0 {
            std::fs::rename(&bed.members[0], bed.dir.path().join("away")).unwrap();
        }
    }
    std::fs::rename(bed.dir.path().join("away"), &bed.members[0]).unwrap();
    let (code, _, said) = extract(&bed.members, &[]);
    assert_eq!(code, 1, "{said}");
    for member in 0..2 {
        let (code, image, said) = extract(&bed.members[member..=member], &[]);
        assert_eq!((code, image[0]), (0, member as u8 + 1), "{said}");
    }
}

fn read_all(members: &[PathBuf]) -> Vec<Vec<u8>> {
    members.iter().map(|member| std::fs::read(member).unwrap()).collect()
}

fn copy_all(members: &[PathBuf], into: &Path) -> Vec<PathBuf> {
    std::fs::create_dir_all(into).unwrap();
    let copy = |member: &PathBuf| {
        let to = into.join(member.file_name().unwrap());
        std::fs::copy(member, &to).unwrap();
        to
    };
    members.iter().map(copy).collect()
}
