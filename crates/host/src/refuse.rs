//! What the net reports: calls of processes without the library, by which they come to direct I/O
//! or to a ring. Nobody protects what they do with it, so the call is refused, or let through and
//! counted.
//!
//! - **REFUSE-1** A call is let through only if its file needs no protection, or if the user said
//!   that protection is a matter of best effort, or if the session only watches.
//! - **REFUSE-2** Each refused call fails as if the kernel could not do it (EINVAL for files, EPERM
//!   for rings), and each (program, kind) is said once.
//!
//! What a call names lies in the memory of its process, which may change it between our look and
//! the kernel's. The net is there against accidents, not against programs that want to escape it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::fstat;
use stableio_session::{Answer, Effect, Remark, Session};

use crate::caller::{Caller, Target};
use crate::files::Files;
use crate::net::Call;
use crate::policy::{Policy, Treatment};
use crate::program::{self, Kind};
use crate::verdict;
use crate::voice::Voice;

/// A call that waits for its ruling. One that is dropped without fails: its process would wait for
/// ever.
pub(crate) struct Report {
    net: Arc<OwnedFd>,
    id: u64,
    answered: AtomicBool,
    call: Option<Call>,
    caller: Caller,
    args: [u64; 6],
}

impl Report {
    /// Takes the next one; `None` if its process is gone.
    pub(crate) fn receive(net: &Arc<OwnedFd>) -> Option<Report> {
        let mut report = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: room for a report, zeroed as the kernel wants it.
        let got = unsafe {
            libc::ioctl(net.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, report.as_mut_ptr())
        };
        if got != 0 {
            return None;
        }
        // SAFETY: zeroed and then written by the kernel.
        let libc::seccomp_notif { id, pid, data, .. } = unsafe { report.assume_init() };
        Some(Report {
            net: net.clone(),
            id,
            answered: AtomicBool::new(false),
            call: Call::of(data.arch, data.nr as u32),
            caller: Caller { pid },
            args: data.args,
        })
    }

    /// Whether the process still waits: its number may be another's since.
    fn is_current(&self) -> bool {
        let id = &raw const self.id;
        // SAFETY: the kernel reads the number.
        unsafe { libc::ioctl(self.net.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, id) == 0 }
    }

