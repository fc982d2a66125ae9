//! File systems: what each does with a direct write or read, by kernel, and
//! which devices lie below it.

use std::path::{Path, PathBuf};

use rustix::fs::{FileType, IFlags};

use crate::host::{Host, Walk};
use crate::kernel::{BTRFS_BOUNCES, BTRFS_FALLS_BACK, XFS_BOUNCES};
use crate::mountinfo::Mount;
use crate::subject::{Direct, Kind, Subject};
use crate::sysfs::Dir;
use crate::{DeviceNumber, DirectWrite, Layer, Radius, Reads, Shows, Tristate, Writes, device};

/// These keep nothing that a program writes to a file.
const PSEUDO: [&str; 29] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "pstore",
    "configfs",
    "fusectl",
    "mqueue",
    "hugetlbfs",
    "autofs",
    "binfmt_misc",
    "efivarfs",
    "rpc_pipefs",
    "selinuxfs",
    "nsfs",
    "resctrl",
    "sockfs",
    "pipefs",
    "nfsd",
    "smackfs",
    "fuse.lxcfs",
    "fuse.portal",
    "fuse.gvfsd-fuse",
];
const IN_MEMORY: [&str; 4] = ["tmpfs", "ramfs", "devtmpfs", "hugetlbfs"];
const READ_ONLY: [&str; 5] = ["squashfs", "erofs", "iso9660", "cramfs", "romfs"];
/// No checksums, no copies, no bounce: the program's memory goes to the
/// device.
const PLAIN: [&str; 16] = [
    "ext2", "ext3", "ext4", "f2fs", "jfs", "vfat", "msdos", "exfat", "ntfs3", "hfs", "hfsplus",
    "gfs2", "ocfs2", "nilfs2", "reiserfs", "udf",
];

/// Whether programs keep files there.
pub(crate) fn holds_files(kind: &str) -> bool {
    !PSEUDO.contains(&kind)
}

/// The options that make a difference here.
pub(crate) fn relevant_options(mount: &Mount) -> Vec<String> {
    const NAMES: [&str; 20] = [
        "ro",
        "data",
        "dax",
        "nodatasum",
        "nodatacow",
        "compress",
        "compress-force",
        "rtdev",
        "upperdir",
        "lowerdir",
        "sec",
        "vers",
        "seal",
        "sign",
        "nocrc",
        "replicas",
        "nocow",
        "data_checksum",
        "subvol",
        "datasum",
    ];
    let name = |option: &&String| NAMES.contains(&option.split('=').next().unwrap_or_default());
    mount.options.iter().filter(name).cloned().collect()
}

/// Adds the layers of a file and of all below it.
pub(crate) fn walk_subject(
    walk: &mut Walk<'_>,
    subject: &Subject<'_>,
    name: &Path,
    depth: usize,
) -> DirectWrite {
    match subject.kind {
        Kind::BlockDevice(number) => {
            device::walk(walk, number, depth);
            DirectWrite::StraightThrough
        }
        _ => {
            let mount = walk.host.mount_of(subject, name);
            self::walk(walk, &mount, subject, depth)
        }
    }
}

