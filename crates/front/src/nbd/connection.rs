//! One client's connection: the handshake, then its requests until it leaves.
//!
//! Two tasks run it. This one receives, submits and never waits for a request
//! to settle; the other one sends ([`Link::send`]). In between, every piece of
//! a request has a small task that waits for its ticket and queues the reply.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use stableio_block::exec;
use thiserror::Error;

use super::export::{ExportInfo, Replies};
use super::inbox::Inbox;
use super::link::{Broken, Link};
use super::negotiate::{
    CLIENT_FLAGS_LEN, ClientFlags, GREETING, HangUp, Negotiation, OPTION_HEADER_LEN, OptionData,
    OptionHeader, Outcome,
};
use super::proto::{BadRequest, Command, Refusal, Request};
use super::server::Export;
use super::session::Session;
use super::stream::Stream;

/// Requests taken in a row before other tasks run.
const TURN: usize = 64;

/// Why a connection ended otherwise than its client announced.
#[derive(Debug, Error)]
pub(super) enum Ended {
    /// In the handshake.
    #[error("hung up in the handshake: {0}")]
    HangUp(#[from] HangUp),
    /// Where the next request should be.
    #[error("hung up: {0}")]
    BadRequest(BadRequest),
    /// The reply had begun and could not be ended.
    #[error("hung up, as a read failed whose reply had begun: {0}")]
    ReadFailed(stableio_block::Error),
    /// In the middle of something.
    #[error("went away: {0}")]
    Gone(#[from] io::Error),
    /// The sending side had enough.
    #[error("went away: its replies can not be sent")]
    Broken,
    /// Too slow, by one of the time limits.
    #[error("hung up: the client made no progress")]
    TimedOut,
}

impl From<Broken> for Ended {
    fn from(_: Broken) -> Self {
        Ended::Broken
    }
}

/// Says something about one client.
#[derive(Clone)]
pub(super) struct Log {
    /// Where lines go.
    pub(super) sink: Arc<dyn Fn(&str) + Send + Sync>,
    /// The client's number.
    pub(super) client: u64,
}

impl Log {
    /// A line.
    pub(super) fn say(&self, what: impl std::fmt::Display) {
        (self.sink)(&format!("nbd client {}: {what}", self.client));
    }
}

/// What a connection is made from.
pub(super) struct Connection {
    /// The client's socket.
    pub(super) stream: Rc<Stream>,
    /// What may be asked for; the same order in `infos`.
    pub(super) exports: Rc<[Export]>,
    /// What clients are told of it.
    pub(super) infos: Rc<[ExportInfo]>,
    /// How long a client may keep memory waiting for it.
    pub(super) stall: Duration,
    /// The server is being stopped.
    pub(super) stopping: Rc<Cell<bool>>,
    /// Where lines about this client go.
    pub(super) log: Log,
}

impl Connection {
    /// Runs until the client leaves and all that it asked for has settled.
    pub(super) async fn run(self) {
        let ended = match self.handshake().await {
            Ok(Some((export, replies))) => self.transmission(export, replies).await,
            Ok(None) => Ok(()),
            Err(ended) => Err(ended),
        };
        match ended {
            _ if self.stream.is_expired() => self.log.say(Ended::TimedOut),
            Err(ended) if !self.stopping.get() => self.log.say(ended),
            _ => {}
        }
    }

    /// Negotiates an export and how to answer; `None` if the client leaves.
    async fn handshake(&self) -> Result<Option<(usize, Replies)>, Ended> {
        self.stream.send_all(&GREETING).await?;
        let mut flags = [0; CLIENT_FLAGS_LEN];
        // Whoever only looks whether somebody listens is no failure.
        match self.stream.receive(&mut flags).await? {
            0 => return Ok(None),
            some => self.stream.receive_all(&mut flags[some..]).await?,
        }
        let mut negotiation = Negotiation::new(&self.infos, ClientFlags::parse(flags)?);
        loop {
            let mut header = [0; OPTION_HEADER_LEN];
            self.stream.receive_all(&mut header).await?;
            let header = OptionHeader::parse(&header)?;
            let answer = match header.data() {
                OptionData::Read(len) => {
                    let mut data = vec![0; len];
                    self.stream.receive_all(&mut data).await?;
                    negotiation.answer(header, &data)?
                }
                OptionData::Skip(len) => {
                    self.stream.receive_all(&mut vec![0; len]).await?;
                    negotiation.answer_too_big(header)?
                }
            };
            self.stream.send_all(&answer.bytes).await?;
            match answer.outcome {
                Outcome::Continue => {}
                Outcome::Abort => return Ok(None),
                Outcome::Transmission { export, replies } => return Ok(Some((export, replies))),
            }
        }
    }

    /// Takes requests; then lets what is in flight settle and be answered.
    async fn transmission(&self, export: usize, replies: Replies) -> Result<(), Ended> {
        self.stream.set_receive_by(None);
        self.stream.set_send_by(None);
        let link = Link::new(self.stream.clone(), self.stall);
        drop(exec::spawn(link.clone().send()));
        let stack = self.exports[export].stack().clone();
        let session = Session::new(link.clone(), stack, replies, self.log.clone());
        let ended = self.requests(&self.infos[export], &session).await;
        link.idle().await;
        link.close();
        ended
    }

    /// Takes requests until the client announces its leave or just leaves.
    async fn requests(&self, export: &ExportInfo, session: &Session) -> Result<(), Ended> {
        let mut inbox = Inbox::new(self.stream.clone(), self.stall);
        let mut turn = 0;
        while let Some(header) = inbox.request().await? {
            if self.stopping.get() {
                break;
            }
            turn += 1;
            if turn % TURN == 0 {
                exec::yield_now().await;
            }
            match Request::parse(&header, export, session.replies()) {
                Ok(Request { command: Command::Disconnect, .. }) => break,
                Ok(Request { cookie, command: Command::Write { span, fua } }) => {
                    session.write(&mut inbox, cookie, span, fua).await?;
                }
                Ok(Request { cookie, command }) => session.begin(cookie, command).await?,
                Err(BadRequest::Refused(refusal)) => {
                    let Refusal { cookie, errno, why, skip } = refusal;
                    inbox.skip(skip as usize).await?;
                    session.refuse(cookie, errno, why).await?;
                }
                Err(bad) => return Err(Ended::BadRequest(bad)),
            }
        }
        Ok(())
    }
}
