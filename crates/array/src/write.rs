//! Writes: bands of full rows straight from the pass, partial rows by
//! reading, verified, what they lack; then log, members, settle.
//!
//! WRITE-2: the rows' token is held from before the first read until every
//! member has settled, so no two writes mix in a row.
//!
//! WRITE-3: log, then data and parity side by side, then the answer. Tuples
//! follow when room is wanted; without a log they go with the data.
//!
//! WRITE-4: the new content goes into the log too where its being written in
//! part could cost more than itself: of rows that are not written wholly,
//! while a member is missing, or the superblocks still say that one is, and
//! where power failure tears blocks; and of every write without checksums,
//! where recovery could tell nothing apart.
//!
//! WRITE-5: what the log does not take at once is written in several steps,
//! each of whole bands and with all of WRITE-3, under the one token.

use std::ops::Range;
use std::rc::Rc;

use smallvec::SmallVec;
use stableio_block::path::{InStage, Stage};
use stableio_block::{Body, Kind, sync::join};
use stableio_mem::{BLOCK, PoolBuf, PromisedBuf, Reservation, SgList, StableBuf, Sums};

use crate::bands::{Band, Cover, bands};
use crate::engine::Engine;
use crate::geometry::{Geometry, Place};
use crate::log::{P_COLUMN, Record, records_needed, with_records};
use crate::member::Sent;
use crate::pages::PageSet;
use crate::parity::{Parities, Summed};
use crate::repair::{BENCH, block_mut, guard_of};
use crate::tuple::{State, Tuple};
use crate::twin::{Protection, lacks};

/// A write, or a part of one: what the stack sampled, and the memory that it
/// may need.
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) len: usize,
    pub(crate) payload: Payload,
    pub(crate) sums: Sums,
    pub(crate) memory: Reservation,
}

/// What a write puts in its range.
pub(crate) enum Payload {
    Stable(StableBuf),
    Promised(PromisedBuf),
    /// Nothing: the blocks become unwritten.
    Nothing,
}

/// A write on its way: what it is, and what it will do to the members.
pub(crate) struct Sheet {
    at: u64,
    pub(crate) payload: Payload,
    pub(crate) sums: Sums,
    changes: Vec<Change>,
    /// How many of them the log takes the content of.
    contents: usize,
    writes: Vec<MemberWrite>,
    pub(crate) memory: Reservation,
    sets: Vec<Rc<PageSet>>,
    /// Where old blocks are mended, once one has to be.
    bench: Option<PoolBuf>,
}

/// What becomes of a block, or of the P of a row.
struct Change {
    place: Place,
    new: Tuple,
    /// Its content, where the log takes that too (WRITE-4).
    logged: Option<SgList>,
}

/// Old blocks of a column on their way from their member.
pub(crate) struct Fetch {
    stripe: u64,
    pub(crate) column: usize,
    rows: Range<u32>,
    tuples: SmallVec<[Tuple; 2]>,
    buf: PoolBuf,
    read: Option<(usize, Sent)>,
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

    /// Takes blocks of the payload up in the parities of their column, and
    /// what these hold of it already, `old`, out of them.
    pub(crate) fn take_up(
        &self,
        from: usize,
        blocks: usize,
        column: usize,
        old: Option<&StableBuf>,
        sum: &mut Parities<PoolBuf>,
    ) -> Result<(), Kind> {
        match self {
            Payload::Nothing => {
                // Zeros: what goes out is all that changes.
                old.into_iter().for_each(|old| sum.update(column, None).take_up(old));
            }
            Payload::Promised(buf) => buf.take_up(from, blocks, sum.update(column, old))?,
            Payload::Stable(buf) => {
                sum.update(column, old).take_up(&buf.slice(from..from + blocks * BLOCK));
            }
        }
        Ok(())
    }
}

impl Sheet {
    pub(crate) fn set(&self, g: &Geometry, stripe: u64, row: u32) -> &Rc<PageSet> {
        let (page, _) = g.page_of(stripe, row);
        self.sets.iter().find(|s| s.number() == page).expect("loaded before the bands are prepared")
    }

    fn change(&mut self, place: Place, new: Tuple, logged: Option<SgList>) {
        self.contents += usize::from(logged.is_some());
        self.changes.push(Change { place, new, logged });
    }