    fn answer(&self, ruling: Ruling) {
        if self.answered.swap(true, Ordering::Relaxed) {
            return;
        }
        let (error, flags) = match ruling {
            Ruling::Pass => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Ruling::Fail(errno) => (-errno, 0),
        };
        let answer = libc::seccomp_notif_resp { id: self.id, val: 0, error, flags };
        let answer = &raw const answer;
        // SAFETY: the kernel reads the answer. A process that is gone needs none.
        unsafe { libc::ioctl(self.net.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, answer) };
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.answer(Ruling::Fail(libc::EINVAL));
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ruling {
    Pass,
    Fail(i32),
}

/// Decides on reports.
pub(crate) struct Refusals {
    session: &'static Session,
    policy: Policy,
    voice: &'static Voice,
    library: PathBuf,
    /// Programs, and whether it was about a ring.
    said: Mutex<HashSet<(PathBuf, bool)>>,
}

impl Refusals {
    pub(crate) fn new(
        session: &'static Session,
        policy: Policy,
        voice: &'static Voice,
        library: PathBuf,
    ) -> Refusals {
        Refusals { session, policy, voice, library, said: Mutex::default() }
    }

    /// Answers what needs no look at a file: most calls of `openat2` are not for direct I/O.
    pub(crate) fn settle_at_once(&self, report: &Report) -> bool {
        if report.call != Some(Call::OpenAt2) {
            return false;
        }
        let ruling = match report.caller.open_how(report.args[2], report.args[3]) {
            Ok(flags) if flags & libc::O_DIRECT as u64 == 0 => Ruling::Pass,
            Ok(_) => return false,
            // Unreadable for the kernel too, if it is the caller's mistake. If it is for want of
            // our rights, the caller takes openat, of which the filter sees the flags.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ruling::Fail(libc::EFAULT),
            Err(_) => Ruling::Fail(libc::ENOSYS),
        };
        report.answer(ruling);
        true
    }

    /// Answers after a look at the file.
    pub(crate) fn settle(&self, report: &Report, files: &Files) {
        let Some(call) = report.call else { return };
        let target = target(call, report);
        if report.is_current() {
            report.answer(self.rule(call, report, target, files));
        }
    }

    fn rule(&self, call: Call, report: &Report, target: Target, files: &Files) -> Ruling {
        let wanted = match target {
            Target::Fails(errno) => return Ruling::Fail(errno),
            Target::File(file, _) if !is_storage(&file) => return Ruling::Pass,
            Target::File(file, path) => Some(match files.answer(&file, report.caller.pid) {
                Ok(answer) => Wanted::known(answer, path),
                Err(_) => Wanted::hidden(files),
            }),
            Target::Hidden => Some(Wanted::hidden(files)),
            Target::None => None,
        };
        let watches = self.policy == Policy::Watch;
        let file = wanted.as_ref().and_then(|wanted| self.session.files.get(wanted.slot));
        match &wanted {
            Some(wanted) if wanted.treatment.is_nothing() && !watches => return Ruling::Pass,
            // Whoever opens it: this is what the user asked for, and `files` has said why.
            Some(Wanted { treatment, path: Some(_), .. }) if treatment.effect == Effect::Refuse => {
                file.inspect(|file| count(&file.refused));
                return Ruling::Fail(libc::EINVAL);
            }
            _ => {}
        }
        let program = Program::of(&report.caller, &self.library);
        self.session.remark(program.remark);
        if watches || self.session.best_effort.load(Ordering::Relaxed) != 0 {
            if watches {
                count(&self.session.totals.unwatched);
            }
            file.inspect(|file| count(&file.unprotected));
            return Ruling::Pass;
        }
        file.inspect(|file| count(&file.refused));
        self.say(call, report.caller.pid, &program, wanted.and_then(|w| w.path).as_deref());
        Ruling::Fail(if call == Call::Ring { libc::EPERM } else { libc::EINVAL })
    }

    fn say(&self, call: Call, pid: u32, program: &Program, file: Option<&Path>) {
        let key = (program.path.clone(), call == Call::Ring);
        if !self.said.lock().is_ok_and(|mut said| said.insert(key)) {
            return;
        }
        let why = program.why;
        let name = program.path.file_name().unwrap_or(OsStr::new("a program")).to_string_lossy();
        let what = match (call, file) {
            (Call::Ring, _) => "its io_uring".to_owned(),
            (_, Some(file)) => format!("its direct I/O to {}", file.display()),
            (_, None) => "its direct I/O".to_owned(),
        };
        self.voice.say(
            pid,
            &format!(
                "{name} (pid {pid}) {why}: {what} can not be protected and was refused \
                 (--best-effort lets it pass)"
            ),
        );
    }
}

/// A file that a call is about.
struct Wanted {
    slot: usize,
    treatment: Treatment,
    /// Its path, if we could look at it.
    path: Option<PathBuf>,
}

impl Wanted {
    fn known(answer: Answer, path: PathBuf) -> Wanted {
        let effect = answer.effect().unwrap_or(Effect::Bounce);
        let treatment = Treatment { effect, private_reads: answer.private_reads() };
        Wanted { slot: answer.slot as usize, treatment, path: Some(path) }
    }

    fn hidden(files: &Files) -> Wanted {
        Wanted { slot: 0, treatment: files.treat_unknown(), path: None }
    }
}

fn is_storage(file: &OwnedFd) -> bool {
    fstat(file).map_or(true, |stat| verdict::is_storage(&stat))
}

fn target(call: Call, report: &Report) -> Target {
    let (caller, args) = (&report.caller, report.args);
    let cwd = libc::AT_FDCWD as u32 as u64;
    match call {
        Call::Open => caller.path(cwd, args[0], creates(args[1])),
        Call::OpenAt => caller.path(args[0], args[1], creates(args[2])),
        Call::OpenAt2 => {
            let flags = caller.open_how(args[2], args[3]).unwrap_or(0);
            caller.path(args[0], args[1], creates(flags))
        }
        // Whatever lies on that mount.
        Call::OpenByHandle | Call::Fcntl => caller.descriptor(args[0]),
        Call::Ring => Target::None,
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn creates(flags: u64) -> bool {
    flags & libc::O_CREAT as u64 != 0
}

/// The program that called, and why it does not have the library.
struct Program {
    path: PathBuf,
    why: &'static str,
    remark: Remark,
}

impl Program {
    fn of(caller: &Caller, library: &Path) -> Program {
        let exe = format!("/proc/{}/exe", caller.pid);
        let path = fs::read_link(&exe).unwrap_or_default();
        let kind = File::open(&exe).ok().and_then(|file| program::elf_kind(&file));
        let (why, remark) = match kind {
            _ if caller.maps(library) => {
                ("runs code that its preloaded library does not reach", Remark::RawClone)
            }
            Some(Kind::Static) => ("is statically linked", Remark::Static),
            Some(Kind::Foreign) => ("is of another architecture or C library", Remark::NoLibrary),
            _ => (
                "does not load the library (set-uid, or LD_PRELOAD was cleared)",
                Remark::NoLibrary,
            ),
        };
        Program { path, why, remark }
    }
}
