//! Where everything lies: rows over members, tuples in pages, regions on a
//! member. Pure arithmetic; `docs/format.md` draws it.
//!
//! GEO-1: every member has the same layout, and page `q` of the guard region
//! covers the same rows on every member.

use std::ops::Range;

use stableio_mem::{BLOCK, RowShape};

const BLOCK64: u64 = BLOCK as u64;

/// Redundancy of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// One member, checksums only.
    Single,
    /// One parity block a row, rotating (left-symmetric, as md's default).
    Raid5,
}

impl Level {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Level::Single => "single",
            Level::Raid5 => "raid5",
        }
    }

    /// Numbers of members that it takes.
    pub fn members(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Level::Single => 1..=1,
            Level::Raid5 => 3..=MAX_MEMBERS,
        }
    }

    /// Members that may be missing.
    pub fn redundancy(self) -> usize {
        match self {
            Level::Single => 0,
            Level::Raid5 => 1,
        }
    }
}

/// Most members of an array.
pub const MAX_MEMBERS: usize = 16;
/// Most bytes of a member: offsets and sums of them stay far from overflow.
pub const MAX_MEMBER: u64 = 1 << 60;
/// Byte offset of the log region.
pub const LOG_AT: u64 = 64 << 10;
/// Blocks of the log region.
pub const LOG_BLOCKS: u64 = 1024;
/// Byte offset of the guard region.
pub const GUARDS_AT: u64 = LOG_AT + LOG_BLOCKS * BLOCK64;
/// Tuples that fit on a page beside its header.
pub const PAGE_TUPLES: usize = 254;

/// The shape of an array and the regions of its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Redundancy.
    pub level: Level,
    /// Members, parity included.
    pub members: usize,
    /// Blocks of a chunk: rows of a stripe.
    pub chunk_blocks: u32,
    /// Stripes; a multiple of `members`.
    pub stripes: u64,
    /// Bytes of a member, both superblocks included.
    pub member_size: u64,
}

/// A block of the array by its place in the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Stripe.
    pub stripe: u64,
    /// Row in the stripe.
    pub row: u32,
    /// Data column.
    pub column: usize,
}

/// What a member holds in a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The parity chunk.
    Parity,
    /// The data chunk of a column.
    Data(usize),
}

/// Why a geometry can not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadGeometry {
    /// Wrong number of members.
    #[error("{level} takes {min} to {max} members, not {got}")]
    Members {
        /// The level's name.
        level: &'static str,
        /// Fewest.
        min: usize,
        /// Most.
        max: usize,
        /// Given.
        got: usize,
    },
    /// Chunk size out of range.
    #[error("a chunk has 4 KiB to 1 MiB and is a power of two, not {0} bytes")]
    Chunk(u64),
    /// More than a member can have.
    #[error("a member of {0} bytes is too large: at most {MAX_MEMBER} are possible")]
    TooLarge(u64),
    /// The member is too small for one group of stripes.
    #[error("a member of {size} bytes is too small: this shape needs at least {least}")]
    TooSmall {
        /// Bytes given.
        size: u64,
        /// Bytes needed.
        least: u64,
    },
}

impl Geometry {
    /// The geometry that uses members of `member_size` bytes best.
    ///
    /// # Errors
    ///
    /// [`BadGeometry`].
    pub fn new(
        level: Level,
        members: usize,
        chunk_bytes: u64,
        member_size: u64,
    ) -> Result<Self, BadGeometry> {
        let range = level.members();
        if !range.contains(&members) {
            let (level, min, max) = (level.name(), *range.start(), *range.end());
            return Err(BadGeometry::Members { level, min, max, got: members });
        }
        if !chunk_bytes.is_power_of_two() || !(BLOCK64..=1 << 20).contains(&chunk_bytes) {
            return Err(BadGeometry::Chunk(chunk_bytes));
        }
        if member_size > MAX_MEMBER {
            return Err(BadGeometry::TooLarge(member_size));
        }
        let mut g = Self {
            level,
            members,
            chunk_blocks: (chunk_bytes / BLOCK64) as u32,
            stripes: members as u64,
            member_size: member_size / BLOCK64 * BLOCK64,
        };
        let least = g.data_at() + g.members as u64 * chunk_bytes + BLOCK64;
        if g.member_size < least {
            return Err(BadGeometry::TooSmall { size: member_size, least });
        }
        // Grow to what would fit without guards, then shrink until guards,
        // data and the last superblock fit.
        let group = g.members as u64 * chunk_bytes;
        let room = g.member_size - GUARDS_AT - BLOCK64;
        let with_guards = group + BLOCK64 * u64::from(g.chunk_blocks) / g.page_rows() as u64;
        let mut groups = (room / with_guards).max(1);
        loop {
            g.stripes = groups * g.members as u64;
            if g.data_at() + groups * group + BLOCK64 <= g.member_size {
                return Ok(g);
            }
            groups -= 1;
        }
    }

