//! The engine: an array's members, tokens, pages and log on one worker.
//!
//! ENG-1: a request succeeds without a member only after the superblocks of
//! the others durably record that it is missing.
//!
//! ENG-2: more missing members than the redundancy absorbs are never recorded:
//! the array stops, and assembles again when they are back.
//!
//! ENG-3: what a flush made durable is what had settled when it began, and
//! only that moves the log's durable mark and its tail (LOG-2).
//!
//! ENG-4: when an array is closed nothing of it is under way, and nothing of
//! it reaches the members any more: somebody else may have them.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_block::{Device, Error, Kind, Op, Reply, Request, exec, path::Traffic};
use stableio_mem::Pool;

use crate::geometry::Geometry;
use crate::health::{Health, Often};
use crate::join::Joiner;
use crate::log::Log;
use crate::member::Member;
use crate::pages::Pages;
use crate::roles::Saves;
use crate::superblock::{Id, RoleState, Superblock};
use crate::token::Tokens;
use crate::twin::{Protection, lacks};

/// An assembled array. Lives on its worker's thread.
pub(crate) struct Engine {
    pub(crate) array: Id,
    pub(crate) geometry: Geometry,
    pub(crate) atomic_unit: u32,
    /// Whether guards are kept. Only what can not be asked of a tuple
    /// (TUPLE-2) asks this.
    pub(crate) checksums: bool,
    pub(crate) members: Vec<Member>,
    pub(crate) tokens: Tokens,
    pub(crate) joiner: Joiner,
    pub(crate) pages: Pages,
    pub(crate) log: Log,
    pub(crate) health: Arc<Health>,
    pub(crate) traffic: Arc<Traffic>,
    /// For pages and log blocks on their way. Whoever holds of it waits for
    /// nothing but members.
    pub(crate) meta: Arc<Pool>,
    /// For blocks that a read has to mend. Reserved before the token.
    pub(crate) repair: Arc<Pool>,
    /// For discards, rebuild and scrub: they come without memory, and hold
    /// nothing else.
    pub(crate) scratch: Arc<Pool>,
    pub(crate) superblock: RefCell<Superblock>,
    pub(crate) saves: Saves,
    pub(crate) tending: crate::tend::Tending,
    /// Ticks of the watchdog.
    pub(crate) now: Cell<u64>,
    /// While it is, copies of tuples may differ: the crash cut them short.
    pub(crate) recovering: Cell<bool>,
    checkpointing: Cell<bool>,
    me: Weak<Engine>,
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
    pub(crate) fn new(parts: Parts) -> std::io::Result<Rc<Self>> {
        let Parts { superblock, devices, health, traffic, page_cache } = parts;
        let geometry = superblock.geometry;
        let members: Vec<Member> = devices
            .into_iter()
            .zip(&superblock.roles)
            .map(|(device, role)| Member::new(device, role.state == RoleState::InSync, role.since))
            .collect();
        for (member, health) in members.iter().zip(&health.members) {
            health.in_sync.store(member.alive.get(), Ordering::Relaxed);
        }
        let meta = Pool::new(8 << 20)?;
        let repair = Pool::new(1 << 20)?;
        let scratch = Pool::new(32 << 20)?;
        let log = Log::new(&geometry, superblock.log, superblock.epoch, superblock.log_from);
        let log_blocks = if superblock.log { u64::from(geometry.log_blocks) } else { 0 };
        health.log_blocks.store(log_blocks, Ordering::Relaxed);
        Ok(Rc::new_cyclic(|me| Self {
            array: superblock.array,
            geometry,
            atomic_unit: superblock.atomic_unit,
            checksums: superblock.checksums,
            members,
            tokens: Tokens::default(),
            joiner: Joiner::default(),
            pages: Pages::new(&geometry, superblock.checksums, page_cache),
            log,
            health,
            traffic,
            meta,
            repair,
            scratch,
            superblock: RefCell::new(superblock),
            saves: Saves::default(),
            tending: crate::tend::Tending::default(),
            now: Cell::new(0),
            recovering: Cell::new(false),
            checkpointing: Cell::new(false),
            me: me.clone(),
        }))
    }

