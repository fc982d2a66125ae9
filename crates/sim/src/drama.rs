//! What goes wrong in a world, never more than its redundancy absorbs
//! (SIM-6), and what must be true afterwards.

use std::collections::BTreeSet;

use stableio_array::AssembleError;
use stableio_array::geometry::Place;

use crate::check::{Finding, block_number};
use crate::coverage::Event;
use crate::extract::extract;
use crate::member::SimMember;
use crate::model::{Crash, Pending};
use crate::play::{BLOCK64, Play};
use crate::random::Random;
use crate::shape::{Shape, guards_and_data};
use crate::world::{Flight, Remains, Stop, World};

/// Crashes before an opening is let through.
const TRIES: usize = 4;
/// Bytes of a member, from where its data begins, that most writes go to.
const BUSY: u64 = 48 << 10;
/// Steps of a stall that does not end soon.
const LONG: u64 = 3_000;
/// Scrubs, one after the other, until one has looked at everything.
const SCRUBS: usize = 8;

/// What may go wrong in this world.
pub(crate) struct Plan {
    /// Ways to crash.
    crashes: Vec<Stop>,
    /// What may be wrong with the culprits.
    faults: Vec<Fault>,
    /// The members that are at fault, where any is: as many as may be missing
    /// at once.
    culprits: Vec<usize>,
    /// Whether culprits may be lost in a crash.
    losses: bool,
    /// Whether members are replaced.
    replaces: bool,
    /// Whether everything is looked through at times.
    scrubs: bool,
    /// Whether it ends with two parts of the array written apart.
    split: bool,
}

/// What may be wrong with a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A bit turns over.
    Flip,
    /// A block becomes zeros.
    Blank,
    /// A block can not be read.
    Unreadable,
    /// A few reads fail.
    Reads,
    /// A write fails.
    Write,
    /// Nothing goes on for a while.
    Stall,
    /// Nothing goes on any more, and it dies of it.
    StallToDeath,
    /// It dies.
    Death,
}

const FAULTS: [Fault; 8] = [
    Fault::Flip,
    Fault::Blank,
    Fault::Unreadable,
    Fault::Reads,
    Fault::Write,
    Fault::Stall,
    Fault::StallToDeath,
    Fault::Death,
];

impl Plan {
    pub(crate) fn choose(shape: &Shape, random: &mut Random) -> Self {
        let redundancy = shape.redundancy();
        let faulty = redundancy > 0 && random.one_in(2);
        let crashes: &[Stop] = match random.below(6) {
            0 => &[],
            1 | 2 => &[Stop::Death],
            3 | 4 => &[Stop::Power],
            _ => &[Stop::Death, Stop::Power],
        };
        let mut faults = FAULTS.to_vec();
        faults.retain(|_| faulty && random.one_in(3));
        // Without checksums nobody finds out what a member does not say.
        faults.retain(|f| shape.checksums || !matches!(f, Fault::Flip | Fault::Blank));
        let losses = redundancy > 0 && random.one_in(2);
        let (replaces, scrubs) = (random.one_in(3), random.one_in(3));
        let split = redundancy > 0 && !faulty && random.one_in(6);
        let crashes = crashes.to_vec();
        let mut plan = Self { crashes, faults, culprits: vec![], losses, replaces, scrubs, split };
        plan.choose_culprits(shape, random);
        plan
    }

    /// How it crashes now, if it does.
    pub(crate) fn crash(&self, random: &mut Random) -> Option<Stop> {
        (!self.crashes.is_empty()).then(|| random.pick(&self.crashes))
    }

    fn choose_culprits(&mut self, shape: &Shape, random: &mut Random) {
        self.culprits = (0..shape.members).collect();
        while self.culprits.len() > shape.redundancy() {
            let one = random.below(self.culprits.len() as u64) as usize;
            self.culprits.swap_remove(one);
        }
    }

    /// Whether power is lost and members with it: then rows that were being
    /// written whole are what matters.
    pub(crate) fn loses_much(&self) -> bool {
        self.losses && self.crashes.contains(&Stop::Power)
    }

    /// Whether members hold what nobody wrote.
    pub(crate) fn rots(&self) -> bool {
        self.faults
            .iter()
            .any(|fault| matches!(fault, Fault::Flip | Fault::Blank | Fault::Unreadable))
    }
}

