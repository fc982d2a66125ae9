//! The engine: an array's members, tokens, pages and log on one worker.
//!
//! ENG-1: a request succeeds without a member only after the superblocks of
//! the others durably record that it is missing.
//!
//! ENG-2: more missing members than the redundancy absorbs are never recorded:
//! the array stops, and assembles again when they are back.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_block::sync::Condition;
use stableio_block::{
    Body, Device, Error, Kind, Op, Outcome, Reply, Request, Ticket, path::Traffic,
};
use stableio_mem::{BLOCK, Pool, PoolBuf, SgList, Sums};

use crate::geometry::Geometry;
use crate::health::Health;
use crate::log::Log;
use crate::pages::Pages;
use crate::superblock::{Id, RoleState, Superblock};
use crate::token::Tokens;

/// An assembled array. Lives on its worker's thread.
pub(crate) struct Engine {
    pub(crate) array: Id,
    pub(crate) geometry: Geometry,
    pub(crate) members: Vec<Member>,
    pub(crate) tokens: Tokens,
    pub(crate) pages: Pages,
    pub(crate) log: Log,
    pub(crate) health: Arc<Health>,
    pub(crate) traffic: Arc<Traffic>,
    /// For pages and log blocks on their way. Whoever holds of it waits for
    /// nothing but members.
    pub(crate) meta: Arc<Pool>,
    /// For blocks that a read has to mend. Reserved before the token.
    pub(crate) repair: Arc<Pool>,
    /// For discards: they come without memory, and hold nothing else.
    pub(crate) scratch: Arc<Pool>,
    superblock: RefCell<Superblock>,
    saves: Saves,
}

/// A role's device, where it has one.
pub(crate) struct Member {
    pub(crate) device: Option<Arc<dyn Device>>,
    alive: Cell<bool>,
}

/// Superblock writes: one at a time, each for all changes before it.
#[derive(Default)]
struct Saves {
    wanted: Cell<u64>,
    done: Cell<u64>,
    busy: Cell<bool>,
    changed: Condition,
}

/// What an engine is made of.
pub(crate) struct Parts {
    pub(crate) superblock: Superblock,
    pub(crate) devices: Vec<Option<Arc<dyn Device>>>,
    pub(crate) health: Arc<Health>,
    pub(crate) traffic: Arc<Traffic>,
    /// Bytes for cached pages of tuples.
    pub(crate) page_cache: usize,
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> std::io::Result<Self> {
        let Parts { superblock, devices, health, traffic, page_cache } = parts;
        let geometry = superblock.geometry;
        let members: Vec<Member> = devices
            .into_iter()
            .zip(&superblock.roles)
            .map(|(device, (_, state))| {
                let alive = device.is_some() && *state == RoleState::InSync;
                Member { alive: Cell::new(alive), device }
            })
            .collect();
        for (member, health) in members.iter().zip(&health.members) {
            health.in_sync.store(member.alive.get(), Ordering::Relaxed);
        }
        Ok(Self {
            array: superblock.array,
            geometry,
            members,
            tokens: Tokens::default(),
            pages: Pages::new(&geometry, page_cache),
            log: Log::new(superblock.epoch),
            health,
            traffic,
            meta: Pool::new(4 << 20)?,
            repair: Pool::new(1 << 20)?,
            scratch: Pool::new(32 << 20)?,
            superblock: RefCell::new(superblock),
            saves: Saves::default(),
        })
    }

    /// Whether a member takes part.
    pub(crate) fn alive(&self, member: usize) -> bool {
        self.members[member].alive.get()
    }

    /// Members that do not.
    pub(crate) fn missing(&self) -> usize {
        self.members.iter().filter(|m| !m.alive.get()).count()
    }

    /// Fails when more are missing than the redundancy absorbs.
    pub(crate) fn check_redundancy(&self) -> Result<(), Kind> {
        let missing = self.missing();
        if missing > self.geometry.level.redundancy() {
            Err(Kind::Degraded { missing })
        } else {
            Ok(())
        }
    }

    /// Runs a request that has passed the stack's checks. Reads have a way of
    /// their own, so that their futures stay small.
    pub(crate) async fn run(&self, request: Request) -> Result<Reply, Kind> {
        self.check_redundancy()?;
        let Request { op, memory } = request;
        match op {
            Op::Read { at, into } => self.read(at, into, memory).await,
            Op::Write { at, body, sums, fua } => {
                let memory = memory.ok_or(Kind::Unsupported)?;
                self.write(at, body, sums, memory).await?;
                self.flush_if(fua).await
            }
            other => Box::pin(self.run_rare(other)).await,
        }
    }

    async fn run_rare(&self, op: Op) -> Result<Reply, Kind> {
        match op {
            Op::WriteZeroes { at, len, fua } => {
                self.unwrite(at, len).await?;
                self.flush_if(fua).await
            }
            Op::Discard { at, len } => self.unwrite(at, len).await.map(|()| Reply::Done),
            Op::Flush => self.flush_if(true).await,
            Op::Map { at, len } => self.map(at, len).await.map(Reply::Map),
            Op::Read { .. } | Op::Write { .. } => unreachable!("run by `run`"),
        }
    }

