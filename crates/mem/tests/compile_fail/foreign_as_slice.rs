//! MEM-2: no reference and no slice of foreign memory exists. Whoever could
//! have one could load a byte twice, and the compiler would do it unasked.

use std::borrow::Borrow;

use stableio_mem::ForeignBuf;

fn index(foreign: ForeignBuf) -> u8 {
    foreign[0]
}

fn range(foreign: &ForeignBuf) -> &[u8] {
    &foreign[..]
}

fn method(foreign: &ForeignBuf) -> &[u8] {
    foreign.as_slice()
}

fn deref(foreign: &ForeignBuf) -> &[u8] {
    &**foreign
}

fn coercion(foreign: &ForeignBuf) -> &[u8] {
    foreign
}

fn as_ref(foreign: &ForeignBuf) -> &[u8] {
    AsRef::<[u8]>::as_ref(foreign)
}

fn borrow(foreign: &ForeignBuf) -> &[u8] {
    Borrow::<[u8]>::borrow(foreign)
}

fn pieces(foreign: &ForeignBuf) -> Vec<&[u8]> {
    foreign.pieces().collect()
}

/// The kernel gets numbers.
fn address(foreign: &ForeignBuf) -> u8 {
    *foreign.for_kernel()[0].addr
}

fn main() {}
