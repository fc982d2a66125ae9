//! Reads: straight to where the data is wanted, verified there; what does not
//! match is read again privately, under the row's token.
//!
//! READ-1: nothing is answered that did not match its guard. Without checksums
//! there is none: what a member delivers without an error is the answer, and
//! the read holds its rows meanwhile (TOKEN-2).
//!
//! READ-2: a mismatch seen without the token proves nothing: a write may be
//! under way, or the owner changed its buffer. Only
//! [`mend`](Engine::mend) judges.
//!
//! READ-3: who keeps changing its buffers is told so, and its stack reads
//! privately for a while ([`stableio_block::Issuer`]).

use std::ops::Range;

use smallvec::SmallVec;
use stableio_block::{Extent, Into, Issuer, Kind, Outcome, Reply, path::Stage};
use stableio_mem::{BLOCK, ForeignBuf, PoolBuf, Reservation, SgList, StableBuf, doors};
use stableio_onepass::{Format, verify};
use std::sync::Arc;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::Health;
use crate::member::Sent;
use crate::pages::Written;
use crate::tuple::State;
use crate::twin::{Protection, lacks};

/// Where a read goes.
enum Target {
    Foreign(ForeignBuf),
    Pool(PoolBuf),
}

impl Target {
    fn of(into: Into, memory: Option<Reservation>) -> Result<Self, Kind> {
        match into {
            Into::Foreign(buf) => Ok(Target::Foreign(buf)),
            Into::Pool(len) => Ok(Target::Pool(memory.ok_or(Kind::Unsupported)?.take(len))),
            Into::Segments(_) => Err(Kind::Unsupported),
        }
    }

    fn into_reply(self) -> Reply {
        match self {
            Target::Foreign(_) => Reply::Done,
            Target::Pool(buf) => Reply::Data(buf.freeze()),
        }
    }

    fn is_ours(&self) -> bool {
        matches!(self, Target::Pool(_))
    }

    /// A part, for the kernel to fill.
    fn part(&mut self, from: usize, len: usize) -> SgList {
        match self {
            Target::Foreign(buf) => buf.target(from, len),
            Target::Pool(buf) => buf.target(from..from + len),
        }
    }

    fn zero(&mut self, from: usize, len: usize) -> Result<(), Kind> {
        match self {
            Target::Foreign(buf) => Ok(doors::zero_out(buf, from, len)?),
            Target::Pool(buf) => {
                buf.zero(from..from + len);
                Ok(())
            }
        }
    }

    fn put(&mut self, from: usize, block: &StableBuf) -> Result<(), Kind> {
        match self {
            Target::Foreign(buf) => Ok(doors::copy_out(block, buf, from)?),
            Target::Pool(buf) => {
                buf.copy_from(from, block.contiguous(0, BLOCK));
                Ok(())
            }
        }
    }

    /// Blocks from `from` on that do not have the guards they should.
    fn mismatches(&mut self, from: usize, guards: &[u64]) -> Result<Vec<usize>, Kind> {
        match self {
            Target::Foreign(buf) => {
                let verdict = doors::verify_in_place(buf, from, guards)?;
                Ok(verdict.mismatches().iter().map(|i| *i as usize).collect())
            }
            Target::Pool(buf) => Ok(mismatches(buf, from, guards)),
        }
    }
}

/// Blocks of our own memory that do not have the guards they should.
fn mismatches(buf: &mut PoolBuf, from: usize, guards: &[u64]) -> Vec<usize> {
    let (mut mismatches, mut first) = (Vec::new(), 0);
    for piece in buf.range_mut(from..from + guards.len() * BLOCK) {
        let of_piece = &guards[first..first + piece.len() / BLOCK];
        verify(Format::NATIVE, piece, of_piece, |i| mismatches.push(first + i));
        first += of_piece.len();
    }
    mismatches
}

/// Blocks next to each other on a member and in the target.
struct Piece {
    first: Place,
    from: usize,
    /// By block, as they were when the read was planned: one that was written
    /// since does not match, and is read again.
    guards: SmallVec<[u64; 16]>,
}

/// A read of a member, of one or more pieces.
struct MemberRead {
    member: usize,
    at: u64,
    list: SgList,
    pieces: Vec<Piece>,
}

/// A block of which all is at hand that a read needs to know.
pub(crate) struct KnownBlock {
    place: Place,
    member: usize,
    tuple: Written,
}

/// A read of one block on its way.
pub(crate) struct BlockRead {
    block: KnownBlock,
    target: Target,
    /// `None` when it came, or failed.
    sent: Option<Sent>,
    /// Whether what came matches.
    fits: Result<bool, Kind>,
}

