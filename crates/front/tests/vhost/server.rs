//! The back end under test.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stableio_block::dev::{FileDevice, OpenOptions, RamDevice};
use stableio_block::{
    Device, Handle, Limits, Outcome, Reply, Request, Stack, Ticket, Worker, ring,
};
use stableio_front::vhost_user_blk::{Options, VhostUserBlk};
use stableio_mem::Pool;
use stableio_testkit::Scratch;
use stableio_testkit::vhost::Guest;

pub(crate) const MIB: usize = 1 << 20;

/// An export with its worker, which ends after it.
pub(crate) struct Server {
    pub(crate) export: VhostUserBlk,
    pub(crate) socket: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    _worker: Worker,
    _scratch: Scratch,
}

impl Server {
    /// On a RAM disk.
    pub(crate) fn ram(size: u64) -> Server {
        Self::new(false, |worker, _| {
            Arc::new(RamDevice::new(size, worker.handle().clone()).unwrap())
        })
    }

    /// On a file.
    pub(crate) fn file(size: u64) -> Server {
        Self::new(false, |worker, scratch| {
            let path = scratch.sparse("disk.img", size).unwrap();
            let handle = worker.handle().clone();
            Arc::new(FileDevice::open(&path, &OpenOptions::default(), handle).unwrap())
        })
    }

    pub(crate) fn new(
        read_only: bool,
        device: impl FnOnce(&Worker, &Scratch) -> Arc<dyn Device>,
    ) -> Server {
        let (scratch, worker) = (Scratch::new().unwrap(), Worker::start("worker").unwrap());
        let device = device(&worker, &scratch);
        let pool = Pool::new(16 * MIB).unwrap();
        let stack = Stack::new("disk", device, pool, worker.handle().clone());
        let socket = scratch.path("blk.sock");
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let options = Options {
            serial: "a serial number longer than twenty bytes".into(),
            queues: 2,
            queue_size: 256,
            read_only,
            log: {
                let log = log.clone();
                Arc::new(move |line| log.lock().unwrap().push(line.into()))
            },
        };
        let listener = UnixListener::bind(&socket).unwrap();
        let export = VhostUserBlk::start(listener, stack, options).unwrap();
        Server { export, socket, log, _worker: worker, _scratch: scratch }
    }

    /// A guest with 4 MiB of memory.
    pub(crate) fn guest(&self, queues: usize) -> Guest {
        Guest::connect(&self.socket, queues, 4 * MIB).unwrap()
    }

    /// Whether a line of the log contains `text`. Lines are written by other
    /// threads: this waits a while.
    pub(crate) fn logs(&self, text: &str) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            self.log.lock().unwrap().iter().any(|line| line.contains(text))
        })
    }
}

/// A disk that takes its time, and counts.
#[derive(Clone)]
pub(crate) struct Slow {
    limits: Limits,
    worker: Handle,
    counts: Arc<[AtomicUsize; 3]>,
}

impl Slow {
    /// A server on one.
    pub(crate) fn server() -> (Server, Slow) {
        let mut slow = None;
        let server = Server::new(false, |worker, _| {
            let ram = RamDevice::new(1 << 20, worker.handle().clone()).unwrap();
            let limits = ram.limits().clone();
            let made = Slow { limits, worker: worker.handle().clone(), counts: Arc::default() };
            Arc::new(slow.insert(made).clone())
        });
        (server, slow.expect("made above"))
    }

    /// Requests under way.
    pub(crate) fn now(&self) -> usize {
        self.counts[0].load(Ordering::SeqCst)
    }

    /// The most that were under way at once.
    pub(crate) fn most(&self) -> usize {
        self.counts[1].load(Ordering::SeqCst)
    }

    /// Requests that it has seen.
    pub(crate) fn begun(&self) -> usize {
        self.counts[2].load(Ordering::SeqCst)
    }
}

impl Device for Slow {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let counts = self.counts.clone();
        let now = 1 + counts[0].fetch_add(1, Ordering::SeqCst);
        counts[1].fetch_max(now, Ordering::SeqCst);
        counts[2].fetch_add(1, Ordering::SeqCst);
        self.worker.spawn(move || async move {
            ring::sleep(Duration::from_millis(20)).await;
            drop(request);
            counts[0].fetch_sub(1, Ordering::SeqCst);
            Ok(Reply::Done)
        })
    }
}
