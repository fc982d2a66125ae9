//! A device on a file, a volume or a disk of the host: O_DIRECT through
//! io_uring.
//!
//! FILE-1: the radius is that of what lies under the file, by the inspector;
//! what it does not know counts as sampling twice, for everybody: *unknown
//! means stabilize*. Through the page cache every transfer is one copy.
//!
//! FILE-2: a file that is open is locked (an OFD lock; `O_EXCL` on block
//! devices), so that no two processes write to one member. The lock goes when
//! the device does: not only when the kernel has let go of its last request,
//! or a child that was forked meanwhile of the file.

use std::cell::Cell;
use std::ffi::CString;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stableio_inspect::{Alignment, Host, Report};
use stableio_mem::{BLOCK, ForeignBuf, Pass, Pool, SgList, doors};

use crate::device::Device;
use crate::error::{Error, Kind, OpName};
use crate::exec::{self, Handle, Ticket};
use crate::limits::{Cache, Limits, Radius};
use crate::request::{Body, Extent, Into, Op, Reply, Request};
use crate::{Outcome, ring};

/// Bytes of the largest single transfer.
const MAX_TRANSFER: u32 = 1 << 20;
/// Bytes of a sector.
const SECTOR: u32 = 512;
/// On a file system in memory a transfer is a copy, which io_uring hands to a
/// thread of the kernel's. Up to this many bytes the worker copies itself:
/// that takes less time than handing over (docs/adr/0004).
const IN_PLACE: usize = 32 << 10;
/// Longer ones are handed over while at most this many are; then the worker
/// copies too, instead of queueing behind that thread.
const HANDED_OVER: usize = 8;
/// Fewer of those that keep it busy for long.
const LONG_HANDED_OVER: usize = 5;
const LONG: usize = 512 << 10;
/// Writes, which that thread carries out one after the other, while so many
/// bytes of them are there: enough to do for as long as the worker copies one.
const WRITE_BYTES_HANDED_OVER: usize = 640 << 10;

