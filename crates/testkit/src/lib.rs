//! What integration tests and benches need around the command: a place for files, processes that
//! die with their test, the peers it is compared with, and the clients that drive both.
//!
//! Everything here talks to a server from outside, as its users do: over a socket, a signal, an
//! exit status. Nothing links against the code under test.
//!
//! ```no_run
//! use stableio_testkit::{Export, Scratch, Serve, require_tool, run_tool};
//!
//! fn nbdinfo_knows_our_size() -> std::io::Result<()> {
//!     let Some(nbdinfo) = require_tool("nbdinfo") else { return Ok(()) };
//!     let scratch = Scratch::new()?;
//!     let image = scratch.sparse("disk.img", 1 << 30)?;
//!     let export = Export::nbd("disk", &scratch.path("nbd.sock"));
//!     let server = Serve::raw(&scratch, &image, std::slice::from_ref(&export))?;
//!     let size = run_tool(&nbdinfo, ["--size", &export.uri()])?;
//!     assert_eq!(size.trim(), "1073741824");
//!     assert!(server.terminate()?.status.success());
//!     Ok(())
//! }
//! ```

mod array;
mod child;
mod fio;
mod mounts;
mod peers;
mod qemu_io;
pub mod racer;
mod random;
mod scratch;
mod serve;
mod tools;
pub mod vhost;

pub use array::{Raid5, bytes_taken, copy_sparse, first_difference};
pub use child::{Child, Ended, is_listening};
pub use rustix::process::Signal;

pub use fio::{FioReport, fio, fio_under};
pub use mounts::Mounted;
pub use peers::{Aio, HostIo, QemuNbd, StorageDaemon};
pub use qemu_io::qemu_io;
pub use racer::Racer;
pub use random::Random;
pub use scratch::Scratch;
pub use serve::{
    Export, Serve, build_stableio, create, nbd_uri, run_stableio, stableio, stableio_bin, status,
};
pub use tools::{quick, require_tool, require_tools, run_tool, skip, tool};
