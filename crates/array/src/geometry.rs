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
    /// The same on every member.
    Raid1,
    /// One parity block a row, rotating (left-symmetric, as md's default).
    Raid5,
    /// Two parity blocks a row, P and Q, rotating (left-symmetric, as md's
    /// default).
    Raid6,
}

impl Level {
    /// All of them.
    pub const ALL: [Level; 4] = [Level::Single, Level::Raid1, Level::Raid5, Level::Raid6];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Level::Single => "single",
            Level::Raid1 => "raid1",
            Level::Raid5 => "raid5",
            Level::Raid6 => "raid6",
        }
    }

    /// Numbers of members that it takes.
    pub fn members(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Level::Single => 1..=1,
            Level::Raid1 => 2..=8,
            Level::Raid5 => 3..=MAX_MEMBERS,
            Level::Raid6 => 4..=MAX_MEMBERS,
        }
    }

    /// Parity blocks of a row.
    pub fn parities(self) -> usize {
        match self {
            Level::Single | Level::Raid1 => 0,
            Level::Raid5 => 1,
            Level::Raid6 => 2,
        }
    }
}

/// Most members of an array.
pub const MAX_MEMBERS: usize = 16;
/// Most bytes of a member: offsets and sums of them stay far from overflow.
pub const MAX_MEMBER: u64 = 1 << 60;
/// Byte offset of the log region.
pub const LOG_AT: u64 = 64 << 10;
/// Blocks that a log may have.
pub const LOG_BLOCKS: std::ops::RangeInclusive<u32> = 256..=16384;
/// Tuples of a page.
pub const PAGE_TUPLES: usize = 240;

/// The shape of an array and the regions of its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Redundancy.
    pub level: Level,
    /// Members, parity included.
    pub members: usize,
    /// Blocks of a chunk: rows of a stripe.
    pub chunk_blocks: u32,
    /// Stripes; a multiple of [`group`](Self::group).
    pub stripes: u64,
    /// Blocks of the log region.
    pub log_blocks: u32,
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
    /// Data column; [`Geometry::columns`] for the row's Q.
    pub column: usize,
}

