//! What becomes of a client's requests: operations of the stack, and replies.
//!
//! SESS-1: a request is cut into pieces of at most the device's largest
//! transfer. Each piece reserves all memory that it needs at once, and nothing
//! waits for memory that holds some.
//!
//! SESS-2: the piece that settles last answers the request. If any failed, the
//! first error is the answer.
//!
//! SESS-3: a flush is submitted when it is received. What was answered before
//! on any connection has settled by then, so the flush covers it.

use std::rc::Rc;

use stableio_block::{Body, Error, Kind, Op, OpName, Request, Stack, exec};
use stableio_mem::{BLOCK, PoolTooSmall, Reservation, StableBuf};

use super::answer::{Answer, Shared, data_of};
use super::connection::{Ended, Log};
use super::export::Replies;
use super::inbox::Inbox;
use super::link::Link;
use super::proto::{
    Command, Cookie, Follow, NbdErrno, Span, error_reply, offset_data_header, simple_reply,
};

/// The transmission phase of one connection.
pub(super) struct Session {
    shared: Rc<Shared>,
    stack: Stack,
}

impl Session {
    /// A session that answers on `link` as negotiated.
    pub(super) fn new(link: Rc<Link>, stack: Stack, replies: Replies, log: Log) -> Self {
        Self { shared: Shared::new(link, replies, log), stack }
    }

    /// How requests are answered.
    pub(super) fn replies(&self) -> Replies {
        self.shared.replies
    }

    fn link(&self) -> &Rc<Link> {
        &self.shared.link
    }

    /// Answers a request that can not be carried out.
    pub(super) async fn refuse(
        &self,
        cookie: Cookie,
        errno: NbdErrno,
        why: &str,
    ) -> Result<(), Ended> {
        let charge = self.link().charge(0).await?;
        self.link().push(&error_reply(self.replies(), cookie, errno, why), None, charge);
        Ok(())
    }

    /// Begins anything but a write. Waits only for what is in flight to
    /// become less, or for a read that must go alone.
    pub(super) async fn begin(&self, cookie: Cookie, command: Command) -> Result<(), Ended> {
        match command {
            Command::Read { span, df } => self.read(cookie, span, df).await,
            Command::Flush => self.run(cookie, flush(self.stack.clone())).await,
            Command::Trim { span, fua } => {
                self.run(cookie, trim(self.stack.clone(), span, fua)).await
            }
            Command::WriteZeroes { fast: true, no_hole: true, .. } => {
                let why = "zeroing without a hole is no faster than writing";
                self.refuse(cookie, NbdErrno::Enotsup, why).await
            }
            Command::WriteZeroes { span, fua, no_hole, .. } => {
                self.run(cookie, write_zeroes(self.stack.clone(), span, fua, no_hole)).await
            }
            Command::BlockStatus { span, one } => self.block_status(cookie, span, one).await,
            Command::Write { .. } | Command::Disconnect => {
                unreachable!("{command:?} is the connection's business")
            }
        }
    }

    /// Receives the payload of a write and submits it, piece by piece. Pieces
    /// end at multiples of the largest transfer, so that they share no block.
    ///
    /// A client that goes away in the middle of a piece has written nothing
    /// of that piece.
    pub(super) async fn write(
        &self,
        inbox: &mut Inbox,
        cookie: Cookie,
        span: Span,
        fua: bool,
    ) -> Result<(), Ended> {
        let pieces = pieces(span, self.max_transfer());
        let answer = self.answer(cookie, pieces.clone().count());
        for (at, len) in pieces {
            let charge = self.link().charge(len).await?;
            let ticket = match self.receive(inbox, at, len).await? {
                Ok((data, memory)) => {
                    let request = Request::write(at, Body::Stable(data), fua);
                    self.stack.submit(request.with_memory(memory))
                }
                Err(too_small) => {
                    let (kind, op) = (Kind::Pool(too_small), OpName::Write);
                    let device = "memory".into();
                    exec::Ticket::ready(Err(Error { kind, op, device, at, len: len as u64 }))
                }
            };
            let answer = answer.clone();
            drop(exec::spawn(async move {
                let outcome = ticket.await.map(drop);
                answer.acknowledge(outcome, charge);
            }));
        }
        Ok(())
    }

    /// Receives a piece of payload into memory that fits the blocks it goes to.
    async fn receive(
        &self,
        inbox: &mut Inbox,
        at: u64,
        len: usize,
    ) -> Result<Result<(StableBuf, Reservation), PoolTooSmall>, Ended> {
        let mut memory = match self.stack.reserve_write(at, len).await {
            Ok(memory) => memory,
            Err(too_small) => {
                inbox.skip(len).await?;
                return Ok(Err(too_small));
            }
        };
        let lead = (at % BLOCK as u64) as usize;
        let mut buf = memory.take(lead + len);
        buf.zero_outside(lead..lead + len);
        inbox.payload(&mut buf, lead..lead + len).await?;
        Ok(Ok((buf.freeze().slice(lead..lead + len), memory)))
    }

    async fn read(&self, cookie: Cookie, span: Span, df: bool) -> Result<(), Ended> {
        let max = self.max_transfer();
        if span.len() as usize <= max {
            let answer = self.answer(cookie, 1);
            return self.read_piece(&answer, span.offset(), span.len() as usize).await;
        }
        if df || self.replies() == Replies::Simple {
            return self.read_alone(cookie, span).await;
        }
        let pieces = pieces(span, max);
        let answer = self.answer(cookie, pieces.clone().count());
        for (at, len) in pieces {
            self.read_piece(&answer, at, len).await?;
        }
        Ok(())
    }

