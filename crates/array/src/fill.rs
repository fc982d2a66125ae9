//! Filling a member that takes a role's place, zone by zone (TEND-1, TEND-2).

use stableio_block::exec::yield_now;
use stableio_block::{Body, Kind, Request};
use stableio_mem::{BLOCK, PoolBuf};
use stableio_onepass::gf;
use std::time::Instant;

use crate::engine::Engine;
use crate::geometry::{Place, Role};
use crate::health::{Health, Often};
use crate::pages::PageSet;
use crate::repair::{block_mut, guard_of};
use crate::tend::NOTED_EVERY;
use crate::tuple::{State, Tuple};
use crate::window::{Ahead, Window, Work};

impl Engine {
    /// Fills the member that takes a role's place, from its first lacking
    /// zone on, and puts it in that place.
    pub(crate) async fn fill(&self, role: usize) -> Result<(), Kind> {
        let zones = self.geometry.zones();
        let progress = &self.health.rebuild;
        progress.begin(zones, self.zone_bytes());
        let mut since_note = 0;
        let mut since = (Instant::now(), self.traffic.requests());
        loop {
            let first = self.members[role].next.borrow().as_ref().map(|next| {
                progress.at(next.lacks.done(zones));
                next.lacks.first(zones)
            });
            let Some(first) = first else { return Err(Kind::Stopped) };
            let Some(zone) = first else { break };
            if !self.go_on().await {
                self.note_filled().await?;
                return Ok(());
            }
            self.fill_zone(role, zone).await?;
            since_note += 1;
            if since_note >= NOTED_EVERY.min(zones / 4 + 1) {
                self.note_filled().await?;
                since_note = 0;
            }
            self.give_way(&mut since).await;
        }
        self.take_place(role).await
    }

    /// TEND-2.
    async fn note_filled(&self) -> Result<(), Kind> {
        self.flush().await?;
        self.save(|_| {}).await
    }

    async fn take_place(&self, role: usize) -> Result<(), Kind> {
        self.flush().await?;
        // Of what the log still holds it must have all.
        let member = &self.members[role];
        let log_from = member.next.borrow().as_ref().map_or(0, |next| next.log_from);
        while self.log.tail() < log_from {
            self.checkpoint().await?;
            yield_now().await;
        }
        self.persist_tail().await?;
        let Some(next) = member.next.borrow_mut().take() else { return Ok(()) };
        *member.device.borrow_mut() = Some(next.device);
        member.alive.set(true);
        member.wake();
        let health = &self.health.members[role];
        health.take_over();
        self.health.event(format!("member {} is filled and in sync", health.name()));
        self.save(|superblock| {
            let entry = &mut superblock.roles[role];
            *entry = crate::superblock::RoleEntry::in_sync(next.id);
        })
        .await
    }

    async fn fill_zone(&self, role: usize, zone: u64) -> Result<(), Kind> {
        let g = &self.geometry;
        let memory = self.scratch.reserve(Work::bytes(g.members)).await?;
        let mut work = Work::new(memory, g.members);
        let rows = g.zone_rows(zone);
        let token = self.tokens.acquire(rows.clone()).await;
        self.check_redundancy()?;
        let windows = self.windows(rows).await?;
        let sources = self.sources(role);
        let mut ahead = Ahead::new(windows, sources);
        while let Some(mut window) = self.next_window(&mut ahead, &mut work).await {
            let filled = self.fill_window(role, &mut window, &mut work).await;
            work.done_with(window);
            filled?;
        }
        for page in g.zone_pages(zone) {
            let (stripe, row) = g.row_of(page, 0, 0);
            let set = self.page(stripe, row).await?;
            if let Err(error) = self.fill_page(&set, role).await {
                self.drop_incoming(role, &error);
            }
        }
        if let Some(next) = &mut *self.members[role].next.borrow_mut() {
            next.lacks.got(zone);
        }
        drop(token);
        self.settle_members().await
    }

    /// The members whose blocks make up a role's: its own, where that is
    /// there; else all others.
    fn sources(&self, role: usize) -> Vec<usize> {
        if self.alive(role) {
            return vec![role];
        }
        let others = (0..self.members.len()).filter(|m| *m != role && self.alive(*m));
        let most = if self.geometry.level.parities() > 0 { usize::MAX } else { 1 };
        others.take(most).collect()
    }

    /// Fills a role's blocks of some rows.
    async fn fill_window(
        &self,
        role: usize,
        window: &mut Window,
        work: &mut Work,
    ) -> Result<(), Kind> {
        let g = &self.geometry;
        let mut out = work.out();
        let len = (window.rows.end - window.rows.start) as usize * BLOCK;
        out.zero(0..len);
        for (i, number) in window.rows.clone().enumerate() {
            let (stripe, row) = g.row_at(number);
            let set = self.page(stripe, row).await?;
            let at = i * BLOCK;
            if set.parity_guard(stripe, row).is_none()
                || self.fill_at_once(&set, role, number, window, at, &mut out)
            {
                continue;
            }
            match g.role(stripe, role) {
                Role::Data(column) => {
                    let place = Place { stripe, row, column };
                    self.fill_block(&set, place, at, &mut out, work).await;
                }
                parity => {
                    let is_q = parity == Role::Q;
                    self.fill_parity(&set, stripe, row, is_q, at, &mut out, work).await;
                }
            }
        }
        let (stripe, row) = g.row_at(window.rows.start);
        let body = Body::Segments(out.target(0..len));
        let write = Request::write(g.member_offset(stripe, row), body, false);
        if let Err(error) = self.on_device(role, true, write).await {
            self.drop_incoming(role, &error);
            return Err(error.kind);
        }
        work.give_out(out);
        Ok(())
    }

