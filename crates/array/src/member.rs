//! A role's devices, and the operations under way on them.
//!
//! MEMBER-1: an operation on a member that was dropped is given up at once
//! ([`Kind::Stalled`]); what it was stays behind with the device until that
//! is done with it. So does the memory of a read, which must not be looked at
//! any more: the device may still write there. A read into memory that is not
//! ours is waited for.
//!
//! MEMBER-2: a member that is being filled gets every write to the zones that
//! it has, and is read only there.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use stableio_block::{Body, Device, Error, Kind, Op, OpName, Outcome, Reply, Request, Ticket};
use stableio_mem::{BLOCK, Pool, PoolBuf, SgList};

use crate::engine::Engine;
use crate::health::Health;
use crate::superblock::Id;
use crate::twin::{Protection, lacks};

/// A role: its member, and the one that is being filled to take its place.
pub(crate) struct Member {
    pub(crate) device: RefCell<Option<Arc<dyn Device>>>,
    pub(crate) alive: Cell<bool>,
    /// Where it is not: the first log sequence that it may have missed.
    pub(crate) since: Cell<u64>,
    pub(crate) next: RefCell<Option<Incoming>>,
    /// How often its member, and how often an incoming one, was left out: who
    /// waits for an operation compares.
    left_out: [Cell<u64>; 2],
    under_way: RefCell<UnderWay>,
}

/// A member that is being filled.
pub(crate) struct Incoming {
    pub(crate) id: Id,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) lacks: Lacks,
    /// It has the log from this sequence on.
    pub(crate) log_from: u64,
}

/// The zones that a member does not have yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lacks {
    /// All from this one on.
    From(u64),
    /// These.
    Zones(BTreeSet<u64>),
}

/// Operations by number, ascending with time.
#[derive(Default)]
struct UnderWay {
    next: u64,
    /// When each began, in ticks of the watchdog, and who waits for it.
    waiting: BTreeMap<u64, (u64, Waker)>,
}

/// An operation on its way, on one device or on two.
pub(crate) struct Sent {
    member: usize,
    main: Option<(Arc<dyn Device>, Ticket<Outcome>)>,
    next: Option<(Arc<dyn Device>, Ticket<Outcome>)>,
    /// Whether it may be given up: its memory is ours.
    ours: bool,
    /// How often the devices had been left out when it began.
    left_out: [u64; 2],
}

/// One of a role's devices.
#[derive(Clone, Copy)]
enum Which {
    Main,
    Next,
}

impl Lacks {
    pub(crate) fn has(&self, zone: u64) -> bool {
        match self {
            Lacks::From(first) => zone < *first,
            Lacks::Zones(zones) => !zones.contains(&zone),
        }
    }

    /// The first zone that it lacks, of so many.
    pub(crate) fn first(&self, zones: u64) -> Option<u64> {
        match self {
            Lacks::From(first) => Some(*first).filter(|first| *first < zones),
            Lacks::Zones(set) => set.first().copied(),
        }
    }

    /// How many of so many zones it has.
    pub(crate) fn done(&self, zones: u64) -> u64 {
        match self {
            Lacks::From(first) => *first,
            Lacks::Zones(left) => zones - left.len() as u64,
        }
    }

    /// From now on it has this zone, the first that it lacked.
    pub(crate) fn got(&mut self, zone: u64) {
        match self {
            Lacks::From(first) => *first = zone + 1,
            Lacks::Zones(zones) => drop(zones.remove(&zone)),
        }
    }
}

impl Sent {
    /// What a read gave, if it is there without waiting.
    pub(crate) fn now(&mut self) -> Option<Outcome> {
        let place = if self.main.is_some() { &mut self.main } else { &mut self.next };
        let (device, ticket) = place.take()?;
        ticket.now().map_err(|ticket| *place = Some((device, ticket))).ok()
    }
}

impl Member {
    pub(crate) fn new(device: Option<Arc<dyn Device>>, alive: bool, since: u64) -> Self {
        Self {
            alive: Cell::new(alive && device.is_some()),
            device: RefCell::new(device),
            since: Cell::new(since),
            next: RefCell::default(),
            left_out: Default::default(),
            under_way: RefCell::default(),
        }
    }

    fn main(&self) -> Option<Arc<dyn Device>> {
        self.device.borrow().clone().filter(|_| self.alive.get())
    }

    /// The incoming member, if it has what lies at `at`.
    fn incoming_at(&self, zone: Option<u64>) -> Option<Arc<dyn Device>> {
        let next = self.next.borrow();
        let next = next.as_ref()?;
        next.lacks.has(zone?).then(|| next.device.clone())
    }

