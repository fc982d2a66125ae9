//! What is said of stacks that no single machine has: each is made of files.

mod bed;

use Tristate::{No, Unknown, Yes};
use bed::Bed;
use proptest::prelude::*;
use stableio_inspect::{
    DirectWrite, Host, NoTable, Radius, Report, Shows, Tristate, Verdict, Writes,
};

const OLD: &str = "6.1.0-18-amd64";
const NOW: &str = "6.18.44";
const NEW: &str = "7.3.1";

fn answers(report: &Report) -> (Tristate, Tristate) {
    (report.samples_writes_twice(), report.verifies_reads())
}

/// A file system of this kind on a disk with these attributes.
fn on_disk(kind: &str, disk: &str, stable: bool, attributes: &[(&str, &str)]) -> Bed {
    let mut bed = Bed::new();
    let number = bed.disk(disk, stable, attributes);
    bed.mount(&number, "/mnt", kind, &format!("/dev/{disk}"), "");
    bed
}

#[test]
fn a_plain_disk_is_safe() {
    for (kind, disk) in [("ext4", "vda"), ("xfs", "nvme0n1"), ("ext4", "sda"), ("f2fs", "mmcblk0")]
    {
        let report = on_disk(kind, disk, false, &[]).report(NOW);
        assert_eq!(answers(&report), (No, No), "{report:#?}");
        assert_eq!(report.verdict, Verdict::Safe);
        assert_eq!(report.direct_write, DirectWrite::StraightThrough);
        assert_eq!((report.write_radius, report.read_radius), (Radius::Nobody, Radius::Nobody));
        let alignment = report.alignment.unwrap();
        assert_eq!((alignment.memory_bytes, alignment.offset_bytes), (4, 512));
    }
}

#[test]
fn a_partition_has_its_disks_queue() {
    let mut bed = Bed::new();
    bed.disk("zram7", true, &[]);
    let number = bed.partition("zram7", "zram7p1");
    bed.mount(&number, "/mnt", "xfs", "/dev/zram7p1", "");
    let report = bed.report(NOW);
    assert_eq!(answers(&report), (Yes, No));
    let names: Vec<_> = report.layers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["xfs", "zram7p1", "zram7"]);
    assert!(matches!(bed.report(NEW).direct_write, DirectWrite::Bounced { .. }));
}

#[test]
fn zram_is_at_risk_until_xfs_bounces_and_below_ext4_for_ever() {
    let xfs = on_disk("xfs", "zram1", true, &[]);
    for kernel in [OLD, NOW, "6.19"] {
        let report = xfs.report(kernel);
        assert_eq!(answers(&report), (Yes, No));
        assert_eq!((report.write_radius, report.shows), (Radius::Issuer, Some(Shows::Silently)));
        assert_eq!(
            report.reason(),
            "zram1 reads the data more than once, to compress it (stable_writes)"
        );
        assert!(report.advice.contains("Linux 7.0"), "{}", report.advice);
    }
    for kernel in ["7.0", NEW] {
        let report = xfs.report(kernel);
        assert_eq!((answers(&report), &report.verdict), ((No, No), &Verdict::Safe));
        let DirectWrite::Bounced { since: Some(since) } = report.direct_write else {
            panic!("{report:#?}")
        };
        assert_eq!(since.to_string(), "7.0");
    }
    let report = on_disk("ext4", "zram1", true, &[]).report(NEW);
    assert_eq!((answers(&report), report.verdict), ((Yes, No), Verdict::AtRisk));
}

#[test]
fn an_unknown_kernel_is_never_taken_for_one_that_bounces() {
    let report = on_disk("xfs", "zram1", true, &[]).report("strange");
    assert_eq!(answers(&report).0, Yes);
    let report = on_disk("btrfs", "vda", false, &[]).report("strange");
    assert_eq!(answers(&report), (Unknown, Unknown));
    assert_eq!(report.write_radius, Radius::Everyone);
}

