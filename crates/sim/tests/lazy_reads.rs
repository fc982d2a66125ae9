//! Reads straight into memory that the program changes meanwhile: READ-1,
//! READ-2, MEND-1. A buffer that was changed is nobody's fault below.

use std::sync::atomic::Ordering;

use stableio_mem::BLOCK;
use stableio_sim::{Shape, World};

fn counters(world: &World) -> (u64, u64) {
    let health = world.health();
    let charged = (0..world.members.len()).map(|m| world.charged(m)).sum();
    assert_eq!(health.lost_reads.load(Ordering::Relaxed), 0);
    (health.benign_mismatches.load(Ordering::Relaxed), charged)
}

/// READ-2: no error, nothing mended, no member charged; the image is as it
/// was.
#[test]
fn a_changed_buffer_charges_no_member() {
    for shape in [Shape::raid5(3), Shape::raid5(5), Shape::single()] {
        let mut world = World::new(&shape, 7);
        let end = world.size() / 4 / BLOCK as u64 * BLOCK as u64;
        world.fill(0..end);
        for _ in 0..20 {
            let len = BLOCK * world.random.between(1, 24);
            let at = world.random.below((end - len as u64) / BLOCK as u64) * BLOCK as u64;
            let target = world.program.scattered(len, 1, &mut world.random);
            world.read_racing(at, &target).expect("the data is sound");
        }
        let (benign, charged) = counters(&world);
        assert!(benign > 0, "the program was too slow: nothing was tested");
        assert_eq!(charged, 0, "{:?}", world.health().events());
        assert_eq!(world.health().blocks_mended.load(Ordering::Relaxed), 0);
        assert_eq!(world.checker().all(), []);
        assert_eq!(world.leftovers(), []);
    }
}

/// READ-1: memory that nobody changes holds just what was written.
#[test]
fn a_quiet_buffer_gets_what_was_written() {
    let mut world = World::new(&Shape::raid5(4), 8);
    let end = world.size() / 4 / BLOCK as u64 * BLOCK as u64;
    world.fill(0..end);
    let buffer = world.program.buffer(64 << 10);
    let target = buffer.source(&[(0, 64 << 10)]);
    world.read_racing(0, &target).expect("the data is sound");
    // Once more, with the program at rest.
    let stack = world.stack.clone();
    let ticket = stack.submit(stableio_block::Request::read(0, target.handle()));
    world.finish(ticket).expect("the data is sound");
    let mut want = vec![0; 64 << 10];
    world.model.read(0, &mut want);
    assert!(buffer.to_vec() == want);
}

/// The twin: real damage under the same racing reads is charged, and mended.
#[test]
fn twin_a_damaged_block_is_charged_and_mended() {
    let mut world = World::new(&Shape::raid5(3), 9);
    let geometry = world.array.superblock().geometry;
    world.fill(0..64 << 10);
    let member = geometry.data_member(0, 0);
    let damaged = world.members[member].as_ref().expect("all are there");
    damaged.flip(geometry.member_offset(0, 2) + 77, 3);
    let target = world.program.scattered(32 << 10, 1, &mut world.random);
    world.read_racing(0, &target).expect("the row brings it back");
    let (_, charged) = counters(&world);
    assert_eq!((charged, world.charged(member)), (1, 1));
    assert_eq!(world.health().blocks_mended.load(Ordering::Relaxed), 1);
    assert_eq!(world.checker().all(), []);
}
