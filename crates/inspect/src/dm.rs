//! Device mapper: targets, their tables, and what each does with the data.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::sysfs::Dir;
use crate::{DeviceNumber, Kernel, Layer, Radius, Reads, Shows, Writes};

/// Why there is no table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoTable {
    /// Only root may read it.
    NotRoot,
    /// It can not be read.
    Failed,
}

/// A line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `linear`, `raid`.
    pub kind: String,
    /// What follows the kind.
    pub arguments: Vec<String>,
}

/// The targets of a table as `dmsetup table` prints it: `START LENGTH KIND
/// ARGUMENT…` in each line; other lines are left out.
pub fn parse_table(text: &str) -> Vec<Target> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let _start: u64 = words.next()?.parse().ok()?;
            let _length: u64 = words.next()?.parse().ok()?;
            let kind = words.next()?.to_owned();
            Some(Target { kind, arguments: words.map(str::to_owned).collect() })
        })
        .collect()
}

/// A layer for the device, by its table; without one by its UUID and what
/// lies below it.
pub(crate) fn layer(
    layer: Layer,
    dir: &Dir,
    table: Result<String, NoTable>,
    kernel: Option<Kernel>,
) -> Layer {
    let table = table.map(|text| parse_table(&text));
    match table {
        Ok(targets) if !targets.is_empty() => {
            let each = targets.iter().map(|target| of_target(layer.clone(), target, kernel));
            each.max_by_key(rank).expect("there is a target")
        }
        Ok(_) => layer.unknown("its table is empty", None),
        Err(why) => of_uuid(layer, dir, why),
    }
}

/// The worst of several targets decides; only where all copy, it copies.
fn rank(layer: &Layer) -> u8 {
    match &layer.writes {
        Writes::Copies => 0,
        Writes::Passes => 1,
        Writes::Unknown { .. } => 2,
        Writes::Twice { .. } => 3,
    }
}

fn of_target(layer: Layer, target: &Target, kernel: Option<Kernel>) -> Layer {
    let argument = |n: usize| target.arguments.get(n).map(String::as_str);
    let layer = Layer { kind: format!("dm {}", target.kind), ..layer };
    let table = format!("table: {}", target.kind);
    match target.kind.as_str() {
        "linear" | "striped" | "multipath" | "delay" | "flakey" | "unstriped" | "switch"
        | "thin" | "thin-pool" | "snapshot" | "snapshot-origin" | "snapshot-merge" | "era"
        | "writecache" | "error" | "zero" | "zoned" | "dust" => {
            layer.does("hands the data on", table)
        }
        "crypt" => encrypts(layer, table),
        "vdo" => {
            layer.does("copies what is written before it hashes it", table).writes(Writes::Copies)
        }
        "mirror" => mirrors(layer, table),
        "raid" => raid(layer, argument(0).unwrap_or_default()),
        "integrity" => integrity(layer, target, kernel),
        "verity" => rechecks(layer.does("verifies what is read", table), kernel),
        "cache" => cache(layer, target),
        other => {
            let why = format!("what the target '{other}' does with the data is not known here");
            layer.unknown(&why, None)
        }
    }
}

fn encrypts(layer: Layer, evidence: impl Into<String>) -> Layer {
    layer.does("encrypts into memory of its own", evidence).writes(Writes::Copies)
}

fn mirrors(layer: Layer, evidence: impl Into<String>) -> Layer {
    layer
        .does("sends the data to each leg by itself: the legs diverge", evidence)
        .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently })
        .redundant()
}

fn raid(layer: Layer, level: &str) -> Layer {
    let evidence = format!("table: raid {level}");
    let layer = Layer { kind: format!("dm {level}"), ..layer };
    match level {
        "raid0" | "raid0_meta" => layer.does("hands the data on", evidence),
        level if level.starts_with("raid10") || level == "raid1" => mirrors(layer, evidence),
        level if ["raid4", "raid5", "raid6"].iter().any(|l| level.starts_with(l)) => layer
            .does("copies the data before it computes parity", evidence)
            .writes(Writes::Copies)
            .redundant(),
        _ => layer.unknown("its level is not known here", None),
    }
}

