//! The doors: a promise needs a grant, and nobody writes one by its field. (A
//! file of its own: the compiler looks at this after it has found the types
//! right, and `grant_made_up.rs` does not get that far.)

use stableio_mem::doors::promise;
use stableio_mem::{ForeignBuf, Grant, PromisedBuf};

fn by_field(foreign: ForeignBuf) -> PromisedBuf {
    promise(foreign, Grant { 0: () })
}

fn main() {}