    /// Blocks of the log that the changes take.
    fn log_blocks(&self) -> usize {
        self.contents + records_needed(self.changes.len())
    }

    /// What the log has to know.
    fn records(&mut self, g: &Geometry) -> Vec<Record> {
        let mut changes = std::mem::take(&mut self.changes);
        let records = changes.iter_mut().map(|change| {
            let Change { place, new, ref mut logged } = *change;
            let old = match place.column {
                P_COLUMN => Tuple::UNWRITTEN,
                _ => self.set(g, place.stripe, place.row).tuple(place),
            };
            Record { place, old, new, payload: logged.take() }
        });
        let records = records.collect();
        self.changes = changes;
        records
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
        let part = Part { at, len, payload, sums, memory };
        match self.whole_stripes(&part) {
            Some(whole) => Box::pin(self.write_apart(part, whole)).await,
            None => self.change(part).await,
        }
    }

    /// Makes whole blocks unwritten, in pieces that share no page, and tells
    /// the members which chunks nobody needs any more.
    pub(crate) async fn unwrite(&self, at: u64, len: u64) -> Result<(), Kind> {
        let g = &self.geometry;
        // Small enough for the log, too, where it is small.
        let most = u64::from(g.log_blocks) / 16 * BLOCK as u64;
        let zone = g.zone_stripes() * g.chunk_bytes() * g.columns() as u64;
        let piece = zone.min(8 << 20).min(most);
        let (mut start, end) = (at, at + len);
        while start < end {
            let stop = end.min((start / piece + 1) * piece);
            if self.holds_data(start, stop).await? {
                let len = (stop - start) as usize;
                let need =
                    g.row_shape().partial_rows(start, len) * (g.columns() + 5) * BLOCK + BENCH;
                let memory = self.scratch.reserve(need).await?;
                let (payload, sums) = (Payload::Nothing, Sums::default());
                self.change(Part { at: start, len, payload, sums, memory }).await?;
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

    /// Writes a part, by itself.
    pub(crate) async fn change(&self, part: Part) -> Result<(), Kind> {
        let Part { at, len, payload, sums, memory } = part;
        let mut stage = self.traffic.enter(Stage::Token);
        let bands = bands(&self.geometry, at, len);
        let token = self.tokens.acquire(self.rows_of(&bands)).await;
        self.check_redundancy()?;

        stage.advance(Stage::Lack);
        let (changes, writes, sets) =
            (Vec::with_capacity(len / BLOCK + 2), Vec::new(), self.sets_of(&bands).await?);
        let (contents, bench) = (0, None);
        let mut sheet = Sheet { at, payload, sums, changes, contents, writes, memory, sets, bench };
        for band in &bands {
            if sheet.log_blocks() + self.most_logged(band) > self.log.most() {
                Box::pin(self.carry_out(&mut sheet, &mut stage)).await?;
                sheet.changes.clear();
                sheet.contents = 0;
                stage = self.traffic.enter(Stage::Lack);
            }
            self.prepare(band, &mut sheet).await?;
        }
        self.carry_out(&mut sheet, &mut stage).await?;
        if matches!(sheet.payload, Payload::Nothing) {
            Box::pin(self.release_rows(&bands, &sheet)).await;
        }
        drop(token);
        Ok(())
    }

    /// Does to the members what the sheet says, and waits until they have
    /// settled (WRITE-3).
    async fn carry_out(&self, sheet: &mut Sheet, stage: &mut InStage) -> Result<(), Kind> {
        stage.advance(Stage::Log);
        let logged = self.log(sheet.records(&self.geometry)).await?;

        stage.advance(Stage::Members);
        let memory_fault = self.write_members(sheet).await;

        stage.advance(Stage::Settle);
        self.settle_members().await?;
        if let Some(kind) = memory_fault {
            Box::pin(self.undo_fault(sheet)).await;
            return Err(kind);
        }
        drop(logged);
        Ok(())
    }

    /// Blocks of the log that a band takes at most: with the content of all
    /// that it covers, and of the parity.
    fn most_logged(&self, band: &Band) -> usize {
        let covered = band.covers.iter().filter(|c| **c != Cover::None).count();
        let blocks = band.rows.len() * (covered + self.geometry.level.parities());
        with_records(blocks)
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
                    Some(Box::pin(self.merge(band, column, from, len, payload, sheet)).await?)
                }
                _ => None,
            });
        }
        let parities = g.level.parities();
        let missing = self.missing() > 0 || self.saves.say_missing();
        let part = parities > 0 && (!band.is_full() || missing);
        let told_apart = self.checksums || lacks(Protection::LoggedContent);
        let log_content = part || self.atomic_unit < BLOCK as u32 || !told_apart;
        let at = g.member_offset(band.stripe, band.rows.start);
        if parities > 0 {
            let parity = self.parities(band, &merged, sheet).await?;
            self.change_parity(band, parity, log_content, sheet);
        }
        for (column, (cover, merged)) in band.covers.iter().zip(merged).enumerate() {
            let place = |row| Place { stripe: band.stripe, row, column };
            let list = match (*cover, merged) {
                (Cover::None, _) => continue,
                (Cover::Full(payload), _) => {
                    for (i, row) in band.rows.clone().enumerate() {
                        let from = payload + i * BLOCK;
                        let new = sheet.new_tuple(from);
                        let content = log_content && new.state == State::Written;
                        let logged = content.then(|| sheet.payload.source(from, BLOCK));
                        sheet.change(place(row), new, logged);
                    }
                    sheet.payload.source(payload, band.rows.len() * BLOCK)
                }
                (Cover::Part { .. }, Some(block)) => {
                    let place = place(band.rows.start);
                    let guard = stableio_onepass::guard(block.contiguous(0, BLOCK));
                    let new = Tuple::written(guard, self.block_number(place));
                    let logged = log_content.then(|| block.source());
                    sheet.change(place, new, logged);
                    block.source()
                }
                (Cover::Part { .. }, None) => unreachable!("merged above"),
            };
            if list.is_empty() {
                continue;
            }
            let holders = g.holders(band.stripe, column);
            for member in holders.filter(|m| self.holds(*m, band.stripe)) {
                sheet.writes.push(MemberWrite { member, at, list: list.duplicate() });
            }
        }
        Ok(())
    }

    /// Fills in what becomes of a band's parity.
    fn change_parity(
        &self,
        band: &Band,
        parity: Parities<Summed>,
        log_content: bool,
        sheet: &mut Sheet,
    ) {
        let g = &self.geometry;
        let at = g.member_offset(band.stripe, band.rows.start);
        let (p_member, q_member) = self.parity_members(band);
        let columns = [(P_COLUMN, p_member, parity.p), (g.columns(), q_member, parity.q)];
        for (column, member, blocks) in columns {
            // Q has a tuple of its own; of P only the content is logged.
            let is_q = column != P_COLUMN && g.width() > g.columns();
            let rows = if is_q || log_content { band.rows.clone() } else { 0..0 };
            for (i, row) in rows.enumerate() {
                let place = Place { stripe: band.stripe, row, column };
                let new = blocks.as_ref().map_or(Tuple::UNWRITTEN, |blocks| {
                    Tuple::written(blocks.guards[i], self.block_number(place))
                });
                let logged = blocks
                    .as_ref()
                    .filter(|_| log_content)
                    .map(|blocks| blocks.bytes.slice(i * BLOCK..(i + 1) * BLOCK).source());
                if is_q || logged.is_some() {
                    sheet.change(place, new, logged);
                }
            }
            if let (Some(member), Some(blocks)) = (member, blocks) {
                sheet.writes.push(MemberWrite { member, at, list: blocks.bytes.source() });
            }
        }
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

    pub(crate) fn begin_fetch(
        &self,
        stripe: u64,
        column: usize,
        rows: Range<u32>,
        sheet: &mut Sheet,
    ) -> Fetch {
        let g = &self.geometry;
        let mut buf = sheet.memory.take(rows.len() * BLOCK);
        let tuple = |row| sheet.set(g, stripe, row).tuple(Place { stripe, row, column });
        let tuples: SmallVec<[Tuple; 2]> = rows.clone().map(tuple).collect();
        let member = g.data_member(stripe, column);
        let wanted = tuples.iter().any(|t| t.state == State::Written) && self.holds(member, stripe);
        let read = wanted.then(|| {
            let list = buf.target(0..rows.len() * BLOCK);
            (member, self.read_member(member, g.member_offset(stripe, rows.start), list))
        });
        Fetch { stripe, column, rows, tuples, buf, read }
    }

    pub(crate) async fn finish_fetch(
        &self,
        fetch: Fetch,
        sheet: &mut Sheet,
    ) -> Result<PoolBuf, Kind> {
        let Fetch { stripe, column, rows, tuples, mut buf, read } = fetch;
        let mut arrived = false;
        if let Some((member, sent)) = read {
            match self.arrived(sent).await {
                Ok(_) => arrived = true,
                Err(error) => {
                    self.note_read_error(member, &error);
                    if error.kind == Kind::Stalled {
                        buf = self.instead(buf.len());
                    }
                }
            }
        }
        for (i, (tuple, row)) in tuples.iter().zip(rows).enumerate() {
            match tuple.state {
                State::Unwritten | State::Lost => buf.zero(i * BLOCK..(i + 1) * BLOCK),
                State::Written
                    if arrived
                        && (tuple.fits(|| guard_of(&mut buf, i * BLOCK))
                            || lacks(Protection::VerifiedParity)) => {}
                State::Written => {
                    let bench = sheet.bench();
                    // Rare, and large: kept out of the futures of all writes.
                    Box::pin(self.mend_held(Place { stripe, row, column }, bench)).await?;
                    let block: [u8; BLOCK] = block_mut(bench, 0)[..].try_into().expect("a block");
                    buf.copy_from(i * BLOCK, &block);
                }
            }
        }
        Ok(buf)
    }

    /// Data and parity to the members, side by side. Failing members are
    /// dropped; memory that vanished under a promise is handed back.
    async fn write_members(&self, sheet: &mut Sheet) -> Option<Kind> {
        let g = &self.geometry;
        for change in sheet.changes.iter().filter(|c| c.place.column != P_COLUMN) {
            sheet.set(g, change.place.stripe, change.place.row).set(change.place, change.new);
        }
        let mut writes = std::mem::take(&mut sheet.writes);
        writes.sort_by_key(|w| (w.member, w.at));
        let begun = self.begin_writes(writes);
        if !self.log.is_on() {
            let members = 0..self.members.len();
            let commits = sheet
                .sets
                .iter()
                .flat_map(|set| members.clone().map(move |member| self.commit(set, member)));
            join(commits).await;
        }
        let mut memory_fault = None;
        for sent in begun {
            memory_fault = self.settled(sent).await.or(memory_fault);
        }
        memory_fault
    }

    /// Begins the writes, which are in the order of members and offsets;
    /// chunks of a member that follow each other are one.
    fn begin_writes(&self, writes: Vec<MemberWrite>) -> Vec<Sent> {
        let filling = self.is_filling();
        let mut begun = Vec::new();
        let mut writes = writes.into_iter().peekable();
        while let Some(mut write) = writes.next() {
            let follows = |n: &MemberWrite, w: &MemberWrite| {
                n.member == w.member
                    && n.at == w.at + w.list.len() as u64
                    && (!filling || self.geometry.zone_at(n.at) == self.geometry.zone_at(w.at))
            };
            while let Some(next) = writes.next_if(|next| follows(next, &write)) {
                write.list.append(next.list);
            }
            begun.push(self.write_member(write.member, write.at, write.list));
        }
        begun
    }

    /// Promised memory vanished on its way to a member: its parity is there,
    /// so the blocks that did not arrive are brought back from it.
    async fn undo_fault(&self, sheet: &mut Sheet) {
        let places = sheet.changes.iter().map(|c| c.place).filter(|p| p.column != P_COLUMN);
        for place in places.collect::<Vec<_>>() {
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
                .all(|row| sheet.set(g, band.stripe, row).parity_tuple(band.stripe, row).is_none())
        };
        let mut begun = Vec::new();
        for band in bands.iter().filter(|b| b.is_full()).filter(empty) {
            let at = g.member_offset(band.stripe, band.rows.start);
            let len = (band.rows.len() * BLOCK) as u64;
            for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
                begun.push(self.discard_member(member, at, len));
            }
        }
        for sent in begun {
            self.settled(sent).await;
        }
    }
}
