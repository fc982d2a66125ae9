//! Mending: a block that does not match, judged privately under its row's
//! token, reconstructed from the others, and written again.
//!
//! MEND-1: only a private read under the row's token, with no write under
//! way, is evidence against a member.
//!
//! MEND-2: what is written back matched its tuple. A tuple itself is replaced
//! only where there is no log, and the block and every reconstruction of it
//! agree against the tuple.
//!
//! MEND-3: a reconstruction uses only other blocks that matched their tuples,
//! and of the sets of blocks that may be taken as gone each is tried; what
//! comes out counts only if it matches. Without checksums everything that was
//! read matches, and the row's parity counts unless a block of it is lost.

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf, StableBuf};
use stableio_onepass::gf;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::{Health, Often};
use crate::log::Record;
use crate::pages::PageSet;
use crate::tuple::{State, Tuple};
use crate::twin::{Protection, lacks};

/// Where mending happens: the block itself, and what else it takes.
pub(crate) const BENCH: usize = 4 * BLOCK;
const OWN: usize = 0;
const P: usize = BLOCK;
const Q: usize = 2 * BLOCK;
const OTHER: usize = 3 * BLOCK;

/// The verified content of a block.
pub(crate) struct Mended {
    pub(crate) block: StableBuf,
    /// The member had it: whoever saw something else changed it there.
    pub(crate) benign: bool,
}

impl Engine {
    /// The verified content of a block, mended on its member if that was
    /// damaged. Takes the row's token.
    pub(crate) async fn mend(&self, place: Place) -> Result<Mended, Kind> {
        // Memory first, then the token: who holds a token never waits for
        // this pool.
        let mut bench = self.repair.reserve(BENCH).await?.take(BENCH);
        let row = self.geometry.row_number(place.stripe, place.row);
        let rows = if lacks(Protection::RowToken) { 0..0 } else { row..row + 1 };
        let token = self.tokens.acquire(rows).await;
        let benign = self.mend_held(place, &mut bench).await?;
        drop(token);
        Ok(Mended { block: bench.freeze().slice(OWN..OWN + BLOCK), benign })
    }

    /// The same for who holds the token; the content is the first block of
    /// `bench`, which has [`BENCH`] bytes. Says whether a member had it and
    /// none was damaged.
    pub(crate) async fn mend_held(&self, place: Place, bench: &mut PoolBuf) -> Result<bool, Kind> {
        let g = &self.geometry;
        let set = self.page(place.stripe, place.row).await?;
        let tuple = set.tuple(place);
        match tuple.state {
            State::Lost => return Err(self.lost(place)),
            State::Unwritten => {
                bench.zero(OWN..OWN + BLOCK);
                return Ok(true);
            }
            State::Written => {}
        }
        let at = g.member_offset(place.stripe, place.row);
        let holders = g.holders(place.stripe, place.column);
        // Every copy, with what it was found to be.
        let mut copies: SmallVec<[(usize, Option<u64>); 8]> = SmallVec::new();
        let mut good = false;
        for member in holders.filter(|m| self.holds(*m, place.stripe)) {
            let to = if good { OTHER } else { OWN };
            let came = self.read_block(member, at, bench, to).await;
            let guard = came.then(|| guard_of(bench, to));
            good |= guard.is_some_and(|guard| tuple.matches(guard));
            copies.push((member, guard));
        }
        let damaged = |(_, guard): &&(usize, Option<u64>)| !guard.is_some_and(|g| tuple.matches(g));
        let damaged: SmallVec<[_; 8]> = copies.iter().filter(damaged).copied().collect();
        if good && damaged.is_empty() {
            return Ok(true);
        }
        if !good {
            let candidates = self.reconstruct(place, tuple, bench).await;
            good = candidates.last().is_some_and(|guard| tuple.matches(*guard));
            // Without a log a crash may leave a new tuple over old data and old
            // parity, which then agree. With one that can not be, and what
            // agrees against a tuple is damage of the same kind on several.
            if !good && !self.log.is_on() {
                let seen: SmallVec<[u64; 8]> = copies.iter().filter_map(|c| c.1).collect();
                let all = candidates.iter().chain(&seen).all(|guard| Some(guard) == seen.first());
                if all && candidates.len() + seen.len() > 1 {
                    let old = Tuple { guard: seen[0], ..tuple };
                    return self.mend_tuple(place, old, bench).await;
                }
            }
        }
        if !good {
            return Err(self.lost(place));
        }
        self.write_back(place, &damaged, bench).await?;
        Ok(false)
    }

