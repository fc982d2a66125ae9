//! The bytes of a member, or of what an array should read as.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use stableio_mem::BLOCK;

const BLOCK64: u64 = BLOCK as u64;

/// The bytes of a block, shared by all who hold this version of it.
pub type Block = Arc<[u8; BLOCK]>;

/// A block of these bytes.
///
/// # Panics
///
/// When they are not one block.
pub fn block_of(bytes: &[u8]) -> Block {
    let bytes: &[u8; BLOCK] = bytes.try_into().expect("one block");
    Arc::new(*bytes)
}

/// A block of zeros.
pub fn zeros() -> Block {
    static ZEROS: OnceLock<Block> = OnceLock::new();
    ZEROS.get_or_init(|| Arc::new([0; BLOCK])).clone()
}

/// Bytes of any length of which most were never written, and are zero.
///
/// Cloning is cheap: blocks are shared until one of the two is changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    blocks: BTreeMap<u64, Block>,
}

impl Image {
    /// The block with this number.
    pub fn block(&self, number: u64) -> &[u8; BLOCK] {
        const ZEROS: &[u8; BLOCK] = &[0; BLOCK];
        self.blocks.get(&number).map_or(ZEROS, |block| block)
    }

    /// The same, to be kept.
    pub fn share(&self, number: u64) -> Block {
        self.blocks.get(&number).cloned().unwrap_or_else(zeros)
    }

    /// Replaces a block by one that is shared.
    pub fn put(&mut self, number: u64, block: Block) {
        self.blocks.insert(number, block);
    }

    /// Replaces a block.
    ///
    /// # Panics
    ///
    /// When `bytes` is not one block.
    pub fn set_block(&mut self, number: u64, bytes: &[u8]) {
        self.put(number, block_of(bytes));
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
            let part = &bytes[done..done + range.len()];
            Arc::make_mut(self.blocks.entry(number).or_insert_with(zeros))[range]
                .copy_from_slice(part);
        }
    }

    /// Turns one bit over.
    pub fn flip(&mut self, at: u64, bit: u8) {
        let block = self.blocks.entry(at / BLOCK64).or_insert_with(zeros);
        Arc::make_mut(block)[(at % BLOCK64) as usize] ^= 1 << bit;
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
