//! From members to an array: which belong together, and which may be believed.
//!
//! ASM-1: the superblock with the highest generation says which roles are in
//! sync. A member of a role that it calls missing is stale and is left out.
//!
//! ASM-2: members that were written without each other do not assemble
//! unless the administrator says which to trust: neither superblock is an
//! earlier state of the other, by the histories of their openings.
//!
//! ASM-3: nothing is written before everything here has been checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use stableio_mem::{BLOCK, Bytes};

use crate::superblock::{BadSuperblock, Relation, RoleState, Superblock};

/// What the superblock copies of a member say.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The member.
    pub path: PathBuf,
    /// The newer good copy.
    pub superblock: Superblock,
    /// Copies that were damaged or older; mended when the array is served.
    pub bad_copies: Vec<&'static str>,
}

/// Why members do not make an array. Each is one line: what, where, what to
/// do.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// Nothing given.
    #[error("no members given: name the members' files or devices, or a directory that holds them")]
    NoMembers,
    /// The system refused.
    #[error("{}: {error}", path.display())]
    Open {
        /// The member.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// Somebody else has it open.
    #[error("{}: in use by another process (locked); stop that one first", .0.display())]
    InUse(PathBuf),
    /// Neither file nor block device.
    #[error("{}: is neither a regular file nor a block device; leave it out", .0.display())]
    WrongType(PathBuf),
    /// Not a member.
    #[error("{}: {why}; leave it out", path.display())]
    NotAMember {
        /// The file.
        path: PathBuf,
        /// Why.
        why: BadSuperblock,
    },
    /// Both copies damaged.
    #[error("{}: both superblock copies are damaged; leave this member out to serve without it", .0.display())]
    BothDamaged(PathBuf),
    /// Too short for a superblock.
    #[error("{}: {} is too short to be a member; leave it out", path.display(), Bytes(*size))]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// Shorter than it was.
    #[error("{}: truncated: {} of {} are there; restore it or leave it out", path.display(), Bytes(*size), Bytes(*want))]
    Truncated {
        /// The member.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// What it had.
        want: u64,
    },
    /// Members of several arrays.
    #[error(
        "{} belongs to array {}, {} to {}: serve one array at a time",
        first.display(), first_array, second.display(), second_array
    )]
    DifferentArrays {
        /// A member.
        first: PathBuf,
        /// Its array's name and id.
        first_array: String,
        /// Another member.
        second: PathBuf,
        /// Its array's name and id.
        second_array: String,
    },
    /// One member twice.
    #[error("{} and {} are the same member: name each member once (a copy must not be served beside its original)", first.display(), second.display())]
    Doubled {
        /// A member.
        first: PathBuf,
        /// The same.
        second: PathBuf,
    },
    /// Not enough.
    #[error(
        "array '{name}' has {have} of {members} members here and needs at least {need}; missing: {missing}"
    )]
    TooFew {
        /// The array.
        name: String,
        /// Members there.
        have: usize,
        /// Members in all.
        members: usize,
        /// Members needed.
        need: usize,
        /// Roles missing.
        missing: String,
    },
    /// More members than the array has.
    #[error("{}: array '{name}' does not know this member any more; leave it out", path.display())]
    Foreign {
        /// The member.
        path: PathBuf,
        /// The array.
        name: String,
    },
    /// ASM-2.
    #[error(
        "{} and {} were each written without the other: \
         choose the one whose data you want with --trust-member",
        first.display(), second.display()
    )]
    SplitBrain {
        /// A member.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// `--trust-member` names none of them.
    #[error("--trust-member {}: not among the members given", .0.display())]
    UnknownTrust(PathBuf),
}

/// A plan for an array: which member is which role.
#[derive(Debug)]
pub struct Assembly {
    /// The truth, as of the newest member.
    pub superblock: Superblock,
    /// By role, the member that takes part.
    pub members: Vec<Option<PathBuf>>,
    /// By role, a member that is being filled to take the place, or the one
    /// that was left out and comes back.
    pub incoming: Vec<Option<PathBuf>>,
    /// What a person must know: stale members, mended superblocks.
    pub notes: Vec<String>,
    /// Whether the array must be recovered: it was not shut down.
    pub crashed: bool,
}

