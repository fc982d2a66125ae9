//! The files of a session: each is looked at once, and its slot says what is done with it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use rustix::fs::fstat;
use stableio_session::{Answer, Effect, Session};

use crate::policy::{Policy, Treatment};
use crate::verdict::{Known, Verdict, verdict};
use crate::voice::Voice;

/// Answers what is to be done with a file.
pub(crate) struct Files {
    pub(crate) session: &'static Session,
    policy: Policy,
    voice: &'static Voice,
    /// Held while a slot is taken and filled (SHARE-1: one writer).
    entering: Mutex<()>,
}

impl Files {
    pub(crate) fn new(session: &'static Session, policy: Policy, voice: &'static Voice) -> Files {
        Files { session, policy, voice, entering: Mutex::new(()) }
    }

    /// What is done with this file, which `pid` has or wants. It may be open as a mere path.
    pub(crate) fn answer(&self, file: impl AsFd, pid: u32) -> io::Result<Answer> {
        let file = file.as_fd();
        let stat = fstat(file)?;
        if let Some(answer) = self.known(stat.st_dev, stat.st_ino) {
            return Ok(answer);
        }
        // May take its time: others are answered meanwhile.
        let verdict = verdict(file, &stat);
        let Treatment { effect, private_reads } = self.policy.treat(&verdict);
        let path = path_of(file);
        let _entering = self.entering.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(answer) = self.known(stat.st_dev, stat.st_ino) {
            return Ok(answer);
        }
        if effect == Effect::Refuse {
            self.voice.say(pid, &refusal(&path, &verdict));
        }
        let Some(slot) = self.session.enter(stat.st_dev, stat.st_ino) else {
            return Ok(Answer::new(0, effect, private_reads));
        };
        let entry = &self.session.files[slot];
        entry.path.set(path.as_os_str().as_bytes());
        entry.reason.set(verdict.reason.as_bytes());
        let answer = Answer::new(slot as u32, effect, private_reads);
        entry.answer.store(answer.bits, Ordering::Release);
        Ok(answer)
    }

    fn known(&self, dev: u64, ino: u64) -> Option<Answer> {
        let slot = self.session.find(dev, ino)?;
        let bits = self.session.files[slot].answer.load(Ordering::Acquire);
        let answer = Answer { slot: slot as u32, bits };
        answer.effect().map(|_| answer)
    }

    /// What would be done with a file that nobody can look at.
    pub(crate) fn treat_unknown(&self) -> Treatment {
        self.policy.treat(&Verdict::unknown(String::new()))
    }
}

fn path_of(file: BorrowedFd<'_>) -> PathBuf {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::read_link(link).unwrap_or_else(|_| PathBuf::from("?"))
}

fn refusal(path: &std::path::Path, verdict: &Verdict) -> String {
    let why = match verdict.samples_twice {
        Known::Unknown => "nobody can tell whether the data is read more than once: ",
        Known::Yes | Known::No => "",
    };
    format!("direct I/O to {} is refused: {why}{}", path.display(), verdict.reason)
}