    /// Recovers after a crash, marks the array as in use, and takes up what
    /// was being filled.
    pub(crate) async fn open(
        &self,
        crashed: bool,
        history: u64,
        incoming: Vec<Option<(String, Arc<dyn Device>)>>,
    ) -> Result<(), Kind> {
        let (epoch, from, scrubbing) = {
            let superblock = self.superblock.borrow();
            (superblock.epoch, superblock.log_from, superblock.scrub.is_some())
        };
        let mut next = from;
        let gone = |m: &usize| {
            !self.alive(*m) && self.superblock.borrow().roles[*m].state == RoleState::InSync
        };
        let gone: Vec<usize> = (0..self.members.len()).filter(gone).collect();
        gone.iter().for_each(|m| self.members[*m].since.set(from));
        let mut come_back = Vec::new();
        for (role, incoming) in incoming.into_iter().enumerate() {
            let Some((name, device)) = incoming else { continue };
            if !self.take_up(role, &name, &device) {
                come_back.push((role, name, device));
            }
        }
        // Also says who is missing, before recovery changes rows without them
        // (ENG-1).
        self.save(|superblock| superblock.intend_history(history)).await?;
        if crashed && self.log.is_on() {
            let left = self.read_log(epoch, from).await?;
            let tail = left.batches.first().map_or(left.next, |batch| batch.first);
            gone.iter().for_each(|m| self.members[*m].since.set(tail));
            self.harden(&left, epoch).await?;
            self.recovering.set(true);
            self.recover(&left).await?;
            self.recovering.set(false);
            next = left.next;
            let rows = self.rows_recovered();
            self.health.event(format!(
                "was not shut down: {rows} rows that were being written were checked"
            ));
        } else if crashed {
            self.health.event(
                "was not shut down, and has no log: blocks that were being written may be lost, \
                 and parity old; a scrub finds out"
                    .to_owned(),
            );
        }
        for (role, name, device) in come_back {
            self.take_back(role, name, device, next).await;
        }
        for member in &self.members {
            if let Some(incoming) = &mut *member.next.borrow_mut() {
                incoming.log_from = next;
            }
        }
        self.save(|superblock| {
            superblock.epoch += 1;
            superblock.in_use = true;
            superblock.log_from = next;
            superblock.begin_history();
        })
        .await?;
        self.log.begin(self.superblock.borrow().epoch, history, next);
        self.begin_filling();
        if scrubbing {
            self.health.event("a scrub is not finished: `stableio scrub` continues it".to_owned());
        }
        Ok(())
    }

    /// Flushes, and marks the array as shut down.
    pub(crate) async fn close(&self) -> Result<(), Kind> {
        self.stop_tending().await;
        self.checkpoint().await?;
        // One that began before may not be at its end (ENG-4).
        self.checkpoint_over().await;
        let next = self.log.next();
        self.save(|superblock| {
            superblock.in_use = false;
            superblock.log_from = next;
        })
        .await
    }

    /// Members that do not.
    pub(crate) fn missing(&self) -> usize {
        self.members.iter().filter(|m| !m.alive.get()).count()
    }

    /// Fails when more are missing than the redundancy absorbs.
    pub(crate) fn check_redundancy(&self) -> Result<(), Kind> {
        let missing = self.missing();
        if missing > self.geometry.redundancy() { Err(Kind::Degraded { missing }) } else { Ok(()) }
    }

    /// Runs a request that has passed the stack's checks. Reads have a way of
    /// their own, so that their futures stay small.
    pub(crate) async fn run(&self, request: Request) -> Result<Reply, Kind> {
        self.check_redundancy()?;
        let Request { op, memory, issuer } = request;
        match op {
            Op::Read { at, into } => self.read(at, into, memory, issuer).await,
            Op::Write { at, body, sums, fua } => {
                let memory = memory.ok_or(Kind::Unsupported)?;
                let sums = sums.map(|sums| *sums).unwrap_or_default();
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
    /// that can not is dropped (ENG-3).
    pub(crate) async fn flush(&self) -> Result<(), Kind> {
        let settled = self.log.settled_to();
        let sent: Vec<_> = (0..self.members.len()).map(|m| self.flush_member(m)).collect();
        for sent in sent {
            self.settled(sent).await;
        }
        self.settle_members().await?;
        self.log.set_durable(settled);
        Ok(())
    }

    /// Begins a checkpoint, if none is under way.
    pub(crate) fn begin_checkpoint(&self) {
        let Some(me) = self.me.upgrade() else { return };
        if !self.checkpointing.replace(true) {
            drop(exec::spawn(async move {
                // Members that fail in it are dropped; who waits for room in
                // the log looks at the redundancy itself.
                let _ = me.checkpoint().await;
                me.checkpointing.set(false);
                me.log.changed();
            }));
        }
    }

    pub(crate) fn is_checkpointing(&self) -> bool {
        self.checkpointing.get()
    }

    /// Writes all tuples to their pages, so that the log can forget the
    /// writes that have settled (LOG-2).
    pub(crate) async fn checkpoint(&self) -> Result<(), Kind> {
        let settled = self.log.settled_to();
        if !lacks(Protection::TuplesBeforeTail) {
            self.write_pages(usize::MAX).await;
        }
        self.flush().await?;
        self.log.retire(settled);
        self.health.log_used.store(self.log.fill().0, Ordering::Relaxed);
        Ok(())
    }

    /// This engine, for a task of its own.
    pub(crate) fn me(&self) -> Rc<Engine> {
        self.me.upgrade().expect("it is running a request")
    }

    pub(crate) fn note_read_error(&self, member: usize, error: &Error) {
        Health::add(&self.health.members[member].read_errors);
        self.health.often(Often::ReadError, || format!("read error: {error}"));
    }
}
