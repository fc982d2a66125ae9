//! What a write may leave behind.

use std::sync::Arc;

use stableio_block::{Body, Op, Request};
use stableio_mem::{BLOCK, StableBuf};

use crate::image::{blocks_of, zeros};
use crate::model::{Model, Version};
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
    /// Nothing: whole blocks that read as zeros afterwards, or as before.
    Discard(usize),
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

    /// A discard of whole blocks.
    ///
    /// # Panics
    ///
    /// When they are not whole.
    pub fn discard(at: u64, len: usize) -> Self {
        assert!((at as usize | len).is_multiple_of(BLOCK), "{at}+{len} are no whole blocks");
        Self { at, content: Content::Discard(len), fua: false }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Ours(bytes) => bytes.len(),
            Content::Racing(source) => source.len(),
            Content::Zeros(len) | Content::Discard(len) => *len,
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
                return Request::of(op);
            }
            Content::Discard(len) => {
                let op = Op::Discard { at: self.at, len: *len as u64 };
                return Request::of(op);
            }
        };
        Request::write(self.at, body, self.fua)
    }

    /// Numbers of the blocks that it touches.
    pub fn blocks(&self) -> std::ops::Range<u64> {
        self.at / BLOCK as u64..(self.at + self.len() as u64).div_ceil(BLOCK as u64)
    }

    /// Whether it writes a block wholly.
    pub fn covers(&self, block: u64) -> bool {
        let (start, end) = (block * BLOCK as u64, (block + 1) * BLOCK as u64);
        self.at <= start && end <= self.at + self.len() as u64
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
            Content::Discard(_) if found.iter().all(|byte| *byte == 0) => Ok(()),
            Content::Discard(_) => same(found, &old[range])
                .map_err(|at| format!("byte {at} is neither what it was nor zero")),
        }
    }

    /// The same of a block that may be lost (`None`) before and after: only
    /// where it is wholly written it is not lost any more.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn explains_version(
        &self,
        number: u64,
        found: &Version,
        old: &Version,
    ) -> Result<(), String> {
        match (found, old) {
            (None, None) if matches!(self.content, Content::Discard(_)) => Ok(()),
            (None, _) => Err("it is lost".to_owned()),
            (Some(_), None) if !self.covers(number) => Err("it was lost".to_owned()),
            (Some(found), old) => {
                let old = old.clone().unwrap_or_else(zeros);
                self.explains(number, &found[..], &old[..])
            }
        }
    }

    /// The same for words that lie in two blocks, once the model knows all.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn explains_whole(&self, model: &Model) -> Result<(), String> {
        let Content::Racing(source) = &self.content else { return Ok(()) };
        let mut found = vec![0; source.len()];
        model.read(self.at, &mut found);
        source.explains(0, &found)
    }

    /// Whether what it leaves is known without looking.
    pub fn is_known(&self) -> bool {
        matches!(self.content, Content::Ours(_) | Content::Zeros(_))
    }

    /// Applies a write of known bytes to a block.
    ///
    /// # Panics
    ///
    /// Where only the members know what it left.
    pub fn apply_to(&self, block: u64, bytes: &mut [u8; BLOCK]) {
        let inside = blocks_of(self.at, self.len()).find(|(number, ..)| *number == block);
        let Some((_, range, from)) = inside else { return };
        match &self.content {
            Content::Ours(new) => {
                let len = range.len();
                bytes[range].copy_from_slice(&new[from..from + len]);
            }
            Content::Zeros(_) => bytes[range].fill(0),
            Content::Racing(_) | Content::Discard(_) => panic!("only the members know"),
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