fn md(level: &str, stable: bool, more: &[(&str, &str)]) -> Bed {
    let mut bed = Bed::new();
    let attributes = [&[("md/level", level), ("md/raid_disks", "3")], more].concat();
    let number = bed.disk("md0", stable, &attributes);
    for disk in ["sda", "sdb", "sdc"] {
        bed.disk(disk, false, &[]);
        bed.slave("md0", disk);
    }
    bed.mount(&number, "/mnt", "xfs", "/dev/md0", "");
    bed
}

#[test]
fn md_by_its_level() {
    for level in ["raid1", "raid10"] {
        for kernel in [OLD, NOW, NEW] {
            let report = md(level, false, &[]).report(kernel);
            assert_eq!(answers(&report), (Yes, No), "{level} {kernel}");
            assert_eq!(
                (report.write_radius, report.shows),
                (Radius::Everyone, Some(Shows::Silently))
            );
            assert!(report.reason.starts_with("md0 "), "{}", report.reason);
        }
    }
    assert_eq!(answers(&md("raid0", false, &[]).report(NOW)), (No, No));
    for level in ["raid4", "raid5", "raid6"] {
        let copies = md(level, false, &[("md/skip_copy", "0")]).report(NOW);
        assert_eq!(answers(&copies), (No, No));
        let trusts = md(level, true, &[("md/skip_copy", "1")]);
        let report = trusts.report(NOW);
        assert_eq!((answers(&report), report.write_radius), ((Yes, No), Radius::Everyone));
        assert!(report.advice.contains("skip_copy"), "{}", report.advice);
        assert_eq!(trusts.report(NEW).verdict, Verdict::Safe, "XFS bounces where the flag is set");
        let report = md(level, false, &[]).report(NOW);
        assert_eq!(answers(&report), (Unknown, No));
    }
    assert_eq!(answers(&md("container", false, &[]).report(NOW)), (Unknown, Unknown));
}

#[test]
fn the_copy_of_a_layer_protects_all_below_it() {
    let mut bed = md("raid5", false, &[("md/skip_copy", "0")]);
    bed.disk("zram3", true, &[]);
    bed.slave("md0", "zram3");
    let report = bed.report(NOW);
    assert_eq!(answers(&report), (No, No), "zram sees the stripe cache: {report:#?}");
    let zram = report.layers.iter().find(|l| l.name == "zram3").unwrap();
    assert_eq!(zram.samples_writes_twice, Yes);
}

#[test]
fn one_of_several_devices_is_enough() {
    let mut bed = md("raid0", true, &[]);
    bed.disk("zram3", true, &[]);
    bed.slave("md0", "zram3");
    let report = bed.report(NOW);
    assert_eq!((answers(&report), report.write_radius), ((Yes, No), Radius::Issuer));
    assert!(report.reason.starts_with("zram3"));
}

#[test]
fn protection_information_is_an_error_to_the_writer() {
    let pi = [
        ("integrity/format", "T10-DIF-TYPE1-CRC"),
        ("integrity/read_verify", "1"),
        ("integrity/write_generate", "1"),
    ];
    let report = on_disk("ext4", "nvme0n1", true, &pi).report(NOW);
    assert_eq!(answers(&report), (Yes, Yes));
    assert_eq!((report.write_radius, report.shows), (Radius::Issuer, Some(Shows::ErrorWriting)));
    assert_eq!(on_disk("xfs", "nvme0n1", true, &pi).report("7.0").verdict, Verdict::Safe);
    let off = [
        ("integrity/format", "T10-DIF-TYPE1-CRC"),
        ("integrity/read_verify", "0"),
        ("integrity/write_generate", "0"),
    ];
    assert_eq!(answers(&on_disk("ext4", "nvme0n1", false, &off).report(NOW)), (No, No));
    let none = [("integrity/format", "none"), ("integrity/write_generate", "1")];
    assert_eq!(answers(&on_disk("ext4", "nvme0n1", false, &none).report(NOW)), (No, No));
}

