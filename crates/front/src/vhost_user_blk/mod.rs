//! The vhost-user-blk back end: a [`Stack`] as the disk of a virtual machine.
//!
//! A front end (QEMU, cloud-hypervisor, crosvm) connects to a Unix socket,
//! shares the guest's memory and names its virtqueues; from then on guest and
//! back end talk through that memory alone.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | the socket and its control thread |
//! | `session.rs` | one connection: vhost-user messages, the state of the rings |
//! | `memory.rs` | the guest's memory, mapped and watched |
//! | `queue.rs` | a started virtqueue, on the worker |
//! | `chain.rs` | a descriptor chain becomes a request |
//! | `config.rs` | feature bits and configuration space |
//! | `fuzz.rs` | hostile rings without a front end |
//!
//! Guest memory is foreign memory: data is neither copied nor looked at here,
//! it goes down as a `ForeignBuf`, and the stack decides.
//!
//! Formats: VIRTIO 1.2, sections 2.7 (split virtqueues) and 5.2 (block
//! device); the vhost-user protocol of QEMU's documentation.
//!
//! Not offered: packed rings, in-flight tracking and migration. A front end
//! that is still there after a crash of this process must not reconnect to
//! its rings, and does not: that takes `INFLIGHT_SHMFD`.

mod chain;
mod config;
mod fuzz;
mod memory;
mod queue;
mod session;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use stableio_block::{Issuer, Stack};
use vhost::vhost_user::{BackendReqHandler, Error};

#[doc(hidden)]
pub use fuzz::fuzz_chain;

use config::ID_BYTES;
use session::{Line, Session};

/// Takes a line for a person to read.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// How to export a stack.
#[derive(Clone)]
pub struct Options {
    /// What the guest sees as the disk's serial number: the first 20 bytes.
    pub serial: String,
    /// Virtqueues, at least one.
    pub queues: u16,
    /// Entries of the largest virtqueue: a power of two.
    pub queue_size: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Takes what a person should know: why a queue or a connection ended.
    pub log: Log,
}

/// An export that runs until it is stopped or dropped, which must be before
/// the stack's worker is.
///
/// One front end is served at a time; others wait in the socket's backlog.
pub struct VhostUserBlk {
    shared: Arc<Shared>,
    issuers: Vec<Arc<Issuer>>,
    control: Option<JoinHandle<()>>,
}

impl VhostUserBlk {
    /// Exports `stack` on a listening socket, which stays the caller's to
    /// remove from the file system.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for options that can not be; the system's, when it has
    /// no thread or no descriptor left.
    pub fn start(listener: UnixListener, stack: Stack, options: Options) -> io::Result<Self> {
        let device = Arc::new(Device::new(stack, options)?);
        let issuers = device.stacks.iter().map(|stack| stack.issuer().clone()).collect();
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            line: Mutex::new(None),
        });
        let control = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("vhost-user-blk".into())
                .spawn(move || shared.serve(&listener, &device))?
        };
        Ok(Self { shared, issuers, control: Some(control) })
    }

    /// The queues as sources of requests, in order.
    pub fn issuers(&self) -> &[Arc<Issuer>] {
        &self.issuers
    }

    /// Whether a front end is connected.
    pub fn is_connected(&self) -> bool {
        self.shared.line().is_some()
    }

    /// Takes no more requests and waits until those under way have settled.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for VhostUserBlk {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(control) = self.control.take() {
            // It ends without a panic, or has reported it already.
            let _ = control.join();
        }
    }
}

/// What all connections of an export have in common.
struct Device {
    /// By queue: each is a source of requests of its own.
    stacks: Vec<Stack>,
    id: [u8; ID_BYTES],
    queues: u16,
    queue_size: u16,
    read_only: bool,
    log: Log,
}

impl Device {
    fn new(stack: Stack, options: Options) -> io::Result<Self> {
        let Options { serial, queues, queue_size, read_only, log } = options;
        if queues == 0 || queues > 256 || !queue_size.is_power_of_two() || queue_size > 1 << 15 {
            let text = "1 to 256 queues of a power of two up to 32768 entries";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let name = stack.issuer().name();
        let stacks = (0..queues)
            .map(|queue| stack.for_issuer(Arc::new(Issuer::new(format!("{name}, queue {queue}")))))
            .collect();
        Ok(Self { stacks, id, queues, queue_size, read_only, log })
    }
}

/// What the control thread shares with the handle.
struct Shared {
    stop: AtomicBool,
    /// Ends the wait for a connection.
    bell: OwnedFd,
    /// The connection that is served.
    line: Mutex<Option<Arc<Line>>>,
}

impl Shared {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        if let Some(line) = &*self.line() {
            line.hang_up();
        }
    }

    fn line(&self) -> MutexGuard<'_, Option<Arc<Line>>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The control thread: one connection after the other.
    fn serve(&self, listener: &UnixListener, device: &Arc<Device>) {
        while let Some(stream) = self.accept(listener, &device.log) {
            let Ok(line) = Line::new(&stream).map(Arc::new) else { continue };
            *self.line() = Some(line.clone());
            // Either `stop` finds the line, or we find that it was called.
            if !self.stop.load(Ordering::SeqCst) {
                talk(stream, Session::new(device.clone(), line), &device.log);
            }
            *self.line() = None;
        }
    }

    /// Waits for a connection; `None` when it is time to stop.
    fn accept(&self, listener: &UnixListener, log: &Log) -> Option<UnixStream> {
        loop {
            let mut ready =
                [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
            let _ = poll(&mut ready, None);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            let accepted = listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) => return Some(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    log(&format!("vhost-user-blk: can not accept a connection: {e}"));
                    // Out of descriptors, most likely: they come back.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }
}

/// Serves a connection to its end. The session goes with it, and waits for
/// the requests that are still under way.
fn talk(stream: UnixStream, session: Session, log: &Log) {
    let mut handler = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(session)));
    loop {
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => return,
            Err(e) => return log(&format!("vhost-user-blk: the connection is ended: {e}")),
        }
    }
}