impl BlockRead {
    pub(crate) fn into_reply(self) -> Reply {
        self.target.into_reply()
    }
}

impl Engine {
    /// Reads whole blocks.
    pub(crate) async fn read(
        &self,
        at: u64,
        into: Into,
        memory: Option<Reservation>,
        issuer: Option<Arc<Issuer>>,
    ) -> Result<Reply, Kind> {
        self.check_redundancy()?;
        let len = into.len();
        let mut target = Target::of(into, memory)?;
        let place = self.traffic.enter(Stage::Members);
        let token = match self.checksums || lacks(Protection::ReadToken) {
            true => None,
            false => Some(Box::pin(self.tokens.share(self.rows_at(at, len))).await),
        };
        let (reads, mut aside) = self.plan_read(at, len, &mut target).await?;
        let begun: Vec<_> = reads
            .into_iter()
            .map(|read| {
                let sent = self.read_into(&target, read.member, read.at, read.list);
                (sent, read.member, read.pieces)
            })
            .collect();
        // Every ticket is waited for, whatever fails: as long as one is out
        // the kernel may still write into the target.
        let mut failure = None;
        let mut given_up = false;
        for (sent, member, pieces) in begun {
            let failed = match self.arrived(sent).await {
                Ok(_) => false,
                Err(error) if error.is_memory() => {
                    failure = Some(error.kind);
                    continue;
                }
                Err(error) => {
                    given_up |= error.kind == Kind::Stalled;
                    self.note_read_error(member, &error);
                    true
                }
            };
            for piece in pieces {
                if (failed || self.checksums)
                    && let Err(kind) = judge(&piece, failed, &mut target, &mut aside)
                {
                    failure = Some(kind);
                }
            }
        }
        if let Some(kind) = failure {
            return Err(kind);
        }
        if given_up {
            // Into other memory, and without that member.
            target = Target::Pool(self.instead(len));
            aside = (0..len / BLOCK)
                .map(|i| (self.geometry.place(at / BLOCK as u64 + i as u64), i * BLOCK))
                .collect();
        }
        drop((place, token));
        self.read_again(&mut target, aside, issuer).await?;
        Ok(target.into_reply())
    }

    fn read_into(&self, target: &Target, member: usize, at: u64, list: SgList) -> Sent {
        match target.is_ours() {
            true => self.read_member(member, at, list),
            false => self.read_member_foreign(member, at, list),
        }
    }

    /// Reads blocks privately that did not match where they lay, or did not
    /// come; says so to whom it may concern (READ-2, READ-3).
    async fn read_again(
        &self,
        target: &mut Target,
        aside: impl IntoIterator<Item = (Place, usize)>,
        issuer: Option<Arc<Issuer>>,
    ) -> Result<(), Kind> {
        for (place, from) in aside {
            let mended = Box::pin(self.mend(place)).await?;
            if mended.benign && self.checksums && !target.is_ours() && self.was_read(place) {
                Health::add(&self.health.benign_mismatches);
                if let Some(issuer) = &issuer
                    && let Some(event) = issuer.changed_its_buffer()
                {
                    self.health.event(event);
                }
            }
            target.put(from, &mended.block)?;
        }
        Ok(())
    }

    /// Where the block at `at` lies and what its guard is, if that is at hand
    /// and one block is all that is asked for: most reads of guests and
    /// databases, which go a short way.
    pub(crate) fn known_block(&self, at: u64, into: &Into) -> Option<KnownBlock> {
        if into.len() != BLOCK || !self.checksums || self.check_redundancy().is_err() {
            return None;
        }
        let place = self.geometry.place(at / BLOCK as u64);
        let member = self.leg(place);
        let tuple = self.pages.written(&self.geometry, place, member)?;
        self.holds(member, place.stripe).then_some(KnownBlock { place, member, tuple })
    }

    /// Begins to read such a block.
    pub(crate) fn begin_block(
        &self,
        block: KnownBlock,
        into: Into,
        memory: Option<Reservation>,
    ) -> Result<BlockRead, Kind> {
        let mut target = Target::of(into, memory)?;
        let at = self.geometry.member_offset(block.place.stripe, block.place.row);
        let list = target.part(0, BLOCK);
        let sent = Some(self.read_into(&target, block.member, at, list));
        Ok(BlockRead { block, target, sent, fits: Ok(false) })
    }

