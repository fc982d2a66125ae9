//! The launcher: the process that the user sees.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stableio_session::{ASK, ENV, Mode, STATE, Session};

use crate::answers;
use crate::dir::SessionDir;
use crate::error::{Context, Error, Result};
use crate::link::{Message, link};
use crate::net;
use crate::policy::Policy;
use crate::program::{self, Kind};
use crate::shared::{self, Settings};
use crate::signals::{End, Inherited, Signals};
use crate::start::Plan;
use crate::supervise::{Supervisor, supervise};

/// The preload library; empty where it does not exist.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libstableio_preload.so"));

/// How long who is left after the command's end may take to end as well: those that were told to
/// end together with it do. All others stay under the supervisor's care.
const FAREWELL: Duration = Duration::from_millis(200);

/// What to start.
#[derive(Debug)]
pub struct Launch {
    /// What is done with its direct I/O; [`Policy::Watch`]: `detect`.
    pub policy: Policy,
    /// What can not be protected is let through and counted, not refused.
    pub best_effort: bool,
    /// Bytes of private memory that each process may use.
    pub pool_bytes: u64,
    /// The program and its arguments; at least the program.
    pub command: Vec<OsString>,
}

/// How a command ended, and its session as it was then.
#[derive(Debug)]
pub struct Outcome {
    /// How the command ended.
    pub end: End,
    /// Whether processes of the session still run.
    pub goes_on: bool,
    /// Whether the session had no net, and why.
    pub no_net: Option<io::Error>,
    /// `CLOCK_MONOTONIC` of the command's end, in nanoseconds.
    pub ended_ns: u64,
    /// The session's shared memory.
    pub session: SharedSession,
}

/// The shared memory of a session that may still go on.
pub struct SharedSession(&'static Session);

impl std::ops::Deref for SharedSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.0
    }
}

impl std::fmt::Debug for SharedSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedSession").finish_non_exhaustive()
    }
}

/// Becomes the command, without a session. Returns only if that fails.
pub fn replace(command: &[OsString]) -> Error {
    let path = match program::find(&command[0]) {
        Ok(path) => path,
        Err(error) => return error,
    };
    let mut process = process::Command::new(path);
    let error = process.arg0(&command[0]).args(&command[1..]).exec();
    Error::of_exec(&command[0], error.raw_os_error().unwrap_or(libc::EINVAL))
}

