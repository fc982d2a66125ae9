//! Worlds of everything at once, by seed.

use stableio_sim::play::{STEPS, play};
use stableio_sim::{Shape, World, Write, thorough};

/// Whatever goes wrong within the redundancy, everything fits.
#[test]
fn worlds_of_all_seeds_fit() {
    for seed in 1..=thorough(200, 50) {
        assert_eq!(play(seed, STEPS), [], "replay with: sim {seed}");
    }
}

/// SIM-1.
#[test]
fn a_seed_replays() {
    let images = || {
        let mut world = World::new(&Shape::raid5(4), 11);
        world.fill(0..64 << 10);
        let source = world.program.scattered(30 << 10, 1, &mut world.random);
        let flight = world.submit(Write::racing(512, source));
        world.run(200);
        drop(flight.detach());
        let steps = world.steps;
        (world.crash().0, steps)
    };
    let (first, second) = (images(), images());
    assert!(first == second, "two runs of one seed differ");
}
