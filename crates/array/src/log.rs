//! The log: before data or tuples are overwritten, it holds their old and new
//! guards. After a crash it says which rows were being written and which
//! versions of their blocks are valid.
//!
//! ```text
//! log block, 4096 bytes                     record, 48 bytes
//!    0  CRC64-NVMe of bytes 8 to 4095  8      0  stripe       8
//!    8  sequence                       8      8  row          4
//!   16  epoch                          8     12  column       4
//!   24  first 8 bytes of the array id  8     16  old tuple   16
//!   32  records                        4     32  new tuple   16
//!   36  zero                          12
//!   48  84 records                  4032
//! ```
//!
//! A block with sequence `s` lies in slot `s mod 1024` of two members.
//!
//! LOG-1: a record is on two members (as far as there are) before the data
//! that it is about is written.
//!
//! LOG-2: a slot is used again only after every write that it is about has
//! settled.
//!
//! Format 0 logs guards only and does not flush them before the data: enough
//! for a process that dies, not yet for power that fails.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use stableio_block::Kind;
use stableio_block::sync::Condition;
use stableio_mem::{BLOCK, PoolBuf, StableBuf};

use crate::engine::Engine;
use crate::geometry::{LOG_AT, LOG_BLOCKS, Place};
use crate::superblock::{Id, u32_at, u64_at};
use crate::tuple::Tuple;

const RECORD_LEN: usize = 48;
const RECORDS_AT: usize = 48;
/// Records of a log block.
const RECORDS: usize = (BLOCK - RECORDS_AT) / RECORD_LEN;
/// Blocks written at once, at most; a single write may need more.
const BATCH: usize = 16;
/// Copies of a log block.
const COPIES: usize = 2;

/// A block that is about to be overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) place: Place,
    pub(crate) old: Tuple,
    pub(crate) new: Tuple,
}

/// The log of an assembled array.
pub(crate) struct Log {
    epoch: u64,
    waiting: RefCell<VecDeque<Rc<Group>>>,
    /// Sequence of the next block.
    next: Cell<u64>,
    /// By slot, writes that have not settled.
    unsettled: RefCell<Vec<u32>>,
    busy: Cell<bool>,
    changed: Condition,
}

/// The records of one write.
struct Group {
    records: Vec<Record>,
    /// Where they lie, once they do.
    blocks: RefCell<Option<Result<Range<u64>, Kind>>>,
}

/// Keeps the slots of a write's records until it is dropped (LOG-2).
pub(crate) struct Logged<'a> {
    log: &'a Log,
    blocks: Range<u64>,
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        let mut unsettled = self.log.unsettled.borrow_mut();
        self.blocks.clone().for_each(|b| unsettled[slot(b)] -= 1);
        drop(unsettled);
        self.log.changed.notify();
    }
}

fn slot(sequence: u64) -> usize {
    (sequence % LOG_BLOCKS) as usize
}

impl Log {
    pub(crate) fn new(epoch: u64) -> Self {
        Self {
            epoch,
            waiting: RefCell::default(),
            next: Cell::new(0),
            unsettled: RefCell::new(vec![0; LOG_BLOCKS as usize]),
            busy: Cell::new(false),
            changed: Condition::default(),
        }
    }

    /// Takes the groups of the next batch, whole ones, at least one.
    fn take_batch(&self) -> Vec<Rc<Group>> {
        let mut waiting = self.waiting.borrow_mut();
        let mut batch = Vec::new();
        let mut records = 0;
        while let Some(group) = waiting.front() {
            records += group.records.len();
            if !batch.is_empty() && records > BATCH * RECORDS {
                break;
            }
            batch.extend(waiting.pop_front());
        }
        batch
    }
}

