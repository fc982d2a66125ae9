//! File systems of a test's own, on devices of its own: what storage does below a path can only
//! be tested on that storage.
//!
//! Every device is taken from the kernel under the number that the kernel gave, so that tests
//! which run at once never meet. All of it is gone when a [`Mounted`] is dropped, also by a test
//! that fails. Only a test that is killed leaves its mount behind; its loop device goes with it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{require_tool, require_tools, run_tool, skip};

const ZRAM_CONTROL: &str = "/sys/class/zram-control";

/// How long a device may stay busy after its user is gone: somebody (udev) may look at it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A mounted file system; unmounted, with its device removed, when it is dropped.
///
/// Declare it before whatever has files open on it, so that it is dropped after that.
#[derive(Debug)]
pub struct Mounted {
    // Dropped in this order.
    mount: Mount,
    device: Device,
    // Holds the directory that is mounted on, and the image.
    _dir: TempDir,
}

impl Mounted {
    /// XFS on a zram device (lz4) of `bytes`, at least 300 MiB: a device that reads what it is
    /// given more than once (`stable_writes` is set), below a file system without checksums.
    ///
    /// `None` after [`skip`] where the host can not: not root, no zram, no `mkfs.xfs`.
    pub fn xfs_on_zram(bytes: u64) -> io::Result<Option<Mounted>> {
        if !is_root() || require_tool("mkfs.xfs").is_none() {
            return Ok(None);
        }
        if !Path::new(ZRAM_CONTROL).is_dir() {
            skip("this kernel has no zram");
            return Ok(None);
        }
        Ok(Some(Self::new("xfs", Device::zram(bytes)?, scratch_dir()?)?))
    }

    /// A file system of this kind (`btrfs`, `ext4` or `xfs`, which wants 300 MiB) on a loop device
    /// on a sparse file of `bytes`.
    ///
    /// `None` after [`skip`] where the host can not: not root, no loop devices, no `mkfs`, a kernel
    /// without the file system.
    pub fn on_loop(fs: &str, bytes: u64) -> io::Result<Option<Mounted>> {
        Self::on_image(fs, bytes, scratch_dir()?)
    }

    /// The same with the image in memory (`/dev/shm`).
    pub fn on_loop_in_memory(fs: &str, bytes: u64) -> io::Result<Option<Mounted>> {
        Self::on_image(fs, bytes, TempDir::with_prefix_in("stableio-mount-", "/dev/shm")?)
    }

    fn on_image(fs: &str, bytes: u64, dir: TempDir) -> io::Result<Option<Mounted>> {
        let mkfs = format!("mkfs.{fs}");
        if !is_root() || !require_tools(&["losetup", &mkfs]) {
            return Ok(None);
        }
        if !knows(fs)? {
            skip(&format!("this kernel has no {fs}"));
            return Ok(None);
        }
        let image = dir.path().join("image");
        File::create_new(&image)?.set_len(bytes)?;
        let device = match Device::on_file(&image) {
            Ok(device) => device,
            Err(error) => {
                skip(&format!("no loop device can be had: {error}"));
                return Ok(None);
            }
        };
        Ok(Some(Self::new(fs, device, dir)?))
    }

    /// Where it is mounted: a directory that is empty but for what `mkfs` makes.
    pub fn path(&self) -> &Path {
        &self.mount.at
    }

    /// The block device below it.
    pub fn device(&self) -> &Path {
        self.device.path()
    }

    /// Mounts it again with these options, as in `"nodatasum"`.
    pub fn remount(&self, options: &str) -> io::Result<()> {
        let options = format!("remount,{options}");
        run_tool(Path::new("mount"), [Path::new("-o"), Path::new(&options), self.path()]).map(drop)
    }

    fn new(fs: &str, mut device: Device, dir: TempDir) -> io::Result<Mounted> {
        run_tool(Path::new(&format!("mkfs.{fs}")), [Path::new("-q"), device.path()])?;
        let at = dir.path().join("mnt");
        fs::create_dir(&at)?;
        run_tool(
            Path::new("mount"),
            [Path::new("-t"), Path::new(fs), device.path(), at.as_path()],
        )?;
        let mount = Mount { at };
        device.let_go_with_mount();
        Ok(Mounted { mount, device, _dir: dir })
    }
}

#[derive(Debug)]
struct Mount {
    at: PathBuf,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let umount = || run_tool(Path::new("umount"), [&self.at]);
        if retried(umount).is_err() {
            // Somebody still has a file open. Out of sight, and gone with that file.
            let _ = run_tool(Path::new("umount"), [Path::new("--lazy"), &self.at]);
        }
    }
}

#[derive(Debug)]
enum Device {
    Zram { number: String, path: PathBuf },
    Loop { path: PathBuf, let_go: bool },
}

impl Device {
    fn zram(bytes: u64) -> io::Result<Device> {
        // Reading makes a device and gives its number: no two readers get the same.
        let number = fs::read_to_string(format!("{ZRAM_CONTROL}/hot_add"))?.trim().to_owned();
        let path = PathBuf::from(format!("/dev/zram{number}"));
        let device = Device::Zram { number: number.clone(), path };
        let set =
            |name: &str, value: &str| fs::write(format!("/sys/block/zram{number}/{name}"), value);
        // Without lz4 the default does: all of them read what they compress more than once.
        let _ = set("comp_algorithm", "lz4");
        set("disksize", &bytes.to_string())?;
        Ok(device)
    }

    fn on_file(image: &Path) -> io::Result<Device> {
        let arguments = ["--find", "--show"].map(Path::new).into_iter().chain([image]);
        let path = run_tool(Path::new("losetup"), arguments)?.trim().into();
        Ok(Device::Loop { path, let_go: false })
    }

    fn path(&self) -> &Path {
        match self {
            Device::Zram { path, .. } | Device::Loop { path, .. } => path,
        }
    }

    /// A loop device that is mounted ends with its mount, also if nobody is left to end it.
    fn let_go_with_mount(&mut self) {
        if let Device::Loop { path, let_go } = self {
            *let_go = detach(path).is_ok();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let gone = match self {
            Device::Zram { number, .. } => {
                retried(|| fs::write(format!("{ZRAM_CONTROL}/hot_remove"), &*number))
            }
            // Its number may be somebody else's by now.
            Device::Loop { let_go: true, .. } => Ok(()),
            Device::Loop { path, let_go: false } => detach(path),
        };
        if let Err(error) = gone {
            eprintln!("{} stays behind: {error}", self.path().display());
        }
    }
}

fn detach(path: &Path) -> io::Result<()> {
    run_tool(Path::new("losetup"), [Path::new("--detach"), path]).map(drop)
}

/// Until it works, but not for ever.
fn retried<T>(mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match act() {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            done => return done,
        }
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("only root can mount");
    }
    root
}

/// Whether the kernel has a file system, now or as a module.
fn knows(fs: &str) -> io::Result<bool> {
    let known = || -> io::Result<bool> {
        let list = fs::read_to_string("/proc/filesystems")?;
        Ok(list.lines().any(|line| line.split_ascii_whitespace().last() == Some(fs)))
    };
    if known()? {
        return Ok(true);
    }
    let _ = run_tool(Path::new("modprobe"), [fs]);
    known()
}

fn scratch_dir() -> io::Result<TempDir> {
    TempDir::with_prefix("stableio-mount-")
}
