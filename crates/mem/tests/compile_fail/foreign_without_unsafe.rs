//! MEM-2: who makes a handle says, in `unsafe`, that nobody has a reference to
//! the memory and that it stays mapped.

use std::sync::Arc;

use stableio_mem::{ForeignBuf, Segment};

fn handle(segment: Segment) -> ForeignBuf {
    ForeignBuf::new([segment], Arc::new(()))
}

fn main() {}