    /// Rebuilds a block into [`OWN`] from its row. Gives the guards of what
    /// came out, the last one that of `OWN`; it matches `tuple` if any did.
    async fn reconstruct(
        &self,
        place: Place,
        tuple: Tuple,
        bench: &mut PoolBuf,
    ) -> SmallVec<[u64; 2]> {
        let g = &self.geometry;
        let mut guards = SmallVec::new();
        let Some(p_member) = g.parity_member(place.stripe) else { return guards };
        let Ok(set) = self.page(place.stripe, place.row).await else { return guards };
        if set.parity_tuple(place.stripe, place.row).is_none_or(|p| p.state == State::Lost) {
            return guards;
        }
        let at = g.member_offset(place.stripe, place.row);
        bench.zero(P..OTHER);
        let Some(gone) = self.sum_row(place, bench).await else { return guards };
        let is_q = place.column == g.columns();
        if is_q && gone.is_none() {
            guards.push(guard_of(bench, Q));
            copy_block(bench, Q, OWN);
            return guards;
        }
        let p = self.add_parity(p_member, at, None, P, bench, place).await;
        let q_place = Place { column: g.columns(), ..place };
        let q = match g.q_member(place.stripe).filter(|_| !is_q) {
            Some(member) => self.add_parity(member, at, Some(q_place), Q, bench, place).await,
            None => false,
        };
        match gone {
            None => {
                if p {
                    copy_block(bench, P, OWN);
                    guards.push(guard_of(bench, OWN));
                }
                if q && !guards.last().is_some_and(|guard| tuple.matches(*guard)) {
                    gf::reconstruct_from_q(block_mut(bench, Q), place.column);
                    copy_block(bench, Q, OWN);
                    guards.push(guard_of(bench, OWN));
                }
            }
            Some(other) if p && q => {
                let mut sums = [P, Q]
                    .map(|at| <[u8; BLOCK]>::try_from(&*block_mut(bench, at)).expect("a block"));
                let [p, q] = &mut sums;
                gf::reconstruct_two(p, q, place.column, other);
                bench.copy_from(OWN, p);
                guards.push(guard_of(bench, OWN));
            }
            Some(_) => {}
        }
        guards
    }

    /// The sums of the row's other data blocks, as P and as Q take them, into
    /// [`P`] and [`Q`]; `None` if more than one of them is gone, else which.
    async fn sum_row(&self, place: Place, bench: &mut PoolBuf) -> Option<Option<usize>> {
        let g = &self.geometry;
        let at = g.member_offset(place.stripe, place.row);
        let set = self.page(place.stripe, place.row).await.ok()?;
        let mut gone = None;
        for column in (0..g.columns()).filter(|c| *c != place.column) {
            let tuple = set.tuple(Place { column, ..place });
            if tuple.state != State::Written {
                continue;
            }
            let member = g.data_member(place.stripe, column);
            let came = self.holds(member, place.stripe)
                && self.read_block(member, at, bench, OTHER).await
                && (tuple.fits(|| guard_of(bench, OTHER)) || lacks(Protection::VerifiedParity));
            if !came {
                if gone.is_some() || g.level.parities() < 2 {
                    return None;
                }
                gone = Some(column);
                continue;
            }
            add_column(bench, OTHER, column);
        }
        Some(gone)
    }

    /// Adds a row's P or Q to the sum at `to`; says whether it came. Q has a
    /// tuple to match; P proves itself by what comes out.
    async fn add_parity(
        &self,
        member: usize,
        at: u64,
        q: Option<Place>,
        to: usize,
        bench: &mut PoolBuf,
        place: Place,
    ) -> bool {
        if !self.holds(member, place.stripe) || !self.read_block(member, at, bench, OTHER).await {
            return false;
        }
        if let Some(q) = q {
            let Ok(set) = self.page(q.stripe, q.row).await else { return false };
            if !set.tuple(q).fits(|| guard_of(bench, OTHER)) {
                return false;
            }
        }
        xor_block(bench, OTHER, to);
        true
    }

