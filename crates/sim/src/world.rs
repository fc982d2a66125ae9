//! One array with its members and its program, step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use stableio_array::array::ArrayOptions;
use stableio_array::superblock::Id;
use stableio_array::{Array, AssembleError, Assembly, Attached, Health, TendError, assemble};
use stableio_block::exec::Executor;
use stableio_block::{Device, Error, Into, Kind, Op, Outcome, Reply, Request, Stack, Ticket};
use stableio_mem::{BLOCK, Grant, Pool};

use crate::check::{Checker, Finding, probe};
use crate::coverage::{Coverage, Event};
use crate::extract::Extracted;
use crate::image::{Image, block_of};
use crate::medium::Medium;
use crate::member::{SimMember, Wreck};
use crate::model::{Crash, Model, Pending, Version};
use crate::program::{Program, Source};
use crate::protection::Protection;
use crate::random::Random;
use crate::shape::{Region, Shape, region};
use crate::write::{Content, Write};

/// Blocks that are looked at by one read.
const LOOK: u64 = 16;

/// An open array and everything around it.
pub struct World {
    /// Every choice.
    pub random: Random,
    /// The program that races.
    pub program: Program,
    /// By role; `None` is missing.
    pub members: Vec<Option<Arc<SimMember>>>,
    /// The array.
    pub array: Array,
    /// The stack that requests go through.
    pub stack: Stack,
    /// Memory of requests.
    pub pool: Arc<Pool>,
    /// What the array should read as.
    pub model: Model,
    /// What happened so far.
    pub coverage: Coverage,
    /// Steps made.
    pub steps: u64,
    /// By role, a member that is being filled to take its place, as far as
    /// anybody knows.
    pub incoming: Vec<Option<Arc<SimMember>>>,
    shape: Shape,
    /// By role, members whose place another one took.
    replaced: Vec<Option<Arc<SimMember>>>,
    /// By role, whether its own member is catching up.
    catching_up: Vec<bool>,
    /// By role and slot, members that were there and that the array does not
    /// believe.
    left_out: Vec<[Option<Medium>; 2]>,
    stalls: Vec<Stall>,
    opening: Option<Ticket<Result<(), Error>>>,
    scrubbing: bool,
    executor: Executor,
}

/// A member that does not go on for a while.
struct Stall {
    member: Arc<SimMember>,
    until: u64,
    dies: bool,
}

/// What is left when a world ends.
#[derive(Clone)]
pub struct Remains {
    /// By role, what members hold; `None` is missing.
    pub media: Vec<Option<Medium>>,
    /// By role, another medium: one that was being filled to take the place,
    /// or one whose place was taken.
    pub others: Vec<Option<Medium>>,
    /// What the array should read as.
    pub model: Model,
    /// Every later choice.
    pub random: Random,
    /// What happened so far.
    pub coverage: Coverage,
}

/// How a world ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The process dies (SIM-4).
    Death,
    /// Power is lost (SIM-5).
    Power,
}

/// A write under way.
pub struct Flight {
    /// What is written.
    pub write: Write,
    ticket: Option<Ticket<Outcome>>,
    outcome: Option<Outcome>,
}

/// A flush under way.
pub struct Flush {
    ticket: Ticket<Outcome>,
    covers: u64,
}