/// Reads the superblocks of a member. Takes no lock and writes nothing.
///
/// # Errors
///
/// [`AssembleError`], about this file.
pub fn probe(path: &Path) -> Result<Probe, AssembleError> {
    let fail = |error| AssembleError::Open { path: path.into(), error };
    // Opening anything else could wait for ever, as a FIFO does.
    let kind = std::fs::metadata(path).map_err(fail)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(AssembleError::WrongType(path.into()));
    }
    let file = File::open(path).map_err(fail)?;
    let size = crate::create::file_size(&file).map_err(fail)?;
    if size < 2 * BLOCK as u64 {
        return Err(AssembleError::TooShort { path: path.into(), size });
    }
    let read = |at: u64| -> Result<Result<Superblock, BadSuperblock>, AssembleError> {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, at).map_err(fail)?;
        Ok(Superblock::parse(&block))
    };
    let first = read(0)?;
    // Where the last copy is, the first says; without it, the file's end.
    let end = size / BLOCK as u64 * BLOCK as u64;
    let expected = first.as_ref().map_or(end, |sb| sb.geometry.member_size);
    if expected > size {
        return Err(AssembleError::Truncated { path: path.into(), size, want: expected });
    }
    let second = read(expected - BLOCK as u64)?;
    let (superblock, bad_copies) = match (first, second) {
        (Ok(a), Ok(b)) if a.generation == b.generation => (a, vec![]),
        (Ok(a), Ok(b)) if a.array != b.array || a.generation > b.generation => (a, vec!["last"]),
        (Ok(_), Ok(b)) => (b, vec!["first"]),
        (Ok(a), Err(_)) => (a, vec!["last"]),
        (Err(_), Ok(b)) => (b, vec!["first"]),
        (Err(BadSuperblock::NotOurs), Err(BadSuperblock::NotOurs)) => {
            return Err(AssembleError::NotAMember {
                path: path.into(),
                why: BadSuperblock::NotOurs,
            });
        }
        (Err(why @ (BadSuperblock::UnknownFormat(_) | BadSuperblock::Invalid(_))), Err(_)) => {
            return Err(AssembleError::NotAMember { path: path.into(), why });
        }
        (Err(_), Err(_)) => return Err(AssembleError::BothDamaged(path.into())),
    };
    if superblock.geometry.member_size > size {
        let want = superblock.geometry.member_size;
        return Err(AssembleError::Truncated { path: path.into(), size, want });
    }
    Ok(Probe { path: path.into(), superblock, bad_copies })
}

/// Decides what takes part, from probes in any order. `trust` names the
/// member to believe where they exclude each other.
///
/// # Errors
///
/// [`AssembleError`]; nothing was written.
pub fn assemble(probes: &[Probe], trust: Option<&Path>) -> Result<Assembly, AssembleError> {
    let mut newest = probes.first().ok_or(AssembleError::NoMembers)?;
    for probe in probes {
        if newest.superblock.relation(&probe.superblock) == Relation::Newer {
            newest = probe;
        }
    }
    one_array(probes)?;
    let truth = match trust {
        None => {
            no_split_brain(probes)?;
            newest
        }
        Some(path) => probes
            .iter()
            .find(|p| p.path == path)
            .ok_or_else(|| AssembleError::UnknownTrust(path.into()))?,
    };
    let superblock = truth.superblock.clone();
    let mut members = vec![None; superblock.geometry.members];
    let mut incoming = vec![None; superblock.geometry.members];
    let mut notes = Vec::new();
    for probe in probes {
        let (role, id) = (probe.superblock.role, probe.superblock.member);
        let path = probe.path.display();
        let entry = superblock.roles[role];
        let relation = superblock.relation(&probe.superblock);
        if entry.id != id && entry.next.is_some_and(|next| next.id == id) {
            incoming[role] = Some(probe.path.clone());
        } else if entry.id != id && relation == Relation::Older {
            notes.push(format!("WARNING: {path} was replaced by another member: LEFT OUT"));
        } else if entry.id != id {
            return Err(AssembleError::Foreign { path: probe.path.clone(), name: superblock.name });
        } else if relation == Relation::Apart || relation == Relation::Newer {
            // Only where an administrator chose.
            notes.push(format!(
                "WARNING: {path} has another history than the trusted member: LEFT OUT"
            ));
        } else if entry.state == RoleState::Missing
            && entry.next.is_some_and(|next| next.id != entry.id)
        {
            notes.push(format!("WARNING: {path} is stale and being replaced: LEFT OUT"));
        } else if entry.state == RoleState::Missing {
            notes.push(format!(
                "WARNING: {path} is stale (the array was written without it): \
                 it is not read before it has caught up"
            ));
            incoming[role] = Some(probe.path.clone());
        } else {
            members[role] = Some(probe.path.clone());
        }
        for copy in &probe.bad_copies {
            notes.push(format!(
                "{path}: the {copy} superblock copy was damaged or old; mended from the other"
            ));
        }
    }
    let have = members.iter().flatten().count();
    let need = superblock.geometry.members - superblock.geometry.redundancy();
    if have < need {
        let roles = members.iter().enumerate().filter(|(_, m)| m.is_none());
        let missing = roles.map(|(role, _)| format!("role {role}")).collect::<Vec<_>>().join(", ");
        let (name, members) = (superblock.name, superblock.geometry.members);
        return Err(AssembleError::TooFew { name, have, members, need, missing });
    }
    for (role, _) in members.iter().enumerate().filter(|(_, m)| m.is_none()) {
        let left = have - need;
        notes.push(format!("WARNING: role {role} is missing: {left} more may fail"));
    }
    let crashed = superblock.in_use;
    Ok(Assembly { superblock, members, incoming, notes, crashed })
}

