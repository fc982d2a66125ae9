//! The process dies, or power is lost, at any step; the array is opened again: LOG-1, PAGE-1,
//! RECOVER-1, RECOVER-2.

use std::collections::BTreeSet;

use stableio_sim::{
    Crash, Finding, Pending, Protection, Shape, Stop, World, Write, alone, thorough,
};

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
fn crash(shape: &Shape, stop: Stop, k: u64, seed: u64) -> (Vec<Finding>, bool) {
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
        world.model.apply(&second);
    }
    let mut findings = if first_done { world.absorb(&first) } else { Vec::new() };
    let mut world = match World::open(shape, world.stop(stop), None) {
        Ok(world) => world,
        Err(error) => return (vec![Finding::Other(error)], true),
    };
    let pending = [(first, first_done), (second, second_done)].into_iter();
    let pending = pending.filter(|(_, done)| !done);
    let pending = pending.map(|(write, _)| Pending { write, settled: false }).collect();
    findings.extend(
        world.absorb_crash(&Crash { power: stop == Stop::Power, pending, ..Crash::default() }).0,
    );
    findings.extend(world.checker().all());
    findings.extend(world.read_all(&BTreeSet::new()));
    findings.extend(world.leftovers());
    (findings, !(first_done && second_done))
}

/// Seeds of writes, and by how much later each next crash is.
fn crashes() -> (std::ops::Range<u64>, usize) {
    thorough((0..5, 17), (0..2, 41))
}

/// RECOVER-1, RECOVER-2: at every step of many writes.
#[test]
fn after_a_crash_every_block_is_old_or_new_and_every_row_fits() {
    survives(Stop::Death, |shape| shape);
}

/// The same where power is lost over members with a cache that tear blocks.
#[test]
fn after_a_loss_of_power_every_block_is_old_or_new_and_every_row_fits() {
    survives(Stop::Power, |shape| shape);
}

/// The same over members that write a block wholly or not at all, where rows
/// that are written whole are not in the log.
#[test]
fn after_a_loss_of_power_over_whole_blocks_every_row_fits() {
    survives(Stop::Power, |shape| Shape { atomic: 4096, ..shape });
}

fn survives(stop: Stop, members: impl Fn(Shape) -> Shape) {
    let small = Shape { chunk: 4 << 10, ..Shape::raid5(5) };
    let (seeds, stride) = crashes();
    let shapes = [
        Shape::raid5(3),
        Shape::raid5(4),
        small,
        Shape::single(),
        Shape::raid1(2),
        Shape::raid6(4),
    ];
    for shape in shapes.map(members) {
        for seed in seeds.clone() {
            for k in (seed..).step_by(stride) {
                let (findings, under_way) = alone(|| crash(&shape, stop, k, seed));
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
    let shape = Shape { without: Some(Protection::Recovery), ..Shape::raid5(3) };
    let scenes = (0..8).flat_map(|seed| (50..250).step_by(25).map(move |k| (k, seed)));
    let bad =
        scenes.filter(|(k, seed)| !alone(|| crash(&shape, Stop::Death, *k, *seed)).0.is_empty());
    assert!(bad.count() > 8, "recovery had nothing to do, so the test above can not fail");
}

/// An array without `missing` members crashes: what was acknowledged, or
/// flushed, is there; what was being written is old or new.
fn degraded_crash(shape: &Shape, missing: usize, stop: Stop, k: u64, seed: u64) -> Vec<Finding> {
    let mut world = World::new(shape, seed);
    world.fill(0..96 << 10);
    let first = world.random.below(shape.members as u64) as usize;
    for gone in (0..missing).map(|i| (first + i) % shape.members) {
        world.members[gone].as_ref().expect("all are there").break_down();
    }
    world.flush();
    // Blocks of the missing members, written for the first time.
    let fresh = world.random.bytes(96 << 10);
    world.write(512 << 10, fresh);
    let write = write(&mut world);
    let mut flight = world.submit(write);
    world.run(k);
    let done = world.has_settled(&mut flight);
    let write = flight.detach();
    let mut findings = if done { world.learn(&write, false) } else { Vec::new() };
    let remains = world.stop(stop);
    let mut world = match World::open(shape, remains, None) {
        Ok(world) => world,
        Err(error) => return vec![Finding::Other(error)],
    };
    let pending = if done { vec![] } else { vec![Pending { write, settled: false }] };
    let crash = Crash { power: stop == Stop::Power, pending, ..Crash::default() };
    findings.extend(world.absorb_crash(&crash).0);
    findings.extend(world.read_all(&BTreeSet::new()));
    // The members were only thought to be gone: they catch up.
    world.quiet();
    findings.extend(world.read_all(&BTreeSet::new()));
    findings.extend(world.checker().all());
    findings
}

/// RECOVER-1: nothing is lost, however many members were missing before.
#[test]
fn a_degraded_array_keeps_what_it_acknowledged() {
    let shapes = [
        (Shape::raid1(2), 1),
        (Shape::raid1(3), 2),
        (Shape::raid5(3), 1),
        (Shape { atomic: 4096, ..Shape::raid5(4) }, 1),
        (Shape::raid6(4), 2),
        (Shape { atomic: 4096, ..Shape::raid6(5) }, 2),
    ];
    for (shape, missing) in &shapes {
        for seed in 0..thorough(6, 2) {
            for k in (seed..400).step_by(thorough(23, 61)) {
                for stop in [Stop::Death, Stop::Power] {
                    let findings = alone(|| degraded_crash(shape, *missing, stop, k, seed));
                    assert_eq!(findings, [], "{shape:?} seed {seed}: {stop:?} after {k} steps");
                }
            }
        }
    }
}
