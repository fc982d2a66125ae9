//! A ticket is only a receiver: dropped at any step it detaches and never
//! aborts (DEV-1, EXEC-2), so no row is left half-written.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use stableio_block::{Body, Device, Request};
use stableio_mem::{BLOCK, StableBuf};
use stableio_sim::{Shape, SimMember, World, Write};

/// A partial-row write from racing memory, somewhere.
fn some_write(world: &mut World) -> Write {
    let len = 512 * world.random.between(1, 48);
    let at = world.random.below((world.size() / 2 - len as u64) / 512) * 512;
    let source = world.program.scattered(len, 1, &mut world.random);
    Write::racing(at, source)
}

fn world(seed: u64) -> World {
    let mut world = World::new(&Shape::raid5(4), seed);
    let half = world.size() / 2 / BLOCK as u64 * BLOCK as u64;
    world.fill(0..half);
    world
}

/// DEV-1: whenever the ticket goes, the whole write is there afterwards, its
/// rows fit, its memory is given back, and its rows can be written again.
#[test]
fn a_write_whose_ticket_is_dropped_is_written_wholly() {
    let mut world = world(1);
    for k in 0..500 {
        let write = some_write(&mut world);
        let flight = world.submit(write);
        for _ in 0..k {
            world.step();
        }
        let write = flight.detach();
        world.quiet();
        world.rest(&write);
        assert_eq!(world.absorb(&write), [], "dropped after {k} steps");
        assert_eq!(world.pool.used(), 0, "POOL-1, dropped after {k} steps");
        let again = Write::ours(write.at, world.random.bytes(write.len()));
        let flight = world.submit(again);
        let (again, outcome) = world.settle(flight);
        outcome.expect("the rows' tokens are free");
        assert_eq!(world.absorb(&again), []);
    }
    assert_eq!(world.checker().all(), []);
}

/// EXEC-2: nobody has to look at a ticket for its request to end.
#[test]
fn a_write_whose_ticket_is_never_polled_is_written_wholly() {
    let mut world = world(2);
    for _ in 0..50 {
        let write = some_write(&mut world);
        let flight = world.submit(write);
        let (write, ticket) = flight.into_parts();
        world.quiet();
        world.rest(&write);
        assert_eq!(world.absorb(&write), []);
        assert_eq!(world.pool.used(), 0);
        drop(ticket);
    }
}

/// What a write changes: member, byte offset, new block.
type Changes = Vec<(usize, u64, Vec<u8>)>;

/// The naive engine of the twin: the same blocks, one after the other, in a
/// future that belongs to the caller.
async fn write_one_after_the_other(members: Vec<Arc<SimMember>>, changes: Changes) {
    for (member, at, block) in changes {
        let body = Body::Stable(StableBuf::from_owned(block));
        members[member].submit(Request::write(at, body, false)).await.expect("a sound member");
    }
}

/// The twin: dropping aborts. Where it is dropped before its end and after
/// its beginning, a row does not fit.
#[test]
fn twin_a_write_that_is_aborted_leaves_a_row_half_written() {
    let changes = changes_of_a_write(3);
    let mut torn = 0;
    for k in (0..).step_by(5) {
        // SIM-1: the world as it was before the write.
        let mut world = world(3);
        let members: Vec<_> = world.members.iter().flatten().cloned().collect();
        let mut done = false;
        {
            let mut future = pin!(write_one_after_the_other(members, changes.clone()));
            let mut cx = Context::from_waker(Waker::noop());
            for _ in 0..k {
                done = done || future.as_mut().poll(&mut cx).is_ready();
                world.step();
            }
        }
        world.quiet();
        let findings = world.checker().all();
        if done {
            assert_eq!(findings, [], "the naive write is right if it is let be");
            break;
        }
        torn += usize::from(!findings.is_empty());
    }
    assert!(torn > 5, "aborted {torn} times in the middle");
}

/// The blocks, but for the log, in which a world differs after a write.
fn changes_of_a_write(seed: u64) -> Changes {
    let mut world = world(seed);
    // Tuples are on their pages whenever somebody checks.
    drop(world.checker());
    let before: Vec<_> = world.members.iter().flatten().map(|m| m.live()).collect();
    let block = world.random.bytes(BLOCK);
    world.write(0, block);
    drop(world.checker());
    let guards_at = world.array.superblock().geometry.guards_at();
    let mut changes = Changes::new();
    for (role, member) in world.members.iter().flatten().enumerate() {
        let after = member.live();
        let regions = after.written().filter(|n| n * BLOCK as u64 >= guards_at);
        for number in regions.filter(|n| after.block(*n) != before[role].block(*n)) {
            changes.push((role, number * BLOCK as u64, after.block(number).to_vec()));
        }
    }
    assert_eq!(changes.len(), 4, "data, parity, and their two pages");
    changes
}
