//! The new parity of the rows of a band: out of the pass where it covers
//! them wholly; else made of the blocks that the write keeps, or of the old
//! parity and the old blocks, whichever reads less.
//!
//! WRITE-1: parity is made of the request's own bytes as they were sampled
//! once, and of old blocks that matched their tuples; nothing else. Where one
//! way finds a block that does not, the other is tried; else the write fails.

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf, StableBuf};
use stableio_onepass::gf;

use crate::bands::{Band, Cover};
use crate::engine::Engine;
use crate::geometry::Place;
use crate::repair::{block_mut, guard_of};
use crate::tuple::State;
use crate::twin::{Protection, lacks};
use crate::write::{Fetch, Sheet};

/// P and Q of a band's rows.
pub(crate) struct Parities<B> {
    pub(crate) p: Option<B>,
    pub(crate) q: Option<B>,
}

impl Engine {
    /// The new parity of a band, for the members that hold it; none where no
    /// block of its rows is written any more.
    pub(crate) async fn parities(
        &self,
        band: &Band,
        merged: &[Option<StableBuf>],
        sheet: &mut Sheet,
    ) -> Result<Parities<StableBuf>, Kind> {
        if band.is_full() {
            return Ok(of_the_pass(band, sheet));
        }
        let over_old = self.reads_over_old(band) < self.reads_of_kept(band);
        let first = self.partial_parities(band, over_old, sheet).await;
        let mut sum = match first {
            Err(Kind::Lost) => Box::pin(self.partial_parities(band, !over_old, sheet)).await?,
            done => done?,
        };
        for (column, cover) in band.covers.iter().enumerate() {
            match (*cover, &merged[column]) {
                (Cover::Full(payload), _) => {
                    sheet.payload.add_to(payload, band.rows.len(), column, &mut sum)?;
                }
                (Cover::Part { .. }, Some(block)) => {
                    sum.add(0, block.contiguous(0, BLOCK), column);
                }
                _ => {}
            }
        }
        Ok(Parities { p: sum.p.map(PoolBuf::freeze), q: sum.q.map(PoolBuf::freeze) })
    }

    /// Blocks that are read to make a column's old block known.
    fn cost(&self, band: &Band, column: usize) -> usize {
        let member = self.geometry.data_member(band.stripe, column);
        if self.holds(member, band.stripe) { 1 } else { band.covers.len() }
    }

    fn reads_of_kept(&self, band: &Band) -> usize {
        let kept = (0..band.covers.len()).filter(|c| band.covers[*c] == Cover::None);
        kept.map(|column| self.cost(band, column)).sum()
    }

    fn reads_over_old(&self, band: &Band) -> usize {
        let changed = (0..band.covers.len()).filter(|c| band.covers[*c] != Cover::None);
        let old: usize = changed.map(|column| self.cost(band, column)).sum();
        old + self.geometry.level.parities()
    }

    async fn partial_parities(
        &self,
        band: &Band,
        over_old: bool,
        sheet: &mut Sheet,
    ) -> Result<Parities<PoolBuf>, Kind> {
        if over_old {
            let old = self.old_parities(band, sheet).await?;
            self.add_old(band, |cover| cover != Cover::None, old, sheet).await
        } else {
            let zeros = |holds: bool, sheet: &mut Sheet| {
                holds.then(|| {
                    let mut zeros = sheet.memory.take(band.rows.len() * BLOCK);
                    zeros.zero(0..band.rows.len() * BLOCK);
                    zeros
                })
            };
            let (p, q) = self.parity_members(band);
            let sum = Parities { p: zeros(p.is_some(), sheet), q: zeros(q.is_some(), sheet) };
            self.add_old(band, |cover| cover == Cover::None, sum, sheet).await
        }
    }

    /// The members that P and Q of a band go to.
    pub(crate) fn parity_members(&self, band: &Band) -> (Option<usize>, Option<usize>) {
        let held = |member: &usize| self.holds(*member, band.stripe);
        let g = &self.geometry;
        (g.parity_member(band.stripe).filter(held), g.q_member(band.stripe).filter(held))
    }