    async fn flush_if(&self, wanted: bool) -> Result<Reply, Kind> {
        if wanted {
            Box::pin(self.flush()).await?;
        }
        Ok(Reply::Done)
    }

    /// Makes everything durable that settled before, on every member; one
    /// that can not is dropped.
    pub(crate) async fn flush(&self) -> Result<(), Kind> {
        let tickets: Vec<_> = (0..self.members.len())
            .filter(|m| self.alive(*m))
            .map(|m| (m, self.submit(m, Request::flush())))
            .collect();
        for (member, ticket) in tickets {
            if let Err(error) = ticket.await {
                self.drop_member(member, &error);
            }
        }
        self.settle_members().await
    }

    fn submit(&self, member: usize, request: Request) -> Ticket<Outcome> {
        let device = self.members[member].device.as_ref().expect("an alive member has a device");
        device.submit(request)
    }

    /// Begins a read of a member.
    pub(crate) fn read_member(&self, member: usize, at: u64, into: SgList) -> Ticket<Outcome> {
        let into = stableio_block::Into::Segments(into);
        self.submit(member, Request { op: Op::Read { at, into }, memory: None })
    }

    /// Begins a write to a member.
    pub(crate) fn write_member(&self, member: usize, at: u64, from: SgList) -> Ticket<Outcome> {
        let body = Body::Segments(from);
        self.submit(
            member,
            Request { op: Op::Write { at, body, sums: Sums::default(), fua: false }, memory: None },
        )
    }

    /// Asks a member which parts of a range hold data.
    pub(crate) fn map_member(&self, member: usize, at: u64, len: u64) -> Ticket<Outcome> {
        self.submit(member, Request { op: Op::Map { at, len }, memory: None })
    }

    /// Tells a member that a range is not needed.
    pub(crate) fn discard_member(&self, member: usize, at: u64, len: u64) -> Ticket<Outcome> {
        self.submit(member, Request { op: Op::Discard { at, len }, memory: None })
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
        match self.read_member(member, at, buf.target(to..to + BLOCK)).await {
            Ok(_) => true,
            Err(error) => {
                Health::add(&self.health.members[member].read_errors);
                self.health.event(format!("read error: {error}"));
                false
            }
        }
    }

    /// Leaves a member out from now on. [`settle_members`](Self::settle_members)
    /// must follow before anything succeeds because of it (ENG-1).
    pub(crate) fn drop_member(&self, member: usize, why: &Error) {
        Health::add(&self.health.members[member].write_errors);
        if self.members[member].alive.replace(false) {
            self.health.members[member].in_sync.store(false, Ordering::Relaxed);
            self.health
                .event(format!("member {} dropped: {why}", self.health.members[member].name));
            self.saves.wanted.set(self.saves.wanted.get() + 1);
        }
    }

    /// Waits until every dropped member is recorded as missing on the others.
    pub(crate) async fn settle_members(&self) -> Result<(), Kind> {
        if self.saves.done.get() < self.saves.wanted.get() {
            // Rare, and large: kept out of the futures of all requests.
            Box::pin(self.save_members()).await?;
        }
        self.check_redundancy()
    }

    async fn save_members(&self) -> Result<(), Kind> {
        while self.saves.done.get() < self.saves.wanted.get() {
            self.check_redundancy()?;
            if self.saves.busy.get() {
                self.saves.changed.wait_for(|| (!self.saves.busy.get()).then_some(())).await;
                continue;
            }
            self.saves.busy.set(true);
            let covers = self.saves.wanted.get();
            self.save_superblocks(|_| {}).await;
            self.saves.done.set(covers);
            self.saves.busy.set(false);
            self.saves.changed.notify();
        }
        Ok(())
    }

    /// Marks the array as in use (with a new epoch) or as settled.
    pub(crate) async fn mark(&self, in_use: bool) -> Result<(), Kind> {
        self.save_superblocks(|superblock| superblock.in_use = in_use).await;
        self.settle_members().await
    }

    /// Writes both superblock copies of every member that takes part.
    async fn save_superblocks(&self, change: impl FnOnce(&mut Superblock)) {
        let superblock = {
            let mut superblock = self.superblock.borrow_mut();
            change(&mut superblock);
            superblock.generation += 1;
            for (member, role) in self.members.iter().zip(&mut superblock.roles) {
                if !member.alive.get() {
                    role.1 = RoleState::Missing;
                }
            }
            superblock.clone()
        };
        if superblock.missing() > self.geometry.level.redundancy() {
            return;
        }
        for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
            let mut own = superblock.clone();
            own.role = member;
            own.member = own.roles[member].0;
            if let Err(error) = self.write_superblock(member, &own).await {
                self.drop_member(member, &error);
            }
        }
    }

    async fn write_superblock(&self, member: usize, superblock: &Superblock) -> Result<(), Error> {
        let block = superblock.encode();
        let mut memory = self.meta.reserve(BLOCK).await.expect("smaller than the pool");
        let mut buf = memory.take(BLOCK);
        buf.copy_from(0, &block[..]);
        let buf = buf.freeze();
        for at in [0, self.geometry.second_superblock_at()] {
            self.write_member(member, at, buf.source()).await?;
            // One copy is durable before the other is touched.
            self.submit(member, Request::flush()).await?;
        }
        Ok(())
    }
}
