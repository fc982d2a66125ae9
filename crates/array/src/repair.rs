//! Mending: a block that does not match, judged privately under its row's
//! token, reconstructed from the others, and written again.
//!
//! MEND-1: only a private read under the row's token, with no write under
//! way, is evidence against a member.
//!
//! MEND-2: what is written back matched its tuple. A tuple itself is replaced
//! only where the block and its reconstruction agree against it.

use stableio_block::{Error, Kind};
use stableio_mem::{BLOCK, PoolBuf, StableBuf};

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::Health;
use crate::tuple::{State, Tuple};

/// Where mending happens: the block itself, its reconstruction, another.
pub(crate) const BENCH: usize = 3 * BLOCK;
const OWN: usize = 0;
const REBUILT: usize = BLOCK;
const OTHER: usize = 2 * BLOCK;

impl Engine {
    /// The verified content of a block, mended on its member if that was
    /// damaged. Takes the row's token.
    pub(crate) async fn mend(&self, place: Place) -> Result<StableBuf, Kind> {
        // Memory first, then the token: who holds a token never waits for
        // this pool.
        let mut bench = self.repair.reserve(BENCH).await?.take(BENCH);
        let row = self.geometry.row_number(place.stripe, place.row);
        let token = self.tokens.acquire(row..row + 1).await;
        self.mend_held(place, &mut bench).await?;
        drop(token);
        Ok(bench.freeze().slice(OWN..OWN + BLOCK))
    }

    /// The same for who holds the token; the content is the first block of
    /// `bench`, which has [`BENCH`] bytes.
    pub(crate) async fn mend_held(&self, place: Place, bench: &mut PoolBuf) -> Result<(), Kind> {
        let set = self.page(place.stripe, place.row).await?;
        let tuple = set.tuple(place);
        match tuple.state {
            State::Lost => return Err(self.lost(place)),
            State::Unwritten => {
                bench.zero(OWN..OWN + BLOCK);
                return Ok(());
            }
            State::Written => {}
        }
        let member = self.geometry.data_member(place.stripe, place.column);
        let at = self.geometry.member_offset(place.stripe, place.row);
        let own = match self.alive(member) && self.read_block(member, at, bench, OWN).await {
            true => Some(guard_of(bench, OWN)),
            false => None,
        };
        if own.is_some_and(|guard| tuple.matches(guard)) {
            Health::add(&self.health.benign_mismatches);
            return Ok(());
        }
        if let (Some(guard), Some(other)) = (own, set.disputed(place))
            && other.matches(guard)
        {
            return self.mend_tuple(place, other).await;
        }
        let rebuilt = self.reconstruct(place, bench).await.then(|| guard_of(bench, REBUILT));
        let fits = |guard: u64| {
            tuple.matches(guard) || set.disputed(place).is_some_and(|t| t.matches(guard))
        };
        match (own, rebuilt) {
            (_, Some(guard)) if fits(guard) => {
                copy_block(bench, REBUILT, OWN);
                self.write_back(place, own.is_some(), bench).await
            }
            (Some(own), Some(rebuilt)) if own == rebuilt => {
                // Block and reconstruction agree: the tuple is the damage.
                let block = self.block_number(place);
                self.mend_tuple(place, Tuple::written(own, block)).await
            }
            _ => Err(self.lost(place)),
        }
    }

    /// XORs the row's other blocks and its parity into [`REBUILT`]; false
    /// where one of them is missing or does not match its own tuple.
    async fn reconstruct(&self, place: Place, bench: &mut PoolBuf) -> bool {
        let g = &self.geometry;
        let at = g.member_offset(place.stripe, place.row);
        let Some(parity) = g.parity_member(place.stripe) else { return false };
        if !self.alive(parity) || !self.read_block(parity, at, bench, REBUILT).await {
            return false;
        }
        let Ok(set) = self.page(place.stripe, place.row).await else { return false };
        for column in (0..g.columns()).filter(|c| *c != place.column) {
            let other = Place { column, ..place };
            let tuple = set.tuple(other);
            if tuple.state != State::Written {
                continue;
            }
            let member = g.data_member(place.stripe, column);
            if !self.alive(member) || !self.read_block(member, at, bench, OTHER).await {
                return false;
            }
            if !tuple.matches(guard_of(bench, OTHER)) {
                return false;
            }
            xor_block(bench, OTHER, REBUILT);
        }
        true
    }

    /// Writes a reconstructed block to its member, if that takes part.
    async fn write_back(
        &self,
        place: Place,
        was_read: bool,
        bench: &mut PoolBuf,
    ) -> Result<(), Kind> {
        let member = self.geometry.data_member(place.stripe, place.column);
        if !self.alive(member) {
            return Ok(());
        }
        let at = self.geometry.member_offset(place.stripe, place.row);
        if was_read {
            Health::add(&self.health.members[member].mismatches);
        }
        match self.write_member(member, at, bench.target(OWN..OWN + BLOCK)).await {
            Ok(_) => {
                Health::add(&self.health.blocks_mended);
                let name = &self.health.members[member].name;
                self.health
                    .event(format!("{name}: block at byte {at} was damaged, mended from its row"));
                Ok(())
            }
            Err(error) => {
                self.drop_member(member, &error);
                self.settle_members().await
            }
        }
    }

    async fn mend_tuple(&self, place: Place, tuple: Tuple) -> Result<(), Kind> {
        let set = self.page(place.stripe, place.row).await?;
        for member in set.set(place, tuple) {
            if let Err(error) = self.commit(&set, member).await {
                self.drop_member(member, &error);
            }
        }
        Health::add(&self.health.tuples_mended);
        self.health
            .event(format!("tuple of block {} was damaged, mended", self.block_number(place)));
        self.settle_members().await
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
        self.health.event(format!(
            "block {} is lost: nothing matches its checksum",
            self.block_number(place)
        ));
        Kind::Lost
    }

    pub(crate) fn note_read_error(&self, member: usize, error: &Error) {
        Health::add(&self.health.members[member].read_errors);
        self.health.event(format!("read error: {error}"));
    }
}

pub(crate) fn guard_of(buf: &mut PoolBuf, at: usize) -> u64 {
    stableio_onepass::guard(block_mut(buf, at))
}

pub(crate) fn block_mut(buf: &mut PoolBuf, at: usize) -> &mut [u8] {
    buf.range_mut(at..at + BLOCK).next().expect("a block is one piece")
}

fn copy_block(buf: &mut PoolBuf, from: usize, to: usize) {
    let block: [u8; BLOCK] = block_mut(buf, from)[..].try_into().expect("a block");
    block_mut(buf, to).copy_from_slice(&block);
}

fn xor_block(buf: &mut PoolBuf, from: usize, to: usize) {
    let block: [u8; BLOCK] = block_mut(buf, from)[..].try_into().expect("a block");
    stableio_onepass::xor_into(block_mut(buf, to), &block);
}
