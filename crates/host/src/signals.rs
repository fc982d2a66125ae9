//! Signals of the launcher: which it passes on, which it leaves to the command, and how it ends by
//! the one that ended the command.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::ptr;

/// Passed on to the command if a process sent them. If the kernel did (a terminal that hung up),
/// the command's process group got them too.
const PASSED_ON: [i32; 4] = [libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2];

/// Typed at the terminal, for the whole process group: the command's to decide.
const LEFT: [i32; 2] = [libc::SIGINT, libc::SIGQUIT];

/// What the launcher changes about signals and the command gets back.
pub(crate) struct Inherited {
    mask: libc::sigset_t,
    child: libc::sighandler_t,
}

impl Inherited {
    /// Holds signals back until [`Signals`] reads them, and makes sure that children can be
    /// waited for.
    pub(crate) fn replace() -> Inherited {
        let mut mask = MaybeUninit::uninit();
        let held = set(PASSED_ON.into_iter().chain(LEFT));
        // SAFETY: both are plain calls on memory of ours; `mask` is written by the first.
        unsafe {
            libc::sigprocmask(libc::SIG_BLOCK, &held, mask.as_mut_ptr());
            let child = libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            Inherited { mask: mask.assume_init(), child }
        }
    }

    /// Puts all back. System calls only.
    pub(crate) fn restore(&self) {
        // SAFETY: sets what `replace` found.
        unsafe {
            libc::signal(libc::SIGCHLD, self.child);
            libc::sigprocmask(libc::SIG_SETMASK, &self.mask, ptr::null_mut());
        }
    }
}

fn set(signals: impl IntoIterator<Item = i32>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: initialised by the first call.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// A descriptor that is readable when one of its signals has come.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Those that [`Inherited::replace`] holds back.
    pub(crate) fn of_launcher() -> io::Result<Signals> {
        Signals::of(set(PASSED_ON.into_iter().chain(LEFT)))
    }

    /// Children that ended, and nothing else: all other signals act as at the start of a program.
    pub(crate) fn of_supervisor() -> io::Result<Signals> {
        let children = set([libc::SIGCHLD]);
        // SAFETY: plain calls; nobody waits for a pipe's reader to go away.
        unsafe {
            libc::sigprocmask(libc::SIG_SETMASK, &children, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        }
        Signals::of(children)
    }

    fn of(signals: libc::sigset_t) -> io::Result<Signals> {
        // SAFETY: a set of ours; the result is checked and then owned by nobody else.
        let fd = unsafe { libc::signalfd(-1, &signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made above.
        Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the next that is there. The outer `None`: no more; the inner: not to be passed on.
    pub(crate) fn next(&self) -> Option<Option<i32>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: room for one.
        let got = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if got != len as isize {
            return None;
        }
        // SAFETY: the kernel wrote all of it.
        let info = unsafe { info.assume_init() };
        let signal = info.ssi_signo as i32;
        let from_process = info.ssi_code <= 0;
        Some((from_process && PASSED_ON.contains(&signal)).then_some(signal))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

impl End {
    pub(crate) fn of_status(status: i32) -> End {
        if libc::WIFSIGNALED(status) {
            End::Killed(libc::WTERMSIG(status))
        } else {
            End::Exited(libc::WEXITSTATUS(status) as u8)
        }
    }

    /// Ends this process in the same way, so that a shell sees what it would have seen.
    ///
    /// It returns for a command that exited, and if the signal does not kill.
    pub fn follow(self) -> ExitCode {
        let signal = match self {
            End::Exited(code) => return ExitCode::from(code),
            End::Killed(signal) => signal,
        };
        let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: plain calls. A core file, if any, is to be that of the command: neither a file
        // nor a handler of core files gets one of ours.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &limit);
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
            libc::signal(signal, libc::SIG_DFL);
            libc::sigprocmask(libc::SIG_UNBLOCK, &set([signal]), ptr::null_mut());
            libc::raise(signal);
        }
        ExitCode::from(128_u8.saturating_add(signal as u8))
    }
}
