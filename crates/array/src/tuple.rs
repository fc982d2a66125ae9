//! Tuples and the pages that they lie on.
//!
//! ```text
//! tuple, 16 bytes                    sector, 512 bytes; 8 of them are a page
//!   0  guard, CRC64-NVMe     8         0  CRC64-NVMe of bytes 8 to 511    8
//!   8  application tag       2         8  number: page × 8 + place        8
//!  10  state                 2        16  sequence                        8
//!  12  reference tag         4        24  first 4 bytes of the array id   4
//!                                     28  role of the member              1
//!                                     29  zero                            3
//!                                     32  30 tuples                     480
//! ```
//!
//! The terms are those of T10 protection information. The reference tag is
//! the low half of the block's number on the array. A sector that is all zero
//! was never written: all its tuples are unwritten.
//!
//! TUPLE-1: every sector stands for itself, so that a page that power failure
//! tears is old in some sectors and new in others, and unknown in none.

use std::ops::Range;

use stableio_mem::BLOCK;

use crate::geometry::PAGE_TUPLES;
use crate::superblock::{Id, u32_at, u64_at};
use crate::twin::{Protection, lacks};

const TUPLE_LEN: usize = 16;
const TUPLES_AT: usize = 32;
const SECTOR: usize = 512;
const SECTORS: usize = BLOCK / SECTOR;
const SECTOR_TUPLES: usize = (SECTOR - TUPLES_AT) / TUPLE_LEN;

const _: () = assert!(SECTORS * SECTOR_TUPLES == PAGE_TUPLES);

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Never written, or discarded: reads as zeros, the medium is not looked
    /// at, counts as zeros in parity.
    Unwritten,
    /// Holds the data that its guard is of, where that was kept.
    Written,
    /// Its data is gone: EIO until it is written. Counts as zeros in parity.
    Lost,
}

/// Guard and state of a block.
///
/// TUPLE-2: without checksums the tuples of pages keep no guard, and say so
/// themselves: whatever a member delivers without an error fits them. Whether
/// content fits a tuple is asked of the tuple alone ([`fits`](Tuple::fits)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// CRC64-NVMe of the block, where it is written and the guard was kept.
    pub guard: u64,
    /// Whether it was.
    pub guarded: bool,
    /// State.
    pub state: State,
    /// Low half of the block's number.
    pub reference: u32,
}

impl Tuple {
    /// Of a block that was never written.
    pub const UNWRITTEN: Tuple =
        Tuple { guard: 0, guarded: true, state: State::Unwritten, reference: 0 };

    /// Of a block with this guard.
    pub fn written(guard: u64, block: u64) -> Self {
        Self { guard, guarded: true, state: State::Written, reference: block as u32 }
    }

    /// Of a block whose data is gone.
    pub fn lost(block: u64) -> Self {
        Self { guard: 0, guarded: true, state: State::Lost, reference: block as u32 }
    }

    /// The same, of a block whose guard is not kept (TUPLE-2).
    #[must_use]
    pub fn without_guard(self) -> Self {
        let guarded = self.state != State::Written;
        Self { guard: 0, guarded, ..self }
    }

    /// Whether `guard` is what a block of this tuple has.
    pub fn matches(&self, guard: u64) -> bool {
        self.fits(|| guard)
    }

    /// The same of a guard that is computed only where there is one to compare.
    pub fn fits(&self, guard: impl FnOnce() -> u64) -> bool {
        self.state == State::Written && (!self.guarded || self.guard == guard())
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
            State::Written if self.guarded => 1,
            State::Written => 3,
            State::Lost => 2,
        };
        bytes[..8].copy_from_slice(&self.guard.to_le_bytes());
        bytes[10..12].copy_from_slice(&state.to_le_bytes());
        bytes[12..].copy_from_slice(&self.reference.to_le_bytes());
        bytes
    }

    /// Parses a tuple; `None` for a state that there is not.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let code = u16::from_le_bytes([bytes[10], bytes[11]]);
        let state = match code {
            0 => State::Unwritten,
            1 | 3 => State::Written,
            2 => State::Lost,
            _ => return None,
        };
        let (guard, reference) = (u64_at(bytes, 0), u32_at(bytes, 12));
        Some(Self { guard, guarded: code != 3, state, reference })
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

/// What a sector read from a member turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sector {
    /// Never written.
    Blank,
    /// Its sequence and tuples.
    Good(u64, Vec<Tuple>),
    /// Damaged, or not this sector.
    Bad,
}

/// Writes a page's bytes. At most [`PAGE_TUPLES`] fit.
pub fn encode_page<'a>(
    page: u64,
    sequence: u64,
    owner: Owner,
    tuples: impl IntoIterator<Item = &'a Tuple>,
    into: &mut [u8],
) {
    assert_eq!(into.len(), BLOCK);
    into.fill(0);
    let mut tuples = tuples.into_iter();
    for (i, sector) in into.chunks_exact_mut(SECTOR).enumerate() {
        let number = page * SECTORS as u64 + i as u64;
        sector[8..16].copy_from_slice(&number.to_le_bytes());
        sector[16..24].copy_from_slice(&sequence.to_le_bytes());
        sector[24..28].copy_from_slice(&owner.array.0[..4]);
        sector[28] = owner.role as u8;
        let slots = sector[TUPLES_AT..].chunks_exact_mut(TUPLE_LEN);
        for (slot, tuple) in slots.zip(tuples.by_ref()) {
            slot.copy_from_slice(&tuple.encode());
        }
        let crc = stableio_onepass::guard(&sector[8..]);
        sector[..8].copy_from_slice(&crc.to_le_bytes());
    }
    assert!(tuples.next().is_none(), "no more tuples than fit");
}