#[test]
fn below_redundancy_an_error_costs_the_member() {
    let mut bed = Bed::new();
    let number = bed.disk("md0", true, &[("md/level", "raid1"), ("md/raid_disks", "2")]);
    for disk in ["nvme0n1", "nvme1n1"] {
        bed.disk(disk, true, &[("integrity/format", "EXT-DIF-TYPE1-CRC64")]);
        bed.slave("md0", disk);
    }
    bed.mount(&number, "/mnt", "ext4", "/dev/md0", "");
    let report = bed.report(NOW);
    assert_eq!((answers(&report), report.read_radius), ((Yes, Yes), Radius::Everyone));
}

#[test]
fn device_mapper_without_its_tables() {
    let dm = |uuid: &str, below: &[(&str, &str)]| {
        let mut bed = Bed::new();
        let number = bed.disk("dm-9", false, &[("dm/uuid", uuid), ("dm/name", "vg-lv")]);
        for (disk, name) in below {
            let named = [("dm/uuid", "LVM-x"), ("dm/name", *name)];
            bed.disk(disk, false, if disk.starts_with("dm") { &named } else { &[] });
            bed.slave("dm-9", disk);
        }
        bed.mount(&number, "/mnt", "ext4", "/dev/mapper/vg-lv", "");
        bed.report(NOW)
    };
    let plain = [("sda", "")];
    for (uuid, below, expected) in [
        ("LVM-abcdef", &plain[..], (No, No)),
        ("mpath-3600", &plain[..], (No, No)),
        ("part1-mpath-3600", &plain[..], (No, No)),
        ("CRYPT-LUKS2-0-name", &plain[..], (No, No)),
        ("CRYPT-INTEGRITY-name", &plain[..], (Unknown, Unknown)),
        ("CRYPT-VERITY-0-name", &plain[..], (Unknown, Unknown)),
        ("CRYPT-", &plain[..], (Unknown, Unknown)),
        ("", &plain[..], (Unknown, Unknown)),
        ("homemade", &plain[..], (Unknown, Unknown)),
        (
            "LVM-abcdef",
            &[("dm-1", "vg-lv_rimage_0"), ("dm-2", "vg-lv_rmeta_0")][..],
            (Unknown, Unknown),
        ),
        ("LVM-abcdef", &[("dm-1", "vg-lv_mimage_0"), ("dm-2", "vg-lv_mimage_1")][..], (Yes, No)),
        ("LVM-abcdef", &[("dm-1", "vg-pool-tpool")][..], (No, No)),
    ] {
        let report = dm(uuid, below);
        assert_eq!(answers(&report), expected, "{uuid} on {below:?}: {report:#?}");
        if let Verdict::Unknown { root_would_show, .. } = &report.verdict {
            assert!(root_would_show.as_ref().is_some_and(|what| what.contains("table")));
            assert!(report.advice.contains("root"), "{}", report.advice);
        }
    }
}

#[test]
fn device_mapper_with_its_tables() {
    let mut bed = Bed::new();
    let number = bed.disk("dm-0", false, &[("dm/uuid", "LVM-x"), ("dm/name", "vg-lv")]);
    bed.disk("sda", false, &[]);
    bed.slave("dm-0", "sda");
    bed.mount(&number, "/mnt", "ext4", "/dev/mapper/vg-lv", "");
    let with = |table: &str| {
        let table = table.to_owned();
        let host: Host = bed.host(NOW).with_tables(move |_| Ok(table.clone()));
        host.mounted().remove(0)
    };
    let mirrored = with("0 2048 raid raid1 3 0 region_size 1024 2 - 8:1 - 8:2");
    assert_eq!((answers(&mirrored), mirrored.write_radius), ((Yes, No), Radius::Everyone));
    assert_eq!(mirrored.layers[1].kind, "dm raid1");
    assert_eq!(answers(&with("0 2048 linear 8:1 2048")), (No, No));
    let failed = bed.host(NOW).with_tables(|_| Err(NoTable::Failed)).mounted().remove(0);
    assert_eq!(failed.verdict, Verdict::Safe, "a plain volume, by what lies below");
}

