//! One array with its members and its program, step by step.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use stableio_array::array::ArrayOptions;
use stableio_array::superblock::Id;
use stableio_array::{Array, Geometry, Health, Level, RoleState, Superblock, assemble};
use stableio_block::exec::Executor;
use stableio_block::{Device, Error, Into, Op, Outcome, Reply, Request, Stack, Ticket};
use stableio_mem::{BLOCK, Grant, Pool};

use crate::check::{Checker, Finding, probe};
use crate::image::Image;
use crate::member::SimMember;
use crate::program::{Program, Source};
use crate::random::Random;
use crate::write::{Content, Write};

/// What a world is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Redundancy.
    pub level: Level,
    /// Members.
    pub members: usize,
    /// Bytes of a chunk.
    pub chunk: u64,
    /// Bytes of a member.
    pub member_size: u64,
    /// Bytes that members want memory aligned to.
    pub memory_align: u32,
    /// Bytes of the requests' pool.
    pub pool: usize,
    /// Whether the program's memory is declared stable, which is a lie: for
    /// the twins.
    pub lie: bool,
    /// Whether to open without recovery: for a twin.
    pub forget_crash: bool,
}

impl Shape {
    /// RAID5 over so many members.
    pub fn raid5(members: usize) -> Self {
        Self {
            level: Level::Raid5,
            members,
            chunk: 16 << 10,
            member_size: 5 << 20,
            memory_align: 1,
            pool: 16 << 20,
            lie: false,
            forget_crash: false,
        }
    }

    /// One member.
    pub fn single() -> Self {
        Self { level: Level::Single, members: 1, ..Self::raid5(3) }
    }

    /// Members as they are after creation.
    ///
    /// # Panics
    ///
    /// When there is no such array.
    pub fn create(&self, random: &mut Random) -> Vec<Option<Image>> {
        let geometry = Geometry::new(self.level, self.members, self.chunk, self.member_size)
            .expect("a shape that can be");
        let mut id = || Id(random.bytes(16).try_into().expect("16 bytes"));
        let array = id();
        let roles: Vec<_> = (0..self.members).map(|_| (id(), RoleState::InSync)).collect();
        let image = |role: usize| {
            let superblock = Superblock {
                array,
                name: "sim".into(),
                member: roles[role].0,
                role,
                generation: 1,
                epoch: 0,
                in_use: false,
                created: 0,
                geometry,
                roles: roles.clone(),
            };
            let mut image = Image::default();
            for at in [0, geometry.second_superblock_at()] {
                image.write(at, &superblock.encode()[..]);
            }
            Some(image)
        };
        (0..self.members).map(image).collect()
    }
}

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
    pub model: Image,
    /// Steps made.
    pub steps: u64,
    shape: Shape,
    executor: Executor,
}

/// A write under way.
pub struct Flight {
    /// What is written.
    pub write: Write,
    ticket: Option<Ticket<Outcome>>,
    outcome: Option<Outcome>,
}

