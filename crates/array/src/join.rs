//! Writes of whole stripes and of their ends apart; and the end of one, and
//! the beginning of the one that goes on behind it, as one whole stripe: that
//! reads nothing, and needs no content in the log.
//!
//! ```text
//! a stream of writes   ├──── one write ─────┼───── the next ─────┼─ ...
//! stripes              │ whole   │ whole   │ joined  │ whole   │ whole   │
//! ```
//!
//! JOIN-1: the parts of a write that are written apart are independent: each
//! takes one range of rows (TOKEN-1), and waits for no other part, nor for
//! anything of another write, while it holds that.
//!
//! JOIN-2: two ends are one write only where the second begins at the byte
//! where the first ends, and both together are their stripe. What comes of it
//! is the outcome of both.
//!
//! JOIN-3: an end waits for the next write only where its own goes on behind
//! an earlier one and others are under way, and not longer than its own whole
//! stripes are. What overlaps with it meanwhile has no order with it: its
//! write has not settled.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_block::sync::{Condition, join};
use stableio_mem::{BLOCK, Pass, StableBuf, doors};

use crate::engine::Engine;
use crate::health::Health;
use crate::repair::BENCH;
use crate::write::{Part, Payload};

/// Streams that are told apart.
const STREAMS: usize = 16;

/// The ends that wait for what comes behind them.
#[derive(Default)]
pub(crate) struct Joiner {
    waiting: RefCell<Vec<Rc<End>>>,
    /// Where streams have come to, the one begun last at the back.
    streams: RefCell<VecDeque<u64>>,
    under_way: Cell<usize>,
    changed: Condition,
}

/// The last part of a write. Who joins it takes the part and leaves the
/// outcome.
struct End {
    bytes: Range<u64>,
    part: RefCell<Option<Part>>,
    outcome: RefCell<Option<Result<(), Kind>>>,
}

/// A part of a write on its way.
type Written<'a> = dyn Future<Output = Result<(), Kind>> + 'a;

/// A write that is under way; counted until it is dropped.
struct UnderWay<'a> {
    joiner: &'a Joiner,
    /// Whether another one is expected behind it soon.
    goes_on: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.joiner.under_way.set(self.joiner.under_way.get() - 1);
    }
}

impl Joiner {
    fn begin(&self, bytes: Range<u64>) -> UnderWay<'_> {
        let mut streams = self.streams.borrow_mut();
        let known = streams.iter().position(|end| *end == bytes.start);
        match known {
            Some(stream) => streams[stream] = bytes.end,
            None => {
                if streams.len() == STREAMS {
                    streams.pop_front();
                }
                streams.push_back(bytes.end);
            }
        }
        let others = self.under_way.replace(self.under_way.get() + 1);
        UnderWay { joiner: self, goes_on: known.is_some() && others > 0 }
    }

    fn wait(&self, part: Part) -> Rc<End> {
        let bytes = part.bytes();
        let end = End { bytes, part: RefCell::new(Some(part)), outcome: RefCell::default() };
        let end = Rc::new(end);
        self.waiting.borrow_mut().push(end.clone());
        end
    }

    /// Nobody finds it any more.
    fn leave(&self, end: &Rc<End>) {
        self.waiting.borrow_mut().retain(|other| !Rc::ptr_eq(other, end));
    }

    /// An end that waits for what begins at `at` (JOIN-2).
    fn find(&self, stripe: u64, at: u64) -> Option<Rc<End>> {
        let waiting = self.waiting.borrow();
        waiting.iter().find(|end| end.bytes == (stripe..at)).cloned()
    }
}

impl Part {
    fn bytes(&self) -> Range<u64> {
        self.at..self.at + self.len as u64
    }
}

impl Engine {
    /// The bytes of the stripes that a write covers wholly, where it is worth
    /// while to write them apart.
    pub(crate) fn whole_stripes(&self, part: &Part) -> Option<Range<u64>> {
        let g = &self.geometry;
        let bytes = part.bytes();
        let stripe = g.row_shape().stripe_blocks() * BLOCK as u64;
        let whole = bytes.start.next_multiple_of(stripe)..bytes.end / stripe * stripe;
        let blocks = (bytes.start | bytes.end).is_multiple_of(BLOCK as u64);
        let apart = g.level.parities() > 0
            && matches!(part.payload, Payload::Stable(_))
            && blocks
            && !whole.is_empty()
            && whole != bytes
            && self.missing() == 0;
        apart.then_some(whole)
    }

