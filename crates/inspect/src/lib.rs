//! What lies under a path on this host, and what that does to direct I/O from
//! memory that changes while it is in flight.
//!
//! [`Host`] looks; a [`Report`] says: the file system and the block devices
//! below it, for each whether it reads the data more than once and how we
//! know, and what follows for a direct write or read *as this kernel does
//! it*. Nothing is opened for writing, nothing needs root; what only root can
//! see is [`Tristate::Unknown`], with the reason.
//!
//! INSP-1: unknown is never taken for safe.
//!
//! INSP-2: bytes from outside (`/proc`, `/sys`, tables of device mapper) are
//! parsed into types that can only be right; what does not parse is unknown,
//! never a panic.
//!
//! ```no_run
//! use stableio_inspect::{Host, Tristate};
//!
//! let report = Host::this().of_path("/var/lib/vms/disk.img".as_ref())?;
//! if report.samples_writes_twice() != Tristate::No {
//!     eprintln!("{}", report.reason());
//! }
//! # Ok::<(), stableio_inspect::Error>(())
//! ```

mod device;
mod dm;
mod fs;
mod host;
mod judge;
mod kernel;
mod mountinfo;
mod report;
mod subject;
mod sysfs;

pub use dm::{NoTable, Target, parse_table};
pub use host::{Error, Host};
pub use kernel::Kernel;
pub use mountinfo::{DeviceNumber, Mount, parse_mountinfo};
pub use report::{
    Alignment, AtomicWrites, DirectWrite, FileSystem, Layer, Radius, Reads, Report, Shows,
    Tristate, Verdict, Writes,
};
