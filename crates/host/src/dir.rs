//! The directory of a session.
//!
//! - **DIR-1** Nobody but its owner can change what lies in it, nor put another in its place: it
//!   holds the library that programs of this user load.
//! - **DIR-2** It goes when its session has ended. One whose supervisor was killed goes with the
//!   next session: a lock (`flock`) says whether somebody is left, because process ids come again
//!   and mean nothing in another container with the same `/tmp`.

use std::env;
use std::ffi::{CStr, OsStr};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use rustix::fs::{FlockOperation, StatVfsMountFlags, flock, statvfs};
use rustix::process::geteuid;

use crate::error::{Context, Error, Result};

const PREFIX: &str = "stableio-run-";
const LOCK: &str = "lock";

/// Bytes of a path to which the session's directory and a socket in it can be added.
const LONGEST: usize = 64;

/// How old a directory without a lock is before nobody can be about to lock it.
const GRACE: Duration = Duration::from_secs(60);

/// A session's directory, removed when this is dropped or by [`SessionDir::remove`].
///
/// A forked process has a copy of this; exactly one of them is to let it drop.
#[derive(Debug)]
pub(crate) struct SessionDir {
    path: PathBuf,
    lock: File,
}

impl SessionDir {
    /// Makes one, and removes those that the dead left behind.
    pub(crate) fn create() -> Result<SessionDir> {
        let base = base()?;
        sweep(&base);
        let made = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", process::id()))
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&base);
        let path = made.context(|| format!("no directory in {}", base.display()))?.keep();
        match lock(&path) {
            Ok(lock) => Ok(SessionDir { path, lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&path);
                Err(Error::Io(format!("{} can not be locked", path.display()), error))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &CStr) -> PathBuf {
        self.path.join(OsStr::from_bytes(name.to_bytes()))
    }

    /// Where the preload library lies.
    pub(crate) fn library(&self) -> PathBuf {
        self.join(stableio_session::PRELOAD)
    }

    /// The descriptor whose lock says that somebody is left.
    pub(crate) fn lock(&self) -> RawFd {
        self.lock.as_raw_fd()
    }

    /// Removes it, for who does not drop anything.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Drop for SessionDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Locked under another name first: a lock that has its name is held.
fn lock(dir: &Path) -> io::Result<File> {
    let new = dir.join("lock.new");
    let file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    fs::rename(&new, dir.join(LOCK))?;
    Ok(file)
}

/// The first place of the usual ones where a session can be.
fn base() -> Result<PathBuf> {
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| is_plain(dir));
    let mut why = String::new();
    for dir in runtime.into_iter().chain([PathBuf::from("/tmp")]) {
        match unfit(&dir) {
            None => return Ok(dir),
            Some(reason) => why += &format!("{}{}: {reason}", separator(&why), dir.display()),
        }
    }
    Err(Error::Io("no place for the session's directory".to_owned(), io::Error::other(why)))
}

fn separator(before: &str) -> &'static str {
    if before.is_empty() { "" } else { "; " }
}

/// The dynamic linker splits the list of preloaded libraries at colons and blanks.
fn is_plain(dir: &Path) -> bool {
    let bytes = dir.as_os_str().as_bytes();
    dir.is_absolute() && !bytes.iter().any(|byte| *byte == b':' || byte.is_ascii_whitespace())
}

fn unfit(dir: &Path) -> Option<String> {
    if dir.as_os_str().len() > LONGEST {
        return Some("too long for the address of a socket".to_owned());
    }
    let meta = match fs::metadata(dir) {
        Ok(meta) => meta,
        Err(error) => return Some(error.to_string()),
    };
    // DIR-1: its owner could swap the session's directory, and so could all who may write there
    // if it is not sticky.
    let ours = meta.uid() == geteuid().as_raw() && meta.mode() & 0o022 == 0;
    let sticky = meta.uid() == 0 && meta.mode() & 0o1000 != 0;
    if !meta.is_dir() || !(ours || sticky) {
        return Some("not a directory of this user".to_owned());
    }
    if let Err(error) = rustix::fs::access(dir, rustix::fs::Access::WRITE_OK) {
        return Some(io::Error::from(error).to_string());
    }
    match statvfs(dir) {
        Ok(fs) if fs.f_flag.contains(StatVfsMountFlags::NOEXEC) => {
            Some("mounted noexec, so no library can be loaded from there".to_owned())
        }
        Ok(_) => None,
        Err(error) => Some(io::Error::from(error).to_string()),
    }
}

/// Removes the directories of sessions of which nobody is left. What fails is left to the next.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && is_dead(&entry.path())
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_dead(dir: &Path) -> bool {
    let Ok(meta) = fs::symlink_metadata(dir) else { return false };
    if !meta.is_dir() || meta.uid() != geteuid().as_raw() {
        return false;
    }
    match File::open(dir.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // A launcher may be between making and locking it.
        Err(_) => meta.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > GRACE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_the_dead_are_swept() -> io::Result<()> {
        let base = tempfile::tempdir()?;
        let make = |name: &str| {
            let dir = base.path().join(name);
            fs::create_dir(&dir).map(|()| dir)
        };
        let (alive, dead) = (make("stableio-run-1-a")?, make("stableio-run-1-b")?);
        let (fresh, other) = (make("stableio-run-2-c")?, make("stableio-1")?);
        let _held = lock(&alive)?;
        drop(lock(&dead)?);
        sweep(base.path());
        assert!(alive.exists() && fresh.exists() && other.exists());
        assert!(!dead.exists());
        Ok(())
    }

    #[test]
    fn a_place_that_others_can_change_is_not_fit() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        assert_eq!(unfit(dir.path()), None);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
        assert!(unfit(dir.path()).is_some());
        assert!(unfit(&dir.path().join("absent")).is_some());
        assert!(!is_plain(Path::new("/a b")) && !is_plain(Path::new("/a:b")));
        Ok(())
    }
}
