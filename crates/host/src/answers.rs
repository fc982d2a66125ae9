//! Answers what the library asks.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, bind, listen, recvmsg, send, socket_with,
};
use stableio_session::{Answer, Question, Request};

use crate::files::Files;
use crate::voice::Voice;

/// How long who has connected may take to ask. It asks at once; only one that is stopped in
/// between, or no library of ours, does not.
const PATIENCE: Duration = Duration::from_secs(10);

const BACKLOG: i32 = 1024;

/// Makes the socket that processes of the session ask on.
pub(crate) fn socket(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let ask = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&ask, &SocketAddrUnix::new(path)?)?;
    listen(&ask, BACKLOG)?;
    Ok(ask)
}

/// Hears one request and answers it. One that is malformed gets no answer.
pub(crate) fn converse(connection: &OwnedFd, files: &Files, voice: &Voice) -> io::Result<()> {
    set_socket_timeout(connection, Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(connection, Timeout::Send, Some(PATIENCE))?;
    let (request, file) = hear(connection)?;
    // Who it says it is may be a number of another process namespace.
    let pid = socket_peercred(connection)?.pid.as_raw_pid() as u32;
    let answer = match (request.question, file) {
        (q, Some(file)) if q == Question::File as u32 => files.answer(file, pid)?,
        (q, None) if q == Question::Say as u32 => {
            let mut text = [0; 512];
            voice.say(pid, &String::from_utf8_lossy(request.text.get(&mut text)));
            Answer { slot: 0, bits: 0 }
        }
        _ => return Err(malformed()),
    };
    let mut bytes = [0; size_of::<Answer>()];
    bytes[..4].copy_from_slice(&answer.slot.to_ne_bytes());
    bytes[4..].copy_from_slice(&answer.bits.to_ne_bytes());
    send(connection, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn malformed() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidData)
}

fn hear(connection: &OwnedFd) -> io::Result<(Request, Option<OwnedFd>)> {
    let mut bytes = [0; size_of::<Request>()];
    // Room for more descriptors than anybody sends: the kernel closes what does not fit.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(connection.as_fd(), &mut buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    if got.bytes != bytes.len() || got.flags.contains(ReturnFlags::TRUNC) || descriptors.len() > 1 {
        return Err(malformed());
    }
    // SAFETY: as many bytes as a request has; all its fields are numbers, any of which is valid.
    let request = unsafe { ptr::read_unaligned(bytes.as_ptr().cast::<Request>()) };
    Ok((request, descriptors.pop()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::IoSlice;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, recv, sendmsg, socketpair};
    use stableio_session::{Effect, Mode};

    use super::*;
    use crate::policy::Policy;
    use crate::shared::{self, Settings};

    /// What is answered to these bytes with so many descriptors of this file.
    fn ask(bytes: &[u8], file: &File, descriptors: usize) -> Option<Answer> {
        let dir = tempfile::tempdir().expect("a directory");
        let settings = Settings { mode: Mode::Run, best_effort: false, pool_bytes: 1 };
        let session = shared::create(&dir.path().join("state"), settings).expect("a session");
        let voice: &'static Voice = Box::leak(Box::default());
        let files = Files::new(session, Policy::Bounce, voice);
        let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).expect("a pair");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let sent = vec![file.as_fd(); descriptors];
        if descriptors > 0 {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&sent)));
        }
        sendmsg(&ours, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).expect("sent");
        let _ = converse(&theirs, &files, voice);
        drop(theirs);
        let mut answer = [0; 8];
        let (_, len) = recv(&ours, &mut answer[..], RecvFlags::empty()).ok()?;
        let number = |at: usize| u32::from_ne_bytes(answer[at..at + 4].try_into().expect("four"));
        let answer = Answer { slot: number(0), bits: number(4) };
        (len == 8).then_some(answer).inspect(|answer| {
            let slot = &session.files[answer.slot as usize];
            let stored = slot.answer.load(std::sync::atomic::Ordering::Relaxed);
            assert!(answer.slot == 0 || stored == answer.bits);
        })
    }

    fn request(question: u32) -> Vec<u8> {
        let mut bytes = vec![0; size_of::<Request>()];
        bytes[..4].copy_from_slice(&question.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_file_is_answered_and_nonsense_is_not() -> io::Result<()> {
        let file = tempfile::tempfile()?;
        let about_file = request(Question::File as u32);
        let answer = ask(&about_file, &file, 1).expect("an answer");
        assert!(answer.slot != 0 && answer.effect() == Some(Effect::Bounce), "{answer:?}");
        assert_eq!(ask(&about_file, &file, 0), None);
        assert_eq!(ask(&about_file, &file, 2), None);
        assert_eq!(ask(&about_file[..about_file.len() - 1], &file, 1), None);
        assert_eq!(ask(&[&about_file[..], &[0]].concat(), &file, 1), None);
        assert_eq!(ask(&request(0), &file, 1), None);
        assert_eq!(ask(&request(Question::Say as u32), &file, 1), None);
        // A pipe is no storage, whatever the policy.
        let pipe = File::from(std::os::fd::OwnedFd::from(io::pipe()?.1));
        let answer = ask(&about_file, &pipe, 1).expect("an answer");
        assert_eq!(answer.effect(), Some(Effect::Untouched));
        Ok(())
    }
}