impl Play {
    /// Something goes wrong with a culprit, or with what takes its place.
    pub(crate) fn misfortune(&mut self, world: &mut World) {
        let rebuilding = world.is_rebuilding();
        if rebuilding && self.random.one_in(3) {
            return self.misfortune_of_the_new(world);
        }
        if self.plan.faults.is_empty() {
            return;
        }
        let fault = self.random.pick(&self.plan.faults);
        if fault == Fault::Death && !self.random.one_in(4) {
            return;
        }
        let culprit = self.random.pick(&self.plan.culprits);
        let Some(member) = world.members[culprit].clone() else { return };
        world.coverage.add(Event::FaultsDuringRebuild, u64::from(rebuilding));
        world.tell(|| format!("{fault:?} on role {culprit}"));
        world.coverage.note(match fault {
            Fault::Flip => Event::FlippedBits,
            Fault::Blank => Event::BlankedBlocks,
            Fault::Unreadable => Event::UnreadableBlocks,
            Fault::Reads => Event::FailedReads,
            Fault::Write => Event::FailedWrites,
            Fault::Stall | Fault::StallToDeath => Event::StalledMembers,
            Fault::Death => Event::DeadMembers,
        });
        match fault {
            Fault::Flip => {
                for _ in 0..self.random.between(1, 4) {
                    let at = self.somewhere(world);
                    member.flip(at, self.random.below(8) as u8);
                }
                self.rotten = true;
                self.write_over_rot(world, culprit);
            }
            Fault::Blank => self.blank(world, &member),
            Fault::Unreadable => {
                let at = self.somewhere(world) / BLOCK64 * BLOCK64;
                member.make_unreadable(at..at + BLOCK64);
                self.rotten = true;
            }
            Fault::Reads => member.fail_reads(self.random.between(1, 3) as u32),
            Fault::Write => member.fail_a_write(),
            Fault::Stall => world.stall(member, self.random.below(LONG), false),
            Fault::StallToDeath => world.stall(member, LONG, true),
            Fault::Death => member.break_down(),
        }
    }

    /// A member loses what it has somewhere: zeros are there.
    fn blank(&mut self, world: &World, member: &SimMember) {
        let g = world.array.superblock().geometry;
        let at = match self.random.one_in(2) {
            // Tuples of where most writes go.
            true => g.page_at(self.random.below(g.pages().min(2))),
            false => self.somewhere(world) / BLOCK64 * BLOCK64,
        };
        member.blank(at);
        self.rotten = true;
    }

    /// Something goes wrong with a member that is being filled: it is dropped,
    /// and the array goes on. Only what shows at once.
    fn misfortune_of_the_new(&mut self, world: &mut World) {
        let is_new = |role: &usize| world.health().members[*role].next().is_some();
        let Some(role) = (0..world.incoming.len()).find(is_new) else { return };
        // It may take its place this very moment: then it is one of those at
        // fault.
        if !self.plan.culprits.contains(&role) {
            return;
        }
        let Some(member) = world.incoming[role].clone() else { return };
        world.coverage.note(Event::FaultsDuringRebuild);
        world.tell(|| format!("something is wrong with {}", member.name()));
        match self.random.below(4) {
            0 => member.break_down(),
            1 => member.fail_a_write(),
            _ => world.stall(member, self.random.below(LONG), false),
        }
    }

    /// A blank member takes the place of a culprit, whatever is wrong with
    /// that.
    pub(crate) fn replace(&mut self, world: &mut World) {
        if !self.plan.replaces || world.is_rebuilding() {
            return;
        }
        let role = match self.plan.culprits.len() {
            0 => self.random.below(self.shape.members as u64) as usize,
            _ => self.random.pick(&self.plan.culprits),
        };
        match world.replace(role) {
            Ok(_) => {}
            Err(error) => self.note([Finding::Other(format!("replacing role {role}: {error}"))]),
        }
    }

