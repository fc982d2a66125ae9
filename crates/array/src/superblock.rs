//! The superblock: what a member says of itself and of its array.
//!
//! Two copies, in the first and the last block of the member. All numbers are
//! little-endian.
//!
//! ```text
//!    0  magic "stableio"                 8
//!    8  format                           4   1
//!   12  flags                            4   bit 0: in use, not settled; bit 1: no log
//!   16  array id                        16
//!   32  member id                       16
//!   48  generation                       8   grows with each change
//!   56  epoch                            8   grows with each assembly
//!   64  created, seconds since 1970      8
//!   72  level                            1   0 single, 1 raid1, 5 raid5, 6 raid6
//!   73  members                          1
//!   74  role of this member              1
//!   75  checksum                         1   0 none, 1 CRC-64/NVME
//!   76  chunk, blocks                    4
//!   80  stripes                          8
//!   88  member size, bytes               8
//!   96  name, UTF-8, zero-padded        64
//!  160  log, blocks                      4
//!  164  atomic unit, bytes               4   what power failure does not tear
//!  168  log from                         8   first sequence of this epoch
//!  176  scrub                            8   zones done + 1; 0: none under way
//!  184  zero
//!  256  roles: 16 times, 64 bytes
//!         member id                     16
//!         state                          1   0 none, 1 in sync, 2 missing
//!         zero                           7
//!         since                          8   missing: first sequence not there
//!         id of its replacement         16   zero: none
//!         zones rebuilt                  8
//!         zero                           8
//! 1280  histories: 256 times               8   of this opening, and of those before;
//!                                               bit 63: was about to begin
//! 3328  zero
//! 4088  CRC-64/NVME of bytes 0 to 4087   8
//! ```

use std::cmp::Ordering;

use stableio_mem::BLOCK;

use crate::geometry::{Geometry, Level, MAX_MEMBERS};

const MAGIC: &[u8; 8] = b"stableio";
const FORMAT: u32 = 1;
const IN_USE: u32 = 1;
const NO_LOG: u32 = 2;
const NAME_LEN: usize = 64;
const ROLES_AT: usize = 256;
const ROLE_LEN: usize = 64;
const HISTORIES_AT: usize = 1280;
/// Set in the number of an opening that may not have begun.
const INTENDED: u64 = 1 << 63;
/// Openings that a superblock remembers.
pub const HISTORIES: usize = 256;
const CRC_AT: usize = BLOCK - 8;

/// A random number that names an array or a member.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// A new one.
    ///
    /// # Panics
    ///
    /// When the system gives no random numbers.
    pub fn random() -> Self {
        let mut id = [0; 16];
        // SAFETY: the buffer is writable and as long as stated.
        let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
        assert_eq!(got, 16, "getrandom gives 16 bytes at once");
        Id(id)
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The state of a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoleState {
    /// Its member has everything.
    InSync,
    /// Its member is gone; what it has is old.
    Missing,
}

/// What one superblock is to another of the same array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// The same.
    Same,
    /// An earlier state.
    Older,
    /// A later state.
    Newer,
    /// Written without each other: neither is a state of the other.
    Apart,
}

/// A role, as every member knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleEntry {
    /// Its member.
    pub id: Id,
    /// The state of that.
    pub state: RoleState,
    /// Of a missing one: the first log sequence that it may not have seen the
    /// effect of.
    pub since: u64,
    /// The member that is being filled to take its place.
    pub next: Option<Next>,
}

/// A member that is being filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// The member; the same as before where that one catches up.
    pub id: Id,
    /// Zones that it has, from the first on.
    pub zones: u64,
}

impl RoleEntry {
    /// A role whose member has everything.
    pub fn in_sync(id: Id) -> Self {
        Self { id, state: RoleState::InSync, since: 0, next: None }
    }
}

