//! Writes: bands of full rows straight from the pass, partial rows by
//! reading, verified, what they lack; then log, members, settle.
//!
//! WRITE-1: parity is made of the request's own bytes as they were sampled
//! once, and of old blocks that matched their tuples; nothing else.
//!
//! WRITE-2: the rows' token is held from before the first read until every
//! member has settled, so no two writes mix in a row.
//!
//! WRITE-3: log, then data, parity and tuples side by side, then the answer.

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use smallvec::SmallVec;
use stableio_block::{Body, Kind, Outcome, Ticket, path::Stage, sync::join};
use stableio_mem::{BLOCK, PoolBuf, PromisedBuf, Reservation, SgList, StableBuf, Sums};

use crate::bands::{Band, Cover, bands};
use crate::engine::Engine;
use crate::geometry::Place;
use crate::log::Record;
use crate::pages::PageSet;
use crate::read::mismatches;
use crate::repair::{BENCH, block_mut, guard_of};
use crate::tuple::{State, Tuple};

/// What a write puts in its range.
enum Payload {
    Stable(StableBuf),
    Promised(PromisedBuf),
    /// Nothing: the blocks become unwritten.
    Nothing,
}

/// A write on its way: what it is, and what it will do to the members.
struct Sheet {
    at: u64,
    payload: Payload,
    sums: Sums,
    changes: Vec<(Place, Tuple)>,
    writes: Vec<MemberWrite>,
    memory: Reservation,
    sets: Vec<Rc<PageSet>>,
    /// Where old blocks are mended, once one has to be.
    bench: Option<PoolBuf>,
}

/// Old blocks of a column on their way from their member.
struct Fetch {
    stripe: u64,
    column: usize,
    rows: Range<u32>,
    tuples: SmallVec<[Tuple; 16]>,
    buf: PoolBuf,
    read: Option<(usize, Ticket<Outcome>)>,
}

struct MemberWrite {
    member: usize,
    at: u64,
    list: SgList,
}

impl Payload {
    fn source(&self, from: usize, len: usize) -> SgList {
        match self {
            Payload::Stable(buf) => buf.slice(from..from + len).source(),
            Payload::Promised(buf) => buf.source(from, len),
            Payload::Nothing => SgList::default(),
        }
    }

    /// XORs blocks of the payload into `parity` from its byte `to` on.
    fn xor_into(
        &self,
        from: usize,
        blocks: usize,
        parity: &mut PoolBuf,
        to: usize,
    ) -> Result<(), Kind> {
        match self {
            Payload::Nothing => {}
            Payload::Promised(buf) => buf.xor_into(from, blocks, parity, to)?,
            Payload::Stable(buf) => {
                for i in 0..blocks {
                    let block = buf.contiguous(from + i * BLOCK, BLOCK);
                    stableio_onepass::xor_into(block_mut(parity, to + i * BLOCK), block);
                }
            }
        }
        Ok(())
    }
}

impl Sheet {
    fn set(&self, g: &crate::geometry::Geometry, stripe: u64, row: u32) -> &Rc<PageSet> {
        let (page, _) = g.page_of(stripe, row);
        self.sets.iter().find(|s| s.number() == page).expect("loaded before the bands are prepared")
    }

    /// A place to mend in, from the request's own memory: who holds a token
    /// waits for no pool.
    fn bench(&mut self) -> &mut PoolBuf {
        self.bench.get_or_insert_with(|| self.memory.take(BENCH))
    }

    /// The tuple of a block that the payload covers wholly.
    fn new_tuple(&self, payload: usize) -> Tuple {
        let block = (self.at + payload as u64) / BLOCK as u64;
        match self.payload {
            Payload::Nothing => Tuple::UNWRITTEN,
            _ => Tuple::written(self.sums.guards[(block - self.sums.first_block) as usize], block),
        }
    }
}

impl Engine {
    /// Writes a request that the stack has sampled.
    pub(crate) async fn write(
        &self,
        at: u64,
        body: Body,
        sums: Sums,
        memory: Reservation,
    ) -> Result<(), Kind> {
        let len = body.len();
        let payload = match body {
            Body::Stable(buf) => Payload::Stable(buf),
            Body::Promised(buf) => Payload::Promised(buf),
            Body::Foreign(_) | Body::Segments(_) => return Err(Kind::Unsupported),
        };
        self.change(at, len, payload, sums, memory).await
    }