/// `DEVICE RESERVED TAG-SIZE MODE #OPTIONS OPTION…` (Documentation/
/// admin-guide/device-mapper/dm-integrity.rst).
fn integrity(layer: Layer, target: &Target, kernel: Option<Kernel>) -> Layer {
    let mode = target.arguments.get(3).map_or("", String::as_str);
    let sums = target.arguments.iter().any(|a| a.starts_with("internal_hash"));
    let evidence = format!("table: integrity, mode {mode}");
    if !sums {
        return layer.does("stores tags that the layer above makes", evidence);
    }
    let layer = match mode {
        "J" => layer
            .does("copies the data into its journal before it sums it", evidence)
            .writes(Writes::Copies),
        "D" | "B" | "R" | "I" => layer
            .does("reads the data more than once, to sum it", evidence)
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorReading })
            .remedy("use dm-integrity with its journal (mode J)"),
        _ => layer.unknown("its mode is not known here", None),
    };
    rechecks(layer, kernel)
}

/// Since 6.8 a block that does not match is read again, privately, first.
fn rechecks(layer: Layer, kernel: Option<Kernel>) -> Layer {
    match kernel {
        Some(kernel) if kernel.dm_rechecks() => layer,
        Some(_) => layer
            .reads(Reads::Verifies { radius: Radius::Issuer })
            .remedy("use Linux 6.8 or later, which reads again before it calls a block bad"),
        None => layer.reads(Reads::Unknown {
            why: "the kernel's version is not known".to_owned(),
            root_would_show: None,
        }),
    }
}

/// `METADATA CACHE ORIGIN BLOCK-SIZE #FEATURES FEATURE…`; write-back unless
/// it says otherwise.
fn cache(layer: Layer, target: &Target) -> Layer {
    let count = target.arguments.get(4).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0);
    let features = target.arguments.iter().skip(5).take(count.min(16));
    if features.into_iter().any(|feature| feature == "writethrough") {
        return layer
            .does(
                "writes the data to the cache and to the origin: the two diverge",
                "table: cache, writethrough",
            )
            .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently });
    }
    layer.does("hands the data on", "table: cache, no writethrough")
}

/// Without a table. LVM names the parts of what it builds, so that plain
/// volumes can be told from the rest.
fn of_uuid(layer: Layer, dir: &Dir, why: NoTable) -> Layer {
    let uuid = dir.text("dm/uuid").unwrap_or_default();
    let Some((prefix, _)) = uuid.split_once('-') else {
        return no_table(layer, why);
    };
    let evidence = format!("dm/uuid begins with {prefix}-");
    match prefix {
        "mpath" => {
            Layer { kind: "dm multipath".to_owned(), ..layer }.does("hands the data on", evidence)
        }
        _ if prefix.starts_with("part") => layer.does("hands the data on", evidence),
        "CRYPT" if is_plain_crypt(&uuid) => {
            let kind = "dm crypt".to_owned();
            encrypts(Layer { kind, ..layer }, "dm/uuid begins with CRYPT-")
        }
        "CRYPT" => no_table(layer, why),
        "LVM" => of_lvm(layer, dir, why),
        _ => no_table(layer, why),
    }
}

/// `CRYPT-INTEGRITY-…` sums, `CRYPT-VERITY-…` verifies, and `CRYPT-SUBDEV-…`
/// is a helper of either; all others encrypt.
fn is_plain_crypt(uuid: &str) -> bool {
    let kind = uuid.split('-').nth(1).unwrap_or_default();
    ["LUKS1", "LUKS2", "PLAIN", "TCRYPT", "BITLK", "FVAULT2", "LOOPAES"].contains(&kind)
}

