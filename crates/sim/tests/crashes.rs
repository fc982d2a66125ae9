//! The process dies at any step; the array is opened again: LOG-1, PAGE-1,
//! RECOVER-1, RECOVER-2.

use std::collections::BTreeSet;

use stableio_sim::{Finding, Shape, World, Write, alone, thorough};

/// A write over blocks that hold data, or none, or both; or zeros.
fn write(world: &mut World) -> Write {
    let len = 512 * world.random.between(1, 64);
    let at = 512 * world.random.below(256);
    if world.random.one_in(4) {
        return Write::zeros(at, len);
    }
    let source = world.program.scattered(len, 1, &mut world.random);
    Write::racing(at, source)
}

/// Crashes `k` steps into two writes of different rows; gives the findings
/// after it is open again, and whether a write was under way.
fn crash(shape: &Shape, k: u64, seed: u64) -> (Vec<Finding>, bool) {
    let mut world = World::new(shape, seed);
    world.fill(0..96 << 10);
    world.flush();
    let first = write(&mut world);
    let mut first = world.submit(first);
    let far = world.random.bytes(8 << 10);
    let mut second = world.submit(Write::ours(512 << 10, far));
    world.run(k);
    let (first_done, second_done) = (world.has_settled(&mut first), world.has_settled(&mut second));
    let (first, second) = (first.detach(), second.detach());
    if second_done {
        second.apply(&mut world.model);
    }
    let mut findings = if first_done { world.absorb(&first) } else { Vec::new() };
    let mut world = match world.crash_and_open() {
        Ok(world) => world,
        Err(error) => return (vec![Finding::Other(error)], true),
    };
    for (write, done) in [(&first, first_done), (&second, second_done)] {
        if !done {
            findings.extend(world.absorb_crash(write, false).0);
        }
    }
    findings.extend(world.checker().all());
    findings.extend(world.read_all(&BTreeSet::new()));
    findings.extend(world.leftovers());
    (findings, !(first_done && second_done))
}

/// Seeds of writes, and by how much later each next crash is.
fn crashes() -> (std::ops::Range<u64>, usize) {
    thorough((0..8, 13), (0..4, 31))
}

/// RECOVER-1, RECOVER-2: at every step of many writes.
#[test]
fn after_a_crash_every_block_is_old_or_new_and_every_row_fits() {
    let small = Shape { chunk: 4 << 10, ..Shape::raid5(5) };
    let (seeds, stride) = crashes();
    for shape in [Shape::raid5(3), Shape::raid5(4), small, Shape::single()] {
        for seed in seeds.clone() {
            for k in (seed..).step_by(stride) {
                let (findings, under_way) = alone(|| crash(&shape, k, seed));
                assert_eq!(findings, [], "{shape:?} seed {seed}: crash after {k} steps");
                if !under_way {
                    break;
                }
            }
        }
    }
}

/// The twin: opened as if it had been shut down.
#[test]
fn twin_without_recovery_rows_do_not_fit() {
    let shape = Shape { forget_crash: true, ..Shape::raid5(3) };
    let scenes = (0..8).flat_map(|seed| (50..250).step_by(25).map(move |k| (k, seed)));
    let bad = scenes.filter(|(k, seed)| !alone(|| crash(&shape, *k, *seed)).0.is_empty());
    assert!(bad.count() > 8, "recovery had nothing to do, so the test above can not fail");
}

/// A degraded array that crashes: what was acknowledged before is there or,
/// in rows that were being written, lost; never something else.
fn degraded_crash(k: u64, seed: u64) -> Vec<Finding> {
    let mut world = World::new(&Shape::raid5(3), seed);
    world.fill(0..96 << 10);
    let gone = world.random.below(3) as usize;
    world.members[gone].as_ref().expect("all are there").break_down();
    world.flush();
    // Blocks of the missing member, written for the first time.
    let fresh = world.random.bytes(96 << 10);
    world.write(512 << 10, fresh);
    let far = world.random.bytes(24 << 10);
    let mut flight = world.submit(Write::ours(128 << 10, far));
    world.run(k);
    let done = world.has_settled(&mut flight);
    let write = flight.detach();
    if done {
        write.apply(&mut world.model);
    }
    let mut world = match world.crash_and_open() {
        Ok(world) => world,
        Err(error) => return vec![Finding::Other(error)],
    };
    // Every row of the write's stripes may have lost a block to the hole.
    let g = world.array.superblock().geometry;
    let per = g.row_shape().stripe_blocks();
    let stripes = write.blocks().start / per * per..write.blocks().end.next_multiple_of(per);
    let lost: BTreeSet<u64> = if done { BTreeSet::new() } else { stripes.collect() };
    let mut findings = world.absorb_crash(&write, !done).0;
    findings.extend(world.read_all(&lost));
    findings
}

/// RECOVER-1: nothing acknowledged turns into zeros.
#[test]
fn a_degraded_array_keeps_what_it_acknowledged() {
    for seed in 0..thorough(12, 4) {
        for k in (seed..300).step_by(thorough(11, 41)) {
            assert_eq!(alone(|| degraded_crash(k, seed)), [], "seed {seed}: crash after {k} steps");
        }
    }
}
