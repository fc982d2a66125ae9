//! A mix of everything, from one seed: what `sim SEED` replays.

use std::collections::BTreeSet;
use std::ops::Range;

use stableio_array::Level;
use stableio_array::geometry::{GUARDS_AT, Place};
use stableio_mem::BLOCK;

use crate::check::Finding;
use crate::random::Random;
use crate::world::{Flight, Shape, World, alone};
use crate::write::Write;

const BLOCK64: u64 = BLOCK as u64;

/// Steps that a world lasts, where nobody says otherwise.
pub const STEPS: u64 = 20_000;
/// Writes under way at once, at most.
const FLIGHTS: usize = 4;

/// What goes wrong in a world: never more than its redundancy absorbs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drama {
    /// Nothing but the racing program.
    None,
    /// The process dies, again and again.
    Crashes,
    /// One member turns bits over and has unreadable blocks.
    Rot,
    /// One member breaks down; at the end the process dies too.
    Death,
}

/// Plays the world of a seed for about so many steps; gives what does not fit.
pub fn play(seed: u64, steps: u64) -> Vec<Finding> {
    alone(|| {
        let mut random = Random::new(seed);
        let (shape, drama) = choose(&mut random);
        let world = World::new(&shape, random.next());
        let culprit = random.below(shape.members as u64) as usize;
        let mut play = Play { random, shape, drama, culprit, flights: vec![], findings: vec![] };
        match play.run(world, steps) {
            Ok(()) => {}
            Err(why) => play.note([Finding::Other(format!("the array did not open again: {why}"))]),
        }
        play.findings
    })
}

fn choose(random: &mut Random) -> (Shape, Drama) {
    let mut shape = match random.below(5) {
        0 => Shape::single(),
        n => Shape::raid5(2 + n.min(3) as usize),
    };
    shape.chunk = 4096 << random.below(4);
    shape.memory_align = random.pick(&[1, 512]);
    // A small pool makes requests wait for memory, and be sampled late.
    shape.pool = random.pick(&[8 << 20, 16 << 20]);
    let drama = match shape.level {
        Level::Single => random.pick(&[Drama::None, Drama::Crashes]),
        _ => random.pick(&[Drama::None, Drama::Crashes, Drama::Crashes, Drama::Rot, Drama::Death]),
    };
    (shape, drama)
}

struct Play {
    random: Random,
    shape: Shape,
    drama: Drama,
    /// The one member that is at fault where one is.
    culprit: usize,
    flights: Vec<Flight>,
    findings: Vec<Finding>,
}

impl Play {
    fn run(&mut self, mut world: World, steps: u64) -> Result<(), String> {
        let mut done = 0;
        while done + world.steps < steps && self.findings.is_empty() {
            match self.random.below(16) {
                0..=5 => self.begin_write(&mut world),
                6 | 7 => self.read(&mut world),
                8 => self.read_into_racing_memory(&mut world),
                9 => world.flush(),
                10 => self.drop_a_ticket(&mut world),
                11 => self.rest(&mut world),
                12 if self.drama == Drama::Crashes => {
                    done += world.steps;
                    world = self.crash(world)?;
                }
                12 | 13 => self.misfortune(&mut world),
                _ => {}
            }
            world.run(self.random.below(300));
            self.collect(&mut world);
        }
        self.end(world)
    }

    fn note(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
    }

    /// Begins a write that shares no block with those under way.
    fn begin_write(&mut self, world: &mut World) {
        let Some((at, len)) = self.free_range(world) else { return };
        let write = match self.random.below(6) {
            0 => Write::zeros(at, len),
            1 => Write::ours(at, self.random.bytes(len)),
            _ => {
                let align = self.random.pick(&[1, 8, 512]);
                Write::racing(at, world.program.scattered(len, align, &mut self.random))
            }
        };
        let write = Write { fua: self.random.one_in(10), ..write };
        self.flights.push(world.submit(write));
    }

    fn free_range(&mut self, world: &World) -> Option<(u64, usize)> {
        let len = match self.random.below(3) {
            0 => 512 * self.random.between(1, 24),
            1 => BLOCK * self.random.between(1, 16),
            _ => 512 * self.random.between(1, 512),
        };
        let align = if self.random.one_in(2) { 512 } else { BLOCK64 };
        let at = self.random.below((world.size() - len as u64) / align) * align;
        let free = self.is_free(at, len);
        (free && self.flights.len() < FLIGHTS).then_some((at, len))
    }

    fn is_free(&self, at: u64, len: usize) -> bool {
        let (first, end) = (at / BLOCK64, (at + len as u64).div_ceil(BLOCK64));
        self.flights.iter().map(|f| f.write.blocks()).all(|b| b.end <= first || end <= b.start)
    }

    /// Blocks that nobody is writing read as the model says (READ-1).
    fn read(&mut self, world: &mut World) {
        let len = BLOCK * self.random.between(1, 32);
        let at = self.random.below((world.size() - len as u64) / BLOCK64) * BLOCK64;
        if !self.is_free(at, len) {
            return;
        }
        let mut want = vec![0; len];
        world.model.read(at, &mut want);
        let why = match world.read(at, len) {
            Ok(found) if found == want => return,
            Ok(_) => "reads as something else".to_owned(),
            Err(error) => error.to_string(),
        };
        self.note([Finding::Content { block: at / BLOCK64, why }]);
    }