impl Engine {
    /// Notes what is about to be overwritten and waits until that is on
    /// members (LOG-1). What arrives while a batch is written goes together
    /// in the next.
    pub(crate) async fn log(&self, records: Vec<Record>) -> Result<Logged<'_>, Kind> {
        let log = &self.log;
        let group = Rc::new(Group { records, blocks: RefCell::new(None) });
        log.waiting.borrow_mut().push_back(group.clone());
        loop {
            if let Some(done) = group.blocks.borrow_mut().take() {
                return Ok(Logged { log, blocks: done? });
            }
            if log.busy.replace(true) {
                log.changed.wait_for(|| (!log.busy.get()).then_some(())).await;
                continue;
            }
            self.write_batch(log.take_batch()).await;
            log.busy.set(false);
            log.changed.notify();
        }
    }

    async fn write_batch(&self, batch: Vec<Rc<Group>>) {
        let log = &self.log;
        let records: usize = batch.iter().map(|g| g.records.len()).sum();
        let first = log.next.get();
        let blocks = first..first + records.div_ceil(RECORDS) as u64;
        log.next.set(blocks.end);
        let free = || {
            let unsettled = log.unsettled.borrow();
            blocks.clone().all(|b| unsettled[slot(b)] == 0).then_some(())
        };
        log.changed.wait_for(free).await;

        let bytes = (blocks.end - blocks.start) as usize * BLOCK;
        let mut buf = self.meta.reserve(bytes).await.expect("smaller than the pool").take(bytes);
        let all: Vec<&Record> = batch.iter().flat_map(|g| &g.records).collect();
        for (i, part) in all.chunks(RECORDS).enumerate() {
            encode(first + i as u64, log.epoch, self.array, part, i * BLOCK, &mut buf);
        }
        let result = self.write_blocks(blocks.clone(), buf.freeze()).await;
        let mut at = 0;
        for group in batch {
            let range = at / RECORDS..(at + group.records.len()).div_ceil(RECORDS);
            at += group.records.len();
            let own = first + range.start as u64..first + range.end as u64;
            let mut unsettled = log.unsettled.borrow_mut();
            *group.blocks.borrow_mut() = Some(result.clone().map(|()| {
                own.clone().for_each(|b| unsettled[slot(b)] += 1);
                own
            }));
        }
    }

    /// Writes log blocks to two members that take part.
    async fn write_blocks(&self, blocks: Range<u64>, bytes: StableBuf) -> Result<(), Kind> {
        let alive: Vec<usize> = (0..self.members.len()).filter(|m| self.alive(*m)).collect();
        self.check_redundancy()?;
        let copies =
            (0..COPIES.min(alive.len())).map(|i| alive[(blocks.start as usize + i) % alive.len()]);
        // The ring of slots may wrap once in a batch.
        let wrap = (blocks.start / LOG_BLOCKS + 1) * LOG_BLOCKS;
        let parts = [blocks.start..blocks.end.min(wrap), blocks.end.min(wrap)..blocks.end];
        let mut tickets = Vec::new();
        for member in copies {
            for part in parts.iter().filter(|p| !p.is_empty()) {
                let from = (part.start - blocks.start) as usize * BLOCK;
                let piece = bytes.slice(from..from + (part.end - part.start) as usize * BLOCK);
                let at = LOG_AT + slot(part.start) as u64 * BLOCK as u64;
                tickets.push((member, self.write_member(member, at, piece.source())));
            }
        }
        let mut failed = 0;
        for (member, ticket) in tickets {
            if let Err(error) = ticket.await {
                failed += 1;
                self.drop_member(member, &error);
            }
        }
        if failed > 0 { self.settle_members().await } else { Ok(()) }
    }

    /// Everything that the log says of the epoch before this one, oldest
    /// first, read from all members.
    pub(crate) async fn read_log(&self, epoch: u64) -> Result<Vec<Record>, Kind> {
        const PIECE: u64 = 64;
        let mut found: Vec<(u64, Vec<Record>)> = Vec::new();
        for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
            for first in (0..LOG_BLOCKS).step_by(PIECE as usize) {
                let len = PIECE as usize * BLOCK;
                let mut buf =
                    self.meta.reserve(len).await.expect("smaller than the pool").take(len);
                let at = LOG_AT + first * BLOCK as u64;
                if let Err(error) = self.read_member(member, at, buf.target(0..len)).await {
                    self.health.event(format!("read error in the log: {error}"));
                    continue;
                }
                let buf = buf.freeze();
                for i in 0..PIECE {
                    let block = buf.contiguous(i as usize * BLOCK, BLOCK);
                    found.extend(
                        parse(block, epoch, self.array)
                            .filter(|(s, _)| slot(*s) as u64 == first + i),
                    );
                }
            }
        }
        found.sort_by_key(|(sequence, _)| *sequence);
        found.dedup_by_key(|(sequence, _)| *sequence);
        let inside = |r: &Record| {
            let g = &self.geometry;
            r.place.stripe < g.stripes
                && r.place.row < g.chunk_blocks
                && r.place.column < g.columns()
        };
        Ok(found.into_iter().flat_map(|(_, records)| records).filter(inside).collect())
    }
}