    /// Whether the block is there already and matches.
    pub(crate) fn block_now(&self, read: &mut BlockRead) -> bool {
        if let Some(outcome) = read.sent.as_mut().and_then(Sent::now) {
            read.sent = None;
            read.fits = self.judge_block(read, outcome);
        }
        read.fits == Ok(true)
    }

    /// Waits for the block, and reads it again where it does not match.
    pub(crate) async fn finish_block(
        &self,
        mut read: BlockRead,
        issuer: Option<Arc<Issuer>>,
    ) -> Result<Reply, Kind> {
        if let Some(sent) = read.sent.take() {
            read.block.tuple.take();
            let place = self.traffic.enter(Stage::Members);
            let outcome = self.arrived(sent).await;
            read.fits = self.judge_block(&mut read, outcome);
            drop(place);
        }
        if !read.fits? {
            self.read_again(&mut read.target, [(read.block.place, 0)], issuer).await?;
        }
        Ok(read.target.into_reply())
    }

    /// Whether a block came and matches.
    fn judge_block(&self, read: &mut BlockRead, outcome: Outcome) -> Result<bool, Kind> {
        match outcome {
            Ok(_) => {
                let tuple = read.block.tuple.tuple();
                Ok(read.target.mismatches(0, &[tuple.guard])?.is_empty())
            }
            Err(error) if error.is_memory() => Err(error.kind),
            Err(error) => {
                if error.kind == Kind::Stalled {
                    read.target = Target::Pool(self.instead(BLOCK));
                }
                self.note_read_error(read.block.member, &error);
                Ok(false)
            }
        }
    }

    /// Reads one block, once its tuple is at hand.
    pub(crate) async fn read_one(
        &self,
        at: u64,
        into: Into,
        memory: Option<Reservation>,
        issuer: Option<Arc<Issuer>>,
    ) -> Result<Reply, Kind> {
        let place = self.geometry.place(at / BLOCK as u64);
        self.tuples(place, 1, self.leg(place)).await?;
        match self.known_block(at, &into) {
            Some(block) => self.finish_block(self.begin_block(block, into, memory)?, issuer).await,
            None => Box::pin(self.read(at, into, memory, issuer)).await,
        }
    }

    /// The range of rows that a read needs (TOKEN-2).
    fn rows_at(&self, at: u64, len: usize) -> Range<u64> {
        let (g, first) = (&self.geometry, at / BLOCK as u64);
        let numbers = g.runs(first..first + (len / BLOCK) as u64).map(|(run, count)| {
            let number = g.row_number(run.stripe, run.row);
            number..number + count as u64
        });
        numbers.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or_default()
    }

    /// The member to read a run from: of a mirror's legs that have it, each
    /// chunk another.
    fn leg(&self, run: Place) -> usize {
        let g = &self.geometry;
        let legs = g.holders(run.stripe, run.column);
        let whole = |leg: &usize| self.holds(*leg, run.stripe);
        let alive = legs.clone().filter(whole).count().max(1);
        let turn = run.stripe as usize % alive;
        legs.clone().filter(whole).nth(turn).unwrap_or(legs.start)
    }

    /// Whether a block was read from a member before it went aside.
    fn was_read(&self, place: Place) -> bool {
        self.geometry
            .holders(place.stripe, place.column)
            .any(|member| self.holds(member, place.stripe))
    }

    /// Cuts a range into reads of members. Blocks that were never written are
    /// zeroed at once; those of missing members go aside.
    async fn plan_read(
        &self,
        at: u64,
        len: usize,
        target: &mut Target,
    ) -> Result<(Vec<MemberRead>, Vec<(Place, usize)>), Kind> {
        let g = &self.geometry;
        let mut pieces: Vec<(usize, Piece)> = Vec::new();
        let mut aside = Vec::new();
        let first = at / BLOCK as u64;
        let mut from = 0;
        for (run, count) in g.runs(first..first + (len / BLOCK) as u64) {
            let member = self.leg(run);
            let tuples = self.tuples(run, count, member).await?;
            for (i, tuple) in tuples.iter().enumerate() {
                let place = Place { row: run.row + i as u32, ..run };
                match tuple.state {
                    State::Lost => return Err(self.lost(place)),
                    State::Unwritten => target.zero(from, BLOCK)?,
                    State::Written if !self.holds(member, run.stripe) => aside.push((place, from)),
                    State::Written => match pieces.last_mut() {
                        Some((_, last)) if last.continues(place, from) => {
                            last.guards.push(tuple.guard);
                        }
                        _ => {
                            let guards = smallvec::smallvec![tuple.guard];
                            pieces.push((member, Piece { first: place, from, guards }));
                        }
                    },
                }
                from += BLOCK;
            }
        }
        // Chunks of a member that follow each other are one read.
        pieces.sort_by_key(|(member, piece)| {
            (*member, g.member_offset(piece.first.stripe, piece.first.row))
        });
        let mut reads: Vec<MemberRead> = Vec::new();
        for (member, piece) in pieces {
            let at = g.member_offset(piece.first.stripe, piece.first.row);
            let list = target.part(piece.from, piece.guards.len() * BLOCK);
            match reads.last_mut() {
                Some(last) if last.member == member && last.at + last.list.len() as u64 == at => {
                    last.list.append(list);
                    last.pieces.push(piece);
                }
                _ => reads.push(MemberRead { member, at, list, pieces: vec![piece] }),
            }
        }
        Ok((reads, aside))
    }