    /// Lets everybody who waits for an operation look again.
    pub(crate) fn wake(&self) {
        let waiting = std::mem::take(&mut self.under_way.borrow_mut().waiting);
        waiting.into_values().for_each(|(_, waker)| waker.wake());
    }

    /// When the oldest operation that is waited for began.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.under_way.borrow().waiting.values().map(|(tick, _)| *tick).min()
    }
}

impl Engine {
    /// Whether a member takes part.
    pub(crate) fn alive(&self, member: usize) -> bool {
        self.members[member].alive.get()
    }

    /// Whether a member, or the one that takes its place, has a stripe.
    pub(crate) fn holds(&self, member: usize, stripe: u64) -> bool {
        self.alive(member) || self.holds_zone(member, self.geometry.zone_of(stripe))
    }

    pub(crate) fn holds_zone(&self, member: usize, zone: u64) -> bool {
        self.alive(member) || self.members[member].incoming_at(Some(zone)).is_some()
    }

    /// Whether any member is being filled: then what goes to different zones
    /// goes apart.
    pub(crate) fn is_filling(&self) -> bool {
        self.members.iter().any(|role| role.next.borrow().is_some())
    }

    fn begin(&self, member: usize, at: u64, op: Op, ours: bool) -> Sent {
        let role = &self.members[member];
        let request = |op| Request::of(op);
        let zone = self.geometry.zone_at(at);
        let left_out = role.left_out.each_ref().map(Cell::get);
        let (main, next) = (role.main(), role.incoming_at(zone));
        let next = next.filter(|_| main.is_none() || !lacks(Protection::WritesToIncoming));
        let (main, next) = match (main, next, &op) {
            (Some(main), _, Op::Read { .. } | Op::Map { .. }) => (Some(main), None),
            (main, next, _) => (main, next),
        };
        let again = match &op {
            _ if main.is_none() || next.is_none() => None,
            Op::Write { at, body: Body::Segments(list), fua, .. } => {
                Some(write(*at, list.duplicate(), *fua))
            }
            Op::Discard { at, len } => Some(Op::Discard { at: *at, len: *len }),
            _ => unreachable!("only writes and discards go to two devices"),
        };
        match (main, next) {
            (Some(main), next) => {
                let next = next.zip(again).map(|(device, op)| on(device, request(op)));
                Sent { member, main: Some(on(main, request(op))), next, ours, left_out }
            }
            (None, Some(next)) => {
                Sent { member, main: None, next: Some(on(next, request(op))), ours, left_out }
            }
            (None, None) => Sent { member, main: None, next: None, ours, left_out },
        }
    }

    /// Begins a read of a member into memory of ours.
    pub(crate) fn read_member(&self, member: usize, at: u64, into: SgList) -> Sent {
        let into = stableio_block::Into::Segments(into);
        self.begin(member, at, Op::Read { at, into }, true)
    }

    /// Begins a read of a member into memory of somebody else's.
    pub(crate) fn read_member_foreign(&self, member: usize, at: u64, into: SgList) -> Sent {
        Sent { ours: false, ..self.read_member(member, at, into) }
    }

    /// Begins a write to a member.
    pub(crate) fn write_member(&self, member: usize, at: u64, from: SgList) -> Sent {
        self.begin(member, at, write(at, from, false), true)
    }

    /// Begins a write to a member that is durable when it settles.
    pub(crate) fn write_durably(&self, member: usize, at: u64, from: SgList) -> Sent {
        self.begin(member, at, write(at, from, true), true)
    }

    /// Begins a write to the member that is being filled, to a zone that it
    /// does not have yet.
    pub(crate) fn write_incoming(&self, member: usize, at: u64, from: SgList) -> Sent {
        let role = &self.members[member];
        let device = role.next.borrow().as_ref().map(|next| next.device.clone());
        let next = device.map(|device| on(device, Request::of(write(at, from, false))));
        let left_out = role.left_out.each_ref().map(Cell::get);
        Sent { member, main: None, next, ours: true, left_out }
    }

    /// Begins a write of the log to all members that are being filled: when
    /// one takes its place, what the log still holds must be there too.
    pub(crate) fn write_log_to_incoming(&self, at: u64, from: &SgList) -> Vec<Sent> {
        let mut sent = Vec::new();
        for (member, role) in self.members.iter().enumerate() {
            let device = role.next.borrow().as_ref().map(|next| next.device.clone());
            let Some(device) = device else { continue };
            let left_out = role.left_out.each_ref().map(Cell::get);
            let next = on(device, Request::of(write(at, from.duplicate(), true)));
            sent.push(Sent { member, main: None, next: Some(next), ours: true, left_out });
        }
        sent
    }

