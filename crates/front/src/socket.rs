//! Listening sockets that nobody reaches by accident.
//!
//! SOCK-1: a Unix socket is private (mode 0600, ours) unless the caller says
//! otherwise, and its mode and group are in force before anybody can connect.
//!
//! SOCK-2: what already exists at a path is left alone, unless it is a socket
//! of our own user on which nobody listens: what a killed server leaves.
//!
//! SOCK-3: a Unix socket's path is removed with its listener, if it is still
//! the same socket.
//!
//! SOCK-4: a TCP socket listens on a loopback address, unless the caller
//! allows others: the protocols served here neither encrypt nor ask who is
//! there.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use thiserror::Error;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long another program may hold the directory's lock while it does what
/// [`Listener::unix`] does.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// A listening socket, nonblocking and not inherited by child processes.
#[derive(Debug)]
pub struct Listener {
    // Before `fd`: see `UnixPath`.
    path: Option<UnixPath>,
    address: Option<SocketAddr>,
    note: Option<String>,
    fd: OwnedFd,
}

/// Who may connect to a Unix socket: whoever may write to its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnixOptions {
    /// Permission bits of the file.
    pub mode: u32,
    /// Its group, by number; unchanged if `None`.
    pub group: Option<u32>,
}

impl Default for UnixOptions {
    fn default() -> Self {
        Self { mode: 0o600, group: None }
    }
}

/// Why there is no listener.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody listens there already.
    #[error("{}: in use by another server", .0.display())]
    InUse(PathBuf),
    /// Something is there that is not ours to remove.
    #[error("{}: exists and is {what}; not touched", .path.display())]
    Exists {
        /// The path asked for.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// There is nothing to put the socket in.
    #[error("{}: the directory does not exist", .0.display())]
    NoDirectory(PathBuf),
    /// The address of a Unix socket has room for 107 bytes.
    #[error("{}: too long for the path of a socket, which has at most 107 bytes", .0.display())]
    PathTooLong(PathBuf),
    /// An address that other machines reach.
    #[error("{0}: not a loopback address, and remote clients were not allowed")]
    Remote(SocketAddr),
    /// The system's.
    #[error("{place}: {what}: {source}")]
    System {
        /// The path or address.
        place: String,
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl Listener {
    /// Listens at `path` (SOCK-1, SOCK-2).
    ///
    /// Servers that start at the same path at the same time are put in order
    /// by a lock of its directory, so that none takes the other's socket for
    /// a stale one while it does not listen yet.
    ///
    /// # Errors
    ///
    /// [`SocketError`]; then nothing was changed.
    pub fn unix(path: &Path, options: &UnixOptions) -> Result<Self, SocketError> {
        let system = |what| {
            let place = path.display().to_string();
            move |e: Errno| SocketError::System { place, what, source: e.into() }
        };
        let address =
            SocketAddrUnix::new(path).map_err(|_| SocketError::PathTooLong(path.into()))?;
        let _lock = lock_directory(path)?;
        let note = remove_stale(path, &address)?;

        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(system("socket"))?;
        // The socket's own mode is what `bind` makes the file with.
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o600)).map_err(system("fchmod"))?;
        bind(&fd, &address).map_err(|e| match e {
            Errno::ADDRINUSE => SocketError::InUse(path.into()),
            e => system("bind")(e),
        })?;
        let path = UnixPath::of(path)?;
        // Nobody connects to a socket that does not listen yet (SOCK-1). The
        // group first: the mode is meant for it and not for the one before.
        path.open_to(options)?;
        listen(&fd, BACKLOG).map_err(system("listen"))?;
        Ok(Self { path: Some(path), address: None, note, fd })
    }

    /// Listens at a TCP address (SOCK-4). Port 0 gives any that is free.
    ///
    /// # Errors
    ///
    /// [`SocketError`].
    pub fn tcp(address: SocketAddr, allow_remote: bool) -> Result<Self, SocketError> {
        if !allow_remote && !is_loopback(address.ip()) {
            return Err(SocketError::Remote(address));
        }
        let system =
            |source| SocketError::System { place: address.to_string(), what: "listen", source };
        let listener = TcpListener::bind(address).map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        let address = listener.local_addr().map_err(system)?;
        Ok(Self { path: None, address: Some(address), note: None, fd: listener.into() })
    }

    /// What a person should know about how it came to listen.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// The address of a TCP listener, with its port.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// The path of a Unix listener.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_ref().map(|path| path.path.as_path())
    }

    /// The next client's socket, nonblocking.
    ///
    /// # Errors
    ///
    /// `WouldBlock` while nobody asks; otherwise the system's.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
    }

    /// Ends listening, from any thread: whoever polls the listener wakes up,
    /// and whoever connects is refused.
    pub fn shut(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// Holds off other servers that look at the same path; freed when dropped.
fn lock_directory(path: &Path) -> Result<OwnedFd, SocketError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let system = |what, e: Errno| SocketError::System {
        place: directory.display().to_string(),
        what,
        source: e.into(),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOENT => SocketError::NoDirectory(directory.into()),
        e => system("open", e),
    })?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(fd),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(system("lock", e)),
        }
    }
}

