//! A client whose blocks say which of their versions they are.
//!
//! It writes and flushes over one queue until its server is gone, and remembers what it may rely
//! on. Several may write side by side: their parts of the disk alternate, in units that no chunk
//! or stripe is a multiple of, so that at the borders they write to the same rows.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::memory::SharedMemory;
use super::queue::{Command, Queue, Segment};
use crate::Random;

/// Bytes of a block that has a version.
const BLOCK: usize = 4096;
const WORDS: usize = BLOCK / 8;

/// Blocks in a row that belong to one writer.
const UNIT: usize = 65;

/// The longest request, in blocks.
const LONGEST: usize = 64;

/// Requests in flight per writer.
const DEPTH: usize = 16;

/// A flush follows so many writes.
const FLUSH_EVERY: u32 = 24;

/// One of this many requests is a read, of a writer that reads.
const READ_ONE_IN: u64 = 4;

/// Stamps blocks, and knows what may be found in them.
pub struct Stamper {
    units: Vec<Unit>,
    /// Which of the writers it is: its share of the memory.
    index: usize,
    random: Random,
    reads: bool,
    avoided: Range<usize>,
    /// What a read found that must not be.
    misread: Vec<String>,
}

/// What a server that is gone owes to those who wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owes {
    /// What a flush covered: after whatever ends a server.
    Flushed,
    /// What was acknowledged: after the end of its process alone.
    Acknowledged,
}

/// Blocks in a row that belong to one writer.
struct Unit {
    first: usize,
    blocks: [Versions; UNIT],
}

/// What may be found in a block. Version 0 is that nobody wrote it yet.
#[derive(Clone, Copy, Default)]
struct Versions {
    /// The last that a flush covered.
    flushed: u32,
    /// The last that was acknowledged.
    acknowledged: u32,
    /// The last that was submitted.
    submitted: u32,
    /// The last that there ever was, submitted and then undone by a crash or not.
    ever: u32,
    /// Whether a request is in flight: two at once on one block have no order.
    busy: bool,
}

/// A request: a part of a unit.
#[derive(Clone, Copy)]
struct Part {
    unit: usize,
    from: usize,
    len: usize,
    is_read: bool,
}

impl Stamper {
    /// The memory that so many of them need.
    pub const fn memory_bytes(writers: usize) -> usize {
        writers * DEPTH * LONGEST * BLOCK
    }

    /// The one with this index of so many that share the first `bytes` of a disk.
    pub fn new(index: usize, writers: usize, bytes: usize, seed: u64) -> Stamper {
        let units = (0..bytes / BLOCK / UNIT).filter(|unit| unit % writers == index);
        let units =
            units.map(|unit| Unit { first: unit * UNIT, blocks: [Versions::default(); UNIT] });
        let random = Random::new(seed + index as u64);
        Stamper {
            units: units.collect(),
            index,
            random,
            reads: false,
            avoided: 0..0,
            misread: vec![],
        }
    }

    /// Reads, too: a block that nobody writes at the moment must be its last version.
    pub fn with_reads(mut self) -> Stamper {
        self.reads = true;
        self
    }

    /// Sends no request from now on that touches these blocks of the disk.
    pub fn avoid(&mut self, blocks: Range<usize>) {
        self.avoided = blocks;
    }