    /// Where all members have everything, others may be at fault from now on:
    /// what was filled, or caught up, is needed then.
    pub(crate) fn others_are_at_fault(&mut self, world: &World) {
        let sound = |role: usize| {
            world.in_sync(role) && world.members[role].as_ref().is_some_and(|m| m.is_sound())
        };
        if !self.rotten && (0..self.shape.members).all(sound) {
            self.plan.choose_culprits(&self.shape, &mut self.random);
            world.tell(|| format!("at fault from now on: {:?}", self.plan.culprits));
        }
    }

    /// A scrub begins, is paused, goes on, or is stopped.
    pub(crate) fn scrub(&mut self, world: &mut World) {
        if !self.plan.scrubs {
            return;
        }
        let device = world.array.device().clone();
        let done = match self.random.below(6) {
            0 => world.finish_tending(device.pause(true)),
            1 | 2 => world.finish_tending(device.pause(false)),
            3 => world.stop_scrub(),
            _ => world.scrub().map(drop),
        };
        if let Err(error) = done {
            self.note([Finding::Other(format!("a scrub: {error}"))]);
        }
    }

    /// Looks at everything, to its end; then nothing is rotten any more.
    fn scrub_all(&mut self, world: &mut World) {
        let going_on = world.array.device().pause(false);
        let mut done = world.finish_tending(going_on);
        // One that was begun before looked at some of it too long ago.
        let mut whole = 0;
        for _ in 0..SCRUBS {
            world.quiet();
            whole += usize::from(world.has_scrubbed());
            if done.is_err() || whole == 2 {
                break;
            }
            done = world.scrub().map(drop);
        }
        match done {
            Ok(()) if whole == 2 => self.rotten = false,
            other => self.note([Finding::Other(format!("a scrub never ends: {other:?}"))]),
        }
    }

    /// A row rots just before a part of it is written: what is made of the
    /// rotten block must not spread.
    fn write_over_rot(&mut self, world: &mut World, culprit: usize) {
        let Some(member) = world.members[culprit].clone() else { return };
        let g = world.array.superblock().geometry;
        let place = g.place(self.random.below(g.size().min(4 * BUSY) / BLOCK64));
        let at = g.member_offset(place.stripe, place.row);
        member.flip(at + self.random.below(BLOCK64), self.random.below(8) as u8);
        let column = self.random.below(g.columns() as u64) as usize;
        self.write_a_part_of(world, block_number(&g, Place { column, ..place }));
    }

    /// A byte of a member, mostly one that matters.
    fn somewhere(&mut self, world: &World) -> u64 {
        let range = guards_and_data(&world.array.superblock().geometry);
        let data = world.array.superblock().geometry.data_at();
        match self.random.below(6) {
            0 => self.random.below(range.end),
            // Where most writes go.
            1..=3 => data + self.random.below(BUSY.min(range.end - data)),
            _ => range.start + self.random.below(range.end - range.start),
        }
    }

    /// The world crashes in the middle of everything, and is opened again.
    pub(crate) fn crash(&mut self, mut world: World, stop: Stop) -> Result<World, String> {
        // Mostly in the middle of writes.
        if !self.random.one_in(3) {
            (0..self.random.between(1, 3)).for_each(|_| self.begin_write(&mut world));
        }
        if self.random.one_in(4) {
            self.begin_flush(&mut world);
        }
        let most = if self.plan.loses_much() { 800 } else { 200 };
        world.run(self.random.below(most));
        // What was acknowledged at this very moment, and not yet looked at.
        let findings = &mut self.findings;
        self.flushes.retain_mut(|flush| match world.has_flushed(flush) {
            Some(Err(error)) => {
                findings.push(Finding::Other(format!("a flush failed: {error}")));
                false
            }
            settled => settled.is_none(),
        });
        world.coverage.add(Event::CrashesInFlushes, u64::from(!self.flushes.is_empty()));
        self.flushes.clear();
        for mut flight in std::mem::take(&mut self.flights) {
            world.has_settled(&mut flight);
            if let Some(error) = flight.error() {
                self.judge(&world, &flight.write, error);
            }
            self.flights.push(flight);
        }
        self.note_failures(&world);
        let mut pending: Vec<Pending> = self.flights.drain(..).map(Flight::into_pending).collect();
        let ghosts = self.ghosts.drain(..);
        pending.extend(ghosts.map(|write| Pending { write, settled: false }));
        let degraded = world.members.iter().any(|m| m.as_ref().is_none_or(|m| m.is_broken()));
        world.coverage.add(Event::CrashesWhileDegraded, u64::from(degraded));
        // What rots is lost like a member that is; one that broke down has
        // perhaps not been missed yet.
        let broke = world.members.iter().enumerate().any(|(role, member)| {
            member.as_ref().is_some_and(|m| m.has_failed()) && world.in_sync(role)
        });
        let member_lost = self.plan.rots() || broke;
        let exposed = std::mem::take(&mut self.exposed);
        let crash = Crash { power: stop == Stop::Power, member_lost, exposed, pending };
        let remains = world.stop(stop);
        let mut world = self.reopen(remains, crash)?;
        if self.random.one_in(2) {
            let findings = world.read_all(&BTreeSet::new());
            self.note(findings);
        }
        Ok(world)
    }

