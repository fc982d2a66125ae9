//! Block devices: what each does with the data, by what `/sys` says of it,
//! and what lies below it.

use std::path::Path;

use crate::host::{Host, Walk};
use crate::subject::Subject;
use crate::sysfs::Dir;
use crate::{Alignment, AtomicWrites, DeviceNumber, Layer, Radius, Reads, Shows, Writes, dm, fs};

const STABLE_WRITES: &str = "queue/stable_writes";

/// Adds the layers of a device and of all below it.
pub(crate) fn walk(walk: &mut Walk<'_>, number: DeviceNumber, depth: usize) {
    match dir_of(walk.host, number) {
        Some(dir) => walk_dir(walk, &dir, depth),
        None => {
            let layer = Layer::new(depth, number.to_string(), "block device");
            walk.push(layer.unknown("this device is not in /sys", None));
            walk.physical.push(None);
        }
    }
}

/// The same, by the device's directory.
pub(crate) fn walk_dir(walk: &mut Walk<'_>, dir: &Dir, depth: usize) {
    let name = dir.name();
    if dir.has("partition") {
        let layer = Layer::new(depth, name, "partition");
        check_start(walk, dir);
        match dir.parent() {
            Some(disk) if walk.push(layer) => walk_dir(walk, &disk, depth + 1),
            _ => walk.physical.push(None),
        }
        return;
    }
    check_start(walk, dir);
    let layer = explained(walk.host, dir, Layer::new(depth, name, "disk"));
    let is_loop = layer.kind == "loop";
    if !walk.push(layer) {
        walk.physical.push(None);
        return;
    }
    let slaves = dir.dirs("slaves");
    if slaves.is_empty() {
        walk.physical.push(physical_block(dir));
    }
    if is_loop {
        // What it says itself counts: it takes no account of the disks that
        // its file lies on.
        let known = walk.physical.len();
        walk_backing_file(walk, dir, depth + 1);
        walk.physical.truncate(known);
    }
    for below in slaves {
        walk_dir(walk, &below, depth + 1);
    }
}

/// A device that begins inside a physical block has none of its own.
fn check_start(walk: &mut Walk<'_>, dir: &Dir) {
    if dir.text("alignment_offset").as_deref() != Some("0") {
        walk.physical.push(None);
    }
}

fn physical_block(dir: &Dir) -> Option<u32> {
    dir.number("queue/physical_block_size").filter(|bytes: &u32| bytes.is_power_of_two())
}

/// What the device does with the data.
fn explained(host: &Host, dir: &Dir, layer: Layer) -> Layer {
    let name = layer.name.clone();
    let is = |prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let kind = |kind: &str| Layer { kind: kind.to_owned(), ..layer.clone() };
    if dir.has("md/level") {
        return md(dir, layer);
    }
    if dir.has("dm") {
        let table = dir.device_number().map_or(Err(dm::NoTable::Failed), |n| host.table(n));
        let layer = dm::layer(named(dir, kind("dm")), dir, table, host.kernel());
        return flagged_by_itself(dir, layer);
    }
    match () {
        () if dir.has("loop") || is("loop") => loop_device(dir, kind("loop")),
        () if is("zram") => zram(kind("zram")),
        () if is("drbd") => drbd(kind("drbd")),
        () if is("rbd") => rbd(host, dir, kind("rbd")),
        () if is("bcache") => bcache(dir, kind("bcache")),
        () if is("zd") => kind("zvol")
            .does("copies the data into ZFS' cache", "a ZFS volume")
            .writes(Writes::Copies)
            .reads(Reads::Copies),
        // A request sent again after a reconnection is read again, whole: the
        // server then has that one. Nothing is summed, nothing has a twin.
        () if is("nbd") => {
            kind("nbd").does("copies the data into a socket, once", "the nbd driver")
        }
        () if is("ublkb") => {
            kind("ublk").unknown("whether its server copies the data is not known here", None)
        }
        () if is("ram") || is("pmem") => {
            kind("memory").does("copies the data, once", "a disk in memory")
        }
        () if is("nvme") => disk(dir, nvme(dir, kind("nvme"))),
        () if name.starts_with("sd") => scsi(host, dir, kind("scsi disk")),
        () if name.starts_with("vd") => disk(dir, kind("virtio disk")),
        () if name.starts_with("xvd") => disk(dir, kind("xen disk")),
        () if is("mmcblk")
            || is("nullb")
            || is("mtdblock")
            || is("sr")
            || name.starts_with("dasd") =>
        {
            disk(dir, layer)
        }
        () => unknown_kind(dir, layer),
    }
}

