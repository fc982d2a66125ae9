//! The server: clients accepted, watched and let go.
//!
//! Everything runs as tasks of one worker. Per client there is a task that
//! receives and one that sends (`connection.rs`); one task accepts, and one
//! watches the clock for all.
//!
//! SERVER-1: no client waits for another. What a client can hold, of memory
//! and of time, is bounded: connections by [`Options::max_connections`], a
//! handshake by [`Options::handshake_timeout`], requests by the window of its
//! connection, and memory that waits for it by [`Options::stall_timeout`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use stableio_block::sync::Condition;
use stableio_block::{Error, Handle, Stack, Ticket, exec, ring};

use super::connection::{Connection, Log};
use super::export::{BadExport, BlockSizes, ExportInfo};
use super::stream::Stream;
use crate::socket::Listener;

/// The longest payload, which is what clients expect that do not ask.
const MAX_PAYLOAD: u32 = 32 << 20;

/// What the kernel may hold of replies on a Unix socket, whose default makes
/// ten calls of a large one. It grants less where the administrator set less.
const SEND_BUFFER: usize = 2 << 20;

/// How long a server that stops waits for its clients to take their replies.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long to wait after the system refused to give a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is exported, and what carries its requests out.
#[derive(Clone)]
pub struct Export {
    info: ExportInfo,
    stack: Stack,
}

/// How to serve.
#[derive(Clone)]
pub struct Options {
    /// Clients at once; more are turned away.
    pub max_connections: usize,
    /// How long a client may take for the handshake.
    pub handshake_timeout: Duration,
    /// How long a client may let memory wait for it: for the payload of a
    /// write (at most 1 MiB of it), or to take some of its replies.
    pub stall_timeout: Duration,
    /// Gets a line, without its end, about whatever a person should know.
    pub log: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Default for Options {
    /// 64 clients, 10 s for a handshake, 60 s for a stall, no log.
    fn default() -> Self {
        Self {
            max_connections: 64,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            log: Arc::new(|_| {}),
        }
    }
}

impl Export {
    /// An export of a whole stack, with the block sizes that fit it.
    ///
    /// # Errors
    ///
    /// A name, or a size, that the protocol does not know.
    pub fn of(name: &str, stack: Stack) -> Result<Self, BadExport> {
        let limits = stack.limits();
        let minimum = limits.logical.max(limits.memory_align);
        let preferred = limits.physical.max(4096).max(minimum);
        let blocks = BlockSizes { minimum, preferred, max_payload: MAX_PAYLOAD.max(preferred) };
        let size = limits.size - limits.size % u64::from(minimum);
        Self::new(ExportInfo::new(name, size, blocks)?, stack)
    }

    /// An export as described by `info`.
    ///
    /// # Errors
    ///
    /// [`BadExport::Device`] when it describes more than there is, or requests
    /// that the device does not take as they are: then a write would have to
    /// be copied, for which no memory is reserved.
    pub fn new(info: ExportInfo, stack: Stack) -> Result<Self, BadExport> {
        let (limits, minimum) = (stack.limits(), info.blocks().minimum);
        let fits = info.size() <= limits.size
            && minimum.is_multiple_of(limits.logical)
            && minimum.is_multiple_of(limits.memory_align);
        if fits { Ok(Self { info, stack }) } else { Err(BadExport::Device { minimum }) }
    }

    /// The same export, described by what `change` makes of its description.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and those of `change`.
    pub fn with(
        self,
        change: impl FnOnce(ExportInfo) -> Result<ExportInfo, BadExport>,
    ) -> Result<Self, BadExport> {
        Self::new(change(self.info)?, self.stack)
    }

    /// What clients are told.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// What carries requests out.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }
}

/// A running server. Dropping it stops it without waiting.
///
/// Stop it before the worker that it runs on: what waits on a worker that is
/// gone waits for ever.
pub struct NbdServer {
    shared: Arc<Control>,
    ended: Option<Ticket<Result<(), Error>>>,
}

/// What the server's owner and its tasks share.
struct Control {
    listener: Listener,
    stopping: AtomicBool,
    clients: AtomicUsize,
}

impl NbdServer {
    /// Serves `exports`, of which the first is the default, to the clients of
    /// `listener`, by tasks of the worker `handle`.
    pub fn start(
        exports: Vec<Export>,
        listener: Listener,
        handle: &Handle,
        options: Options,
    ) -> Self {
        let (stopping, clients) = (AtomicBool::new(false), AtomicUsize::new(0));
        let shared = Arc::new(Control { listener, stopping, clients });
        let control = shared.clone();
        let ended = handle.spawn(move || async move {
            let hall = Hall::new(exports, options);
            drop(exec::spawn(hall.clone().watch()));
            hall.serve(&control).await;
            Ok(())
        });
        Self { shared, ended: Some(ended) }
    }

    /// The socket that it listens on.
    pub fn listener(&self) -> &Listener {
        &self.shared.listener
    }

    /// Clients at the moment.
    pub fn clients(&self) -> usize {
        self.shared.clients.load(Ordering::Relaxed)
    }

