//! What a member holds: on its medium, and in the cache before it.
//!
//! MED-1: a read sees the newest version of a block. The medium holds the
//! newest that a flush, or a write with FUA, covered; the cache holds those
//! since.
//!
//! MED-2: a flush covers what had landed when it began, once it is done.
//!
//! MED-3: after a loss of power each block holds one version: the durable one,
//! any since, or one that was under way; which, is chosen block by block, so
//! writes are lost, kept and reordered. Where a block is larger than the
//! atomic unit, its units may be of two of these versions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use stableio_mem::BLOCK;

use crate::image::{Block, Image, block_of, zeros};
use crate::random::Random;

const BLOCK64: u64 = BLOCK as u64;
/// Versions of a block since the durable one that a cache remembers.
const VERSIONS: usize = 8;

/// Medium and cache.
#[derive(Clone, Default)]
pub struct Medium {
    /// What a read sees.
    live: Image,
    /// Blocks of which the medium may hold something else.
    dirty: BTreeMap<u64, Dirty>,
    unreadable: Vec<Range<u64>>,
    /// How many versions landed so far.
    landed: u64,
}

/// The versions of a block, oldest first.
#[derive(Clone)]
struct Dirty {
    durable: Block,
    /// With when they landed; the last is what a read sees.
    since: VecDeque<(u64, Block)>,
}

/// What a loss of power may do to all blocks of a member alike.
#[derive(Clone, Copy)]
enum Mood {
    /// The cache had all but reached the medium.
    Keep,
    /// Nothing of it had.
    Lose,
    /// Anything, block by block.
    Mix,
}

impl Medium {
    /// All of this is durable.
    pub fn new(image: Image) -> Self {
        Self { live: image, ..Self::default() }
    }

    /// What a read sees.
    pub fn live(&self) -> &Image {
        &self.live
    }

    /// What was flushed.
    pub fn durable(&self) -> Image {
        let mut image = self.live.clone();
        for (number, dirty) in &self.dirty {
            image.put(*number, dirty.durable.clone());
        }
        image
    }

    /// Whether all is durable.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }

    /// A block arrives.
    pub fn land(&mut self, number: u64, block: Block, durable: bool) {
        let at = number * BLOCK64;
        self.unreadable.retain(|bad| bad.end <= at || at + BLOCK64 <= bad.start);
        self.landed += 1;
        if durable {
            self.dirty.remove(&number);
        } else {
            let live = &self.live;
            let dirty = self
                .dirty
                .entry(number)
                .or_insert_with(|| Dirty { durable: live.share(number), since: VecDeque::new() });
            dirty.since.push_back((self.landed, block.clone()));
            if dirty.since.len() > VERSIONS {
                dirty.since.pop_front();
            }
        }
        self.live.put(number, block);
    }

    /// A flush begins: what has landed so far is what it covers.
    pub fn begin_flush(&self) -> u64 {
        self.landed
    }

    /// A flush that began then is done.
    pub fn finish_flush(&mut self, covers: u64) {
        self.dirty.retain(|_, dirty| {
            while dirty.since.front().is_some_and(|(landed, _)| *landed <= covers) {
                dirty.durable = dirty.since.pop_front().expect("there is one").1;
            }
            !dirty.since.is_empty()
        });
    }

    /// Silent corruption: turns one bit over in what a read sees.
    pub fn flip(&mut self, at: u64, bit: u8) {
        self.live.flip(at, bit);
        self.rot(at / BLOCK64);
    }

    /// Silent corruption: the block at `at` becomes zeros.
    pub fn blank(&mut self, at: u64) {
        self.live.put(at / BLOCK64, zeros());
        self.rot(at / BLOCK64);
    }

    /// What is seen of a block is what would be durable, too.
    fn rot(&mut self, number: u64) {
        if let Some(newest) = self.dirty.get_mut(&number).and_then(|d| d.since.back_mut()) {
            newest.1 = self.live.share(number);
        }
    }

    /// Reads that touch these bytes fail from now on, until they are written.
    pub fn make_unreadable(&mut self, bytes: Range<u64>) {
        self.unreadable.push(bytes);
    }

    /// Whether these bytes can be read.
    pub fn is_readable(&self, bytes: &Range<u64>) -> bool {
        !self.unreadable.iter().any(|bad| bad.start < bytes.end && bytes.start < bad.end)
    }

