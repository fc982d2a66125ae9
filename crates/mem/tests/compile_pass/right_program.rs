//! The right program: each handle goes through one door, and what the door
//! gave is what everything afterwards works on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use stableio_mem::{BLOCK, ForeignBuf, Grant, Pass, Pool, RowShape, Segment, StableBuf, doors};
use stableio_onepass as onepass;

/// What the program shares with whoever else writes to it.
static SHARED: [AtomicU8; 2 * BLOCK] = [const { AtomicU8::new(7) }; 2 * BLOCK];

fn foreign() -> ForeignBuf {
    let segment = Segment { addr: SHARED.as_ptr().expose_provenance(), len: SHARED.len() };
    // SAFETY: a static is mapped for ever; atomics may be written to by anybody.
    unsafe { ForeignBuf::new([segment], Arc::new(())) }
}

fn cache(_block: u64, _data: StableBuf) {}

fn main() {
    let pool = Pool::new(1 << 20).unwrap();
    let mut memory = pool.try_reserve(pool.size()).unwrap().unwrap();
    let rows = RowShape { chunk_blocks: 1, columns: 2, parities: 2 };
    let pass = Pass { guards: true, rows: Some(rows), streams: false };

    // A write: the copy, its guards and its parity fit each other.
    let (copy, sums) = doors::stabilize(foreign(), 0, pass, &mut memory).unwrap();
    assert_eq!(sums.guards[0], onepass::guard(copy.contiguous(0, BLOCK)));
    assert_eq!(sums.parity.unwrap().to_vec(), [0; BLOCK]);
    assert_eq!(sums.q.unwrap().to_vec(), [7 ^ onepass::gf::mul(2, 7); BLOCK]);

    // A write of an issuer that is trusted: sums without a copy.
    let promised = doors::promise(foreign(), Grant::only_own_data());
    let in_place = promised.sums(0, pass, &mut memory).unwrap();
    assert_eq!(in_place.guards, sums.guards);

    // A lazy read: verified where it lies, answered by a private copy if not.
    let buffer = foreign();
    SHARED[BLOCK].store(8, Ordering::Relaxed);
    let verdict = doors::verify_in_place(&buffer, 0, &sums.guards).unwrap();
    assert_eq!(verdict.mismatches(), [1]);
    doors::copy_out(&copy.slice(BLOCK..2 * BLOCK), &buffer, BLOCK).unwrap();
    assert!(doors::verify_in_place(&buffer, 0, &sums.guards).unwrap().is_good());
    assert_eq!(SHARED[BLOCK].load(Ordering::Relaxed), 7);

    // Stable bytes may go anywhere.
    cache(0, copy);
}
