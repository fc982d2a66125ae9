//! A buddy allocator of blocks: free runs of 1, 2, 4 … 256 blocks, each
//! aligned to its own size, halved on demand and merged when freed.
//! (Knuth, The Art of Computer Programming, vol. 1, 2.5.)

/// Blocks of the largest run: 1 MiB.
pub(super) const LARGEST: usize = 1 << (ORDERS - 1);
const ORDERS: usize = 9;
const NONE: u32 = u32::MAX;

/// Free runs as one doubly linked list per order, threaded through arrays
/// beside the arena so that the arena itself stays untouched.
pub(super) struct Buddy {
    heads: [u32; ORDERS],
    next: Vec<u32>,
    prev: Vec<u32>,
    /// Order of the free run that begins at a block, else `NOT_FREE`.
    free_order: Vec<u8>,
}

const NOT_FREE: u8 = u8::MAX;

impl Buddy {
    /// All of `blocks` free; a multiple of [`LARGEST`].
    pub(super) fn new(blocks: usize) -> Self {
        assert!(blocks.is_multiple_of(LARGEST) && blocks < NONE as usize);
        let mut buddy = Self {
            heads: [NONE; ORDERS],
            next: vec![NONE; blocks],
            prev: vec![NONE; blocks],
            free_order: vec![NOT_FREE; blocks],
        };
        for first in (0..blocks).step_by(LARGEST).rev() {
            buddy.push(first, ORDERS - 1);
        }
        buddy
    }

    /// Takes `blocks` in as few runs as there are, largest first, and hands
    /// each to `run` as (first block, count). The caller knows by its
    /// reservation that so many are free.
    pub(super) fn allocate(&mut self, mut blocks: usize, mut run: impl FnMut(usize, usize)) {
        while blocks > 0 {
            // The order that holds all of it, or the largest there is.
            let want = (blocks.next_power_of_two().trailing_zeros() as usize).min(ORDERS - 1);
            let order = (want..ORDERS)
                .chain((0..want).rev())
                .find(|&order| self.heads[order] != NONE)
                .expect("POOL-1: reserved blocks are free");
            let first = self.heads[order] as usize;
            self.unlink(first, order);
            let count = blocks.min(1 << order);
            self.free(first + count, (1 << order) - count);
            run(first, count);
            blocks -= count;
        }
    }

    /// Frees a run of any length and place.
    pub(super) fn free(&mut self, mut first: usize, mut count: usize) {
        while count > 0 {
            let aligned = if first == 0 { ORDERS - 1 } else { first.trailing_zeros() as usize };
            let order = aligned.min(count.ilog2() as usize).min(ORDERS - 1);
            self.merge(first, order);
            first += 1 << order;
            count -= 1 << order;
        }
    }

    fn merge(&mut self, mut first: usize, mut order: usize) {
        debug_assert_eq!(self.free_order[first], NOT_FREE, "block {first} freed twice");
        while order < ORDERS - 1 {
            let buddy = first ^ (1 << order);
            if self.free_order[buddy] != order as u8 {
                break;
            }
            self.unlink(buddy, order);
            first = first.min(buddy);
            order += 1;
        }
        self.push(first, order);
    }

    fn push(&mut self, first: usize, order: usize) {
        let head = self.heads[order];
        self.next[first] = head;
        self.prev[first] = NONE;
        if head != NONE {
            self.prev[head as usize] = first as u32;
        }
        self.heads[order] = first as u32;
        self.free_order[first] = order as u8;
    }

    fn unlink(&mut self, first: usize, order: usize) {
        let (prev, next) = (self.prev[first], self.next[first]);
        match prev {
            NONE => self.heads[order] = next,
            prev => self.next[prev as usize] = next,
        }
        if next != NONE {
            self.prev[next as usize] = prev;
        }
        self.free_order[first] = NOT_FREE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_gives_a_block_twice_and_merges_all_back(sizes in proptest::collection::vec((1usize..300, any::<bool>()), 1..60)) {
            let blocks = 4 * LARGEST;
            let mut buddy = Buddy::new(blocks);
            let mut used = vec![false; blocks];
            let mut left = blocks;
            let mut held: Vec<Vec<(usize, usize)>> = Vec::new();
            let mut twice = false;
            for (size, free_one) in sizes {
                if size <= left {
                    let mut runs = Vec::new();
                    buddy.allocate(size, |first, count| {
                        for flag in &mut used[first..first + count] { twice |= std::mem::replace(flag, true); }
                        runs.push((first, count));
                    });
                    prop_assert_eq!(runs.iter().map(|r| r.1).sum::<usize>(), size);
                    left -= size;
                    held.push(runs);
                }
                if free_one && !held.is_empty() {
                    for (first, count) in held.swap_remove(0) {
                        used[first..first + count].fill(false);
                        left += count;
                        buddy.free(first, count);
                    }
                }
            }
            prop_assert!(!twice);
            for (first, count) in held.into_iter().flatten() { buddy.free(first, count); }
            prop_assert!((0..blocks).step_by(LARGEST).all(|b| buddy.free_order[b] == (ORDERS - 1) as u8));
        }
    }
}
