//! What can go wrong before a command runs.

use std::io;

/// Why a session, or its command, did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No program of that name.
    #[error("{0}: command not found")]
    NotFound(String),
    /// There is something of that name, and it does not run.
    #[error("{0}: {1}")]
    NotExecutable(String, String),
    /// `detect` would see nothing of it.
    #[error("{0} {1}: it can not be watched, and no finding would mean nothing")]
    Unwatchable(String, &'static str),
    /// A session in a session.
    #[error("this runs in a session of `stableio run` or `stableio detect` already")]
    Nested,
    /// The net can not be had.
    #[error(
        "{}: programs without the library would go unprotected (--best-effort goes on)",
        no_net(.0)
    )]
    NoNet(#[source] io::Error),
    /// Another processor.
    #[error("this works on x86-64 Linux with the GNU C library only")]
    Unsupported,
    /// A step of the preparation failed.
    #[error("{0}")]
    Io(String, #[source] io::Error),
}

/// The result of a step of the launcher.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The exit code that shells and `valgrind` give for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::NotFound(_) => 127,
            Error::NotExecutable(..) | Error::Unwatchable(..) => 126,
            _ => 1,
        }
    }
}

/// Says what was being done when a system call failed.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io(what(), error.into()))
    }
}

fn no_net(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "somebody else listens to this process' system calls already",
        _ => "this kernel does not report system calls to a supervisor (seccomp)",
    }
}