    /// Opens what remains, which may crash as well; then looks at all that was
    /// at risk.
    fn reopen(&mut self, mut remains: Remains, mut crash: Crash) -> Result<World, String> {
        for try_number in 0.. {
            self.members_come_and_go(&mut remains, &mut crash)?;
            let again = (try_number < TRIES && self.random.one_in(3))
                .then(|| self.plan.crash(&mut self.random))
                .flatten();
            // What is rotten may be mended, and what can not be read is no
            // part of a copy.
            let extracted = (self.extracts && again.is_none() && !self.rotten)
                .then(|| extract(&remains, &self.shape));
            let mut world = World::begin(&self.shape, remains, None)?;
            if let Some(stop) = again {
                let most = self.random.pick(&[30, 300, 3_000, 6_000]);
                world.run(self.random.below(most));
                if world.has_opened().transpose()?.is_none() {
                    world.coverage.note(Event::CrashesInRecovery);
                    crash.power |= stop == Stop::Power;
                    remains = world.stop(stop);
                    continue;
                }
            }
            loop {
                if let Some(opened) = world.has_opened() {
                    opened?;
                    break;
                }
                if !world.step() {
                    return Err("DEV-2: opening never ends".to_owned());
                }
            }
            if let Some(extracted) = extracted {
                world.coverage.note(Event::Extractions);
                self.note(match extracted {
                    Ok(extracted) => world.compare(&extracted),
                    Err(why) => vec![Finding::Other(format!("extract: {why}"))],
                });
            }
            let (findings, _) = world.absorb_crash(&crash);
            self.note(findings);
            self.note_failures(&world);
            return Ok(world);
        }
        unreachable!("the last try is let through")
    }

    /// Culprits are lost with a crash; those that were come back as they were
    /// then, which nobody may believe.
    fn members_come_and_go(
        &mut self,
        remains: &mut Remains,
        crash: &mut Crash,
    ) -> Result<(), String> {
        let assembly = remains.assemble(&self.shape, None).map_err(|e| e.to_string())?;
        remains.sort(&assembly);
        for role in 0..self.shape.members {
            // One that is being filled, or that nobody needs any more.
            if remains.others[role].is_some() && self.random.one_in(3) {
                remains.others[role] = None;
                crash.member_lost |= assembly.members[role].is_none();
            }
        }
        for culprit in self.plan.culprits.clone() {
            if let Some(medium) = self.away[culprit].take_if(|_| self.random.one_in(2)) {
                let taken = remains.media[culprit].is_some();
                let slots = [&mut remains.media[culprit], &mut remains.others[culprit]];
                *slots.into_iter().nth(usize::from(taken)).expect("two slots") = Some(medium);
            } else if self.plan.losses && self.random.one_in(if crash.power { 2 } else { 4 }) {
                let Some(medium) = remains.media[culprit].take() else { continue };
                remains.coverage.note(Event::MembersLostInACrash);
                crash.member_lost = true;
                self.away[culprit] = Some(medium);
            }
        }
        Ok(())
    }

    /// All is well for once: the array is closed, and all fits.
    pub(crate) fn close_and_open(&mut self, world: World) -> Result<World, String> {
        let remains = self.close(world);
        let crash = Crash::default();
        self.reopen(remains, crash)
    }