    /// READ-2: whatever the program does to its buffer, and whoever writes
    /// there meanwhile, the read succeeds.
    fn read_into_racing_memory(&mut self, world: &mut World) {
        let len = 512 * self.random.between(1, 128);
        let at = self.random.below((world.size() - len as u64) / 512) * 512;
        let into = world.program.scattered(len, 1, &mut self.random);
        if let Err(error) = world.read_racing(at, &into) {
            self.note([Finding::Other(format!("READ-2: {error}"))]);
        }
    }

    /// DEV-1: nobody waits for this write any more. What it left is looked at
    /// once nothing is under way.
    fn drop_a_ticket(&mut self, world: &mut World) {
        if self.flights.is_empty() {
            return;
        }
        let i = self.random.below(self.flights.len() as u64) as usize;
        let write = self.flights.swap_remove(i).detach();
        self.rest(world);
        world.rest(&write);
        self.learn(world, &write);
    }

    /// Writes that settled go into the model.
    fn collect(&mut self, world: &mut World) {
        for mut flight in std::mem::take(&mut self.flights) {
            if !world.has_settled(&mut flight) {
                self.flights.push(flight);
                continue;
            }
            let (write, outcome) = world.settle(flight);
            match outcome {
                Ok(_) => self.learn(world, &write),
                Err(error) => self.note([Finding::Other(format!("a write failed: {error}"))]),
            }
        }
    }

    fn learn(&mut self, world: &mut World, write: &Write) {
        for block in write.blocks() {
            let why = match world.read(block * BLOCK64, BLOCK) {
                Err(error) => Err(error.to_string()),
                Ok(found) => {
                    let fits = write.explains(block, &found, world.model.block(block));
                    world.model.set_block(block, &found);
                    fits
                }
            };
            self.note(why.err().map(|why| Finding::Content { block, why }));
        }
        if let Err(why) = write.explains_whole(&world.model) {
            self.note([Finding::Content { block: write.blocks().start, why }]);
        }
    }

    /// Lets everything settle; then all must fit.
    fn rest(&mut self, world: &mut World) {
        world.quiet();
        self.collect(world);
        for flight in std::mem::take(&mut self.flights) {
            let at = flight.detach().at;
            self.note([Finding::Other(format!("DEV-2: the write at byte {at} never settles"))]);
        }
        self.note(world.leftovers());
        if self.drama != Drama::Rot {
            self.note(world.checker().all());
        }
    }

    fn misfortune(&mut self, world: &mut World) {
        let member = world.members[self.culprit].clone().expect("left out only by a crash");
        match self.drama {
            Drama::None | Drama::Crashes => {}
            Drama::Rot => {
                let region = self.random.pick(&[0, GUARDS_AT, GUARDS_AT]);
                let at = region + self.random.below(self.shape.member_size - region);
                match self.random.below(3) {
                    0 => member.make_unreadable(at / BLOCK64 * BLOCK64..at + 1),
                    _ => member.flip(at, self.random.below(8) as u8),
                }
            }
            Drama::Death => {
                member.break_down();
                // Only now does the checker know that it is gone.
                world.flush();
            }
        }
    }

    /// The process dies, and the array is opened again.
    fn crash(&mut self, mut world: World) -> Result<World, String> {
        self.collect(&mut world);
        let under_way: Vec<Write> = self.flights.drain(..).map(Flight::detach).collect();
        let degraded = world.members[self.culprit].as_ref().is_none_or(|m| m.is_broken());
        let mut world = world.crash_and_open()?;
        for write in &under_way {
            let (findings, _) = world.absorb_crash(write, degraded);
            self.note(findings);
        }
        if degraded {
            // The write hole, while a member is missing: other blocks of rows
            // that were being written may be lost. They are never wrong.
            let lost = under_way.iter().flat_map(|w| rows_around(&world, w.blocks())).collect();
            let findings = world.read_all(&lost);
            self.note(findings);
        } else {
            self.note(world.checker().all());
        }
        Ok(world)
    }

    fn end(&mut self, mut world: World) -> Result<(), String> {
        if self.drama == Drama::Death {
            return self.crash(world).map(drop);
        }
        self.rest(&mut world);
        let findings = world.read_all(&BTreeSet::new());
        self.note(findings);
        let closing = world.array.device().begin_close();
        if let Err(error) = world.finish(closing) {
            self.note([Finding::Other(format!("closing: {error}"))]);
        }
        let mut world = world.crash_and_open()?;
        let findings = world.read_all(&BTreeSet::new());
        self.note(findings);
        if self.drama == Drama::Rot {
            // Reading mended the data. Tuples and parity that nobody needed
            // are not looked at by a read.
            let all = world.checker().all().into_iter();
            self.note(all.filter(|f| matches!(f, Finding::Guard { .. })));
        }
        Ok(())
    }
}

/// All blocks of the rows that some blocks lie in.
fn rows_around(world: &World, blocks: Range<u64>) -> Vec<u64> {
    let g = world.array.superblock().geometry;
    let row = |block| {
        let Place { stripe, row, .. } = g.place(block);
        let first = stripe * g.row_shape().stripe_blocks() + u64::from(row);
        (0..g.columns() as u64).map(move |column| first + column * u64::from(g.chunk_blocks))
    };
    blocks.flat_map(row).collect()
}
