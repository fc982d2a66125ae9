//! The doors: a promise needs a grant, and a grant says by its name who gave
//! it. Nothing else makes one.

use stableio_mem::doors::promise;
use stableio_mem::{ForeignBuf, Grant, PromisedBuf};

fn constructed(foreign: ForeignBuf) -> PromisedBuf {
    promise(foreign, Grant(()))
}

fn by_default(foreign: ForeignBuf) -> PromisedBuf {
    promise(foreign, Default::default())
}

fn converted(foreign: ForeignBuf) -> PromisedBuf {
    promise(foreign, ().into())
}

fn without(foreign: ForeignBuf) -> PromisedBuf {
    promise(foreign)
}

fn promised_by_itself(foreign: ForeignBuf) -> PromisedBuf {
    PromisedBuf(foreign)
}

fn main() {}
