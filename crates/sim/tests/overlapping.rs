//! Overlapping writes have no order, but never mix inside a block, and break
//! neither redundancy nor guards: DEV-4, TOKEN-1, WRITE-2.

use stableio_mem::BLOCK;
use stableio_sim::{Shape, World, Write};

/// Writes that are under way at once.
const AT_ONCE: usize = 3;

/// All orders of three.
const ORDERS: [[usize; AT_ONCE]; 6] =
    [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Whether a block is what some order of the writes leaves.
fn is_some_order(world: &World, writes: &[Write], block: u64, found: &[u8; BLOCK]) -> bool {
    ORDERS.iter().any(|order| {
        let mut bytes = *world.model.block(block);
        order.iter().for_each(|i| writes[*i].apply_to(block, &mut bytes));
        bytes == *found
    })
}

/// DEV-4.
#[test]
fn overlapping_writes_never_mix_inside_a_block() {
    for (i, shape) in [Shape::raid5(3), Shape::raid5(5), Shape::single()].iter().enumerate() {
        let mut world = World::new(shape, 40 + i as u64);
        world.fill(0..256 << 10);
        let mut contended = 0;
        for round in 0..150 {
            let flights: Vec<_> = (0..AT_ONCE)
                .map(|_| {
                    let len = 512 * world.random.between(1, 64);
                    let at = 512 * world.random.below(256);
                    let bytes = world.random.bytes(len);
                    world.submit(Write::ours(at, bytes))
                })
                .collect();
            let settled = flights.into_iter().map(|flight| world.settle(flight));
            let writes: Vec<_> = settled
                .map(|(write, outcome)| outcome.map(|_| write).expect("the array is sound"))
                .collect();
            let checker = world.checker();
            for block in 0..(256 << 10) / BLOCK as u64 {
                let found = checker.content(block).expect("all are there");
                assert!(
                    is_some_order(&world, &writes, block, &found),
                    "round {round} block {block}"
                );
                contended +=
                    usize::from(writes.iter().filter(|w| w.blocks().contains(&block)).count() > 1);
                world.model.set_block(block, &found);
            }
            assert_eq!(checker.rows_of(0..64), [], "{shape:?} round {round}");
        }
        assert!(contended > 100, "{contended} blocks were written by several");
        assert_eq!(world.leftovers(), []);
    }
}
