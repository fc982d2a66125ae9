//! Long work beside requests: filling a member that takes a place, and
//! looking through everything (scrub). Both go in steps of a few zones, in a
//! task of their own.
//!
//! TEND-1: zones are filled, or looked at, under the token of their rows. What
//! is written to rows that the incoming member does not have yet does not go
//! there; what is written to those that it has, does.
//!
//! TEND-2: the superblocks say that a zone is there only after a flush of
//! what was written to it.
//!
//! TEND-3: while requests are under way, as much time goes to them as to
//! this.
//!
//! TEND-4: one of the two at a time: a scrub waits for no member to be filled.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stableio_block::exec::{self, yield_now};
use stableio_block::ring;
use stableio_block::sync::Condition;
use stableio_block::{Device, Kind};

use crate::engine::Engine;
use crate::member::{Incoming, Lacks};
use crate::superblock::Id;

/// Rows of the zones that are taken together while there are no requests, so
/// many that the devices seldom wait. Else zones go one by one: a write to
/// their rows waits for all of a step.
const STEP_ROWS: u64 = 1024;
/// Steps between two notes of how far it is, at most.
const NOTED_EVERY: u64 = 32;
/// Longest break for requests.
const LONGEST_BREAK: Duration = Duration::from_millis(500);

/// Why long work was not begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TendError {
    /// Scrub and replace at once, or one of them twice.
    #[error("{0} is under way: wait until it is done, or stop it if it is a scrub")]
    Busy(&'static str),
    /// Not a role.
    #[error("the array has no role {0}")]
    NoRole(usize),
    /// The new member is smaller than its zones need.
    #[error("the new member has {size} bytes, the array needs {need}: give a larger one")]
    TooSmall {
        /// Bytes that it has.
        size: u64,
        /// Bytes that a member needs.
        need: u64,
    },
    /// Direct I/O on it wants memory aligned to more than on the others.
    #[error(
        "the new member wants memory aligned to {wants} bytes, the array gives {gives}: serve the array again with it"
    )]
    Alignment {
        /// What the member wants.
        wants: u32,
        /// What the array was opened for.
        gives: u32,
    },
    /// One member too many.
    #[error("the array can not do without another member: replace one first")]
    LastOne,
    /// The array can not.
    #[error("the array can not: {0}")]
    Array(#[from] Kind),
}

impl exec::Stopped for TendError {
    fn stopped() -> Self {
        TendError::Array(Kind::Stopped)
    }
}

/// What is under way.
#[derive(Default)]
pub(crate) struct Tending {
    filling: Cell<bool>,
    scrubbing: Cell<bool>,
    stopping: Cell<bool>,
    paused: Cell<bool>,
    changed: Condition,
}

/// The time since long work last gave way to requests.
pub(crate) struct Turn {
    began: Instant,
    /// Requests before it.
    requests: u64,
    /// Whether there were any in the turn before.
    crowded: bool,
}

impl Engine {
    /// Begins to fill `device`, which takes the place of a role's member.
    ///
    /// # Errors
    ///
    /// [`TendError`]; then nothing was written.
    pub(crate) async fn begin_replace(
        &self,
        role: usize,
        id: Id,
        device: Arc<dyn Device>,
        name: String,
    ) -> Result<(), TendError> {
        self.check_idle()?;
        let member = self.members.get(role).ok_or(TendError::NoRole(role))?;
        let (size, need) = (device.limits().size, self.geometry.member_size);
        if size < need {
            return Err(TendError::TooSmall { size, need });
        }
        self.health.members[role].set_next(Some(name));
        let log_from = self.log.next();
        let lacks = Lacks::From(0);
        *member.next.borrow_mut() = Some(Incoming { id, device, lacks, log_from });
        self.save(|_| {}).await?;
        self.begin_filling();
        Ok(())
    }

    /// A replacement goes on to be filled from where the superblock says.
    /// Before anything is written: what recovery writes goes there too.
    pub(crate) fn take_up(&self, role: usize, name: &str, device: &Arc<dyn Device>) -> bool {
        let entry = self.superblock.borrow().roles[role];
        let Some(filled) = entry.next.filter(|next| next.id != entry.id) else { return false };
        let (device, lacks) = (device.clone(), Lacks::From(filled.zones));
        // Its log is not looked at before it has its place.
        let log_from = u64::MAX;
        self.health.members[role].set_next(Some(name.to_owned()));
        *self.members[role].next.borrow_mut() =
            Some(Incoming { id: filled.id, device, lacks, log_from });
        true
    }

    /// A role's own member comes back: it catches up with what the log says
    /// was written without it.
    pub(crate) async fn take_back(
        &self,
        role: usize,
        name: String,
        device: Arc<dyn Device>,
        next: u64,
    ) {
        let entry = self.superblock.borrow().roles[role];
        let Some(rows) = self.logged_since(entry.since, next).await else {
            self.health.event(format!(
                "WARNING: {name} is stale, and the log does not reach back to when it was left \
                 out: LEFT OUT; `stableio replace` fills it anew"
            ));
            return;
        };
        let zones = rows.iter().map(|(stripe, _)| self.geometry.zone_of(*stripe));
        let zones: std::collections::BTreeSet<u64> = zones.collect();
        let count = zones.len();
        self.health.event(format!("{name} comes back: {count} zones to catch up with"));
        self.health.members[role].set_next(Some(name));
        let lacks = Lacks::Zones(zones);
        *self.members[role].next.borrow_mut() =
            Some(Incoming { id: entry.id, device, lacks, log_from: u64::MAX });
    }

