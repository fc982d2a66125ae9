//! Directories for one test.

use std::env;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// `f_type` of tmpfs, statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What [`Scratch::new`] asks for: plenty for a test, little for a host.
const DEFAULT_ROOM_BYTES: u64 = 1 << 30;

/// A directory that belongs to one test and is removed when it is dropped.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// A directory in memory where that can be had, else in the ordinary temporary directory.
    pub fn new() -> io::Result<Scratch> {
        Self::with_room(DEFAULT_ROOM_BYTES)
    }

    /// As [`new`](Self::new), for a test that writes up to `bytes` of data.
    ///
    /// tmpfs takes `O_DIRECT` and ignores it, and its fsync costs nothing: right for throughput
    /// and logic, useless for alignment and durability. For those take [`on_disk`](Self::on_disk).
    pub fn with_room(bytes: u64) -> io::Result<Scratch> {
        let memory = Path::new("/dev/shm");
        let parent = if is_tmpfs(memory) && free_bytes(memory)? >= bytes {
            memory.to_path_buf()
        } else {
            env::temp_dir()
        };
        Self::below(&parent)
    }

    /// A directory on a file system with a disk below it, where `O_DIRECT` means something.
    pub fn on_disk() -> io::Result<Scratch> {
        // Since /tmp is in memory on many hosts, /var/tmp, which outlives a restart, goes first.
        let candidates = [PathBuf::from("/var/tmp"), env::temp_dir(), env::current_dir()?];
        match candidates.iter().find(|dir| dir.is_dir() && !is_tmpfs(dir)) {
            Some(parent) => Self::below(parent),
            None => Err(io::Error::other("every temporary directory is in memory")),
        }
    }

    /// Whether the directory lies in memory.
    pub fn is_in_memory(&self) -> bool {
        is_tmpfs(self.dir.path())
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The path that `name` has, or would have, in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes the file `name` of `bytes` bytes, all of them a hole.
    pub fn sparse(&self, name: &str, bytes: u64) -> io::Result<PathBuf> {
        let path = self.path(name);
        File::create_new(&path)?.set_len(bytes)?;
        Ok(path)
    }

    fn below(parent: &Path) -> io::Result<Scratch> {
        // Short: the address of a Unix socket has room for 107 bytes of path.
        Ok(Scratch { dir: TempDir::with_prefix_in("stableio-", parent)? })
    }
}

fn is_tmpfs(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(dir)?;
    Ok(fs.f_bavail * fs.f_frsize)
}
