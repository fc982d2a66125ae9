//! One array with its members and its program, step by step.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use stableio_array::array::ArrayOptions;
use stableio_array::superblock::Id;
use stableio_array::{Array, Attached, Health, TendError};
use stableio_block::exec::Executor;
use stableio_block::{Device, Error, Into, Op, Outcome, Reply, Request, Stack, Ticket};
use stableio_mem::{Grant, Pool};

use crate::coverage::{Coverage, Event};
use crate::image::Image;
use crate::medium::Medium;
use crate::member::SimMember;
use crate::model::{Model, Pending};
use crate::program::{Program, Source};
use crate::protection::Protection;
use crate::random::Random;
use crate::shape::Shape;
use crate::write::{Content, Write};

mod end;
mod look;

use end::name;
pub use end::{Remains, Stop};

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

    /// Prints what happens, if anybody wants to know.
    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        if self.shape.trace {
            eprintln!("{:6} {}", self.steps, what());
        }
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

fn poll<T>(ticket: &mut Ticket<Result<T, Error>>) -> Option<Result<T, Error>> {
    match Pin::new(ticket).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