    /// Makes whole blocks unwritten, in pieces that share no page, and tells
    /// the members which chunks nobody needs any more.
    pub(crate) async fn unwrite(&self, at: u64, len: u64) -> Result<(), Kind> {
        let g = &self.geometry;
        let piece = (g.page_stripes() * g.chunk_bytes() * g.columns() as u64).min(8 << 20);
        let (mut start, end) = (at, at + len);
        while start < end {
            let stop = end.min((start / piece + 1) * piece);
            if self.holds_data(start, stop).await? {
                let len = (stop - start) as usize;
                let need =
                    g.row_shape().partial_rows(start, len) * (g.columns() + 3) * BLOCK + BENCH;
                let memory = self.scratch.reserve(need).await?;
                self.change(start, len, Payload::Nothing, Sums::default(), memory).await?;
            }
            start = stop;
        }
        Ok(())
    }

    async fn holds_data(&self, start: u64, stop: u64) -> Result<bool, Kind> {
        for (run, count) in self.geometry.runs(start / BLOCK as u64..stop / BLOCK as u64) {
            let tuples = self.page(run.stripe, run.row).await?.tuples(run, count);
            if tuples.iter().any(|t| t.state != State::Unwritten) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn change(
        &self,
        at: u64,
        len: usize,
        payload: Payload,
        sums: Sums,
        memory: Reservation,
    ) -> Result<(), Kind> {
        let mut stage = self.traffic.enter(Stage::Token);
        let bands = bands(&self.geometry, at, len);
        let token = self.tokens.acquire(self.rows_of(&bands)).await;
        self.check_redundancy()?;

        stage.advance(Stage::Lack);
        let (changes, writes, sets) =
            (Vec::with_capacity(len / BLOCK + 2), Vec::new(), self.sets_of(&bands).await?);
        let mut sheet = Sheet { at, payload, sums, changes, writes, memory, sets, bench: None };
        for band in &bands {
            self.prepare(band, &mut sheet).await?;
        }

        stage.advance(Stage::Log);
        let records = sheet.changes.iter().map(|(place, new)| {
            let old = sheet.set(&self.geometry, place.stripe, place.row).tuple(*place);
            Record { place: *place, old, new: *new }
        });
        let logged = self.log(records.collect()).await?;

        stage.advance(Stage::Members);
        let memory_fault = self.write_members(&mut sheet).await;

        stage.advance(Stage::Settle);
        self.settle_members().await?;
        if let Some(kind) = memory_fault {
            self.undo_fault(&mut sheet).await;
            return Err(kind);
        }
        if matches!(sheet.payload, Payload::Nothing) {
            self.release_rows(&bands, &sheet).await;
        }
        drop((logged, token));
        Ok(())
    }

    /// The one range of rows that a write needs (TOKEN-1).
    fn rows_of(&self, bands: &[Band]) -> Range<u64> {
        let g = &self.geometry;
        let first = bands.iter().map(|b| g.row_number(b.stripe, b.rows.start)).min().unwrap_or(0);
        let end = bands.iter().map(|b| g.row_number(b.stripe, b.rows.end)).max().unwrap_or(0);
        first..end
    }

    async fn sets_of(&self, bands: &[Band]) -> Result<Vec<Rc<PageSet>>, Kind> {
        let g = &self.geometry;
        let mut sets: Vec<Rc<PageSet>> = Vec::new();
        for band in bands {
            for row in band.rows.clone() {
                let (page, _) = g.page_of(band.stripe, row);
                if !sets.iter().rev().any(|s| s.number() == page) {
                    sets.push(self.page(band.stripe, row).await?);
                }
            }
        }
        Ok(sets)
    }

    /// Fills in what a band does: new tuples, data, parity.
    async fn prepare(&self, band: &Band, sheet: &mut Sheet) -> Result<(), Kind> {
        let g = &self.geometry;
        let mut merged: SmallVec<[Option<StableBuf>; 4]> = SmallVec::new();
        for (column, cover) in band.covers.iter().enumerate() {
            merged.push(match *cover {
                Cover::Part { from, len, payload } => {
                    Some(self.merge(band, column, from, len, payload, sheet).await?)
                }
                _ => None,
            });
        }
        let parity_member = g.parity_member(band.stripe).filter(|m| self.alive(*m));
        if let Some(member) = parity_member
            && let Some(parity) = self.parity(band, &merged, sheet).await?
        {
            let at = g.member_offset(band.stripe, band.rows.start);
            sheet.writes.push(MemberWrite { member, at, list: parity.source() });
        }
        for (column, (cover, merged)) in band.covers.iter().zip(merged).enumerate() {
            let member = g.data_member(band.stripe, column);
            let at = g.member_offset(band.stripe, band.rows.start);
            let list = match (*cover, merged) {
                (Cover::None, _) => continue,
                (Cover::Full(payload), _) => {
                    for (i, row) in band.rows.clone().enumerate() {
                        let tuple = sheet.new_tuple(payload + i * BLOCK);
                        sheet.changes.push((Place { stripe: band.stripe, row, column }, tuple));
                    }
                    sheet.payload.source(payload, band.rows.len() * BLOCK)
                }
                (Cover::Part { .. }, Some(block)) => {
                    let place = Place { stripe: band.stripe, row: band.rows.start, column };
                    let guard = stableio_onepass::guard(block.contiguous(0, BLOCK));
                    sheet.changes.push((place, Tuple::written(guard, self.block_number(place))));
                    block.source()
                }
                (Cover::Part { .. }, None) => unreachable!("merged above"),
            };
            if self.alive(member) && !list.is_empty() {
                sheet.writes.push(MemberWrite { member, at, list });
            }
        }
        Ok(())
    }

    /// A block of which the write covers a part: the old one, verified, with
    /// the new bytes over it.
    async fn merge(
        &self,
        band: &Band,
        column: usize,
        from: usize,
        len: usize,
        payload: usize,
        sheet: &mut Sheet,
    ) -> Result<StableBuf, Kind> {
        let place = Place { stripe: band.stripe, row: band.rows.start, column };
        if sheet.set(&self.geometry, place.stripe, place.row).tuple(place).state == State::Lost {
            // What the write leaves of it is gone; only a whole block mends it.
            return Err(self.lost(place));
        }
        let mut block = self.fetch(band.stripe, column, band.rows.clone(), sheet).await?;
        let Payload::Stable(new) = &sheet.payload else {
            unreachable!("what is not whole blocks was made stable above");
        };
        let mut at = from;
        for piece in new.slice(payload..payload + len).pieces() {
            block.copy_from(at, piece);
            at += piece.len();
        }
        Ok(block.freeze())
    }

    /// Verified old blocks of a column; what was never written is zeros.
    async fn fetch(
        &self,
        stripe: u64,
        column: usize,
        rows: Range<u32>,
        sheet: &mut Sheet,
    ) -> Result<PoolBuf, Kind> {
        let fetch = self.begin_fetch(stripe, column, rows, sheet);
        self.finish_fetch(fetch, sheet).await
    }

    fn begin_fetch(
        &self,
        stripe: u64,
        column: usize,
        rows: Range<u32>,
        sheet: &mut Sheet,
    ) -> Fetch {
        let g = &self.geometry;
        let mut buf = sheet.memory.take(rows.len() * BLOCK);
        let tuple = |row| sheet.set(g, stripe, row).tuple(Place { stripe, row, column });
        let tuples: SmallVec<[Tuple; 16]> = rows.clone().map(tuple).collect();
        let member = g.data_member(stripe, column);
        let wanted = tuples.iter().any(|t| t.state == State::Written) && self.alive(member);
        let read = wanted.then(|| {
            let list = buf.target(0..rows.len() * BLOCK);
            (member, self.read_member(member, g.member_offset(stripe, rows.start), list))
        });
        Fetch { stripe, column, rows, tuples, buf, read }
    }

    async fn finish_fetch(&self, fetch: Fetch, sheet: &mut Sheet) -> Result<PoolBuf, Kind> {
        let Fetch { stripe, column, rows, tuples, mut buf, read } = fetch;
        let mut arrived = false;
        if let Some((member, ticket)) = read {
            match ticket.await {
                Ok(_) => arrived = true,
                Err(error) => self.note_read_error(member, &error),
            }
        }
        for (i, (tuple, row)) in tuples.iter().zip(rows).enumerate() {
            match tuple.state {
                State::Unwritten | State::Lost => buf.zero(i * BLOCK..(i + 1) * BLOCK),
                State::Written if arrived && tuple.matches(guard_of(&mut buf, i * BLOCK)) => {}
                State::Written => {
                    let bench = sheet.bench();
                    self.mend_held(Place { stripe, row, column }, bench).await?;
                    let block: [u8; BLOCK] = block_mut(bench, 0)[..].try_into().expect("a block");
                    buf.copy_from(i * BLOCK, &block);
                }
            }
        }
        Ok(buf)
    }

    /// The new parity of a band; `None` where no block of its rows is written
    /// any more.
    async fn parity(
        &self,
        band: &Band,
        merged: &[Option<StableBuf>],
        sheet: &mut Sheet,
    ) -> Result<Option<StableBuf>, Kind> {
        if band.is_full() {
            let spans = sheet.sums.spans.iter();
            let span =
                spans.clone().find(|s| s.stripe == band.stripe && s.rows.start <= band.rows.start);
            return Ok(match (span, &sheet.sums.parity) {
                (Some(span), Some(parity)) => {
                    let at = span.at + (band.rows.start - span.rows.start) as usize * BLOCK;
                    Some(parity.slice(at..at + band.rows.len() * BLOCK))
                }
                _ => None,
            });
        }
        let changed = band.covers.iter().filter(|c| **c != Cover::None).count();
        let kept = band.covers.len() - changed;
        // A missing member's block can be kept out of it only by going over
        // the old parity; otherwise whatever reads less.
        let g = &self.geometry;
        let missing = (0..g.columns()).find(|c| !self.alive(g.data_member(band.stripe, *c)));
        let over_old = match missing {
            Some(column) => band.covers[column] == Cover::None,
            None => changed + 1 < kept,
        };
        let mut parity = match over_old {
            true => match self.old_parity_without(band, sheet).await? {
                Some(parity) => parity,
                None => self.kept_blocks(band, sheet).await?,
            },
            false => self.kept_blocks(band, sheet).await?,
        };
        for (column, cover) in band.covers.iter().enumerate() {
            match (*cover, &merged[column]) {
                (Cover::Full(payload), _) => {
                    sheet.payload.xor_into(payload, band.rows.len(), &mut parity, 0)?
                }
                (Cover::Part { .. }, Some(block)) => {
                    stableio_onepass::xor_into(
                        block_mut(&mut parity, 0),
                        block.contiguous(0, BLOCK),
                    );
                }
                _ => {}
            }
        }
        Ok(Some(parity.freeze()))
    }

    /// The XOR of the blocks that the write leaves alone, each verified.
    async fn kept_blocks(&self, band: &Band, sheet: &mut Sheet) -> Result<PoolBuf, Kind> {
        let sum = self.fetch_sum(band, |cover| cover == Cover::None, None, sheet).await?;
        Ok(sum.unwrap_or_else(|| {
            let mut zeros = sheet.memory.take(band.rows.len() * BLOCK);
            zeros.zero(0..band.rows.len() * BLOCK);
            zeros
        }))
    }

    /// The old parity without the old blocks that the write replaces, all
    /// verified; `None` where the parity is not what it should be.
    async fn old_parity_without(
        &self,
        band: &Band,
        sheet: &mut Sheet,
    ) -> Result<Option<PoolBuf>, Kind> {
        let g = &self.geometry;
        let member = g.parity_member(band.stripe).expect("a level with parity");
        let mut parity = sheet.memory.take(band.rows.len() * BLOCK);
        let at = g.member_offset(band.stripe, band.rows.start);
        if let Err(error) =
            self.read_member(member, at, parity.target(0..band.rows.len() * BLOCK)).await
        {
            self.note_read_error(member, &error);
            return Ok(None);
        }
        for (i, row) in band.rows.clone().enumerate() {
            match sheet.set(g, band.stripe, row).parity_guard(band.stripe, row) {
                None => parity.zero(i * BLOCK..(i + 1) * BLOCK),
                Some(guard) if mismatches(&mut parity, i * BLOCK, &[guard]).is_empty() => {}
                Some(_) => return Ok(None),
            }
        }
        self.fetch_sum(band, |cover| cover != Cover::None, Some(parity), sheet).await
    }

    /// The XOR of `sum` and the old blocks of some columns, all read side by
    /// side and verified.
    async fn fetch_sum(
        &self,
        band: &Band,
        which: impl Fn(Cover) -> bool,
        mut sum: Option<PoolBuf>,
        sheet: &mut Sheet,
    ) -> Result<Option<PoolBuf>, Kind> {
        let columns = (0..band.covers.len()).filter(|c| which(band.covers[*c]));
        let begun: SmallVec<[Fetch; 4]> = columns
            .map(|column| self.begin_fetch(band.stripe, column, band.rows.clone(), sheet))
            .collect();
        for fetch in begun {
            let blocks = self.finish_fetch(fetch, sheet).await?;
            match &mut sum {
                None => sum = Some(blocks),
                Some(sum) => xor_all(sum, blocks),
            }
        }
        Ok(sum)
    }

    /// Tuples, data and parity to the members, side by side. Failing members
    /// are dropped; memory that vanished under a promise is handed back.
    async fn write_members(&self, sheet: &mut Sheet) -> Option<Kind> {
        let mut pages: BTreeSet<(u64, usize)> = BTreeSet::new();
        for (place, tuple) in &sheet.changes {
            let set = sheet.set(&self.geometry, place.stripe, place.row);
            pages.extend(set.set(*place, *tuple).map(|member| (set.number(), member)));
        }
        let mut writes = std::mem::take(&mut sheet.writes);
        writes.sort_by_key(|w| (w.member, w.at));
        let commits = pages.iter().map(|(page, member)| {
            let set = sheet.sets.iter().find(|s| s.number() == *page).expect("one of ours");
            self.commit(set, *member)
        });
        // Side by side; the pages set out first, as they are small and would
        // wait longest behind the data.
        let mut commits = pin!(join(commits));
        let early = poll_fn(|cx| Poll::Ready(commits.as_mut().poll(cx))).await;
        let begun = self.begin_writes(writes);
        let committed = match early {
            Poll::Ready(done) => done,
            Poll::Pending => commits.await,
        };
        for ((_, member), done) in pages.iter().zip(committed) {
            if let Err(error) = done {
                self.drop_member(*member, &error);
            }
        }
        let mut memory_fault = None;
        for (member, ticket) in begun {
            match ticket.await {
                Ok(_) => {}
                Err(error) if error.is_memory() => memory_fault = Some(error.kind),
                Err(error) => self.drop_member(member, &error),
            }
        }
        memory_fault
    }

    /// Begins the writes, which are in the order of members and offsets;
    /// chunks of a member that follow each other are one.
    fn begin_writes(&self, writes: Vec<MemberWrite>) -> Vec<(usize, Ticket<Outcome>)> {
        let mut begun = Vec::new();
        let mut writes = writes.into_iter().peekable();
        while let Some(mut write) = writes.next() {
            let follows = |n: &MemberWrite, w: &MemberWrite| {
                n.member == w.member && n.at == w.at + w.list.len() as u64
            };
            while let Some(next) = writes.next_if(|next| follows(next, &write)) {
                write.list.append(next.list);
            }
            begun.push((write.member, self.write_member(write.member, write.at, write.list)));
        }
        begun
    }

    /// Promised memory vanished on its way to a member: its parity is there,
    /// so the blocks that did not arrive are brought back from it.
    async fn undo_fault(&self, sheet: &mut Sheet) {
        let places: Vec<Place> = sheet.changes.iter().map(|(place, _)| *place).collect();
        for place in places {
            // What can not be brought back stays a mismatch: EIO, for the
            // program that broke its promise.
            let _ = self.mend_held(place, sheet.bench()).await;
        }
    }

    /// Tells the members about whole stripes that hold nothing any more.
    async fn release_rows(&self, bands: &[Band], sheet: &Sheet) {
        let g = &self.geometry;
        let empty = |band: &&Band| {
            band.rows
                .clone()
                .all(|row| sheet.set(g, band.stripe, row).parity_guard(band.stripe, row).is_none())
        };
        let mut begun = Vec::new();
        for band in bands.iter().filter(|b| b.is_full()).filter(empty) {
            let at = g.member_offset(band.stripe, band.rows.start);
            let len = (band.rows.len() * BLOCK) as u64;
            for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
                begun.push(self.discard_member(member, at, len));
            }
        }
        for ticket in begun {
            // Space is not given back: nothing depends on it.
            let _ = ticket.await;
        }
    }
}

fn xor_all(sum: &mut PoolBuf, other: PoolBuf) {
    let other = other.freeze();
    for i in 0..other.len() / BLOCK {
        stableio_onepass::xor_into(block_mut(sum, i * BLOCK), other.contiguous(i * BLOCK, BLOCK));
    }
}
