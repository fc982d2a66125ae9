//! From the command line's paths to members.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use stableio_array::assemble::AssembleError;
use stableio_array::{Assembly, Probe, assemble, probe};

/// What a directory holds: members, and files that are not.
pub(crate) struct Found {
    pub(crate) members: Vec<Probe>,
    pub(crate) refused: Vec<AssembleError>,
}

/// Probes the given members; a directory stands for the members in it.
///
/// # Errors
///
/// A named file that is no good member; in a directory only what claims to be
/// a member and is broken.
pub(crate) fn plan(paths: &[PathBuf], trust: Option<&Path>) -> Result<Assembly> {
    let mut probes = Vec::new();
    let mut broken = Vec::new();
    for path in paths {
        if path.is_dir() {
            let found = look(path)?;
            probes.extend(found.members);
            broken.extend(found.refused);
        } else {
            probes.push(probe(path)?);
        }
    }
    // A broken file in a directory is left out if the rest is enough.
    let mut assembly = match assemble(&probes, trust) {
        Err(AssembleError::NoMembers) if !broken.is_empty() => {
            return Err(broken.swap_remove(0).into());
        }
        other => other?,
    };
    assembly.notes.extend(broken.iter().map(|error| format!("WARNING: left out: {error}")));
    Ok(assembly)
}

/// Looks at every file of a directory.
pub(crate) fn look(dir: &Path) -> Result<Found> {
    let mut found = Found { members: Vec::new(), refused: Vec::new() };
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.with_context(|| dir.display().to_string())?.path());
    }
    paths.sort();
    for path in paths {
        if !std::fs::metadata(&path).is_ok_and(|m| m.is_file()) {
            continue;
        }
        match probe(&path) {
            Ok(probe) => found.members.push(probe),
            // Any other file may lie there too.
            Err(AssembleError::TooShort { .. }) => {}
            Err(AssembleError::NotAMember {
                why: stableio_array::superblock::BadSuperblock::NotOurs,
                ..
            }) => {}
            Err(error) => found.refused.push(error),
        }
    }
    Ok(found)
}
