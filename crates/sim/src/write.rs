//! What a write may leave behind.

use std::sync::Arc;

use stableio_block::{Body, Op, Request};
use stableio_mem::{BLOCK, StableBuf};

use crate::image::{Image, blocks_of};
use crate::program::Source;

/// A write, kept by the oracle.
pub struct Write {
    /// Byte offset on the array.
    pub at: u64,
    /// What is written.
    pub content: Content,
    /// Whether it is to be durable when it settles.
    pub fua: bool,
}

/// What a write puts there.
pub enum Content {
    /// Memory of our own.
    Ours(Arc<Vec<u8>>),
    /// Memory of a program that changes it meanwhile.
    Racing(Source),
    /// Zeros, as many bytes.
    Zeros(usize),
}

impl Write {
    /// A write of bytes that nobody changes.
    pub fn ours(at: u64, bytes: Vec<u8>) -> Self {
        Self { at, content: Content::Ours(Arc::new(bytes)), fua: false }
    }

    /// A write from the memory of a program.
    pub fn racing(at: u64, source: Source) -> Self {
        Self { at, content: Content::Racing(source), fua: false }
    }

    /// Zeros.
    pub fn zeros(at: u64, len: usize) -> Self {
        Self { at, content: Content::Zeros(len), fua: false }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Ours(bytes) => bytes.len(),
            Content::Racing(source) => source.len(),
            Content::Zeros(len) => *len,
        }
    }

    /// Whether it writes nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The request for it.
    pub fn request(&self) -> Request {
        let body = match &self.content {
            Content::Ours(bytes) => Body::Stable(StableBuf::from_owned(Shared(bytes.clone()))),
            Content::Racing(source) => Body::Foreign(source.handle()),
            Content::Zeros(len) => {
                let op = Op::WriteZeroes { at: self.at, len: *len as u64, fua: self.fua };
                return Request { op, memory: None };
            }
        };
        Request::write(self.at, body, self.fua)
    }

    /// Numbers of the blocks that it touches.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        self.at / BLOCK as u64..(self.at + self.len() as u64).div_ceil(BLOCK as u64)
    }

    /// Whether a block that was `old` may be `found` after it (CHECK-4 inside,
    /// CHECK-5 outside).
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn explains(&self, number: u64, found: &[u8], old: &[u8]) -> Result<(), String> {
        let inside = blocks_of(self.at, self.len()).find(|(n, ..)| *n == number);
        let Some((_, range, from)) = inside else {
            return same(found, old).map_err(|at| format!("byte {at} changed outside"));
        };
        same(&found[..range.start], &old[..range.start])
            .and_then(|()| same(&found[range.end..], &old[range.end..]))
            .map_err(|at| format!("byte {at} changed beside the written range {range:?}"))?;
        let found = &found[range.clone()];
        match &self.content {
            Content::Racing(source) => source.explains(from, found),
            Content::Ours(bytes) => same(found, &bytes[from..from + range.len()])
                .map_err(|at| format!("byte {at} is not what was written")),
            Content::Zeros(_) => match found.iter().position(|b| *b != 0) {
                Some(at) => Err(format!("byte {at} is not zero")),
                None => Ok(()),
            },
        }
    }

    /// The same for words that lie in two blocks, once all are in `image`.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn explains_whole(&self, image: &Image) -> Result<(), String> {
        let Content::Racing(source) = &self.content else { return Ok(()) };
        let mut found = vec![0; source.len()];
        image.read(self.at, &mut found);
        source.explains(0, &found)
    }

    /// Applies a write of known bytes.
    ///
    /// # Panics
    ///
    /// When a program's memory is written: what it had is found afterwards.
    pub fn apply(&self, to: &mut Image) {
        match &self.content {
            Content::Ours(bytes) => to.write(self.at, bytes),
            Content::Zeros(len) => to.write(self.at, &vec![0; *len]),
            Content::Racing(_) => panic!("only the images know what was loaded"),
        }
    }
}

/// Bytes that a request and the oracle both hold.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn same(found: &[u8], want: &[u8]) -> Result<(), usize> {
    match found.iter().zip(want).position(|(f, w)| f != w) {
        Some(at) => Err(at),
        None => Ok(()),
    }
}
