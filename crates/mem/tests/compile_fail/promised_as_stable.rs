//! The doors: promised memory gives guards, parity and members' data, nothing
//! else. A cache, a repair or a copy to somebody else takes stable bytes.

use stableio_mem::doors::copy_out;
use stableio_mem::{ForeignBuf, PromisedBuf, StableBuf};

fn cache(_block: u64, _data: StableBuf) {}

fn fill_cache(promised: PromisedBuf) {
    cache(0, promised);
}

fn repair(promised: &PromisedBuf, damaged: &ForeignBuf) {
    copy_out(promised, damaged, 0).unwrap();
}

fn own(promised: PromisedBuf) -> StableBuf {
    StableBuf::from_owned(promised)
}

fn main() {}