/// All of one array, each once.
fn one_array(probes: &[Probe]) -> Result<(), AssembleError> {
    for (i, second) in probes.iter().enumerate() {
        let first = &probes[0];
        if second.superblock.array != first.superblock.array {
            return Err(AssembleError::DifferentArrays {
                first: first.path.clone(),
                first_array: array_of(first),
                second: second.path.clone(),
                second_array: array_of(second),
            });
        }
        let same = |p: &&Probe| p.superblock.member == second.superblock.member;
        if let Some(twin) = probes[..i].iter().find(same) {
            return Err(AssembleError::Doubled {
                first: twin.path.clone(),
                second: second.path.clone(),
            });
        }
    }
    Ok(())
}

fn array_of(probe: &Probe) -> String {
    format!("'{}' ({})", probe.superblock.name, probe.superblock.array)
}

/// ASM-2, for every two of them.
fn no_split_brain(probes: &[Probe]) -> Result<(), AssembleError> {
    for (i, first) in probes.iter().enumerate() {
        for second in &probes[i + 1..] {
            let (a, b) = (&first.superblock, &second.superblock);
            if a.array == b.array && a.relation(b) == Relation::Apart {
                let (first, second) = (first.path.clone(), second.path.clone());
                return Err(AssembleError::SplitBrain { first, second });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Geometry, Level};
    use crate::superblock::{Id, RoleEntry};

    fn probes() -> Vec<Probe> {
        let geometry = Geometry::new(Level::Raid5, 3, 65536, 64 << 20).unwrap();
        let roles: Vec<_> = (0..3).map(|_| RoleEntry::in_sync(Id::random())).collect();
        let array = Id::random();
        let probe = |role: usize| Probe {
            path: format!("m{role}").into(),
            superblock: Superblock {
                array,
                name: "a".into(),
                member: roles[role].id,
                role,
                generation: 5,
                epoch: 2,
                in_use: false,
                log: true,
                checksums: true,
                created: 0,
                geometry,
                atomic_unit: 4096,
                log_from: 0,
                scrub: None,
                histories: vec![7],
                roles: roles.clone(),
            },
            bad_copies: vec![],
        };
        (0..3).map(probe).collect()
    }

    #[test]
    fn members_assemble_in_any_order_and_one_may_be_missing() {
        let all = probes();
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let given: Vec<_> = order.iter().map(|i| all[*i].clone()).collect();
            let assembly = assemble(&given, None).unwrap();
            assert_eq!(assembly.members.iter().flatten().count(), 3);
            assert!(assembly.notes.is_empty());
            assert_eq!(assemble(&given[..2], None).unwrap().notes.len(), 1);
            assert!(matches!(
                assemble(&given[..1], None),
                Err(AssembleError::TooFew { have: 1, need: 2, .. })
            ));
        }
        assert!(matches!(assemble(&[], None), Err(AssembleError::NoMembers)));
    }

    #[test]
    fn a_save_that_a_crash_cut_short_is_no_reason_to_leave_members_out() {
        let mut all = probes();
        all[1].superblock.generation = 6;
        all[1].superblock.in_use = true;
        let assembly = assemble(&all, None).unwrap();
        assert!(assembly.crashed);
        assert_eq!(assembly.members.iter().flatten().count(), 3);
    }

    #[test]
    fn stale_members_are_left_out_and_split_brains_refused() {
        let mut all = probes();
        for i in [0, 1] {
            all[i].superblock.generation = 9;
            all[i].superblock.roles[2].state = RoleState::Missing;
        }
        let assembly = assemble(&all, None).unwrap();
        assert_eq!(assembly.members[2], None);
        assert!(assembly.notes[0].contains("stale"));
        // It had once been without another itself; that is long over.
        all[2].superblock.roles[1].state = RoleState::Missing;
        assert!(assemble(&all, None).is_ok());
        // The third went on without the first.
        [0, 1].into_iter().for_each(|i| all[i].superblock.histories.insert(0, 8));
        all[2].superblock.generation = 12;
        all[2].superblock.histories.insert(0, 9);
        all[2].superblock.roles[0].state = RoleState::Missing;
        assert!(matches!(assemble(&all, None), Err(AssembleError::SplitBrain { .. })));
        let trusted = assemble(&all, Some(Path::new("m1"))).unwrap();
        assert_eq!(trusted.members[2], None);
        assert!(matches!(
            assemble(&all, Some(Path::new("x"))),
            Err(AssembleError::UnknownTrust(_))
        ));
    }

    #[test]
    fn doubles_and_strangers_are_refused() {
        let mut all = probes();
        all.push(Probe { path: "copy".into(), ..all[0].clone() });
        assert!(matches!(assemble(&all, None), Err(AssembleError::Doubled { .. })));
        let mut all = probes();
        all[2].superblock.array = Id::random();
        assert!(matches!(assemble(&all, None), Err(AssembleError::DifferentArrays { .. })));
    }
}
