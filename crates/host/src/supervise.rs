//! The supervisor: the command's parent, which answers what the library asks and what the net
//! reports for as long as any process of the session lives.
//!
//! It is the parent, and adopts what the command leaves behind (`PR_SET_CHILD_SUBREAPER`), because
//! many systems let a process look into its descendants only (Yama), and because it then knows when
//! the last of them has ended.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SocketFlags, accept_with};
use stableio_session::Session;

use crate::answers;
use crate::dir::SessionDir;
use crate::files::Files;
use crate::link::{self, Message};
use crate::policy::Policy;
use crate::refuse::{Refusals, Report};
use crate::signals::Signals;
use crate::start::{self, Plan};
use crate::voice::{Voice, silence};

/// Requests that are worked on at once, each on a thread: looking at a file may take long where
/// its storage does not answer.
const AT_ONCE: usize = 64;

/// What a supervisor is made of.
pub(crate) struct Supervisor {
    pub(crate) dir: SessionDir,
    pub(crate) session: &'static Session,
    pub(crate) policy: Policy,
    pub(crate) ask: OwnedFd,
    pub(crate) launcher: OwnedFd,
}

/// Starts the command and supervises its session to the end. For a process that was forked for
/// this, with one thread.
pub(crate) fn supervise(supervisor: Supervisor, plan: &Plan) -> ! {
    let launcher = supervisor.launcher.as_fd();
    let command = match start(plan) {
        Ok(command) => command,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
            let _ = Message::NotStarted(errno).send(launcher);
            supervisor.dir.remove();
            process::exit(1);
        }
    };
    let used = [&supervisor.ask, &supervisor.launcher, &command.from].map(AsRawFd::as_raw_fd);
    detach(&[&used[..], &[supervisor.dir.lock()]].concat());
    let (dir, result) = watch(supervisor, command);
    dir.remove();
    // Everything else goes with the process; in this order, so that who waits for the end of the
    // link finds the directory gone.
    process::exit(i32::from(result.is_err()))
}

/// The command's process, and what came of its net.
struct Command {
    pid: libc::pid_t,
    from: OwnedFd,
}

fn start(plan: &Plan) -> io::Result<Command> {
    let (from, to) = link::link()?;
    // SAFETY: sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    // SAFETY: this process has one thread, so the child may go on as it likes.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(from);
            start::become_command(plan, to.as_fd())
        }
        pid => Ok(Command { pid, from }),
    }
}

/// Takes the process out of everything that it shares with the user: terminal, directory, and
/// descriptors that somebody may wait to see closed.
fn detach(keep: &[RawFd]) {
    // SAFETY: plain calls; the name is a string that ends.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"stableio-superv".as_ptr());
    }
    let _ = std::env::set_current_dir("/");
    silence(0);
    silence(1);
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<RawFd> =
        entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open {
        if fd > 2 && !keep.contains(&fd) {
            // SAFETY: none of those that this process uses.
            unsafe { libc::close(fd) };
        }
    }
}

/// The supervisor's parts, as its threads share them; they last as long as the process.
struct Parts {
    files: Files,
    refusals: Refusals,
    voice: &'static Voice,
    at_work: AtomicUsize,
}

impl Parts {
    /// Does it on a thread of its own; here, if there are enough of them or none can be had.
    fn work(&'static self, job: impl Fn() + Send + Sync + 'static) {
        let job = Arc::new(job);
        let theirs = job.clone();
        let thread = move || {
            theirs();
            self.at_work.fetch_sub(1, Ordering::Relaxed);
        };
        let room = self.at_work.fetch_add(1, Ordering::Relaxed) < AT_ONCE;
        if !room || thread::Builder::new().spawn(thread).is_err() {
            self.at_work.fetch_sub(1, Ordering::Relaxed);
            job();
        }
    }
}