#[test]
fn dm_crypt_above_zram_copies() {
    let mut bed = Bed::new();
    let number = bed.disk("dm-0", true, &[("dm/uuid", "CRYPT-LUKS2-0-x"), ("dm/name", "x")]);
    bed.disk("zram1", true, &[]);
    bed.slave("dm-0", "zram1");
    bed.mount(&number, "/mnt", "ext4", "/dev/mapper/x", "");
    assert_eq!(answers(&bed.report(NOW)), (No, No));
}

fn loop_on(direct: &str) -> Bed {
    let mut bed = Bed::new();
    let zram = bed.disk("zram1", true, &[]);
    let number =
        bed.disk("loop0", false, &[("loop/backing_file", "/pool/disk.img"), ("loop/dio", direct)]);
    bed.write("/pool/disk.img", "content");
    bed.mount(&zram, "/pool", "ext4", "/dev/zram1", "");
    bed.mount(&number, "/mnt", "ext4", "/dev/loop0", "");
    bed
}

#[test]
fn a_loop_device_leads_on_to_its_file() {
    let of = |bed: &Bed| {
        let reports = bed.host(NOW).mounted();
        reports.into_iter().find(|r| r.path.ends_with("mnt")).unwrap()
    };
    let report = of(&loop_on("1"));
    assert_eq!(answers(&report), (Yes, No), "{report:#?}");
    let depths: Vec<_> = report.layers.iter().map(|l| (l.depth, l.name.as_str())).collect();
    assert_eq!(depths, [(0, "ext4"), (1, "loop0"), (2, "ext4"), (3, "zram1")]);
    let report = of(&loop_on("0"));
    assert_eq!(answers(&report), (No, No), "the page cache copies");
    assert_eq!(report.layers.len(), 4);

    let bed = loop_on("1");
    std::fs::remove_file(bed.path("/pool/disk.img")).unwrap();
    assert_eq!(answers(&of(&bed)), (Unknown, Unknown), "its file is not to be found");
}

#[test]
fn a_loop_device_on_itself_ends() {
    let mut bed = Bed::new();
    let number = bed.disk("loop0", false, &[("loop/backing_file", "/mnt/x"), ("loop/dio", "1")]);
    bed.mount(&number, "/mnt", "ext4", "/dev/loop0", "");
    bed.write("/mnt/x", "content");
    let report = bed.report(NOW);
    assert!(report.layers.len() < 100);
    assert_eq!(answers(&report), (Unknown, Unknown));
}

fn btrfs(profile: &str, options: &str) -> Bed {
    let mut bed = Bed::new();
    for disk in ["sda", "sdb"] {
        bed.disk(disk, false, &[]);
        bed.link(&format!("sys/fs/btrfs/1f-2e/devices/{disk}"), &format!("sys/class/block/{disk}"));
    }
    bed.write(&format!("sys/fs/btrfs/1f-2e/allocation/data/{profile}/used_bytes"), "1");
    bed.mount("0:39", "/mnt", "btrfs", "/dev/sda", options);
    bed
}