thread_local! {
    /// Transfers of files in memory that this worker has handed over.
    static HANDED: Cell<usize> = const { Cell::new(0) };
    /// Bytes of the writes among them.
    static WRITTEN: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread waits for transfers that it has handed over.
pub(crate) fn has_handed_over() -> bool {
    HANDED.get() > 0
}

/// A transfer that was handed over; counted until it is dropped.
struct HandedOver {
    /// Whose write it is, and of how many bytes.
    written: Option<(Arc<Inner>, usize)>,
    /// Whether the kernel's thread has enough to do with it.
    full: bool,
}

impl HandedOver {
    fn read(full: bool) -> Self {
        HANDED.set(HANDED.get() + 1);
        Self { written: None, full }
    }

    fn write(file: Arc<Inner>, len: usize) -> Self {
        HANDED.set(HANDED.get() + 1);
        WRITTEN.set(WRITTEN.get() + len);
        file.writes_handed.fetch_add(1, Ordering::Relaxed);
        let full = WRITTEN.get() >= WRITE_BYTES_HANDED_OVER;
        Self { written: Some((file, len)), full }
    }
}

impl Drop for HandedOver {
    fn drop(&mut self) {
        HANDED.set(HANDED.get() - 1);
        if let Some((file, len)) = &self.written {
            WRITTEN.set(WRITTEN.get() - len);
            file.writes_handed.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// How to open a [`FileDevice`].
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// No writes; a shared lock.
    pub read_only: bool,
    /// Without O_DIRECT even where it would work.
    pub buffered: bool,
    /// Use only the first so many bytes.
    pub size: Option<u64>,
}

/// A file or block device.
pub struct FileDevice {
    inner: Arc<Inner>,
    worker: Handle,
    notes: Vec<String>,
    storage: String,
}

struct Inner {
    file: File,
    path: PathBuf,
    name: Arc<str>,
    limits: Limits,
    is_block: bool,
    in_memory: bool,
    /// How many of its writes are with the kernel's thread.
    writes_handed: AtomicUsize,
    /// For the rare transfer that no reservation foresaw. Whoever holds of
    /// it waits for nothing but the kernel.
    aside: Arc<Pool>,
}

impl FileDevice {
    /// Opens and locks `path`.
    ///
    /// Where the file system refuses O_DIRECT it is opened without;
    /// [`notes`](Self::notes) says so.
    ///
    /// # Errors
    ///
    /// The system's; `EBUSY` when somebody else has it open.
    pub fn open(path: &Path, options: &OpenOptions, worker: Handle) -> Result<Self, Error> {
        let name: Arc<str> = path.display().to_string().into();
        let fail = |e: io::Error| Error {
            kind: Kind::System(e.raw_os_error().unwrap_or(libc::EIO)),
            op: OpName::Open,
            device: name.clone(),
            at: 0,
            len: 0,
        };
        let mut notes = Vec::new();
        let is_block = std::fs::metadata(path).map_err(fail)?.file_type().is_block_device();
        let (file, direct) = open(path, options, is_block).map_err(fail)?;
        if !direct && !options.buffered {
            notes.push(format!(
                "{}: the file system refuses O_DIRECT, going through the page cache",
                path.display()
            ));
        }
        if !is_block {
            lock(&file, options.read_only).map_err(fail)?;
        }
        let whole = size(&file).map_err(fail)?;
        let under = Under::of(&file, is_block, direct);
        let geometry = Geometry::of(&file, is_block, direct, under.alignment);
        let size = options.size.unwrap_or(whole) / u64::from(geometry.logical)
            * u64::from(geometry.logical);
        let in_memory = is_in_memory(&file);
        let limits = Limits {
            size,
            logical: geometry.logical,
            physical: geometry.physical,
            memory_align: geometry.memory_align,
            max_transfer: MAX_TRANSFER,
            atomic: under.atomic,
            cache: Cache::Volatile,
            write_radius: under.write_radius,
            read_radius: under.read_radius,
            // What is not copied by the processor goes to the disk by itself.
            pass: Pass { streams: direct && !in_memory, ..Pass::default() },
        };
        let aside = Pool::new(MAX_TRANSFER as usize).map_err(fail)?;
        let inner = Inner {
            file,
            path: path.into(),
            name: name.clone(),
            limits,
            is_block,
            in_memory,
            writes_handed: AtomicUsize::new(0),
            aside,
        };
        Ok(Self { inner: Arc::new(inner), worker, notes, storage: under.why })
    }

    /// What lies under the file, in a line: why foreign memory goes there as
    /// it is, or does not.
    pub fn storage(&self) -> &str {
        &self.storage
    }

    /// What a person should know about how it was opened.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }
}

impl Device for FileDevice {
    fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        if self.worker.is_here() {
            return self.inner.begin(request);
        }
        let inner = self.inner.clone();
        self.worker.spawn(move || async move { inner.begin(request).await })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.is_block {
            // Goes with the file at the latest.
            let _ = set_lock(&self.file, libc::F_UNLCK);
        }
    }
}

impl Inner {
    /// Begins a request on the worker's thread. On files in memory most
    /// transfers are done before this returns.
    fn begin(self: &Arc<Self>, request: Request) -> Ticket<Outcome> {
        let (op, at, len) = request.op.range();
        let mut handed = None;
        if self.in_memory && matches!(op, OpName::Read | OpName::Write) {
            handed = self.hand_over(op, len as usize);
            if handed.is_none() {
                let done = self.copy(request).map_err(|kind| self.error(kind, op, at, len));
                return Ticket::ready(done);
            }
        }
        // The last of a batch sets it off; fewer go with the worker's next
        // look at the ring, which is near.
        let full = handed.as_ref().is_some_and(|handed| handed.full);
        let inner = self.clone();
        let ticket = exec::spawn_begun(async move {
            let done = inner.run(request, handed).await;
            done.map_err(|kind| inner.error(kind, op, at, len))
        });
        if full {
            ring::submit();
        }
        ticket
    }

    /// Whether a transfer of a file in memory goes to the kernel's thread.
    fn hand_over(self: &Arc<Self>, op: OpName, len: usize) -> Option<HandedOver> {
        if op == OpName::Read {
            let most = if len >= LONG { LONG_HANDED_OVER } else { HANDED_OVER };
            let worth_it = len > IN_PLACE && HANDED.get() < most;
            return worth_it.then(|| HandedOver::read(HANDED.get() + 1 >= most));
        }
        // Writes of one file exclude each other: while that thread writes to
        // it, this one would only wait.
        let waits = self.writes_handed.load(Ordering::Relaxed) > 0;
        let worth_it = len > IN_PLACE && WRITTEN.get() < WRITE_BYTES_HANDED_OVER;
        (waits || worth_it).then(|| HandedOver::write(self.clone(), len))
    }

    fn error(&self, kind: Kind, op: OpName, at: u64, len: u64) -> Error {
        Error { kind, op, device: self.name.clone(), at, len }
    }

    /// A read or write of a file in memory, by this thread.
    fn copy(&self, request: Request) -> Result<Reply, Kind> {
        let Request { op, memory, .. } = request;
        match op {
            Op::Read { at, into } => match into {
                Into::Segments(list) => self.copy_out(list, at),
                Into::Foreign(buf) => self.copy_out(buf.target(0, buf.len()), at),
                Into::Pool(len) => {
                    let mut buf = memory.ok_or(Kind::Unsupported)?.take(len);
                    self.copy_out(buf.target(0..len), at)?;
                    Ok(Reply::Data(buf.freeze()))
                }
            },
            Op::Write { at, body, fua, .. } => {
                let flags = if fua { libc::RWF_DSYNC } else { 0 };
                in_place(body.into_segments(), |iov, count, done| {
                    let at = (at + done as u64) as libc::off_t;
                    // SAFETY: the list keeps the segments alive during the call.
                    unsafe { libc::pwritev2(self.file.as_raw_fd(), iov, count, at, flags) }
                })
            }
            _ => unreachable!("only reads and writes are copies"),
        }
    }

    fn copy_out(&self, list: SgList, at: u64) -> Result<Reply, Kind> {
        in_place(list, |iov, count, done| {
            let at = (at + done as u64) as libc::off_t;
            // SAFETY: the list keeps the segments alive during the call.
            unsafe { libc::preadv(self.file.as_raw_fd(), iov, count, at) }
        })
    }

    async fn run(&self, request: Request, handed: Option<HandedOver>) -> Result<Reply, Kind> {
        let Request { op, memory, .. } = request;
        match op {
            Op::Read { at, into } => match into {
                Into::Segments(list) => self.read(list, at, handed).await.map(|()| Reply::Done),
                Into::Foreign(buf) => {
                    self.read_foreign(buf, at, handed).await.map(|()| Reply::Done)
                }
                Into::Pool(len) => {
                    let mut buf = memory.ok_or(Kind::Unsupported)?.take(len);
                    let done = self.read(buf.target(0..len), at, handed).await;
                    done.map(|()| Reply::Data(buf.freeze()))
                }
            },
            Op::Write { at, body, fua, .. } => {
                self.write(body.into_segments(), at, fua, handed).await.map(|()| Reply::Done)
            }
            Op::Flush => system(ring::sync(self.file.as_raw_fd()).await).map(|()| Reply::Done),
            Op::Discard { at, len } => match self.punch(at, len).await {
                // Nothing has to happen.
                Ok(()) | Err(Kind::System(libc::EOPNOTSUPP)) => Ok(Reply::Done),
                Err(e) => Err(e),
            },
            Op::WriteZeroes { at, len, fua } => {
                match self.punch(at, len).await {
                    Err(Kind::System(libc::EOPNOTSUPP)) => self.write_zeros(at, len).await?,
                    done => done?,
                }
                if fua {
                    system(ring::sync(self.file.as_raw_fd()).await)?;
                }
                Ok(Reply::Done)
            }
            Op::Map { at, len } => self.map(at, len).map(Reply::Map),
        }
    }

    async fn read(&self, list: SgList, at: u64, handed: Option<HandedOver>) -> Result<(), Kind> {
        let fd = self.file.as_raw_fd();
        whole(list, at, handed, |list, at| ring::read(fd, list, at)).await
    }

    async fn write(
        &self,
        list: SgList,
        at: u64,
        durable: bool,
        handed: Option<HandedOver>,
    ) -> Result<(), Kind> {
        let fd = self.file.as_raw_fd();
        whole(list, at, handed, |list, at| ring::write(fd, list, at, durable)).await
    }

    /// Lazy: straight into foreign memory. Where the stack below verifies,
    /// an error may mean only that the buffer changed meanwhile: then once
    /// more, privately.
    async fn read_foreign(
        &self,
        buf: ForeignBuf,
        at: u64,
        handed: Option<HandedOver>,
    ) -> Result<(), Kind> {
        let len = buf.len();
        match self.read(buf.target(0, len), at, handed).await {
            Err(Kind::System(libc::EIO | libc::EILSEQ | libc::EBADMSG)) => {
                let mut private = self.aside.reserve(len).await?.take(len);
                self.read(private.target(0..len), at, None).await?;
                doors::copy_out(&private.freeze(), &buf, 0)?;
                Ok(())
            }
            done => done,
        }
    }

    async fn punch(&self, at: u64, len: u64) -> Result<(), Kind> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if len == 0 {
            return Ok(());
        }
        system(ring::fallocate(self.file.as_raw_fd(), mode, at, len).await)
    }

    async fn write_zeros(&self, mut at: u64, mut len: u64) -> Result<(), Kind> {
        let piece = len.min(256 << 10) as usize;
        let mut zeros = self.aside.reserve(piece).await?.take(piece);
        zeros.zero(0..piece);
        let zeros = zeros.freeze();
        while len > 0 {
            let now = len.min(zeros.len() as u64);
            self.write(Body::Stable(zeros.slice(0..now as usize)).into_segments(), at, false, None)
                .await?;
            at += now;
            len -= now;
        }
        Ok(())
    }

    /// Data and holes, as the file system tells them.
    fn map(&self, mut at: u64, len: u64) -> Result<Vec<Extent>, Kind> {
        let end = at + len;
        let mut extents: Vec<Extent> = Vec::new();
        if self.is_block {
            return Ok(vec![Extent { len, data: true }]);
        }
        let seek = |from: u64, whence| {
            // SAFETY: moves the offset of a file of ours, which nothing uses.
            let found = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
            if found < 0 { Err(io::Error::last_os_error()) } else { Ok((found as u64).min(end)) }
        };
        while at < end && extents.len() < 4096 {
            let data = match seek(at, libc::SEEK_DATA) {
                Ok(data) => data,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => end,
                Err(e) => return system(Err(e)),
            };
            if data > at {
                extents.push(Extent { len: data - at, data: false });
                at = data;
                continue;
            }
            let hole = system(seek(at, libc::SEEK_HOLE))?;
            extents.push(Extent { len: hole - at, data: true });
            at = hole;
        }
        Ok(extents)
    }
}

/// A transfer through the ring. The kernel may do less than asked, at the end
/// of the file or for its own reasons: it goes on until nothing more is done.
async fn whole<F: Future<Output = io::Result<u32>>>(
    mut list: SgList,
    mut at: u64,
    mut handed: Option<HandedOver>,
    once: impl Fn(SgList, u64) -> F,
) -> Result<(), Kind> {
    let want = list.len();
    let mut done = 0;
    loop {
        let rest = list.duplicate();
        // Over when the kernel is done, which the ring sees before this task
        // has its turn.
        handed.take().into_iter().for_each(|h| list.hold(Arc::new(h)));
        let now = system(once(list, at).await)? as usize;
        done += now;
        match now {
            _ if done == want => return Ok(()),
            0 => return Err(Kind::Short { done }),
            _ => {}
        }
        list = rest;
        list.advance(now);
        at += now as u64;
    }
}

/// A transfer by the calling thread: `call` gets the ranges and how many bytes
/// are done. What the kernel leaves is tried again: only that says whether the
/// file ends there or the memory is not accessible.
fn in_place(
    mut list: SgList,
    call: impl Fn(*const libc::iovec, libc::c_int, usize) -> isize,
) -> Result<Reply, Kind> {
    let mut done = 0;
    while !list.is_empty() {
        let segments = list.segments();
        let count = segments.len().min(libc::UIO_MAXIOV as usize);
        match call(segments.as_ptr().cast(), count as libc::c_int, done) {
            0 => return Err(Kind::Short { done }),
            now if now > 0 => {
                done += now as usize;
                list.advance(now as usize);
            }
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return system(Err(e)),
            },
        }
    }
    Ok(Reply::Done)
}