    /// Asks a member which parts of a range hold data.
    pub(crate) fn map_member(&self, member: usize, at: u64, len: u64) -> Sent {
        self.begin(member, at, Op::Map { at, len }, true)
    }

    /// Tells a member that a range is not needed.
    pub(crate) fn discard_member(&self, member: usize, at: u64, len: u64) -> Sent {
        self.begin(member, at, Op::Discard { at, len }, true)
    }

    /// Begins a flush of both of a role's devices.
    pub(crate) fn flush_member(&self, member: usize) -> Sent {
        let role = &self.members[member];
        let next = role.next.borrow().as_ref().map(|next| next.device.clone());
        let begin = |device: Arc<dyn Device>| on(device, Request::flush());
        let left_out = role.left_out.each_ref().map(Cell::get);
        Sent { member, main: role.main().map(begin), next: next.map(begin), ours: true, left_out }
    }

    /// What a read or a map gave.
    pub(crate) async fn arrived(&self, mut sent: Sent) -> Result<Reply, Error> {
        let Sent { member, ours, left_out: [main, next], .. } = sent;
        match (sent.main.take(), sent.next.take()) {
            (Some((_, ticket)), _) => self.outcome(member, (Which::Main, main), ticket, ours).await,
            (None, Some((_, ticket))) => {
                self.outcome(member, (Which::Next, next), ticket, ours).await
            }
            (None, None) => Err(self.member_error(member, Kind::Stopped)),
        }
    }

    /// Waits until a write, discard or flush has settled. A device that
    /// failed is left out from now on; memory that vanished under a promise
    /// is handed back.
    pub(crate) async fn settled(&self, sent: Sent) -> Option<Kind> {
        let Sent { member, main, next, left_out, .. } = sent;
        let mut fault = None;
        let both = [(Which::Main, main), (Which::Next, next)];
        for (which, sent) in both {
            let Some((device, ticket)) = sent else { continue };
            let before = left_out[which as usize];
            if let Err(error) = self.outcome(member, (which, before), ticket, true).await {
                match error.is_memory() {
                    true => fault = Some(error.kind),
                    false => self.drop_device(member, &device, &error),
                }
            }
        }
        fault
    }

    /// Leaves a device out that failed, in whichever place it is by now: one
    /// that was being filled may have become the member meanwhile.
    fn drop_device(&self, member: usize, device: &Arc<dyn Device>, why: &Error) {
        let role = &self.members[member];
        let is = |other: Option<&Arc<dyn Device>>| other.is_some_and(|d| Arc::ptr_eq(d, device));
        let is_next = is(role.next.borrow().as_ref().map(|next| &next.device));
        let is_main = is(role.device.borrow().as_ref());
        if is_next {
            self.drop_incoming(member, why);
        } else if is_main {
            self.drop_member(member, why);
        }
    }

    /// Runs a write or flush on one of a role's devices, to its end.
    pub(crate) async fn on_device(
        &self,
        member: usize,
        to_next: bool,
        request: Request,
    ) -> Result<(), Error> {
        let role = &self.members[member];
        let (device, which) = match to_next {
            true => (role.next.borrow().as_ref().map(|n| n.device.clone()), Which::Next),
            false => (role.main(), Which::Main),
        };
        let device = device.ok_or_else(|| self.member_error(member, Kind::Stopped))?;
        let before = role.left_out[which as usize].get();
        self.outcome(member, (which, before), device.submit(request), true).await.map(drop)
    }

    /// Waits for a ticket, or until its member was dropped (MEMBER-1).
    async fn outcome(
        &self,
        member: usize,
        (which, before): (Which, u64),
        mut ticket: Ticket<Outcome>,
        ours: bool,
    ) -> Outcome {
        let role = &self.members[member];
        let left_out = &role.left_out[which as usize];
        let gone = || left_out.get() != before;
        let mut number = None;
        let done = poll_fn(|cx| {
            if let Poll::Ready(done) = Pin::new(&mut ticket).poll(cx) {
                return Poll::Ready(Some(done));
            }
            if ours && gone() {
                return Poll::Ready(None);
            }
            let mut under_way = role.under_way.borrow_mut();
            let number = *number.get_or_insert_with(|| {
                under_way.next += 1;
                under_way.next
            });
            let entry = under_way.waiting.entry(number);
            let entry = entry.or_insert_with(|| (self.now.get(), cx.waker().clone()));
            if !entry.1.will_wake(cx.waker()) {
                entry.1 = cx.waker().clone();
            }
            Poll::Pending
        })
        .await;
        if let Some(number) = number {
            role.under_way.borrow_mut().waiting.remove(&number);
        }
        done.unwrap_or_else(|| Err(self.member_error(member, Kind::Stalled)))
    }