fn of_lvm(layer: Layer, dir: &Dir, why: NoTable) -> Layer {
    let below: Vec<String> =
        dir.dirs("slaves").iter().map(|slave| slave.text("dm/name").unwrap_or_default()).collect();
    let has = |part: &str| below.iter().any(|name| name.contains(part));
    if has("_mimage_") {
        let kind = "dm mirror".to_owned();
        return mirrors(Layer { kind, ..layer }, "an LVM volume on _mimage_ volumes");
    }
    let built = [
        "_rimage_", "_rmeta_", "_cdata", "_cpool", "_cvol", "_corig", "_iorig", "_imeta", "_vdata",
        "_vpool",
    ];
    if built.iter().any(|part| has(part)) {
        return no_table(layer, why);
    }
    layer.does("hands the data on", "a plain LVM volume, by its UUID and what lies below")
}

fn no_table(layer: Layer, why: NoTable) -> Layer {
    let shown = "the targets of its table (dmsetup table): mirror, raid level, integrity mode";
    match why {
        NoTable::NotRoot => layer.unknown("only root may read its table", Some(shown.to_owned())),
        NoTable::Failed => layer.unknown("its table can not be read", None),
    }
}

/// `struct dm_ioctl` (linux/dm-ioctl.h): its size, and where its fields lie.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEV: usize = 40;
const STATUS_TABLE: u32 = 1 << 4;
const BUFFER_FULL: u32 = 1 << 8;
/// `struct dm_target_spec`, before the arguments.
const SPEC: usize = 40;
/// `_IOWR(0xfd, 12, struct dm_ioctl)`.
const DM_TABLE_STATUS: libc::Ioctl = ((3 << 30) | (HEADER << 16) | (0xfd << 8) | 12) as libc::Ioctl;
/// More than any table that can be understood here.
const BUFFER: usize = 256 << 10;

/// Asks the kernel for a table.
pub(crate) fn kernel_table(device: DeviceNumber) -> Result<String, NoTable> {
    let control = File::options().read(true).write(true).open("/dev/mapper/control");
    let control = control.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => NoTable::NotRoot,
        _ => NoTable::Failed,
    })?;
    let mut buffer = vec![0u8; BUFFER];
    let mut put = |at: usize, value: u32| buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    // Version 4.0.0 is spoken by all.
    put(0, 4);
    put(DATA_SIZE, BUFFER as u32);
    put(DATA_START, HEADER as u32);
    put(FLAGS, STATUS_TABLE);
    buffer[DEV..DEV + 8].copy_from_slice(&libc::makedev(device.major, device.minor).to_ne_bytes());
    // SAFETY: the ioctl reads and writes a `dm_ioctl` and what follows it, as
    // many bytes as `data_size` says, which is the size of the buffer.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), DM_TABLE_STATUS, buffer.as_mut_ptr()) };
    let failed = if io::Error::last_os_error().raw_os_error() == Some(libc::EACCES) {
        NoTable::NotRoot
    } else {
        NoTable::Failed
    };
    let table = if done == 0 { parse_status(&buffer) } else { None };
    // The table of an encrypted device may have the key in it.
    buffer.fill(0);
    table.ok_or(failed)
}