fn system<T>(result: io::Result<T>) -> Result<T, Kind> {
    result.map_err(|e| Kind::System(e.raw_os_error().unwrap_or(libc::EIO)))
}

/// Opens with O_DIRECT where the file system has it; says whether it has.
fn open(path: &Path, options: &OpenOptions, is_block: bool) -> io::Result<(File, bool)> {
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    let access = if options.read_only { libc::O_RDONLY } else { libc::O_RDWR };
    let exclusive = if is_block && !options.read_only { libc::O_EXCL } else { 0 };
    let with = |extra: i32| {
        // SAFETY: `c_path` is a C string; the result is checked.
        let fd =
            unsafe { libc::open(c_path.as_ptr(), access | exclusive | libc::O_CLOEXEC | extra) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and nobody else has it.
        Ok(unsafe { File::from_raw_fd(fd) })
    };
    if options.buffered {
        return Ok((with(0)?, false));
    }
    match with(libc::O_DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok((with(0)?, false)),
        Err(e) => Err(e),
    }
}

/// Takes an OFD lock on a whole file, which goes with the open file, not with
/// the process.
///
/// # Errors
///
/// `EBUSY` when somebody else holds one that excludes it.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    set_lock(file, kind).map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => io::Error::from_raw_os_error(libc::EBUSY),
        _ => error,
    })
}