    /// Writes until `killed`, and then takes what the server still had answered.
    pub fn run(
        &mut self,
        queue: &mut Queue,
        memory: &SharedMemory,
        killed: &AtomicBool,
    ) -> io::Result<()> {
        const FLUSH: u64 = DEPTH as u64;
        let mut slots: [Option<Part>; DEPTH] = [None; DEPTH];
        // Settled writes that no flush covers yet; those that the flush under way will cover.
        let (mut settled, mut covered) = (Vec::new(), None::<Vec<(Part, Vec<u32>)>>);
        let mut since_flush = 0;
        loop {
            if !killed.load(Ordering::Acquire) {
                for (slot, part) in slots.iter_mut().enumerate().filter(|(_, p)| p.is_none()) {
                    *part = self.submit(queue, memory, slot)?;
                    since_flush += u32::from(part.is_some_and(|part| !part.is_read));
                }
                if since_flush >= FLUSH_EVERY && covered.is_none() {
                    queue.submit(FLUSH, Command::Flush)?;
                    covered = Some(std::mem::take(&mut settled));
                    since_flush = 0;
                }
            }
            // Whether it was killed is asked first: no answer comes after that.
            let last = killed.load(Ordering::Acquire);
            let mut answers = VecDeque::new();
            match queue.wait_within(Duration::from_millis(50)) {
                Ok(answer) => answers.push_back(answer),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
            while let Some(answer) = queue.completion()? {
                answers.push_back(answer);
            }
            if last && answers.is_empty() {
                break;
            }
            for answer in answers {
                answer.result()?;
                if answer.tag == FLUSH {
                    let covered = covered.take().expect("one flush at a time");
                    covered.iter().for_each(|(part, versions)| self.flushed(*part, versions));
                    continue;
                }
                let slot = answer.tag as usize;
                let part = slots[slot].take().expect("a request in flight");
                if part.is_read {
                    self.has_read(part, &memory.load(self.place(slot, part)));
                } else {
                    settled.push((part, self.acknowledged(part)));
                }
            }
        }
        // Whatever is left was in flight.
        self.units.iter_mut().flat_map(|u| &mut u.blocks).for_each(|block| block.busy = false);
        Ok(())
    }

    /// Submits a write of the next version of some blocks, or a read; none if those are busy or
    /// avoided.
    fn submit(
        &mut self,
        queue: &mut Queue,
        memory: &SharedMemory,
        slot: usize,
    ) -> io::Result<Option<Part>> {
        let unit = self.random.below(self.units.len() as u64) as usize;
        // As many short ones as long ones.
        let longest = 1 << self.random.below(1 + LONGEST.ilog2() as u64);
        let len = 1 + self.random.below(longest) as usize;
        let from = self.random.below((UNIT - len + 1) as u64) as usize;
        let is_read = self.reads && self.random.below(READ_ONE_IN) == 0;
        let part = Part { unit, from, len, is_read };
        let Range { start: at, .. } = self.place(slot, part);
        let Unit { first, blocks } = &mut self.units[unit];
        let (first, blocks) = (*first + from, &mut blocks[from..from + len]);
        let is_avoided = first < self.avoided.end && self.avoided.start < first + len;
        if is_avoided || blocks.iter().any(|block| block.busy) {
            return Ok(None);
        }
        for (i, block) in blocks.iter_mut().enumerate() {
            block.busy = true;
            if !is_read {
                block.ever += 1;
                block.submitted = block.ever;
                memory.store(at + i * BLOCK, &stamp(first + i, block.ever));
            }
        }
        let (offset, segments) = ((first * BLOCK) as u64, [Segment { at, len: len * BLOCK }]);
        let command = match is_read {
            true => Command::Read(offset, &segments),
            false => Command::Write(offset, &segments),
        };
        queue.submit(slot as u64, command)?;
        Ok(Some(part))
    }

    /// The memory of a request.
    fn place(&self, slot: usize, part: Part) -> Range<usize> {
        let at = (self.index * DEPTH + slot) * LONGEST * BLOCK;
        at..at + part.len * BLOCK
    }

    /// A write was acknowledged; gives the versions that the next flush will make durable.
    fn acknowledged(&mut self, part: Part) -> Vec<u32> {
        let blocks = &mut self.units[part.unit].blocks[part.from..][..part.len];
        for block in &mut *blocks {
            (block.busy, block.acknowledged) = (false, block.submitted);
        }
        blocks.iter().map(|block| block.submitted).collect()
    }

    fn flushed(&mut self, part: Part, versions: &[u32]) {
        let blocks = &mut self.units[part.unit].blocks[part.from..][..part.len];
        for (block, version) in blocks.iter_mut().zip(versions) {
            block.flushed = block.flushed.max(*version);
        }
    }

    /// Nothing else was in flight on these blocks: each is the last version there is.
    fn has_read(&mut self, part: Part, bytes: &[u8]) {
        let Unit { first, blocks } = &mut self.units[part.unit];
        let blocks = (*first + part.from..).zip(&mut blocks[part.from..][..part.len]);
        for ((number, block), bytes) in blocks.zip(bytes.chunks(BLOCK)) {
            block.busy = false;
            let (found, last) = (version(number, bytes), block.submitted);
            if found != Some(last) {
                self.misread.push(format!("block {number}: read {found:?}, is version {last}"));
            }
        }
    }

    /// Holds the disk, block by block from its beginning, against what the server owes: a block
    /// is one of its versions, whole, no older than what is owed and no newer than the last that
    /// was submitted. Gives a line for each that is not, and for each that was read wrongly
    /// before.
    ///
    /// What is found counts as flushed from now on; of a block that reads as an error, which is
    /// `None`, nothing does.
    pub fn check<T: AsRef<[u8]>>(&mut self, disk: &[Option<T>], owes: Owes) -> Vec<String> {
        let mut wrong = std::mem::take(&mut self.misread);
        for unit in &mut self.units {
            for (number, block) in (unit.first..).zip(&mut unit.blocks) {
                let Some(bytes) = disk[number].as_ref().map(AsRef::as_ref) else {
                    (block.flushed, block.acknowledged) = (0, 0);
                    continue;
                };
                let least = match owes {
                    Owes::Flushed => block.flushed,
                    Owes::Acknowledged => block.acknowledged,
                };
                let submitted = block.submitted;
                match version(number, bytes) {
                    None => wrong.push(format!("block {number} is a mixture")),
                    Some(v) if v < least => {
                        wrong.push(format!("block {number}: version {v}, but {least} is owed"));
                    }
                    Some(v) if v > submitted => {
                        wrong.push(format!("block {number}: version {v} of {submitted}"));
                    }
                    Some(v) => {
                        (block.flushed, block.acknowledged, block.submitted) = (v, v, v);
                    }
                }
            }
        }
        wrong
    }
}

/// A version of a block: the first word names both, and every other follows from it.
fn stamp(block: usize, version: u32) -> Vec<u8> {
    let name = (block as u64) << 32 | u64::from(version);
    let mut random = Random::new(name);
    let words = std::iter::once(name).chain(std::iter::repeat_with(|| random.word()));
    words.take(WORDS).flat_map(u64::to_le_bytes).collect()
}

/// Which version a block is; none if it is not one of its own, whole.
fn version(block: usize, bytes: &[u8]) -> Option<u32> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let name = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let version = name as u32;
    (bytes == stamp(block, version)).then_some(version)
}