    /// Writes a block to the members whose copy was found damaged.
    async fn write_back(
        &self,
        place: Place,
        damaged: &[(usize, Option<u64>)],
        bench: &mut PoolBuf,
    ) -> Result<(), Kind> {
        let at = self.geometry.member_offset(place.stripe, place.row);
        for (member, was_read) in damaged {
            if was_read.is_some() {
                Health::add(&self.health.members[*member].mismatches);
            }
            let sent = self.write_member(*member, at, bench.target(OWN..OWN + BLOCK));
            self.settled(sent).await;
            if self.holds(*member, place.stripe) {
                Health::add(&self.health.blocks_mended);
                let name = self.health.members[*member].name();
                self.health.often(Often::Mended, || {
                    format!("{name}: block at byte {at} was damaged, mended from its row")
                });
            }
        }
        self.settle_members().await
    }

    /// Replaces a tuple by one for what is on the medium, and reads that.
    async fn mend_tuple(
        &self,
        place: Place,
        tuple: Tuple,
        bench: &mut PoolBuf,
    ) -> Result<bool, Kind> {
        let g = &self.geometry;
        let set = self.page(place.stripe, place.row).await?;
        self.change_tuple(&set, place, tuple).await?;
        Health::add(&self.health.tuples_mended);
        self.health.often(Often::Tuple, || {
            format!("tuple of block {} was damaged, mended", self.block_number(place))
        });
        self.settle_members().await?;
        let at = g.member_offset(place.stripe, place.row);
        for member in g.holders(place.stripe, place.column) {
            if self.holds(member, place.stripe)
                && self.read_block(member, at, bench, OWN).await
                && tuple.matches(guard_of(bench, OWN))
            {
                return Ok(false);
            }
        }
        Err(self.lost(place))
    }

    /// Changes a tuple without a write: the log hears of it first, as of any
    /// other change.
    pub(crate) async fn change_tuple(
        &self,
        set: &PageSet,
        place: Place,
        new: Tuple,
    ) -> Result<(), Kind> {
        let record = Record { place, old: set.tuple(place), new, payload: None };
        let logged = self.log(vec![record]).await?;
        set.set(place, new);
        if !self.log.is_on() {
            for member in 0..self.members.len() {
                self.commit(set, member).await;
            }
        }
        drop(logged);
        Ok(())
    }

    /// The number of a block on the array.
    pub(crate) fn block_number(&self, place: Place) -> u64 {
        let g = &self.geometry;
        place.stripe * g.row_shape().stripe_blocks()
            + place.column as u64 * u64::from(g.chunk_blocks)
            + u64::from(place.row)
    }

    /// Counts and names a block that nothing brings back.
    pub(crate) fn lost(&self, place: Place) -> Kind {
        Health::add(&self.health.lost_reads);
        self.health.often(Often::Lost, || {
            let why = if self.checksums { "matches its checksum" } else { "brings it back" };
            format!("block {} is lost: nothing {why}", self.block_number(place))
        });
        Kind::Lost
    }
}

pub(crate) fn guard_of(buf: &mut PoolBuf, at: usize) -> u64 {
    stableio_onepass::guard(block_mut(buf, at))
}

pub(crate) fn block_mut(buf: &mut PoolBuf, at: usize) -> &mut [u8] {
    buf.range_mut(at..at + BLOCK).next().expect("a block is one piece")
}

/// Adds the block at `from`, of a data column, to the sums of P and Q.
fn add_column(bench: &mut PoolBuf, from: usize, column: usize) {
    let block: [u8; BLOCK] = block_mut(bench, from)[..].try_into().expect("a block");
    stableio_onepass::xor_into(block_mut(bench, P), &block);
    gf::mul_xor_into(block_mut(bench, Q), &block, gf::exp(column));
}

pub(crate) fn copy_block(buf: &mut PoolBuf, from: usize, to: usize) {
    let block: [u8; BLOCK] = block_mut(buf, from)[..].try_into().expect("a block");
    block_mut(buf, to).copy_from_slice(&block);
}

pub(crate) fn xor_block(buf: &mut PoolBuf, from: usize, to: usize) {
    let block: [u8; BLOCK] = block_mut(buf, from)[..].try_into().expect("a block");
    stableio_onepass::xor_into(block_mut(buf, to), &block);
}