/// Sets the lock on all of a file, or takes it away.
fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: all-zero is a valid `flock`: the whole file, no pid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `lock` is a valid `flock` for the call's length.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes of a file or block device.
///
/// # Errors
///
/// The system's.
pub fn size(file: &File) -> io::Result<u64> {
    // SAFETY: moves the offset of a file of ours, which nothing uses.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    if end < 0 { Err(io::Error::last_os_error()) } else { Ok(end as u64) }
}

/// What lies under an open file, and so who is hurt (FILE-1).
struct Under {
    write_radius: Radius,
    read_radius: Radius,
    alignment: Option<Alignment>,
    atomic: u32,
    why: String,
}

impl Under {
    fn of(file: &File, is_block: bool, direct: bool) -> Self {
        let report = Host::this().of_file(file);
        // The page cache may write a page while the next copy goes into it.
        let physical = report.as_ref().ok().filter(|_| direct).and_then(|r| r.physical_block_bytes);
        let atomic = atomic(file, is_block, physical);
        let (write_radius, read_radius, alignment, why) = match report {
            _ if !direct => {
                let why = "every transfer is a copy through the page cache".to_owned();
                (Radius::Nobody, Radius::Nobody, None, why)
            }
            Ok(Report { write_radius, read_radius, alignment, reason, .. }) => {
                (radius(write_radius), radius(read_radius), alignment, reason)
            }
            Err(error) => (Radius::Everyone, Radius::Everyone, None, error.to_string()),
        };
        Self { write_radius, read_radius, alignment, atomic, why }
    }
}

