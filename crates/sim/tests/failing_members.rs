//! Members that fail in the middle of a write, at every step: ENG-1, ENG-2.

use std::path::Path;
use std::sync::atomic::Ordering;

use stableio_array::RoleState;
use stableio_mem::BLOCK;
use stableio_sim::check::probe;
use stableio_sim::{Crash, Finding, Pending, Shape, World, Write, alone, thorough};

fn world(shape: &Shape, seed: u64) -> World {
    let mut world = World::new(shape, seed);
    world.fill(0..192 << 10);
    world
}

/// A write of a few rows that begins and ends inside blocks.
fn write(world: &mut World) -> Write {
    let source = world.program.scattered(20 << 10, 1, &mut world.random);
    Write::racing(3 * BLOCK as u64 + 512, source)
}

fn in_sync(world: &World, role: usize) -> bool {
    world.health().members[role].in_sync.load(Ordering::Relaxed)
}

/// ENG-1, at the moment in which a write succeeded: the durable superblocks of
/// all others call the dropped member missing.
fn assert_recorded(world: &World, gone: usize) {
    let size = world.array.superblock().geometry.member_size;
    for (role, member) in world.members.iter().flatten().enumerate() {
        if in_sync(world, role) {
            let superblock = probe(&member.durable(), Path::new(member.name()), size)
                .expect("one is good")
                .superblock;
            assert_eq!(superblock.roles[gone].state, RoleState::Missing, "ENG-1: says role {role}");
        }
    }
}

/// One member fails after `k` steps of a write. Gives whether the write was
/// still under way.
fn one_fails(shape: &Shape, gone: usize, k: u64, seed: u64) -> bool {
    let mut world = world(shape, seed);
    let write = write(&mut world);
    let mut flight = world.submit(write);
    world.run(k);
    let under_way = !world.has_settled(&mut flight);
    world.members[gone].as_ref().expect("all are there").break_down();
    let (write, outcome) = world.settle(flight);
    outcome.expect("the redundancy absorbs one member");
    if !in_sync(&world, gone) {
        assert_recorded(&world, gone);
    }
    // Whoever has not noticed yet does now.
    world.flush();
    assert_recorded(&world, gone);
    assert_eq!(world.checker().rows_of(write.blocks()), [], "{shape:?} {gone} after {k}");
    let findings = world.learn(&write, false);
    assert_eq!(findings, [], "{shape:?} {gone} after {k}");
    assert_eq!(world.read_all(&[].into()), [], "{shape:?} {gone} after {k}");
    assert_eq!(world.leftovers(), []);
    under_way
}

/// ENG-1 and READ-1, with every member failing at every step.
#[test]
fn one_failing_member_is_absorbed_and_recorded() {
    for shape in [Shape::raid5(3), Shape::raid5(4)] {
        for gone in 0..shape.members {
            let last =
                (0..).step_by(thorough(3, 11)).find(|k| !alone(|| one_fails(&shape, gone, *k, 5)));
            assert!(last > Some(30), "the write was too short: {last:?}");
        }
    }
}

/// Two members fail, `k` and `k + later` steps into a write. Gives whether the
/// write was still under way.
fn two_fail(k: u64, later: u64, seed: u64) -> bool {
    let shape = Shape::raid5(4);
    let mut world = world(&shape, seed);
    let (first, second) = (world.random.below(4) as usize, world.random.below(3) as usize);
    let second = (first + 1 + second) % 4;
    let write = write(&mut world);
    let mut flight = world.submit(write);
    world.run(k);
    world.members[first].as_ref().expect("all are there").break_down();
    world.run(later);
    let under_way = !world.has_settled(&mut flight);
    world.members[second].as_ref().expect("all are there").break_down();
    let (write, outcome) = world.settle(flight);
    let size = world.array.superblock().geometry.member_size;
    // Never wrong data: each block old, new, or an error.
    let pending = vec![Pending { write, settled: false }];
    let crash = Crash { member_lost: true, pending, ..Crash::default() };
    let (mut findings, _) = world.absorb_crash(&crash);
    findings.retain(|finding| !finding.to_string().contains("members are missing"));
    assert_eq!(findings, [], "first {first} after {k}, second {second} after {later} more");
    let wrong = world.read_all(&[].into()).into_iter();
    let wrong = wrong.filter(|f| f.to_string().contains("something else"));
    assert_eq!(wrong.collect::<Vec<Finding>>(), [], "after {k}+{later}, outcome {outcome:?}");
    // ENG-2, on whatever may be left of the members.
    for (role, member) in world.members.iter().flatten().enumerate() {
        for image in [member.live(), member.durable()] {
            let missing = probe(&image, Path::new(member.name()), size)
                .expect("one is good")
                .superblock
                .missing();
            assert!(missing <= 1, "ENG-2: role {role} records {missing} missing after {k}+{later}");
        }
    }
    assert_eq!(world.leftovers(), []);
    under_way
}

/// ENG-2.
#[test]
fn two_failing_members_are_an_error_never_wrong_data() {
    for later in [0, 7, 40, 150] {
        for seed in 0..2 {
            (0..).step_by(thorough(7, 25)).find(|k| !alone(|| two_fail(*k, later, seed)));
        }
    }
}
