//! What the array must read as.
//!
//! An image of all its bytes. What no write of a round touched must read as
//! the image says; where one did, every word must be the program's, and what
//! is read becomes the image.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use anyhow::bail;
use stableio_array::Geometry;
use stableio_block::{Body, Error, Outcome, Reply, Request, Stack, Ticket};
use stableio_mem::{BLOCK, StableBuf};

use super::blocks;
use super::plan::Random;
use super::program::Program;
use super::writers::Write;

/// Bytes of a read.
const PIECE: usize = 1 << 20;
/// Reads or writes in flight.
const DEPTH: usize = 4;
/// One stripe in so many is not written in the beginning.
const UNWRITTEN: u64 = 4;

/// The image.
pub(super) struct Oracle {
    image: Vec<u8>,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Words, of writes that succeeded, that the program never stored.
    pub(super) strangers: u64,
    /// Blocks with bytes that no write was to change, and that changed.
    pub(super) changed: BTreeSet<u64>,
    /// Blocks that could not be read.
    pub(super) unreadable: BTreeSet<u64>,
}

impl Oracle {
    /// Fills most of the array with what nobody would take for the
    /// program's.
    pub(super) fn fill(stack: &Stack) -> Result<Self, Error> {
        let size = stack.limits().size as usize;
        let stripe =
            stack.limits().pass.rows.map_or(16, |rows| rows.stripe_blocks()) * BLOCK as u64;
        let mut image = vec![0; size];
        let mut random = Random::new(0x0ac1e);
        let mut pending = Pending::default();
        for (number, bytes) in (0..).zip(image.chunks_mut(stripe as usize)) {
            if number % UNWRITTEN == UNWRITTEN - 1 {
                continue;
            }
            for word in bytes.as_chunks_mut().0 {
                *word = random.next().to_ne_bytes();
            }
            pending.write(stack, number * stripe, bytes.to_vec())?;
        }
        pending.finish()?;
        Ok(Self { image })
    }

    /// Reads everything, and holds it against the image and the program.
    pub(super) fn look(
        &mut self,
        stack: &Stack,
        program: &Program,
        writes: &[Write],
    ) -> anyhow::Result<Seen> {
        let mut seen = Seen::default();
        let now = read_all(stack, self.image.len(), &mut seen.unreadable)?;
        let mut in_order: Vec<&Write> = writes.iter().collect();
        in_order.sort_unstable_by_key(|write| write.lot.at);
        let mut from = 0;
        for write in in_order {
            let range = write.lot.at as usize..write.lot.at as usize + write.lot.len;
            self.compare(&now, from..range.start, &mut seen);
            from = range.end;
            // What an error leaves behind, or hides, need not be anything.
            if write.failed || write.blocks().any(|block| seen.unreadable.contains(&block)) {
                continue;
            }
            let buffer = program.buffer(write.tag);
            let counts = write.first..buffer.count() + 1;
            seen.strangers += buffer.strangers(&write.pieces, &now[range], counts);
        }
        self.compare(&now, from..now.len(), &mut seen);
        self.image = now;
        Ok(seen)
    }

    /// Writes stripes anew, whole, as the image has them.
    pub(super) fn restore(
        &self,
        stack: &Stack,
        geometry: &Geometry,
        stripes: &BTreeSet<u64>,
    ) -> Result<(), Error> {
        let len = geometry.row_shape().stripe_blocks() as usize * BLOCK;
        let mut pending = Pending::default();
        for stripe in stripes {
            let at = *stripe as usize * len;
            pending.write(stack, at as u64, self.image[at..at + len].to_vec())?;
        }
        pending.finish()
    }

    /// Neighbours: blocks, or what the writes have left of them.
    fn compare(&self, now: &[u8], range: Range<usize>, seen: &mut Seen) {
        if self.image[range.clone()] == now[range.clone()] {
            return;
        }
        for block in blocks(range.start as u64, range.len()) {
            let from = (block as usize * BLOCK).max(range.start);
            let to = ((block + 1) as usize * BLOCK).min(range.end);
            if self.image[from..to] != now[from..to] && !seen.unreadable.contains(&block) {
                seen.changed.insert(block);
            }
        }
    }
}

/// All bytes; those that can not be read are zeros.
fn read_all(stack: &Stack, size: usize, unreadable: &mut BTreeSet<u64>) -> anyhow::Result<Vec<u8>> {
    let mut all = vec![0; size];
    let mut pieces = (0..size).step_by(PIECE);
    let begin = |at: usize| {
        let len = PIECE.min(size - at);
        (at, len, stack.submit(Request::read_owned(at as u64, len)))
    };
    let mut pending: VecDeque<_> = pieces.by_ref().take(DEPTH).map(begin).collect();
    while let Some((at, len, ticket)) = pending.pop_front() {
        if put(ticket.wait(), &mut all[at..at + len]).is_err() {
            // Which of its blocks, then?
            let begin = |at| (at, stack.submit(Request::read_owned(at as u64, BLOCK)));
            let blocks: Vec<_> = (at..at + len).step_by(BLOCK).map(begin).collect();
            for (at, ticket) in blocks {
                if put(ticket.wait(), &mut all[at..at + BLOCK]).is_err() {
                    unreadable.insert((at / BLOCK) as u64);
                }
            }
        }
        pending.extend(pieces.next().map(begin));
    }
    if unreadable.len() == size / BLOCK {
        bail!("the array can not be read at all");
    }
    Ok(all)
}

fn put(outcome: Outcome, into: &mut [u8]) -> Result<(), Error> {
    let Reply::Data(data) = outcome? else { unreachable!("a read into the pool gives data") };
    let mut at = 0;
    for piece in data.pieces() {
        into[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    Ok(())
}

/// Writes of our own, a few at a time.
#[derive(Default)]
struct Pending(VecDeque<Ticket<Outcome>>);

impl Pending {
    fn write(&mut self, stack: &Stack, at: u64, bytes: Vec<u8>) -> Result<(), Error> {
        if self.0.len() == DEPTH {
            self.0.pop_front().expect("there are some").wait()?;
        }
        let body = Body::Stable(StableBuf::from_owned(bytes));
        self.0.push_back(stack.submit(Request::write(at, body, false)));
        Ok(())
    }

    fn finish(self) -> Result<(), Error> {
        self.0.into_iter().try_for_each(|ticket| ticket.wait().map(drop))
    }
}
