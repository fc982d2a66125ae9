//! The superblock: what a member says of itself and of its array.
//!
//! Two copies, in the first and the last block of the member. All numbers are
//! little-endian.
//!
//! ```text
//!    0  magic "stableio"                 8
//!    8  format                           4   0
//!   12  flags                            4   bit 0: in use, not settled
//!   16  array id                        16
//!   32  member id                       16
//!   48  generation                       8   grows with each change
//!   56  epoch                            8   grows with each assembly
//!   64  created, seconds since 1970      8
//!   72  level                            1   0 single, 5 raid5
//!   73  members                          1
//!   74  role of this member              1
//!   75  checksum                         1   1 CRC64-NVMe
//!   76  chunk, blocks                    4
//!   80  stripes                          8
//!   88  member size, bytes               8
//!   96  name, UTF-8, zero-padded        64
//!  160  roles: 16 times
//!         member id                     16
//!         state                          1   0 none, 1 in sync, 2 missing
//!         zero                           7
//!  544  zero
//! 4088  CRC64-NVMe of bytes 0 to 4087    8
//! ```

use stableio_mem::BLOCK;

use crate::geometry::{Geometry, Level, MAX_MEMBERS};

const MAGIC: &[u8; 8] = b"stableio";
const FORMAT: u32 = 0;
const IN_USE: u32 = 1;
const NAME_LEN: usize = 64;
const ROLES_AT: usize = 160;
const ROLE_LEN: usize = 24;
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
    /// Seconds since 1970.
    pub created: u64,
    /// Shape and regions.
    pub geometry: Geometry,
    /// The members by role.
    pub roles: Vec<(Id, RoleState)>,
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
        put(12, &(u32::from(self.in_use) * IN_USE).to_le_bytes());
        put(16, &self.array.0);
        put(32, &self.member.0);
        put(48, &self.generation.to_le_bytes());
        put(56, &self.epoch.to_le_bytes());
        put(64, &self.created.to_le_bytes());
        put(72, &[level_code(g.level), g.members as u8, self.role as u8, 1]);
        put(76, &g.chunk_blocks.to_le_bytes());
        put(80, &g.stripes.to_le_bytes());
        put(88, &g.member_size.to_le_bytes());
        put(96, self.name.as_bytes());
        for (i, (id, state)) in self.roles.iter().enumerate() {
            put(ROLES_AT + i * ROLE_LEN, &id.0);
            put(ROLES_AT + i * ROLE_LEN + 16, &[state_code(*state)]);
        }
        let crc = stableio_onepass::guard(&block[..CRC_AT]);
        block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        block
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
        if block[75] != 1 {
            return invalid("unknown checksum");
        }
        let Some(level) = level_of(block[72]) else { return invalid("unknown level") };
        let (members, role) = (usize::from(block[73]), usize::from(block[74]));
        let (chunk_blocks, stripes) = (u32_at(block, 76), u64_at(block, 80));
        let member_size = u64_at(block, 88);
        let chunk_bytes = u64::from(chunk_blocks) * BLOCK as u64;
        if !member_size.is_multiple_of(BLOCK as u64) {
            return invalid("impossible member size");
        }
        let geometry = match Geometry::new(level, members, chunk_bytes, member_size) {
            Ok(geometry) if geometry.stripes == stripes => geometry,
            _ => return invalid("impossible geometry"),
        };
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
            let id = Id(block[at..at + 16].try_into().expect("16 bytes"));
            let Some(state) = state_of(block[at + 16]) else {
                return invalid("unknown role state");
            };
            roles.push((id, state));
        }
        let member = Id(block[32..48].try_into().expect("16 bytes"));
        if roles[role].0 != member {
            return invalid("the role belongs to another member");
        }
        Ok(Self {
            array: Id(block[16..32].try_into().expect("16 bytes")),
            name,
            member,
            role,
            generation: u64_at(block, 48),
            epoch: u64_at(block, 56),
            in_use: u32_at(block, 12) & IN_USE != 0,
            created: u64_at(block, 64),
            geometry,
            roles,
        })
    }

    /// Roles whose member is missing.
    pub fn missing(&self) -> usize {
        self.roles.iter().filter(|(_, state)| *state == RoleState::Missing).count()
    }
}

const _: () = assert!(ROLES_AT + MAX_MEMBERS * ROLE_LEN <= CRC_AT);

fn level_code(level: Level) -> u8 {
    match level {
        Level::Single => 0,
        Level::Raid5 => 5,
    }
}

fn level_of(code: u8) -> Option<Level> {
    [Level::Single, Level::Raid5].into_iter().find(|level| level_code(*level) == code)
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
        let roles: Vec<_> = (0..3).map(|_| (Id::random(), RoleState::InSync)).collect();
        Superblock {
            array: Id::random(),
            name: "vms".into(),
            member: roles[1].0,
            role: 1,
            generation: 7,
            epoch: 3,
            in_use: true,
            created: 1,
            geometry,
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
