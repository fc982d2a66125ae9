//! Memory, by who may change it.
//!
//! [`ForeignBuf`] is memory that somebody else may change at any time: a
//! guest's, a program's. [`StableBuf`] is memory that nobody changes while we
//! hold it. Between the two stand four [`doors`] and nothing else; checksums,
//! parity, mirrors, repair and caches take stable (or promised) bytes by
//! signature, so that the wrong program does not compile.
//!
//! MEM-1: a foreign byte is loaded exactly once, by a door. What a door gave
//! is what everything afterwards works on.
//!
//! MEM-2: no reference and no slice of foreign memory exists, here or in any
//! user of this crate. A reference promises that nobody writes.
//!
//! MEM-3: memory is reserved for a whole request at once
//! ([`pool::Pool::reserve`]), before anything else of that request is held.

pub mod doors;
mod error;
mod foreign;
pub mod pool;
mod rows;
mod sg;
mod stable;
mod units;

pub use doors::{Grant, Pass, PromisedBuf, Sums, Update, Verdict};
pub use error::{Fault, PoolTooSmall};
pub use foreign::{ForeignBuf, KeepAlive, Segment};
pub use pool::{Pool, PoolBuf, Reservation};
pub use rows::{ParitySpan, RowShape, StripeSpan};
pub use sg::SgList;
pub use stable::StableBuf;
pub use stableio_onepass::fault as fixup;
pub use units::{BLOCK, Bytes, ParseBytesError};