#[test]
fn btrfs_by_kernel_checksums_and_profile() {
    let report = btrfs("single", "").report(OLD);
    assert_eq!(answers(&report), (Yes, Yes));
    assert_eq!((report.write_radius, report.shows), (Radius::Issuer, Some(Shows::ErrorReading)));
    assert_eq!(btrfs("raid1", "").report(OLD).write_radius, Radius::Everyone);

    for kernel in ["6.12.77", "6.15", NOW, "7.2"] {
        let report = btrfs("raid1", "").report(kernel);
        assert_eq!(answers(&report), (No, Yes), "{kernel}");
        assert!(matches!(report.direct_write, DirectWrite::BufferedFallback { .. }));
        assert_eq!((report.write_radius, report.read_radius), (Radius::Nobody, Radius::Issuer));
        assert_eq!(report.verdict, Verdict::AtRisk);
    }
    let report = btrfs("raid1", "").report(NEW);
    assert_eq!((answers(&report), report.verdict), ((No, No), Verdict::Safe));
    assert!(matches!(report.direct_write, DirectWrite::Bounced { .. }));

    // Without checksums copies diverge; a single one does not.
    for kernel in [OLD, NOW, NEW] {
        for (profile, expected) in
            [("single", No), ("raid0", No), ("raid1", Yes), ("dup", Yes), ("raid5", Yes)]
        {
            let report = btrfs(profile, "nodatasum").report(kernel);
            assert_eq!(answers(&report), (expected, No), "{profile} {kernel}");
        }
    }
    assert_eq!(report_names(&btrfs("single", "").report(NOW)), ["btrfs", "sda", "sdb"]);
}

fn report_names(report: &Report) -> Vec<&str> {
    report.layers.iter().map(|layer| layer.name.as_str()).collect()
}

#[test]
fn a_file_that_may_be_older_than_nodatasum_is_unknown() {
    let bed = btrfs("single", "nodatasum");
    bed.write("/mnt/old", "content");
    for (kernel, expected) in [(OLD, (Unknown, Unknown)), (NOW, (No, Unknown)), (NEW, (No, No))] {
        let report = bed.host(kernel).of_path("/mnt/old".as_ref()).unwrap();
        assert_eq!(answers(&report), expected, "{kernel}");
    }
}

#[test]
fn other_devices() {
    for (disk, stable, attributes, expected) in [
        ("drbd0", true, &[][..], (Yes, No)),
        ("drbd0", false, &[], (Yes, No)),
        ("rbd0", true, &[], (Yes, Unknown)),
        ("rbd0", false, &[], (No, No)),
        ("nbd3", false, &[], (No, No)),
        ("ublkb0", false, &[], (Unknown, Unknown)),
        ("zd16", false, &[], (No, No)),
        ("bcache0", false, &[("bcache/cache_mode", "[writethrough] writeback")], (Yes, No)),
        ("bcache0", false, &[("bcache/cache_mode", "writethrough [none]")], (No, No)),
        ("bcache0", false, &[], (Unknown, Unknown)),
        ("nvme0n1", true, &[("device/transport", "tcp")], (Yes, Unknown)),
        ("nvme0n1", false, &[("device/transport", "tcp")], (No, No)),
        ("nvme0n1", false, &[("device/transport", "loop")], (Unknown, Unknown)),
        ("wonder0", false, &[], (Unknown, Unknown)),
        ("wonder0", true, &[], (Yes, No)),
    ] {
        let report = on_disk("ext4", disk, stable, attributes).report(NOW);
        assert_eq!(answers(&report), expected, "{disk} {attributes:?}");
    }
}

#[test]
fn rbd_by_the_options_it_was_mapped_with() {
    for (options, expected) in [("name=admin,rxbounce", (Yes, No)), ("name=admin", (Yes, Yes))] {
        let bed = on_disk("ext4", "rbd3", true, &[]);
        let config = format!("10.0.0.1:6789 {options} rbd image -\n");
        bed.write("sys/bus/rbd/devices/3/config_info", &config);
        assert_eq!(answers(&bed.report(NOW)), expected, "{options}");
    }
}

