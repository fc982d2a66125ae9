//! The host: where it is looked at, and the three questions.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::kernel::Kernel;
use crate::mountinfo::{self, DeviceNumber, Mount};
use crate::subject::{Direct, Kind, Subject};
use crate::sysfs::Dir;
use crate::{
    Alignment, DirectWrite, FileSystem, Layer, NoTable, Report, device, dm, fs, judge,
    parse_mountinfo,
};

/// Layers of a stack, and how deep it may be; more is taken for garbage.
const MOST_LAYERS: usize = 256;
const DEEPEST: usize = 32;

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is not there, or may not be looked at.
    #[error("{}: {source}", .path.display())]
    Path {
        /// What was asked for.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It holds no data of its own: a socket, a pipe, a terminal.
    #[error("{}: is neither a file, nor a directory, nor a block device", .0.display())]
    NoStorage(PathBuf),
}

type Tables = dyn Fn(DeviceNumber) -> Result<String, NoTable> + Send + Sync;

/// A host, as far as the inspector needs it.
#[derive(Clone)]
pub struct Host {
    /// Above `/proc`, `/sys` and `/dev`.
    root: PathBuf,
    release: String,
    kernel: Option<Kernel>,
    is_root: bool,
    tables: Arc<Tables>,
}

impl Host {
    /// The one we run on.
    pub fn this() -> Self {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            root: PathBuf::from("/"),
            kernel: Kernel::parse(&release),
            release: release.trim().to_owned(),
            is_root: rustix::process::geteuid().is_root(),
            tables: Arc::new(dm::kernel_table),
        }
    }

    /// One whose `/proc`, `/sys` and `/dev` lie in a directory, for tests: its
    /// kernel has this release, and tells nobody a table.
    pub fn at(root: &Path, release: &str) -> Self {
        Self {
            // Links are followed on the way to a device: names must agree.
            root: root.canonicalize().unwrap_or_else(|_| root.into()),
            kernel: Kernel::parse(release),
            release: release.to_owned(),
            is_root: false,
            tables: Arc::new(|_| Err(NoTable::NotRoot)),
        }
    }

    /// With another way to the tables of device mapper.
    pub fn with_tables(
        mut self,
        tables: impl Fn(DeviceNumber) -> Result<String, NoTable> + Send + Sync + 'static,
    ) -> Self {
        self.tables = Arc::new(tables);
        self
    }

    /// What lies under a file, a directory or a block device.
    ///
    /// # Errors
    ///
    /// When it is not there, or is something else.
    pub fn of_path(&self, path: &Path) -> Result<Report, Error> {
        let fail = |source| Error::Path { path: path.into(), source };
        let absolute = self.inside(path).canonicalize().map_err(fail)?;
        let subject = Subject::of_path(&absolute).map_err(fail)?;
        let mut report = self.of_subject(path, &subject, &absolute)?;
        report.path = path.into();
        Ok(report)
    }

    /// What lies under an open file, whoever opened it.
    ///
    /// The answer is for direct I/O, whether or not it was opened for that.
    ///
    /// # Errors
    ///
    /// As [`of_path`](Self::of_path).
    pub fn of_file(&self, file: &impl AsFd) -> Result<Report, Error> {
        use std::os::fd::AsRawFd;
        let file = file.as_fd();
        let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // Its name, as far as it has one here: only for people.
        let path = std::fs::read_link(&link).unwrap_or(link);
        let subject =
            Subject::of_file(file).map_err(|source| Error::Path { path: path.clone(), source })?;
        self.of_subject(&path, &subject, &path)
    }

    /// What lies under every mounted file system that holds files, once each.
    pub fn mounted(&self) -> Vec<Report> {
        let mounts = self.mounts();
        let mut seen = Vec::new();
        let mut reports = Vec::new();
        for (at, mount) in mounts.iter().enumerate() {
            let hidden = mounts[at + 1..].iter().any(|m| m.mount_point == mount.mount_point);
            if hidden || !fs::holds_files(&mount.kind) || seen.contains(&mount.device) {
                continue;
            }
            seen.push(mount.device);
            let path = self.inside(&mount.mount_point);
            let subject = Subject::mount_point(&path);
            reports.push(self.of_mount(&mount.mount_point, &subject, mount));
        }
        reports
    }

    fn of_subject(&self, path: &Path, subject: &Subject<'_>, name: &Path) -> Result<Report, Error> {
        match subject.kind {
            Kind::Other => Err(Error::NoStorage(path.into())),
            Kind::BlockDevice(number) => Ok(self.of_device(path, subject, number)),
            Kind::File | Kind::Dir => {
                Ok(self.of_mount(path, subject, &self.mount_of(subject, name)))
            }
        }
    }

    fn of_device(&self, path: &Path, subject: &Subject<'_>, number: DeviceNumber) -> Report {
        let mut walk = Walk::new(self);
        device::walk(&mut walk, number, 0);
        let physical_block_bytes = walk.physical_block_bytes();
        let alignment = alignment(subject).or_else(|| device::alignment(self, number));
        let found = judge::Found {
            path: path.into(),
            kernel: self.release.clone(),
            file_system: None,
            layers: walk.layers,
            direct_write: DirectWrite::StraightThrough,
            alignment,
            atomic_writes: subject.atomic.or_else(|| device::atomic_writes(self, number)),
            physical_block_bytes,
        };
        judge::report(found)
    }

    fn of_mount(&self, path: &Path, subject: &Subject<'_>, mount: &Mount) -> Report {
        let mut walk = Walk::new(self);
        let direct_write = fs::walk(&mut walk, mount, subject, 0);
        // A file system without a device of its own may be stricter than the
        // devices below it.
        let below = || device::alignment(self, mount.device);
        let is_direct = !matches!(direct_write, DirectWrite::NotDirect { .. });
        let alignment = alignment(subject).or_else(below).filter(|_| is_direct);
        // The page cache may write a page while a program changes it.
        let goes_there =
            matches!(direct_write, DirectWrite::StraightThrough | DirectWrite::Bounced { .. });
        let physical_block_bytes = walk.physical_block_bytes().filter(|_| goes_there);
        let found = judge::Found {
            path: path.into(),
            kernel: self.release.clone(),
            file_system: Some(FileSystem {
                kind: mount.kind.clone(),
                mount_point: Some(mount.mount_point.clone()).filter(|p| !p.as_os_str().is_empty()),
                source: mount.source.clone(),
                options: fs::relevant_options(mount),
            }),
            layers: walk.layers,
            direct_write,
            alignment,
            atomic_writes: subject.atomic,
            physical_block_bytes,
        };
        judge::report(found)
    }

    pub(crate) fn mounts(&self) -> Vec<Mount> {
        let path = self.inside(Path::new("/proc/self/mountinfo"));
        parse_mountinfo(&std::fs::read(path).unwrap_or_default())
    }

    /// By its mount's id; an open file may come from another namespace, where
    /// only its device and the file system's magic number are known.
    pub(crate) fn mount_of(&self, subject: &Subject<'_>, name: &Path) -> Mount {
        let mut mounts = self.mounts();
        let found = if self.is_this() {
            mounts
                .iter()
                .position(|mount| Some(mount.id) == subject.mount)
                .or_else(|| mounts.iter().position(|mount| Some(mount.device) == subject.device))
        } else {
            let name =
                name.strip_prefix(&self.root).map_or(name.into(), |n| Path::new("/").join(n));
            mountinfo::by_prefix(&mounts, &name)
                .and_then(|mount| mounts.iter().position(|other| other == mount))
        };
        match found {
            Some(index) => mounts.swap_remove(index),
            None => fs::mount_unseen(subject),
        }
    }

    /// A path of the host's, as we reach it.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(rest) if !self.is_this() && !path.starts_with(&self.root) => self.root.join(rest),
            _ => path.into(),
        }
    }

    pub(crate) fn sysfs(&self, path: &str) -> Option<Dir> {
        Dir::open(&self.root.join("sys").join(path))
    }

    pub(crate) fn kernel(&self) -> Option<Kernel> {
        self.kernel
    }

    pub(crate) fn table(&self, device: DeviceNumber) -> Result<String, NoTable> {
        (self.tables)(device)
    }

    /// What root would have seen; root has seen it.
    pub(crate) fn root_would_show(&self, what: &str) -> Option<String> {
        (!self.is_root).then(|| what.to_owned())
    }

    fn is_this(&self) -> bool {
        self.root == Path::new("/")
    }
}

