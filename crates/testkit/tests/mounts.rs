//! File systems of a test's own are there while they are held, and leave nothing behind.

use std::fs;
use std::io;
use std::path::Path;

use stableio_testkit::Mounted;

const MIB: u64 = 1 << 20;

fn is_used_and_leaves_nothing(mounted: Option<Mounted>, fs: &str) -> io::Result<()> {
    let Some(mounted) = mounted else { return Ok(()) };
    let (at, device) = (mounted.path().to_owned(), mounted.device().to_owned());
    fs::write(at.join("file"), "content")?;
    let line = line_of(&at)?.expect("it is mounted");
    assert!(line.contains(&format!(" {fs} {}", device.display())), "{line}");
    drop(mounted);
    assert_eq!(line_of(&at)?, None);
    assert!(!at.exists());
    assert!(fs != "xfs" || !device.to_string_lossy().contains("zram") || !device.exists());
    Ok(())
}

fn line_of(at: &Path) -> io::Result<Option<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().find(|line| line.contains(&*at.to_string_lossy())).map(str::to_owned))
}

#[test]
fn xfs_on_zram() -> io::Result<()> {
    is_used_and_leaves_nothing(Mounted::xfs_on_zram(512 * MIB)?, "xfs")
}

#[test]
fn each_kind_on_a_loop_device() -> io::Result<()> {
    for fs in ["btrfs", "ext4", "xfs"] {
        is_used_and_leaves_nothing(Mounted::on_loop(fs, 512 * MIB)?, fs)?;
    }
    Ok(())
}