impl Launch {
    /// Runs the command in a session, to the command's end. For a process of one thread.
    pub fn run(&self) -> Result<Outcome> {
        if LIBRARY.is_empty() {
            return Err(Error::Unsupported);
        }
        if std::env::var_os(name_of_env()).is_some() {
            return Err(Error::Nested);
        }
        let name = &self.command[0];
        let path = program::find(name)?;
        let watches = self.policy == Policy::Watch;
        let kind = program::kind(&path);
        if let Some(why) = kind.why_not().filter(|_| watches && !self.may_gain(kind)) {
            return Err(Error::Unwatchable(name.to_string_lossy().into_owned(), why));
        }
        let dir = SessionDir::create()?;
        let session = self.furnish(&dir)?;
        let ask = answers::socket(&dir.join(ASK))
            .context(|| format!("no socket in {}", dir.path().display()))?;
        let filter = net::filter(session.cookie.load(std::sync::atomic::Ordering::Relaxed));
        let (launcher, ours) = link().context(|| "no pair of sockets".to_owned())?;
        let inherited = Inherited::replace();
        let extra = [("LD_PRELOAD", preload(&dir)), (name_of_env(), dir.path().into())];
        let net_is_optional = self.best_effort || watches;
        let plan = Plan::new(&path, &self.command, &extra, filter, net_is_optional, inherited)?;
        // SAFETY: this process has one thread, so the child may go on as it likes.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).context(|| "no process".to_owned()),
            0 => {
                drop(ours);
                supervise(Supervisor { dir, session, policy: self.policy, ask, launcher }, &plan)
            }
            pid => {
                drop((launcher, ask));
                // It is the supervisor's now.
                std::mem::forget(dir);
                self.accompany(ours, pid, session)
            }
        }
    }

    /// Whether a program of rights of its own starts without them: `no_new_privs` then takes them,
    /// and its dynamic linker obeys again.
    fn may_gain(&self, kind: Kind) -> bool {
        kind == Kind::Privileged && !rustix::process::geteuid().is_root()
    }

    /// Puts library and shared memory into the directory.
    fn furnish(&self, dir: &SessionDir) -> Result<&'static Session> {
        let library = dir.library();
        fs::write(&library, LIBRARY).context(|| library.display().to_string())?;
        let watches = self.policy == Policy::Watch;
        let settings = Settings {
            mode: if watches { Mode::Detect } else { Mode::Run },
            best_effort: self.best_effort,
            pool_bytes: self.pool_bytes,
        };
        let state = dir.join(STATE);
        shared::create(&state, settings).context(|| state.display().to_string())
    }

    /// Stays with the command until it ends.
    fn accompany(
        &self,
        supervisor: OwnedFd,
        pid: libc::pid_t,
        session: &'static Session,
    ) -> Result<Outcome> {
        let signals = Signals::of_launcher().context(|| "no signals".to_owned())?;
        let mut no_net = None;
        let end = loop {
            let mut wanted =
                [PollFd::new(&signals, PollFlags::IN), PollFd::new(&supervisor, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut wanted, None))
                .context(|| "waiting".to_owned())?;
            let said = !wanted[1].revents().is_empty();
            while let Some(signal) = signals.next() {
                if let Some(signal) = signal {
                    // If it is gone, so is the command.
                    let _ = Message::Signal(signal).send(&supervisor);
                }
            }
            if !said {
                continue;
            }
            match Message::receive(&supervisor).context(|| "the supervisor".to_owned())? {
                Some(Message::Ended(status)) => break End::of_status(status),
                Some(Message::NoNet(errno)) => no_net = Some(io::Error::from_raw_os_error(errno)),
                Some(Message::NotStarted(errno)) => {
                    farewell(&supervisor, pid);
                    return Err(Error::of_exec(&self.command[0], errno));
                }
                Some(Message::Signal(_) | Message::GoesOn) => {}
                None => {
                    let error = io::Error::other("it ended before the command");
                    return Err(Error::Io("the session's supervisor".to_owned(), error));
                }
            }
        };
        let ended_ns = shared::now_ns();
        let goes_on = !farewell(&supervisor, pid);
        if let Some(error) = no_net.take_if(|_| !(self.best_effort || self.policy == Policy::Watch))
        {
            return Err(Error::NoNet(error));
        }
        Ok(Outcome { end, goes_on, no_net, ended_ns, session: SharedSession(session) })
    }
}

/// Waits for the supervisor's end; false if it stays, for others of the session.
fn farewell(supervisor: &OwnedFd, pid: libc::pid_t) -> bool {
    let mut deadline: Option<Instant> = None;
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout =
            left.map(|left| Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) });
        let mut wanted = [PollFd::new(supervisor, PollFlags::IN)];
        match poll(&mut wanted, timeout.as_ref()) {
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        match Message::receive(supervisor.as_fd()) {
            Ok(Some(Message::GoesOn)) => deadline = Some(Instant::now() + FAREWELL),
            Ok(Some(_)) => {}
            // Its directory is gone; a moment later, so is it.
            Ok(None) | Err(_) => {
                // SAFETY: our child.
                unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
                return true;
            }
        }
    }
}

fn name_of_env() -> &'static str {
    ENV.to_str().expect("its name is plain text")
}

/// What `LD_PRELOAD` is for the command: the library, before what the user preloads.
fn preload(dir: &SessionDir) -> OsString {
    let mut list = dir.library().into_os_string();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        list.push(OsStr::new(":"));
        list.push(others);
    }
    list
}
