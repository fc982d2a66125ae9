//! The log: before data or tuples are overwritten it holds, durably, their
//! old and new guards, and where a crash could otherwise mix a row up, the
//! new blocks and the new parity too. After a crash it says which rows were
//! being written and which versions of their blocks are valid.
//!
//! ```text
//! record block, 4096 bytes                  record, 56 bytes
//!    0  CRC-64/NVME of bytes 8 to 4095  8      0  stripe              8
//!    8  sequence                        8      8  row                 4
//!   16  epoch                           8     12  column; 255: P      1
//!   24  number of the opening           8     13  zero                3
//!   32  tail                            8     16  sequence of its     8
//!   40  durable                         8         payload; 0: none
//!   48  first sequence of the batch     8     24  old tuple          16
//!   56  blocks of the batch             4     40  new tuple          16
//!   60  record blocks of the batch      2
//!   62  records in this block           2
//!   64  72 records                   4032
//! ```
//!
//! A batch is its record blocks, then the blocks of payload, as they are. The
//! block with sequence `s` lies in slot `s mod blocks` of one member more than
//! may be missing. What is before `tail` is not needed any more; the data of
//! what is before `durable` was flushed.
//!
//! LOG-1: a batch is durable on its members before the data that it is about
//! is written.
//!
//! LOG-2: a slot is used again only after a tail behind it is durable, and a
//! tail moves only over writes that settled, whose tuples were written to
//! their pages, and after that a flush of every member.
//!
//! LOG-3: a batch counts only whole: what was being written when a crash came
//! had not begun to change any data. Before recovery follows the last one it
//! is made as durable as the others.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_block::exec::yield_now;
use stableio_block::sync::Condition;
use stableio_mem::{BLOCK, PoolBuf, SgList};

use crate::engine::Engine;
use crate::geometry::{Geometry, LOG_AT, Place};
use crate::member::Sent;
use crate::superblock::{u32_at, u64_at};
use crate::tuple::Tuple;
use crate::twin::{Protection, lacks};

const RECORD_LEN: usize = 56;
const RECORDS_AT: usize = 64;
/// Records of a block.
const RECORDS: usize = (BLOCK - RECORDS_AT) / RECORD_LEN;
/// Blocks that go together at most, where one write does not need more.
const BATCH: usize = 256;
/// The column of a row's P in a record.
pub(crate) const P_COLUMN: usize = 255;

/// A block that is about to be overwritten.
pub(crate) struct Record {
    pub(crate) place: Place,
    pub(crate) old: Tuple,
    pub(crate) new: Tuple,
    /// Its new content, one block, where that must survive.
    pub(crate) payload: Option<SgList>,
}

/// A record as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Which block; [`P_COLUMN`] for the row's P.
    pub(crate) place: Place,
    pub(crate) old: Tuple,
    pub(crate) new: Tuple,
    /// Sequence of its payload.
    pub(crate) payload: Option<u64>,
}

/// A record block as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordBlock {
    sequence: u64,
    epoch: u64,
    opening: u64,
    tail: u64,
    durable: u64,
    batch: Range<u64>,
    record_blocks: u64,
    records: Vec<Found>,
}

/// A whole batch of an earlier epoch.
pub(crate) struct Batch {
    pub(crate) first: u64,
    pub(crate) records: Vec<Found>,
}

/// What a crash left in the log.
pub(crate) struct Left {
    /// What may not have arrived, oldest first.
    pub(crate) batches: Vec<Batch>,
    /// Data of batches before this sequence was flushed.
    pub(crate) durable: u64,
    /// The sequence to go on with.
    pub(crate) next: u64,
    /// The last whole batch: its record blocks, all its blocks, its records.
    last: Option<(Range<u64>, Range<u64>, Vec<Found>)>,
}