fn alignment(subject: &Subject<'_>) -> Option<Alignment> {
    match subject.direct {
        Direct::Aligned(alignment) => Some(alignment),
        Direct::Refused | Direct::Unsaid => None,
    }
}

/// A stack on the way down.
pub(crate) struct Walk<'a> {
    pub(crate) host: &'a Host,
    pub(crate) layers: Vec<Layer>,
    /// The physical block of each disk at the bottom, in bytes; `None` where
    /// that is not known.
    pub(crate) physical: Vec<Option<u32>>,
}

impl<'a> Walk<'a> {
    fn new(host: &'a Host) -> Self {
        Self { host, layers: Vec::new(), physical: Vec::new() }
    }

    /// The smallest of all; one that is not known makes the answer unknown
    /// (INSP-1).
    fn physical_block_bytes(&self) -> Option<u32> {
        let all: Option<Vec<u32>> = self.physical.iter().copied().collect();
        all?.into_iter().min()
    }

    /// Adds a layer; says whether to go on below it.
    pub(crate) fn push(&mut self, layer: Layer) -> bool {
        if self.layers.len() >= MOST_LAYERS {
            return false;
        }
        let last = self.layers.len() + 1 == MOST_LAYERS || layer.depth >= DEEPEST;
        self.layers.push(match last {
            true => layer.unknown("the stack is too deep to be true", None),
            false => layer,
        });
        !last
    }
}
