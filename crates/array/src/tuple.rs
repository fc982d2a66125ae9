//! Tuples and the pages that they lie on.
//!
//! ```text
//! tuple, 16 bytes                    page, 4096 bytes
//!   0  guard, CRC64-NVMe     8         0  CRC64-NVMe of bytes 8 to 4095   8
//!   8  application tag       2         8  page number                     8
//!  10  state                 2        16  sequence                        8
//!  12  reference tag         4        24  first 4 bytes of the array id   4
//!                                     28  role of the member              2
//!                                     30  zero                            2
//!                                     32  254 tuples                   4064
//! ```
//!
//! The terms are those of T10 protection information. The reference tag is
//! the low half of the block's number on the array. A page that is all zero
//! was never written: all its tuples are unwritten.

use stableio_mem::BLOCK;

use crate::superblock::{Id, u32_at, u64_at};

const TUPLE_LEN: usize = 16;
const TUPLES_AT: usize = 32;

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Never written, or discarded: reads as zeros, the medium is not looked
    /// at, counts as zeros in parity.
    Unwritten,
    /// Holds the data that its guard is of.
    Written,
    /// Its data is gone: EIO until it is written. Counts as zeros in parity.
    Lost,
}

/// Guard and state of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// CRC64-NVMe of the block, where it is written.
    pub guard: u64,
    /// State.
    pub state: State,
    /// Low half of the block's number.
    pub reference: u32,
}

impl Tuple {
    /// Of a block that was never written.
    pub const UNWRITTEN: Tuple = Tuple { guard: 0, state: State::Unwritten, reference: 0 };

    /// Of a block with this guard.
    pub fn written(guard: u64, block: u64) -> Self {
        Self { guard, state: State::Written, reference: block as u32 }
    }

    /// Of a block whose data is gone.
    pub fn lost(block: u64) -> Self {
        Self { guard: 0, state: State::Lost, reference: block as u32 }
    }

    /// Whether `guard` is what a block of this tuple has.
    pub fn matches(&self, guard: u64) -> bool {
        self.state == State::Written && self.guard == guard
    }

    /// The guard of what this block contributes to its row's parity.
    pub fn parity_guard(&self) -> u64 {
        match self.state {
            State::Written => self.guard,
            State::Unwritten | State::Lost => stableio_onepass::guard_of_zeros(),
        }
    }

    /// The tuple's bytes.
    pub fn encode(&self) -> [u8; TUPLE_LEN] {
        let mut bytes = [0; TUPLE_LEN];
        let state: u16 = match self.state {
            State::Unwritten => 0,
            State::Written => 1,
            State::Lost => 2,
        };
        bytes[..8].copy_from_slice(&self.guard.to_le_bytes());
        bytes[10..12].copy_from_slice(&state.to_le_bytes());
        bytes[12..].copy_from_slice(&self.reference.to_le_bytes());
        bytes
    }

    /// Parses a tuple; `None` for a state that there is not.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let state = match u16::from_le_bytes([bytes[10], bytes[11]]) {
            0 => State::Unwritten,
            1 => State::Written,
            2 => State::Lost,
            _ => return None,
        };
        Some(Self { guard: u64_at(bytes, 0), state, reference: u32_at(bytes, 12) })
    }
}

/// Whose page it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The array.
    pub array: Id,
    /// The member's role.
    pub role: usize,
}

/// What a page read from a member turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum ParsedPage {
    /// Never written.
    Blank,
    /// Its sequence and tuples.
    Good(u64, Vec<Tuple>),
    /// Damaged, or not this page.
    Bad,
}

/// Writes a page's bytes. At most
/// [`PAGE_TUPLES`](crate::geometry::PAGE_TUPLES) fit.
pub fn encode_page<'a>(
    page: u64,
    sequence: u64,
    owner: Owner,
    tuples: impl IntoIterator<Item = &'a Tuple>,
    into: &mut [u8],
) {
    assert_eq!(into.len(), BLOCK);
    into.fill(0);
    into[8..16].copy_from_slice(&page.to_le_bytes());
    into[16..24].copy_from_slice(&sequence.to_le_bytes());
    into[24..28].copy_from_slice(&owner.array.0[..4]);
    into[28..30].copy_from_slice(&(owner.role as u16).to_le_bytes());
    let mut slots = into[TUPLES_AT..].chunks_exact_mut(TUPLE_LEN);
    for tuple in tuples {
        let slot = slots.next().expect("no more tuples than fit");
        slot.copy_from_slice(&tuple.encode());
    }
    let crc = stableio_onepass::guard(&into[8..]);
    into[..8].copy_from_slice(&crc.to_le_bytes());
}

/// Parses a page that should be `page` of `owner` and hold `count` tuples.
pub fn parse_page(bytes: &[u8], page: u64, owner: Owner, count: usize) -> ParsedPage {
    if bytes.iter().all(|b| *b == 0) {
        return ParsedPage::Blank;
    }
    let right = stableio_onepass::guard(&bytes[8..]) == u64_at(bytes, 0)
        && u64_at(bytes, 8) == page
        && bytes[24..28] == owner.array.0[..4]
        && u16::from_le_bytes([bytes[28], bytes[29]]) == owner.role as u16;
    let tuples: Option<Vec<Tuple>> =
        bytes[TUPLES_AT..].chunks_exact(TUPLE_LEN).take(count).map(Tuple::parse).collect();
    match tuples {
        Some(tuples) if right => ParsedPage::Good(u64_at(bytes, 16), tuples),
        _ => ParsedPage::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_know_their_place() {
        let owner = Owner { array: Id::random(), role: 2 };
        let tuples = vec![Tuple::written(5, 9), Tuple::UNWRITTEN, Tuple::lost(3)];
        let mut bytes = vec![0; BLOCK];
        assert_eq!(parse_page(&bytes, 4, owner, 3), ParsedPage::Blank);
        encode_page(4, 77, owner, &tuples, &mut bytes);
        assert_eq!(parse_page(&bytes, 4, owner, 3), ParsedPage::Good(77, tuples));
        assert_eq!(parse_page(&bytes, 5, owner, 3), ParsedPage::Bad);
        assert_eq!(parse_page(&bytes, 4, Owner { role: 1, ..owner }, 3), ParsedPage::Bad);
        bytes[100] ^= 1;
        assert_eq!(parse_page(&bytes, 4, owner, 3), ParsedPage::Bad);
    }
}