/// Bytes of the largest aligned write that no crash leaves half done:
/// [`Limits::atomic`].
///
/// Assumed of every disk: power failure does not tear the write of one
/// aligned physical block (`queue/physical_block_size`). So it is the
/// smallest physical block of the disks below; of a file no more than a block
/// of its file system, since its blocks may lie apart. At most 4096 bytes;
/// 512, the sector that every disk keeps whole, where it is not known, and
/// through the page cache. What lies in memory is lost with the power, and a
/// process that dies has copied a page whole or not at all.
fn atomic(file: &File, is_block: bool, physical: Option<u32>) -> u32 {
    if is_in_memory(file) {
        return BLOCK as u32;
    }
    let Some(physical) = physical else { return SECTOR };
    let apart = match is_block {
        true => BLOCK as u64,
        false => rustix::fs::fstatvfs(file).map_or(0, |s| s.f_frsize),
    };
    match apart {
        0 => SECTOR,
        // A power of two that divides it.
        _ => physical.min(1 << apart.trailing_zeros().min(12)).max(SECTOR),
    }
}

/// The [`Limits::atomic`] that a device on this file would have.
pub fn atomic_unit(file: &File) -> u32 {
    let is_block = file.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    Under::of(file, is_block, true).atomic
}

fn radius(inspected: stableio_inspect::Radius) -> Radius {
    match inspected {
        stableio_inspect::Radius::Nobody => Radius::Nobody,
        stableio_inspect::Radius::Issuer => Radius::Issuer,
        stableio_inspect::Radius::Everyone => Radius::Everyone,
    }
}