/// Runs a world on a thread of its own: an open array belongs to its thread,
/// and what a crash leaves behind goes with that.
pub fn alone<T: Send>(world: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(world).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl World {
    /// A new array.
    ///
    /// # Panics
    ///
    /// When it can not be opened.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let images = shape.create(&mut random);
        Self::open(shape, random, images, Image::default()).expect("a new array opens")
    }

    /// Opens what is on these images; `model` is what they should read as.
    ///
    /// # Errors
    ///
    /// Why they do not assemble, or the array did not open.
    pub fn open(
        shape: &Shape,
        mut random: Random,
        images: Vec<Option<Image>>,
        model: Image,
    ) -> Result<Self, String> {
        let probes: Vec<_> = images
            .iter()
            .enumerate()
            .filter_map(|(role, image)| probe(image.as_ref()?, role, shape.member_size))
            .collect();
        let mut assembly = assemble(&probes, None).map_err(|e| e.to_string())?;
        assembly.crashed &= !shape.forget_crash;
        let executor = Executor::new(|| {});
        let mut members = Vec::new();
        for (role, (image, path)) in images.into_iter().zip(&assembly.members).enumerate() {
            let new = |image| {
                let (name, size) = (format!("m{role}"), shape.member_size);
                let (random, worker) = (random.fork(), executor.handle());
                Arc::new(SimMember::new(&name, image, size, shape.memory_align, random, worker))
            };
            members.push(image.filter(|_| path.is_some()).map(new));
        }
        let devices = members.iter().map(|m| m.clone().map(|m| m as Arc<dyn Device>)).collect();
        let names = (0..members.len()).map(|role| format!("m{role}")).collect();
        let handle = executor.handle();
        let (array, opened) =
            Array::begin(&assembly, devices, names, ArrayOptions::default(), &handle);
        let pool = Pool::new(shape.pool).map_err(|e| e.to_string())?;
        let mut stack = Stack::new("sim", array.device().clone(), pool.clone(), handle);
        if shape.lie {
            stack = stack.with_grant(Grant::by_administrator());
        }
        let mut world = Self {
            random,
            program: Program::default(),
            members,
            array,
            stack,
            pool,
            model,
            steps: 0,
            shape: shape.clone(),
            executor,
        };
        world.finish(opened).map_err(|e| e.to_string())?;
        Ok(world)
    }

    /// One step: the program's turn, then one ready task, by choice. False
    /// when none is ready.
    pub fn step(&mut self) -> bool {
        self.steps += 1;
        self.program.turn(&mut self.random);
        let Self { executor, random, .. } = self;
        executor.enter(|| executor.run_one(|ready| random.below(ready as u64) as usize))
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

    /// Bytes of the array.
    pub fn size(&self) -> u64 {
        self.stack.limits().size
    }

    /// Counters and events.
    pub fn health(&self) -> &Health {
        self.array.health()
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
        write.apply(&mut self.model);
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
        let ticket = self.stack.submit(Request::flush());
        self.finish(ticket).expect("a flush of a sound array");
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
        let request = Request { op: Op::Read { at, into: into_foreign }, memory: None };
        self.program.race(into.buffer());
        let ticket = self.stack.submit(request);
        let outcome = self.finish(ticket);
        self.program.rest(into.buffer());
        outcome.map(drop)
    }

    /// What the members hold now, for the checker; without those that broke
    /// down or were dropped.
    pub fn checker(&self) -> Checker {
        let image = |(role, member): (usize, &Option<Arc<SimMember>>)| {
            let in_sync = self.health().members[role].in_sync.load(Ordering::Relaxed);
            member.as_ref().filter(|_| in_sync).map(|m| m.live())
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
            if let Err(why) = write.explains(block, &found, self.model.block(block)) {
                findings.push(Finding::Content { block, why });
            }
            self.model.set_block(block, &found);
        }
        if let Err(why) = write.explains_whole(&self.model) {
            findings.push(Finding::Content { block: write.blocks().start, why });
        }
        findings
    }

    /// Everything reads as the model says; a read error is a finding except
    /// of the blocks in `lost`.
    pub fn read_all(&mut self, lost: &BTreeSet<u64>) -> Vec<Finding> {
        let mut findings = Vec::new();
        let blocks = self.size() / BLOCK as u64;
        let step = 16;
        for first in (0..blocks).step_by(step) {
            let count = (step as u64).min(blocks - first);
            let same = |world: &mut Self, first: u64, count: u64| {
                let found = world.read(first * BLOCK as u64, count as usize * BLOCK)?;
                let mut want = vec![0; found.len()];
                world.model.read(first * BLOCK as u64, &mut want);
                Ok::<bool, Error>(found == want)
            };
            if same(self, first, count) == Ok(true) {
                continue;
            }
            for block in first..first + count {
                let why = match same(self, block, 1) {
                    Ok(true) => continue,
                    Ok(false) => "reads as something else".to_owned(),
                    Err(_) if lost.contains(&block) => continue,
                    Err(error) => error.to_string(),
                };
                findings.push(Finding::Content { block, why });
            }
        }
        findings
    }

    /// Nothing is under way and nothing of it is left.
    pub fn leftovers(&mut self) -> Vec<Finding> {
        self.quiet();
        match self.pool.used() {
            0 => Vec::new(),
            used => vec![Finding::Other(format!("POOL-1: {used} bytes are held by nobody"))],
        }
    }

    /// The process dies (SIM-4); gives what is left of it.
    pub fn crash(self) -> (Vec<Option<Image>>, Image, Random) {
        let images = self.members.iter().map(|m| m.as_ref().map(|m| m.crash())).collect();
        let Self { model, random, executor, .. } = self;
        drop(executor);
        (images, model, random)
    }

    /// The process dies and the array is opened again.
    ///
    /// # Errors
    ///
    /// When it does not open.
    pub fn crash_and_open(self) -> Result<Self, String> {
        let shape = self.shape.clone();
        let (images, model, random) = self.crash();
        Self::open(&shape, random, images, model)
    }

    /// After a crash each block of a write that was under way is old or new;
    /// lost where `may_be_lost`. The model learns which.
    pub fn absorb_crash(&mut self, write: &Write, may_be_lost: bool) -> (Vec<Finding>, Vec<u64>) {
        let (mut findings, mut lost) = (Vec::new(), Vec::new());
        for block in write.blocks() {
            let found = match self.read(block * BLOCK as u64, BLOCK) {
                Ok(found) => found,
                Err(error) => {
                    lost.push(block);
                    if !may_be_lost {
                        let why = format!("neither old nor new: {error}");
                        findings.push(Finding::Content { block, why });
                    }
                    continue;
                }
            };
            let old = self.model.block(block);
            if found != old[..]
                && let Err(why) = write.explains(block, &found, old)
            {
                findings.push(Finding::Content { block, why: format!("not old, and: {why}") });
            }
            self.model.set_block(block, &found);
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
}

fn poll<T>(ticket: &mut Ticket<Result<T, Error>>) -> Option<Result<T, Error>> {
    match Pin::new(ticket).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