/// The same, with the mount already found.
pub(crate) fn walk(
    walk: &mut Walk<'_>,
    mount: &Mount,
    subject: &Subject<'_>,
    depth: usize,
) -> DirectWrite {
    let layer = Layer::new(depth, &mount.kind, &mount.kind);
    let kind = mount.kind.as_str();
    if IN_MEMORY.contains(&kind) || PSEUDO.contains(&kind) {
        return not_direct(walk, layer, "copies the data into memory", "it lies in memory");
    }
    if READ_ONLY.contains(&kind) {
        return not_direct(walk, layer, "can not be written to", "it is read only");
    }
    if subject.dax {
        let why = "its files are mapped storage, which the processor copies to";
        return not_direct(walk, layer, "copies the data to the storage", why);
    }
    match kind {
        "overlay" => return overlay(walk, mount, layer),
        "btrfs" => return btrfs(walk, mount, subject, layer),
        "zfs" => return zfs(walk, layer),
        "bcachefs" => return bcachefs(walk, mount, layer),
        _ => {}
    }
    if subject.direct == Direct::Refused || journals_data(mount, subject) {
        let does = "sends this file's data through the page cache";
        let written = not_direct(walk, layer, does, "this file takes no direct I/O");
        below(walk, mount, depth + 1);
        return written;
    }
    match kind {
        "xfs" => xfs(walk, mount, layer),
        "nfs" | "nfs4" => remote(walk, nfs(mount, layer)),
        "cifs" | "smb3" => remote(walk, smb(mount, layer)),
        "ceph" => remote(walk, ceph(mount, layer)),
        "9p" | "virtiofs" => {
            let why = "it hands the pages to another machine's server";
            remote(walk, layer.unknown(why, None))
        }
        _ if kind == "fuse" || kind == "fuseblk" || kind.starts_with("fuse.") => {
            let why = "whether its daemon gets a copy or the pages is not known here";
            remote(walk, layer.unknown(why, None))
        }
        _ if PLAIN.contains(&kind) => {
            let layer = layer.does("hands the data on", "this file system has no bounce");
            straight_through(walk, mount, layer)
        }
        _ => {
            let why = "what this file system does with the data is not known here";
            let layer = layer.unknown(why, None);
            walk.push(layer);
            below(walk, mount, depth + 1);
            DirectWrite::Unknown { why: why.to_owned() }
        }
    }
}

fn not_direct(walk: &mut Walk<'_>, layer: Layer, does: &str, why: &str) -> DirectWrite {
    walk.push(layer.does(does, why).writes(Writes::Copies).reads(Reads::Copies));
    DirectWrite::NotDirect { why: why.to_owned() }
}

fn straight_through(walk: &mut Walk<'_>, mount: &Mount, layer: Layer) -> DirectWrite {
    let depth = layer.depth;
    walk.push(layer);
    below(walk, mount, depth + 1);
    DirectWrite::StraightThrough
}

fn remote(walk: &mut Walk<'_>, layer: Layer) -> DirectWrite {
    let answer = match &layer.writes {
        Writes::Unknown { why, .. } => DirectWrite::Unknown { why: why.clone() },
        Writes::Copies => DirectWrite::Bounced { since: None },
        Writes::Passes | Writes::Twice { .. } => DirectWrite::StraightThrough,
    };
    walk.push(layer);
    answer
}

/// ext4 and the like: data that is journalled is not written directly.
fn journals_data(mount: &Mount, subject: &Subject<'_>) -> bool {
    if !["ext3", "ext4"].contains(&mount.kind.as_str()) {
        return false;
    }
    mount.option("data") == Some("journal")
        || subject.flags().is_some_and(|flags| flags.contains(IFlags::JOURNALING))
}

/// Bounces since 7.0, both ways, where its device sets the flag; before, the
/// program's memory went down as it was.
fn xfs(walk: &mut Walk<'_>, mount: &Mount, layer: Layer) -> DirectWrite {
    let devices = xfs_devices(walk.host, mount);
    let flags: Vec<_> = devices.iter().map(|d| device::stable_writes(walk.host, *d)).collect();
    let kernel = walk.host.kernel();
    let flagged = flags.contains(&Some(true));
    let depth = layer.depth;
    let (layer, answer) = match kernel {
        // A file lies on the data device or on the other one.
        Some(kernel)
            if kernel >= XFS_BOUNCES && flags.iter().all(|f| *f == Some(true)) && flagged =>
        {
            let layer = layer
                .does(
                    "copies the data, as its device asks for data that does not change",
                    "Linux 7.0 or later, stable_writes",
                )
                .writes(Writes::Copies)
                .reads(Reads::Copies);
            (layer, DirectWrite::Bounced { since: Some(XFS_BOUNCES) })
        }
        Some(_) if !flagged && flags.iter().all(Option::is_some) => {
            let layer = layer.does("hands the data on", "its device does not set stable_writes");
            (layer, DirectWrite::StraightThrough)
        }
        Some(kernel) if kernel < XFS_BOUNCES => {
            let layer = layer
                .does("hands the data on", "it copies since Linux 7.0")
                .remedy("use Linux 7.0 or later, which copies there");
            (layer, DirectWrite::StraightThrough)
        }
        _ => {
            let why = "whether it copies here is not known: kernel version or stable_writes";
            (layer.unknown(why, None), DirectWrite::Unknown { why: why.to_owned() })
        }
    };
    walk.push(layer);
    if devices.len() < 1 + usize::from(mount.option("rtdev").is_some()) {
        walk.physical.push(None);
    }
    for device in devices {
        device::walk(walk, device, depth + 1);
    }
    answer
}