    /// Data columns of a row.
    pub fn columns(&self) -> usize {
        self.members - self.level.redundancy()
    }

    /// Bytes that the array offers.
    pub fn size(&self) -> u64 {
        self.stripes * self.columns() as u64 * self.chunk_bytes()
    }

    /// Bytes of a chunk.
    pub fn chunk_bytes(&self) -> u64 {
        u64::from(self.chunk_blocks) * BLOCK64
    }

    /// The shape for a pass over the data of a write.
    pub fn row_shape(&self) -> RowShape {
        RowShape {
            chunk_blocks: self.chunk_blocks,
            columns: self.columns() as u32,
            parities: 1,
        }
    }

    /// The member with the parity of a stripe.
    pub fn parity_member(&self, stripe: u64) -> Option<usize> {
        let n = self.members as u64;
        (self.level == Level::Raid5).then(|| (n - 1 - stripe % n) as usize)
    }

    /// The member with a data column of a stripe: columns follow the parity.
    pub fn data_member(&self, stripe: u64, column: usize) -> usize {
        match self.parity_member(stripe) {
            Some(parity) => (parity + 1 + column) % self.members,
            None => column,
        }
    }

    /// What a member holds in a stripe.
    pub fn role(&self, stripe: u64, member: usize) -> Role {
        match self.parity_member(stripe) {
            Some(parity) if parity == member => Role::Parity,
            Some(parity) => Role::Data((member + self.members - parity - 1) % self.members),
            None => Role::Data(member),
        }
    }

    /// The place of a block of the array.
    pub fn place(&self, block: u64) -> Place {
        let per = self.row_shape().stripe_blocks();
        let within = (block % per) as u32;
        let (column, row) = (within / self.chunk_blocks, within % self.chunk_blocks);
        Place { stripe: block / per, row, column: column as usize }
    }

    /// The blocks `blocks` of the array as runs: rows that follow each other
    /// in a column and have their tuples on the same page.
    pub fn runs(&self, blocks: Range<u64>) -> impl Iterator<Item = (Place, usize)> + use<> {
        let g = *self;
        let mut block = blocks.start;
        std::iter::from_fn(move || {
            let place = (block < blocks.end).then(|| g.place(block))?;
            let (_, record) = g.page_of(place.stripe, place.row);
            let left = u64::from(g.chunk_blocks - place.row).min(blocks.end - block);
            let count = left.min((g.page_rows() - record) as u64);
            block += count;
            Some((place, count as usize))
        })
    }

    /// Byte offset of a row's block on any of its members.
    pub fn member_offset(&self, stripe: u64, row: u32) -> u64 {
        self.data_at() + stripe * self.chunk_bytes() + u64::from(row) * BLOCK64
    }

    /// A number for each row, ascending with stripe and row.
    pub fn row_number(&self, stripe: u64, row: u32) -> u64 {
        stripe * u64::from(self.chunk_blocks) + u64::from(row)
    }

    /// Byte offset of the data region.
    pub fn data_at(&self) -> u64 {
        (GUARDS_AT + self.pages() * BLOCK64).next_multiple_of(self.chunk_bytes())
    }

    /// Byte offset of the second superblock.
    pub fn second_superblock_at(&self) -> u64 {
        self.member_size - BLOCK64
    }

    /// Pages of the guard region.
    pub fn pages(&self) -> u64 {
        (self.stripes / self.members as u64 * u64::from(self.chunk_blocks))
            .div_ceil(self.page_rows() as u64)
    }

    /// Byte offset of a page of the guard region.
    pub fn page_at(&self, page: u64) -> u64 {
        GUARDS_AT + page * BLOCK64
    }

    /// Tuples on a page for the rows at one height of a group of stripes: one
    /// a data chunk, and one for each column at the parity (GEO-1).
    pub fn record_tuples(&self) -> usize {
        match self.level {
            Level::Single => 1,
            Level::Raid5 => 2 * self.columns(),
        }
    }

    /// Rows of each stripe of a group that a page covers: a power of two, so
    /// that pages and chunks divide each other.
    pub fn page_rows(&self) -> usize {
        let most = PAGE_TUPLES / self.record_tuples();
        1 << most.ilog2()
    }

    /// The page that holds the tuples of a row, and the record on it.
    pub fn page_of(&self, stripe: u64, row: u32) -> (u64, usize) {
        let height = stripe / self.members as u64 * u64::from(self.chunk_blocks) + u64::from(row);
        (height / self.page_rows() as u64, (height % self.page_rows() as u64) as usize)
    }

    /// Stripe and row of a record at a position in its group: the inverse of
    /// [`page_of`](Self::page_of).
    pub fn row_of(&self, page: u64, record: usize, position: usize) -> (u64, u32) {
        let height = page * self.page_rows() as u64 + record as u64;
        let group = height / u64::from(self.chunk_blocks);
        (
            group * self.members as u64 + position as u64,
            (height % u64::from(self.chunk_blocks)) as u32,
        )
    }

