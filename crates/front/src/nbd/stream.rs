//! A client's socket: nonblocking calls by the task itself, and the ring only
//! to wait.
//!
//! STREAM-1: whoever waits here is ended by shutting the socket down, never
//! by dropping the wait, which would leave a poll in the ring.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use stableio_block::ring;

/// A connected stream socket.
pub(super) struct Stream {
    fd: OwnedFd,
    /// When the client must have sent what is being received.
    receive_by: Cell<Option<Instant>>,
    /// When the client must have taken some of what is being sent.
    send_by: Cell<Option<Instant>>,
    expired: Cell<bool>,
}

impl Stream {
    /// Takes a nonblocking socket over.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, receive_by: Cell::default(), send_by: Cell::default(), expired: Cell::default() }
    }

    /// Receives what is there, at least a byte; 0 at the end of the stream.
    pub(super) async fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_receive(into) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                done => return done,
            }
        }
    }

    /// Receives what is there, without waiting.
    pub(super) fn try_receive(&self, into: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the pointer and the length are those of `into`, which is
        // borrowed for the call's length.
        let done = unsafe {
            libc::recv(
                self.fd.as_raw_fd(),
                into.as_mut_ptr().cast(),
                into.len(),
                libc::MSG_DONTWAIT,
            )
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as usize) }
    }

    /// Fills `into`. `UnexpectedEof` when the stream ends before.
    pub(super) async fn receive_all(&self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match self.receive(into).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                now => into = &mut into[now..],
            }
        }
        Ok(())
    }

    /// Sends some of `pieces`, without waiting.
    pub(super) fn try_send(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        // SAFETY: all-zero is a valid `msghdr`: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // `IoSlice` has the layout of `iovec`; the kernel only reads them.
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `message` points to `pieces` and through them to bytes that
        // are borrowed for the call's length.
        let done = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, flags) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as usize) }
    }

    /// Sends all of `bytes`.
    pub(super) async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_send(&[IoSlice::new(bytes)]) {
                Ok(now) => bytes = &bytes[now..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Waits until there is something to receive, or the end.
    pub(super) async fn readable(&self) -> io::Result<()> {
        ring::poll(self.fd.as_fd(), libc::POLLIN).await
    }

    /// Waits until something can be sent.
    pub(super) async fn writable(&self) -> io::Result<()> {
        ring::poll(self.fd.as_fd(), libc::POLLOUT).await
    }

    /// Nothing more is received: whoever waits for it sees the end.
    pub(super) fn shut_receiving(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// Hangs up: whoever waits here sees the end.
    pub(super) fn shut(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Until when the client must have sent what is being received.
    pub(super) fn set_receive_by(&self, by: Option<Instant>) {
        self.receive_by.set(by);
    }

    /// Until when the client must have taken something.
    pub(super) fn set_send_by(&self, by: Option<Instant>) {
        self.send_by.set(by);
    }

    /// Hangs up on a client that is late.
    pub(super) fn expire(&self, now: Instant) {
        let late = |by: &Cell<Option<Instant>>| by.get().is_some_and(|by| by <= now);
        if late(&self.receive_by) || late(&self.send_by) {
            self.expired.set(true);
            self.shut();
        }
    }

    /// Whether [`expire`](Self::expire) hung up.
    pub(super) fn is_expired(&self) -> bool {
        self.expired.get()
    }
}
