//! New arrays: members made or checked, then their superblocks.
//!
//! CREATE-1: everything is checked before anything is written, and a member
//! that holds something is not touched without `force`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use stableio_mem::{BLOCK, Bytes};

use crate::geometry::{BadGeometry, Geometry, LOG_AT, Level};
use crate::superblock::{BadName, Id, RoleEntry, Superblock, check_name};

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The array's name.
    pub name: String,
    /// Redundancy.
    pub level: Level,
    /// Bytes of a chunk.
    pub chunk: u64,
    /// Bytes of members that do not exist yet.
    pub member_size: Option<u64>,
    /// The members, by role.
    pub members: Vec<PathBuf>,
    /// Overwrite whatever they hold.
    pub force: bool,
    /// Whether the array gets a log.
    pub log: bool,
    /// Whether it keeps the guards of its blocks.
    pub checksums: bool,
    /// What power failure does not tear on any member: 512 or 4096 bytes;
    /// `None` asks the host.
    pub atomic_unit: Option<u32>,
}

/// Why an array was not created. Nothing was written, except where it says
/// so.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Not a name.
    #[error("{name:?}: {why}")]
    Name {
        /// The name.
        name: String,
        /// Why.
        why: BadName,
    },
    /// Redundancy that nothing would keep whole over a crash.
    #[error(
        "{}: --checksums off needs the log: with neither, nothing could tell after a crash which \
         blocks and parity fit together",
        .0.name()
    )]
    NeitherLogNorChecksums(Level),
    /// Not a shape.
    #[error(transparent)]
    Geometry(#[from] BadGeometry),
    /// A member named twice.
    #[error("{} is named twice: each member is a file or device of its own", .0.display())]
    Doubled(PathBuf),
    /// A member that does not exist, and no size for it.
    #[error("{}: does not exist; give --member-size to make it", .0.display())]
    NoSize(PathBuf),
    /// A member that exists with another size than asked for.
    #[error(
        "{}: has {}, not the {} of --member-size; leave --member-size out to use it as it is",
        path.display(), Bytes(*size), Bytes(*want)
    )]
    OtherSize {
        /// The member.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes asked for.
        want: u64,
    },
    /// The member holds something.
    #[error("{}: holds {what}; --force overwrites it", path.display())]
    NotEmpty {
        /// The member.
        path: PathBuf,
        /// What was recognised.
        what: String,
    },
    /// Smaller than a member of the array.
    #[error("{}: has {}, a member of this array needs {}", path.display(), Bytes(*size), Bytes(*need))]
    TooSmall {
        /// The file or device.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes that a member needs.
        need: u64,
    },
    /// Neither file nor block device.
    #[error("{}: is neither a regular file nor a block device", .0.display())]
    WrongType(PathBuf),
    /// Somebody else has it open.
    #[error("{}: in use by another process (locked, mounted or served); stop that first", .0.display())]
    InUse(PathBuf),
    /// The system refused.
    #[error("{}: {what}: {error}", path.display())]
    System {
        /// The member.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

/// A member that passed the checks.
struct Checked {
    path: PathBuf,
    /// Open if it exists.
    file: Option<File>,
    size: u64,
}

/// Creates an array; gives its superblock as the first member has it.
///
/// The size of an array is set by its smallest member.
///
/// # Errors
///
/// [`CreateError`].
pub fn create(options: &CreateOptions) -> Result<Superblock, CreateError> {
    let name = &options.name;
    check_name(name).map_err(|why| CreateError::Name { name: name.clone(), why })?;
    if !options.checksums && !options.log && options.level != Level::Single {
        return Err(CreateError::NeitherLogNorChecksums(options.level));
    }
    distinct(&options.members)?;
    let mut checked: Vec<Checked> = Vec::new();
    for path in &options.members {
        checked.push(check(path, options)?);
    }
    let smallest = checked.iter().map(|m| m.size).min().unwrap_or(0);
    let geometry = Geometry::new(options.level, checked.len(), options.chunk, smallest)?;
    let mut files = Vec::new();
    let mut made = Vec::new();
    for member in &mut checked {
        match make(member, geometry.member_size, &mut made) {
            Ok(file) => files.push(file),
            Err(error) => {
                // Nothing stays of what this call made.
                made.iter().for_each(|path| drop(std::fs::remove_file(path)));
                return Err(error);
            }
        }
    }
    let told = files.iter().map(stableio_block::dev::atomic_unit).min();
    let atomic_unit = options.atomic_unit.or(told).unwrap_or(512).clamp(512, 4096);
    // What lies between is torn like what is smaller.
    let atomic_unit = if atomic_unit < 4096 { 512 } else { 4096 };
    let roles: Vec<_> = files.iter().map(|_| RoleEntry::in_sync(Id::random())).collect();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut superblock = Superblock {
        array: Id::random(),
        name: name.clone(),
        member: roles[0].id,
        role: 0,
        generation: 1,
        epoch: 0,
        in_use: false,
        log: options.log,
        checksums: options.checksums,
        created,
        geometry,
        atomic_unit,
        log_from: 1,
        scrub: None,
        histories: Vec::new(),
        roles,
    };
    for role in (0..files.len()).rev() {
        superblock.role = role;
        superblock.member = superblock.roles[role].id;
        let system =
            |what, error| CreateError::System { path: checked[role].path.clone(), what, error };
        blank(&files[role], &geometry).map_err(|e| system("clear the log and guard regions", e))?;
        let block = superblock.encode();
        for at in [geometry.second_superblock_at(), 0] {
            files[role]
                .write_all_at(&block[..], at)
                .map_err(|e| system("write the superblock", e))?;
        }
        files[role].sync_all().map_err(|e| system("sync", e))?;
    }
    Ok(superblock)
}

/// Prepares a file or device to take a role's place: what it held is gone.
///
/// # Errors
///
/// [`CreateError`], before anything is written; and the system's.
pub fn prepare_replacement(
    path: &Path,
    geometry: &Geometry,
    force: bool,
) -> Result<(), CreateError> {
    let options = CreateOptions {
        name: String::new(),
        level: geometry.level,
        chunk: geometry.chunk_bytes(),
        member_size: None,
        members: Vec::new(),
        force,
        log: true,
        checksums: true,
        atomic_unit: None,
    };
    let new = !path.exists() || std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == 0);
    let member_size = new.then_some(geometry.member_size);
    let mut member = check(path, &CreateOptions { member_size, ..options })?;
    if member.size < geometry.member_size {
        return Err(CreateError::TooSmall {
            path: path.into(),
            size: member.size,
            need: geometry.member_size,
        });
    }
    let file = make(&mut member, geometry.member_size, &mut Vec::new())?;
    let system = |what, error| CreateError::System { path: path.into(), what, error };
    blank(&file, geometry).map_err(|e| system("clear the log and guard regions", e))?;
    for at in [0, geometry.second_superblock_at()] {
        file.write_all_at(&[0; BLOCK], at).map_err(|e| system("clear a superblock", e))?;
    }
    file.sync_all().map_err(|e| system("sync", e))
}

