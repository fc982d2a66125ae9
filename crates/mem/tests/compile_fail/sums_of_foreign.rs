//! MEM-1: guards, parity, mirrors and copies are made of what a door gave. Of
//! foreign memory itself they would be made of a load of their own, which need
//! not agree with any other.

use stableio_mem::doors::{copy_out, sums_of_stable};
use stableio_mem::{ForeignBuf, Pass, PoolBuf, Reservation, StableBuf, Sums};

fn sums(foreign: &ForeignBuf, pass: Pass, memory: &mut Reservation) -> Sums {
    sums_of_stable(foreign, 0, pass, memory)
}

fn guard(foreign: &ForeignBuf) -> u64 {
    stableio_onepass::guard(foreign)
}

fn parity(foreign: &ForeignBuf, parity: &mut [u8]) {
    stableio_onepass::xor_into(parity, foreign);
}

fn write_to_each(_mirrors: &[u32], _data: &StableBuf) {}

fn mirror(foreign: &ForeignBuf) {
    write_to_each(&[0, 1], foreign);
}

fn repair(foreign: &ForeignBuf, damaged: &ForeignBuf) {
    copy_out(foreign, damaged, 0).unwrap();
}

fn copy(foreign: &ForeignBuf, private: &mut PoolBuf) {
    private.copy_from(0, foreign);
}

/// Calling it one's own does not make it stable.
fn own(foreign: ForeignBuf) -> StableBuf {
    StableBuf::from_owned(foreign)
}

fn main() {}