#[test]
fn iscsi_by_its_digests() {
    for (digest, expected) in
        [(Some("1"), (Yes, Yes)), (Some("0"), (No, No)), (None, (Unknown, Unknown))]
    {
        let mut bed = Bed::new();
        let dir = "sys/devices/platform/host3/session12/target3:0:0/3:0:0:0/block/sdq";
        let number = bed.disk_at(dir, digest == Some("1"), &[]);
        if let Some(digest) = digest {
            bed.write("sys/class/iscsi_connection/connection1:0/data_digest", "1");
            bed.write("sys/class/iscsi_connection/connection12:0/data_digest", digest);
        }
        bed.mount(&number, "/mnt", "ext4", "/dev/sdq", "");
        assert_eq!(answers(&bed.report(NOW)), expected, "{digest:?}");
    }
}

#[test]
fn other_file_systems() {
    for (kind, source, options, expected) in [
        ("tmpfs", "tmpfs", "", (No, No)),
        ("nfs4", "server:/x", "vers=4.0,sec=sys", (No, No)),
        ("nfs4", "server:/x", "vers=4.2,sec=sys", (Unknown, Unknown)),
        ("nfs", "server:/x", "vers=3,sec=krb5i", (Yes, Yes)),
        ("nfs", "server:/x", "vers=3,sec=krb5p", (No, No)),
        ("cifs", "//server/x", "vers=3.1.1,seal", (No, No)),
        ("cifs", "//server/x", "vers=3.1.1", (Unknown, Unknown)),
        ("ceph", "mon:/", "", (Yes, Yes)),
        ("ceph", "mon:/", "nocrc", (No, No)),
        ("9p", "share", "trans=virtio", (Unknown, Unknown)),
        ("fuse.sshfs", "host:", "", (Unknown, Unknown)),
        ("virtiofs", "share", "", (Unknown, Unknown)),
        ("zfs", "tank/x", "", (Unknown, Unknown)),
        ("squashfs", "/dev/x", "ro", (No, No)),
        ("newfs", "x", "", (Unknown, Unknown)),
        ("bcachefs", "/dev/x", "", (No, No)),
        ("bcachefs", "/dev/x", "data_checksum=none", (Unknown, Unknown)),
        ("overlay", "overlay", "lowerdir=/l,upperdir=/nowhere", (Unknown, Unknown)),
    ] {
        let bed = Bed::new();
        bed.mount("0:50", "/mnt", kind, source, options);
        let report = bed.report(NOW);
        assert_eq!(answers(&report), expected, "{kind} {options}: {report:#?}");
    }
}

#[test]
fn zfs_by_its_version() {
    for (version, enabled, verify, expected, shows) in [
        ("2.2.7-1", "1", "1", No, None),
        ("2.3.0-1", "0", "1", No, None),
        ("2.3.1-1", "1", "1", Yes, Some(Shows::ErrorWriting)),
        ("2.4.0", "1", "0", Yes, Some(Shows::ErrorReading)),
    ] {
        let bed = Bed::new();
        bed.write("sys/module/zfs/version", version);
        bed.write("sys/module/zfs/parameters/zfs_dio_enabled", enabled);
        bed.write("sys/module/zfs/parameters/zfs_vdev_direct_write_verify", verify);
        bed.mount("0:50", "/mnt", "zfs", "tank/x", "");
        let report = bed.report(NOW);
        assert_eq!((report.samples_writes_twice(), report.shows), (expected, shows), "{version}");
    }
}

#[test]
fn an_overlay_is_what_its_upper_directory_lies_on() {
    let mut bed = Bed::new();
    let zram = bed.disk("zram1", true, &[]);
    bed.mount(&zram, "/up\\040per", "ext4", "/dev/zram1", "");
    bed.mount("0:51", "/mnt", "overlay", "overlay", "lowerdir=/l,upperdir=/up\\040per/d");
    bed.write("/up per/d/file", "");
    let reports = bed.host(NEW).mounted();
    let report = reports.iter().find(|r| r.path.ends_with("mnt")).unwrap();
    assert_eq!(answers(report), (Yes, No), "{report:#?}");
    assert_eq!(report_names(report), ["overlay", "ext4", "zram1"]);
}