/// Looks at a member without changing it.
fn check(path: &Path, options: &CreateOptions) -> Result<Checked, CreateError> {
    let system = |what, error| CreateError::System { path: path.into(), what, error };
    let kind = match std::fs::metadata(path) {
        Ok(meta) => meta.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let size = options.member_size.ok_or_else(|| CreateError::NoSize(path.into()))?;
            let parent =
                path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !parent.is_dir() {
                return Err(system(
                    "open its directory",
                    io::Error::from_raw_os_error(libc::ENOENT),
                ));
            }
            return Ok(Checked { path: path.into(), file: None, size });
        }
        Err(e) => return Err(system("look at it", e)),
    };
    if !kind.is_file() && !kind.is_block_device() {
        return Err(CreateError::WrongType(path.into()));
    }
    let exclusive = if kind.is_block_device() { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path);
    let file = match file {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err(CreateError::InUse(path.into()));
        }
        other => other.map_err(|e| system("open", e))?,
    };
    lock(&file).map_err(|_| CreateError::InUse(path.into()))?;
    let size = file_size(&file).map_err(|e| system("find its size", e))?;
    // An empty file is one that somebody made to be a member.
    if size == 0 && kind.is_file() {
        let size = options.member_size.ok_or_else(|| CreateError::NoSize(path.into()))?;
        return Ok(Checked { path: path.into(), file: Some(file), size });
    }
    if let Some(want) = options.member_size.filter(|want| *want != size && kind.is_file()) {
        return Err(CreateError::OtherSize { path: path.into(), size, want });
    }
    if !options.force
        && let Some(what) = content(&file, size).map_err(|e| system("read", e))?
    {
        return Err(CreateError::NotEmpty { path: path.into(), what });
    }
    Ok(Checked { path: path.into(), file: Some(file), size })
}