/// Removes what a killed server of ours left (SOCK-2); gives a note if so.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<Option<String>, SocketError> {
    let system =
        |what, source| SocketError::System { place: path.display().to_string(), what, source };
    let found = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found.map_err(|e| system("stat", e))?,
    };
    let exists = |what| Err(SocketError::Exists { path: path.into(), what });
    if !found.file_type().is_socket() {
        return exists("no socket");
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| system("socket", e.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // EAGAIN: somebody listens, and the backlog is full.
        Ok(()) | Err(Errno::AGAIN) => return Err(SocketError::InUse(path.into())),
        Err(Errno::ACCESS) => return exists("a socket that we may not connect to"),
        Err(Errno::PROTOTYPE) => return exists("a socket of another type"),
        Err(e) => return Err(system("connect", e.into())),
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return exists("another user's socket");
    }
    fs::remove_file(path).map_err(|e| system("remove", e))?;
    Ok(Some(format!("{}: removed the socket of a server that is gone", path.display())))
}

/// A path with a socket of ours; removed when dropped (SOCK-3).
///
/// The bound socket holds the file's inode. As long as it is open the number
/// can not be given to another file, so the path goes before the socket does.
#[derive(Debug)]
struct UnixPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl UnixPath {
    fn of(path: &Path) -> Result<Self, SocketError> {
        let found = fs::symlink_metadata(path).map_err(|source| SocketError::System {
            place: path.display().to_string(),
            what: "stat",
            source,
        })?;
        Ok(Self { path: path.into(), inode: (found.dev(), found.ino()) })
    }

    fn open_to(&self, options: &UnixOptions) -> Result<(), SocketError> {
        let system = |what| {
            let place = self.path.display().to_string();
            move |source| SocketError::System { place, what, source }
        };
        if options.group.is_some() {
            chown(&self.path, None, options.group).map_err(system("change the group"))?;
        }
        let mode = fs::Permissions::from_mode(options.mode & 0o777);
        fs::set_permissions(&self.path, mode).map_err(system("change the mode"))
    }
}

impl Drop for UnixPath {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path);
        if now.is_ok_and(|now| (now.dev(), now.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn private(path: &Path) -> Result<Listener, SocketError> {
        Listener::unix(path, &UnixOptions::default())
    }

    #[test]
    fn a_socket_is_private_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = private(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(listener.note(), None);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());

        let group = fs::metadata(dir.path()).unwrap().gid();
        let options = UnixOptions { mode: 0o660, group: Some(group) };
        let listener = Listener::unix(&path, &options).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        // Somebody moved it away and put something else there.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_a_stale_socket_of_ours_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let live = private(&path).unwrap();
        assert!(matches!(private(&path), Err(SocketError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        drop(live);

        drop(UnixListener::bind(&path).unwrap());
        let replaced = private(&path).unwrap();
        assert!(replaced.note().unwrap().contains("removed"));
        drop(replaced);

        fs::write(&path, "precious").unwrap();
        assert!(matches!(private(&path), Err(SocketError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        let nowhere = dir.path().join("no/such/directory");
        assert!(matches!(private(&nowhere), Err(SocketError::NoDirectory(_))));
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(private(&long), Err(SocketError::PathTooLong(_))));
    }

    #[test]
    fn one_of_many_that_start_at_once_gets_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let started: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| private(&path))).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(started.iter().filter(|s| s.is_ok()).count(), 1, "{started:?}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn remote_clients_are_for_those_who_ask_for_them() {
        let any = "0.0.0.0:0".parse().unwrap();
        assert!(matches!(Listener::tcp(any, false), Err(SocketError::Remote(_))));
        Listener::tcp(any, true).unwrap();
        let local = Listener::tcp("127.0.0.1:0".parse().unwrap(), false).unwrap();
        assert_ne!(local.tcp_address().unwrap().port(), 0);
    }
}