    /// Writes a part with whole stripes in it: those at once, its ends apart.
    pub(crate) async fn write_apart(&self, part: Part, whole: Range<u64>) -> Result<(), Kind> {
        let (begin, end) = (part.at, part.at + part.len as u64);
        let under_way = self.joiner.begin(begin..end);
        let settled = Cell::new(false);
        let (head, middle, tail) = self.cut(part, whole);
        let middle = async {
            let done = self.change(middle).await;
            settled.set(true);
            self.joiner.changed.notify();
            done
        };
        let mut parts: SmallVec<[Pin<Box<Written<'_>>>; 3]> = SmallVec::new();
        if let Some(head) = head {
            parts.push(Box::pin(self.write_head(head)));
        }
        parts.push(Box::pin(middle));
        if let Some(tail) = tail {
            let waits = || under_way.goes_on && !settled.get();
            parts.push(Box::pin(self.write_tail_end(tail, waits)));
        }
        join(parts).await.into_iter().collect()
    }

    /// What lies before whole stripes, these, and what lies behind. Each gets
    /// what it may need of the memory.
    fn cut(&self, part: Part, whole: Range<u64>) -> (Option<Part>, Part, Option<Part>) {
        let rows = self.geometry.row_shape();
        let (bytes, Part { payload, sums, mut memory, .. }) = (part.bytes(), part);
        let Payload::Stable(payload) = payload else { unreachable!("only what is stable is cut") };
        let slice = |part: &Range<u64>| {
            let within = (part.start - bytes.start) as usize..(part.end - bytes.start) as usize;
            (within.len(), Payload::Stable(payload.slice(within)))
        };
        let mut end = |part: Range<u64>| {
            let (len, payload) = slice(&part);
            // Its rows and one to mend in; sub-block ends, which are counted
            // too, it has none.
            let scratch = (rows.partial_rows(part.start, len) - 2 + 1) * rows.row_scratch();
            let (sums, memory) = (sums.part(rows, part.start, len), memory.split(scratch * BLOCK));
            (len > 0).then_some(Part { at: part.start, len, payload, sums, memory })
        };
        let (head, tail) = (end(bytes.start..whole.start), end(whole.end..bytes.end));
        let (len, payload) = slice(&whole);
        let sums = sums.part(rows, whole.start, len);
        (head, Part { at: whole.start, len, payload, sums, memory }, tail)
    }

    /// The first part of a write: with the last one of the write before it, if
    /// that waits.
    async fn write_head(&self, head: Part) -> Result<(), Kind> {
        let stripe = self.geometry.row_shape().stripe_blocks() * BLOCK as u64;
        let before = self.joiner.find(head.at / stripe * stripe, head.at);
        let Some(before) = before else { return self.change(head).await };
        let parity = self.parity_of_stripe();
        let tail = before
            .part
            .borrow_mut()
            .take_if(|tail| tail.memory.left().max(head.memory.left()) >= parity + BENCH);
        let Some(tail) = tail else { return self.change(head).await };
        self.joiner.leave(&before);
        let done = self.change(self.joined(tail, head)).await;
        *before.outcome.borrow_mut() = Some(done.clone());
        self.joiner.changed.notify();
        done
    }

    /// The last part of a write; it may wait for the write behind it.
    async fn write_tail_end(&self, tail: Part, waits: impl Fn() -> bool) -> Result<(), Kind> {
        let end = self.joiner.wait(tail);
        // Its outcome if it was joined; none if it is to be written alone.
        let turn = || match end.outcome.take() {
            Some(outcome) => Some(Some(outcome)),
            None => (!waits() && end.part.borrow().is_some()).then_some(None),
        };
        if let Some(outcome) = self.joiner.changed.wait_for(turn).await {
            return outcome;
        }
        let tail = end.part.take().expect("nobody joined it");
        self.joiner.leave(&end);
        self.change(tail).await
    }

    /// Two ends as the stripe that they are.
    fn joined(&self, tail: Part, head: Part) -> Part {
        let (at, len) = (tail.at, tail.len + head.len);
        let (Payload::Stable(first), Payload::Stable(second)) = (tail.payload, head.payload) else {
            unreachable!("only what is stable is cut")
        };
        let payload = StableBuf::joined(vec![first, second]);
        let mut memory = match tail.memory.left() > head.memory.left() {
            true => tail.memory,
            false => head.memory,
        };
        let rows = Some(self.geometry.row_shape());
        let pass = Pass { guards: true, rows, streams: false };
        let sums = doors::sums_of_stable(&payload, at, pass, &mut memory);
        Health::add(&self.health.stripes_joined);
        Part { at, len, payload: Payload::Stable(payload), sums, memory }
    }

    /// Bytes of the parity of a stripe.
    fn parity_of_stripe(&self) -> usize {
        self.geometry.level.parities() * self.geometry.chunk_bytes() as usize
    }
}