/// What the kernel answers, as the text of a table; of `crypt` targets
/// without the arguments.
fn parse_status(buffer: &[u8]) -> Option<String> {
    let word = |at: usize| {
        let bytes = buffer.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    if word(FLAGS)? & BUFFER_FULL != 0 {
        return None;
    }
    let start = word(DATA_START)? as usize;
    let mut table = String::new();
    let mut at = start;
    for _ in 0..word(TARGET_COUNT)?.min(4096) {
        let next = word(at.checked_add(20)?)? as usize;
        let kind = c_string(buffer.get(at + 24..at + SPEC)?)?;
        let arguments = c_string(buffer.get(at + SPEC..)?)?;
        let arguments = if kind == "crypt" { "" } else { arguments };
        table.push_str(&format!("0 0 {kind} {arguments}\n"));
        // From the start of the data, not of this target.
        at = start.checked_add(next)?;
    }
    Some(table)
}

fn c_string(bytes: &[u8]) -> Option<&str> {
    str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tristate::{self, No, Unknown, Yes};
    use proptest::prelude::*;

    fn answer(table: &str, kernel: &str) -> (Tristate, Tristate) {
        let dir = tempfile::tempdir().unwrap();
        let dir = Dir::open(dir.path()).unwrap();
        let layer =
            layer(Layer::new(0, "dm-0", "dm"), &dir, Ok(table.to_owned()), Kernel::parse(kernel));
        (layer.samples_writes_twice, layer.verifies_reads)
    }

    #[test]
    fn targets_are_told_apart() {
        for (table, expected) in [
            ("0 8 linear 8:0 2048", (No, No)),
            ("0 8 crypt aes-xts-plain64 :64:logon:x 0 8:0 0", (No, No)),
            ("0 8 mirror core 2 64 nosync 2 8:0 0 8:16 0", (Yes, No)),
            ("0 8 raid raid1 3 0 region_size 1 2 - 8:0 - 8:16", (Yes, No)),
            ("0 8 raid raid10 3 0 x 1 2 - 8:0", (Yes, No)),
            ("0 8 raid raid5_ls 3 64 x 1 3 - 8:0", (No, No)),
            ("0 8 raid raid6_zr 3 64 x 1 3 - 8:0", (No, No)),
            ("0 8 integrity 8:0 0 4 J 1 internal_hash:crc32c", (No, No)),
            ("0 8 integrity 8:0 0 4 D 1 internal_hash:crc32c", (Yes, No)),
            ("0 8 integrity 8:0 0 4 B 1 internal_hash:crc32c", (Yes, No)),
            ("0 8 integrity 8:0 0 28 D 0", (No, No)),
            ("0 8 cache 8:0 8:16 8:32 128 1 writethrough smq 0", (Yes, No)),
            ("0 8 cache 8:0 8:16 8:32 128 1 writeback smq 0", (No, No)),
            ("0 8 marvel 8:0", (Unknown, Unknown)),
            ("0 8 linear 8:0 0\n8 8 mirror core 1 64 2 8:0 0 8:16 0", (Yes, No)),
            ("", (Unknown, Unknown)),
        ] {
            assert_eq!(answer(table, "6.18"), expected, "{table}");
        }
        let integrity = "0 8 integrity 8:0 0 4 J 1 internal_hash:crc32c";
        assert_eq!(answer(integrity, "6.5"), (No, Yes), "before it read again");
        assert_eq!(answer(integrity, "odd"), (No, Unknown));
    }

    fn status(targets: &[(&str, &str)]) -> Vec<u8> {
        let mut buffer = vec![0; HEADER];
        buffer[DATA_START..DATA_START + 4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        buffer[TARGET_COUNT..TARGET_COUNT + 4]
            .copy_from_slice(&(targets.len() as u32).to_ne_bytes());
        for (kind, arguments) in targets {
            let end = buffer.len() + SPEC + arguments.len() + 1;
            let next = (end.next_multiple_of(8) - HEADER) as u32;
            buffer.extend([0; 20]);
            buffer.extend(next.to_ne_bytes());
            let mut name = [0; 16];
            name[..kind.len()].copy_from_slice(kind.as_bytes());
            buffer.extend(name);
            buffer.extend(arguments.as_bytes());
            buffer.resize(HEADER + next as usize, 0);
        }
        buffer
    }

    #[test]
    fn the_kernels_answer_is_parsed_without_keys() {
        let bytes = status(&[("raid", "raid1 3 0"), ("crypt", "aes deadbeef 0 8:0 0")]);
        let table = parse_status(&bytes).unwrap();
        assert!(!table.contains("deadbeef"));
        let kinds: Vec<_> = parse_table(&table).into_iter().map(|t| t.kind).collect();
        assert_eq!(kinds, ["raid", "crypt"]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), text in "\\PC{0,80}") {
            let _ = parse_status(&bytes);
            let _ = answer(&format!("0 8 {text}"), &text);
        }

        #[test]
        fn damaged_answers_never_panic(at in 0usize..400, byte in any::<u8>(), cut in 0usize..420) {
            let mut bytes = status(&[("raid", "raid1 3 0"), ("linear", "8:0 0")]);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut);
            let _ = parse_status(&bytes);
        }
    }
}
