//! First of all tests: a program changes its memory while members, late,
//! take the payload. MEM-1, DOOR-1, DOOR-2, WRITE-1 keep CHECK-1 to CHECK-5.

use stableio_mem::BLOCK;
use stableio_sim::program::LARGEST;
use stableio_sim::{Finding, Protection, Shape, World, Write};

/// Writes from racing memory, one at a time; gives what the checker finds
/// after each and at the end.
fn race(shape: &Shape, seed: u64, writes: usize) -> Vec<Finding> {
    let mut world = World::new(shape, seed);
    let half = world.size() / 2 / BLOCK as u64 * BLOCK as u64;
    world.fill(0..half);
    let mut findings = Vec::new();
    for _ in 0..writes {
        let len = match world.random.below(3) {
            0 => 512 * world.random.between(1, 24),
            1 => BLOCK * world.random.between(1, 8),
            _ => 512 * world.random.between(1, 512),
        };
        let at = world.random.below((world.size() - len as u64) / 512) * 512;
        let source = world.program.scattered(len, 1, &mut world.random);
        let flight = world.submit(Write::racing(at, source));
        let (write, outcome) = world.settle(flight);
        outcome.expect("the array is sound");
        findings.extend(world.absorb(&write));
    }
    findings.extend(world.checker().all());
    findings.extend(world.read_all(&[].into()));
    findings.extend(world.leftovers());
    findings
}

/// Shapes to race on.
fn shapes() -> Vec<Shape> {
    let raid5 = [3, 4, 5].map(Shape::raid5);
    let small = Shape { chunk: 4 << 10, pool: 4 << 20, ..Shape::raid5(4) };
    raid5.into_iter().chain([small, Shape::single()]).collect()
}

/// CHECK-1 to CHECK-5 after every settle.
#[test]
fn what_is_stored_fits_and_was_written_by_the_program() {
    for (i, shape) in shapes().iter().enumerate() {
        for seed in 0..3 {
            let findings = race(shape, 100 * i as u64 + seed, 25);
            assert_eq!(findings, [], "{shape:?} seed {seed}");
        }
    }
}

/// CHECK-4 where the stack cuts a write that is too long for one request, in
/// the middle of a word, and at first has memory for one piece only.
#[test]
fn a_write_that_is_cut_stores_whole_words() {
    let shape = Shape { member_size: 8 << 20, pool: 4 << 20, ..Shape::raid5(3) };
    for seed in 0..4 {
        let mut world = World::new(&shape, seed);
        let held = world.pool.try_reserve(2 << 20).expect("smaller than the pool");
        let source = world.program.buffer(LARGEST).source(&[(3, LARGEST - 512)]);
        let flight = world.submit(Write::racing(seed * 512, source));
        world.run(500);
        drop(held);
        let (write, outcome) = world.settle(flight);
        outcome.expect("the array is sound");
        assert_eq!(world.absorb(&write), [], "seed {seed}");
        assert_eq!(world.leftovers(), [], "seed {seed}");
    }
}

/// The twin of the first test: the stack believes that the memory is stable,
/// so members sample it once more than the pass did.
#[test]
fn twin_memory_declared_stable_by_a_lie_breaks_guards_and_parity() {
    for (i, honest) in shapes().into_iter().enumerate() {
        let shape = Shape { without: Some(Protection::Stabilize), ..honest };
        let findings = race_blocks(&shape, 100 * i as u64);
        assert!(findings.iter().any(|f| matches!(f, Finding::Guard { .. })), "{shape:?}");
        let parity = findings.iter().any(|f| matches!(f, Finding::Parity { .. }));
        assert_eq!(parity, shape.members > 1, "{shape:?}");
    }
}

/// A few writes of whole blocks, and what the checker says of their rows.
fn race_blocks(shape: &Shape, seed: u64) -> Vec<Finding> {
    let mut world = World::new(shape, seed);
    let mut findings = Vec::new();
    for _ in 0..8 {
        let len = BLOCK * world.random.between(4, 32);
        let at = world.random.below((world.size() - len as u64) / BLOCK as u64) * BLOCK as u64;
        let source = world.program.scattered(len, 1, &mut world.random);
        let flight = world.submit(Write::racing(at, source));
        let (write, _) = world.settle(flight);
        findings.extend(world.checker().rows_of(write.blocks()));
    }
    findings
}

/// Blast radius: the row's other blocks belong to others. A write of one
/// column races; then the member of *another* column is lost, and its blocks
/// are what the parity says.
fn neighbours_after_the_loss_of_another_member(lie: bool, seed: u64) -> Vec<Finding> {
    let shape = Shape { without: lie.then_some(Protection::Stabilize), ..Shape::raid5(3) };
    let mut world = World::new(&shape, seed);
    let chunk = shape.chunk as usize;
    world.fill(0..2 * chunk as u64);
    // Column 0 of stripe 0 races; column 1 is somebody else's.
    let source = world.program.scattered(chunk, 1, &mut world.random);
    let flight = world.submit(Write::racing(0, source));
    let (_, outcome) = world.settle(flight);
    outcome.expect("the array is sound");
    let other = world.array.superblock().geometry.data_member(0, 1);
    world.members[other].as_ref().expect("all are there").break_down();
    world.flush();
    let mut findings = Vec::new();
    for block in (chunk..2 * chunk).step_by(BLOCK).map(|at| (at / BLOCK) as u64) {
        let why = match world.read(block * BLOCK as u64, BLOCK) {
            Ok(found) if found == world.model.block(block)[..] => continue,
            Ok(_) => "reads as something else".to_owned(),
            Err(error) => error.kind.to_string(),
        };
        findings.push(Finding::Content { block, why });
    }
    findings
}

/// CHECK-5 through a reconstruction.
#[test]
fn neighbours_survive_the_loss_of_their_member() {
    for seed in 0..10 {
        assert_eq!(neighbours_after_the_loss_of_another_member(false, seed), [], "seed {seed}");
    }
}

/// The twin: with the lie a neighbour that nobody wrote to is gone.
#[test]
fn twin_a_lie_costs_neighbours_their_data() {
    let hurt =
        (0..10).filter(|seed| !neighbours_after_the_loss_of_another_member(true, *seed).is_empty());
    assert!(hurt.count() >= 5, "no harm was done, so the test above can not fail");
}