fn named(dir: &Dir, layer: Layer) -> Layer {
    match dir.text("dm/name") {
        Some(name) if !name.is_empty() => {
            Layer { name: format!("{} ({name})", layer.name), ..layer }
        }
        _ => layer,
    }
}

/// md(4): the levels that mirror do not set the flag, and still diverge.
fn md(dir: &Dir, layer: Layer) -> Layer {
    let level = dir.text("md/level").unwrap_or_default();
    let evidence = format!("md/level is {level}");
    let layer = Layer { kind: format!("md {level}"), ..layer };
    let disks: Option<u32> = dir.number("md/raid_disks");
    match level.as_str() {
        "linear" | "raid0" => flagged_by_itself(dir, layer.does("hands the data on", evidence)),
        "raid1" if disks == Some(1) => layer.does("hands the data on", "md/raid_disks is 1"),
        "raid1" | "raid10" => layer
            .does("sends the data to each mirror by itself: the mirrors diverge", evidence)
            .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently })
            .redundant(),
        "raid4" | "raid5" | "raid6" => parity(dir, layer),
        _ => layer.unknown("what this level of md does with the data is not known here", None),
    }
}

fn parity(dir: &Dir, layer: Layer) -> Layer {
    let layer = layer.redundant();
    match dir.flag("md/skip_copy") {
        Some(false) => layer
            .does("copies the data before it computes parity", "md/skip_copy is 0")
            .writes(Writes::Copies),
        Some(true) => {
            let remedy = format!("echo 0 > /sys/block/{}/md/skip_copy", layer.name);
            layer
                .does("reads the data more than once, to compute parity: a rebuild then damages other data", "md/skip_copy is 1")
                .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently })
                .remedy(remedy)
        }
        None => {
            layer.does("computes parity", "md/skip_copy can not be read").writes(Writes::Unknown {
                why: "md/skip_copy can not be read".to_owned(),
                root_would_show: None,
            })
        }
    }
}

/// Passes its pages on where it uses direct I/O itself; else everything goes
/// through the page cache of the file below.
fn loop_device(dir: &Dir, layer: Layer) -> Layer {
    let layer = match dir.flag("loop/dio") {
        Some(true) => layer.does("hands the data on to its file", "loop/dio is 1"),
        Some(false) => layer
            .does("copies the data into the page cache of its file", "loop/dio is 0")
            .writes(Writes::Copies)
            .reads(Reads::Copies),
        None => layer.unknown("loop/dio can not be read", None),
    };
    flagged_by_itself(dir, layer)
}

fn walk_backing_file(walk: &mut Walk<'_>, dir: &Dir, depth: usize) {
    let Some(file) = dir.text("loop/backing_file") else { return };
    let path = walk.host.inside(Path::new(&file));
    match Subject::of_path(&path) {
        Ok(subject) => drop(fs::walk_subject(walk, &subject, &path, depth)),
        Err(_) => {
            let layer = Layer::new(depth, file, "file");
            let root = walk.host.root_would_show("the file below the loop device");
            walk.push(layer.unknown("it is not to be found under this name here", root));
        }
    }
}

fn zram(layer: Layer) -> Layer {
    layer
        .does("reads the data more than once, to compress it", "stable_writes")
        .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::Silently })
}

fn drbd(layer: Layer) -> Layer {
    layer
        .does("writes the data here and sends it to its peer: the two diverge", "a DRBD device")
        .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently })
        .redundant()
}