    /// Leaves a role's member out, if the redundancy absorbs that.
    pub(crate) async fn remove(&self, role: usize) -> Result<(), TendError> {
        let member = self.members.get(role).ok_or(TendError::NoRole(role))?;
        if member.alive.get() && self.missing() + 1 > self.geometry.redundancy() {
            return Err(TendError::LastOne);
        }
        let name = self.health.members[role].name();
        self.take_out(role, &format!("member {name} removed"));
        Ok(self.settle_members().await?)
    }

    /// Stops a scrub, if there is one.
    pub(crate) async fn stop_scrub(&self) -> Result<(), TendError> {
        if self.tending.filling.get() {
            return Err(TendError::Busy("a rebuild"));
        }
        self.stop_tending().await;
        Ok(())
    }

    fn check_idle(&self) -> Result<(), TendError> {
        if self.tending.filling.get() {
            return Err(TendError::Busy("a rebuild"));
        }
        if self.tending.scrubbing.get() {
            return Err(TendError::Busy("a scrub"));
        }
        Ok(())
    }

    /// Fills whoever takes a place, in a task of its own.
    pub(crate) fn begin_filling(&self) {
        let waits = |role: &crate::member::Member| role.next.borrow().is_some();
        if !self.members.iter().any(waits) || self.tending.filling.replace(true) {
            return;
        }
        self.health.rebuild.begin(self.geometry.zones(), self.zone_bytes());
        let me = self.me();
        drop(exec::spawn(async move {
            let mut done = Ok(());
            while let Some(role) = (0..me.members.len()).find(|m| waits(&me.members[*m])) {
                done = me.fill(role).await;
                // One that was dropped leaves the others to be filled.
                let dropped = me.members[role].next.borrow().is_none();
                if (done.is_err() && !dropped) || me.tending.stopping.get() {
                    break;
                }
            }
            if let Err(kind) = done {
                me.health.event(format!("the rebuild stopped: {kind}"));
            }
            me.health.rebuild.end();
            me.tending.filling.set(false);
            me.tending.changed.notify();
        }));
    }

    /// Begins to look through everything, from where an earlier scrub was.
    ///
    /// # Errors
    ///
    /// [`TendError`].
    pub(crate) async fn begin_scrub(&self) -> Result<(), TendError> {
        self.check_idle()?;
        self.tending.scrubbing.set(true);
        self.tending.stopping.set(false);
        self.health.scrub.begin(self.geometry.zones(), self.zone_bytes());
        let me = self.me();
        drop(exec::spawn(async move {
            if let Err(kind) = me.scrub().await {
                me.health.event(format!("the scrub stopped: {kind}"));
            }
            me.health.scrub.end();
            me.tending.scrubbing.set(false);
            me.tending.changed.notify();
        }));
        Ok(())
    }

    /// Stops a scrub, which the next one continues, and what is being filled,
    /// which the next opening continues. Waits until they have.
    pub(crate) async fn stop_tending(&self) {
        self.tending.stopping.set(true);
        self.tending.changed.notify();
        let idle = || !self.tending.filling.get() && !self.tending.scrubbing.get();
        self.tending.changed.wait_for(|| idle().then_some(())).await;
        self.tending.stopping.set(false);
        self.pause_tending(false);
    }

    /// Pauses both, or lets them go on.
    pub(crate) fn pause_tending(&self, paused: bool) {
        self.tending.paused.set(paused);
        self.health.rebuild.set_paused(paused);
        self.health.scrub.set_paused(paused);
        self.tending.changed.notify();
    }

    /// Whether to go on; waits while it is paused.
    pub(crate) async fn go_on(&self) -> bool {
        let tending = &self.tending;
        let over = || (!tending.paused.get() || tending.stopping.get()).then_some(());
        tending.changed.wait_for(over).await;
        !tending.stopping.get()
    }

    /// The first turn of long work, which takes it that there are requests.
    pub(crate) fn first_turn(&self) -> Turn {
        Turn { began: Instant::now(), requests: self.traffic.requests(), crowded: true }
    }

    /// The zones of a step from `zone` on. However small the array is, there
    /// are several.
    pub(crate) fn step_from(&self, zone: u64, turn: &Turn) -> Range<u64> {
        let g = &self.geometry;
        let rows = g.zone_stripes() * u64::from(g.chunk_blocks);
        let most = if turn.crowded { 1 } else { (STEP_ROWS / rows).min(g.zones() / 2).max(1) };
        zone..(zone + most).min(g.zones())
    }

    /// Whether it is to be noted how far it is, after so many steps.
    pub(crate) fn is_to_be_noted(&self, steps: u64) -> bool {
        steps >= NOTED_EVERY.min(self.geometry.zones() / 4 + 1)
    }

    /// Gives requests their turn (TEND-3): where there were any during the
    /// last step, as long as that took.
    pub(crate) async fn give_way(&self, turn: &mut Turn) {
        yield_now().await;
        let crowded = self.traffic.requests() > turn.requests;
        if crowded && ring::is_here() {
            ring::sleep(turn.began.elapsed().min(LONGEST_BREAK)).await;
        }
        *turn = Turn { crowded, ..self.first_turn() };
    }

    pub(crate) fn zone_bytes(&self) -> u64 {
        let g = &self.geometry;
        g.zone_stripes() * g.chunk_bytes() * g.members as u64
    }
}
