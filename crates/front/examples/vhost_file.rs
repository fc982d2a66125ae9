//! Serves a file over vhost-user-blk until it is killed.
//!
//! ```text
//! vhost_file FILE SOCKET [--queues N] [--read-only] [--promise]
//! ```

use std::error::Error;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Stack, Worker};
use stableio_front::vhost_user_blk::{Options, VhostUserBlk};
use stableio_mem::{Grant, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [file, socket, options @ ..] = &words[..] else {
        return Err("vhost_file FILE SOCKET [--queues N] [--read-only] [--promise]".into());
    };
    let has = |name: &str| options.iter().any(|word| word == name);
    let queues = options.iter().position(|word| word == "--queues");
    let queues = queues.and_then(|at| options.get(at + 1)).map_or(Ok(2), |n| n.parse())?;
    let read_only = has("--read-only");

    let worker = Worker::start("worker")?;
    let open = OpenOptions { read_only, ..OpenOptions::default() };
    let device = FileDevice::open(Path::new(file), &open, worker.handle().clone())?;
    device.notes().iter().for_each(|note| eprintln!("{note}"));
    let pool = Pool::new(64 << 20)?;
    let mut stack = Stack::new(file, Arc::new(device), pool, worker.handle().clone());
    if has("--promise") {
        stack = stack.with_grant(Grant::by_administrator());
    }
    let options = Options {
        serial: "vhost_file".into(),
        queues,
        queue_size: 256,
        read_only,
        log: Arc::new(|line| eprintln!("{line}")),
    };
    let _ = std::fs::remove_file(socket);
    let _export = VhostUserBlk::start(UnixListener::bind(socket)?, stack, options)?;
    loop {
        std::thread::park();
    }
}
