//! MEM-1: foreign memory has one handle. With a second one each could be
//! sampled once, and the bytes twice.

use stableio_mem::{ForeignBuf, PromisedBuf};

fn clone(foreign: &ForeignBuf) -> ForeignBuf {
    Clone::clone(foreign)
}

fn to_owned(foreign: &ForeignBuf) -> ForeignBuf {
    foreign.to_owned()
}

fn copy(foreign: &ForeignBuf) -> ForeignBuf {
    *foreign
}

fn promised(promised: &PromisedBuf) -> PromisedBuf {
    Clone::clone(promised)
}

fn main() {}
