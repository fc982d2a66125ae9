//! What a session says while it runs: lines on standard error, never on standard output.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Speaks for the supervisor.
///
/// While the command runs, on the user's standard error. The supervisor lets go of that when the
/// command has ended, because who reads it may wait for its end. After that a line about a process
/// goes to that process' own standard error.
#[derive(Debug, Default)]
pub(crate) struct Voice {
    command_ended: AtomicBool,
}

impl Voice {
    /// Says a line about a process.
    pub(crate) fn say(&self, pid: u32, text: &str) {
        // A line is a line, and nothing of it commands a terminal.
        let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let line = format!("stableio: {text}\n");
        let result = if self.command_ended.load(Ordering::Acquire) {
            standard_error_of(pid).and_then(|mut to| to.write_all(line.as_bytes()).ok())
        } else {
            std::io::stderr().write_all(line.as_bytes()).ok()
        };
        // There is nobody left to tell that nobody listens.
        let _ = result;
    }

    /// Lets go of the user's standard error.
    pub(crate) fn command_ended(&self) {
        self.command_ended.store(true, Ordering::Release);
        silence(2);
    }
}

/// Points a standard descriptor to nowhere.
pub(crate) fn silence(descriptor: RawFd) {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        // SAFETY: replaces one of the three standard descriptors, which nobody owns.
        unsafe { libc::dup2(null.as_raw_fd(), descriptor) };
    }
}

fn standard_error_of(pid: u32) -> Option<File> {
    let own = |fd: libc::c_long| {
        // SAFETY: the kernel has just made it for us.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    };
    // SAFETY: plain calls without memory.
    let process = own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above.
    let error = own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), 2, 0) })?;
    Some(File::from(error))
}
