//! Filling a member that takes a role's place, zone by zone (TEND-1, TEND-2).

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_block::exec::yield_now;
use stableio_mem::{BLOCK, PoolBuf};
use stableio_onepass::{Format, Member, Missing, Survivor, gf, reconstruct};
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::engine::Engine;
use crate::geometry::{Place, Role};
use crate::health::{Health, Often};
use crate::member::Sent;
use crate::pages::PageSet;
use crate::repair::{block_mut, guard_of};
use crate::tuple::{State, Tuple};
use crate::twin::{Protection, lacks};
use crate::window::{Ahead, ROWS, Window, Work};

impl Engine {
    /// Fills the member that takes a role's place, from its first lacking
    /// zone on, and puts it in that place.
    pub(crate) async fn fill(&self, role: usize) -> Result<(), Kind> {
        let zones = self.geometry.zones();
        let progress = &self.health.rebuild;
        progress.begin(zones, self.zone_bytes());
        let mut since_note = 0;
        let mut turn = self.first_turn();
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
            let step = self.lacking(role, self.step_from(zone, &turn));
            self.fill_zones(role, step).await?;
            since_note += 1;
            if self.is_to_be_noted(since_note) {
                self.note_filled().await?;
                since_note = 0;
            }
            self.give_way(&mut turn).await;
        }
        self.take_place(role).await
    }

    /// The zones of a step, as far as the member lacks them.
    fn lacking(&self, role: usize, step: Range<u64>) -> Range<u64> {
        let next = self.members[role].next.borrow();
        let has = |zone: &u64| next.as_ref().is_none_or(|next| next.lacks.has(*zone));
        step.start..step.clone().find(has).unwrap_or(step.end)
    }

    /// TEND-2.
    async fn note_filled(&self) -> Result<(), Kind> {
        if !lacks(Protection::FlushedZones) {
            self.flush().await?;
        }
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
        let saved = self.save(|superblock| {
            let entry = &mut superblock.roles[role];
            *entry = crate::superblock::RoleEntry::in_sync(next.id);
        });
        let saved = saved.await;
        // Not before that is recorded: who is told may take the others away.
        if saved.is_ok() && member.alive.get() {
            health.in_sync.store(true, Ordering::Relaxed);
            self.health.event(format!("member {} is filled and in sync", health.name()));
        }
        // Last: who waits for the end looks then at what has become of it.
        health.set_next(None);
        saved
    }

    async fn fill_zones(&self, role: usize, zones: Range<u64>) -> Result<(), Kind> {
        let g = &self.geometry;
        let memory = self.scratch.reserve(Work::bytes(g.members)).await?;
        let mut work = Work::new(memory, g.members);
        let rows = g.zone_rows(zones.clone());
        let held = if lacks(Protection::ZoneToken) { 0..0 } else { rows.clone() };
        let token = self.tokens.acquire(held).await;
        self.check_redundancy()?;
        let windows = self.windows(rows).await?;
        let mut ahead = Ahead::new(windows, self.sources(role));
        // The window before is written while one is made.
        let mut writing = None;
        while let Some(window) = self.next_window(&mut ahead, &mut work).await {
            let (out, len) = self.fill_window(role, &window, &mut work).await?;
            let (stripe, row) = g.row_at(window.rows.start);
            work.done_with(window);
            let begun = self.begin_filled(role, g.member_offset(stripe, row), out, len);
            self.finish_filled(role, writing.replace(begun), &mut work).await?;
        }
        self.finish_filled(role, writing, &mut work).await?;
        self.fill_pages(role, g.zone_pages(zones.clone()), &mut work).await?;
        if let Some(next) = &mut *self.members[role].next.borrow_mut() {
            zones.for_each(|zone| next.lacks.got(zone));
        }
        drop(token);
        self.settle_members().await
    }

    /// Begins to write what was made for the member that is being filled.
    fn begin_filled(&self, role: usize, at: u64, mut out: PoolBuf, len: usize) -> (Sent, PoolBuf) {
        (self.write_incoming(role, at, out.target(0..len)), out)
    }

    /// Waits until it is written. Who fails is dropped, and not filled on.
    async fn finish_filled(
        &self,
        role: usize,
        begun: Option<(Sent, PoolBuf)>,
        work: &mut Work,
    ) -> Result<(), Kind> {
        let Some((sent, out)) = begun else { return Ok(()) };
        self.settled(sent).await;
        work.give_out(out);
        match self.members[role].next.borrow().is_some() {
            true => Ok(()),
            false => Err(Kind::Stopped),
        }
    }

    /// Writes the tuples of some zones.
    async fn fill_pages(
        &self,
        role: usize,
        pages: Range<u64>,
        work: &mut Work,
    ) -> Result<(), Kind> {
        for first in pages.clone().step_by(ROWS as usize) {
            let run = first..(first + ROWS).min(pages.end);
            let mut out = work.out();
            for (i, page) in run.clone().enumerate() {
                let set = self.page_numbered(page).await?;
                self.encode_for_incoming(&set, role, block_mut(&mut out, i * BLOCK));
            }
            let len = (run.end - run.start) as usize * BLOCK;
            let begun = self.begin_filled(role, self.geometry.page_at(first), out, len);
            self.finish_filled(role, Some(begun), work).await?;
        }
        Ok(())
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

    /// A role's blocks of some rows, and their bytes.
    async fn fill_window(
        &self,
        role: usize,
        window: &Window,
        work: &mut Work,
    ) -> Result<(PoolBuf, usize), Kind> {
        let g = &self.geometry;
        let mut out = work.out();
        let len = (window.rows.end - window.rows.start) as usize * BLOCK;
        let mut at = 0;
        for (stripe, rows) in g.row_runs(window.rows.clone()) {
            let set = self.page(stripe, rows.start).await?;
            for row in rows {
                if !self.fill_at_once(&set, role, (stripe, row), window, at, &mut out) {
                    self.fill_one(&set, role, (stripe, row), at, &mut out, work).await;
                }
                at += BLOCK;
            }
        }
        Ok((out, len))
    }

    /// A role's block of a row from the window alone, if all that it takes is
    /// there and fits; says whether. Else it is zeros: nothing is known of it
    /// yet.
    fn fill_at_once(
        &self,
        set: &PageSet,
        role: usize,
        (stripe, row): (u64, u32),
        window: &Window,
        at: usize,
        out: &mut PoolBuf,
    ) -> bool {
        let g = &self.geometry;
        let own = g.role(stripe, role);
        let tuple = |column| set.tuple(Place { stripe, row, column });
        let parity = set.parity_tuple(stripe, row);
        let want = match (own, parity) {
            (Role::Data(column), Some(_)) => tuple(column),
            (Role::P, Some(parity)) => parity,
            (Role::Q, Some(_)) => tuple(g.columns()),
            (_, None) => Tuple::UNWRITTEN,
        };
        if want.state != State::Written {
            out.zero(at..at + BLOCK);
            // A block that nobody wrote is zeros; so is data that is lost.
            return parity.is_none() || matches!(own, Role::Data(_));
        }
        let number = g.row_number(stripe, row);
        let fits = if window.came[role] || g.level.parities() == 0 {
            let from = window.came.iter().position(|came| *came);
            let block = from.and_then(|member| window.block(member, number));
            block.is_some_and(|block| {
                out.copy_from(at, block);
                want.fits(|| guard_of(out, at))
            })
        } else {
            self.make_from_others(set, own, (stripe, row), window, block_mut(out, at))
        };
        if !fits {
            out.zero(at..at + BLOCK);
        }
        fits
    }

    /// A role's block of a row, made of the others that came, if these are
    /// enough; all of them fit then, and so does what comes out.
    fn make_from_others(
        &self,
        set: &PageSet,
        own: Role,
        (stripe, row): (u64, u32),
        window: &Window,
        out: &mut [u8],
    ) -> bool {
        let g = &self.geometry;
        let number = g.row_number(stripe, row);
        let tuple = |column| set.tuple(Place { stripe, row, column });
        let parity = set.parity_tuple(stripe, row).filter(|p| p.state == State::Written);
        let Some(parity) = parity else { return false };
        let own = match own {
            Role::Data(column) => Member::Data(column),
            Role::P => Member::P,
            Role::Q => Member::Q,
        };
        let data = (0..g.columns()).map(|c| (Member::Data(c), g.data_member(stripe, c), tuple(c)));
        let p = g.parity_member(stripe).map(|p| (Member::P, p, parity));
        let q = g.q_member(stripe).map(|q| (Member::Q, q, tuple(g.columns())));
        // What was never written counts as zeros, and what is lost.
        let is_known = |(_, _, tuple): &(_, _, Tuple)| tuple.state == State::Written;
        let row: SmallVec<[_; 16]> = data.chain(p).chain(q).filter(is_known).collect();
        let mut survivors: SmallVec<[Survivor<'_>; 16]> = SmallVec::new();
        let mut gone: SmallVec<[_; 2]> = SmallVec::new();
        // Each data block that is gone takes a parity.
        let mut wanted = 0;
        for (member, holder, tuple) in &row {
            let (member, is_data) = (*member, matches!(member, Member::Data(_)));
            let expected = tuple.guarded.then(|| std::slice::from_ref(&tuple.guard));
            match window.block(*holder, number).filter(|_| member != own) {
                Some(bytes) if is_data => survivors.push(Survivor { member, bytes, expected }),
                Some(bytes) if wanted > 0 => {
                    survivors.push(Survivor { member, bytes, expected });
                    wanted -= 1;
                }
                None if is_data || member == own => {
                    gone.push((member, expected));
                    wanted += usize::from(is_data);
                }
                _ => {}
            }
        }
        if wanted > 0 {
            return false;
        }
        let mut room;
        let mut aside = match gone.len() {
            0 | 1 => None,
            _ => {
                room = [0; BLOCK];
                Some(&mut room[..])
            }
        };
        let mut out = Some(out);
        let mut missing: SmallVec<[Missing<'_>; 2]> = SmallVec::new();
        for (member, expected) in gone {
            let place = if member == own { out.take() } else { aside.take() };
            let bytes = place.expect("with two parities one other is made");
            missing.push(Missing { member, bytes, expected });
        }
        reconstruct(Format::NATIVE, &survivors, &mut missing).is_ok()
    }

    /// A role's block of a row by whatever way there is.
    async fn fill_one(
        &self,
        set: &PageSet,
        role: usize,
        (stripe, row): (u64, u32),
        at: usize,
        out: &mut PoolBuf,
        work: &mut Work,
    ) {
        match self.geometry.role(stripe, role) {
            Role::Data(column) => {
                self.fill_block(set, Place { stripe, row, column }, at, out, work).await
            }
            parity => {
                let is_q = parity == Role::Q;
                self.fill_parity(set, stripe, row, is_q, at, out, work).await
            }
        }
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
    ) {
        if set.tuple(place).state != State::Written {
            return;
        }
        let bench = work.bench();
        match self.mend_held(place, bench).await {
            Ok(_) => out.copy_from(at, block_mut(bench, 0)),
            Err(_) => self.poison(set, place).await,
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
    ) {
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
            let coefficient = if is_q { gf::exp(column) } else { 1 };
            gf::mul_xor_into(block_mut(out, at), block_mut(bench, 0), coefficient);
        }
        if is_q {
            let place = Place { stripe, row, column: g.columns() };
            let tuple = Tuple::written(guard_of(out, at), self.block_number(place));
            if !set.tuple(place).matches(tuple.guard) {
                // Who can not log it is told so by the next request.
                let _ = self.change_tuple(set, place, tuple).await;
            }
        }
    }
}
