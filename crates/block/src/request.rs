//! An owned operation on its way down, and what comes back.

use stableio_mem::{ForeignBuf, PromisedBuf, Reservation, SgList, StableBuf, Sums};

use std::sync::Arc;

use crate::error::OpName;
use crate::issuer::Issuer;

/// An operation with everything that it needs. Submitting consumes it.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Memory for payload, parity and scratch, reserved all at once; the
    /// stack reserves it where the front end has not.
    pub memory: Option<Reservation>,
    /// Who sends it, for a device that has something to tell of that one.
    pub issuer: Option<Arc<Issuer>>,
}

/// The operations. Offsets and lengths are bytes.
#[derive(Debug)]
pub enum Op {
    /// Reads the bytes from `at` on.
    Read {
        /// Offset of the first byte.
        at: u64,
        /// Where to.
        into: Into,
    },
    /// Writes.
    Write {
        /// Offset of the first byte.
        at: u64,
        /// What.
        body: Body,
        /// Guards and parity of `body`; the stack fills them in where the
        /// device wants any. Boxed: reads have none, and are moved as often.
        sums: Option<Box<Sums>>,
        /// Whether it must be durable when it settles.
        fua: bool,
    },
    /// Makes everything durable that settled before.
    Flush,
    /// The range need not be kept; it reads as zeros or as before.
    Discard {
        /// Offset of the first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Offset of the first byte.
        at: u64,
        /// Bytes.
        len: u64,
        /// Whether it must be durable when it settles.
        fua: bool,
    },
    /// Which parts hold data.
    Map {
        /// Offset of the first byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
}

/// What is written, by who may change it.
#[derive(Debug)]
pub enum Body {
    /// Ours: nobody changes it.
    Stable(StableBuf),
    /// Foreign, declared stable with a grant.
    Promised(PromisedBuf),
    /// Foreign. Reaches only devices that sample once; the stack stabilizes
    /// it before all others.
    Foreign(ForeignBuf),
    /// Segments that passed a door above: from a device to its members.
    Segments(SgList),
}

/// Where a read goes.
#[derive(Debug)]
pub enum Into {
    /// Into foreign memory.
    Foreign(ForeignBuf),
    /// Into memory of the request's reservation; comes back as
    /// [`Reply::Data`].
    Pool(usize),
    /// Into segments: from a device to its members.
    Segments(SgList),
}

/// A part of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Whether it holds data; else it was never written and reads as zeros.
    pub data: bool,
}

/// A settled request's result.
#[derive(Debug)]
pub enum Reply {
    /// Done; foreign memory of a read is filled.
    Done,
    /// The bytes that a read into the pool gave.
    Data(StableBuf),
    /// The answer to a map: extents from `at` on, merged.
    Map(Vec<Extent>),
}

impl Body {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Body::Stable(b) => b.len(),
            Body::Promised(b) => b.len(),
            Body::Foreign(b) => b.len(),
            Body::Segments(b) => b.len(),
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes as a source for a device that samples once.
    pub fn into_segments(self) -> SgList {
        match self {
            Body::Stable(b) => b.source(),
            Body::Promised(b) => b.source(0, b.len()),
            Body::Foreign(b) => b.into(),
            Body::Segments(b) => b,
        }
    }
}

impl Into {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Into::Foreign(b) => b.len(),
            Into::Pool(len) => *len,
            Into::Segments(b) => b.len(),
        }
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Op {
    /// The operation's name, offset and length.
    pub fn range(&self) -> (OpName, u64, u64) {
        match self {
            Op::Read { at, into } => (OpName::Read, *at, into.len() as u64),
            Op::Write { at, body, .. } => (OpName::Write, *at, body.len() as u64),
            Op::Flush => (OpName::Flush, 0, 0),
            Op::Discard { at, len } => (OpName::Discard, *at, *len),
            Op::WriteZeroes { at, len, .. } => (OpName::WriteZeroes, *at, *len),
            Op::Map { at, len } => (OpName::Map, *at, *len),
        }
    }
}

impl Request {
    /// Just an operation.
    pub fn of(op: Op) -> Self {
        Self { op, memory: None, issuer: None }
    }

    /// A read into foreign memory.
    pub fn read(at: u64, into: ForeignBuf) -> Self {
        Self::of(Op::Read { at, into: Into::Foreign(into) })
    }

    /// A read into memory of the pool; gives [`Reply::Data`].
    pub fn read_owned(at: u64, len: usize) -> Self {
        Self::of(Op::Read { at, into: Into::Pool(len) })
    }

    /// A write.
    pub fn write(at: u64, body: Body, fua: bool) -> Self {
        Self::of(Op::Write { at, body, sums: None, fua })
    }

    /// A flush.
    pub fn flush() -> Self {
        Self::of(Op::Flush)
    }

    /// With memory that the front end reserved.
    pub fn with_memory(mut self, memory: Reservation) -> Self {
        self.memory = Some(memory);
        self
    }
}
