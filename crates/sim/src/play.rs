//! A mix of everything, from one seed: what `sim SEED` replays.
//!
//! This file decides what a world is made of and what its program does;
//! `drama` what goes wrong.

use std::any::Any;
use std::collections::BTreeSet;
use std::ops::Range;

use stableio_block::{Error, Kind as ErrorKind};
use stableio_mem::BLOCK;

use crate::check::Finding;
use crate::coverage::{Coverage, Event};
use crate::drama::Plan;
use crate::image::block_of;
use crate::medium::Medium;
use crate::protection::Protection;
use crate::random::Random;
use crate::shape::Shape;
use crate::world::{Flight, Flush, Remains, World, alone};
use crate::write::Write;

pub(crate) const BLOCK64: u64 = BLOCK as u64;

/// Steps that a world lasts, where nobody says otherwise.
pub const STEPS: u64 = 4_000;
/// Writes under way at once, at most.
const FLIGHTS: usize = 4;
/// Those of a stream that begins.
const STREAM: usize = 3;

/// What worlds are played.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Steps that each lasts, about.
    pub steps: u64,
    /// A protection that is taken away.
    pub without: Option<Protection>,
    /// In one of so many worlds `tools/extract.py` takes the data out of what
    /// is left before each opening; 0: in none.
    pub extract_one_in: u64,
    /// Whether to print what happens.
    pub trace: bool,
}

/// What came of a world.
#[derive(Debug)]
pub struct Report {
    /// What does not fit.
    pub findings: Vec<Finding>,
    /// What happened.
    pub coverage: Coverage,
}

impl Default for Options {
    fn default() -> Self {
        Self { steps: STEPS, without: None, extract_one_in: 0, trace: false }
    }
}

