//! What a world is made of: level, members, sizes. What the simulator knows
//! of the format's regions and of superblocks stands here and in `check`.

use stableio_array::geometry::{LOG_AT, LOG_BLOCKS};
use stableio_array::superblock::Id;
use stableio_array::{Geometry, Level, RoleEntry, Superblock};
use stableio_block::Cache;
use stableio_mem::BLOCK;

use crate::image::Image;
use crate::member::Build;
use crate::protection::Protection;
use crate::random::Random;

/// The levels that worlds are made of.
pub const LEVELS: [Level; 4] = Level::ALL;
/// Members of a world of its own choice, at most.
const MOST_MEMBERS: usize = 5;
/// Where guards begin on a member so small that its log is the smallest.
const SMALLEST_GUARDS_AT: u64 = LOG_AT + *LOG_BLOCKS.start() as u64 * BLOCK as u64;

/// What a world is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Redundancy.
    pub level: Level,
    /// Members.
    pub members: usize,
    /// Bytes of a chunk.
    pub chunk: u64,
    /// Bytes of a member.
    pub member_size: u64,
    /// Bytes that members want memory aligned to.
    pub memory_align: u32,
    /// Bytes that members write wholly or not at all when power is lost.
    pub atomic: u32,
    /// Where members keep settled writes until a flush.
    pub cache: Cache,
    /// Whether it keeps the guards of its blocks.
    pub checksums: bool,
    /// Bytes of the requests' pool.
    pub pool: usize,
    /// A protection that is taken away: for the twins.
    pub without: Option<Protection>,
    /// Whether its worlds print what happens.
    pub trace: bool,
}

/// A part of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// One of the two.
    Superblock,
    /// What is being written.
    Log,
    /// Tuples.
    Guards,
    /// Data and parity.
    Data,
}

impl Shape {
    /// RAID5 over so many members.
    pub fn raid5(members: usize) -> Self {
        Self {
            level: Level::Raid5,
            members,
            chunk: 16 << 10,
            member_size: 5 << 20,
            memory_align: 1,
            atomic: 512,
            cache: Cache::Volatile,
            checksums: true,
            pool: 16 << 20,
            without: None,
            trace: false,
        }
    }

    /// RAID1 over so many members.
    pub fn raid1(members: usize) -> Self {
        Self { level: Level::Raid1, ..Self::raid5(members) }
    }

    /// RAID6 over so many members.
    pub fn raid6(members: usize) -> Self {
        Self { level: Level::Raid6, ..Self::raid5(members) }
    }

    /// One member.
    pub fn single() -> Self {
        Self { level: Level::Single, members: 1, ..Self::raid5(3) }
    }

    /// Any, and a small one.
    pub fn any(random: &mut Random) -> Self {
        let level = random.pick(&LEVELS);
        let counts = level.members();
        let members = random.between(*counts.start(), MOST_MEMBERS.min(*counts.end()));
        let room = random.pick(&[256 << 10, 512 << 10, 1 << 20]);
        Self {
            level,
            members,
            chunk: 4096 << random.below(4),
            member_size: SMALLEST_GUARDS_AT + room,
            memory_align: random.pick(&[1, 512]),
            atomic: random.pick(&[512, BLOCK as u32]),
            cache: random.pick(&[Cache::Volatile, Cache::Volatile, Cache::WriteThrough]),
            checksums: !random.one_in(6),
            // A small pool makes requests wait for memory, and be sampled late.
            pool: random.pick(&[8 << 20, 16 << 20]),
            without: None,
            trace: false,
        }
    }

    /// Members that may be missing.
    pub fn redundancy(&self) -> usize {
        match self.level {
            Level::Raid1 => self.members - 1,
            level => level.parities(),
        }
    }

    /// Whether it does without this protection.
    pub fn is_without(&self, protection: Protection) -> bool {
        self.without == Some(protection)
    }

    /// The build of its members.
    pub fn build(&self) -> Build {
        let Self { member_size: size, memory_align, atomic, cache, .. } = *self;
        let flushes = !self.is_without(Protection::Flushes);
        Build { size, memory_align, atomic, cache, flushes }
    }

    /// Members as they are after creation.
    ///
    /// # Panics
    ///
    /// When there is no such array.
    pub fn create(&self, random: &mut Random) -> Vec<Image> {
        let geometry = Geometry::new(self.level, self.members, self.chunk, self.member_size)
            .expect("a shape that can be");
        let mut id = || Id(random.bytes(16).try_into().expect("16 bytes"));
        let array = id();
        let roles: Vec<_> = (0..self.members).map(|_| RoleEntry::in_sync(id())).collect();
        let image = |role: usize| {
            let superblock = Superblock {
                array,
                name: "sim".into(),
                member: roles[role].id,
                role,
                generation: 1,
                epoch: 0,
                in_use: false,
                log: true,
                checksums: self.checksums,
                created: 0,
                geometry,
                atomic_unit: self.atomic,
                log_from: 1,
                scrub: None,
                histories: Vec::new(),
                roles: roles.clone(),
            };
            let mut image = Image::default();
            for at in [0, geometry.second_superblock_at()] {
                image.write(at, &superblock.encode()[..]);
            }
            image
        };
        (0..self.members).map(image).collect()
    }
}

/// The region of a byte of a member.
pub fn region(geometry: &Geometry, at: u64) -> Region {
    match at {
        at if at >= geometry.second_superblock_at() => Region::Superblock,
        at if at >= geometry.data_at() => Region::Data,
        at if at >= geometry.guards_at() => Region::Guards,
        at if at >= LOG_AT => Region::Log,
        _ => Region::Superblock,
    }
}

/// Bytes of a member that hold, from there on, guards and data.
pub fn guards_and_data(geometry: &Geometry) -> std::ops::Range<u64> {
    geometry.guards_at()..geometry.second_superblock_at()
}
