//! The doors: what is verified in place answers a read and nothing else. A
//! verdict holds no bytes, and what it was about may have changed since.

use stableio_mem::doors::verify_in_place;
use stableio_mem::{ForeignBuf, StableBuf, Verdict};

fn cache(_block: u64, _data: StableBuf) {}

fn cache_the_verdict(foreign: &ForeignBuf, guards: &[u64]) {
    cache(0, verify_in_place(foreign, 0, guards).unwrap());
}

fn cache_what_was_verified(foreign: ForeignBuf, guards: &[u64]) {
    if verify_in_place(&foreign, 0, guards).unwrap().is_good() {
        cache(0, foreign);
    }
}

fn bytes(verdict: &Verdict) -> Vec<u8> {
    verdict.to_vec()
}

fn pieces(verdict: &Verdict) -> Vec<&[u8]> {
    verdict.pieces().collect()
}

fn own(verdict: Verdict) -> StableBuf {
    StableBuf::from_owned(verdict)
}

fn main() {}
