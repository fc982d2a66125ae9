//! Processes that die with their test.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Scratch;

/// How long a process may take to get ready or to end: far more than it needs on a busy host,
/// little enough that a hang is a failed test and not a stuck run.
const PATIENCE: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A process under test.
///
/// Its output goes to two files of the scratch directory: nobody has to drain a pipe, and what
/// it said can be read while it runs. Dropping it kills it, and quotes its standard error if the
/// test is failing.
#[derive(Debug)]
pub struct Child {
    command_line: String,
    process: process::Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// How a process ended and what it said.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Child {
    /// Starts a process; it may not be ready for anything yet.
    pub fn spawn(mut command: Command, scratch: &Scratch) -> io::Result<Child> {
        static SPAWNED: AtomicU32 = AtomicU32::new(0);
        let program = Path::new(command.get_program()).file_name().unwrap_or_default();
        let number = SPAWNED.fetch_add(1, Ordering::Relaxed);
        let log = |of: &str| scratch.path(&format!("{}-{number}.{of}", program.display()));
        let (stdout, stderr) = (log("stdout"), log("stderr"));
        let command_line = command_line(&command);
        let process = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{command_line}: {error}")))?;
        Ok(Child { command_line, process, stdout, stderr })
    }

    /// The process' id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The command as somebody would type it.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// What the process has written to its standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// What the process has written to its standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// Waits until somebody listens on the Unix socket at `path`.
    pub fn wait_for_socket(&mut self, path: &Path) -> io::Result<()> {
        self.wait_until(&format!("listens on {}", path.display()), |_| {
            is_listening(path).then_some(())
        })
    }

    /// Waits for a whole line of standard output that contains `text`, and returns that line.
    pub fn wait_for_line(&mut self, text: &str) -> io::Result<String> {
        self.wait_until(&format!("prints {text:?}"), |child| {
            let stdout = child.stdout();
            let mut lines = stdout.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            lines.find(|line| line.contains(text)).map(str::to_owned)
        })
    }

    /// Asks the process to end (SIGTERM) and waits until it has.
    ///
    /// A process that does not end is killed, which is an error.
    pub fn terminate(self) -> io::Result<Ended> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Waits until the process ends by itself.
    ///
    /// One that does not is killed, which is an error.
    pub fn wait(self) -> io::Result<Ended> {
        self.wait_within(PATIENCE)
    }

    /// As [`wait`](Self::wait), for one that may take longer than a server takes to end.
    pub fn wait_within(mut self, patience: Duration) -> io::Result<Ended> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Ok(self.ended(status));
            }
            if Instant::now() > deadline {
                return Err(self.failure("does not end"));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Kills the process (SIGKILL), as a crash of the program would, and waits until it is gone.
    pub fn kill9(mut self) -> io::Result<Ended> {
        self.process.kill()?;
        let status = self.process.wait()?;
        Ok(self.ended(status))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = Pid::from_raw(self.pid() as i32).expect("a process id is positive");
        Ok(kill_process(pid, signal)?)
    }

    fn wait_until<T>(
        &mut self,
        what: &str,
        mut ready: impl FnMut(&Child) -> Option<T>,
    ) -> io::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = ready(self) {
                return Ok(value);
            }
            if let Some(status) = self.process.try_wait()? {
                return Err(self.failure(&format!("ended ({status}) before it {what}")));
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("is not ready: nobody saw that it {what}")));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    fn failure(&self, what: &str) -> io::Error {
        let mut text = format!("{} {what}", self.command_line);
        let stderr = self.stderr();
        if !stderr.trim().is_empty() {
            let _ = write!(text, ": {}", stderr.trim_end());
        }
        io::Error::other(text)
    }

    fn ended(&self, status: ExitStatus) -> Ended {
        Ended { status, stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Its id is still ours: nobody else waits for it. Both calls do nothing once it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!("standard error of {}:\n{}", self.command_line, self.stderr());
        }
    }
}

impl Ended {
    /// Whether a signal ended the process rather than the process itself.
    pub fn was_killed(&self) -> bool {
        self.status.signal().is_some()
    }
}

/// Whether somebody listens on the Unix socket at `path`.
///
/// Asks the kernel (`/proc/net/unix`) instead of connecting: a connection tried and dropped is
/// a client that vanished in its handshake, and a server may rightly complain about it, count it
/// or, if it serves one client only, end.
pub fn is_listening(path: &Path) -> bool {
    // Columns: Num RefCount Protocol Flags Type St Inode Path. Flag 0x10000 is __SO_ACCEPTCON.
    let Ok(table) = fs::read("/proc/net/unix") else { return false };
    String::from_utf8_lossy(&table).lines().any(|line| {
        let mut columns = line.split_ascii_whitespace();
        columns.nth(3) == Some("00010000") && columns.nth(3).map(Path::new) == Some(path)
    })
}

fn command_line(command: &Command) -> String {
    let mut line = command.get_program().display().to_string();
    for arg in command.get_args() {
        let _ = write!(line, " {}", arg.display());
    }
    line
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