    fn member_error(&self, member: usize, kind: Kind) -> Error {
        let device = self.health.members[member].name().into();
        Error { kind, op: OpName::Read, device, at: 0, len: 0 }
    }

    /// Reads one block of a member into a part of `buf`; says whether it came.
    /// A failed read is charged to the member.
    pub(crate) async fn read_block(
        &self,
        member: usize,
        at: u64,
        buf: &mut PoolBuf,
        to: usize,
    ) -> bool {
        // By way of a block of its own, which stays behind if need be.
        let memory = self.meta.reserve(BLOCK).await;
        let mut block = memory.expect("smaller than the pool").take(BLOCK);
        match self.arrived(self.read_member(member, at, block.target(0..BLOCK))).await {
            Ok(_) => {
                buf.copy_from(to, block.freeze().contiguous(0, BLOCK));
                true
            }
            Err(error) => {
                self.note_read_error(member, &error);
                false
            }
        }
    }

    /// Memory in place of what a read that was given up keeps. A member is
    /// given up once, so this is rare, and bounded by what was under way.
    ///
    /// # Panics
    ///
    /// When the system has no memory.
    pub(crate) fn instead(&self, len: usize) -> PoolBuf {
        let pool = Pool::new(len).expect("memory for what was under way");
        let memory = pool.try_reserve(len).expect("as large as the pool");
        memory.expect("nobody else has of it").take(len)
    }

    /// Leaves a member out from now on.
    /// [`settle_members`](Self::settle_members) must follow before anything
    /// succeeds because of it (ENG-1).
    pub(crate) fn drop_member(&self, member: usize, why: &Error) {
        Health::add(&self.health.members[member].write_errors);
        let name = self.health.members[member].name();
        self.take_out(member, &format!("member {name} dropped: {why}"));
    }

    /// The same without a fault of its own.
    pub(crate) fn take_out(&self, member: usize, event: &str) {
        let role = &self.members[member];
        if role.alive.replace(false) {
            role.left_out[Which::Main as usize].set(role.left_out[Which::Main as usize].get() + 1);
            role.since.set(self.log.tail());
            // What is under way keeps it open until that is done.
            *role.device.borrow_mut() = None;
            self.health.members[member].in_sync.store(false, Ordering::Relaxed);
            self.health.event(event.to_owned());
            self.want_save();
            role.wake();
            self.log.changed();
        }
    }

    /// The same for a member that was being filled.
    pub(crate) fn drop_incoming(&self, member: usize, why: &Error) {
        let role = &self.members[member];
        if role.next.borrow_mut().take().is_some() {
            role.left_out[Which::Next as usize].set(role.left_out[Which::Next as usize].get() + 1);
            self.health.members[member].set_next(None);
            let name = self.health.members[member].name();
            self.health.event(format!("the replacement of {name} dropped: {why}"));
            self.want_save();
            role.wake();
        }
    }

    /// A member whose oldest operation is older than `patience` ticks is left
    /// out: its operations stay behind (MEMBER-1).
    pub(crate) fn watch(&self, patience: u64) {
        let now = self.now.get() + 1;
        self.now.set(now);
        for (member, role) in self.members.iter().enumerate() {
            if role.oldest().is_some_and(|tick| tick + patience < now) {
                self.give_up(member);
            }
        }
    }

    /// Leaves out a member that does not answer.
    pub(crate) fn give_up(&self, member: usize) {
        let error = self.member_error(member, Kind::Stalled);
        let role = &self.members[member];
        if role.next.borrow().is_some() {
            self.drop_incoming(member, &error);
        }
        self.drop_member(member, &error);
    }
}

/// Begins a request on a device, which whoever waits for it must know.
fn on(device: Arc<dyn Device>, request: Request) -> (Arc<dyn Device>, Ticket<Outcome>) {
    let ticket = device.submit(request);
    (device, ticket)
}

fn write(at: u64, list: SgList, fua: bool) -> Op {
    Op::Write { at, body: Body::Segments(list), sums: None, fua }
}
