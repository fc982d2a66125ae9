//! The process whose call the net caught: its memory, its descriptors, its directories.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2, stat};

/// Bytes of a path with its end; `PATH_MAX`.
const PATH_BYTES: usize = 4096;
/// The size that memory's rights have.
const PAGE: usize = 4096;

/// A thread that waits in a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) pid: u32,
}

/// What a call is about.
#[derive(Debug)]
pub(crate) enum Target {
    /// This file, open as a mere path, or the directory in which it would be made; and its name.
    File(OwnedFd, PathBuf),
    /// The call fails with this error.
    Fails(i32),
    /// No file.
    None,
    /// We may not look at it.
    Hidden,
}

impl Caller {
    /// The flags in the `open_how` that lies at this address.
    pub(crate) fn open_how(&self, address: u64, size: u64) -> io::Result<u64> {
        let mut flags = [0; 8];
        // A smaller one the kernel refuses, and does not look at.
        if size >= size_of::<libc::open_how>() as u64 && self.read(address, &mut flags)? < 8 {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        Ok(u64::from_ne_bytes(flags))
    }

    /// The file that a descriptor stands for.
    pub(crate) fn descriptor(&self, fd: u64) -> Target {
        let link = PathBuf::from(format!("/proc/{}/fd/{}", self.pid, fd as u32));
        let path = fs::read_link(&link).unwrap_or_default();
        match openat(CWD, &link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => Target::File(file, path),
            Err(rustix::io::Errno::NOENT) => Target::Fails(libc::EBADF),
            Err(_) => Target::Hidden,
        }
    }

    /// The file that the path at this address names, from that directory.
    pub(crate) fn path(&self, dir: u64, address: u64, creates: bool) -> Target {
        let path = match self.read_path(address) {
            Ok(path) => path,
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                return Target::Fails(libc::EFAULT);
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Target::Fails(libc::ENAMETOOLONG);
            }
            Err(_) => return Target::Hidden,
        };
        let found = match self.open(dir, &path) {
            Err(rustix::io::Errno::NOENT) if creates => {
                // The kernel makes it in this directory; `..` of a name is no matter, since such
                // a name can not be made.
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                self.open(dir, parent.unwrap_or(Path::new(".")))
            }
            found => found,
        };
        match found {
            Ok(file) => Target::File(file, path),
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Target::Hidden,
            Err(error) => Target::Fails(error.raw_os_error()),
        }
    }

    /// Opens what the caller would, as a mere path.
    fn open(&self, dir: u64, path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let of_caller =
            |what: &str| openat(CWD, format!("/proc/{}/{what}", self.pid), flags, Mode::empty());
        if path.is_absolute() && self.is_elsewhere() {
            let root = of_caller("root")?;
            return openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
        }
        let start = match dir as i32 {
            _ if path.is_absolute() => return openat(CWD, path, flags, Mode::empty()),
            libc::AT_FDCWD => of_caller("cwd")?,
            fd => of_caller(&format!("fd/{fd}"))?,
        };
        openat(start.as_fd(), path, flags, Mode::empty())
    }

    /// Whether its root is another than ours (chroot, a container).
    fn is_elsewhere(&self) -> bool {
        match (stat("/"), stat(format!("/proc/{}/root/", self.pid))) {
            (Ok(ours), Ok(theirs)) => (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino),
            _ => true,
        }
    }

    /// Whether this file is mapped in its memory.
    pub(crate) fn maps(&self, file: &Path) -> bool {
        let Ok(maps) = fs::read(format!("/proc/{}/maps", self.pid)) else { return false };
        let name = file.as_os_str().as_bytes();
        maps.split(|byte| *byte == b'\n').any(|line| line.ends_with(name))
    }

    fn read_path(&self, address: u64) -> io::Result<PathBuf> {
        let mut bytes = vec![0; PATH_BYTES];
        let len = self.read(address, &mut bytes)?;
        match bytes[..len].iter().position(|byte| *byte == 0) {
            Some(end) => {
                bytes.truncate(end);
                Ok(PathBuf::from(OsString::from_vec(bytes)))
            }
            None if len < PATH_BYTES => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Reads its memory, up to the first byte that is not there.
    fn read(&self, address: u64, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            // The kernel reads all of a piece or none of it, so pieces end where pages do.
            let at = address.wrapping_add(done as u64);
            let len = (PAGE - at as usize % PAGE).min(into.len() - done);
            let local = libc::iovec { iov_base: into[done..].as_mut_ptr().cast(), iov_len: len };
            let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len };
            // SAFETY: the local piece is ours and writable; the other is the kernel's to check.
            let got = unsafe { libc::process_vm_readv(self.pid as i32, &local, 1, &remote, 1, 0) };
            if got <= 0 {
                let error = io::Error::last_os_error();
                return if done > 0 { Ok(done) } else { Err(error) };
            }
            done += got as usize;
        }
        Ok(done)
    }
}
