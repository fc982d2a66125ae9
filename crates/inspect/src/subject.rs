//! What was asked about: a path, an open file, a mount point known by name.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, IFlags, Mode, OFlags, Statx, StatxAttributes, StatxFlags,
};

use crate::{Alignment, AtomicWrites, DeviceNumber};

/// What it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Dir,
    BlockDevice(DeviceNumber),
    /// Neither of these.
    Other,
}

/// What the file itself says of direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direct {
    /// It takes it, aligned like this.
    Aligned(Alignment),
    /// Every transfer goes through the page cache.
    Refused,
    /// It says nothing: a directory, an old kernel, a file system that has no
    /// answer.
    Unsaid,
}

/// How its flags can be asked for.
#[derive(Debug, Clone, Copy)]
enum Way<'a> {
    Path(&'a Path),
    File(BorrowedFd<'a>),
}

/// A file, directory or block device.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) kind: Kind,
    /// The file system's device, by stat(2).
    pub(crate) device: Option<DeviceNumber>,
    pub(crate) mount: Option<u64>,
    pub(crate) direct: Direct,
    pub(crate) atomic: Option<AtomicWrites>,
    /// Its content is mapped storage: no device transfers anything.
    pub(crate) dax: bool,
    way: Way<'a>,
}

impl<'a> Subject<'a> {
    pub(crate) fn of_path(path: &'a Path) -> io::Result<Self> {
        let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), wanted())?;
        Ok(Self::new(&stat, Way::Path(path)))
    }

    pub(crate) fn of_file(file: BorrowedFd<'a>) -> io::Result<Self> {
        let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted())?;
        Ok(Self::new(&stat, Way::File(file)))
    }

    /// A mount point that is not looked at: one of a dead server would hang
    /// us.
    pub(crate) fn mount_point(path: &'a Path) -> Self {
        Self {
            kind: Kind::Dir,
            device: None,
            mount: None,
            direct: Direct::Unsaid,
            atomic: None,
            dax: false,
            way: Way::Path(path),
        }
    }

    fn new(stat: &Statx, way: Way<'a>) -> Self {
        let answered = |flag: StatxFlags| stat.stx_mask & flag.bits() != 0;
        let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Dir,
            FileType::BlockDevice => {
                let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
                Kind::BlockDevice(DeviceNumber { major, minor })
            }
            _ => Kind::Other,
        };
        let (memory_bytes, offset_bytes) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        let direct = match answered(StatxFlags::DIOALIGN) && kind != Kind::Dir {
            false => Direct::Unsaid,
            true if offset_bytes == 0 => Direct::Refused,
            true => Direct::Aligned(Alignment { memory_bytes, offset_bytes }),
        };
        let atomic = (answered(StatxFlags::from_bits_retain(STATX_WRITE_ATOMIC))
            && stat.stx_atomic_write_unit_max > 0)
            .then_some(AtomicWrites {
                min_bytes: stat.stx_atomic_write_unit_min,
                max_bytes: stat.stx_atomic_write_unit_max,
            });
        Self {
            kind,
            device: Some(DeviceNumber { major: stat.stx_dev_major, minor: stat.stx_dev_minor }),
            mount: answered(StatxFlags::MNT_ID).then_some(stat.stx_mnt_id),
            direct,
            atomic,
            dax: stat.stx_attributes.contains(StatxAttributes::DAX),
            way,
        }
    }

    /// The inode's flags; `None` if the file may not be opened or has none.
    ///
    /// Only for file systems of this host: opening a file of another may wait
    /// for ever.
    pub(crate) fn flags(&self) -> Option<IFlags> {
        match self.way {
            Way::Path(path) => rustix::fs::ioctl_getflags(open(path).ok()?).ok(),
            Way::File(file) => rustix::fs::ioctl_getflags(file).ok(),
        }
    }

    /// `f_type` of statfs(2).
    pub(crate) fn magic(&self) -> Option<u64> {
        let stat = match self.way {
            Way::Path(path) => rustix::fs::statfs(path),
            Way::File(file) => rustix::fs::fstatfs(file.as_fd()),
        };
        stat.ok().map(|stat| stat.f_type as u64 & 0xffff_ffff)
    }
}

/// Not named by rustix.
const STATX_WRITE_ATOMIC: u32 = 0x1_0000;

fn wanted() -> StatxFlags {
    StatxFlags::BASIC_STATS
        | StatxFlags::MNT_ID
        | StatxFlags::DIOALIGN
        | StatxFlags::from_bits_retain(STATX_WRITE_ATOMIC)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}
