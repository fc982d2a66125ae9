//! Golden images: what a small array looked like when the format was frozen
//! (`tests/golden/README.md`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stableio_array::Level;
use stableio_block::Op;

use super::{Bed, Open};

/// What an image is a list of.
const PIECE: usize = 16;
const BLOCK: usize = 4096;
/// The log has at least 1 MiB.
const MEMBER_SIZE: u64 = 1_572_864;
/// Blocks from here on were never written, but for the array's last one.
const USED: u64 = 48;

/// Name, level, members, and whether it was shut down and has checksums.
pub(crate) const IMAGES: [(&str, Level, usize, bool, bool); 6] = [
    ("single", Level::Single, 1, true, true),
    ("raid1", Level::Raid1, 2, true, true),
    ("raid5", Level::Raid5, 3, true, true),
    ("raid6", Level::Raid6, 4, true, true),
    ("raid5-crashed", Level::Raid5, 3, false, true),
    ("raid5-plain", Level::Raid5, 3, false, false),
];
const CHUNK: u64 = 8192;

/// Bytes that only this block has, at this round of writing: mostly zeros, so
/// that images are small.
fn pattern(block: u64, round: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    let at = block as usize / 8 % 8 * 512;
    for (i, byte) in bytes[at..at + 64].iter_mut().enumerate() {
        *byte = (block * 7 + round * 101 + i as u64 * (block % 5 + 1)) as u8 | 1;
    }
    // Every byte of a block counts: so its last one is not zero.
    bytes[BLOCK - 1] = block as u8 | 1;
    bytes
}

/// What a block of any of the images holds.
pub(crate) fn content(block: u64, blocks: u64) -> Vec<u8> {
    match block {
        _ if block == blocks - 1 => pattern(block, 0),
        USED.. => vec![0; BLOCK],
        _ if block % 7 == 3 || block % 11 == 5 => vec![0; BLOCK],
        _ if block % 3 == 1 => pattern(block, 1),
        _ => pattern(block, 0),
    }
}

/// Writes [`content`] in a way that leaves traces of all kinds: whole rows
/// and parts, blocks written twice, discarded, and never written.
fn fill(open: &Open, before_the_last: impl FnOnce()) {
    let blocks = (open.size() / BLOCK) as u64;
    let at = |block: u64| block * BLOCK as u64;
    for first in (0..USED).step_by(6).filter(|first| first % 12 == 0) {
        let bytes: Vec<u8> = (first..first + 6).flat_map(|block| pattern(block, 0)).collect();
        open.write(at(first), bytes).unwrap();
    }
    for block in (0..USED).filter(|block| block % 12 >= 6 && block % 7 != 3) {
        open.write(at(block), pattern(block, 0)).unwrap();
    }
    open.write(at(blocks - 1), pattern(blocks - 1, 0)).unwrap();
    open.op(Op::Flush).unwrap();
    for block in (0..USED).filter(|block| block % 7 == 3 || block % 11 == 5) {
        let len = BLOCK as u64;
        open.op(Op::WriteZeroes { at: at(block), len, fua: false }).unwrap();
    }
    before_the_last();
    let again = |block: &u64| block % 3 == 1 && block % 7 != 3 && block % 11 != 5;
    for block in (0..USED).filter(again) {
        open.write(at(block), pattern(block, 1)).unwrap();
    }
}

/// Makes all images, in this folder. The one that was not shut down is as
/// after a power failure: the last writes have reached only some members.
pub(crate) fn generate(into: &Path) {
    for (name, level, members, shut_down, checksums) in IMAGES {
        let bed = Bed::made(level, members, CHUNK, MEMBER_SIZE, checksums);
        let open = bed.open();
        let mut before = Vec::new();
        let mut after = Vec::new();
        let read_all = || bed.members.iter().map(|m| std::fs::read(m).unwrap()).collect();
        fill(&open, || {
            // The log has all that comes from here on.
            open.array.device().checkpoint().wait().unwrap();
            before = read_all();
        });
        if !shut_down {
            after = read_all();
            let data_at = open.array.superblock().geometry.data_at() as usize;
            let old = &before[0];
            let end = old.len() - BLOCK;
            after[0][data_at..end].copy_from_slice(&old[data_at..end]);
        }
        open.close();
        let images: Vec<Vec<u8>> = if shut_down { read_all() } else { after };
        std::fs::write(into.join(name).with_extension("img"), pack(&images)).unwrap();
    }
}

/// Members as a list of their pieces that are not all zeros, neighbours
/// together.
fn pack(members: &[Vec<u8>]) -> Vec<u8> {
    let mut packed = (members.len() as u32).to_le_bytes().to_vec();
    for member in members {
        let used = |(_, piece): &(usize, &[u8])| piece.iter().any(|byte| *byte != 0);
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (i, _) in member.chunks(PIECE).enumerate().filter(used) {
            match runs.last_mut().filter(|run| run.end == i * PIECE) {
                Some(run) => run.end += PIECE,
                None => runs.push(i * PIECE..(i + 1) * PIECE),
            }
        }
        packed.extend((member.len() as u32).to_le_bytes());
        packed.extend((runs.len() as u32).to_le_bytes());
        for run in runs {
            packed.extend((run.start as u32).to_le_bytes());
            packed.extend((run.len() as u32).to_le_bytes());
            packed.extend(&member[run]);
        }
    }
    packed
}

/// Makes the members of an image again.
pub(crate) fn unpack(packed: &[u8], into: &Path) -> Vec<PathBuf> {
    let mut rest = packed;
    let mut paths = Vec::new();
    for member in 0..number(&mut rest) {
        let path = into.join(format!("m{member}"));
        let file = File::create(&path).unwrap();
        file.set_len(u64::from(number(&mut rest))).unwrap();
        for _ in 0..number(&mut rest) {
            let (at, len) = (number(&mut rest), number(&mut rest));
            file.write_all_at(take(&mut rest, len as usize), u64::from(at)).unwrap();
        }
        paths.push(path);
    }
    assert!(rest.is_empty());
    paths
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> &'a [u8] {
    rest.split_off(..len).expect("the image is whole")
}

fn number(rest: &mut &[u8]) -> u32 {
    u32::from_le_bytes(take(rest, 4).try_into().unwrap())
}
