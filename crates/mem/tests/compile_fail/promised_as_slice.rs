//! MEM-2: a promise does not make a slice either. A promise can be broken;
//! raw loads then give wrong sums, a slice gives undefined behaviour.

use stableio_mem::PromisedBuf;

fn range(promised: &PromisedBuf) -> &[u8] {
    &promised[..]
}

fn as_ref(promised: &PromisedBuf) -> &[u8] {
    AsRef::<[u8]>::as_ref(promised)
}

fn pieces(promised: &PromisedBuf) -> Vec<&[u8]> {
    promised.pieces().collect()
}

fn main() {}
