//! The answers to requests, put together from what their pieces settled with.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use stableio_block::{Error, Kind, Outcome, Reply};
use stableio_mem::StableBuf;

use super::connection::Log;
use super::export::Replies;
use super::link::{Charge, Link};
use super::proto::{
    Allocation, Cookie, Extents, Follow, NbdErrno, Span, error_reply, offset_data_header,
    simple_reply,
};

/// What the tasks of all requests of a connection share.
pub(super) struct Shared {
    /// Where replies go.
    pub(super) link: Rc<Link>,
    /// How the client wants them.
    pub(super) replies: Replies,
    log: Log,
    failed: Cell<u64>,
}

impl Shared {
    /// What a connection starts with.
    pub(super) fn new(link: Rc<Link>, replies: Replies, log: Log) -> Rc<Self> {
        Rc::new(Self { link, replies, log, failed: Cell::default() })
    }
}

impl Drop for Shared {
    /// The first failure was told when it happened; a broken device would
    /// make a line per request of the others.
    fn drop(&mut self) {
        if self.failed.get() > 1 {
            self.log.say(format_args!("{} requests failed in all", self.failed.get()));
        }
    }
}

/// The answer to one request. Its pieces share it; the one that settles last
/// sends it (SESS-2).
pub(super) struct Answer {
    shared: Rc<Shared>,
    cookie: Cookie,
    left: Cell<usize>,
    error: RefCell<Option<Error>>,
}

impl Answer {
    /// The answer to the request `cookie`, which has so many pieces.
    pub(super) fn new(shared: &Rc<Shared>, cookie: Cookie, pieces: usize) -> Rc<Self> {
        let shared = shared.clone();
        Rc::new(Self { shared, cookie, left: Cell::new(pieces), error: RefCell::default() })
    }

    /// A piece has settled that gives no data.
    pub(super) fn acknowledge(&self, outcome: Result<(), Error>, charge: Charge) {
        match self.settle(outcome.err()) {
            Settled::More => {}
            Settled::Failed(error) => self.fail(&error, charge),
            Settled::Done => self.push(&simple_reply(self.cookie, None), None, charge),
        }
    }

    /// A piece of a read, from `at` on, has settled.
    pub(super) fn data(&self, at: u64, outcome: Outcome, charge: Charge) {
        let (data, error) = match outcome {
            Ok(reply) => (Some(data_of(reply)), None),
            Err(error) => (None, Some(error)),
        };
        let follow = match self.settle(error) {
            Settled::More => Follow::More,
            Settled::Failed(error) => return self.fail(&error, charge),
            Settled::Done => Follow::Done,
        };
        let Some(data) = data else { return };
        match self.shared.replies {
            Replies::Simple => self.push(&simple_reply(self.cookie, None), Some(data), charge),
            Replies::Structured { .. } => {
                let head = offset_data_header(self.cookie, follow, at, data.len() as u32);
                self.push(&head, Some(data), charge);
            }
        }
    }

    /// A map has settled.
    pub(super) fn status(&self, span: Span, one: bool, outcome: Outcome, charge: Charge) {
        let mut extents = Extents::new(span, one);
        match outcome {
            Ok(Reply::Map(map)) => {
                let status = |data| if data { Allocation::Data } else { Allocation::Hole };
                let mut described = map.iter().filter(|extent| extent.len > 0).peekable();
                if described.peek().is_none() {
                    extents.push(span.len().into(), Allocation::Data);
                }
                // Stops at the first that is not wanted any more.
                let _ = described.all(|extent| extents.push(extent.len, status(extent.data)));
            }
            // A device that can not tell: all of it may be data.
            Err(Error { kind: Kind::Unsupported, .. }) => {
                extents.push(span.len().into(), Allocation::Data);
            }
            Err(error) => return self.acknowledge(Err(error), charge),
            Ok(other) => unreachable!("a map settled with {other:?}"),
        }
        self.push(&extents.encode(self.cookie), None, charge);
    }

    /// Counts a piece as settled and keeps the first error for the last piece.
    fn settle(&self, error: Option<Error>) -> Settled {
        if let Some(error) = error {
            if self.shared.failed.replace(self.shared.failed.get() + 1) == 0 {
                self.shared.log.say(&error);
            }
            self.error.borrow_mut().get_or_insert(error);
        }
        self.left.set(self.left.get() - 1);
        match self.left.get() {
            0 => self.error.take().map_or(Settled::Done, Settled::Failed),
            _ => Settled::More,
        }
    }

    fn fail(&self, error: &Error, charge: Charge) {
        // Without the device's name, which is a path of the server's.
        let message = format!("{}: {}", error.op, error.kind);
        let reply = error_reply(self.shared.replies, self.cookie, errno(error), &message);
        self.push(&reply, None, charge);
    }

    fn push(&self, head: &[u8], data: Option<StableBuf>, charge: Charge) {
        self.shared.link.push(head, data, charge);
    }
}

/// Where a request is when a piece of it has settled.
enum Settled {
    /// Other pieces have not.
    More,
    /// All have, and this was the first error.
    Failed(Error),
    /// All have, well.
    Done,
}

/// What a read into the pool gave.
pub(super) fn data_of(reply: Reply) -> StableBuf {
    match reply {
        Reply::Data(data) => data,
        other => unreachable!("a read into the pool settled with {other:?}"),
    }
}

/// The protocol knows few errors; what it does not know is an I/O error.
fn errno(error: &Error) -> NbdErrno {
    match error.errno() {
        libc::EPERM | libc::EACCES | libc::EROFS => NbdErrno::Eperm,
        libc::ENOMEM => NbdErrno::Enomem,
        libc::EINVAL => NbdErrno::Einval,
        libc::ENOSPC | libc::EDQUOT => NbdErrno::Enospc,
        libc::EOPNOTSUPP => NbdErrno::Enotsup,
        libc::ESHUTDOWN => NbdErrno::Eshutdown,
        _ => NbdErrno::Eio,
    }
}