    /// A role's block of a row from the window alone, if all that it takes is
    /// there and fits; says whether.
    fn fill_at_once(
        &self,
        set: &PageSet,
        role: usize,
        number: u64,
        window: &mut Window,
        at: usize,
        out: &mut PoolBuf,
    ) -> bool {
        let g = &self.geometry;
        let (stripe, row) = g.row_at(number);
        let own = g.role(stripe, role);
        let tuple = |column| set.tuple(Place { stripe, row, column });
        let want = match own {
            Role::Data(column) if tuple(column).state != State::Written => return true,
            Role::Data(column) => Some(tuple(column).guard),
            Role::P => set.parity_guard(stripe, row),
            Role::Q => {
                Some(tuple(g.columns())).filter(|t| t.state == State::Written).map(|t| t.guard)
            }
        };
        let Some(want) = want else { return false };
        if window.came[role] || g.level.parities() == 0 {
            let Some(from) = (0..g.members).find(|m| window.came[*m]) else { return false };
            let block = block_of(window, from, number);
            out.copy_from(at, &block);
            return guard_of(out, at) == want || clear(out, at);
        }
        for column in (0..g.columns()).filter(|c| own != Role::Data(*c)) {
            let t = tuple(column);
            if t.state != State::Written {
                continue;
            }
            let member = g.data_member(stripe, column);
            if !window.came[member] || !t.matches(window.guard(member, number)) {
                return clear(out, at);
            }
            let coefficient = if own == Role::Q { gf::exp(column) } else { 1 };
            gf::mul_xor_into(block_mut(out, at), &block_of(window, member, number), coefficient);
        }
        if matches!(own, Role::Data(_)) {
            let p = g.parity_member(stripe).expect("a level with parity");
            if !window.came[p] {
                return clear(out, at);
            }
            stableio_onepass::xor_into(block_mut(out, at), &block_of(window, p, number));
        }
        guard_of(out, at) == want || clear(out, at)
    }

    /// A data block as it should be; one that nothing gives is lost from now
    /// on, and the rebuild goes on.
    async fn fill_block(
        &self,
        set: &PageSet,
        place: Place,
        at: usize,
        out: &mut PoolBuf,
        work: &mut Work,
    ) -> bool {
        if set.tuple(place).state != State::Written {
            return false;
        }
        let bench = work.bench();
        match self.mend_held(place, bench).await {
            Ok(_) => {
                let block: [u8; BLOCK] = block_mut(bench, 0)[..].try_into().expect("a block");
                out.copy_from(at, &block);
                true
            }
            Err(_) => {
                self.poison(set, place).await;
                false
            }
        }
    }

    /// Nothing brings this block back: it says so from now on.
    async fn poison(&self, set: &PageSet, place: Place) {
        let block = self.block_number(place);
        let _ = self.change_tuple(set, place, Tuple::lost(block)).await;
        Health::add(&self.health.blocks_lost);
        self.health.often(Often::Lost, || {
            format!("block {block} is lost: it reads as an error until it is written")
        });
    }

    /// The P or Q of a row, of its data.
    #[expect(clippy::too_many_arguments, reason = "a row, and where it goes")]
    pub(crate) async fn fill_parity(
        &self,
        set: &PageSet,
        stripe: u64,
        row: u32,
        is_q: bool,
        at: usize,
        out: &mut PoolBuf,
        work: &mut Work,
    ) -> bool {
        let g = &self.geometry;
        for column in 0..g.columns() {
            let place = Place { stripe, row, column };
            if set.tuple(place).state != State::Written {
                continue;
            }
            let bench = work.bench();
            if self.mend_held(place, bench).await.is_err() {
                self.poison(set, place).await;
                continue;
            }
            let block: [u8; BLOCK] = block_mut(bench, 0)[..].try_into().expect("a block");
            let coefficient = if is_q { gf::exp(column) } else { 1 };
            gf::mul_xor_into(block_mut(out, at), &block, coefficient);
        }
        if is_q {
            let place = Place { stripe, row, column: g.columns() };
            let tuple = Tuple::written(guard_of(out, at), self.block_number(place));
            if set.tuple(place) != tuple {
                // Who can not log it is told so by the next request.
                let _ = self.change_tuple(set, place, tuple).await;
            }
        }
        true
    }
}

fn block_of(window: &mut Window, member: usize, number: u64) -> [u8; BLOCK] {
    let at = window.at(member, number);
    block_mut(&mut window.buf, at)[..].try_into().expect("a block")
}

/// Nothing is known of this block yet; gives false.
fn clear(out: &mut PoolBuf, at: usize) -> bool {
    out.zero(at..at + BLOCK);
    false
}