/// What a member holds in a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The chunk of P.
    P,
    /// The chunk of Q.
    Q,
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
        // A sixty-fourth for the log.
        let log = (member_size / BLOCK64 / 64).clamp(1, u64::from(*LOG_BLOCKS.end()));
        let mut g = Self {
            level,
            members,
            chunk_blocks: (chunk_bytes / BLOCK64) as u32,
            stripes: members as u64,
            log_blocks: (1 << log.ilog2()).max(*LOG_BLOCKS.start()),
            member_size: member_size / BLOCK64 * BLOCK64,
        };
        g.stripes = g.group();
        let group = g.group() * chunk_bytes;
        let least = g.data_at() + group + BLOCK64;
        if g.member_size < least {
            return Err(BadGeometry::TooSmall { size: member_size, least });
        }
        // Grow to what would fit without guards, then shrink until guards,
        // data and the last superblock fit.
        let room = g.member_size - g.guards_at() - BLOCK64;
        let with_guards = group + BLOCK64 * u64::from(g.chunk_blocks) / g.page_rows() as u64;
        let mut groups = (room / with_guards).max(1);
        loop {
            g.stripes = groups * g.group();
            if g.fits() {
                return Ok(g);
            }
            groups -= 1;
        }
    }

    /// Whether all regions lie on a member beside each other: what a
    /// superblock says is checked by this.
    pub fn is_possible(&self) -> bool {
        let chunk = u64::from(self.chunk_blocks);
        self.level.members().contains(&self.members)
            && chunk.is_power_of_two()
            && chunk <= (1 << 20) / BLOCK64
            && self.member_size.is_multiple_of(BLOCK64)
            && self.member_size <= MAX_MEMBER
            && LOG_BLOCKS.contains(&self.log_blocks)
            && self.stripes > 0
            && self.stripes <= self.member_size / self.chunk_bytes()
            && self.stripes.is_multiple_of(self.group())
            && self.fits()
    }

    fn fits(&self) -> bool {
        self.member_offset(self.stripes, 0) + BLOCK64 <= self.member_size
    }

    /// Stripes after which the places of parity repeat.
    pub fn group(&self) -> u64 {
        if self.level.parities() > 0 { self.members as u64 } else { 1 }
    }

    /// Data columns of a row.
    pub fn columns(&self) -> usize {
        match self.level {
            Level::Single | Level::Raid1 => 1,
            Level::Raid5 | Level::Raid6 => self.members - self.level.parities(),
        }
    }

    /// Tuples of a row: one a data column, and that of Q.
    pub fn width(&self) -> usize {
        self.columns() + usize::from(self.level == Level::Raid6)
    }

    /// Members that may be missing.
    pub fn redundancy(&self) -> usize {
        match self.level {
            Level::Raid1 => self.members - 1,
            level => level.parities(),
        }
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
            parities: self.level.parities() as u8,
        }
    }

    /// The member with a stripe's P.
    pub fn parity_member(&self, stripe: u64) -> Option<usize> {
        let n = self.members as u64;
        (self.level.parities() > 0).then(|| (n - 1 - stripe % n) as usize)
    }

    /// The member with a stripe's Q: the one behind P.
    pub fn q_member(&self, stripe: u64) -> Option<usize> {
        let p = self.parity_member(stripe)?;
        (self.level == Level::Raid6).then(|| (p + 1) % self.members)
    }

    /// The member with a data column of a stripe, the first of them with a
    /// mirror: columns follow the parity. Column [`columns`](Self::columns) is
    /// Q.
    pub fn data_member(&self, stripe: u64, column: usize) -> usize {
        match self.parity_member(stripe) {
            Some(_) if column == self.columns() => {
                self.q_member(stripe).expect("a column beside the data is Q")
            }
            Some(p) => (p + self.level.parities() + column) % self.members,
            None => 0,
        }
    }

    /// The members with a data column of a stripe: all of a mirror.
    pub fn holders(&self, stripe: u64, column: usize) -> Range<usize> {
        let first = self.data_member(stripe, column);
        if self.level == Level::Raid1 { 0..self.members } else { first..first + 1 }
    }

    /// What a member holds in a stripe.
    pub fn role(&self, stripe: u64, member: usize) -> Role {
        let Some(p) = self.parity_member(stripe) else { return Role::Data(0) };
        match (member + self.members - p) % self.members {
            0 => Role::P,
            1 if self.level == Level::Raid6 => Role::Q,
            behind => Role::Data(behind - self.level.parities()),
        }
    }

    /// The members that hold the tuple of a column: those with the data, and
    /// those with parity.
    pub fn tuple_holders(&self, stripe: u64, column: usize) -> impl Iterator<Item = usize> + use<> {
        let (p, q) = (self.parity_member(stripe), self.q_member(stripe));
        let data = self.holders(stripe, column).filter(move |m| Some(*m) != q);
        data.chain(p).chain(q)
    }

    /// The place of a block of the array.
    pub fn place(&self, block: u64) -> Place {
        let per = self.row_shape().stripe_blocks();
        let within = (block % per) as u32;
        // A chunk is a power of two.
        let column = within >> self.chunk_blocks.trailing_zeros();
        let row = within & (self.chunk_blocks - 1);
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

    /// Stripe and row of a row number.
    pub fn row_at(&self, number: u64) -> (u64, u32) {
        let chunk = u64::from(self.chunk_blocks);
        (number / chunk, (number % chunk) as u32)
    }

    /// Rows that follow each other as runs: those of one stripe that have
    /// their tuples on one page.
    pub fn row_runs(&self, rows: Range<u64>) -> impl Iterator<Item = (u64, Range<u32>)> + use<> {
        let g = *self;
        let mut number = rows.start;
        std::iter::from_fn(move || {
            let (stripe, row) = (number < rows.end).then(|| g.row_at(number))?;
            let (_, record) = g.page_of(stripe, row);
            let most = (g.chunk_blocks - row).min((g.page_rows() - record) as u32);
            let count = u64::from(most).min(rows.end - number);
            number += count;
            Some((stripe, row..row + count as u32))
        })
    }

    /// The row numbers of some zones.
    pub fn zone_rows(&self, zones: Range<u64>) -> Range<u64> {
        let end = (zones.end * self.zone_stripes()).min(self.stripes);
        self.row_number(zones.start * self.zone_stripes(), 0)..self.row_number(end, 0)
    }

    /// Byte offset of the guard region.
    pub fn guards_at(&self) -> u64 {
        LOG_AT + u64::from(self.log_blocks) * BLOCK64
    }

    /// Byte offset of the data region.
    pub fn data_at(&self) -> u64 {
        (self.guards_at() + self.pages() * BLOCK64).next_multiple_of(self.chunk_bytes())
    }

    /// Byte offset of the second superblock.
    pub fn second_superblock_at(&self) -> u64 {
        self.member_size - BLOCK64
    }

    /// Pages of the guard region.
    pub fn pages(&self) -> u64 {
        (self.stripes / self.group() * u64::from(self.chunk_blocks))
            .div_ceil(self.page_rows() as u64)
    }

    /// Byte offset of a page of the guard region.
    pub fn page_at(&self, page: u64) -> u64 {
        self.guards_at() + page * BLOCK64
    }

    /// Tuples on a page for the rows at one height of a group of stripes: one
    /// a data chunk, and those of the whole row at each parity (GEO-1).
    pub fn record_tuples(&self) -> usize {
        self.columns() + self.level.parities() * self.width()
    }

    /// Rows of each stripe of a group that a page covers: a power of two, so
    /// that pages and chunks divide each other.
    pub fn page_rows(&self) -> usize {
        1 << self.page_shift()
    }

    /// Every request divides by it: by shifting.
    fn page_shift(&self) -> u32 {
        (PAGE_TUPLES as u32 / self.record_tuples() as u32).ilog2()
    }

    /// The page that holds the tuples of a row, and the record on it.
    pub fn page_of(&self, stripe: u64, row: u32) -> (u64, usize) {
        let height = stripe / self.group() * u64::from(self.chunk_blocks) + u64::from(row);
        let shift = self.page_shift();
        (height >> shift, (height & ((1 << shift) - 1)) as usize)
    }

    /// Stripe and row of a record at a position in its group: the inverse of
    /// [`page_of`](Self::page_of).
    pub fn row_of(&self, page: u64, record: usize, position: usize) -> (u64, u32) {
        let height = page * self.page_rows() as u64 + record as u64;
        let group = height / u64::from(self.chunk_blocks);
        (group * self.group() + position as u64, (height % u64::from(self.chunk_blocks)) as u32)
    }

    /// Where a stripe lies in its group.
    pub fn position(&self, stripe: u64) -> usize {
        (stripe % self.group()) as usize
    }

    /// Stripes of a zone: the smallest range whose rows share no page with
    /// others. Members are rebuilt and looked through by zones.
    pub fn zone_stripes(&self) -> u64 {
        (self.page_rows() as u64).div_ceil(u64::from(self.chunk_blocks)) * self.group()
    }

    /// Zones of the array.
    pub fn zones(&self) -> u64 {
        self.stripes.div_ceil(self.zone_stripes())
    }

    /// The zone of a stripe.
    pub fn zone_of(&self, stripe: u64) -> u64 {
        stripe / self.zone_stripes()
    }

    /// The pages of some zones.
    pub fn zone_pages(&self, zones: Range<u64>) -> Range<u64> {
        let per = (u64::from(self.chunk_blocks) / self.page_rows() as u64).max(1);
        zones.start * per..(zones.end * per).min(self.pages())
    }

    /// The zone of a page.
    pub fn zone_of_page(&self, page: u64) -> u64 {
        page / (u64::from(self.chunk_blocks) / self.page_rows() as u64).max(1)
    }

    /// The zone that a byte of a member belongs to; `None` in superblocks and
    /// log, which belong to none.
    pub fn zone_at(&self, at: u64) -> Option<u64> {
        if at >= self.second_superblock_at() || at < self.guards_at() {
            None
        } else if at < self.data_at() {
            Some(self.zone_of_page((at - self.guards_at()) / BLOCK64))
        } else {
            Some(self.zone_of((at - self.data_at()) / self.chunk_bytes()))
        }
    }

    /// The tuples of a record that member `member` holds for the stripe at
    /// `position` in its group: one if it has data there, those of the whole
    /// row if it has parity.
    pub fn record_range(&self, member: usize, position: usize) -> Range<usize> {
        let len = |position: usize| match self.role(position as u64, member) {
            Role::Data(_) => 1,
            Role::P | Role::Q => self.width(),
        };
        let from = (0..position).map(len).sum();
        from..from + len(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes() -> impl Iterator<Item = Geometry> {
        let counts = [(3, 64), (4, 64), (5, 4), (9, 1024), (16, 64), (16, 4)];
        let raid5 = counts.into_iter().map(|(n, kib)| (Level::Raid5, n, kib));
        let raid6 = counts.into_iter().skip(1).map(|(n, kib)| (Level::Raid6, n, kib));
        let mirrors = [(Level::Single, 1, 64), (Level::Raid1, 2, 64), (Level::Raid1, 8, 4)];
        raid5.chain(raid6).chain(mirrors).map(|(level, n, kib)| {
            let g = Geometry::new(level, n, kib << 10, 200 << 20).unwrap();
            assert!(g.is_possible());
            g
        })
    }

    #[test]
    fn regions_do_not_overlap_and_little_is_left_over() {
        for g in shapes() {
            let end = g.member_offset(g.stripes, 0);
            assert!(g.guards_at() + g.pages() * BLOCK64 <= g.data_at(), "{g:?}");
            assert!(end <= g.second_superblock_at(), "{g:?}");
            assert!(
                g.second_superblock_at() - end <= 2 * g.group() * g.chunk_bytes() + (1 << 20),
                "{g:?}"
            );
        }
    }

    #[test]
    fn rows_members_and_tuples_are_one_to_one() {
        for g in shapes() {
            let mut seen = std::collections::HashSet::new();
            for stripe in 0..(2 * g.zone_stripes()).min(g.stripes) {
                let parities = [(g.parity_member(stripe), Role::P), (g.q_member(stripe), Role::Q)];
                let data =
                    (0..g.columns()).map(|c| (Some(g.data_member(stripe, c)), Role::Data(c)));
                for (member, role) in data.chain(parities) {
                    assert!(member.is_none_or(|m| g.role(stripe, m) == role), "{g:?}");
                }
                let position = g.position(stripe);
                for row in 0..g.chunk_blocks {
                    let (page, record) = g.page_of(stripe, row);
                    assert_eq!(g.row_of(page, record, position), (stripe, row));
                    for member in 0..g.members {
                        let range = g.record_range(member, position);
                        let want = match g.role(stripe, member) {
                            Role::Data(_) => 1,
                            Role::P | Role::Q => g.width(),
                        };
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
            for stripe in [0, 1, g.stripes / 2, g.stripes - 1] {
                for row in [0, g.chunk_blocks - 1] {
                    let zone = g.zone_of(stripe);
                    let (page, _) = g.page_of(stripe, row);
                    assert_eq!(g.zone_at(g.member_offset(stripe, row)), Some(zone));
                    assert_eq!(g.zone_at(g.page_at(page)), Some(zone));
                    assert!(g.zone_pages(zone..zone + 1).contains(&page), "{g:?}");
                }
            }
            let rows = 3..g.zone_rows(0..1).end + 5;
            let mut next = rows.start;
            for (stripe, run) in g.row_runs(rows.clone()) {
                for row in run.clone() {
                    assert_eq!(g.row_number(stripe, row), next, "{g:?}");
                    assert_eq!(g.page_of(stripe, row).0, g.page_of(stripe, run.start).0);
                    next += 1;
                }
            }
            assert_eq!(next, rows.end);
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
