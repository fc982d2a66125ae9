//! `stableio list` and `stableio examine`: what lies there, without opening
//! anything for writing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;
use stableio_array::geometry::LOG_AT;
use stableio_array::{Probe, RoleState, Superblock, probe};
use stableio_mem::{BLOCK, Bytes};

use crate::{members, table};

pub(crate) fn list(dirs: &[PathBuf], as_json: bool) -> Result<ExitCode> {
    let mut arrays: BTreeMap<_, Vec<Probe>> = BTreeMap::new();
    let mut broken = Vec::new();
    for dir in dirs {
        let found = members::look(dir)?;
        broken.extend(found.refused);
        for probe in found.members {
            let key = (probe.superblock.name.clone(), probe.superblock.array);
            arrays.entry(key).or_default().push(probe);
        }
    }
    for error in &broken {
        eprintln!("stableio: {error}");
    }
    if as_json {
        let all: Vec<_> = arrays.values().map(|probes| array_json(probes)).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    if arrays.is_empty() {
        println!("no arrays here");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table::table(["NAME", "LEVEL", "SIZE", "MEMBERS", "STATE", "PATHS"]);
    for probes in arrays.values() {
        let newest = newest(probes);
        let g = newest.geometry;
        let here = probes.iter().filter(|p| in_sync(newest, p)).count();
        let paths: Vec<_> = probes.iter().map(|p| p.path.display().to_string()).collect();
        table.add_row([
            newest.name.clone(),
            g.level.name().to_owned(),
            Bytes(g.size()).to_string(),
            format!("{here} of {}", g.members),
            state(newest, here).to_owned(),
            paths.join(" "),
        ]);
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn newest(probes: &[Probe]) -> &Superblock {
    let newest = probes.iter().max_by_key(|p| p.superblock.generation);
    &newest.expect("an array was found by a member").superblock
}

fn in_sync(newest: &Superblock, probe: &Probe) -> bool {
    let role = &newest.roles[probe.superblock.role];
    role.id == probe.superblock.member && role.state == RoleState::InSync
}

fn state(newest: &Superblock, here: usize) -> &'static str {
    let missing = newest.geometry.members - here;
    match (missing, missing <= newest.geometry.redundancy(), newest.in_use) {
        (0, _, false) => "complete",
        (0, _, true) => "in use, or not shut down",
        (_, true, _) if missing < newest.geometry.redundancy() => {
            "DEGRADED: can be served, has less redundancy"
        }
        (_, true, _) => "DEGRADED: can be served, has no redundancy left",
        (_, false, _) => "INCOMPLETE: too few members here",
    }
}

fn array_json(probes: &[Probe]) -> serde_json::Value {
    let newest = newest(probes);
    let here = probes.iter().filter(|p| in_sync(newest, p)).count();
    let members: Vec<_> = probes
        .iter()
        .map(
            |p| json!({ "path": p.path, "role": p.superblock.role, "in_sync": in_sync(newest, p) }),
        )
        .collect();
    json!({
        "name": newest.name,
        "id": newest.array.to_string(),
        "level": newest.geometry.level,
        "size_bytes": newest.geometry.size(),
        "members": newest.geometry.members,
        "state": state(newest, here),
        "found": members,
    })
}

pub(crate) fn examine(path: &Path, as_json: bool) -> Result<ExitCode> {
    let probe = probe(path)?;
    let sb = &probe.superblock;
    let g = sb.geometry;
    let log_bytes = u64::from(g.log_blocks) * BLOCK as u64;
    let roles: Vec<_> = sb
        .roles
        .iter()
        .enumerate()
        .map(|(role, entry)| {
            let next = entry.next.map(
                |next| json!({ "id": next.id.to_string(), "zones": next.zones, "of": g.zones() }),
            );
            json!({ "role": role, "id": entry.id.to_string(), "state": entry.state, "filling": next })
        })
        .collect();
    if as_json {
        let value = json!({
            "path": probe.path, "format": 1, "name": sb.name, "array": sb.array.to_string(),
            "member": sb.member.to_string(), "role": sb.role, "level": g.level, "members": g.members,
            "chunk_bytes": g.chunk_bytes(), "size_bytes": g.size(), "member_size_bytes": g.member_size,
            "generation": sb.generation, "epoch": sb.epoch, "in_use": sb.in_use, "created": sb.created,
            "log": sb.log, "checksums": sb.checksums, "atomic_unit_bytes": sb.atomic_unit, "scrub_zones": sb.scrub,
            "log_at": LOG_AT, "log_bytes": log_bytes, "guards_at": g.guards_at(),
            "data_at": g.data_at(), "roles": roles, "bad_copies": probe.bad_copies,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table::table([path.display().to_string().as_str(), "format 1"]);
    let mut row = |what: &str, value: String| {
        table.add_row([what, &value]);
    };
    row("array", format!("'{}' ({})", sb.name, sb.array));
    row("member", format!("{}, role {} of {}", sb.member, sb.role, g.members));
    row("level", format!("{}, chunk {}", g.level.name(), Bytes(g.chunk_bytes())));
    let checksums = match sb.checksums {
        true => "crc64-nvme, of each 4 KiB",
        false => "off: what a member reads back wrong is not noticed",
    };
    row("checksums", checksums.to_owned());
    row("size", format!("{} of members of {}", Bytes(g.size()), Bytes(g.member_size)));
    row("generation", format!("{} (epoch {})", sb.generation, sb.epoch));
    row("shut down", if sb.in_use { "no: in use, or it crashed" } else { "yes" }.to_owned());
    let log = match sb.log {
        true => format!("{} from byte {LOG_AT}", Bytes(log_bytes)),
        false if sb.checksums => "off: a block in flight at a crash may be lost".to_owned(),
        false => "off: a block in flight at a crash may hold anything".to_owned(),
    };
    row("log", log);
    row("atomic unit", format!("{}: not torn by power failure", Bytes(u64::from(sb.atomic_unit))));
    row("guards", format!("{} pages from byte {}", g.pages(), g.guards_at()));
    row("data", format!("{} stripes from byte {}", g.stripes, g.data_at()));
    if let Some(zones) = sb.scrub {
        row("scrub", format!("{zones} of {} zones done", g.zones()));
    }
    for (role, entry) in sb.roles.iter().enumerate() {
        let state = if entry.state == RoleState::InSync { "in sync" } else { "MISSING" };
        let this = if entry.id == sb.member { " (this one)" } else { "" };
        row(&format!("role {role}"), format!("{} {state}{this}", entry.id));
        if let Some(next) = entry.next.filter(|next| next.id != entry.id) {
            let this = if next.id == sb.member { " (this one)" } else { "" };
            let percent = next.zones * 100 / g.zones().max(1);
            row(&format!("role {role}"), format!("{} filling {percent} %{this}", next.id));
        }
    }
    for copy in &probe.bad_copies {
        row(
            "note",
            format!("the {copy} superblock copy is damaged or old; serving the array mends it"),
        );
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}