/// Serves the session until its last process has ended.
fn watch(supervisor: Supervisor, command: Command) -> (SessionDir, io::Result<()>) {
    let Supervisor { dir, session, policy, ask, launcher } = supervisor;
    let voice: &'static Voice = Box::leak(Box::default());
    let parts: &'static Parts = Box::leak(Box::new(Parts {
        files: Files::new(session, policy, voice),
        refusals: Refusals::new(session, policy, voice, dir.library()),
        voice,
        at_work: AtomicUsize::new(0),
    }));
    let desk = Desk { parts, command: Some(command.pid), launcher: Some(launcher), ask, net: None };
    (dir, desk.serve(command.from))
}

/// Where all that comes in is received.
struct Desk {
    parts: &'static Parts,
    /// While it lives.
    command: Option<libc::pid_t>,
    /// While it listens.
    launcher: Option<OwnedFd>,
    ask: OwnedFd,
    /// While any process is in it.
    net: Option<Arc<OwnedFd>>,
}

impl Desk {
    fn serve(mut self, from_command: OwnedFd) -> io::Result<()> {
        let signals = Signals::of_supervisor()?;
        let started = start::hear(from_command)?;
        self.net = started.listener.map(Arc::new);
        for trouble in started.troubles {
            self.tell(trouble);
        }
        while self.reap() {
            let signal = PollFlags::IN;
            let mut wanted = vec![PollFd::new(&signals, signal), PollFd::new(&self.ask, signal)];
            wanted.extend(self.launcher.iter().map(|fd| PollFd::new(fd, signal)));
            wanted.extend(self.net.iter().map(|fd| PollFd::new(&**fd, signal)));
            rustix::io::retry_on_intr(|| poll(&mut wanted, None))?;
            let ready: Vec<PollFlags> = wanted.iter().map(PollFd::revents).collect();
            while signals.next().is_some() {}
            if !ready[1].is_empty() {
                self.accept();
            }
            let has_launcher = self.launcher.is_some();
            if has_launcher && !ready[2].is_empty() {
                self.obey();
            }
            if let Some(flags) = ready.get(2 + usize::from(has_launcher)) {
                self.receive(*flags);
            }
        }
        Ok(())
    }

    /// Takes note of processes that have ended; false if none is left.
    fn reap(&mut self) -> bool {
        let mut ended = false;
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes the status.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            match pid {
                0 => {
                    if ended {
                        self.tell(Message::GoesOn);
                    }
                    return true;
                }
                -1 => return false,
                pid if Some(pid) == self.command => {
                    ended = true;
                    self.command = None;
                    self.tell(Message::Ended(status));
                    self.parts.voice.command_ended();
                }
                _ => {}
            }
        }
    }

    fn tell(&mut self, message: Message) {
        if let Some(launcher) = &self.launcher {
            let _ = message.send(launcher);
        }
    }

    /// Does what the launcher says; it may have been killed.
    fn obey(&mut self) {
        let Some(launcher) = &self.launcher else { return };
        match Message::receive(launcher) {
            Ok(Some(Message::Signal(signal))) => {
                if let Some(pid) = self.command {
                    // SAFETY: our child, which we have not waited for, so the number is its own.
                    unsafe { libc::kill(pid, signal) };
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => self.launcher = None,
        }
    }

    fn accept(&self) {
        let parts = self.parts;
        let Ok(connection) = accept_with(&self.ask, SocketFlags::CLOEXEC) else { return };
        parts.work(move || {
            // Who asked and is gone, or asked nonsense, has no answer coming.
            let _ = answers::converse(&connection, &parts.files, parts.voice);
        });
    }

    /// Receives a report of the net.
    fn receive(&mut self, ready: PollFlags) {
        let Some(net) = &self.net else { return };
        let parts = self.parts;
        if ready.contains(PollFlags::IN) {
            if let Some(report) = Report::receive(net)
                && !parts.refusals.settle_at_once(&report)
            {
                parts.work(move || parts.refusals.settle(&report, &parts.files));
            }
        } else if !ready.is_empty() {
            self.net = None;
        }
    }
}