/// The log of an assembled array.
pub(crate) struct Log {
    on: bool,
    epoch: Cell<u64>,
    opening: Cell<u64>,
    blocks: u64,
    waiting: RefCell<VecDeque<Rc<Group>>>,
    /// Sequence of the next block.
    next: Cell<u64>,
    /// What is before it is not needed any more.
    tail: Cell<u64>,
    /// The tail that a durable batch says.
    durable_tail: Cell<u64>,
    /// What is before it was flushed.
    durable: Cell<u64>,
    /// By first sequence, writes of a batch that have not settled.
    unsettled: RefCell<BTreeMap<u64, usize>>,
    busy: Cell<bool>,
    changed: Condition,
}

/// The records of one write.
struct Group {
    records: RefCell<Vec<Record>>,
    payloads: usize,
    count: usize,
    /// Where they lie, once they do.
    batch: RefCell<Option<Result<u64, Kind>>>,
}

/// Keeps the records of a write until it is dropped (LOG-2).
pub(crate) struct Logged<'a> {
    log: &'a Log,
    batch: u64,
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        self.log.settle(self.batch);
    }
}

impl Log {
    pub(crate) fn new(geometry: &Geometry, on: bool, epoch: u64, next: u64) -> Self {
        Self {
            on,
            epoch: Cell::new(epoch),
            opening: Cell::new(0),
            blocks: u64::from(geometry.log_blocks),
            waiting: RefCell::default(),
            next: Cell::new(next),
            tail: Cell::new(next),
            durable_tail: Cell::new(next),
            durable: Cell::new(next),
            unsettled: RefCell::default(),
            busy: Cell::new(false),
            changed: Condition::default(),
        }
    }

    /// Whether there is one.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Sequence of the next block.
    pub(crate) fn next(&self) -> u64 {
        self.next.get()
    }

    /// What is before it is not needed any more.
    pub(crate) fn tail(&self) -> u64 {
        self.tail.get()
    }

    /// Blocks in use, and of all.
    pub(crate) fn fill(&self) -> (u64, u64) {
        (self.next.get() - self.tail.get(), self.blocks)
    }

    /// Begins an epoch at this sequence: nothing before is needed.
    pub(crate) fn begin(&self, epoch: u64, opening: u64, next: u64) {
        self.epoch.set(epoch);
        self.opening.set(opening);
        for cell in [&self.next, &self.tail, &self.durable_tail, &self.durable] {
            cell.set(next);
        }
    }

    /// The first sequence of which a write has not settled.
    pub(crate) fn settled_to(&self) -> u64 {
        self.unsettled.borrow().keys().next().copied().unwrap_or(self.next.get())
    }

    /// The data of what is before `sequence` is durable.
    pub(crate) fn set_durable(&self, sequence: u64) {
        self.durable.set(self.durable.get().max(sequence));
    }

    /// What is before `sequence` is not needed any more (LOG-2).
    pub(crate) fn retire(&self, sequence: u64) {
        self.tail.set(self.tail.get().max(sequence));
        self.changed.notify();
    }

    /// Blocks that one write may put into it at once.
    pub(crate) fn most(&self) -> usize {
        self.blocks as usize / 2
    }

    /// Whether it is so full that pages should be written.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        let (used, blocks) = self.fill();
        used > blocks / 2
    }

    /// Lets whoever waits for the log look again.
    pub(crate) fn changed(&self) {
        self.changed.notify();
    }

    fn settle(&self, batch: u64) {
        let mut unsettled = self.unsettled.borrow_mut();
        let left = unsettled.get_mut(&batch).expect("counted when it was logged");
        *left -= 1;
        if *left == 0 {
            unsettled.remove(&batch);
        }
        drop(unsettled);
        self.changed.notify();
    }

    /// Takes the groups of the next batch, whole ones, at least one.
    fn take_batch(&self) -> Vec<Rc<Group>> {
        let mut waiting = self.waiting.borrow_mut();
        let mut batch = Vec::new();
        let most = (BATCH as u64).min(self.blocks / 4) as usize;
        let (mut records, mut payloads) = (0, 0);
        while let Some(group) = waiting.front() {
            records += group.count;
            payloads += group.payloads;
            if !batch.is_empty() && records.div_ceil(RECORDS) + payloads > most {
                break;
            }
            batch.extend(waiting.pop_front());
        }
        batch
    }
}

