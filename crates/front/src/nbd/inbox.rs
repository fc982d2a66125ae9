//! What a client sends: requests, and the payload of its writes.
//!
//! Many requests that carry no payload are received by one call. One that
//! does is received alone, so that its payload goes straight from the socket
//! into the memory that it is written from. Which of both comes next is not
//! known: a client that wrote recently is taken to go on writing. Where that
//! is wrong, a few hundred bytes of a payload are copied once more.

use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use stableio_mem::PoolBuf;

use super::proto::REQUEST_LEN;
use super::stream::Stream;

/// Requests received by one call at most.
const BATCH: usize = 32;

/// After so many requests without payload the next ones are taken to have
/// none either.
const PATIENCE: u32 = 32;

/// The receiving side of a connection.
pub(super) struct Inbox {
    stream: Rc<Stream>,
    stall: Duration,
    buffer: [u8; BATCH * REQUEST_LEN],
    /// Of `buffer`: received and not taken yet.
    received: Range<usize>,
    since_payload: u32,
    /// The last call got less than it asked for: nothing is left to receive.
    drained: bool,
}

impl Inbox {
    /// An empty inbox. A client that does not send a payload within `stall`
    /// is hung up on.
    pub(super) fn new(stream: Rc<Stream>, stall: Duration) -> Self {
        Self {
            stream,
            stall,
            buffer: [0; BATCH * REQUEST_LEN],
            received: 0..0,
            since_payload: 0,
            drained: false,
        }
    }

    /// The next request; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends inside a request; the system's.
    pub(super) async fn request(&mut self) -> io::Result<Option<[u8; REQUEST_LEN]>> {
        while self.received.len() < REQUEST_LEN {
            if self.receive_more().await? == 0 {
                return match self.received.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
        self.since_payload = self.since_payload.saturating_add(1);
        let first = self.received.start;
        self.received.start += REQUEST_LEN;
        Ok(Some(*self.buffer[first..].first_chunk().expect("a whole request was received")))
    }

    /// Fills a part of `buf` with payload.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends before; the system's.
    pub(super) async fn payload(
        &mut self,
        buf: &mut PoolBuf,
        part: Range<usize>,
    ) -> io::Result<()> {
        (self.since_payload, self.drained) = (0, false);
        self.stream.set_receive_by(Some(Instant::now() + self.stall));
        for piece in buf.range_mut(part) {
            let here = self.received.len().min(piece.len());
            piece[..here].copy_from_slice(self.take(here));
            self.stream.receive_all(&mut piece[here..]).await?;
        }
        self.stream.set_receive_by(None);
        Ok(())
    }

    /// Drops `len` bytes of payload.
    ///
    /// # Errors
    ///
    /// As for [`payload`](Self::payload).
    pub(super) async fn skip(&mut self, mut len: usize) -> io::Result<()> {
        len -= self.take(len.min(self.received.len())).len();
        let mut waste = vec![0; len.min(64 << 10)];
        while len > 0 {
            let now = waste.len().min(len);
            self.stream.receive_all(&mut waste[..now]).await?;
            len -= now;
        }
        self.drained = false;
        Ok(())
    }

    fn take(&mut self, len: usize) -> &[u8] {
        let first = self.received.start;
        self.received.start += len;
        &self.buffer[first..first + len]
    }

    /// Receives at least a byte more of a request that is not whole yet.
    async fn receive_more(&mut self) -> io::Result<usize> {
        self.buffer.copy_within(self.received.clone(), 0);
        self.received = 0..self.received.len();
        let want = if self.since_payload < PATIENCE { REQUEST_LEN } else { self.buffer.len() };
        if std::mem::take(&mut self.drained) {
            self.stream.readable().await?;
        }
        let now = self.stream.receive(&mut self.buffer[self.received.end..want]).await?;
        self.drained = now < want - self.received.end;
        self.received.end += now;
        Ok(now)
    }
}