/// Runs a world on a thread of its own: an open array belongs to its thread,
/// and what a crash leaves behind goes with that.
pub fn alone<T: Send>(world: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(world).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl Remains {
    /// Members of a new array.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let images = shape.create(&mut random);
        Self {
            media: images.into_iter().map(|image| Some(Medium::new(image))).collect(),
            others: vec![None; shape.members],
            model: Model::default(),
            random,
            coverage: Coverage::default(),
        }
    }

    /// What a read of the members sees.
    pub fn images(&self) -> Vec<Option<Image>> {
        self.media.iter().map(|m| m.as_ref().map(|m| m.live().clone())).collect()
    }

    /// All media that are there, with their names.
    pub fn named(&self) -> impl Iterator<Item = (String, usize, &Medium)> {
        let slots = [&self.media, &self.others].into_iter().enumerate();
        slots.flat_map(|(slot, media)| {
            let media = media.iter().enumerate();
            media.filter_map(move |(role, m)| Some((name(slot, role), role, m.as_ref()?)))
        })
    }

    /// What the array makes of the members, by role; `trust` is the role to
    /// believe.
    ///
    /// # Errors
    ///
    /// Why they do not assemble.
    pub fn assemble(&self, shape: &Shape, trust: Option<usize>) -> Result<Assembly, AssembleError> {
        let probes = self.named().filter_map(|(name, _, medium)| {
            probe(medium.live(), Path::new(&name), shape.member_size)
        });
        let trust = trust.map(|role| name(0, role));
        assemble(&probes.collect::<Vec<_>>(), trust.as_deref().map(Path::new))
    }

    /// Of a role's two media the one that the array believes is its member's
    /// from now on.
    pub fn sort(&mut self, assembly: &Assembly) {
        for (role, member) in assembly.members.iter().enumerate() {
            if member.as_deref() == Some(Path::new(&name(1, role))) {
                std::mem::swap(&mut self.media[role], &mut self.others[role]);
            }
        }
    }
}

/// The name of a medium; slot 1 is that of the others.
fn name(slot: usize, role: usize) -> String {
    format!("{}{role}", ["m", "r"][slot])
}

