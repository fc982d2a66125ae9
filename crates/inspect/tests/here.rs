//! What is said of storage that is really there.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use stableio_inspect::{DirectWrite, Host, Kernel, Radius, Report, Tristate, Verdict};
use stableio_testkit::{Mounted, run_tool};

const MIB: u64 = 1 << 20;

/// By path and by descriptor, which must agree.
fn report_of(mounted: &Mounted, name: &str) -> io::Result<Report> {
    let path = mounted.path().join(name);
    File::options().create(true).append(true).open(&path)?;
    let host = Host::this();
    let by_path = host.of_path(&path).map_err(io::Error::other)?;
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let by_file = host.of_file(&direct).map_err(io::Error::other)?;
    assert_eq!(by_path, by_file);
    Ok(by_path)
}

fn kernel() -> Kernel {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    Kernel::parse(&release).unwrap()
}

fn since(release: &str) -> bool {
    kernel() >= Kernel::parse(release).unwrap()
}

#[test]
fn xfs_on_zram_until_it_bounces() -> io::Result<()> {
    let Some(mounted) = Mounted::xfs_on_zram(400 * MIB)? else { return Ok(()) };
    let report = report_of(&mounted, "file")?;
    let zram = report.layers.last().unwrap();
    assert_eq!((zram.kind.as_str(), zram.samples_writes_twice), ("zram", Tristate::Yes));
    assert!(report.reason().contains("stable_writes"), "{}", report.reason());
    if since("7.0") {
        assert!(matches!(report.direct_write, DirectWrite::Bounced { .. }));
        assert_eq!(report.verdict, Verdict::Safe);
    } else {
        assert_eq!(report.direct_write, DirectWrite::StraightThrough);
        assert_eq!(
            (report.samples_writes_twice(), report.write_radius),
            (Tristate::Yes, Radius::Issuer)
        );
    }
    // The device itself is never protected.
    let device = Host::this().of_path(mounted.device()).map_err(io::Error::other)?;
    assert_eq!(device.verdict, Verdict::AtRisk);
    assert!(Host::this().mounted().iter().any(|r| r.path == mounted.path()));
    Ok(())
}

#[test]
fn ext4_and_xfs_on_a_loop_device() -> io::Result<()> {
    for fs in ["ext4", "xfs"] {
        let Some(mounted) = Mounted::on_loop(fs, 400 * MIB)? else { return Ok(()) };
        let report = report_of(&mounted, "file")?;
        assert_eq!(report.file_system.as_ref().unwrap().kind, fs);
        assert_eq!(
            report.file_system.as_ref().unwrap().mount_point.as_deref(),
            Some(mounted.path())
        );
        assert_eq!(report.layers[1].kind, "loop");
        assert!(report.layers.len() >= 3, "the file below is found: {report:#?}");
        assert_eq!(report.samples_writes_twice(), Tristate::No);
        assert!(report.alignment.is_some());
    }
    Ok(())
}

#[test]
fn btrfs_with_checksums_and_without() -> io::Result<()> {
    let Some(mounted) = Mounted::on_loop("btrfs", 400 * MIB)? else { return Ok(()) };
    let summed = report_of(&mounted, "summed")?;
    if since("7.3") {
        assert!(matches!(summed.direct_write, DirectWrite::Bounced { .. }));
    } else if since("6.15") {
        assert!(matches!(summed.direct_write, DirectWrite::BufferedFallback { .. }));
        assert_eq!(summed.samples_writes_twice(), Tristate::No);
        assert_eq!((summed.verifies_reads(), summed.read_radius), (Tristate::Yes, Radius::Issuer));
    }
    let path = mounted.path().join("plain");
    File::create_new(&path)?;
    run_tool("chattr".as_ref(), ["+C".as_ref(), path.as_os_str()])?;
    let plain = report_of(&mounted, "plain")?;
    assert_eq!(plain.direct_write, DirectWrite::StraightThrough);
    assert_eq!((plain.verdict.clone(), plain.verifies_reads()), (Verdict::Safe, Tristate::No));
    // A file that was there before may have checksums, a new one has none.
    mounted.remount("nodatasum")?;
    let reads = report_of(&mounted, "summed")?.verifies_reads();
    assert_eq!(reads, if since("7.3") { Tristate::No } else { Tristate::Unknown });
    let directory = Host::this().of_path(mounted.path()).map_err(io::Error::other)?;
    assert_eq!(directory.verdict, Verdict::Safe);
    Ok(())
}

#[test]
fn a_file_in_memory_is_copied() -> io::Result<()> {
    let scratch = stableio_testkit::Scratch::new()?;
    if !scratch.is_in_memory() {
        stableio_testkit::skip("there is no directory in memory");
        return Ok(());
    }
    let path = scratch.sparse("file", MIB)?;
    let report = Host::this().of_path(&path).map_err(io::Error::other)?;
    assert!(matches!(report.direct_write, DirectWrite::NotDirect { .. }));
    assert_eq!((report.verdict, report.write_radius), (Verdict::Safe, Radius::Nobody));
    let file = Host::this().of_file(&File::open(&path)?).map_err(io::Error::other)?;
    assert_eq!(file.verdict, Verdict::Safe);
    Ok(())
}