/// A parsed superblock: one that is right in itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The array.
    pub array: Id,
    /// The array's name.
    pub name: String,
    /// This member.
    pub member: Id,
    /// This member's role.
    pub role: usize,
    /// Grows with each change of the roles.
    pub generation: u64,
    /// Grows with each assembly.
    pub epoch: u64,
    /// Whether the array was in use and not settled since.
    pub in_use: bool,
    /// Whether it has a log.
    pub log: bool,
    /// Whether tuples keep the guards of their blocks.
    pub checksums: bool,
    /// Seconds since 1970.
    pub created: u64,
    /// Shape and regions.
    pub geometry: Geometry,
    /// Bytes of an aligned write to a member that power failure does not
    /// tear: 512 or 4096.
    pub atomic_unit: u32,
    /// The first log sequence of this epoch.
    pub log_from: u64,
    /// Zones that a scrub under way has done.
    pub scrub: Option<u64>,
    /// Random numbers of this opening and of those before it, the latest
    /// first: what was written by one of them is an older state of the same.
    pub histories: Vec<u64>,
    /// The members by role.
    pub roles: Vec<RoleEntry>,
}

/// Why bytes are no superblock.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSuperblock {
    /// Nothing of ours.
    #[error("not a stableio member")]
    NotOurs,
    /// Ours, damaged.
    #[error("the superblock is damaged (checksum)")]
    Damaged,
    /// Ours, of another version.
    #[error("format {0} is not known to this version, which knows format {FORMAT}")]
    UnknownFormat(u32),
    /// Checksum right, content wrong.
    #[error("the superblock is not valid: {0}")]
    Invalid(&'static str),
}

/// Why a name is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a name has 1 to {NAME_LEN} letters, digits, '-', '_' or '.', and begins with a letter or digit"
)]
pub struct BadName;

/// Checks an array's name, which also names files and exports.
///
/// # Errors
///
/// [`BadName`].
pub fn check_name(name: &str) -> Result<(), BadName> {
    let fits = (1..=NAME_LEN).contains(&name.len());
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let begins = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if fits && plain && begins { Ok(()) } else { Err(BadName) }
}