fn xfs_devices(host: &Host, mount: &Mount) -> Vec<DeviceNumber> {
    let real_time = mount.option("rtdev").and_then(|path| number_of_path(host, path));
    [device_of(host, mount), real_time].into_iter().flatten().collect()
}

/// Checksums make it read the data twice; so do the profiles with copies or
/// parity, for data without checksums.
fn btrfs(walk: &mut Walk<'_>, mount: &Mount, subject: &Subject<'_>, layer: Layer) -> DirectWrite {
    let host = walk.host;
    let pool = btrfs_pool(host, mount);
    let checksums = btrfs_checksums(host, mount, subject);
    let redundant = pool.as_ref().and_then(btrfs_redundant);
    let depth = layer.depth;
    let (layer, answer) = match checksums.present {
        Tristate::Yes => btrfs_summed(host, layer, redundant),
        Tristate::No => btrfs_unsummed(layer, redundant, &checksums.evidence),
        Tristate::Unknown => btrfs_unsure(host, layer, redundant, checksums),
    };
    let layer = if redundant == Some(false) { layer } else { layer.redundant() };
    walk.push(layer);
    match pool {
        Some(pool) => {
            pool.dirs("devices").iter().for_each(|d| device::walk_dir(walk, d, depth + 1))
        }
        None => below(walk, mount, depth + 1),
    }
    answer
}

fn btrfs_summed(host: &Host, layer: Layer, redundant: Option<bool>) -> (Layer, DirectWrite) {
    let Some(kernel) = host.kernel() else {
        let why = "the kernel's version is not known";
        return (layer.unknown(why, None), DirectWrite::Unknown { why: why.to_owned() });
    };
    let verifies = Reads::Verifies { radius: Radius::Issuer };
    if kernel >= BTRFS_BOUNCES {
        let layer = layer
            .does(
                "copies the data before it sums it",
                format!("data checksums, Linux {BTRFS_BOUNCES} or later"),
            )
            .writes(Writes::Copies)
            .reads(Reads::Copies);
        return (layer, DirectWrite::Bounced { since: Some(BTRFS_BOUNCES) });
    }
    if let Some(since) = kernel.btrfs_falls_back() {
        let layer = layer
            .does(
                "writes through the page cache, but verifies direct reads in the program's memory",
                format!("data checksums, Linux {since} or later"),
            )
            .writes(Writes::Copies)
            .reads(verifies)
            .remedy(format!(
                "use Linux {BTRFS_BOUNCES} or later, or files without checksums (chattr +C)"
            ));
        return (layer, DirectWrite::BufferedFallback { since: Some(since) });
    }
    let radius = if redundant == Some(false) { Radius::Issuer } else { Radius::Everyone };
    let layer = layer
        .does(
            "reads the data more than once, to sum it",
            format!("data checksums, Linux before {BTRFS_FALLS_BACK}"),
        )
        .writes(Writes::Twice { radius, shows: Shows::ErrorReading })
        .reads(verifies)
        .remedy(format!(
            "use Linux {BTRFS_BOUNCES} or later, or files without checksums (chattr +C)"
        ));
    (layer, DirectWrite::StraightThrough)
}