#[test]
fn ext4_with_journalled_data_is_not_direct() {
    let mut bed = Bed::new();
    let zram = bed.disk("zram1", true, &[]);
    bed.mount(&zram, "/mnt", "ext4", "/dev/zram1", "data=journal");
    let report = bed.report(NOW);
    assert!(matches!(report.direct_write, DirectWrite::NotDirect { .. }));
    assert_eq!(answers(&report), (No, No));
}

#[test]
fn xfs_with_two_devices_bounces_only_if_both_ask_for_it() {
    let mut bed = Bed::new();
    let data = bed.disk("zram1", true, &[]);
    bed.disk("sdb", false, &[]);
    bed.mount(&data, "/mnt", "xfs", "/dev/zram1", "rtdev=/dev/sdb");
    let report = bed.report(NEW);
    assert_eq!(report.samples_writes_twice(), Yes, "unknown whether it bounces, and zram is there");
    assert_eq!(report_names(&report), ["xfs", "zram1", "sdb"]);
}

#[test]
fn a_device_that_is_not_in_sysfs_is_unknown() {
    let bed = Bed::new();
    bed.mount("8:77", "/mnt", "ext4", "/dev/gone", "");
    assert_eq!(answers(&bed.report(NOW)), (Unknown, Unknown));
}

#[test]
fn mounts_that_hold_no_files_or_are_hidden_or_repeated_are_left_out() {
    let mut bed = Bed::new();
    let (one, two) = (bed.disk("sda", false, &[]), bed.disk("sdb", false, &[]));
    bed.mount(&one, "/", "ext4", "/dev/sda", "");
    bed.mount("0:5", "/proc", "proc", "proc", "");
    bed.mount("0:6", "/srv", "tmpfs", "tmpfs", "");
    bed.mount(&two, "/srv", "ext4", "/dev/sdb", "");
    bed.mount(&one, "/bind", "ext4", "/dev/sda", "");
    let reports = bed.host(NOW).mounted();
    let paths: Vec<_> = reports.iter().map(|r| r.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["/", "/srv"]);
}

#[test]
fn what_is_not_there_or_no_storage_is_an_error() {
    let bed = Bed::new();
    let error = bed.host(NOW).of_path("/no/such".as_ref()).unwrap_err().to_string();
    assert!(error.starts_with("/no/such: ") && !error.contains('\n'), "{error}");
    let error = Host::this().of_path("/dev/null".as_ref()).unwrap_err().to_string();
    assert!(error.contains("neither a file"), "{error}");
}

#[test]
fn a_report_is_json_whatever_the_names() {
    use std::os::unix::ffi::OsStrExt;
    let mut bed = Bed::new();
    let number = bed.disk("sda", false, &[]);
    bed.mount(&number, "/m\\377", "ext4", "/dev/sda", "");
    let report = bed.report(NOW);
    assert_eq!(report.path.as_os_str().as_bytes(), b"/m\xff");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["verdict"], "safe");
    assert_eq!(json["samples_writes_twice"], "no");
    assert_eq!(json["layers"][1]["writes"], "passes");
    assert!(bed.root().is_dir());
}

#[test]
fn no_layer_without_words() {
    let stacks = [
        md("raid1", false, &[]).report(NOW),
        btrfs("raid1", "").report(OLD),
        on_disk("xfs", "zram1", true, &[]).report(NOW),
        on_disk("ext4", "wonder0", false, &[]).report(NOW),
    ];
    for report in stacks {
        assert!(!report.reason.is_empty() && report.advice.ends_with('.'), "{report:#?}");
        for layer in &report.layers {
            assert!(!layer.does.is_empty() && !layer.name.is_empty());
            let unknown = matches!(layer.writes, Writes::Unknown { .. });
            assert_eq!(unknown, layer.samples_writes_twice == Unknown);
        }
    }
}