    async fn read_piece(&self, answer: &Rc<Answer>, at: u64, len: usize) -> Result<(), Ended> {
        let charge = self.link().charge(len).await?;
        let ticket = self.stack.submit(Request::read_owned(at, len));
        let answer = answer.clone();
        drop(exec::spawn(async move { answer.data(at, ticket.await, charge) }));
        Ok(())
    }

    /// A read that must be answered in one piece and is larger than what is
    /// read at once: the reply is sent as its parts are read.
    ///
    /// It goes alone. Were other replies held back meanwhile, they would hold
    /// memory that the next part may be waiting for (SESS-1).
    async fn read_alone(&self, cookie: Cookie, span: Span) -> Result<(), Ended> {
        let link = self.link();
        link.idle().await;
        let mut head = match self.replies() {
            Replies::Simple => simple_reply(cookie, None).to_vec(),
            Replies::Structured { .. } => {
                offset_data_header(cookie, Follow::Done, span.offset(), span.len()).to_vec()
            }
        };
        for (at, len) in pieces(span, self.max_transfer()) {
            let charge = link.charge(len).await?;
            match self.stack.submit(Request::read_owned(at, len)).await {
                Ok(reply) => link.push(&std::mem::take(&mut head), Some(data_of(reply)), charge),
                Err(error) if head.is_empty() => return Err(Ended::ReadFailed(error)),
                Err(error) => {
                    self.answer(cookie, 1).acknowledge(Err(error), charge);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn block_status(&self, cookie: Cookie, span: Span, one: bool) -> Result<(), Ended> {
        let charge = self.link().charge(0).await?;
        let op = Op::Map { at: span.offset(), len: span.len().into() };
        let ticket = self.stack.submit(Request::of(op));
        let answer = self.answer(cookie, 1);
        drop(exec::spawn(async move { answer.status(span, one, ticket.await, charge) }));
        Ok(())
    }

    /// Spawns a request without data, and its answer.
    async fn run(
        &self,
        cookie: Cookie,
        work: impl Future<Output = Result<(), Error>> + 'static,
    ) -> Result<(), Ended> {
        let charge = self.link().charge(0).await?;
        let answer = self.answer(cookie, 1);
        drop(exec::spawn(async move { answer.acknowledge(work.await, charge) }));
        Ok(())
    }

    fn answer(&self, cookie: Cookie, pieces: usize) -> Rc<Answer> {
        Answer::new(&self.shared, cookie, pieces)
    }

    fn max_transfer(&self) -> usize {
        self.stack.limits().max_transfer as usize
    }
}

async fn flush(stack: Stack) -> Result<(), Error> {
    stack.submit(Request::flush()).await.map(drop)
}

async fn trim(stack: Stack, span: Span, fua: bool) -> Result<(), Error> {
    let op = Op::Discard { at: span.offset(), len: span.len().into() };
    stack.submit(Request::of(op)).await?;
    if fua { flush(stack).await } else { Ok(()) }
}

async fn write_zeroes(stack: Stack, span: Span, fua: bool, no_hole: bool) -> Result<(), Error> {
    if !no_hole {
        let op = Op::WriteZeroes { at: span.offset(), len: span.len().into(), fua };
        return stack.submit(Request::of(op)).await.map(drop);
    }
    // Congruent to the blocks that they go to, so that nothing is copied.
    for (at, len) in pieces(span, ZEROS.0.len()) {
        let lead = (at % BLOCK as u64) as usize;
        let zeros = StableBuf::from_owned(&ZEROS.0[lead..lead + len]);
        stack.submit(Request::write(at, Body::Stable(zeros), fua)).await?;
    }
    Ok(())
}

/// Zeros to write, aligned for direct I/O.
#[repr(align(4096))]
struct Zeros([u8; 128 << 10]);
static ZEROS: Zeros = Zeros([0; 128 << 10]);

/// The parts of a range, cut at multiples of `max`: offsets and lengths.
fn pieces(span: Span, max: usize) -> impl Iterator<Item = (u64, usize)> + Clone {
    let (max, end) = (max as u64, span.end());
    let next = move |&(at, len): &(u64, usize)| {
        let at = at + len as u64;
        (at < end).then(|| (at, (end - at).min(max - at % max) as usize))
    };
    std::iter::successors(next(&(span.offset(), 0)), next)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::export::{BlockSizes, ExportInfo};
    use crate::nbd::proto::{REQUEST_LEN, Request};

    /// Only the parser makes spans.
    fn span(at: u64, len: u32) -> Span {
        let blocks = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 25 };
        let export = ExportInfo::new("", 1 << 40, blocks).unwrap();
        let mut header = [0; REQUEST_LEN];
        header[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        header[16..24].copy_from_slice(&at.to_be_bytes());
        header[24..].copy_from_slice(&len.to_be_bytes());
        match Request::parse(&header, &export, Replies::Simple).unwrap().command {
            Command::Read { span, .. } => span,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn pieces_cover_a_range_and_share_no_block(
            at in (0_u64..4096).prop_map(|block| block << 9),
            whole in (1_u32..8192).prop_map(|blocks| blocks << 9),
            max in (12_u32..21).prop_map(|bits| 1_usize << bits),
        ) {
            let mut next = at;
            for (from, len) in pieces(span(at, whole), max) {
                prop_assert_eq!(from, next);
                prop_assert!((1..=max).contains(&len));
                next = from + len as u64;
                prop_assert!(next == at + u64::from(whole) || next % max as u64 == 0);
            }
            prop_assert_eq!(next, at + u64::from(whole));
        }
    }
}
