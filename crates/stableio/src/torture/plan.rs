//! Where a round writes, and from what shapes of memory.
//!
//! A round walks over the array once and lays out *lots*, each for one write:
//! parts of blocks, blocks, runs that cover rows partly, wholly or both, with
//! gaps between them or none. What lies in the gaps are the neighbours. Lots
//! next to each other, and in each other's rows, are written at the same
//! time, in any order.

use smallvec::SmallVec;
use stableio_array::Geometry;
use stableio_mem::BLOCK;

/// What offsets and lengths on the array are multiples of.
const SECTOR: u64 = 512;
/// Bytes of the largest write: more than a device takes at once, so that the
/// stack has to cut it.
pub(super) const LARGEST: usize = (1 << 20) + (256 << 10);
/// Bytes of the memory that a write's segments lie in: the largest write, and
/// room to scatter it.
pub(super) const BUFFER: usize = LARGEST + (64 << 10);
/// Segments of a write, at most: queue depth times these and two more must
/// fit into a virtqueue.
pub(super) const SEGMENTS: usize = 5;
/// Lots that are written in any order among themselves.
const WINDOW: usize = 128;

/// Where one write goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lot {
    /// Offset on the array.
    pub(super) at: u64,
    /// Bytes.
    pub(super) len: usize,
}

/// A piece of a buffer, in bytes from its beginning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) at: usize,
    pub(super) len: usize,
}

/// A write's memory, in the order of the data.
pub(super) type Pieces = SmallVec<[Piece; SEGMENTS]>;

/// The lots of a round, in the order in which they are written.
pub(super) struct Plan(Vec<Lot>);

impl Plan {
    /// Lays lots out over an array of `size` bytes.
    pub(super) fn new(size: u64, geometry: &Geometry, random: &mut Random) -> Self {
        let stripe = geometry.chunk_bytes() * geometry.columns() as u64;
        let mut lots = Vec::new();
        let mut at = 0;
        loop {
            let block = BLOCK as u64;
            let (align, len) = match random.below(1000) {
                // Parts of a block, at its beginning, end or middle.
                0..150 => (SECTOR, SECTOR * (1 + random.below(7))),
                // What a database writes.
                150..750 => (block, block * (1 + random.below(3))),
                // Anything.
                750..960 => (SECTOR, SECTOR * (1 + random.below(40))),
                // Whole rows.
                960..970 => (block, geometry.chunk_bytes() * (1 + random.below(2))),
                970..980 => (stripe, stripe),
                // Rows whole and in part, in several stripes.
                980..995 => (block, block * (1 + random.below(64))),
                _ => (SECTOR, SECTOR * (1 + random.below(LARGEST as u64 / SECTOR))),
            };
            let gap = match random.below(4) {
                0 | 1 => 0,
                2 => SECTOR * random.below(8),
                _ => block * random.below(4),
            };
            at = u64::next_multiple_of(at + gap, align);
            let len = (len as usize).min(LARGEST);
            if at + len as u64 > size {
                break;
            }
            lots.push(Lot { at, len });
            at += len as u64;
        }
        let mut windows: Vec<&mut [Lot]> = lots.chunks_mut(WINDOW).collect();
        windows.iter_mut().for_each(|window| random.shuffle(window));
        random.shuffle(&mut windows);
        Self(windows.into_iter().flat_map(|window| window.iter().copied()).collect())
    }

    pub(super) fn lots(&self) -> &[Lot] {
        &self.0
    }
}

/// Cuts a write of `len` bytes into pieces of a buffer.
pub(super) fn scatter(len: usize, random: &mut Random) -> Pieces {
    let page = BLOCK * random.below(4) as usize;
    // What lies between pieces, and where they may begin and end.
    let grain = match random.below(4) {
        // As a program with O_DIRECT has it.
        0 => return SmallVec::from_slice(&[Piece { at: page, len }]),
        // One page twice in a request, if it can be.
        1 if len.is_multiple_of(2) => {
            let at = page + [0, 512, 8, 3][random.below(4) as usize];
            return SmallVec::from_slice(&[Piece { at, len: len / 2 }; 2]);
        }
        2 => 1,
        _ => SECTOR as usize,
    };
    let pick =
        |most: usize, random: &mut Random| random.below(most as u64 + 1) as usize / grain * grain;
    let mut cuts: SmallVec<[usize; SEGMENTS]> =
        (0..random.below(SEGMENTS as u64)).map(|_| pick(len, random)).collect();
    cuts.sort_unstable();
    cuts.push(len);
    let mut pieces = Pieces::new();
    let (mut done, mut at) = (0, page + pick(BLOCK, random));
    for cut in cuts {
        if cut > done {
            pieces.push(Piece { at, len: cut - done });
            at += cut - done + pick(2 * BLOCK, random);
            done = cut;
        }
    }
    // The order of the data need not be that of the memory.
    if random.below(2) == 0 {
        pieces.reverse();
    }
    pieces
}

/// A generator (xorshift64*).
pub(super) struct Random(u64);

impl Random {
    /// With a seed; any will do.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stableio_array::Level;

    #[test]
    fn lots_share_no_byte_and_leave_neighbours() {
        let geometry = Geometry::new(Level::Raid5, 3, 64 << 10, 64 << 20).unwrap();
        for seed in 0..20 {
            let plan = Plan::new(geometry.size(), &geometry, &mut Random::new(seed));
            let mut lots = plan.lots().to_vec();
            lots.sort_unstable_by_key(|lot| lot.at);
            assert!(lots.windows(2).all(|w| w[0].at + w[0].len as u64 <= w[1].at));
            assert!(lots.last().unwrap().at + lots.last().unwrap().len as u64 <= geometry.size());
            let written: usize = lots.iter().map(|lot| lot.len).sum();
            assert!(written as u64 > geometry.size() / 2, "{written} of {}", geometry.size());
            assert!((written as u64) < geometry.size() * 95 / 100);
        }
    }

    #[test]
    fn pieces_make_up_the_write_and_lie_in_the_buffer() {
        let mut random = Random::new(1);
        for _ in 0..100_000 {
            let len = 512 * (1 + random.below(2048)) as usize;
            let pieces = scatter(len, &mut random);
            assert_eq!(pieces.iter().map(|p| p.len).sum::<usize>(), len);
            assert!(pieces.iter().all(|p| p.len > 0 && p.at + p.len <= BUFFER), "{pieces:?}");
            assert!(pieces.len() <= SEGMENTS);
        }
    }
}
