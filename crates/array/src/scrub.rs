//! Looking through everything: data, mirrors, parity, and the tuples' own
//! copies (TEND-1).

use std::ops::Range;

use stableio_block::Kind;
use stableio_block::sync::join;
use stableio_mem::BLOCK;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::{Health, Often};
use crate::pages::{PageSet, RUN};
use crate::tuple::{State, Tuple};
use crate::window::{Ahead, Window, Work};

impl Engine {
    pub(crate) async fn scrub(&self) -> Result<(), Kind> {
        let zones = self.geometry.zones();
        let progress = &self.health.scrub;
        let mut zone = self.superblock.borrow().scrub.unwrap_or(0).min(zones);
        let mut since_note = 0;
        let mut turn = self.first_turn();
        while zone < zones {
            progress.at(zone);
            if !self.go_on().await {
                return self.save(|superblock| superblock.scrub = Some(zone)).await;
            }
            let step = self.step_from(zone, &turn);
            self.scrub_zones(step.clone()).await?;
            zone = step.end;
            since_note += 1;
            if self.is_to_be_noted(since_note) {
                self.save(|superblock| superblock.scrub = Some(zone)).await?;
                since_note = 0;
            }
            self.give_way(&mut turn).await;
        }
        self.save(|superblock| superblock.scrub = None).await?;
        self.health.event("the scrub has looked at everything".to_owned());
        Ok(())
    }

    async fn scrub_zones(&self, zones: Range<u64>) -> Result<(), Kind> {
        let g = &self.geometry;
        let memory = self.scratch.reserve(Work::bytes(g.members)).await?;
        let mut work = Work::new(memory, g.members);
        let rows = g.zone_rows(zones.clone());
        let token = self.tokens.acquire(rows.clone()).await;
        self.check_redundancy()?;
        let windows = self.windows(rows).await?;
        let mut ahead = Ahead::new(windows, (0..g.members).collect());
        // Data is on its way while the pages are looked at.
        self.begin_windows(&mut ahead, &mut work);
        let pages = g.zone_pages(zones);
        for first in pages.clone().step_by(RUN) {
            self.scrub_pages(first..(first + RUN as u64).min(pages.end)).await?;
        }
        while let Some(mut window) = self.next_window(&mut ahead, &mut work).await {
            self.scrub_window(&mut window, &mut work).await?;
            work.done_with(window);
        }
        drop(token);
        self.settle_members().await
    }

    /// The copies of some pages, as they are on the members.
    async fn scrub_pages(&self, pages: Range<u64>) -> Result<(), Kind> {
        let sets = join(pages.clone().map(|page| self.page_numbered(page))).await;
        let sets = sets.into_iter().collect::<Result<Vec<_>, Kind>>()?;
        for set in &sets {
            for member in 0..self.members.len() {
                self.commit(set, member).await;
            }
        }
        let copies = self.read_copies(pages).await;
        for (set, (stored, damaged)) in sets.iter().zip(copies) {
            let all = (0..self.members.len()).collect();
            for member in if stored.agrees(set) { damaged } else { all } {
                self.mend_page(set, member).await;
            }
        }
        Ok(())
    }

    async fn scrub_window(&self, window: &mut Window, work: &mut Work) -> Result<(), Kind> {
        if self.checksums {
            window.sum();
        }
        for (stripe, rows) in self.geometry.row_runs(window.rows.clone()) {
            let set = self.page(stripe, rows.start).await?;
            for row in rows {
                if !self.row_fits(&set, stripe, row, window) {
                    self.mend_row(&set, stripe, row, window, work).await;
                }
                if !self.checksums {
                    self.compare_row(&set, stripe, row, window, work).await?;
                }
            }
        }
        Ok(())
    }

    /// Whether all that a row's members gave is what it should be.
    fn row_fits(&self, set: &PageSet, stripe: u64, row: u32, window: &Window) -> bool {
        let g = &self.geometry;
        if !set.is_written(stripe, row) {
            return true;
        }
        let fits = |column| self.block_fits(set, Place { stripe, row, column }, window);
        let parity_fits = |i| self.parity_fits(set, stripe, row, i, window);
        (0..g.columns()).all(fits) && (!self.checksums || (0..2).all(parity_fits))
    }

    /// Whether every copy of a data block is.
    fn block_fits(&self, set: &PageSet, place: Place, window: &Window) -> bool {
        let tuple = set.tuple(place);
        let number = self.geometry.row_number(place.stripe, place.row);
        let mut holders = self.geometry.holders(place.stripe, place.column);
        tuple.state != State::Written
            || holders.all(|member| self.has(member, place.stripe, number, tuple, window))
    }

    /// Whether a row's P, or Q, is.
    fn parity_fits(
        &self,
        set: &PageSet,
        stripe: u64,
        row: u32,
        which: usize,
        window: &Window,
    ) -> bool {
        let g = &self.geometry;
        let Some(member) = [g.parity_member(stripe), g.q_member(stripe)][which] else {
            return true;
        };
        let q = Place { stripe, row, column: g.columns() };
        let want = if which == 0 { set.parity_tuple(stripe, row) } else { Some(set.tuple(q)) };
        want.is_none_or(|want| self.has(member, stripe, g.row_number(stripe, row), want, window))
    }

    /// Whether a member that holds a row gave a block that fits.
    fn has(&self, member: usize, stripe: u64, number: u64, tuple: Tuple, window: &Window) -> bool {
        !self.holds(member, stripe)
            || (window.came[member] && tuple.fits(|| window.guard(member, number)))
    }

    /// Mends what of a row does not fit.
    async fn mend_row(
        &self,
        set: &PageSet,
        stripe: u64,
        row: u32,
        window: &Window,
        work: &mut Work,
    ) {
        let g = &self.geometry;
        let mut whole = true;
        for column in 0..g.columns() {
            let place = Place { stripe, row, column };
            if !self.block_fits(set, place, window) {
                // Counted and named where it is found out.
                whole &= self.mend_held(place, work.bench()).await.is_ok();
            }
        }
        if !self.checksums {
            // Parity is compared, whatever came (COMPARE-1).
            return;
        }
        // With a block lost there is nothing to say about parity.
        let parity = [g.parity_member(stripe), g.q_member(stripe)];
        for (which, member) in parity.into_iter().enumerate() {
            let Some(member) = member.filter(|_| whole) else { continue };
            if self.parity_fits(set, stripe, row, which, window) {
                continue;
            }
            let mut out = work.block();
            out.zero(0..BLOCK);
            self.fill_parity(set, stripe, row, which == 1, 0, &mut out, work).await;
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
    }
}