/// With the checksums of its messages, which are the default, the flag is
/// set. What does not match is refused by the server and sent again.
fn rbd(host: &Host, dir: &Dir, layer: Layer) -> Layer {
    let options = rbd_options(host, &layer.name);
    let summed = dir.flag(STABLE_WRITES);
    let layer = match summed {
        Some(true) => layer
            .does("reads the data more than once, to sum it", "stable_writes")
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting })
            .remedy("map the image with the options nocrc or ms_mode=secure"),
        Some(false) => layer.does("sends the data once", "stable_writes is 0"),
        None => return layer.unknown("queue/stable_writes can not be read", None),
    };
    if summed == Some(false) {
        return layer;
    }
    match options {
        Some(options) if options.split(',').any(|option| option == "rxbounce") => layer,
        Some(_) => layer.reads(Reads::Verifies { radius: Radius::Issuer }),
        None => layer.reads(Reads::Unknown {
            why: "whether it was mapped with rxbounce can not be read".to_owned(),
            root_would_show: host.root_would_show("the options it was mapped with"),
        }),
    }
}

/// `ADDRESSES OPTIONS POOL IMAGE SNAPSHOT`, for root only.
fn rbd_options(host: &Host, name: &str) -> Option<String> {
    let number = name.strip_prefix("rbd")?;
    let config = host.sysfs(&format!("bus/rbd/devices/{number}"))?.text("config_info")?;
    config.split_ascii_whitespace().nth(1).map(str::to_owned)
}

fn bcache(dir: &Dir, layer: Layer) -> Layer {
    let mode = dir.choice("bcache/cache_mode").unwrap_or_default();
    let evidence = format!("bcache/cache_mode is {mode}");
    match mode.as_str() {
        "writethrough" => layer
            .does("writes the data to the cache and to the disk: the two diverge", evidence)
            .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently }),
        "writearound" | "none" => layer.does("hands the data on", evidence),
        _ => layer.unknown("whether it sums the data in this mode is not known here", None),
    }
}

fn nvme(dir: &Dir, layer: Layer) -> Layer {
    match dir.text("device/transport").as_deref() {
        Some("loop") => layer.unknown("what lies below the target is not known here", None),
        Some(transport @ ("tcp" | "rdma" | "fc")) => {
            let kind = format!("nvme over {transport}");
            Layer { kind, ..layer }
        }
        _ => layer,
    }
}

fn scsi(host: &Host, dir: &Dir, layer: Layer) -> Layer {
    let Some(session) = iscsi_session(dir) else { return disk(dir, layer) };
    let layer = Layer { kind: "iscsi disk".to_owned(), ..layer };
    match data_digests(host, &session) {
        Some(true) => layer
            .does("has the data read more than once, to digest it", "iSCSI data digests are on")
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting })
            .reads(Reads::Verifies { radius: Radius::Issuer })
            .remedy("log in without data digests"),
        Some(false) => disk(dir, layer),
        None => {
            let root = host.root_would_show("iSCSI data digests");
            layer.unknown("its iSCSI digests can not be read", root)
        }
    }
}

/// `…/host3/session1/target3:0:0/3:0:0:0/block/sda`.
fn iscsi_session(dir: &Dir) -> Option<String> {
    let mut names = dir.path().components().map(|c| c.as_os_str().to_string_lossy().into_owned());
    let session = |name: &String| {
        let number = name.strip_prefix("session");
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    names.rfind(session)
}

/// Whether some connection of the session has them; connections are called
/// `connection<session>:<number>`.
fn data_digests(host: &Host, session: &str) -> Option<bool> {
    let number = session.strip_prefix("session")?;
    let prefix = format!("connection{number}:");
    let connections = host.sysfs("class/iscsi_connection")?.dirs("");
    let flags: Vec<Option<bool>> = connections
        .iter()
        .filter(|connection| connection.name().starts_with(&prefix))
        .map(|connection| connection.flag("data_digest"))
        .collect();
    match () {
        () if flags.contains(&Some(true)) => Some(true),
        () if flags.is_empty() || flags.contains(&None) => None,
        () => Some(false),
    }
}

/// A disk that takes the data once, unless protection information or its
/// driver's flag says otherwise.
fn disk(dir: &Dir, layer: Layer) -> Layer {
    if matches!(layer.writes, Writes::Unknown { .. }) {
        return layer;
    }
    let stable = dir.flag(STABLE_WRITES);
    let protection = dir.dir("integrity").and_then(|integrity| protection(&integrity));
    if let Some(Protection { format, generates, verifies }) = protection {
        let evidence = format!("integrity/format is {format}");
        let layer = layer.does("takes the data once", evidence.clone());
        let layer = match generates {
            true => layer
                .does("has the data read more than once, to sum it", evidence)
                .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting }),
            false => layer,
        };
        return match verifies {
            true => layer.reads(Reads::Verifies { radius: Radius::Issuer }),
            false => layer,
        };
    }
    match stable {
        Some(false) => layer.does("takes the data once", "queue/stable_writes is 0"),
        // Of a data digest over the network, for one.
        Some(true) => layer
            .does("has the data read more than once", "stable_writes")
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting })
            .reads(Reads::Unknown {
                why: "what the driver sums is not known here".to_owned(),
                root_would_show: None,
            }),
        None => layer.unknown("queue/stable_writes can not be read", None),
    }
}

