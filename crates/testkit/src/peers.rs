//! The programs that serve the same clients today, started at their best.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Child, Ended, Scratch, nbd_uri};

/// How a peer of the QEMU family reaches its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostIo {
    /// Around the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// By which system calls.
    pub aio: Aio,
}

/// QEMU's asynchronous I/O modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// A pool of threads with `preadv` and `pwritev`.
    Threads,
    /// `io_submit`; needs `O_DIRECT`.
    Native,
    /// io_uring.
    IoUring,
}

impl HostIo {
    /// What both programs do when nobody says anything.
    pub const DEFAULT: HostIo = HostIo { direct: false, aio: Aio::Threads };
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Aio::Threads => "threads",
            Aio::Native => "native",
            Aio::IoUring => "io_uring",
        }
    }
}

/// `qemu-nbd` serving a raw image under the empty export name.
#[derive(Debug)]
pub struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    /// Starts it, and returns when it accepts connections on `socket`.
    pub fn start(
        scratch: &Scratch,
        image: &Path,
        socket: PathBuf,
        io: HostIo,
    ) -> io::Result<QemuNbd> {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--format=raw"]);
        command.arg(if io.direct { "--cache=none" } else { "--cache=writeback" });
        command.arg(format!("--aio={}", io.aio.name()));
        command.arg("--socket").arg(&socket).arg(image);
        let mut child = Child::spawn(command, scratch)?;
        child.wait_for_socket(&socket)?;
        Ok(QemuNbd { child, socket })
    }

    /// Its NBD address.
    pub fn uri(&self) -> String {
        nbd_uri("", &self.socket)
    }

    /// The process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Ends it in good order; see [`Child::terminate`].
    pub fn terminate(self) -> io::Result<Ended> {
        self.child.terminate()
    }

    /// Crashes it; see [`Child::kill9`].
    pub fn kill9(self) -> io::Result<Ended> {
        self.child.kill9()
    }
}

/// `qemu-storage-daemon` exporting a raw image as a vhost-user-blk device of up to four queues.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    socket: PathBuf,
}

impl StorageDaemon {
    /// Starts it, and returns when it accepts connections on `socket`.
    pub fn start(
        scratch: &Scratch,
        image: &Path,
        socket: PathBuf,
        io: HostIo,
    ) -> io::Result<StorageDaemon> {
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=disk,filename={},cache.direct={},aio={},discard=unmap",
            image.display(),
            if io.direct { "on" } else { "off" },
            io.aio.name(),
        ));
        // An I/O thread of its own, as anybody who wants speed configures it.
        command.args(["--object", "iothread,id=io"]).arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,num-queues=4,\
             addr.type=unix,addr.path={}",
            socket.display()
        ));
        let mut child = Child::spawn(command, scratch)?;
        child.wait_for_socket(&socket)?;
        Ok(StorageDaemon { child, socket })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Ends it in good order; see [`Child::terminate`].
    pub fn terminate(self) -> io::Result<Ended> {
        self.child.terminate()
    }

    /// Crashes it; see [`Child::kill9`].
    pub fn kill9(self) -> io::Result<Ended> {
        self.child.kill9()
    }
}