/// No file or device twice, whatever its name.
fn distinct(paths: &[PathBuf]) -> Result<(), CreateError> {
    let mut seen: Vec<(&PathBuf, Option<(u64, u64)>)> = Vec::new();
    for path in paths {
        let identity = std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        if seen.iter().any(|(other, id)| *other == path || (identity.is_some() && *id == identity))
        {
            return Err(CreateError::Doubled(path.clone()));
        }
        seen.push((path, identity));
    }
    Ok(())
}

/// Opens a checked member, making it if it is not there; remembers what it
/// made.
fn make(member: &mut Checked, size: u64, made: &mut Vec<PathBuf>) -> Result<File, CreateError> {
    let path = member.path.clone();
    let system = |what, error| CreateError::System { path: path.clone(), what, error };
    let file = match member.file.take() {
        Some(file) => file,
        None => {
            let new =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            let file = new.map_err(|e| system("make", e))?;
            made.push(path.clone());
            file
        }
    };
    let meta = file.metadata().map_err(|e| system("look at it", e))?;
    if meta.is_file() && meta.len() < size {
        file.set_len(size).map_err(|e| system("set its size", e))?;
    }
    Ok(file)
}

/// Log and guard regions as if never written.
fn blank(file: &File, geometry: &Geometry) -> io::Result<()> {
    let (from, to) = (LOG_AT, geometry.page_at(geometry.pages()));
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(file, mode, from, to - from).is_ok() {
        return Ok(());
    }
    let zeros = vec![0u8; 1 << 20];
    let mut at = from;
    while at < to {
        let len = (to - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// What a file or device holds; `None` if it is all zero, as far as is looked:
/// the ends of a device, all data of a file.
fn content(file: &File, size: u64) -> io::Result<Option<String>> {
    const LOOK: u64 = 128 << 10;
    let mut head = vec![0; LOOK.min(size) as usize];
    file.read_exact_at(&mut head, 0)?;
    let mut tail = head.clone();
    file.read_exact_at(&mut tail, size - LOOK.min(size))?;
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let known: [(usize, &[u8], &str); 14] = [
        (0, b"stableio", "a member of a stableio array"),
        (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
        (0, b"XFSB", "an XFS file system"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (0, b"LUKS", "a LUKS volume"),
        (0x218, b"LVM2", "an LVM volume"),
        (0, b"QFI\xfb", "a qcow2 image"),
        (0x200, b"EFI PART", "a GPT partition table"),
        (0x1000, &[0xfc, 0x4e, 0x2b, 0xa9], "an md RAID member"),
        (0, &[0xfc, 0x4e, 0x2b, 0xa9], "an md RAID member"),
        (0xff6, b"SWAPSPACE2", "swap space"),
        (3, b"NTFS", "an NTFS file system"),
        (0x52, b"FAT32", "a FAT file system"),
        (0x1fe, &[0x55, 0xaa], "a boot sector or partition table"),
    ];
    if let Some((_, _, name)) = known.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return Ok(Some((*name).to_owned()));
    }
    // The last superblock copy begins a block that ends with the member.
    if tail.chunks_exact(BLOCK).any(|block| block.starts_with(b"stableio")) {
        return Ok(Some("a damaged member of a stableio array".to_owned()));
    }
    let blank = head.iter().chain(&tail).all(|b| *b == 0) && !has_data(file)?;
    Ok((!blank).then(|| "data that is not known".to_owned()))
}

/// Whether a file holds anything but zeros. Where that would take long, a lot
/// of data counts as data.
fn has_data(file: &File) -> io::Result<bool> {
    const MOST: u64 = 256 << 20;
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let mut piece = vec![0; 1 << 20];
    let (mut at, mut seen) = (0, 0);
    loop {
        at = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let len = file.read_at(&mut piece, at)?;
        seen += len as u64;
        if piece[..len].iter().any(|b| *b != 0) || seen > MOST {
            return Ok(true);
        }
        if len == 0 {
            return Ok(false);
        }
        at += len as u64;
    }
}

/// An OFD write lock, until the file is closed.
fn lock(file: &File) -> io::Result<()> {
    stableio_block::dev::lock(file, false)
}

/// Bytes of a file or block device.
pub(crate) fn file_size(file: &File) -> io::Result<u64> {
    stableio_block::dev::size(file)
}
