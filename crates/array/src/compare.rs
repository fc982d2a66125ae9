//! Scrubbing without checksums: copies and parity are compared with the data.
//!
//! COMPARE-1: where they differ nothing says which is right. The data as it is
//! read decides: of a mirror the first leg, of other rows the data blocks. What
//! differs is counted, said, and made anew from that, so that from then on
//! everybody reads the same, whoever is missing.

use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf};
use stableio_onepass::gf;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::{Health, Often};
use crate::pages::PageSet;
use crate::repair::{block_mut, guard_of};
use crate::tuple::{State, Tuple};
use crate::window::{Window, Work};

impl Engine {
    /// Compares the copies of a row, or its parity, with its data as it came.
    /// What did not come was mended, or can not be: of that nothing is said.
    pub(crate) async fn compare_row(
        &self,
        set: &PageSet,
        stripe: u64,
        row: u32,
        window: &mut Window,
        work: &mut Work,
    ) -> Result<(), Kind> {
        let g = &self.geometry;
        let number = g.row_number(stripe, row);
        let parity = set.parity_tuple(stripe, row);
        if parity.is_none_or(|parity| parity.state == State::Lost) {
            return Ok(());
        }
        let mut out = work.block();
        if g.level.parities() == 0 {
            let came: Vec<usize> = g.holders(stripe, 0).filter(|leg| window.came[*leg]).collect();
            if let Some((first, others)) = came.split_first() {
                out.copy_from(0, window.block(*first, number).expect("it came"));
                for leg in others {
                    self.compare(*leg, number, window, &mut out).await;
                }
            }
        } else {
            for (member, is_q) in [(g.parity_member(stripe), false), (g.q_member(stripe), true)] {
                let Some(member) = member.filter(|m| self.holds(*m, stripe)) else { continue };
                if !self.sum_window(set, number, is_q, window, &mut out) {
                    continue;
                }
                self.compare(member, number, window, &mut out).await;
                let q = Place { stripe, row, column: g.columns() };
                if is_q && set.tuple(q).state != State::Written {
                    // Who could not be read once has forgotten that it is there.
                    let tuple = Tuple::written(guard_of(&mut out, 0), self.block_number(q));
                    self.change_tuple(set, q, tuple).await?;
                }
            }
        }
        work.give_block(out);
        Ok(())
    }

    /// The P or the Q of a row, of its data; whether all of that came.
    fn sum_window(
        &self,
        set: &PageSet,
        number: u64,
        is_q: bool,
        window: &mut Window,
        out: &mut PoolBuf,
    ) -> bool {
        let g = &self.geometry;
        let (stripe, row) = g.row_at(number);
        out.zero(0..BLOCK);
        for column in 0..g.columns() {
            if set.tuple(Place { stripe, row, column }).state != State::Written {
                continue;
            }
            let member = g.data_member(stripe, column);
            let Some(block) = window.block(member, number) else { return false };
            let coefficient = if is_q { gf::exp(column) } else { 1 };
            gf::mul_xor_into(block_mut(out, 0), block, coefficient);
        }
        true
    }

    /// Makes a member's block of a row what it should be, if it is not.
    async fn compare(&self, member: usize, number: u64, window: &mut Window, out: &mut PoolBuf) {
        let block = window.block(member, number);
        let came = block.is_some();
        if block.is_some_and(|block| *block == *block_mut(out, 0)) {
            return;
        }
        let (stripe, row) = self.geometry.row_at(number);
        let at = self.geometry.member_offset(stripe, row);
        self.settled(self.write_member(member, at, out.target(0..BLOCK))).await;
        let name = self.health.members[member].name();
        if came {
            Health::add(&self.health.blocks_differed);
            self.health.often(Often::Differed, || {
                format!(
                    "{name}: block at byte {at} differed from the data of its row, and is made \
                     anew from that: without checksums nothing says which was right"
                )
            });
        } else {
            Health::add(&self.health.blocks_mended);
            self.health.often(Often::Mended, || {
                format!("{name}: parity at byte {at} could not be read, made anew")
            });
        }
    }
}