    /// The old parity, verified; [`Kind::Lost`] where it is not what it
    /// should be.
    async fn old_parities(
        &self,
        band: &Band,
        sheet: &mut Sheet,
    ) -> Result<Parities<PoolBuf>, Kind> {
        let g = &self.geometry;
        let (p_member, q_member) = self.parity_members(band);
        let at = g.member_offset(band.stripe, band.rows.start);
        let len = band.rows.len() * BLOCK;
        let mut begin = |member: Option<usize>| {
            member.map(|member| {
                let mut buf = sheet.memory.take(len);
                let sent = self.read_member(member, at, buf.target(0..len));
                (member, buf, sent)
            })
        };
        let begun = [begin(p_member), begin(q_member)];
        let mut arrived: SmallVec<[Option<PoolBuf>; 2]> = SmallVec::new();
        let mut failed = false;
        for begun in begun {
            let Some((member, buf, sent)) = begun else {
                arrived.push(None);
                continue;
            };
            if let Err(error) = self.arrived(sent).await {
                self.note_read_error(member, &error);
                failed = true;
            }
            arrived.push(Some(buf));
        }
        if failed {
            return Err(Kind::Lost);
        }
        let (mut q, mut p) = (arrived.pop().flatten(), arrived.pop().flatten());
        for (i, row) in band.rows.clone().enumerate() {
            let set = sheet.set(g, band.stripe, row);
            let p_tuple = set.parity_tuple(band.stripe, row);
            let q_tuple = set.tuple(Place { stripe: band.stripe, row, column: g.width() - 1 });
            for (buf, tuple) in [(&mut p, p_tuple), (&mut q, p_tuple.map(|_| q_tuple))] {
                let Some(buf) = buf else { continue };
                match tuple {
                    // No block of the row is written.
                    None => buf.zero(i * BLOCK..(i + 1) * BLOCK),
                    Some(tuple) => {
                        let known = p_tuple.is_some_and(|p| p.state == State::Written)
                            && tuple.state == State::Written;
                        let right = tuple.fits(|| guard_of(buf, i * BLOCK));
                        if !known || (!right && !lacks(Protection::VerifiedParity)) {
                            return Err(Kind::Lost);
                        }
                    }
                }
            }
        }
        Ok(Parities { p, q })
    }

    /// Adds the old blocks of some columns to a sum, all read side by side
    /// and verified.
    async fn add_old(
        &self,
        band: &Band,
        which: impl Fn(Cover) -> bool,
        mut sum: Parities<PoolBuf>,
        sheet: &mut Sheet,
    ) -> Result<Parities<PoolBuf>, Kind> {
        let columns = (0..band.covers.len()).filter(|c| which(band.covers[*c]));
        // One mostly: the block of a small write.
        let begun: SmallVec<[Fetch; 1]> = columns
            .map(|column| self.begin_fetch(band.stripe, column, band.rows.clone(), sheet))
            .collect();
        let mut failure = None;
        for fetch in begun {
            let column = fetch.column;
            // Every one is waited for: their memory is the request's.
            match self.finish_fetch(fetch, sheet).await {
                Err(kind) => failure = Some(kind),
                Ok(blocks) => {
                    let blocks = blocks.freeze();
                    for i in 0..band.rows.len() {
                        sum.add(i * BLOCK, blocks.contiguous(i * BLOCK, BLOCK), column);
                    }
                }
            }
        }
        failure.map_or(Ok(sum), Err)
    }
}

impl Parities<PoolBuf> {
    /// Adds a block of a data column, which takes it out where it is in.
    pub(crate) fn add(&mut self, at: usize, block: &[u8], column: usize) {
        if let Some(p) = &mut self.p {
            stableio_onepass::xor_into(block_mut(p, at), block);
        }
        if let Some(q) = &mut self.q {
            gf::mul_xor_into(block_mut(q, at), block, gf::exp(column));
        }
    }
}

/// What the pass computed for a band of full rows.
fn of_the_pass(band: &Band, sheet: &Sheet) -> Parities<StableBuf> {
    let sums = &sheet.sums;
    let span =
        sums.spans.iter().find(|s| s.stripe == band.stripe && s.rows.start <= band.rows.start);
    let part = |parity: &Option<StableBuf>| {
        let (span, parity) = (span?, parity.as_ref()?);
        let at = span.at + (band.rows.start - span.rows.start) as usize * BLOCK;
        Some(parity.slice(at..at + band.rows.len() * BLOCK))
    };
    Parities { p: part(&sums.parity), q: part(&sums.q) }
}
