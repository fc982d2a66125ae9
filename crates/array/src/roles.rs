//! The state of every role, on its way to every superblock.
//!
//! SAVE-1: of a member's two copies the one that counts is written last, once
//! the other is durable: power failure may have torn that other one already.

use std::cell::Cell;

use stableio_block::sync::Condition;
use stableio_block::{Error, Kind, Op, Request};
use stableio_mem::{BLOCK, SgList};

use crate::engine::Engine;
use crate::member::Lacks;
use crate::superblock::{Id, Next, RoleState, Superblock};

/// Superblock writes: one at a time, each for all changes before it.
#[derive(Default)]
pub(crate) struct Saves {
    wanted: Cell<u64>,
    done: Cell<u64>,
    busy: Cell<bool>,
    changed: Condition,
    /// Whether the superblocks say that members are missing: what a crash
    /// would leave, whoever is there by now.
    missing: Cell<bool>,
}

impl Saves {
    pub(crate) fn say_missing(&self) -> bool {
        self.missing.get()
    }
}

impl Engine {
    /// The superblocks have to be written before anything succeeds.
    pub(crate) fn want_save(&self) {
        self.saves.wanted.set(self.saves.wanted.get() + 1);
    }

    /// Waits until every dropped member is recorded as missing on the others.
    pub(crate) async fn settle_members(&self) -> Result<(), Kind> {
        if self.saves.done.get() < self.saves.wanted.get() {
            // Rare, and large: kept out of the futures of all requests.
            Box::pin(self.save_all()).await?;
        }
        self.check_redundancy()
    }

    /// Changes the superblock, and writes it to all members.
    pub(crate) async fn save(&self, change: impl FnOnce(&mut Superblock)) -> Result<(), Kind> {
        change(&mut self.superblock.borrow_mut());
        self.want_save();
        self.settle_members().await
    }

    async fn save_all(&self) -> Result<(), Kind> {
        let saves = &self.saves;
        while saves.done.get() < saves.wanted.get() {
            self.check_redundancy()?;
            if saves.busy.get() {
                saves.changed.wait_for(|| (!saves.busy.get()).then_some(())).await;
                continue;
            }
            saves.busy.set(true);
            let covers = saves.wanted.get();
            self.write_superblocks().await;
            saves.done.set(covers);
            saves.busy.set(false);
            saves.changed.notify();
        }
        Ok(())
    }

    /// Brings the roles' states into the superblock and writes both its
    /// copies on every member.
    async fn write_superblocks(&self) {
        let superblock = {
            let mut superblock = self.superblock.borrow_mut();
            superblock.generation += 1;
            for (member, role) in self.members.iter().zip(&mut superblock.roles) {
                if !member.alive.get() {
                    role.state = RoleState::Missing;
                    role.since = member.since.get();
                }
                role.next = member.next.borrow().as_ref().map(|next| Next {
                    id: next.id,
                    zones: match &next.lacks {
                        Lacks::From(zone) => *zone,
                        // It begins again with what the log says.
                        Lacks::Zones(_) => 0,
                    },
                });
            }
            superblock.clone()
        };
        if superblock.missing() > self.geometry.redundancy() {
            return;
        }
        for role in 0..self.members.len() {
            let of = |member: Id| Superblock { role, member, ..superblock.clone() };
            if self.alive(role) {
                let own = of(superblock.roles[role].id);
                if let Err(error) = self.write_superblock(role, &own, false).await {
                    self.drop_member(role, &error);
                }
            }
            // A member that catches up keeps its old superblock until it has
            // everything: what it says of itself then is what it was.
            let filled = superblock.roles[role].next.map(|next| next.id);
            if let Some(id) = filled.filter(|id| *id != superblock.roles[role].id)
                && let Err(error) = self.write_superblock(role, &of(id), true).await
            {
                self.drop_incoming(role, &error);
            }
        }
        self.saves.missing.set(superblock.missing() > 0);
    }

    async fn write_superblock(
        &self,
        role: usize,
        superblock: &Superblock,
        to_next: bool,
    ) -> Result<(), Error> {
        let block = superblock.encode();
        let mut memory = self.meta.reserve(BLOCK).await.expect("smaller than the pool");
        let mut buf = memory.take(BLOCK);
        buf.copy_from(0, &block[..]);
        let buf = buf.freeze();
        let [mut first, mut last] = [0, self.geometry.second_superblock_at()];
        let copies = [
            self.read_superblock(role, first, to_next).await,
            self.read_superblock(role, last, to_next).await,
        ];
        if copies[0] > copies[1] {
            std::mem::swap(&mut first, &mut last);
        }
        self.write_and_flush(role, first, buf.source(), to_next).await?;
        self.write_and_flush(role, last, buf.source(), to_next).await
    }

    /// The generation of a copy, if it is whole and ours.
    async fn read_superblock(&self, role: usize, at: u64, to_next: bool) -> Option<u64> {
        let mut buf = self.meta.reserve(BLOCK).await.expect("smaller than the pool").take(BLOCK);
        let into = stableio_block::Into::Segments(buf.target(0..BLOCK));
        let read = Request::of(Op::Read { at, into });
        // One that can not be read is none.
        self.on_device(role, to_next, read).await.ok()?;
        let block = buf.freeze();
        let found = Superblock::parse(block.contiguous(0, BLOCK).try_into().expect("a block"));
        found.ok().filter(|found| found.array == self.array).map(|found| found.generation)
    }

    async fn write_and_flush(
        &self,
        role: usize,
        at: u64,
        from: SgList,
        to_next: bool,
    ) -> Result<(), Error> {
        self.on_device(
            role,
            to_next,
            Request::write(at, stableio_block::Body::Segments(from), false),
        )
        .await?;
        self.on_device(role, to_next, Request::flush()).await
    }
}