struct Protection {
    format: String,
    generates: bool,
    verifies: bool,
}

/// Protection information that the kernel makes and checks; a switch that
/// can not be read is taken for on.
fn protection(integrity: &Dir) -> Option<Protection> {
    let format = integrity.text("format")?;
    if ["", "none", "nop"].contains(&format.as_str()) {
        return None;
    }
    let on = |name: &str| integrity.flag(name).unwrap_or(true);
    Some(Protection { generates: on("write_generate"), verifies: on("read_verify"), format })
}

/// A device on others inherits the flag from them. Where none of them has it,
/// its own driver asks for it.
fn flagged_by_itself(dir: &Dir, layer: Layer) -> Layer {
    let below = dir.dirs("slaves");
    let own = dir.flag(STABLE_WRITES) == Some(true)
        && !below.iter().any(|slave| queue_of(slave).flag(STABLE_WRITES) == Some(true));
    if !own || !matches!(layer.writes, Writes::Passes) {
        return layer;
    }
    layer
        .does("reads the data more than once", "stable_writes")
        .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::Silently })
}

fn unknown_kind(dir: &Dir, layer: Layer) -> Layer {
    match dir.flag(STABLE_WRITES) {
        Some(true) => layer
            .does("reads the data more than once", "stable_writes")
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::Silently }),
        _ => layer.unknown("what this kind of device does with the data is not known here", None),
    }
}

/// Whether the device says that it needs data that does not change.
pub(crate) fn stable_writes(host: &Host, number: DeviceNumber) -> Option<bool> {
    queue_of(&dir_of(host, number)?).flag(STABLE_WRITES)
}

/// What direct I/O on the device must be aligned to.
pub(crate) fn alignment(host: &Host, number: DeviceNumber) -> Option<Alignment> {
    let dir = queue_of(&dir_of(host, number)?);
    let offset_bytes: u32 = dir.number("queue/logical_block_size")?;
    let mask: u32 = dir.number("queue/dma_alignment").unwrap_or(offset_bytes.saturating_sub(1));
    Some(Alignment { memory_bytes: mask.saturating_add(1), offset_bytes })
}

/// What the device says of atomic writes.
pub(crate) fn atomic_writes(host: &Host, number: DeviceNumber) -> Option<AtomicWrites> {
    let dir = queue_of(&dir_of(host, number)?);
    let max_bytes: u32 = dir.number("queue/atomic_write_unit_max_bytes")?;
    let min_bytes = dir.number("queue/atomic_write_unit_min_bytes")?;
    (max_bytes > 0).then_some(AtomicWrites { min_bytes, max_bytes })
}

pub(crate) fn dir_of(host: &Host, number: DeviceNumber) -> Option<Dir> {
    host.sysfs(&format!("dev/block/{number}"))
}

/// A partition has its disk's queue.
fn queue_of(dir: &Dir) -> Dir {
    match dir.parent() {
        Some(disk) if dir.has("partition") => disk,
        _ => dir.clone(),
    }
}