/// Parses a page that should be `page` of `owner`: its sectors in order, each
/// with the range of the page's tuples that it holds.
///
/// # Panics
///
/// When `bytes` is not one block.
pub fn parse_page(
    bytes: &[u8],
    page: u64,
    owner: Owner,
) -> impl Iterator<Item = (Range<usize>, Sector)> + '_ {
    assert_eq!(bytes.len(), BLOCK);
    bytes.chunks_exact(SECTOR).enumerate().map(move |(i, bytes)| {
        let range = i * SECTOR_TUPLES..(i + 1) * SECTOR_TUPLES;
        (range, parse_sector(bytes, page * SECTORS as u64 + i as u64, owner))
    })
}

/// The tuple at `index` of a page, where it speaks of data and its sector is
/// whole. That a block was never written, or is lost, is nothing to believe
/// one copy: a disk that lost its content reads as zeros.
///
/// # Panics
///
/// When `bytes` is not one block, or `index` not on a page.
pub(crate) fn data_tuple(bytes: &[u8], page: u64, owner: Owner, index: usize) -> Option<Tuple> {
    assert_eq!(bytes.len(), BLOCK);
    let (sector, within) = (index / SECTOR_TUPLES, index % SECTOR_TUPLES);
    let bytes = &bytes[sector * SECTOR..][..SECTOR];
    if lacks(Protection::BlankCopies) && bytes.iter().all(|b| *b == 0) {
        return Some(Tuple::UNWRITTEN);
    }
    let at = TUPLES_AT + within * TUPLE_LEN;
    let tuple = Tuple::parse(&bytes[at..at + TUPLE_LEN])?;
    let whole = is_whole(bytes, page * SECTORS as u64 + sector as u64, owner);
    (whole && tuple.state == State::Written).then_some(tuple)
}

/// Whether a sector is the one with this number, as its owner wrote it.
fn is_whole(bytes: &[u8], number: u64, owner: Owner) -> bool {
    u64_at(bytes, 8) == number
        && bytes[24..28] == owner.array.0[..4]
        && usize::from(bytes[28]) == owner.role
        && stableio_onepass::guard(&bytes[8..]) == u64_at(bytes, 0)
}

fn parse_sector(bytes: &[u8], number: u64, owner: Owner) -> Sector {
    if bytes.iter().all(|b| *b == 0) {
        return Sector::Blank;
    }
    let tuples: Option<Vec<Tuple>> =
        bytes[TUPLES_AT..].chunks_exact(TUPLE_LEN).map(Tuple::parse).collect();
    match tuples {
        Some(tuples) if is_whole(bytes, number, owner) => Sector::Good(u64_at(bytes, 16), tuples),
        _ => Sector::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_is_believed_only_of_data() {
        let owner = Owner { array: Id::random(), role: 2 };
        let mut tuples = vec![Tuple::UNWRITTEN; PAGE_TUPLES];
        tuples[7] = Tuple::written(5, 9);
        tuples[8] = Tuple::lost(3);
        let mut bytes = vec![0; BLOCK];
        assert_eq!(data_tuple(&bytes, 4, owner, 7), None);
        encode_page(4, 77, owner, &tuples, &mut bytes);
        for index in 0..PAGE_TUPLES {
            let expected = (index == 7).then_some(tuples[7]);
            assert_eq!(data_tuple(&bytes, 4, owner, index), expected, "{index}");
        }
        assert_eq!(data_tuple(&bytes, 5, owner, 7), None);
        assert_eq!(data_tuple(&bytes, 4, Owner { role: 1, ..owner }, 7), None);
        bytes[100] ^= 1;
        assert_eq!(data_tuple(&bytes, 4, owner, 7), None);
    }

    #[test]
    fn sectors_know_their_place() {
        let owner = Owner { array: Id::random(), role: 2 };
        let mut tuples = vec![Tuple::UNWRITTEN; PAGE_TUPLES];
        tuples[0] = Tuple::written(5, 9);
        tuples[31] = Tuple::lost(3);
        tuples[32] = Tuple::written(5, 10).without_guard();
        let mut bytes = vec![0; BLOCK];
        let parse = |bytes: &[u8], page, owner| -> Vec<Sector> {
            parse_page(bytes, page, owner).map(|(_, sector)| sector).collect()
        };
        assert_eq!(parse(&bytes, 4, owner), vec![Sector::Blank; SECTORS]);
        encode_page(4, 77, owner, &tuples, &mut bytes);
        for (range, sector) in parse_page(&bytes, 4, owner) {
            assert_eq!(sector, Sector::Good(77, tuples[range].to_vec()));
        }
        assert_eq!(parse(&bytes, 5, owner), vec![Sector::Bad; SECTORS]);
        assert_eq!(parse(&bytes, 4, Owner { role: 1, ..owner }), vec![Sector::Bad; SECTORS]);
        bytes[600] ^= 1;
        let bad: Vec<_> = parse(&bytes, 4, owner).iter().map(|s| *s == Sector::Bad).collect();
        assert_eq!(bad, [false, true, false, false, false, false, false, false]);
    }
}