/// Blocks of the log that the content of so many blocks takes, and its
/// records.
pub(crate) fn with_records(blocks: usize) -> usize {
    blocks + records_needed(blocks)
}

/// Blocks that so many records take.
pub(crate) fn records_needed(records: usize) -> usize {
    records.div_ceil(RECORDS)
}

impl Engine {
    /// Notes what is about to be overwritten and waits until that is durable
    /// on members (LOG-1). What arrives while a batch is written goes together
    /// in the next.
    pub(crate) async fn log(&self, records: Vec<Record>) -> Result<Option<Logged<'_>>, Kind> {
        let log = &self.log;
        if !log.on || records.is_empty() {
            return Ok(None);
        }
        let payloads = records.iter().filter(|r| r.payload.is_some()).count();
        let count = records.len();
        let records = RefCell::new(records);
        let group = Rc::new(Group { records, payloads, count, batch: RefCell::new(None) });
        log.waiting.borrow_mut().push_back(group.clone());
        loop {
            if let Some(done) = group.batch.borrow_mut().take() {
                return done.map(|batch| Some(Logged { log, batch }));
            }
            if log.busy.replace(true) {
                // Who is done with must not wait for the next batch: that may
                // wait for this one to settle.
                let turn = || (!log.busy.get() || group.batch.borrow().is_some()).then_some(());
                log.changed.wait_for(turn).await;
                continue;
            }
            // Who is ready too comes along: on fast members nobody would wait
            // long enough to meet others here.
            yield_now().await;
            // Large, and once for many writes: kept out of their futures.
            Box::pin(self.write_batch(log.take_batch())).await;
            log.busy.set(false);
            log.changed.notify();
        }
    }

    async fn write_batch(&self, groups: Vec<Rc<Group>>) {
        let log = &self.log;
        let mut records: Vec<Record> = Vec::new();
        groups.iter().for_each(|group| records.append(&mut group.records.borrow_mut()));
        let record_blocks = records.len().div_ceil(RECORDS) as u64;
        let payloads = groups.iter().map(|group| group.payloads).sum::<usize>() as u64;
        let mut result = self.make_room(record_blocks + payloads).await;
        let first = log.next.get();
        log.unsettled.borrow_mut().insert(first, groups.len());
        if result.is_ok() {
            let batch = first..first + record_blocks + payloads;
            log.next.set(batch.end);
            result = self.write_records(batch, record_blocks, records).await;
        }
        for group in groups {
            if result.is_err() {
                log.settle(first);
            }
            *group.batch.borrow_mut() = Some(result.clone().map(|()| first));
        }
        self.health.log_used.store(log.fill().0, Ordering::Relaxed);
        if log.wants_checkpoint() {
            self.begin_checkpoint();
        }
    }

    /// Waits until the log has room for a batch, and one block more: for a
    /// batch without records, whose tail makes room (LOG-2).
    async fn make_room(&self, blocks: u64) -> Result<(), Kind> {
        let log = &self.log;
        if blocks + 1 > log.blocks {
            return Err(Kind::LogFull);
        }
        loop {
            let end = log.durable_tail.get() + log.blocks;
            if log.next.get() + blocks < end {
                return Ok(());
            }
            self.check_redundancy()?;
            if log.tail.get() > log.durable_tail.get() {
                self.write_tail().await?;
                continue;
            }
            // Where nothing more has settled, another checkpoint is of no use.
            let tail = log.tail.get();
            let moved = || {
                let useful = !self.is_checkpointing() && log.settled_to() > tail;
                let over = useful || log.tail.get() > tail || self.check_redundancy().is_err();
                over.then_some(())
            };
            log.changed.wait_for(moved).await;
            if log.tail.get() == tail {
                self.begin_checkpoint();
                self.checkpoint_over().await;
            }
        }
    }

    /// Waits until no checkpoint is under way that is a task of its own.
    pub(crate) async fn checkpoint_over(&self) {
        self.log.changed.wait_for(|| (!self.is_checkpointing()).then_some(())).await;
    }

    /// Makes the tail durable: nothing before it is looked at any more.
    pub(crate) async fn persist_tail(&self) -> Result<(), Kind> {
        let log = &self.log;
        while log.on && log.durable_tail.get() < log.tail.get() {
            if log.busy.replace(true) {
                log.changed.wait_for(|| (!log.busy.get()).then_some(())).await;
                continue;
            }
            let done = self.write_tail().await;
            log.busy.set(false);
            log.changed.notify();
            done?;
        }
        Ok(())
    }

    /// Writes a batch without records, for its tail. There is always room for
    /// it (`make_room`); the caller is the one who writes.
    async fn write_tail(&self) -> Result<(), Kind> {
        let first = self.log.next.get();
        self.log.next.set(first + 1);
        self.write_records(first..first + 1, 1, Vec::new()).await
    }

    /// Writes a batch to as many members as must not all be lost.
    async fn write_records(
        &self,
        batch: Range<u64>,
        record_blocks: u64,
        mut records: Vec<Record>,
    ) -> Result<(), Kind> {
        let log = &self.log;
        let tail = log.tail.get();
        let bytes = record_blocks as usize * BLOCK;
        let mut buf = self.meta.reserve(bytes).await.expect("smaller than the pool").take(bytes);
        let mut payload = batch.start + record_blocks;
        let mut list = SgList::default();
        let mut rest = &mut records[..];
        for i in 0..record_blocks {
            let (part, later) = rest.split_at_mut(RECORDS.min(rest.len()));
            rest = later;
            let head = RecordBlock {
                sequence: batch.start + i,
                epoch: log.epoch.get(),
                opening: log.opening.get(),
                tail,
                durable: log.durable.get(),
                batch: batch.clone(),
                record_blocks,
                records: part
                    .iter_mut()
                    .map(|record| Found {
                        place: record.place,
                        old: record.old,
                        new: record.new,
                        payload: record.payload.take().map(|block| {
                            list.append(block);
                            payload += 1;
                            payload - 1
                        }),
                    })
                    .collect(),
            };
            head.encode(i as usize * BLOCK, &mut buf);
        }
        assert_eq!(payload, batch.end, "a batch is as long as was counted");
        let mut all = buf.freeze().source();
        all.append(list);
        self.write_log_blocks(batch, all).await?;
        log.durable_tail.set(log.durable_tail.get().max(tail));
        Ok(())
    }

    async fn write_log_blocks(&self, blocks: Range<u64>, bytes: SgList) -> Result<(), Kind> {
        self.check_redundancy()?;
        if lacks(Protection::Log) {
            return Ok(());
        }
        let alive: Vec<usize> = (0..self.members.len()).filter(|m| self.alive(*m)).collect();
        // One more than may be missing; and two, since media rot.
        let copies = (self.geometry.redundancy() + 1).max(2).min(alive.len());
        let from = blocks.start as usize % alive.len();
        // The ring of slots may wrap once in a batch.
        let wrap = (blocks.start / self.log.blocks + 1) * self.log.blocks;
        let mut parts = SmallVec::<[(u64, SgList); 2]>::new();
        let mut first = bytes;
        if blocks.end > wrap {
            let second = first.split_off((wrap - blocks.start) as usize * BLOCK);
            parts.push((self.slot_at(wrap), second));
        }
        parts.push((self.slot_at(blocks.start), first));
        let mut tickets = Vec::new();
        for (at, part) in &parts {
            for i in 0..copies {
                let member = alive[(from + i) % alive.len()];
                tickets.push(self.write_durably(member, *at, part.duplicate()));
            }
            tickets.extend(self.write_log_to_incoming(*at, part));
        }
        for sent in tickets {
            // The log's memory is ours: only a member can be at fault.
            self.settled(sent).await;
        }
        self.settle_members().await
    }

    fn slot_at(&self, sequence: u64) -> u64 {
        LOG_AT + sequence % self.log.blocks * BLOCK as u64
    }

    /// What the log of an epoch holds that may not have arrived; `from` is
    /// the epoch's first sequence.
    pub(crate) async fn read_log(&self, epoch: u64, from: u64) -> Result<Left, Kind> {
        let mut blocks = self.scan_log().await;
        blocks.retain(|_, block| block.epoch == epoch && block.sequence >= from);
        let next = blocks.values().map(|block| block.batch.end).max().unwrap_or(from);
        let mut batches: Vec<(RecordBlock, Batch)> = Vec::new();
        for (sequence, block) in blocks {
            let again = batches.last().is_some_and(|(head, _)| head.batch == block.batch);
            if !again && sequence == block.batch.start {
                let batch = Batch { first: sequence, records: block.records.clone() };
                batches.push((block, batch));
            } else if let Some((head, batch)) = batches.last_mut().filter(|_| again)
                && sequence == head.sequence + 1
            {
                batch.records.extend(block.records.iter().copied());
                *head = block;
            }
        }
        // LOG-3: by its record blocks; and the last one also by its payload,
        // as that is where a crash cuts.
        batches.retain(|(head, _)| head.sequence + 1 == head.batch.start + head.record_blocks);
        let mut buf = self.repair.reserve(BLOCK).await?.take(BLOCK);
        while let Some((_, batch)) = batches.last() {
            let mut whole = true;
            for record in &batch.records {
                whole = whole && self.read_payload(record, &mut buf, 0).await != Some(false);
            }
            if whole {
                break;
            }
            batches.pop();
        }
        let (tail, durable) = batches.last().map_or((from, from), |(h, _)| (h.tail, h.durable));
        let last = batches.last().map(|(head, batch)| {
            let records = batch.first..batch.first + head.record_blocks;
            (records, head.batch.clone(), batch.records.clone())
        });
        let batches = batches.into_iter().map(|(_, batch)| batch);
        let batches = batches.filter(|b| b.first >= tail).collect();
        Ok(Left { batches, durable, next, last })
    }

    /// Writes the last batch to all members: a crash may have left it on one
    /// only, which may be gone when recovery is cut short and begins again.
    /// Every batch before was on its members before this one was begun.
    pub(crate) async fn harden(&self, left: &Left, epoch: u64) -> Result<(), Kind> {
        let Some((heads, all, records)) = &left.last else { return Ok(()) };
        let mut buf = self.repair.reserve(BLOCK).await?.take(BLOCK);
        for sequence in all.clone() {
            let content = records.iter().find(|r| r.payload == Some(sequence));
            let at = self.slot_at(sequence);
            let mut found = false;
            if let Some(record) = content {
                found = self.read_payload(record, &mut buf, 0).await == Some(true);
            }
            for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
                let head = !found && heads.contains(&sequence);
                if head && self.read_block(member, at, &mut buf, 0).await {
                    let bytes = buf.range_mut(0..BLOCK).next().expect("a block is one piece");
                    let block = RecordBlock::parse(bytes, &self.geometry);
                    found = block.is_some_and(|b| b.sequence == sequence && b.epoch == epoch);
                }
            }
            if !found {
                return Err(Kind::Lost);
            }
            let members = (0..self.members.len()).filter(|m| self.alive(*m));
            let list = buf.target(0..BLOCK);
            let mut sent: Vec<Sent> =
                members.map(|m| self.write_durably(m, at, list.duplicate())).collect();
            sent.extend(self.write_log_to_incoming(at, &list));
            for sent in sent {
                self.settled(sent).await;
            }
        }
        self.settle_members().await
    }

    /// The rows that anything was logged about since a sequence, of whichever
    /// epoch; `None` where the log does not reach back so far.
    pub(crate) async fn logged_since(&self, since: u64, next: u64) -> Option<Vec<(u64, u32)>> {
        if next.saturating_sub(since) > self.log.blocks {
            return None;
        }
        let mut rows = Vec::new();
        let mut reached = since;
        for block in self.scan_log().await.values().filter(|b| b.sequence >= since) {
            if block.batch.start > reached {
                return None;
            }
            let last = block.sequence + 1 == block.batch.start + block.record_blocks;
            reached = if last { block.batch.end } else { block.sequence + 1 };
            rows.extend(block.records.iter().map(|r| (r.place.stripe, r.place.row)));
        }
        rows.sort_unstable();
        rows.dedup();
        (reached >= next).then_some(rows)
    }

    /// All record blocks of all members, by sequence.
    async fn scan_log(&self) -> BTreeMap<u64, RecordBlock> {
        const PIECE: u64 = 64;
        let mut found: BTreeMap<u64, RecordBlock> = BTreeMap::new();
        let openings = self.superblock.borrow().openings();
        for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
            for first in (0..self.log.blocks).step_by(PIECE as usize) {
                let len = PIECE as usize * BLOCK;
                let mut buf =
                    self.meta.reserve(len).await.expect("smaller than the pool").take(len);
                let at = LOG_AT + first * BLOCK as u64;
                if let Err(error) =
                    self.arrived(self.read_member(member, at, buf.target(0..len))).await
                {
                    self.note_read_error(member, &error);
                    continue;
                }
                let buf = buf.freeze();
                for i in 0..PIECE {
                    let bytes = buf.contiguous(i as usize * BLOCK, BLOCK);
                    // A program could write what looks like a record block, but
                    // for this number, which nobody outside knows.
                    let ours = openings.contains(&u64_at(bytes, 24));
                    let block = ours.then(|| RecordBlock::parse(bytes, &self.geometry)).flatten();
                    let Some(block) = block else { continue };
                    // A member that came back may hold what was written before
                    // a crash, under sequences that were used again.
                    let older = |found: &RecordBlock| found.epoch <= block.epoch;
                    if block.sequence % self.log.blocks == first + i
                        && found.get(&block.sequence).is_none_or(older)
                    {
                        found.insert(block.sequence, block);
                    }
                }
            }
        }
        found
    }

    /// Reads the payload of a record into a part of `buf`: `None` if it has
    /// none, false if no member has it any more.
    pub(crate) async fn read_payload(
        &self,
        record: &Found,
        buf: &mut PoolBuf,
        to: usize,
    ) -> Option<bool> {
        let at = self.slot_at(record.payload?);
        for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
            if self.read_block(member, at, buf, to).await
                && record.new.matches(crate::repair::guard_of(buf, to))
            {
                return Some(true);
            }
        }
        Some(false)
    }
}

