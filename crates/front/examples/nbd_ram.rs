//! Serves a file over NBD: for measuring the front end, with the file on a
//! tmpfs. Ends when its standard input does.
//!
//! ```text
//! truncate -s 1G /dev/shm/disk
//! cargo run --release -p stableio-front --example nbd_ram -- /dev/shm/disk /tmp/nbd.sock
//! ```

use std::error::Error;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Stack, Worker};
use stableio_front::nbd::{Export, NbdServer, Options};
use stableio_front::socket::{Listener, UnixOptions};
use stableio_mem::Pool;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, socket] = &args[..] else { return Err("usage: nbd_ram IMAGE SOCKET".into()) };
    let worker = Worker::start("nbd")?;
    let handle = worker.handle();
    let device = FileDevice::open(Path::new(image), &OpenOptions::default(), handle.clone())?;
    let stack = Stack::new(image, Arc::new(device), Pool::new(64 << 20)?, handle.clone());
    let listener = Listener::unix(Path::new(socket), &UnixOptions::default())?;
    let options = Options { log: Arc::new(|line| eprintln!("{line}")), ..Options::default() };
    let server = NbdServer::start(vec![Export::of("", stack)?], listener, handle, options);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}
