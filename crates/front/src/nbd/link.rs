//! What the tasks of one connection share: the replies that wait to be sent,
//! and the account of what is in flight.
//!
//! LINK-1: whatever a connection has in flight, from a request's acceptance
//! until its reply is sent, holds a [`Charge`]; beyond [`MAX_PIECES`] and
//! [`WINDOW`] nothing more is accepted from it. So a client that never reads
//! its replies makes itself wait and holds little memory.
//!
//! LINK-2: only the task that receives requests waits for a charge, and it
//! holds no memory then. What it waits for goes on without it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::rc::Rc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use stableio_block::sync::Condition;
use stableio_mem::StableBuf;

use super::stream::Stream;

/// Requests, or pieces of large ones, in flight on a connection.
const MAX_PIECES: usize = 128;

/// Bytes of their data.
const WINDOW: usize = 8 << 20;

/// Pieces of memory that one call sends from.
const MAX_SLICES: usize = 256;

/// The sending side of a connection, and its account.
pub(super) struct Link {
    stream: Rc<Stream>,
    stall: Duration,
    /// Replies not sent yet. `sent` bytes of the first are.
    queue: RefCell<VecDeque<Reply>>,
    sent: Cell<usize>,
    queued: Condition,
    pieces: Cell<usize>,
    bytes: Cell<usize>,
    released: Condition,
    closing: Cell<bool>,
    broken: Cell<bool>,
}

/// A reply, or a chunk of one: encoded bytes, then data.
pub(super) struct Reply {
    head: SmallVec<[u8; 32]>,
    data: Option<StableBuf>,
    /// Given back when the reply is sent, or dropped unsent.
    _charge: Charge,
}

/// A place among what is in flight (LINK-1); given back when dropped.
pub(super) struct Charge {
    link: Rc<Link>,
    bytes: usize,
}

/// The client can not be answered any more.
pub(super) struct Broken;

impl Link {
    /// A link whose client must take some of what waits for it within `stall`.
    pub(super) fn new(stream: Rc<Stream>, stall: Duration) -> Rc<Self> {
        Rc::new(Self {
            stream,
            stall,
            queue: RefCell::default(),
            sent: Cell::default(),
            queued: Condition::default(),
            pieces: Cell::default(),
            bytes: Cell::default(),
            released: Condition::default(),
            closing: Cell::default(),
            broken: Cell::default(),
        })
    }

    /// Waits for room for a piece with `bytes` of data (LINK-1). One that is
    /// larger than the window goes alone.
    pub(super) async fn charge(self: &Rc<Self>, bytes: usize) -> Result<Charge, Broken> {
        let room = || {
            let fits = self.pieces.get() < MAX_PIECES && self.bytes.get() + bytes <= WINDOW;
            (fits || self.pieces.get() == 0 || self.broken.get()).then_some(())
        };
        self.released.wait_for(room).await;
        if self.broken.get() {
            return Err(Broken);
        }
        self.pieces.set(self.pieces.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Ok(Charge { link: self.clone(), bytes })
    }

    /// Waits until nothing is in flight: all settled, all sent.
    pub(super) async fn idle(&self) {
        self.released.wait_for(|| (self.pieces.get() == 0).then_some(())).await;
    }

    /// Puts a reply behind those that wait to be sent.
    pub(super) fn push(&self, head: &[u8], data: Option<StableBuf>, charge: Charge) {
        if self.broken.get() {
            return;
        }
        let reply = Reply { head: SmallVec::from_slice(head), data, _charge: charge };
        self.queue.borrow_mut().push_back(reply);
        self.queued.notify();
    }

    /// [`send`](Self::send) ends once all is sent.
    pub(super) fn close(&self) {
        self.closing.set(true);
        self.queued.notify();
    }

    /// Sends what is pushed, as it comes, until [`close`](Self::close): a task
    /// of its own. What is ready together goes together.
    pub(super) async fn send(self: Rc<Self>) {
        loop {
            let more = || (!self.queue.borrow().is_empty() || self.closing.get()).then_some(());
            self.queued.wait_for(more).await;
            if self.queue.borrow().is_empty() {
                return;
            }
            let sent = match self.send_some() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.set_send_by(Some(Instant::now() + self.stall));
                    let writable = self.stream.writable().await;
                    self.stream.set_send_by(None);
                    writable
                }
                sent => sent,
            };
            if sent.is_err() {
                return self.fail();
            }
        }
    }

    /// One call, with as many replies as it takes.
    fn send_some(&self) -> io::Result<()> {
        let sent = {
            let queue = self.queue.borrow();
            let mut slices: SmallVec<[IoSlice<'_>; 64]> = SmallVec::new();
            let mut skip = self.sent.get();
            for piece in queue.iter().flat_map(Reply::pieces) {
                let left = piece.split_at_checked(skip).map_or(&[][..], |(_, left)| left);
                skip = skip.saturating_sub(piece.len());
                if !left.is_empty() {
                    slices.push(IoSlice::new(left));
                }
                if slices.len() == MAX_SLICES {
                    break;
                }
            }
            self.stream.try_send(&slices)?
        };
        self.advance(sent);
        Ok(())
    }

    /// Drops the replies that are sent.
    fn advance(&self, sent: usize) {
        let mut left = self.sent.get() + sent;
        let mut queue = self.queue.borrow_mut();
        while let Some(len) = queue.front().map(Reply::len).filter(|len| *len <= left) {
            left -= len;
            queue.pop_front();
        }
        self.sent.set(left);
    }

    /// Nothing can be sent any more: whoever receives ends too.
    fn fail(&self) {
        self.broken.set(true);
        self.stream.shut();
        let unsent = std::mem::take(&mut *self.queue.borrow_mut());
        drop(unsent);
        self.released.notify();
    }
}

impl Reply {
    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.head[..]).chain(self.data.iter().flat_map(StableBuf::pieces))
    }

    fn len(&self) -> usize {
        self.head.len() + self.data.as_ref().map_or(0, StableBuf::len)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.link.pieces.set(self.link.pieces.get() - 1);
        self.link.bytes.set(self.link.bytes.get() - self.bytes);
        self.link.released.notify();
    }
}
