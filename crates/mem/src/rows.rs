//! How the blocks of a request fall into rows, as far as a pass over the
//! data must know: which blocks share a parity block, and where it goes.
//!
//! ```text
//! stripe of 3 data columns, chunk of 4 blocks; blocks in the order of the data:
//!
//!            column 0   column 1   column 2   parity
//!   row 0       0          4          8       0^4^8
//!   row 1       1          5          9       1^5^9
//!   row 2       2          6         10       2^6^10
//!   row 3       3          7         11       3^7^11
//! ```
//!
//! A request for the blocks 1 to 10 covers the rows 1 and 2 wholly: their
//! parity follows from the request alone, in the pass that copies it. With two
//! parities, Q has a place like that of P in a buffer of its own.

use std::ops::Range;

use stableio_onepass::gf;

use crate::units::BLOCK;

/// The shape of a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowShape {
    /// Blocks of a chunk, which is also the rows of a stripe.
    pub chunk_blocks: u32,
    /// Data columns of a stripe.
    pub columns: u32,
    /// Parity blocks of a row: 1 for P, 2 for P and Q.
    pub parities: u8,
}

/// The part of a request that lies in one stripe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StripeSpan {
    /// The stripe's number.
    pub stripe: u64,
    /// The whole blocks covered, counted from the stripe's first.
    pub blocks: Range<u32>,
    /// Rows of which the request covers every data block.
    pub full_rows: Range<u32>,
}

/// Where the parity of a stripe's full rows lies in the parity buffer of a
/// pass: P in its own, and Q at the same place in its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParitySpan {
    /// The stripe's number.
    pub stripe: u64,
    /// Its full rows.
    pub rows: Range<u32>,
    /// Byte offset of the first full row's parity block.
    pub at: usize,
}

/// Blocks next to each other in the data and, if they have parity, in the
/// parity buffer too: then they are all the blocks that a column has in the
/// full rows of its stripe.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Blocks.
    pub(crate) count: usize,
    /// Byte offset in the parity buffer.
    pub(crate) parity: Option<usize>,
}

/// The whole blocks inside the bytes `at..at + len`.
pub(crate) fn whole_blocks(at: u64, len: usize) -> Range<u64> {
    let block = BLOCK as u64;
    let first = at.div_ceil(block);
    first..first.max((at + len as u64) / block)
}

impl RowShape {
    /// Whether rows have Q beside P.
    ///
    /// # Panics
    ///
    /// When there is no such shape: a row has one or two parities, and with
    /// two no more columns than Q can tell apart.
    pub(crate) fn has_q(&self) -> bool {
        let most = if self.parities == 2 { gf::MAX_COLUMNS } else { usize::MAX };
        let fits = matches!(self.parities, 1 | 2) && self.columns as usize <= most;
        assert!(fits, "no such rows: {self:?}");
        self.parities == 2
    }

    /// Data blocks of a stripe.
    pub fn stripe_blocks(&self) -> u64 {
        u64::from(self.chunk_blocks) * u64::from(self.columns)
    }

    /// Blocks of memory that it may take to write a part of a row: every data
    /// column, each old parity, each new parity, and the merged block of a
    /// sub-block end.
    pub fn row_scratch(&self) -> usize {
        self.columns as usize + 1 + 2 * usize::from(self.parities)
    }

    /// The stripes that the whole blocks of `at..at + len` touch, ascending.
    pub fn spans(&self, at: u64, len: usize) -> impl Iterator<Item = StripeSpan> + use<> {
        let shape = *self;
        let all = whole_blocks(at, len);
        let per = shape.stripe_blocks();
        let stripes = if all.is_empty() { 0..0 } else { all.start / per..all.end.div_ceil(per) };
        stripes.map(move |stripe| {
            let base = stripe * per;
            let first = (all.start.max(base) - base) as u32;
            let end = (all.end.min(base + per) - base) as u32;
            StripeSpan { stripe, blocks: first..end, full_rows: shape.full_rows(first, end) }
        })
    }

    /// Row `r` is full when its block of the first column (`r`) and that of
    /// the last (`(columns - 1) * chunk + r`) both lie in `first..end`.
    fn full_rows(&self, first: u32, end: u32) -> Range<u32> {
        let last_column = (self.columns - 1) * self.chunk_blocks;
        let stop = end.saturating_sub(last_column).min(self.chunk_blocks);
        first.min(stop)..stop
    }