/// Plays the world of a seed. A panic is a finding.
pub fn play(seed: u64, options: Options) -> Report {
    let world = || {
        if let Some(protection) = options.without {
            protection.take_from_thread();
        }
        let mut random = Random::new(seed);
        let Options { without, trace, extract_one_in, .. } = options;
        let mut shape = Shape { without, trace, ..Shape::any(&mut random) };
        let plan = Plan::choose(&shape, &mut random);
        if plan.loses_much() && !random.one_in(4) {
            // Only then rows are written whole without their content in the log.
            shape.atomic = BLOCK as u32;
        }
        // Without checksums an array takes no memory by a promise.
        shape.checksums |= shape.is_without(Protection::Stabilize);
        if trace {
            eprintln!("{shape:?}");
        }
        let remains = Remains::new(&shape, random.next());
        let mut play = Play {
            random,
            plan,
            away: vec![None; shape.members],
            in_sync: vec![true; shape.members],
            exposed: BTreeSet::new(),
            shape,
            flights: vec![],
            ghosts: vec![],
            flushes: vec![],
            discarded: vec![],
            rotten: false,
            extracts: extract_one_in > 0 && seed.is_multiple_of(extract_one_in),
            findings: vec![],
        };
        let coverage = play.run(remains, options.steps);
        Report { findings: play.findings, coverage }
    };
    let caught = std::panic::catch_unwind(|| alone(world));
    caught.unwrap_or_else(|panic| {
        let finding = Finding::Other(format!("panic: {}", message(&*panic)));
        Report { findings: vec![finding], coverage: Coverage::default() }
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Kinds of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zeros,
    Discard,
    Ours,
    Racing,
}

/// A world as it is played.
pub(crate) struct Play {
    pub(crate) random: Random,
    pub(crate) shape: Shape,
    pub(crate) plan: Plan,
    /// By role, members that were lost and may come back.
    pub(crate) away: Vec<Option<Medium>>,
    /// By role, whether the array believed it when that was last looked at.
    in_sync: Vec<bool>,
    /// Blocks that were at risk when a member failed, and still are (MODEL-4).
    pub(crate) exposed: BTreeSet<u64>,
    pub(crate) flights: Vec<Flight>,
    /// Writes whose ticket was dropped, and that may or may not be done.
    pub(crate) ghosts: Vec<Write>,
    pub(crate) flushes: Vec<Flush>,
    /// Bytes that were discarded, for writes that go over a part of them.
    discarded: Vec<Range<u64>>,
    /// Whether members may hold what nobody wrote.
    pub(crate) rotten: bool,
    /// Whether its data is taken out before each opening.
    pub(crate) extracts: bool,
    pub(crate) findings: Vec<Finding>,
}

impl Play {
    fn run(&mut self, remains: Remains, steps: u64) -> Coverage {
        let mut coverage = remains.coverage.clone();
        coverage.add(Event::WorldsWithoutChecksums, u64::from(!self.shape.checksums));
        let ended = World::open(&self.shape, remains, None)
            .and_then(|world| self.go_on(world, steps))
            .and_then(|world| self.end(world));
        match ended {
            Ok(remains) => coverage.merge(&remains.coverage),
            Err(why) => self.note([Finding::Other(format!("the array did not open: {why}"))]),
        }
        coverage
    }

    fn go_on(&mut self, mut world: World, steps: u64) -> Result<World, String> {
        // Steps of opening and of looking at everything do not count.
        let (mut spent, mut since) = (0, world.steps);
        while spent < steps && self.findings.is_empty() {
            match self.random.below(20) {
                0..=6 => self.begin_write(&mut world),
                7 => self.read(&mut world),
                8 => self.read_into_racing_memory(&mut world),
                9 | 10 => self.begin_flush(&mut world),
                11 => self.drop_a_ticket(&mut world),
                12 if self.random.one_in(3) => self.rest(&mut world),
                13 | 14 => self.misfortune(&mut world),
                18 if self.random.one_in(2) => self.replace(&mut world),
                18 => self.scrub(&mut world),
                19 if self.random.one_in(4) => self.others_are_at_fault(&world),
                15 if self.random.one_in(4) => {
                    spent += world.steps - since;
                    world = self.close_and_open(world)?;
                    since = world.steps;
                }
                16 | 17 => {
                    if let Some(stop) = self.plan.crash(&mut self.random) {
                        spent += world.steps - since;
                        world = self.crash(world, stop)?;
                        since = world.steps;
                    }
                }
                _ => {}
            }
            world.run(self.random.below(200));
            self.collect(&mut world);
            world.note_replaced();
            world.has_scrubbed();
            spent += world.steps - since;
            since = world.steps;
        }
        Ok(world)
    }

    pub(crate) fn note(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
    }

    /// Begins a write that shares no block with those under way.
    pub(crate) fn begin_write(&mut self, world: &mut World) {
        if self.flights.len() + self.ghosts.len() >= FLIGHTS {
            return;
        }
        if self.flights.len() + self.ghosts.len() + STREAM <= FLIGHTS && self.random.one_in(4) {
            return self.begin_stream(world);
        }
        let kind = match self.random.below(8) {
            0 => Kind::Zeros,
            1 => Kind::Discard,
            2 => Kind::Ours,
            _ => Kind::Racing,
        };
        let empties = matches!(kind, Kind::Zeros | Kind::Discard);
        let over_discarded = !empties && !self.discarded.is_empty() && self.random.one_in(4);
        let whole_rows = if empties || self.plan.loses_much() { 2 } else { 8 };
        let (at, len) = match over_discarded {
            true => self.part_of_a_discard(),
            false if self.random.one_in(whole_rows) => self.any_stripe(world),
            false => self.any_range(world),
        };
        if self.write_to(world, kind, at, len) && over_discarded {
            world.coverage.note(Event::DiscardedRowsPartlyRewritten);
        }
    }

    /// Begins writes that each go on where the one before ends: the last part
    /// of one and the first of the next may be one stripe (JOIN-2).
    fn begin_stream(&mut self, world: &mut World) {
        let stripe = world.array.superblock().geometry.row_shape().stripe_blocks();
        let mut at = self.random.below(2 * stripe) * BLOCK64;
        for _ in 0..STREAM {
            let kind = self.random.pick(&[Kind::Ours, Kind::Racing]);
            let len = BLOCK * self.random.between(stripe as usize, 2 * stripe as usize);
            if !self.write_to(world, kind, at, len) {
                return;
            }
            at += len as u64;
            world.run(self.random.below(12));
        }
    }

    /// Begins a write of a part of a block.
    pub(crate) fn write_a_part_of(&mut self, world: &mut World, block: u64) {
        let kind = self.random.pick(&[Kind::Ours, Kind::Racing]);
        let at = block * BLOCK64 + 512 * self.random.below(8);
        self.write_to(world, kind, at, 512);
    }

    /// False where somebody writes there, or the array ends.
    fn write_to(&mut self, world: &mut World, kind: Kind, at: u64, len: usize) -> bool {
        if !self.is_free(at, len) || at + len as u64 > world.size() {
            return false;
        }
        let empties = matches!(kind, Kind::Zeros | Kind::Discard);
        if empties {
            world.coverage.note(Event::Discards);
            self.discarded.push(at..at + len as u64);
        }
        let whole = (at | len as u64).is_multiple_of(BLOCK64);
        let discard = kind == Kind::Discard && whole;
        let write = match kind {
            Kind::Discard if whole => Write::discard(at, len),
            Kind::Zeros | Kind::Discard => Write::zeros(at, len),
            Kind::Ours => Write::ours(at, self.random.bytes(len)),
            Kind::Racing => {
                let align = self.random.pick(&[1, 8, 512]);
                Write::racing(at, world.program.scattered(len, align, &mut self.random))
            }
        };
        let write = Write { fua: !discard && self.random.one_in(8), ..write };
        let rebuilding = world.is_rebuilding();
        world.coverage.add(Event::WritesDuringRebuild, u64::from(rebuilding));
        world.coverage.note(Event::Writes);
        world.coverage.add(Event::FuaWrites, u64::from(write.fua));
        self.flights.push(world.submit(write));
        true
    }

    fn any_range(&mut self, world: &World) -> (u64, usize) {
        let len = match self.random.below(4) {
            0 | 1 => 512 * self.random.between(1, 16),
            2 => BLOCK * self.random.between(1, 8),
            _ => 512 * self.random.between(1, 160),
        };
        let align = if self.random.one_in(2) { 512 } else { BLOCK64 };
        // Most writes go to a few places: versions and rows meet there.
        let room = world.size() - len as u64;
        let room = if self.random.one_in(3) { room } else { room.min(192 << 10) };
        (self.random.below(room / align + 1) * align, len)
    }

    /// All blocks of a few rows, if the array has so many there.
    fn any_stripe(&mut self, world: &World) -> (u64, usize) {
        let stripe = world.array.superblock().geometry.row_shape().stripe_blocks() * BLOCK64;
        let first = self.random.below((world.size() / stripe).min(4));
        (first * stripe, self.random.between(1, 2) * stripe as usize)
    }

    fn part_of_a_discard(&mut self) -> (u64, usize) {
        let i = self.random.below(self.discarded.len() as u64) as usize;
        let range = self.discarded[i].clone();
        let from = range.start + self.random.below((range.end - range.start) / 512) * 512;
        let len = (512 * self.random.between(1, 16) as u64).min(range.end - from);
        (from, len as usize)
    }

    fn is_free(&self, at: u64, len: usize) -> bool {
        let (first, end) = (at / BLOCK64, (at + len as u64).div_ceil(BLOCK64));
        self.under_way().map(Write::blocks).all(|b| b.end <= first || end <= b.start)
    }

    fn under_way(&self) -> impl Iterator<Item = &Write> {
        self.flights.iter().map(|f| &f.write).chain(&self.ghosts)
    }

    /// Blocks read as the model says, or as the write that is under way there
    /// leaves them, never as a part of each (READ-1, DEV-4).
    fn read(&mut self, world: &mut World) {
        let len = BLOCK * self.random.between(1, 16);
        let at = self.random.below((world.size() - len as u64) / BLOCK64 + 1) * BLOCK64;
        let at = match self.flights.last().filter(|_| self.random.one_in(4)) {
            Some(flight) => (flight.write.at / BLOCK64 * BLOCK64).min(world.size() - len as u64),
            None => at,
        };
        world.coverage.note(Event::Reads);
        let blocks = at / BLOCK64..at / BLOCK64 + (len / BLOCK) as u64;
        let lost = blocks.clone().any(|block| world.model.is_lost(block));
        if lost && !self.is_free(at, len) {
            return;
        }
        let why = match world.read(at, len) {
            Ok(_) if lost => "a lost block in it is lost no more".to_owned(),
            Ok(found) => {
                let mut found = blocks.clone().zip(found.chunks_exact(BLOCK).map(block_of));
                let Some((block, _)) = found.find(|(block, bytes)| {
                    let (old, found) = (world.model.version(*block), Some(bytes.clone()));
                    let mut there = self.under_way().filter(|w| w.blocks().contains(block));
                    found != old && !there.any(|w| w.explains_version(*block, &found, &old).is_ok())
                }) else {
                    return;
                };
                format!("block {block} of {blocks:?} reads as something else")
            }
            Err(error) if lost && error.kind == ErrorKind::Lost => return,
            Err(error) => error.to_string(),
        };
        self.note([Finding::Content { block: at / BLOCK64, why }]);
    }

    /// READ-2: whatever the program does to its buffer, and whoever writes
    /// there meanwhile, the read succeeds.
    fn read_into_racing_memory(&mut self, world: &mut World) {
        // Whole blocks go straight into the program's memory.
        let align = self.random.pick(&[512, BLOCK, BLOCK]);
        let len = align * self.random.between(1, (96 << 9) / align);
        let at = self.random.below((world.size() - len as u64) / align as u64 + 1) * align as u64;
        // Where somebody writes, mostly.
        let at = match self.flights.last().filter(|_| !self.random.one_in(3)) {
            Some(flight) => flight.write.at / align as u64 * align as u64,
            None => at,
        };
        let at = at.min((world.size() - len as u64) / align as u64 * align as u64);
        let lost = (at / BLOCK64..(at + len as u64).div_ceil(BLOCK64))
            .any(|block| world.model.is_lost(block));
        world.coverage.note(Event::RacingReads);
        let align = if align == BLOCK { 512 } else { 1 };
        let into = world.program.scattered(len, align, &mut self.random);
        if let Err(error) = world.read_racing(at, &into)
            && !lost
        {
            self.note([Finding::Other(format!("READ-2: {error}"))]);
        }
    }

    pub(crate) fn begin_flush(&mut self, world: &mut World) {
        if self.flushes.len() < 2 {
            world.coverage.note(Event::Flushes);
            self.flushes.push(world.begin_flush());
        }
    }

    /// DEV-1: nobody waits for this write any more.
    fn drop_a_ticket(&mut self, world: &mut World) {
        if self.flights.is_empty() {
            return;
        }
        world.coverage.note(Event::DroppedTickets);
        let i = self.random.below(self.flights.len() as u64) as usize;
        let write = self.flights.swap_remove(i).detach();
        self.ghosts.push(write);
    }

    /// Writes and flushes that settled go into the model.
    fn collect(&mut self, world: &mut World) {
        self.note_failures(world);
        for mut flush in std::mem::take(&mut self.flushes) {
            match world.has_flushed(&mut flush) {
                None => self.flushes.push(flush),
                Some(Ok(())) => {}
                Some(Err(error)) => self.note([Finding::Other(format!("a flush failed: {error}"))]),
            }
        }
        for mut flight in std::mem::take(&mut self.flights) {
            if !world.has_settled(&mut flight) {
                self.flights.push(flight);
                continue;
            }
            let (write, outcome) = world.settle(flight);
            let failed = outcome.is_err();
            if let Err(error) = outcome {
                self.judge(world, &write, &error);
            }
            let findings = world.learn(&write, failed);
            self.note(findings);
        }
    }

    /// Sees members that the array believes no more.
    pub(crate) fn note_failures(&mut self, world: &World) {
        let mut at_risk: BTreeSet<u64> = self.under_way().flat_map(Write::blocks).collect();
        at_risk.extend(world.model.unflushed());
        let in_sync: Vec<bool> = (0..self.shape.members).map(|role| world.in_sync(role)).collect();
        if self.in_sync.iter().zip(&in_sync).any(|(was, is)| *was && !is) {
            self.exposed = at_risk;
        } else {
            self.exposed.retain(|block| at_risk.contains(block));
        }
        self.in_sync = in_sync;
    }

    /// A write fails only where it leaves a part of a lost block as it is.
    pub(crate) fn judge(&mut self, world: &World, write: &Write, error: &Error) {
        let part_of_lost = |block: u64| !write.covers(block) && world.model.is_lost(block);
        let may = error.kind == ErrorKind::Lost && write.blocks().any(part_of_lost);
        if !may {
            self.note([Finding::Other(format!("a write failed: {error}"))]);
        }
    }

    /// Lets everything settle.
    pub(crate) fn rest(&mut self, world: &mut World) {
        world.quiet();
        self.collect(world);
        for flight in std::mem::take(&mut self.flights) {
            let at = flight.detach().at;
            self.note([Finding::Other(format!("DEV-2: the write at byte {at} never settles"))]);
        }
        if !std::mem::take(&mut self.flushes).is_empty() {
            self.note([Finding::Other("DEV-2: a flush never settles".to_owned())]);
        }
        for write in std::mem::take(&mut self.ghosts) {
            world.rest(&write);
            // It may have failed, where it could; nobody knows.
            let could_fail = write.blocks().any(|block| world.model.is_lost(block));
            let findings = world.learn(&write, could_fail);
            self.note(findings);
        }
        self.note(world.leftovers());
    }

    /// What the members hold once the array is closed: CHECK-1 to CHECK-3.
    pub(crate) fn check_images(&mut self, world: &mut World, scrubbed: bool) {
        let checker = world.checker();
        let checker = if scrubbed { checker.after_scrub() } else { checker };
        self.note(checker.all());
    }
}