    /// Which parts were written, from the tuples. Where no member has a page
    /// of tuples, none has to be read: a large, mostly empty array is told in
    /// moments.
    pub(crate) async fn map(&self, at: u64, len: u64) -> Result<Vec<Extent>, Kind> {
        const MOST: usize = 4096;
        let g = &self.geometry;
        let (first, end) = (at / BLOCK as u64, (at + len).div_ceil(BLOCK as u64));
        let mut extents: Vec<Extent> = Vec::new();
        if first == end {
            return Ok(extents);
        }
        let pages = g.page_of(g.place(first).stripe, 0).0
            ..g.page_of(g.place(end - 1).stripe, g.chunk_blocks - 1).0 + 1;
        let stored = self.stored_pages(pages).await;
        let mut block = first;
        let mut tell = |count: usize, data: bool| {
            let from = (block * BLOCK as u64).max(at);
            block += count as u64;
            let len = (block * BLOCK as u64).min(at + len) - from;
            match extents.last_mut() {
                Some(last) if last.data == data => last.len += len,
                _ => extents.push(Extent { len, data }),
            }
            extents.len() < MOST
        };
        for (run, count) in g.runs(first..end) {
            let (page, _) = g.page_of(run.stripe, run.row);
            let more = if is_in(&stored, page) || self.pages.holds(page) {
                let tuples = self.page(run.stripe, run.row).await?.tuples(run, count);
                tuples.iter().all(|tuple| tell(1, tuple.state != State::Unwritten))
            } else {
                tell(count, false)
            };
            if !more {
                break;
            }
        }
        Ok(extents)
    }

    /// The pages of the guard region that some member has anything for.
    async fn stored_pages(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let (from, block) = (self.geometry.page_at(pages.start), BLOCK as u64);
        let len = (pages.end - pages.start) * block;
        let alive = (0..self.members.len()).filter(|m| self.alive(*m));
        let begun: Vec<_> = alive.map(|member| self.map_member(member, from, len)).collect();
        let mut stored = Vec::new();
        for sent in begun {
            let mut at = pages.start * block;
            if let Ok(Reply::Map(extents)) = self.arrived(sent).await {
                for extent in extents {
                    let end = at + extent.len;
                    if extent.data {
                        stored.push(at / block..end.div_ceil(block));
                    }
                    at = end;
                }
            }
            // What was not told may hold anything.
            stored.push(at / block..pages.end);
        }
        stored.retain(|range| !range.is_empty());
        merge(stored)
    }
}

/// Verifies a piece where it lies; what does not match goes aside.
fn judge(
    piece: &Piece,
    failed: bool,
    target: &mut Target,
    aside: &mut Vec<(Place, usize)>,
) -> Result<(), Kind> {
    let place = |i: usize| Place { row: piece.first.row + i as u32, ..piece.first };
    if failed {
        aside.extend((0..piece.guards.len()).map(|i| (place(i), piece.from + i * BLOCK)));
        return Ok(());
    }
    for i in target.mismatches(piece.from, &piece.guards)? {
        aside.push((place(i), piece.from + i * BLOCK));
    }
    Ok(())
}

fn is_in(ranges: &[Range<u64>], number: u64) -> bool {
    let next = ranges.partition_point(|range| range.end <= number);
    ranges.get(next).is_some_and(|range| range.contains(&number))
}

/// The same numbers in as few ranges, ascending.
fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Piece {
    fn continues(&self, place: Place, from: usize) -> bool {
        self.first.stripe == place.stripe
            && self.first.column == place.column
            && self.first.row + self.guards.len() as u32 == place.row
            && self.from + self.guards.len() * BLOCK == from
    }
}