impl RecordBlock {
    fn encode(&self, at: usize, into: &mut PoolBuf) {
        let block = into.range_mut(at..at + BLOCK).next().expect("a block is one piece");
        block.fill(0);
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(8, &self.sequence.to_le_bytes());
        put(16, &self.epoch.to_le_bytes());
        put(24, &self.opening.to_le_bytes());
        put(32, &self.tail.to_le_bytes());
        put(40, &self.durable.to_le_bytes());
        put(48, &self.batch.start.to_le_bytes());
        put(56, &((self.batch.end - self.batch.start) as u32).to_le_bytes());
        put(60, &(self.record_blocks as u16).to_le_bytes());
        put(62, &(self.records.len() as u16).to_le_bytes());
        for (i, record) in self.records.iter().enumerate() {
            let at = RECORDS_AT + i * RECORD_LEN;
            put(at, &record.place.stripe.to_le_bytes());
            put(at + 8, &record.place.row.to_le_bytes());
            put(at + 12, &[record.place.column as u8]);
            put(at + 16, &record.payload.unwrap_or(0).to_le_bytes());
            put(at + 24, &record.old.encode());
            put(at + 40, &record.new.encode());
        }
        let crc = stableio_onepass::guard(&block[8..]);
        block[..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Parses a block of the log region; `None` for whatever else lies there:
    /// content, damage. What it gives names places of this geometry only.
    pub fn parse(block: &[u8], g: &Geometry) -> Option<Self> {
        let right = stableio_onepass::guard(&block[8..]) == u64_at(block, 0);
        let u16_at = |at: usize| u64::from(u16::from_le_bytes([block[at], block[at + 1]]));
        let (sequence, start, count) = (u64_at(block, 8), u64_at(block, 48), u16_at(62));
        let len = u64::from(u32_at(block, 56));
        let record_blocks = u16_at(60);
        let possible = right
            && count <= RECORDS as u64
            && len <= u64::from(g.log_blocks)
            && (1..=len).contains(&record_blocks)
            && sequence.checked_sub(start).is_some_and(|i| i < record_blocks)
            && start.checked_add(len).is_some();
        if !possible {
            return None;
        }
        let batch = start..start + len;
        let mut records = Vec::with_capacity(count as usize);
        for bytes in block[RECORDS_AT..].chunks_exact(RECORD_LEN).take(count as usize) {
            let column = usize::from(bytes[12]);
            let place = Place { stripe: u64_at(bytes, 0), row: u32_at(bytes, 8), column };
            let payload = Some(u64_at(bytes, 16)).filter(|s| *s != 0);
            let inside = place.stripe < g.stripes
                && place.row < g.chunk_blocks
                && (column < g.width() || (column == P_COLUMN && g.level.parities() > 0))
                && payload.is_none_or(|s| batch.contains(&s) && s >= start + record_blocks);
            if !inside {
                return None;
            }
            let (old, new) = (Tuple::parse(&bytes[24..])?, Tuple::parse(&bytes[40..])?);
            records.push(Found { place, old, new, payload });
        }
        let (tail, durable) = (u64_at(block, 32), u64_at(block, 40));
        let (epoch, opening) = (u64_at(block, 16), u64_at(block, 24));
        Some(Self { sequence, epoch, opening, tail, durable, batch, record_blocks, records })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Level;
    use proptest::prelude::*;
    use stableio_mem::Pool;

    fn example() -> (RecordBlock, Geometry) {
        let g = Geometry::new(Level::Raid6, 5, 16384, 8 << 20).unwrap();
        let found = |column, payload| Found {
            place: Place { stripe: 7, row: 3, column },
            old: Tuple::UNWRITTEN,
            new: Tuple::written(99, 12),
            payload,
        };
        let block = RecordBlock {
            sequence: 1000,
            epoch: 3,
            opening: 77,
            tail: 12,
            durable: 14,
            batch: 1000..1003,
            record_blocks: 1,
            records: vec![found(1, Some(1001)), found(3, None), found(P_COLUMN, Some(1002))],
        };
        (block, g)
    }

    fn encoded(block: &RecordBlock) -> Vec<u8> {
        let pool = Pool::new(1 << 20).unwrap();
        let mut buf = pool.try_reserve(BLOCK).unwrap().unwrap().take(BLOCK);
        block.encode(0, &mut buf);
        buf.freeze().to_vec()
    }

    #[test]
    fn records_come_back() {
        let (block, g) = example();
        assert_eq!(RecordBlock::parse(&encoded(&block), &g), Some(block.clone()));
        let full = RecordBlock { records: vec![block.records[0]; RECORDS], ..block };
        assert_eq!(RecordBlock::parse(&encoded(&full), &g), Some(full));
    }

    proptest! {
        /// Any content under a right checksum parses, or is no record block.
        #[test]
        fn no_content_panics(changes in proptest::collection::vec((8usize..BLOCK, any::<u8>()), 1..20)) {
            let (block, g) = example();
            let mut bytes = encoded(&block);
            for (at, byte) in changes { bytes[at] = byte; }
            let crc = stableio_onepass::guard(&bytes[8..]);
            bytes[..8].copy_from_slice(&crc.to_le_bytes());
            if let Some(found) = RecordBlock::parse(&bytes, &g) {
                prop_assert!(found.records.iter().all(|r| r.place.stripe < g.stripes));
            }
        }
    }
}
