//! The new parity of the rows of a band: out of the pass where it covers
//! them wholly; else made of the blocks that the write keeps, or of the old
//! parity and the old blocks, whichever reads less.
//!
//! WRITE-1: parity is made of the request's own bytes as they were sampled
//! once, and of old blocks that matched their tuples; nothing else. Where one
//! way finds a block that does not, the other is tried; else the write fails.

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf, StableBuf, Update};
use stableio_onepass::gf;

use crate::bands::{Band, Cover};
use crate::engine::Engine;
use crate::geometry::Place;
use crate::repair::guard_of;
use crate::tuple::State;
use crate::twin::{Protection, lacks};
use crate::write::{Fetch, Sheet};

/// P and Q of a band's rows.
pub(crate) struct Parities<B> {
    pub(crate) p: Option<B>,
    pub(crate) q: Option<B>,
}

/// Blocks, and their guards.
pub(crate) struct Summed {
    pub(crate) bytes: StableBuf,
    pub(crate) guards: SmallVec<[u64; 4]>,
}

impl Engine {
    /// The new parity of a band, for the members that hold it; none where no
    /// block of its rows is written any more.
    pub(crate) async fn parities(
        &self,
        band: &Band,
        merged: &[Option<StableBuf>],
        sheet: &mut Sheet,
    ) -> Result<Parities<Summed>, Kind> {
        if band.is_full() {
            return Ok(of_the_pass(band, sheet));
        }
        let over_old = self.reads_over_old(band) < self.reads_of_kept(band);
        let first = self.partial_parities(band, over_old, merged, sheet).await;
        let sum = match first {
            Err(Kind::Lost) => {
                Box::pin(self.partial_parities(band, !over_old, merged, sheet)).await?
            }
            done => done?,
        };
        Ok(Parities { p: sum.p.map(Summed::of), q: sum.q.map(Summed::of) })
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

    /// The parity of a band that is not full: of the blocks that it keeps and
    /// of the new ones, or over the old parity, where each new block takes the
    /// place of the old.
    async fn partial_parities(
        &self,
        band: &Band,
        over_old: bool,
        merged: &[Option<StableBuf>],
        sheet: &mut Sheet,
    ) -> Result<Parities<PoolBuf>, Kind> {
        let mut sum = match over_old {
            true => self.old_parities(band, sheet).await?,
            false => self.no_parities(band, sheet),
        };
        let columns = 0..band.covers.len();
        let is_read = |column: &usize| (band.covers[*column] != Cover::None) == over_old;
        // One mostly: the block of a small write.
        let begun: SmallVec<[Fetch; 1]> = columns
            .clone()
            .filter(is_read)
            .map(|column| self.begin_fetch(band.stripe, column, band.rows.clone(), sheet))
            .collect();
        let mut done = Ok(());
        for fetch in begun {
            let column = fetch.column;
            // Every one is waited for: their memory is the request's.
            let old = self.finish_fetch(fetch, sheet).await.map(PoolBuf::freeze);
            done = done.and(match old {
                Ok(old) if over_old => {
                    take_up_new(band, column, Some(&old), merged, sheet, &mut sum)
                }
                old => old.map(|kept| sum.update(column, None).take_up(&kept)),
            });
        }
        for column in columns.filter(|column| !is_read(column) && !over_old) {
            done = done.and_then(|()| take_up_new(band, column, None, merged, sheet, &mut sum));
        }
        done.map(|()| sum)
    }

    /// Zeros, for the parities of a band that a member holds.
    fn no_parities(&self, band: &Band, sheet: &mut Sheet) -> Parities<PoolBuf> {
        let len = band.rows.len() * BLOCK;
        let mut zeros = |holds: bool| {
            let mut zeros = holds.then(|| sheet.memory.take(len))?;
            zeros.zero(0..len);
            Some(zeros)
        };
        let (p, q) = self.parity_members(band);
        Parities { p: zeros(p.is_some()), q: zeros(q.is_some()) }
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
}

impl Parities<PoolBuf> {
    /// How blocks of a data column are taken up, in place of `old`, if that is
    /// in.
    pub(crate) fn update<'a>(
        &'a mut self,
        column: usize,
        old: Option<&'a StableBuf>,
    ) -> Update<'a> {
        let Parities { p, q } = self;
        Update { p: p.as_mut(), q: q.as_mut(), coefficient: gf::exp(column), at: 0, old }
    }
}

impl Summed {
    fn of(blocks: PoolBuf) -> Summed {
        let bytes = blocks.freeze();
        let blocks = (0..bytes.len() / BLOCK).map(|i| bytes.contiguous(i * BLOCK, BLOCK));
        Summed { guards: blocks.map(stableio_onepass::guard).collect(), bytes }
    }
}

/// Takes up what a write puts in a column of a band, in place of `old`, if that
/// is in.
fn take_up_new(
    band: &Band,
    column: usize,
    old: Option<&StableBuf>,
    merged: &[Option<StableBuf>],
    sheet: &Sheet,
    sum: &mut Parities<PoolBuf>,
) -> Result<(), Kind> {
    match (band.covers[column], &merged[column]) {
        (Cover::Full(payload), _) => {
            sheet.payload.take_up(payload, band.rows.len(), column, old, sum)?;
        }
        (_, Some(block)) => sum.update(column, old).take_up(block),
        (_, None) => {}
    }
    Ok(())
}

/// What the pass computed for a band of full rows.
fn of_the_pass(band: &Band, sheet: &Sheet) -> Parities<Summed> {
    let sums = &sheet.sums;
    let span =
        sums.spans.iter().find(|s| s.stripe == band.stripe && s.rows.start <= band.rows.start);
    let part = |parity: &Option<StableBuf>, guards: &[u64]| {
        let (span, parity) = (span?, parity.as_ref()?);
        let first = span.at / BLOCK + (band.rows.start - span.rows.start) as usize;
        let blocks = first..first + band.rows.len();
        let bytes = parity.slice(blocks.start * BLOCK..blocks.end * BLOCK);
        Some(Summed { bytes, guards: SmallVec::from_slice(&guards[blocks]) })
    };
    Parities { p: part(&sums.parity, &sums.parity_guards), q: part(&sums.q, &sums.q_guards) }
}
