//! How a write covers its rows: bands of rows with the same coverage.
//!
//! ```text
//! a write of the bytes ▒ in a stripe of two columns, chunk of 4 blocks:
//!
//!          column 0   column 1
//!   row 0  ....       ▒▒▒▒      band: none, full
//!   row 1  ....       ▒▒▒▒      (the same band)
//!   row 2  ..▒▒       ▒▒▒.      band of one row: part, part
//!   row 3  ▒▒▒▒       ....      band: full, none
//! ```
//!
//! A band of which every column is full needs nothing from the medium.

use std::ops::Range;

use smallvec::SmallVec;
use stableio_mem::BLOCK;

use crate::geometry::Geometry;

/// How a write covers a column in the rows of a band.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cover {
    /// Not at all.
    None,
    /// Every block wholly; the first begins at this byte of the payload.
    Full(usize),
    /// A part of the one block of a one-row band.
    Part {
        /// First byte in the block.
        from: usize,
        /// Bytes.
        len: usize,
        /// First byte in the payload.
        payload: usize,
    },
}

/// Rows of a stripe that a write covers alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Band {
    pub(crate) stripe: u64,
    pub(crate) rows: Range<u32>,
    pub(crate) covers: SmallVec<[Cover; 4]>,
}

impl Band {
    /// Whether every data block of every row is covered.
    pub(crate) fn is_full(&self) -> bool {
        self.covers.iter().all(|c| matches!(c, Cover::Full(_)))
    }
}

/// The bands of a write of `len` bytes at `at`, by stripe and row.
pub(crate) fn bands(g: &Geometry, at: u64, len: usize) -> Vec<Band> {
    let stripe_bytes = g.chunk_bytes() * g.columns() as u64;
    let mut bands = Vec::new();
    let (mut start, end) = (at, at + len as u64);
    while start < end {
        let stripe = start / stripe_bytes;
        let stop = end.min((stripe + 1) * stripe_bytes);
        let within = (start - stripe * stripe_bytes)..(stop - stripe * stripe_bytes);
        // Byte `within.start` of the stripe is byte `start - at` of the payload.
        stripe_bands(g, stripe, within, (start - at) as usize, &mut bands);
        start = stop;
    }
    bands
}

fn stripe_bands(
    g: &Geometry,
    stripe: u64,
    bytes: Range<u64>,
    payload: usize,
    bands: &mut Vec<Band>,
) {
    let (chunk, block) = (g.chunk_bytes(), BLOCK as u64);
    // The part of each column's chunk that is written.
    let parts: SmallVec<[Range<u64>; 4]> = (0..g.columns() as u64)
        .map(|c| {
            bytes.start.clamp(c * chunk, (c + 1) * chunk) - c * chunk
                ..bytes.end.clamp(c * chunk, (c + 1) * chunk) - c * chunk
        })
        .collect();
    let mut cuts: SmallVec<[u32; 12]> = SmallVec::new();
    for part in parts.iter().filter(|p| !p.is_empty()) {
        for edge in [part.start, part.end] {
            cuts.extend([(edge / block) as u32, edge.div_ceil(block) as u32]);
        }
    }
    cuts.sort_unstable();
    cuts.dedup();
    for pair in cuts.windows(2) {
        let (first, end) = (u64::from(pair[0]) * block, u64::from(pair[1]) * block);
        let cover = |(column, part): (usize, &Range<u64>)| {
            let (from, to) = (part.start.max(first), part.end.min(end));
            let place = |byte: u64| payload + (column as u64 * chunk + byte - bytes.start) as usize;
            if from >= to {
                Cover::None
            } else if from == first && to == end {
                Cover::Full(place(first))
            } else {
                Cover::Part {
                    from: (from - first) as usize,
                    len: (to - from) as usize,
                    payload: place(from),
                }
            }
        };
        let covers: SmallVec<[Cover; 4]> = parts.iter().enumerate().map(cover).collect();
        if covers.iter().any(|c| *c != Cover::None) {
            bands.push(Band { stripe, rows: pair[0]..pair[1], covers });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Level, Place};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bands_cover_each_byte_once(members in 3usize..7, chunk in 0u32..4, at in 0u64..(1 << 20), len in 1usize..300_000) {
            let g = Geometry::new(Level::Raid5, members, 4096 << chunk, 64 << 20).unwrap();
            let mut seen = vec![0u8; len];
            let mut last = None;
            for band in bands(&g, at, len) {
                prop_assert!(last < Some((band.stripe, band.rows.start)));
                last = Some((band.stripe, band.rows.end - 1));
                for (column, cover) in band.covers.iter().enumerate() {
                    for (i, row) in band.rows.clone().enumerate() {
                        let place = Place { stripe: band.stripe, row, column };
                        let per = g.row_shape().stripe_blocks();
                        let block = place.stripe * per + (column as u64) * u64::from(g.chunk_blocks) + u64::from(row);
                        let (from, len, payload) = match *cover {
                            Cover::None => continue,
                            Cover::Full(payload) => (0, BLOCK, payload + i * BLOCK),
                            Cover::Part { from, len, payload } => {
                                prop_assert_eq!(band.rows.len(), 1);
                                (from, len, payload)
                            }
                        };
                        prop_assert_eq!(block * BLOCK as u64 + from as u64, at + payload as u64);
                        seen[payload..payload + len].iter_mut().for_each(|s| *s += 1);
                    }
                }
            }
            prop_assert!(seen.iter().all(|s| *s == 1));
        }
    }
}
