//! Silent corruption under a partial write: WRITE-1. Rot must not spread into
//! parity, where it would become somebody else's.

use stableio_array::geometry::Geometry;
use stableio_mem::BLOCK;
use stableio_sim::{Finding, Image, Shape, World, Write};

/// Blocks of the stripe that rots.
const STRIPE_BLOCKS: u64 = 16;

/// A world whose first stripe holds data; its shape makes a write of one block
/// go over the old parity, which reads less than the row's other blocks.
fn world(seed: u64) -> (World, Geometry) {
    let mut world = World::new(&Shape::raid5(5), seed);
    world.fill(0..STRIPE_BLOCKS * BLOCK as u64);
    let geometry = world.array.superblock().geometry;
    (world, geometry)
}

fn flip(world: &mut World, member: usize, at: u64) {
    let (byte, bit) = (world.random.below(BLOCK as u64), world.random.below(8) as u8);
    world.members[member].as_ref().expect("all are there").flip(at + byte, bit);
}

/// WRITE-1: whichever block of the row rotted, the parity is right afterwards
/// and everybody's data is there without any one member.
#[test]
fn a_partial_write_over_rot_leaves_a_row_that_fits() {
    for rotten in 0..5 {
        for lost in 0..5 {
            let (mut world, geometry) = world(20 + lost);
            flip(&mut world, rotten, geometry.member_offset(0, 1));
            // Row 1 of column 0.
            let flight = world.submit(Write::ours(BLOCK as u64, vec![7; BLOCK]));
            let (write, outcome) = world.settle(flight);
            outcome.expect("the row brings back what rotted");
            world.model.apply(&write);
            // A rotten neighbour that the write did not need is mended when
            // it is read.
            assert_eq!(world.read_all(&[].into()), [], "member {rotten} rotted");
            assert_eq!(world.checker().row(0, 1), [], "member {rotten} rotted");
            world.members[lost as usize].as_ref().expect("all are there").break_down();
            world.flush();
            assert_eq!(world.read_all(&[].into()), [], "{rotten} rotted, {lost} was lost");
        }
    }
}

/// The twin: new parity from old parity that nobody verified.
#[test]
fn twin_unverified_parity_carries_rot_on() {
    let (mut world, geometry) = world(30);
    let (parity, data) = (geometry.parity_member(0).expect("raid5"), geometry.data_member(0, 0));
    let at = geometry.member_offset(0, 1);
    flip(&mut world, parity, at);
    let mut images: Vec<Image> = world.members.iter().flatten().map(|m| m.live()).collect();
    // The engine writes data and tuples; the parity is the naive one's.
    let block = [7; BLOCK];
    let mut sum = *images[parity].block(at / BLOCK as u64);
    stableio_onepass::xor_into(&mut sum, images[data].block(at / BLOCK as u64));
    stableio_onepass::xor_into(&mut sum, &block);
    world.write(BLOCK as u64, block.to_vec());
    // Its tuples are on their pages then.
    drop(world.checker());
    images = world.members.iter().flatten().map(|m| m.live()).collect();
    images[parity].write(at, &sum);
    let images = images.into_iter().map(Some).collect();
    let found = stableio_sim::Checker::new(world.array.superblock(), images).row(0, 1);
    assert_eq!(found, [Finding::Parity { stripe: 0, row: 1 }]);
}
