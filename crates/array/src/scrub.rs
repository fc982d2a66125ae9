//! Looking through everything: data, mirrors, parity, and the tuples' own
//! copies (TEND-1).

use std::time::Instant;

use stableio_block::Kind;
use stableio_mem::BLOCK;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::{Health, Often};
use crate::tend::NOTED_EVERY;
use crate::tuple::State;
use crate::window::{Ahead, Window, Work};

impl Engine {
    pub(crate) async fn scrub(&self) -> Result<(), Kind> {
        let zones = self.geometry.zones();
        let progress = &self.health.scrub;
        let mut zone = self.superblock.borrow().scrub.unwrap_or(0).min(zones);
        let mut since_note = 0;
        let mut since = (Instant::now(), self.traffic.requests());
        while zone < zones {
            progress.at(zone);
            if !self.go_on().await {
                return self.save(|superblock| superblock.scrub = Some(zone)).await;
            }
            self.scrub_zone(zone).await?;
            zone += 1;
            since_note += 1;
            if since_note >= NOTED_EVERY.min(zones / 4 + 1) {
                self.save(|superblock| superblock.scrub = Some(zone)).await?;
                since_note = 0;
            }
            self.give_way(&mut since).await;
        }
        self.save(|superblock| superblock.scrub = None).await?;
        self.health.event("the scrub has looked at everything".to_owned());
        Ok(())
    }

    async fn scrub_zone(&self, zone: u64) -> Result<(), Kind> {
        let g = &self.geometry;
        let memory = self.scratch.reserve(Work::bytes(g.members)).await?;
        let mut work = Work::new(memory, g.members);
        let rows = g.zone_rows(zone);
        let token = self.tokens.acquire(rows.clone()).await;
        self.check_redundancy()?;
        for page in g.zone_pages(zone) {
            self.scrub_page(page).await?;
        }
        let windows = self.windows(rows).await?;
        let mut ahead = Ahead::new(windows, (0..g.members).collect());
        while let Some(mut window) = self.next_window(&mut ahead, &mut work).await {
            for number in window.rows.clone() {
                self.scrub_row(number, &mut window, &mut work).await?;
            }
            work.done_with(window);
        }
        drop(token);
        self.settle_members().await
    }

    /// The copies of a page, as they are on the members.
    async fn scrub_page(&self, page: u64) -> Result<(), Kind> {
        let (stripe, row) = self.geometry.row_of(page, 0, 0);
        let set = self.page(stripe, row).await?;
        for member in 0..self.members.len() {
            self.commit(&set, member).await;
        }
        let (stored, damaged) = self.read_copies(page).await;
        if !stored.agrees(&set) {
            for member in 0..self.members.len() {
                self.mend_page(&set, member).await;
            }
        } else {
            for member in damaged {
                self.mend_page(&set, member).await;
            }
        }
        Ok(())
    }

    async fn scrub_row(
        &self,
        number: u64,
        window: &mut Window,
        work: &mut Work,
    ) -> Result<(), Kind> {
        let g = &self.geometry;
        let (stripe, row) = g.row_at(number);
        let set = self.page(stripe, row).await?;
        let Some(p_guard) = set.parity_guard(stripe, row) else { return Ok(()) };
        let mut whole = true;
        for column in 0..g.columns() {
            let place = Place { stripe, row, column };
            let tuple = set.tuple(place);
            if tuple.state != State::Written {
                continue;
            }
            let mut fits = true;
            for member in g.holders(stripe, column).filter(|m| self.holds(*m, stripe)) {
                fits &= window.came[member] && tuple.matches(window.guard(member, number));
            }
            if !fits && self.mend_held(place, work.bench()).await.is_err() {
                // Counted and named where it was found out.
                whole = false;
            }
        }
        // With a block lost there is nothing to say about parity.
        let parity = [g.parity_member(stripe), g.q_member(stripe)];
        for (which, member) in parity.into_iter().enumerate() {
            let Some(member) = member.filter(|m| whole && self.holds(*m, stripe)) else { continue };
            let q = Place { stripe, row, column: g.columns() };
            let want = if which == 0 { p_guard } else { set.tuple(q).guard };
            if window.came[member] && window.guard(member, number) == want {
                continue;
            }
            let mut out = work.block();
            out.zero(0..BLOCK);
            self.fill_parity(&set, stripe, row, which == 1, 0, &mut out, work).await;
            let at = g.member_offset(stripe, row);
            let sent = self.write_member(member, at, out.target(0..BLOCK));
            self.settled(sent).await;
            Health::add(&self.health.members[member].mismatches);
            Health::add(&self.health.blocks_mended);
            let name = self.health.members[member].name();
            self.health.often(Often::Mended, || {
                format!("{name}: parity at byte {at} was damaged, made anew")
            });
            work.give_block(out);
        }
        Ok(())
    }
}