/// What direct I/O on a file must be aligned to.
struct Geometry {
    logical: u32,
    physical: u32,
    memory_align: u32,
}

impl Geometry {
    fn of(file: &File, is_block: bool, direct: bool, inspected: Option<Alignment>) -> Self {
        if is_block {
            let logical = ioctl_u32(file, libc::BLKSSZGET).unwrap_or(512);
            // BLKPBSZGET, which libc does not name.
            let physical = ioctl_u32(file, 0x127b).unwrap_or(logical);
            return Self { logical, physical, memory_align: logical };
        }
        if !direct {
            return Self { logical: 512, physical: BLOCK as u32, memory_align: 1 };
        }
        // What nobody knows is the block size, which never fails.
        let (offset, memory) = match inspected {
            Some(Alignment { offset_bytes, memory_bytes }) => {
                (offset_bytes.max(512), memory_bytes.max(1))
            }
            None if is_in_memory(file) => (512, 1),
            None => (BLOCK as u32, BLOCK as u32),
        };
        Self { logical: offset, physical: (BLOCK as u32).max(offset), memory_align: memory }
    }
}

fn ioctl_u32(file: &File, request: libc::Ioctl) -> Option<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: both requests that are passed here store one int.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
    (done == 0 && value > 0).then_some(value as u32)
}