    /// Closes; afterwards a loss of power takes nothing.
    fn close(&mut self, mut world: World) -> Remains {
        self.rest(&mut world);
        world.coverage.note(Event::Closes);
        if let Err(error) = world.close() {
            self.note([Finding::Other(format!("closing: {error}"))]);
        }
        if !self.rotten {
            self.check_images(&mut world, false);
        }
        // What nobody looks at rots too.
        if self.plan.faults.contains(&Fault::Blank) {
            let culprit = self.random.pick(&self.plan.culprits);
            if let Some(member) = world.members[culprit].clone() {
                world.coverage.note(Event::BlankedBlocks);
                self.blank(&world, &member);
            }
        }
        world.stop(self.random.pick(&[Stop::Death, Stop::Power]))
    }

    /// Everything is read, closed, opened and read again.
    pub(crate) fn end(&mut self, mut world: World) -> Result<Remains, String> {
        self.rest(&mut world);
        let findings = world.read_all(&BTreeSet::new());
        self.note(findings);
        if !self.findings.is_empty() {
            return Ok(world.stop(Stop::Death));
        }
        let sound = (0..self.shape.members).all(|role| world.in_sync(role));
        if self.plan.split && sound && !world.is_rebuilding() {
            world = self.split(world)?;
        } else {
            world = self.close_and_open(world)?;
        }
        let findings = world.read_all(&BTreeSet::new());
        self.note(findings);
        let scrubbed = self.rotten || self.plan.scrubs;
        if scrubbed {
            self.scrub_all(&mut world);
        }
        self.note(world.leftovers());
        if let Err(error) = world.close() {
            self.note([Finding::Other(format!("closing: {error}"))]);
        }
        self.check_images(&mut world, scrubbed);
        Ok(world.stop(Stop::Death))
    }

    /// Two parts of the array are written apart, each without some members of
    /// the other. Then all are there: nobody may choose but the administrator,
    /// who gets just the part that he chose. A member of both parts is in each
    /// as a copy.
    fn split(&mut self, world: World) -> Result<World, String> {
        let mut remains = self.close(world);
        remains.others.fill(None);
        let mut roles: Vec<usize> = (0..self.shape.members).collect();
        let mut some = |random: &mut Random| -> Vec<usize> {
            let count = random.between(1, self.shape.redundancy());
            (0..count.min(roles.len()))
                .map(|_| roles.swap_remove(random.below(roles.len() as u64) as usize))
                .collect()
        };
        let missing = [some(&mut self.random), some(&mut self.random)];
        let mut sides = Vec::new();
        for missing in &missing {
            let mut side = remains.clone();
            missing.iter().for_each(|role| side.media[*role] = None);
            side.random = self.random.fork();
            side.coverage = Default::default();
            sides.push(self.write_apart(side)?);
        }
        let chosen = self.random.below(2) as usize;
        let own = self.random.pick(&missing[1 - chosen]);
        for role in 0..self.shape.members {
            let side = if missing[chosen].contains(&role) { 1 - chosen } else { chosen };
            remains.media[role] = sides[side].media[role].clone();
        }
        remains.model = sides[chosen].model.clone();
        sides.iter().for_each(|side| remains.coverage.merge(&side.coverage));
        match remains.assemble(&self.shape, None) {
            Err(AssembleError::SplitBrain { .. }) => {
                remains.coverage.note(Event::SplitBrainsRefused);
            }
            Err(other) => self.note([Finding::Other(format!("ASM-2: {other}"))]),
            Ok(_) => {
                let why = format!("ASM-2: roles {missing:?} were missing in turn, and none now");
                self.note([Finding::Other(why)]);
            }
        }
        let mut world = World::open(&self.shape, remains, Some(own))?;
        world.coverage.note(Event::SplitBrainsTrusted);
        Ok(world)
    }

    /// One part of a split array, on its own for a while.
    fn write_apart(&mut self, remains: Remains) -> Result<Remains, String> {
        let mut world = World::open(&self.shape, remains, None)?;
        for _ in 0..self.random.between(1, 6) {
            self.begin_write(&mut world);
            world.run(self.random.below(100));
        }
        self.rest(&mut world);
        world.flush();
        if self.random.one_in(2) {
            return Ok(world.stop(Stop::Death));
        }
        if let Err(error) = world.close() {
            self.note([Finding::Other(format!("closing: {error}"))]);
        }
        Ok(world.stop(Stop::Power))
    }
}