impl Superblock {
    /// The bytes of a copy.
    pub fn encode(&self) -> Box<[u8; BLOCK]> {
        let mut block = Box::new([0u8; BLOCK]);
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        let g = &self.geometry;
        put(0, MAGIC);
        put(8, &FORMAT.to_le_bytes());
        let flags = (u32::from(self.in_use) * IN_USE) | (u32::from(!self.log) * NO_LOG);
        put(12, &flags.to_le_bytes());
        put(16, &self.array.0);
        put(32, &self.member.0);
        put(48, &self.generation.to_le_bytes());
        put(56, &self.epoch.to_le_bytes());
        put(64, &self.created.to_le_bytes());
        put(72, &[level_code(g.level), g.members as u8, self.role as u8, self.checksums.into()]);
        put(76, &g.chunk_blocks.to_le_bytes());
        put(80, &g.stripes.to_le_bytes());
        put(88, &g.member_size.to_le_bytes());
        put(96, self.name.as_bytes());
        put(160, &g.log_blocks.to_le_bytes());
        put(164, &self.atomic_unit.to_le_bytes());
        put(168, &self.log_from.to_le_bytes());
        put(176, &self.scrub.map_or(0, |zones| zones + 1).to_le_bytes());
        for (i, role) in self.roles.iter().enumerate() {
            let at = ROLES_AT + i * ROLE_LEN;
            put(at, &role.id.0);
            put(at + 16, &[state_code(role.state)]);
            put(at + 24, &role.since.to_le_bytes());
            if let Some(next) = role.next {
                put(at + 32, &next.id.0);
                put(at + 48, &next.zones.to_le_bytes());
            }
        }
        for (i, history) in self.histories.iter().take(HISTORIES).enumerate() {
            put(HISTORIES_AT + i * 8, &history.to_le_bytes());
        }
        let crc = stableio_onepass::guard(&block[..CRC_AT]);
        block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// An opening is about to begin, which this number stands for. Every
    /// member hears of it before any says that it has begun.
    pub fn intend_history(&mut self, number: u64) {
        self.histories.insert(0, (number | INTENDED).max(1));
        self.histories.truncate(HISTORIES);
    }

    /// The opening that was intended has begun.
    pub fn begin_history(&mut self) {
        if let Some(history) = self.histories.first_mut() {
            *history &= !INTENDED;
        }
    }

    /// The openings of which the log may hold records.
    pub(crate) fn openings(&self) -> Vec<u64> {
        self.histories.iter().map(|history| history & !INTENDED).collect()
    }

    /// What another superblock of the array is to this one.
    pub fn relation(&self, other: &Superblock) -> Relation {
        let number = |history: &u64| history & !INTENDED;
        let latest = |sb: &Superblock| sb.histories.first().map(number);
        let begun = |sb: &Superblock| sb.histories.iter().find(|h| *h & INTENDED == 0).copied();
        if latest(self) == latest(other) {
            // Within one opening all superblocks are written by one engine.
            return match other.generation.cmp(&self.generation) {
                Ordering::Equal if other.roles != self.roles => Relation::Apart,
                Ordering::Equal => Relation::Same,
                Ordering::Less => Relation::Older,
                Ordering::Greater => Relation::Newer,
            };
        }
        // Whether `newer` comes from what `older` was.
        let follows = |newer: &Superblock, older: &Superblock| {
            let Some(its) = begun(older) else { return true };
            let heard = |history: &&u64| number(history) == its;
            match newer.histories.iter().find(heard) {
                // An opening that it only heard of. Whatever that did is on
                // everybody who was in sync then: the other was alone in it
                // only if nobody of those is here.
                Some(known) if known & INTENDED != 0 => {
                    let both = older.roles.iter().zip(&newer.roles).enumerate();
                    let in_sync = |entry: &RoleEntry| entry.state == RoleState::InSync;
                    both.filter(|(role, _)| *role != older.role)
                        .any(|(_, (then, now))| then.id == now.id && in_sync(then) && in_sync(now))
                }
                Some(_) => true,
                // Further back than is remembered.
                None => {
                    newer.histories.len() == HISTORIES
                        && older.epoch + (HISTORIES as u64) < newer.epoch
                }
            }
        };
        match (follows(self, other), follows(other, self)) {
            // Neither went further than to intend.
            (true, true) if other.generation > self.generation => Relation::Newer,
            (true, _) => Relation::Older,
            (false, true) => Relation::Newer,
            (false, false) => Relation::Apart,
        }
    }

    /// Parses a copy. What it gives is consistent in itself: a shape that can
    /// be, a role inside it, a name that may be printed.
    ///
    /// # Errors
    ///
    /// [`BadSuperblock`].
    pub fn parse(block: &[u8; BLOCK]) -> Result<Self, BadSuperblock> {
        let invalid = |what| Err(BadSuperblock::Invalid(what));
        if &block[..8] != MAGIC {
            return Err(BadSuperblock::NotOurs);
        }
        if stableio_onepass::guard(&block[..CRC_AT]) != u64_at(block, CRC_AT) {
            return Err(BadSuperblock::Damaged);
        }
        match u32_at(block, 8) {
            FORMAT => {}
            other => return Err(BadSuperblock::UnknownFormat(other)),
        }
        let checksums = match block[75] {
            0 => false,
            1 => true,
            _ => return invalid("unknown checksum"),
        };
        let Some(level) = level_of(block[72]) else { return invalid("unknown level") };
        let (members, role) = (usize::from(block[73]), usize::from(block[74]));
        let geometry = Geometry {
            level,
            members,
            chunk_blocks: u32_at(block, 76),
            stripes: u64_at(block, 80),
            log_blocks: u32_at(block, 160),
            member_size: u64_at(block, 88),
        };
        if !geometry.is_possible() {
            return invalid("impossible geometry");
        }
        let atomic_unit = u32_at(block, 164);
        if ![512, 4096].contains(&atomic_unit) {
            return invalid("impossible atomic unit");
        }
        if role >= members {
            return invalid("role outside the array");
        }
        let name = block[96..96 + NAME_LEN].split(|b| *b == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or_default().to_owned();
        if check_name(&name).is_err() {
            return invalid("impossible name");
        }
        let mut roles = Vec::with_capacity(members);
        for i in 0..members {
            let at = ROLES_AT + i * ROLE_LEN;
            let Some(state) = state_of(block[at + 16]) else {
                return invalid("unknown role state");
            };
            let next = Next { id: id_at(block, at + 32), zones: u64_at(block, at + 48) };
            roles.push(RoleEntry {
                id: id_at(block, at),
                state,
                since: u64_at(block, at + 24),
                next: (next.id.0 != [0; 16]).then_some(next),
            });
        }
        let member = id_at(block, 32);
        let owner = &roles[role];
        if owner.id != member && owner.next.is_none_or(|next| next.id != member) {
            return invalid("the role belongs to another member");
        }
        Ok(Self {
            array: id_at(block, 16),
            name,
            member,
            role,
            generation: u64_at(block, 48),
            epoch: u64_at(block, 56),
            in_use: u32_at(block, 12) & IN_USE != 0,
            log: u32_at(block, 12) & NO_LOG == 0,
            checksums,
            created: u64_at(block, 64),
            geometry,
            atomic_unit,
            log_from: u64_at(block, 168),
            scrub: u64_at(block, 176).checked_sub(1),
            histories: (0..HISTORIES)
                .map(|i| u64_at(block, HISTORIES_AT + i * 8))
                .take_while(|history| *history != 0)
                .collect(),
            roles,
        })
    }

    /// Roles whose member is missing.
    pub fn missing(&self) -> usize {
        self.roles.iter().filter(|role| role.state == RoleState::Missing).count()
    }
}

const _: () = assert!(ROLES_AT + MAX_MEMBERS * ROLE_LEN <= HISTORIES_AT);
const _: () = assert!(HISTORIES_AT + HISTORIES * 8 <= CRC_AT);

fn level_code(level: Level) -> u8 {
    match level {
        Level::Single => 0,
        Level::Raid1 => 1,
        Level::Raid5 => 5,
        Level::Raid6 => 6,
    }
}

fn level_of(code: u8) -> Option<Level> {
    Level::ALL.into_iter().find(|level| level_code(*level) == code)
}

fn state_code(state: RoleState) -> u8 {
    match state {
        RoleState::InSync => 1,
        RoleState::Missing => 2,
    }
}

fn state_of(code: u8) -> Option<RoleState> {
    [RoleState::InSync, RoleState::Missing].into_iter().find(|state| state_code(*state) == code)
}

fn id_at(bytes: &[u8], at: usize) -> Id {
    Id(bytes[at..at + 16].try_into().expect("16 bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Superblock {
        let geometry = Geometry::new(Level::Raid5, 3, 65536, 64 << 20).unwrap();
        let mut roles: Vec<_> = (0..3).map(|_| RoleEntry::in_sync(Id::random())).collect();
        let next = Next { id: Id::random(), zones: 3 };
        roles[2] = RoleEntry { state: RoleState::Missing, since: 17, next: Some(next), ..roles[2] };
        Superblock {
            array: Id::random(),
            name: "vms".into(),
            member: roles[1].id,
            role: 1,
            generation: 7,
            epoch: 3,
            in_use: true,
            log: true,
            checksums: true,
            created: 1,
            geometry,
            atomic_unit: 4096,
            log_from: 99,
            scrub: Some(4),
            histories: vec![5, 4, 3],
            roles,
        }
    }

    #[test]
    fn what_was_written_is_parsed_and_damage_is_seen() {
        let sb = example();
        let block = sb.encode();
        assert_eq!(Superblock::parse(&block), Ok(sb));
        for at in (0..BLOCK).step_by(37) {
            let mut bad = block.clone();
            bad[at] ^= 0x10;
            let want = if at < 8 { BadSuperblock::NotOurs } else { BadSuperblock::Damaged };
            assert_eq!(Superblock::parse(&bad), Err(want), "byte {at}");
        }
        assert_eq!(Superblock::parse(&[0; BLOCK]), Err(BadSuperblock::NotOurs));
    }

    #[test]
    fn checksums_are_there_or_not_and_nothing_else() {
        let plain = Superblock { checksums: false, ..example() };
        let mut block = plain.encode();
        assert_eq!(block[75], 0);
        assert_eq!(Superblock::parse(&block), Ok(plain));
        block[75] = 2;
        let crc = stableio_onepass::guard(&block[..CRC_AT]);
        block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Superblock::parse(&block), Err(BadSuperblock::Invalid("unknown checksum")));
    }

    proptest! {
        /// Any content under a right checksum parses or is refused.
        #[test]
        fn no_content_panics(changes in proptest::collection::vec((8usize..CRC_AT, any::<u8>()), 1..20)) {
            let mut block = example().encode();
            for (at, byte) in changes { block[at] = byte; }
            let crc = stableio_onepass::guard(&block[..CRC_AT]);
            block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(sb) = Superblock::parse(&block) {
                prop_assert!(sb.role < sb.geometry.members);
                prop_assert_eq!(Superblock::parse(&sb.encode()), Ok(sb));
            }
        }
    }
}