/// With checksums or without: what is the same in both cases is known.
fn btrfs_unsure(
    host: &Host,
    layer: Layer,
    redundant: Option<bool>,
    checksums: Checksums,
) -> (Layer, DirectWrite) {
    let Checksums { evidence, root_would_show, .. } = checksums;
    let answer = DirectWrite::Unknown { why: evidence.clone() };
    let sure = layer.clone().does("copies the data or hands it on", evidence.clone());
    let unsure = layer.unknown(&evidence, root_would_show);
    let kernel = host.kernel().filter(|_| redundant == Some(false));
    let layer = match kernel {
        Some(kernel) if kernel >= BTRFS_BOUNCES => sure,
        Some(kernel) if kernel.btrfs_falls_back().is_some() => sure.reads(unsure.reads),
        _ => unsure,
    };
    (layer, answer)
}

fn btrfs_unsummed(layer: Layer, redundant: Option<bool>, evidence: &str) -> (Layer, DirectWrite) {
    let layer = match redundant {
        Some(false) => layer.does("hands the data on", evidence),
        Some(true) => layer
            .does("writes the data more than once, or computes parity, without checksums: the copies diverge", evidence)
            .writes(Writes::Twice { radius: Radius::Everyone, shows: Shows::Silently }),
        None => layer.unknown("whether its data has copies or parity can not be read", None),
    };
    (layer, DirectWrite::StraightThrough)
}

struct Checksums {
    present: Tristate,
    evidence: String,
    root_would_show: Option<String>,
}

/// By the inode's flag; a mount option counts for what is made under it.
fn btrfs_checksums(host: &Host, mount: &Mount, subject: &Subject<'_>) -> Checksums {
    let answer = |present, evidence: &str| Checksums {
        present,
        evidence: evidence.to_owned(),
        root_would_show: None,
    };
    let option = ["nodatasum", "nodatacow"].into_iter().find(|o| mount.option(o).is_some());
    match (subject.flags(), option) {
        (Some(flags), _) if flags.contains(IFlags::NOCOW) => {
            answer(Tristate::No, "no checksums: the attribute C is set")
        }
        (_, Some(option)) if subject.kind == Kind::Dir => {
            answer(Tristate::No, &format!("no checksums of new files: mounted with {option}"))
        }
        (_, Some(option)) => answer(
            Tristate::Unknown,
            &format!("mounted with {option}, but the file may be older than that"),
        ),
        (Some(_), None) => answer(Tristate::Yes, "data checksums"),
        (None, None) if subject.kind == Kind::Dir => answer(Tristate::Yes, "data checksums"),
        (None, None) => Checksums {
            root_would_show: host.root_would_show("its attributes (lsattr)"),
            ..answer(Tristate::Unknown, "whether the file has checksums can not be read")
        },
    }
}

/// `/sys/fs/btrfs/UUID` of the pool that the mounted device belongs to.
fn btrfs_pool(host: &Host, mount: &Mount) -> Option<Dir> {
    let device = number_of_path(host, &mount.source)?;
    let pools = host.sysfs("fs/btrfs")?.dirs("");
    let has = |pool: &Dir| {
        pool.dirs("devices").iter().any(|member| member.device_number() == Some(device))
    };
    pools.into_iter().find(has)
}

/// Whether some data has copies or parity; there may be several profiles, in
/// the middle of a conversion.
fn btrfs_redundant(pool: &Dir) -> Option<bool> {
    let groups =
        ["data", "mixed"].into_iter().filter_map(|kind| pool.dir(&format!("allocation/{kind}")));
    let profiles: Vec<String> =
        groups.flat_map(|group| group.dirs("")).map(|profile| profile.name()).collect();
    match profiles.is_empty() {
        true => None,
        false => Some(profiles.iter().any(|p| !["single", "raid0"].contains(&p.as_str()))),
    }
}

