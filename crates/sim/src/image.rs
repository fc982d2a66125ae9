//! The bytes of a member, or of what an array should read as.

use std::collections::BTreeMap;
use std::sync::Arc;

use stableio_mem::BLOCK;

const BLOCK64: u64 = BLOCK as u64;

/// Bytes of any length of which most were never written, and are zero.
///
/// Cloning is cheap: blocks are shared until one of the two is changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    blocks: BTreeMap<u64, Arc<[u8; BLOCK]>>,
}

impl Image {
    /// The block with this number.
    pub fn block(&self, number: u64) -> &[u8; BLOCK] {
        const ZEROS: &[u8; BLOCK] = &[0; BLOCK];
        self.blocks.get(&number).map_or(ZEROS, |block| block)
    }

    /// Replaces a block.
    ///
    /// # Panics
    ///
    /// When `bytes` is not one block.
    pub fn set_block(&mut self, number: u64, bytes: &[u8]) {
        let bytes: [u8; BLOCK] = bytes.try_into().expect("one block");
        self.blocks.insert(number, Arc::new(bytes));
    }

    /// Reads bytes from `at` on.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        for (number, range, done) in blocks_of(at, into.len()) {
            into[done..done + range.len()].copy_from_slice(&self.block(number)[range]);
        }
    }

    /// Writes bytes from `at` on.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for (number, range, done) in blocks_of(at, bytes.len()) {
            let mut block = *self.block(number);
            let len = range.len();
            block[range].copy_from_slice(&bytes[done..done + len]);
            self.set_block(number, &block);
        }
    }

    /// Turns one bit over.
    pub fn flip(&mut self, at: u64, bit: u8) {
        let mut block = *self.block(at / BLOCK64);
        block[(at % BLOCK64) as usize] ^= 1 << bit;
        self.set_block(at / BLOCK64, &block);
    }

    /// Numbers of the blocks that were ever written, ascending.
    pub fn written(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }
}

/// The blocks that `len` bytes from `at` on touch: number, bytes in the block,
/// and how many of the bytes come before.
pub fn blocks_of(
    at: u64,
    len: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, usize)> {
    let end = at + len as u64;
    (at / BLOCK64..end.div_ceil(BLOCK64)).map(move |number| {
        let (from, to) = ((number * BLOCK64).max(at), ((number + 1) * BLOCK64).min(end));
        let start = (from - number * BLOCK64) as usize;
        (number, start..start + (to - from) as usize, (from - at) as usize)
    })
}