    /// Power is lost (MED-3) while these blocks were under way, by number;
    /// gives the blocks that are torn.
    pub fn lose_power(
        &mut self,
        under_way: BTreeMap<u64, Vec<Block>>,
        atomic: usize,
        random: &mut Random,
    ) -> BTreeSet<u64> {
        let mood = random.pick(&[Mood::Mix, Mood::Mix, Mood::Keep, Mood::Lose]);
        let mut torn = BTreeSet::new();
        let dirty = std::mem::take(&mut self.dirty);
        let numbers: BTreeSet<u64> = dirty.keys().chain(under_way.keys()).copied().collect();
        for number in numbers {
            let mut versions = match dirty.get(&number) {
                Some(Dirty { durable, since }) => {
                    let since = since.iter().map(|(_, block)| block.clone());
                    std::iter::once(durable.clone()).chain(since).collect()
                }
                None => vec![self.live.share(number)],
            };
            let settled = versions.len();
            versions.extend(under_way.get(&number).into_iter().flatten().cloned());
            let mut choose = || match mood {
                Mood::Keep if !random.one_in(8) => settled - 1,
                Mood::Lose if !random.one_in(8) => 0,
                _ => random.below(versions.len() as u64) as usize,
            };
            let (first, second) = (choose(), choose());
            let block = match first != second && atomic < BLOCK && random.one_in(2) {
                true => {
                    let mixed = tear(&versions[first], &versions[second], atomic, random);
                    if !versions.contains(&mixed) {
                        torn.insert(number);
                    }
                    mixed
                }
                false => versions[first].clone(),
            };
            if block != versions[0] {
                // What can be half written can be read again.
                let at = number * BLOCK64;
                self.unreadable.retain(|bad| bad.end <= at || at + BLOCK64 <= bad.start);
            }
            self.live.put(number, block);
        }
        torn
    }
}

/// Units of two versions.
fn tear(first: &Block, second: &Block, atomic: usize, random: &mut Random) -> Block {
    let mut bytes = **first;
    for (unit, from) in bytes.chunks_exact_mut(atomic).zip(second.chunks_exact(atomic)) {
        if random.one_in(2) {
            unit.copy_from_slice(from);
        }
    }
    block_of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(byte: u8) -> Block {
        block_of(&[byte; BLOCK])
    }

    /// What block 0 may be after a loss of power, over many choices.
    fn outcomes(medium: &Medium, under_way: &[u8], atomic: usize) -> BTreeSet<Vec<u8>> {
        (0..400)
            .map(|seed| {
                let mut medium = medium.clone();
                let blocks = under_way.iter().map(|byte| block(*byte)).collect();
                let under_way = BTreeMap::from([(0, blocks)]);
                let torn = medium.lose_power(under_way, atomic, &mut Random::new(seed));
                let mut units = medium.live().block(0).to_vec();
                units.dedup();
                assert!(units.len() == 1 || torn.contains(&0));
                assert!(medium.is_clean());
                units.sort_unstable();
                units.dedup();
                units
            })
            .collect()
    }

    /// MED-1, MED-2.
    #[test]
    fn a_flush_covers_what_had_landed_when_it_began() {
        let mut medium = Medium::default();
        medium.land(0, block(1), false);
        let covers = medium.begin_flush();
        medium.land(0, block(2), false);
        assert_eq!(medium.durable().block(0)[0], 0);
        medium.finish_flush(covers);
        assert_eq!((medium.durable().block(0)[0], medium.live().block(0)[0]), (1, 2));
        assert!(!medium.is_clean());
        medium.land(0, block(3), true);
        assert_eq!(medium.durable().block(0)[0], 3);
        assert!(medium.is_clean());
    }

    /// MED-3.
    #[test]
    fn a_loss_of_power_leaves_any_version_and_tears_at_the_unit() {
        let mut medium = Medium::default();
        medium.land(0, block(1), true);
        medium.land(0, block(2), false);
        medium.land(0, block(3), false);
        let whole = outcomes(&medium, &[4], BLOCK);
        assert_eq!(whole, BTreeSet::from([vec![1], vec![2], vec![3], vec![4]]));
        let torn = outcomes(&medium, &[4], 512);
        assert!(torn.is_superset(&whole) && torn.contains(&vec![1, 4]), "{torn:?}");
        assert!(torn.contains(&vec![2, 3]) && torn.iter().all(|units| units.len() <= 2));
        medium.finish_flush(medium.begin_flush());
        assert_eq!(outcomes(&medium, &[], 512), BTreeSet::from([vec![3]]));
    }
}
