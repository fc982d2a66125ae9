//! Stable bytes are bytes that nobody changes: the buffer that could write to
//! them is gone, and what reads them cannot write.

use stableio_mem::{PoolBuf, StableBuf};

fn write_after_freeze(mut private: PoolBuf) -> StableBuf {
    let stable = private.freeze();
    private.copy_from(0, b"late");
    stable
}

fn lend_after_freeze(mut private: PoolBuf) -> StableBuf {
    let stable = private.freeze();
    drop(private.target(0..4));
    stable
}

fn write_to_a_piece(stable: &StableBuf) {
    for piece in stable.pieces() {
        piece[0] = 0;
    }
}

fn main() {}