    /// Stops: accepts nobody any more, lets the requests under way settle and
    /// be answered, closes the connections and removes the socket's path.
    ///
    /// Blocks the calling thread, which must not be a worker's. A client that
    /// does not take its replies is waited for no longer than 5 s.
    pub fn stop(mut self) {
        self.begin_to_stop();
        if let Some(ended) = self.ended.take() {
            // The only error is a worker that ended first.
            let _ = ended.wait();
        }
    }

    fn begin_to_stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.listener.shut();
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.begin_to_stop();
    }
}

/// Where clients are, on the worker's side.
struct Hall {
    exports: Rc<[Export]>,
    infos: Rc<[ExportInfo]>,
    options: Options,
    clients: RefCell<BTreeMap<u64, Rc<Stream>>>,
    /// A client came or left, or the server ended.
    changed: Condition,
    stopping: Rc<Cell<bool>>,
    /// When clients that are still there after a stop are hung up on.
    close_by: Cell<Option<Instant>>,
    ended: Cell<bool>,
}

impl Hall {
    fn new(exports: Vec<Export>, options: Options) -> Rc<Self> {
        Rc::new(Self {
            infos: exports.iter().map(|export| export.info.clone()).collect(),
            exports: exports.into(),
            options,
            clients: RefCell::default(),
            changed: Condition::default(),
            stopping: Rc::default(),
            close_by: Cell::default(),
            ended: Cell::default(),
        })
    }

    /// Accepts clients until the server is stopped; then waits for them.
    async fn serve(self: Rc<Self>, control: &Arc<Control>) {
        let mut number = 0;
        while !control.stopping.load(Ordering::Acquire) {
            match control.listener.accept() {
                Ok(fd) => {
                    number += 1;
                    self.admit(number, fd, control);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let _ = ring::poll(control.listener.as_fd(), libc::POLLIN).await;
                }
                // Shut since the loop's condition was looked at.
                Err(_) if control.stopping.load(Ordering::Acquire) => {}
                Err(e) if is_passing(&e) => exec::yield_now().await,
                Err(e) => {
                    (self.options.log)(&format!("nbd: no connection accepted: {e}"));
                    ring::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        self.stopping.set(true);
        self.close_by.set(Some(Instant::now() + STOP_GRACE));
        self.clients.borrow().values().for_each(|stream| stream.shut_receiving());
        self.changed.wait_for(|| self.clients.borrow().is_empty().then_some(())).await;
        self.ended.set(true);
        self.changed.notify();
    }

    /// Gives a client its task, or turns it away.
    fn admit(self: &Rc<Self>, number: u64, fd: OwnedFd, control: &Arc<Control>) {
        let log = Log { sink: self.options.log.clone(), client: number };
        if self.clients.borrow().len() >= self.options.max_connections {
            return log.say(format_args!(
                "turned away: {} clients are connected",
                self.options.max_connections
            ));
        }
        tune(&fd, control.listener.tcp_address().is_some());
        let stream = Rc::new(Stream::new(fd));
        stream.set_receive_by(Some(Instant::now() + self.options.handshake_timeout));
        stream.set_send_by(Some(Instant::now() + self.options.handshake_timeout));
        self.clients.borrow_mut().insert(number, stream.clone());
        self.changed.notify();
        control.clients.fetch_add(1, Ordering::Relaxed);
        let connection = Connection {
            stream,
            exports: self.exports.clone(),
            infos: self.infos.clone(),
            stall: self.options.stall_timeout,
            stopping: self.stopping.clone(),
            log,
        };
        let (hall, control) = (self.clone(), control.clone());
        drop(exec::spawn(async move {
            connection.run().await;
            hall.clients.borrow_mut().remove(&number);
            control.clients.fetch_sub(1, Ordering::Relaxed);
            hall.changed.notify();
        }));
    }

    /// Hangs up on clients that are late: one timer for all.
    async fn watch(self: Rc<Self>) {
        let shortest = self.options.handshake_timeout.min(self.options.stall_timeout);
        let tick = (shortest / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
        loop {
            let there = || (self.ended.get() || !self.clients.borrow().is_empty()).then_some(());
            self.changed.wait_for(there).await;
            if self.ended.get() {
                return;
            }
            ring::sleep(tick).await;
            let now = Instant::now();
            let close = self.close_by.get().is_some_and(|by| by <= now);
            for stream in self.clients.borrow().values() {
                if close {
                    stream.shut();
                }
                stream.expire(now);
            }
        }
    }
}

/// Whether only that client is concerned, who gave up.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO))
}

/// Best effort: what is refused makes a connection slower, not wrong.
fn tune(fd: &OwnedFd, is_tcp: bool) {
    if is_tcp {
        let _ = sockopt::set_tcp_nodelay(fd, true);
        // Finds out about clients whose machine is gone.
        let _ = sockopt::set_socket_keepalive(fd, true);
    } else {
        let _ = sockopt::set_socket_send_buffer_size(fd, SEND_BUFFER);
    }
}