impl World {
    /// A new array.
    ///
    /// # Panics
    ///
    /// When it can not be opened.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        Self::open(shape, Remains::new(shape, seed), None).expect("a new array opens")
    }

    /// Opens what remains, and recovers it if need be; `trust` is the role to
    /// believe where members exclude each other.
    ///
    /// # Errors
    ///
    /// Why the members do not assemble, or the array did not open.
    pub fn open(shape: &Shape, remains: Remains, trust: Option<usize>) -> Result<Self, String> {
        let mut world = Self::begin(shape, remains, trust)?;
        loop {
            if let Some(opened) = world.has_opened() {
                return opened.map(|()| world);
            }
            if !world.step() {
                return Err("DEV-2: opening never ends".to_owned());
            }
        }
    }

    /// Begins to open; [`has_opened`](Self::has_opened) says when it is done.
    ///
    /// # Errors
    ///
    /// Why the members do not assemble.
    pub fn begin(
        shape: &Shape,
        mut remains: Remains,
        trust: Option<usize>,
    ) -> Result<Self, String> {
        let mut assembly = remains.assemble(shape, trust).map_err(|e| e.to_string())?;
        assembly.crashed &= !shape.is_without(Protection::Recovery);
        remains.sort(&assembly);
        let Remains { media, others, model, mut random, mut coverage } = remains;
        let executor = Executor::new(|| {});
        let (mut left_out, mut catching_up) = (Vec::new(), Vec::new());
        let (mut members, mut incoming, mut attached) = (Vec::new(), Vec::new(), Vec::new());
        for (role, slots) in media.into_iter().zip(others).enumerate() {
            let taken = assembly.members[role].is_some();
            let comes = assembly.incoming[role].as_deref();
            let mut made = [None, None];
            let mut left = [None, None];
            for (slot, medium) in <[Option<Medium>; 2]>::from(slots).into_iter().enumerate() {
                let (name, fork) = (name(slot, role), random.fork());
                let Some(medium) = medium else { continue };
                let comes = comes == Some(Path::new(&name));
                if !comes && (slot == 1 || !taken) {
                    left[slot] = Some(medium);
                    coverage.note(Event::StaleMembersLeftOut);
                    continue;
                }
                let build = shape.build();
                let member = SimMember::new(&name, medium, build, fork, executor.handle());
                made[slot] = Some(Arc::new(member));
            }
            let [member, other] = made;
            let device = member.clone().map(|member| member as Arc<dyn Device>);
            let own = if taken { None } else { device.clone() };
            let next = other.clone().map(|other| other as Arc<dyn Device>);
            attached.push(Attached {
                name: name(0, role),
                device: device.filter(|_| taken),
                incoming: own
                    .map(|own| (name(0, role), own))
                    .or(next.map(|next| (name(1, role), next))),
            });
            catching_up.push(member.is_some() && !taken);
            members.push(member);
            incoming.push(other);
            left_out.push(left);
        }
        let handle = executor.handle();
        let options = ArrayOptions { history: Some(random.next() >> 1), ..ArrayOptions::default() };
        let (array, opened) = Array::begin(&assembly, attached, options, &handle);
        if shape.trace {
            array.health().observe(|event| eprintln!("    {event}"));
            eprintln!("opens {:?}, to come {:?}", assembly.members, assembly.incoming);
        }
        let pool = Pool::new(shape.pool).map_err(|e| e.to_string())?;
        let mut stack = Stack::new("sim", array.device().clone(), pool.clone(), handle);
        if shape.is_without(Protection::Stabilize) {
            stack = stack.with_grant(Grant::by_administrator());
        }
        Ok(Self {
            random,
            program: Program::default(),
            members,
            array,
            stack,
            pool,
            model,
            coverage,
            steps: 0,
            incoming,
            shape: shape.clone(),
            replaced: vec![None; shape.members],
            catching_up,
            left_out,
            stalls: Vec::new(),
            opening: Some(opened),
            scrubbing: false,
            executor,
        })
    }

    /// Whether opening is done, and how it ended.
    pub fn has_opened(&mut self) -> Option<Result<(), String>> {
        let Some(opening) = &mut self.opening else { return Some(Ok(())) };
        let opened = poll(opening)?;
        self.opening = None;
        Some(opened.map_err(|error| error.to_string()))
    }

    /// One step: the program's turn, then one ready task, by choice. False
    /// when none is ready, and no member that stalls holds one up.
    pub fn step(&mut self) -> bool {
        self.steps += 1;
        self.program.turn(&mut self.random);
        let now = self.steps;
        while let Some(i) = self.stalls.iter().position(|stall| stall.until <= now) {
            self.end_stall(i);
        }
        let Self { executor, random, .. } = self;
        let ran = executor.enter(|| executor.run_one(|ready| random.below(ready as u64) as usize));
        // Nothing else goes on: the time of a stall passes.
        let waits = !ran && !self.stalls.is_empty();
        if waits {
            self.end_stall(0);
        }
        ran || waits
    }

    /// A member does not go on for so many steps; then it does, or dies.
    pub fn stall(&mut self, member: Arc<SimMember>, steps: u64, dies: bool) {
        member.stall();
        self.tell(|| format!("{} stalls for {steps}, and dies: {dies}", member.name()));
        self.stalls.push(Stall { member, until: self.steps + steps, dies });
    }

    fn end_stall(&mut self, i: usize) {
        let stall = self.stalls.swap_remove(i);
        if stall.dies { stall.member.break_down() } else { stall.member.resume() }
    }

    /// So many steps.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
    }

    /// Steps until nothing is ready any more.
    pub fn quiet(&mut self) {
        while self.step() {}
    }

    /// Steps until the ticket gives its result.
    ///
    /// # Panics
    ///
    /// When nothing is ready and it has none: the request hangs (DEV-2).
    pub fn finish<T>(&mut self, mut ticket: Ticket<Result<T, Error>>) -> Result<T, Error> {
        loop {
            if let Some(result) = poll(&mut ticket) {
                return result;
            }
            assert!(self.step(), "DEV-2: a request never settles (step {})", self.steps);
        }
    }

    /// The same of what is asked of the array itself.
    pub fn finish_tending(
        &mut self,
        mut ticket: Ticket<Result<(), TendError>>,
    ) -> Result<(), TendError> {
        loop {
            if let Poll::Ready(result) =
                Pin::new(&mut ticket).poll(&mut Context::from_waker(Waker::noop()))
            {
                return result;
            }
            assert!(self.step(), "DEV-2: never done (step {})", self.steps);
        }
    }

    /// Of the seed, so that a world with a rebuild can be replayed.
    fn random_id(&mut self) -> Id {
        let halves = [self.random.next(), self.random.next()].map(u64::to_le_bytes);
        Id(halves.concat().try_into().expect("two halves"))
    }

    /// Begins to fill a blank member that takes a role's place. False where
    /// something else is under way.
    ///
    /// # Errors
    ///
    /// The array's.
    pub fn replace(&mut self, role: usize) -> Result<bool, TendError> {
        self.note_replaced();
        let (name, fork) = (format!("{}-{}", name(1, role), self.steps), self.random.fork());
        let (build, handle) = (self.shape.build(), self.executor.handle());
        let blank = Medium::new(Image::default());
        let member = Arc::new(SimMember::new(&name, blank, build, fork, handle));
        let id = self.random_id();
        let begun = self.array.device().begin_replace(role, id, member.clone(), name);
        match self.finish_tending(begun) {
            Ok(()) => {
                self.tell(|| format!("role {role} is being replaced"));
                self.catching_up[role] = false;
                self.left_out[role][1] = None;
                self.incoming[role] = Some(member);
                Ok(true)
            }
            Err(TendError::Busy(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Members that were filled are their roles' from now on.
    pub fn note_replaced(&mut self) {
        for role in 0..self.members.len() {
            if !self.in_sync(role) {
                continue;
            }
            if std::mem::take(&mut self.catching_up[role]) {
                self.coverage.note(Event::CaughtUp);
            }
            let name = self.health().members[role].name();
            if let Some(new) = self.incoming[role].take_if(|member| *member.name() == *name) {
                self.coverage.note(Event::Rebuilds);
                self.replaced[role] = self.members[role].replace(new);
                let old = self.left_out[role][0].take();
                let unused = self.left_out[role][1].take();
                self.left_out[role][1] = old.or(unused);
            }
        }
    }

    /// Whether a member is being filled that takes a place.
    pub fn is_rebuilding(&mut self) -> bool {
        self.note_replaced();
        let mut incoming = self.incoming.iter().flatten();
        incoming.any(|member| !member.is_broken())
    }

    /// Begins to look through everything. False where something else is under
    /// way.
    ///
    /// # Errors
    ///
    /// The array's.
    pub fn scrub(&mut self) -> Result<bool, TendError> {
        let begun = self.array.device().begin_scrub();
        match self.finish_tending(begun) {
            Ok(()) => {
                self.scrubbing = true;
                Ok(true)
            }
            Err(TendError::Busy(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stops a scrub, if there is one.
    ///
    /// # Errors
    ///
    /// The array's.
    pub fn stop_scrub(&mut self) -> Result<(), TendError> {
        self.has_scrubbed();
        let stopped = self.array.device().stop_scrub();
        match self.finish_tending(stopped) {
            Ok(()) => {
                self.scrubbing = false;
                Ok(())
            }
            Err(TendError::Busy(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether a scrub that was begun has looked at everything since.
    pub fn has_scrubbed(&mut self) -> bool {
        let done = self.scrubbing && self.health().scrub.how_far().is_none();
        if done {
            self.scrubbing = false;
            self.coverage.note(Event::Scrubs);
        }
        done
    }

    /// Bytes of the array.
    pub fn size(&self) -> u64 {
        self.stack.limits().size
    }

    /// Counters and events.
    pub fn health(&self) -> &Health {
        self.array.health()
    }

    /// Whether the array believes a member.
    pub fn in_sync(&self, member: usize) -> bool {
        self.health().members[member].in_sync.load(Ordering::Relaxed)
    }

    /// Blocks charged to a member.
    pub fn charged(&self, member: usize) -> u64 {
        self.health().members[member].mismatches.load(Ordering::Relaxed)
    }

    /// Submits a write; the program changes its memory from now on.
    pub fn submit(&mut self, write: Write) -> Flight {
        if let Content::Racing(source) = &write.content {
            self.program.race(source.buffer());
        }
        let ticket = self.stack.submit(write.request());
        let blocks = write.blocks();
        self.tell(|| format!("writes {blocks:?}"));
        Flight { write, ticket: Some(ticket), outcome: None }
    }

    /// Whether it settled.
    pub fn has_settled(&self, flight: &mut Flight) -> bool {
        if let Some(outcome) = flight.ticket.as_mut().and_then(poll) {
            flight.ticket = None;
            flight.outcome = Some(outcome);
            self.rest(&flight.write);
        }
        flight.outcome.is_some()
    }

    /// The program leaves the memory of a write alone again.
    pub fn rest(&self, write: &Write) {
        if let Content::Racing(source) = &write.content {
            self.program.rest(source.buffer());
        }
    }

    /// Steps until it settled; gives the write and its outcome.
    ///
    /// # Panics
    ///
    /// When it hangs (DEV-2).
    pub fn settle(&mut self, mut flight: Flight) -> (Write, Outcome) {
        while !self.has_settled(&mut flight) {
            assert!(self.step(), "DEV-2: a write never settles (step {})", self.steps);
        }
        (flight.write, flight.outcome.expect("just settled"))
    }

    /// A write of our own memory, to its end, and into the model.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn write(&mut self, at: u64, bytes: Vec<u8>) {
        let flight = self.submit(Write::ours(at, bytes));
        let (write, outcome) = self.settle(flight);
        outcome.expect("a write to a sound array");
        self.model.apply(&write);
    }

    /// Makes all of `bytes` something that is not zero.
    pub fn fill(&mut self, bytes: std::ops::Range<u64>) {
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(256 << 10) as usize;
            let content = self.random.bytes(len);
            self.write(at, content);
            at += len as u64;
        }
    }

    /// Flushes.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn flush(&mut self) {
        let Flush { ticket, covers } = self.begin_flush();
        self.finish(ticket).expect("a flush of a sound array");
        self.model.finish_flush(covers);
    }

    /// Begins a flush.
    pub fn begin_flush(&mut self) -> Flush {
        let covers = self.model.begin_flush();
        Flush { ticket: self.stack.submit(Request::flush()), covers }
    }

    /// Whether a flush settled; the model then knows what is durable.
    pub fn has_flushed(&mut self, flush: &mut Flush) -> Option<Result<(), Error>> {
        let outcome = poll(&mut flush.ticket)?;
        if outcome.is_ok() {
            self.model.finish_flush(flush.covers);
        }
        Some(outcome.map(drop))
    }

    /// Closes; all is durable then.
    ///
    /// # Errors
    ///
    /// When members can not be flushed.
    pub fn close(&mut self) -> Result<(), Error> {
        let covers = self.model.begin_flush();
        let closing = self.array.device().begin_close();
        self.finish(closing)?;
        self.model.finish_flush(covers);
        Ok(())
    }

    /// Reads blocks into the pool.
    ///
    /// # Errors
    ///
    /// The read's.
    pub fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let ticket = self.stack.submit(Request::read_owned(at, len));
        match self.finish(ticket)? {
            Reply::Data(data) => Ok(data.to_vec()),
            other => panic!("a read gave {other:?}"),
        }
    }

    /// Reads into the program's memory, which it changes meanwhile.
    ///
    /// # Errors
    ///
    /// The read's.
    pub fn read_racing(&mut self, at: u64, into: &Source) -> Result<(), Error> {
        let into_foreign = Into::Foreign(into.handle());
        let request = Request::of(Op::Read { at, into: into_foreign });
        self.program.race(into.buffer());
        let ticket = self.stack.submit(request);
        let outcome = self.finish(ticket);
        self.program.rest(into.buffer());
        outcome.map(drop)
    }

    /// What the members hold now, for the checker; without those that broke
    /// down or were dropped.
    ///
    /// # Panics
    ///
    /// When tuples can not be written to their pages.
    pub fn checker(&mut self) -> Checker {
        let written = self.array.device().checkpoint();
        match self.finish_tending(written) {
            // A closed array has written them.
            Ok(()) | Err(TendError::Array(Kind::Stopped)) => {}
            Err(error) => panic!("tuples were not written: {error}"),
        }
        self.note_replaced();
        let image = |(role, member): (usize, &Option<Arc<SimMember>>)| {
            member.as_ref().filter(|_| self.in_sync(role)).map(|m| m.live())
        };
        let images = self.members.iter().enumerate().map(image).collect();
        Checker::new(self.array.superblock(), images)
    }

    /// After a write settled with nothing else under way in its rows: its
    /// rows fit, its content is what may be; the model learns that.
    pub fn absorb(&mut self, write: &Write) -> Vec<Finding> {
        let checker = self.checker();
        let mut findings = checker.rows_of(write.blocks());
        for block in write.blocks() {
            let Some(found) = checker.content(block) else { continue };
            if let Err(why) = write.explains(block, &found, &self.model.block(block)[..]) {
                findings.push(Finding::Content { block, why });
            }
            self.model.settle(block, Some(Arc::new(found)), write.fua);
        }
        if let Err(why) = write.explains_whole(&self.model) {
            findings.push(Finding::Content { block: write.blocks().start, why });
        }
        findings
    }

    /// After a write settled: its content, as it reads, is what may be; the
    /// model learns that. One that failed may have been done in part.
    pub fn learn(&mut self, write: &Write, failed: bool) -> Vec<Finding> {
        if write.is_known() && !failed {
            self.model.apply(write);
            return Vec::new();
        }
        let mut findings = Vec::new();
        for (block, found) in self.look_at(&write.blocks().collect()) {
            let old = self.model.version(block);
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    findings.push(Finding::Content { block, why: error.to_string() });
                    continue;
                }
            };
            let fits = match failed && found == old {
                true => Ok(()),
                false => write.explains_version(block, &found, &old),
            };
            findings.extend(fits.err().map(|why| Finding::Content { block, why }));
            if found != old {
                self.model.settle(block, found, write.fua && !failed);
            } else if write.fua && !failed {
                self.model.settle(block, old, true);
            }
        }
        if let Err(why) = write.explains_whole(&self.model)
            && !failed
        {
            findings.push(Finding::Content { block: write.blocks().start, why });
        }
        findings
    }

    /// Reads blocks; a lost one is `None`.
    fn look_at(&mut self, blocks: &BTreeSet<u64>) -> BTreeMap<u64, Result<Version, Error>> {
        let mut found = BTreeMap::new();
        let mut left = blocks.iter().copied().peekable();
        while let Some(first) = left.next() {
            let mut end = first + 1;
            while end < first + LOOK && left.next_if_eq(&end).is_some() {
                end += 1;
            }
            if let Ok(bytes) = self.read(first * BLOCK as u64, (end - first) as usize * BLOCK) {
                let versions = bytes.chunks_exact(BLOCK).map(|bytes| Ok(Some(block_of(bytes))));
                found.extend((first..end).zip(versions));
                continue;
            }
            for block in first..end {
                let version = match self.read(block * BLOCK as u64, BLOCK) {
                    Ok(bytes) => Ok(Some(block_of(&bytes))),
                    Err(error) if error.kind == Kind::Lost => Ok(None),
                    Err(error) => Err(error),
                };
                found.insert(block, version);
            }
        }
        found
    }

    /// Everything reads as the model says; any read error is allowed of the
    /// blocks in `lost`.
    pub fn read_all(&mut self, lost: &BTreeSet<u64>) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (block, found) in self.look_at(&(0..self.size() / BLOCK as u64).collect()) {
            let why = match found {
                Ok(found) if found == self.model.version(block) => continue,
                Ok(None) | Err(_) if lost.contains(&block) => continue,
                Ok(None) => Error { kind: Kind::Lost, ..self.error_at(block) }.to_string(),
                Ok(Some(_)) if self.model.is_lost(block) => "is lost no more".to_owned(),
                Ok(Some(_)) => "reads as something else".to_owned(),
                Err(error) => error.to_string(),
            };
            findings.push(Finding::Content { block, why });
        }
        findings
    }

    /// Everything reads as what was taken out of the members before.
    pub fn compare(&mut self, extracted: &Extracted) -> Vec<Finding> {
        let blocks = self.size() / BLOCK as u64;
        if extracted.len() as u64 != self.size() {
            let (len, size) = (extracted.len(), self.size());
            return vec![Finding::Other(format!("extract: {len} bytes of an array of {size}"))];
        }
        let found = self.look_at(&(0..blocks).collect());
        let differ = found.into_iter().filter_map(|(block, found)| {
            let taken = extracted.version(block);
            let why = match found {
                Err(error) => error.to_string(),
                Ok(found) if found == taken => return None,
                Ok(found) => {
                    let what = |version: &Version| if version.is_some() { "there" } else { "lost" };
                    format!("extract: it is {}, on the array {}", what(&taken), what(&found))
                }
            };
            Some(Finding::Content { block, why })
        });
        differ.collect()
    }

    fn error_at(&self, block: u64) -> Error {
        let (op, device) = (stableio_block::OpName::Read, "sim".into());
        Error { kind: Kind::Lost, op, device, at: block * BLOCK as u64, len: BLOCK as u64 }
    }

    /// Nothing is under way and nothing of it is left.
    pub fn leftovers(&mut self) -> Vec<Finding> {
        self.quiet();
        let used = self.pool.used();
        // No member of such a world is wrong without saying so.
        let differed = self.health().blocks_differed.load(Ordering::Relaxed);
        [
            (used > 0).then(|| format!("POOL-1: {used} bytes are held by nobody")),
            (differed > 0).then(|| format!("COMPARE-1: {differed} blocks differed in a scrub")),
        ]
        .into_iter()
        .flatten()
        .map(Finding::Other)
        .collect()
    }

    /// Prints what happens, if anybody wants to know.
    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        if self.shape.trace {
            eprintln!("{:6} {}", self.steps, what());
        }
    }

    /// The world ends; gives what is left of it.
    pub fn stop(mut self, stop: Stop) -> Remains {
        self.note_replaced();
        self.tell(|| format!("{stop:?}"));
        self.note_stop(stop);
        let g = self.array.superblock().geometry;
        let atomic = self.shape.atomic as usize;
        let (mut media, mut others) = (Vec::new(), Vec::new());
        for (role, left) in std::mem::take(&mut self.left_out).into_iter().enumerate() {
            let other = self.incoming[role].take().or(self.replaced[role].take());
            let slots = [self.members[role].take(), other].into_iter().zip(left);
            let mut left = slots.map(|(member, left)| match (member, left) {
                (None, Some(mut medium)) if stop == Stop::Power => {
                    medium.lose_power(BTreeMap::new(), atomic, &mut self.random);
                    Some(medium)
                }
                (None, left) => left,
                (Some(member), _) => {
                    let wreck = match stop {
                        Stop::Death => member.crash(),
                        Stop::Power => member.lose_power(),
                    };
                    self.coverage.note_wreck(&wreck, |at| region(&g, at));
                    Some(wreck.medium)
                }
            });
            media.push(left.next().flatten());
            others.push(left.next().flatten());
        }
        let Self { model, random, coverage, executor, .. } = self;
        drop(executor);
        Remains { media, others, model, random, coverage }
    }

    fn note_stop(&mut self, stop: Stop) {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let health = self.array.health();
        let coverage = &mut self.coverage;
        let rebuilding = self.incoming.iter().flatten().any(|member| !member.is_broken());
        coverage.add(Event::CrashesInRebuild, u64::from(rebuilding));
        let scrubbing = self.scrubbing && health.scrub.how_far().is_some();
        coverage.add(Event::CrashesInScrubs, u64::from(scrubbing));
        coverage.add(Event::PrivateRereads, read(&health.benign_mismatches));
        coverage.add(Event::BlocksMended, read(&health.blocks_mended));
        coverage.add(Event::StripesJoined, read(&health.stripes_joined));
        coverage.add(Event::RowsRecovered, read(&health.rows_recovered));
        coverage.add(Event::LostBlocks, read(&health.blocks_lost));
        coverage.note(match stop {
            Stop::Death => Event::ProcessDeaths,
            Stop::Power => Event::PowerFailures,
        });
    }

    /// The process dies and the array is opened again.
    ///
    /// # Errors
    ///
    /// When it does not open.
    pub fn crash_and_open(self) -> Result<Self, String> {
        let shape = self.shape.clone();
        Self::open(&shape, self.stop(Stop::Death), None)
    }

    /// After a crash, and once the array is open again: what may have more
    /// than one version is looked at; the model learns which it is. Gives the
    /// blocks that are lost, too.
    pub fn absorb_crash(&mut self, crash: &Crash) -> (Vec<Finding>, Vec<u64>) {
        let (mut findings, mut lost) = (Vec::new(), Vec::new());
        for (block, found) in self.look_at(&self.model.at_risk(crash)) {
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    findings.push(Finding::Content { block, why: error.to_string() });
                    continue;
                }
            };
            if let Err(why) = self.model.explains(crash, block, &found) {
                findings.push(Finding::Content { block, why });
            }
            lost.extend(found.is_none().then_some(block));
            self.model.learn(crash, block, found);
        }
        (findings, lost)
    }
}

impl Flight {
    /// Drops the ticket: the request goes on (DEV-1).
    pub fn detach(mut self) -> Write {
        drop(self.ticket.take());
        self.write
    }

    /// Gives the write back and keeps the ticket, unpolled.
    pub fn into_parts(self) -> (Write, Option<Ticket<Outcome>>) {
        (self.write, self.ticket)
    }

    /// Why it failed, where it was seen to.
    pub fn error(&self) -> Option<&Error> {
        self.outcome.as_ref()?.as_ref().err()
    }

    /// The same as a crash meets it, by what was seen of it so far.
    pub fn into_pending(self) -> Pending {
        let settled = matches!(self.outcome, Some(Ok(_)));
        Pending { write: self.detach(), settled }
    }
}

impl Coverage {
    fn note_wreck(&mut self, wreck: &Wreck, region: impl Fn(u64) -> Region) {
        for range in &wreck.under_way {
            self.note(match region(range.start) {
                Region::Superblock => Event::CrashesInSuperblockWrites,
                Region::Log => Event::CrashesInLogWrites,
                Region::Guards => Event::CrashesInGuardWrites,
                Region::Data => Event::CrashesInDataWrites,
            });
        }
        for number in &wreck.torn {
            match region(number * BLOCK as u64) {
                Region::Superblock => {}
                Region::Log => self.note(Event::TornLogBlocks),
                Region::Guards => self.note(Event::TornGuardBlocks),
                Region::Data => self.note(Event::TornDataBlocks),
            }
        }
    }
}

fn poll<T>(ticket: &mut Ticket<Result<T, Error>>) -> Option<Result<T, Error>> {
    match Pin::new(ticket).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