/// Since 2.3 it writes directly: it sums, writes, and sums again before the
/// block can be reached. A mismatch is the writer's error. Reads that do not
/// match are repeated through its cache.
fn zfs(walk: &mut Walk<'_>, layer: Layer) -> DirectWrite {
    let module = walk.host.sysfs("module/zfs");
    let version = module.as_ref().and_then(|m| m.text("version"));
    let direct =
        version.as_deref().and_then(crate::Kernel::parse).map(|v| v >= crate::Kernel::new(2, 3));
    let switch = |name: &str| module.as_ref().and_then(|m| m.flag(&format!("parameters/{name}")));
    let (layer, answer) = match direct {
        Some(false) => (cached_zfs(layer, "ZFS before 2.3"), not_direct_zfs()),
        Some(true) if switch("zfs_dio_enabled") == Some(false) => {
            (cached_zfs(layer, "zfs_dio_enabled is 0"), not_direct_zfs())
        }
        Some(true) => {
            let verified = switch("zfs_vdev_direct_write_verify") == Some(true);
            let shows = if verified { Shows::ErrorWriting } else { Shows::ErrorReading };
            let layer = layer
                .does(
                    "reads the data more than once, to sum it",
                    "ZFS 2.3 or later, unless direct=disabled",
                )
                .writes(Writes::Twice { radius: Radius::Issuer, shows })
                .remedy("zfs set direct=disabled");
            (layer, DirectWrite::StraightThrough)
        }
        None => {
            let why = "the version of ZFS can not be read";
            (layer.unknown(why, None), DirectWrite::Unknown { why: why.to_owned() })
        }
    };
    walk.push(layer);
    answer
}

fn cached_zfs(layer: Layer, evidence: &str) -> Layer {
    layer
        .does("copies the data into its cache", evidence)
        .writes(Writes::Copies)
        .reads(Reads::Copies)
}

fn not_direct_zfs() -> DirectWrite {
    DirectWrite::NotDirect { why: "this ZFS sends everything through its cache".to_owned() }
}

/// Bounces what it sums; reads that do not match are repeated privately.
fn bcachefs(walk: &mut Walk<'_>, mount: &Mount, layer: Layer) -> DirectWrite {
    let depth = layer.depth;
    let unsummed = mount.option("nocow").is_some() || mount.option("data_checksum") == Some("none");
    let (layer, answer) = if unsummed {
        let why = "without checksums it may hand the data on to several devices";
        (layer.unknown(why, None), DirectWrite::Unknown { why: why.to_owned() })
    } else {
        let layer = layer
            .does("copies the data before it sums it", "data checksums")
            .writes(Writes::Copies);
        (layer, DirectWrite::Bounced { since: None })
    };
    walk.push(layer.redundant());
    for source in mount.source.split(':') {
        match number_of_path(walk.host, source) {
            Some(number) => device::walk(walk, number, depth + 1),
            None => walk.physical.push(None),
        }
    }
    answer
}

/// Direct I/O goes to the file of the upper layer, where writes go.
fn overlay(walk: &mut Walk<'_>, mount: &Mount, layer: Layer) -> DirectWrite {
    let upper = mount.option("upperdir").or_else(|| mount.option("lowerdir")?.split(':').next());
    let upper = upper.map(|path| walk.host.inside(Path::new(path)));
    let found = upper.as_ref().and_then(|path| Some((path, Subject::of_path(path).ok()?)));
    let Some((path, subject)) = found else {
        let why = "its upper directory is not to be found here";
        let root = walk.host.root_would_show("the file system of the upper directory");
        walk.push(layer.unknown(why, root));
        return DirectWrite::Unknown { why: why.to_owned() };
    };
    let depth = layer.depth;
    let evidence = format!("upperdir {}", path.display());
    if !walk.push(layer.does("hands the data on to its upper directory", evidence)) {
        return DirectWrite::Unknown { why: "the stack is too deep to be true".to_owned() };
    }
    walk_subject(walk, &subject, path, depth + 1)
}

