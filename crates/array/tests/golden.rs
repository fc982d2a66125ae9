//! Arrays that were written when the format was frozen (`tests/golden/`) are
//! read, checked and mended by what is here now.

mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use stableio_array::Level;
use support::golden::{IMAGES, content, unpack};
use support::{Bed, Random, extract, flip, open_redundancy, python_missing};

fn unpacked(name: &str, into: &Path) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let packed = std::fs::read(folder.join(name).with_extension("img")).unwrap();
    assert!(packed.len() < 100 << 10, "{name}: {} bytes", packed.len());
    unpack(&packed, into)
}

fn oracle(size: usize) -> Vec<u8> {
    let blocks = (size / 4096) as u64;
    (0..blocks).flat_map(|block| content(block, blocks)).collect()
}

#[test]
fn golden_arrays_open_and_have_their_content() {
    for (name, level, members, shut_down, checksums) in IMAGES {
        for degraded in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut paths = unpacked(name, dir.path());
            if degraded {
                paths.drain(..open_redundancy(level, members));
            }
            let bed = Bed::around(dir, paths);
            let open = bed.open();
            assert_eq!(open.array.superblock().geometry.level, level);
            assert_eq!(open.array.superblock().checksums, checksums);
            open.check(&oracle(open.size()));
            let recovered = open.array.health().rows_recovered.load(Ordering::Relaxed);
            assert_eq!(recovered > 0, !shut_down, "{name}");
            open.close();
            let open = bed.open();
            open.check(&oracle(open.size()));
            open.close();
        }
    }
}

#[test]
fn golden_arrays_are_mended() {
    let redundant = |image: &(_, Level, _, _, bool)| image.1 != Level::Single && image.4;
    for (name, level, members, _, _) in IMAGES.into_iter().filter(redundant) {
        let dir = tempfile::tempdir().unwrap();
        let paths = unpacked(name, dir.path());
        let bed = Bed::around(dir, paths);
        let open = bed.open();
        let data_at = open.array.superblock().geometry.data_at();
        open.close();
        flip(&bed.members[0], &mut Random(3), 3000, data_at);
        let open = bed.open();
        open.scrub();
        let health = open.array.health();
        let mended = health.blocks_mended.load(Ordering::Relaxed);
        assert!(mended > 5, "{name}: {mended} mended, {:?}", health.events());
        assert_eq!(health.blocks_lost.load(Ordering::Relaxed), 0, "{name}");
        open.close();
        // Without as many others as may be missing: the mended one is needed.
        let most: Vec<_> = (0..members - open_redundancy(level, members)).collect();
        let open = bed.open_some(&most);
        open.check(&oracle(open.size()));
        open.close();
    }
}

#[test]
fn golden_arrays_are_extracted() {
    if python_missing() {
        return;
    }
    for (name, level, members, shut_down, _) in IMAGES {
        let dir = tempfile::tempdir().unwrap();
        let paths = unpacked(name, dir.path());
        for first in [0, open_redundancy(level, members)] {
            let (code, image, said) = extract(&paths[first..], &[]);
            assert_eq!(code, 0, "{name}: {said}");
            assert!(image == oracle(image.len()), "{name}: {said}");
            assert_eq!(said.contains("was not shut down"), !shut_down, "{said}");
        }
    }
}