proptest! {
    /// Whatever the attributes say, there is a report, and its parts agree.
    #[test]
    fn garbage_in_sysfs_never_panics(
        level in "\\PC{0,12}", flag in "\\PC{0,4}", uuid in "\\PC{0,20}", mode in "\\PC{0,12}",
        disk in "(md|dm-|loop|zram|rbd|nvme|sd|bcache|x)[0-9a-z]{0,3}",
        kind in "(xfs|ext4|btrfs|overlay|nfs|zfs|[a-z]{1,6})", release in "\\PC{0,8}",
    ) {
        let attributes = [
            ("queue/stable_writes", flag.as_str()),
            ("md/level", level.as_str()),
            ("md/skip_copy", flag.as_str()),
            ("loop/dio", flag.as_str()),
            ("loop/backing_file", mode.as_str()),
            ("integrity/format", mode.as_str()),
            ("bcache/cache_mode", mode.as_str()),
        ];
        let mut bed = Bed::new();
        let number = bed.disk(&disk, false, &attributes);
        bed.write(&format!("sys/devices/{disk}/dm/uuid"), &uuid);
        bed.mount(&number, "/mnt", &kind, "/dev/x", "upperdir=/proc");
        for report in bed.host(&release).mounted() {
            let known = report.samples_writes_twice() == No && report.verifies_reads() == No;
            prop_assert_eq!(known, report.verdict == Verdict::Safe);
            prop_assert_eq!(
                report.samples_writes_twice() == No, report.write_radius == Radius::Nobody);
        }
    }
}

#[test]
fn the_physical_block_is_the_smallest_below() {
    const BIG: (&str, &str) = ("queue/physical_block_size", "4096");
    assert_eq!(on_disk("ext4", "vda", false, &[]).report(NOW).physical_block_bytes, Some(512));
    let mut bed = on_disk("xfs", "vda", false, &[BIG]);
    assert_eq!(bed.report(NOW).physical_block_bytes, Some(4096));
    bed.write("sys/devices/vda/alignment_offset", "1024\n");
    assert_eq!(bed.report(NOW).physical_block_bytes, None, "it begins inside a block");
    for (sdb, expected) in [("4096", Some(4096)), ("512", Some(512)), ("a lot", None)] {
        // Itself it says the largest of its disks.
        bed = md("raid0", false, &[BIG]);
        for (disk, size) in [("sda", "4096"), ("sdb", sdb), ("sdc", "4096")] {
            bed.write(&format!("sys/devices/{disk}/queue/physical_block_size"), size);
        }
        assert_eq!(bed.report(NOW).physical_block_bytes, expected, "{sdb}");
    }
    let mut bed = Bed::new();
    bed.disk("sda", false, &[BIG]);
    let number = bed.partition("sda", "sda1");
    bed.mount(&number, "/mnt", "ext4", "/dev/sda1", "");
    assert_eq!(bed.report(NOW).physical_block_bytes, Some(4096));
    bed.write("sys/devices/sda/sda1/alignment_offset", "3584\n");
    assert_eq!(bed.report(NOW).physical_block_bytes, None, "the partition begins at sector 63");
}

#[test]
fn the_physical_block_counts_only_where_writes_go_straight_there() {
    let bed = loop_on("1");
    bed.write("sys/devices/loop0/queue/physical_block_size", "4096");
    let reports = bed.host(NOW).mounted();
    let report = reports.iter().find(|r| r.path.ends_with("mnt")).unwrap();
    assert_eq!(report.physical_block_bytes, Some(4096), "by the loop device alone");
    let remote = Bed::new();
    remote.mount("0:40", "/mnt", "nfs4", "server:/export", "vers=4.0");
    assert_eq!(remote.report(NOW).physical_block_bytes, None);
    let mut bed = Bed::new();
    let number = bed.disk("vda", false, &[]);
    bed.mount(&number, "/mnt", "ext4", "/dev/vda", "data=journal");
    assert_eq!(bed.report(NOW).physical_block_bytes, None, "through the page cache");
}