/// Whether the file lies in memory (tmpfs, ramfs), where a transfer is a copy
/// and never waits for a disk. A device does not, though its node in `/dev`
/// does.
fn is_in_memory(file: &File) -> bool {
    file.metadata().is_ok_and(|file| file.is_file())
        && rustix::fs::fstatfs(file)
            .is_ok_and(|s| matches!(s.f_type as u64 & 0xffff_ffff, 0x0102_1994 | 0x8584_58f6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Worker;
    use stableio_mem::StableBuf;

    #[test]
    fn the_atomic_unit_is_what_the_host_says() {
        let in_memory = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(Under::of(&in_memory, false, false).atomic, 4096);
        assert!(is_in_memory(&in_memory));
        assert!(!is_in_memory(&File::open("/dev/null").unwrap()), "only its node is");
        let file = tempfile::tempfile_in(".").unwrap();
        assert_eq!(Under::of(&file, false, false).atomic, 512, "through the page cache");
        let placed = rustix::fs::fstatvfs(&file).unwrap().f_frsize;
        assert!(placed >= 4096, "this test's disk has blocks of {placed} bytes");
        for (physical, expected) in
            [(None, 512), (Some(512), 512), (Some(4096), 4096), (Some(16384), 4096)]
        {
            assert_eq!(atomic(&file, false, physical), expected, "{physical:?}");
        }
    }

    /// As the kernel has it for a moment longer, or a child until it is
    /// another program.
    #[test]
    fn a_file_is_free_when_its_device_is_gone_whoever_else_has_it() {
        let path = tempfile::NamedTempFile::new_in(".").unwrap().into_temp_path();
        let worker = Worker::start("t").unwrap();
        let open = || FileDevice::open(&path, &OpenOptions::default(), worker.handle().clone());
        let device = open().unwrap();
        let same = device.inner.file.try_clone().unwrap();
        assert!(open().is_err());
        drop(device);
        open().unwrap();
        drop(same);
    }

    fn fill(seed: u8, len: usize) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    #[test]
    fn what_was_written_is_read_and_holes_are_told() {
        for dir in ["/dev/shm", "."] {
            let dir = tempfile::tempdir_in(dir).unwrap();
            let path = dir.path().join("m");
            File::create(&path).unwrap().set_len(8 << 20).unwrap();
            let worker = Worker::start("t").unwrap();
            let device = Arc::new(
                FileDevice::open(&path, &OpenOptions::default(), worker.handle().clone()).unwrap(),
            );
            let busy = FileDevice::open(&path, &OpenOptions::default(), worker.handle().clone());
            assert_eq!(busy.err().unwrap().kind, Kind::System(libc::EBUSY));
            let pool = Pool::new(16 << 20).unwrap();
            let stack = crate::Stack::new("t", device, pool.clone(), worker.handle().clone());
            let data = fill(3, 3 << 20);
            let body = || Body::Stable(StableBuf::from_owned(data.clone()));
            stack.submit(Request::write(1 << 20, body(), false)).wait().unwrap();
            // FUA goes by the copy, by the ring and by the kernel's thread.
            for len in [512, 16 << 10, 3 << 20] {
                let body = Body::Stable(StableBuf::from_owned(data[..len].to_vec()));
                stack.submit(Request::write(1 << 20, body, true)).wait().unwrap();
            }
            stack.submit(Request::flush()).wait().unwrap();
            for (at, len) in
                [(1u64 << 20, 1usize << 20), ((1 << 20) + 4096, 512 * 7), (3 << 20, 4096)]
            {
                let reply = stack.submit(Request::read_owned(at, len)).wait().unwrap();
                let Reply::Data(got) = reply else { panic!("{reply:?}") };
                let from = (at - (1 << 20)) as usize;
                assert_eq!(got.to_vec(), data[from..from + len]);
            }
            let Reply::Map(map) =
                stack.submit(Request::of(Op::Map { at: 0, len: 8 << 20 })).wait().unwrap()
            else {
                panic!()
            };
            assert_eq!(map.iter().map(|e| e.len).sum::<u64>(), 8 << 20);
            assert!(!map[0].data && map[1].data, "{map:?}");
            let zero = Op::WriteZeroes { at: (1 << 20) + 512, len: 8192, fua: true };
            stack.submit(Request::of(zero)).wait().unwrap();
            let Reply::Data(got) =
                stack.submit(Request::read_owned(1 << 20, 12288)).wait().unwrap()
            else {
                panic!()
            };
            let mut want = data[..12288].to_vec();
            want[512..512 + 8192].fill(0);
            assert_eq!(got.to_vec(), want);
            let error = stack.submit(Request::read_owned(8 << 20, 512)).wait().unwrap_err();
            assert_eq!(error.kind, Kind::OutOfRange { size: 8 << 20 });
            drop(got);
            assert_eq!(pool.used(), 0);
        }
    }
}