/// A request that is sent again is read again, whole, and stored whole. Only
/// what sums it, or sends it to several servers, is hurt.
fn nfs(mount: &Mount, layer: Layer) -> Layer {
    let version = mount.option("vers").unwrap_or_default();
    match mount.option("sec") {
        Some("krb5i") => layer
            .does("reads the data more than once, to sum it", "mounted with sec=krb5i")
            .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting })
            .reads(Reads::Verifies { radius: Radius::Issuer })
            .remedy("mount it with sec=krb5p or sec=sys"),
        Some("krb5p") => layer
            .does("encrypts into memory of its own", "mounted with sec=krb5p")
            .writes(Writes::Copies),
        _ if version.starts_with('3') || version == "4.0" || version == "4" => {
            layer.does("sends the data once", format!("NFS version {version}"))
        }
        _ => layer.unknown("it may send the data to several servers (pNFS)", None),
    }
}

fn smb(mount: &Mount, layer: Layer) -> Layer {
    if mount.option("seal").is_some() {
        return layer
            .does("encrypts into memory of its own", "mounted with seal")
            .writes(Writes::Copies);
    }
    layer.unknown("whether it signs what it sends is agreed on with the server", None)
}

fn ceph(mount: &Mount, layer: Layer) -> Layer {
    if mount.option("nocrc").is_some() {
        return layer.does("sends the data once", "mounted with nocrc");
    }
    layer
        .does(
            "reads the data more than once, to sum it",
            "messages are summed unless mounted with nocrc",
        )
        .writes(Writes::Twice { radius: Radius::Issuer, shows: Shows::ErrorWriting })
        .reads(Reads::Verifies { radius: Radius::Issuer })
        .remedy("mount it with nocrc")
}

/// The devices below a file system that has one.
fn below(walk: &mut Walk<'_>, mount: &Mount, depth: usize) {
    match device_of(walk.host, mount) {
        Some(number) => device::walk(walk, number, depth),
        None => {
            let layer = Layer::new(depth, &mount.source, "block device");
            walk.push(layer.unknown("which device lies below is not known here", None));
            walk.physical.push(None);
        }
    }
}

/// The block device of a file system, if it has exactly one.
pub(crate) fn device_of(host: &Host, mount: &Mount) -> Option<DeviceNumber> {
    if mount.device.major != 0 {
        return Some(mount.device);
    }
    number_of_path(host, &mount.source)
}

/// The number of a device node; of one that is not there, by its name in
/// `/sys`.
fn number_of_path(host: &Host, path: &str) -> Option<DeviceNumber> {
    if !path.starts_with('/') {
        return None;
    }
    let node: PathBuf = host.inside(Path::new(path));
    if let Ok(stat) = rustix::fs::stat(&node)
        && FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
    {
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        return Some(DeviceNumber { major, minor });
    }
    let name = Path::new(path).file_name()?.to_str()?.to_owned();
    host.sysfs(&format!("class/block/{name}"))?.device_number()
}

/// What can be said of a file on a mount that this namespace does not have.
pub(crate) fn mount_unseen(subject: &Subject<'_>) -> Mount {
    /// `f_type`, statfs(2).
    const MAGIC: [(u64, &str); 12] = [
        (0xef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x8584_58f6, "ramfs"),
        (0x2fc1_2fc1, "zfs"),
        (0xca45_1a4e, "bcachefs"),
        (0x794c_7630, "overlay"),
        (0xf2f5_2010, "f2fs"),
        (0x6969, "nfs"),
        (0x6573_5546, "fuse"),
        (0x0102_1997, "9p"),
    ];
    let magic = subject.magic();
    let kind = MAGIC.iter().find(|(number, _)| Some(*number) == magic).map_or("unknown", |m| m.1);
    Mount {
        id: 0,
        device: subject.device.unwrap_or(DeviceNumber { major: 0, minor: 0 }),
        root: PathBuf::new(),
        mount_point: PathBuf::new(),
        kind: kind.to_owned(),
        source: "(mounted elsewhere)".to_owned(),
        options: Vec::new(),
    }
}
