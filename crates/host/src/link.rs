//! What launcher and supervisor say to each other, over a pair of sockets that keep messages apart.
//!
//! The launcher is the process that the user sees: it has the user's terminal, passes on signals,
//! and ends as the command ends. The supervisor is its child and the command's parent, in a session
//! of its own, and stays until every process of the session has ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::{read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// What is said. The end of the supervisor's half means: all is over and cleaned up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// To the supervisor: send this signal to the command.
    Signal(i32),
    /// To the launcher: the command was not started, because of this error.
    NotStarted(i32),
    /// To the launcher: the net could not be spread, because of this error; the command runs
    /// without it, or does not if it must not.
    NoNet(i32),
    /// To the launcher: the command has ended, with this status of wait(2).
    Ended(i32),
    /// To the launcher, after that: others of the session still live.
    GoesOn,
}

impl Message {
    fn to_bytes(self) -> [u8; 8] {
        let (kind, value) = match self {
            Message::Signal(value) => (1_u32, value),
            Message::NotStarted(value) => (2, value),
            Message::NoNet(value) => (3, value),
            Message::Ended(value) => (4, value),
            Message::GoesOn => (5, 0),
        };
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[4..].copy_from_slice(&value.to_ne_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 8]) -> Option<Message> {
        let [a, b, c, d, value @ ..] = bytes;
        let value = i32::from_ne_bytes(value);
        Some(match u32::from_ne_bytes([a, b, c, d]) {
            1 => Message::Signal(value),
            2 => Message::NotStarted(value),
            3 => Message::NoNet(value),
            4 => Message::Ended(value),
            5 => Message::GoesOn,
            _ => return None,
        })
    }

    /// Sends it. System calls only, for use between fork and exec.
    pub(crate) fn send(self, to: impl AsFd) -> io::Result<()> {
        Ok(write(to, &self.to_bytes()).map(drop)?)
    }

    /// Waits for the next; `None`: the other end is closed.
    pub(crate) fn receive(from: impl AsFd) -> io::Result<Option<Message>> {
        let mut bytes = [0; 8];
        let len = rustix::io::retry_on_intr(|| read(&from, &mut bytes))?;
        Ok((len == bytes.len()).then(|| Message::from_bytes(bytes)).flatten())
    }
}

/// Both ends of a link; neither survives exec.
pub(crate) fn link() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