fn encode(
    sequence: u64,
    epoch: u64,
    array: Id,
    records: &[&Record],
    at: usize,
    into: &mut PoolBuf,
) {
    let block = into.range_mut(at..at + BLOCK).next().expect("a block is one piece");
    block.fill(0);
    block[8..16].copy_from_slice(&sequence.to_le_bytes());
    block[16..24].copy_from_slice(&epoch.to_le_bytes());
    block[24..32].copy_from_slice(&array.0[..8]);
    block[32..36].copy_from_slice(&(records.len() as u32).to_le_bytes());
    for (slot, record) in block[RECORDS_AT..].chunks_exact_mut(RECORD_LEN).zip(records) {
        slot[..8].copy_from_slice(&record.place.stripe.to_le_bytes());
        slot[8..12].copy_from_slice(&record.place.row.to_le_bytes());
        slot[12..16].copy_from_slice(&(record.place.column as u32).to_le_bytes());
        slot[16..32].copy_from_slice(&record.old.encode());
        slot[32..48].copy_from_slice(&record.new.encode());
    }
    let crc = stableio_onepass::guard(&block[8..]);
    block[..8].copy_from_slice(&crc.to_le_bytes());
}

fn parse(block: &[u8], epoch: u64, array: Id) -> Option<(u64, Vec<Record>)> {
    let count = u32_at(block, 32) as usize;
    let right = stableio_onepass::guard(&block[8..]) == u64_at(block, 0)
        && u64_at(block, 16) == epoch
        && block[24..32] == array.0[..8]
        && count <= RECORDS;
    if !right {
        return None;
    }
    let records = block[RECORDS_AT..].chunks_exact(RECORD_LEN).take(count).map(|bytes| {
        let place = Place {
            stripe: u64_at(bytes, 0),
            row: u32_at(bytes, 8),
            column: u32_at(bytes, 12) as usize,
        };
        Some(Record { place, old: Tuple::parse(&bytes[16..])?, new: Tuple::parse(&bytes[32..])? })
    });
    Some((u64_at(block, 8), records.collect::<Option<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use stableio_mem::Pool;

    #[test]
    fn records_come_back_and_other_epochs_do_not() {
        let place = Place { stripe: 7, row: 3, column: 1 };
        let record = Record { place, old: Tuple::UNWRITTEN, new: Tuple::written(99, 12) };
        let (array, pool) = (Id::random(), Pool::new(1 << 20).unwrap());
        let mut buf = pool.try_reserve(2 * BLOCK).unwrap().unwrap().take(2 * BLOCK);
        encode(5, 2, array, &[&record; RECORDS], BLOCK, &mut buf);
        let bytes = buf.freeze();
        let block = bytes.contiguous(BLOCK, BLOCK);
        assert_eq!(parse(block, 2, array), Some((5, vec![record; RECORDS])));
        assert_eq!(parse(block, 3, array), None);
        assert_eq!(parse(block, 2, Id::random()), None);
    }
}