    /// Where the parity of the full rows of `at..at + len` goes: packed, in
    /// the order of the stripes. Also the bytes that it takes: one of the
    /// parities, if there are two.
    pub fn parity_spans(&self, at: u64, len: usize) -> (Vec<ParitySpan>, usize) {
        let mut bytes = 0;
        let spans = self
            .spans(at, len)
            .filter(|span| !span.full_rows.is_empty())
            .map(|span| {
                let here = bytes;
                bytes += span.full_rows.len() * BLOCK;
                ParitySpan { stripe: span.stripe, rows: span.full_rows, at: here }
            })
            .collect();
        (spans, bytes)
    }

    /// Rows that `at..at + len` touches without covering them, sub-block ends
    /// included: an upper bound, for reserving memory.
    pub fn partial_rows(&self, at: u64, len: usize) -> usize {
        let touched =
            |span: &StripeSpan| (span.blocks.len() as u32).min(self.chunk_blocks) as usize;
        2 + self.spans(at, len).map(|s| touched(&s) - s.full_rows.len()).sum::<usize>()
    }

    /// The blocks of `at..at + len` as runs; the parity offsets are those of
    /// `spans`, made by [`parity_spans`](Self::parity_spans) for this range.
    pub(crate) fn runs(
        &self,
        at: u64,
        len: usize,
        spans: &[ParitySpan],
    ) -> impl Iterator<Item = Run> {
        let chunk = self.chunk_blocks;
        self.spans(at, len).flat_map(move |span| {
            let parity = spans.iter().find(|p| p.stripe == span.stripe).map(|p| p.at);
            let (mut block, full) = (span.blocks.start, span.full_rows);
            std::iter::from_fn(move || {
                if block >= span.blocks.end {
                    return None;
                }
                let row = block % chunk;
                // The run ends where the chunk ends or where rows begin or
                // cease to be full.
                let row_end = if row < full.start {
                    full.start
                } else if row < full.end {
                    full.end
                } else {
                    chunk
                };
                let count = (row_end - row).min(span.blocks.end - block);
                block += count;
                let parity = parity
                    .filter(|_| full.contains(&row))
                    .map(|at| at + (row - full.start) as usize * BLOCK);
                Some(Run { count: count as usize, parity })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_each_block_once_and_agree_with_a_naive_row_count(
            chunk_blocks in 1u32..9, columns in 1u32..6, at in 0u64..200_000, len in 0usize..400_000,
        ) {
            let shape = RowShape { chunk_blocks, columns, parities: 1 };
            let whole = whole_blocks(at, len);
            let (spans, bytes) = shape.parity_spans(at, len);
            // Oracle: count how many columns of each row the range covers.
            let mut cover = std::collections::BTreeMap::<(u64, u64), u32>::new();
            for b in whole.clone() {
                let within = b % shape.stripe_blocks();
                *cover.entry((b / shape.stripe_blocks(), within % u64::from(chunk_blocks))).or_default() += 1;
            }
            let full = cover.values().filter(|&&n| n == columns).count();
            prop_assert_eq!(bytes, full * BLOCK);
            prop_assert!(shape.partial_rows(at, len) >= cover.len() - full);
            let mut next = whole.start;
            let mut hits = vec![0u32; full];
            let mut failed = None;
            for run in shape.runs(at, len, &spans) {
                for i in 0..run.count {
                    let b = next + i as u64;
                    let row = (b / shape.stripe_blocks(), b % shape.stripe_blocks() % u64::from(chunk_blocks));
                    let is_full = cover[&row] == columns;
                    if is_full != run.parity.is_some() { failed = Some(b); }
                    if let Some(at) = run.parity {
                        // The columns come in their order, each of them wholly.
                        let column = b % shape.stripe_blocks() / u64::from(chunk_blocks);
                        if u64::from(hits[at / BLOCK + i]) != column { failed = Some(b); }
                        hits[at / BLOCK + i] += 1;
                    }
                }
                if let Some(at) = run.parity {
                    let span = spans.iter().find(|span| span.at == at);
                    if span.is_none_or(|span| span.rows.len() != run.count) { failed = Some(next); }
                }
                next += run.count as u64;
            }
            prop_assert_eq!(failed, None);
            prop_assert_eq!(next, whole.end.max(whole.start));
            prop_assert!(hits.iter().all(|&h| h == columns));
        }
    }

    #[test]
    fn rows_that_cannot_be_are_refused() {
        let shape = |columns, parities| RowShape { chunk_blocks: 1, columns, parities };
        assert!(!shape(256, 1).has_q() && shape(255, 2).has_q());
        for wrong in [shape(2, 0), shape(2, 3), shape(256, 2)] {
            assert!(std::panic::catch_unwind(|| wrong.has_q()).is_err(), "{wrong:?}");
        }
    }
}