    /// Stripes of the smallest range whose rows share no page with others.
    pub fn page_stripes(&self) -> u64 {
        let groups = (self.page_rows() as u64).div_ceil(u64::from(self.chunk_blocks));
        groups * self.members as u64
    }

    /// The tuples of a record that member `member` holds for the stripe at
    /// `position` in its group: one if it has data there, one for each column
    /// if it has the parity.
    pub fn record_range(&self, member: usize, position: usize) -> Range<usize> {
        let columns = self.columns();
        match self.level {
            Level::Single => 0..1,
            Level::Raid5 => {
                let parity_position = self.members - 1 - member;
                match position.cmp(&parity_position) {
                    std::cmp::Ordering::Less => position..position + 1,
                    std::cmp::Ordering::Equal => position..position + columns,
                    std::cmp::Ordering::Greater => position - 1 + columns..position + columns,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes() -> impl Iterator<Item = Geometry> {
        let raid5 = [(3, 64), (4, 64), (5, 4), (9, 1024), (16, 64), (16, 4)];
        let raid5 = raid5.into_iter().map(|(n, kib)| (Level::Raid5, n, kib));
        raid5
            .chain([(Level::Single, 1, 64)])
            .map(|(level, n, kib)| Geometry::new(level, n, kib << 10, 200 << 20).unwrap())
    }

    #[test]
    fn regions_do_not_overlap_and_little_is_left_over() {
        for g in shapes() {
            let end = g.member_offset(g.stripes, 0);
            assert!(GUARDS_AT + g.pages() * BLOCK64 <= g.data_at(), "{g:?}");
            assert!(end <= g.second_superblock_at(), "{g:?}");
            assert!(
                g.second_superblock_at() - end
                    <= 2 * g.members as u64 * g.chunk_bytes() + (1 << 20),
                "{g:?}"
            );
        }
    }

    #[test]
    fn rows_members_and_tuples_are_one_to_one() {
        for g in shapes() {
            let mut seen = std::collections::HashSet::new();
            for stripe in 0..(2 * g.page_stripes()).min(g.stripes) {
                for column in 0..g.columns() {
                    let member = g.data_member(stripe, column);
                    assert_eq!(g.role(stripe, member), Role::Data(column));
                }
                if let Some(parity) = g.parity_member(stripe) {
                    assert_eq!(g.role(stripe, parity), Role::Parity);
                }
                let position = (stripe % g.members as u64) as usize;
                for row in 0..g.chunk_blocks {
                    let (page, record) = g.page_of(stripe, row);
                    assert_eq!(g.row_of(page, record, position), (stripe, row));
                    for member in 0..g.members {
                        let range = g.record_range(member, position);
                        let want =
                            if g.role(stripe, member) == Role::Parity { g.columns() } else { 1 };
                        assert_eq!(range.len(), want);
                        for t in range {
                            let index = record * g.record_tuples() + t;
                            assert!(index < PAGE_TUPLES);
                            assert!(
                                seen.insert((page, member, index)),
                                "{g:?} {stripe} {row} {member}"
                            );
                        }
                    }
                }
            }
            let mut next = 5;
            for (place, count) in g.runs(5..g.row_shape().stripe_blocks() * 7 + 3) {
                for i in 0..count {
                    let row = place.row + i as u32;
                    assert_eq!(g.place(next), Place { row, ..place });
                    assert_eq!(
                        g.page_of(place.stripe, row).0,
                        g.page_of(place.stripe, place.row).0
                    );
                    next += 1;
                }
            }
            assert_eq!(next, g.row_shape().stripe_blocks() * 7 + 3);
            let per = g.row_shape().stripe_blocks();
            for block in (0..per * 3).chain([g.size() / BLOCK64 - 1]) {
                let p = g.place(block);
                assert_eq!(
                    p.stripe * per + p.column as u64 * u64::from(g.chunk_blocks) + u64::from(p.row),
                    block
                );
            }
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let new = Geometry::new;
        assert!(matches!(new(Level::Raid5, 2, 65536, 1 << 30), Err(BadGeometry::Members { .. })));
        assert!(matches!(new(Level::Raid5, 17, 65536, 1 << 30), Err(BadGeometry::Members { .. })));
        assert!(matches!(new(Level::Raid5, 3, 65535, 1 << 30), Err(BadGeometry::Chunk(_))));
        assert!(matches!(new(Level::Raid5, 3, 2 << 20, 1 << 30), Err(BadGeometry::Chunk(_))));
        assert!(matches!(new(Level::Raid5, 3, 65536, 1 << 20), Err(BadGeometry::TooSmall { .. })));
    }
}
