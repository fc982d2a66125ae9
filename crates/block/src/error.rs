//! Why a request failed: what, where, and whose fault.

use std::fmt;
use std::sync::Arc;

use stableio_mem::{Fault, PoolTooSmall};

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Kind {
    /// The system's answer, by errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    System(i32),
    /// The device did fewer bytes than asked, for good: it ends there.
    #[error("the device ends after {done} bytes of the request")]
    Short {
        /// Bytes that it did.
        done: usize,
    },
    /// The data does not match its guard and no redundancy brings it back.
    #[error("data does not match its checksum and can not be reconstructed")]
    Lost,
    /// The issuer's memory vanished in the middle. Never charged to a member.
    #[error("the request's memory is not accessible: {0}")]
    Memory(#[from] Fault),
    /// The request does not lie inside the device.
    #[error("beyond the end of the device, which has {size} bytes")]
    OutOfRange {
        /// Bytes of the device.
        size: u64,
    },
    /// Offset or length is no multiple of the logical block.
    #[error("offset or length is no multiple of the logical block of {logical} bytes")]
    Misaligned {
        /// Bytes of a logical block.
        logical: u32,
    },
    /// More memory than the pool has.
    #[error(transparent)]
    Pool(#[from] PoolTooSmall),
    /// Too many members are gone.
    #[error("{missing} members are missing, which is more than the redundancy absorbs")]
    Degraded {
        /// Members that are gone.
        missing: usize,
    },
    /// A write needs more of the log than there is.
    #[error("the write needs more room than the log has")]
    LogFull,
    /// No answer for longer than is waited.
    #[error("no answer for too long")]
    Stalled,
    /// The device, or this operation on it, is not there.
    #[error("not supported by the device")]
    Unsupported,
    /// The worker stopped before the request settled.
    #[error("the worker was stopped")]
    Stopped,
}

/// The operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the operations")]
pub enum OpName {
    Open,
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Map,
}

/// A failed request: kind, operation, device, range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub kind: Kind,
    /// The operation.
    pub op: OpName,
    /// The device's name: a path, an array's name.
    pub device: Arc<str>,
    /// Byte offset on the device.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

impl Error {
    /// The errno that stands for the kind, for front ends that carry one.
    pub fn errno(&self) -> i32 {
        match self.kind {
            Kind::System(errno) => errno,
            Kind::Memory(_) => libc::EFAULT,
            Kind::OutOfRange { .. } => libc::ENOSPC,
            Kind::Misaligned { .. } => libc::EINVAL,
            Kind::Pool(_) => libc::ENOMEM,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::LogFull => libc::ENOSPC,
            Kind::Stalled => libc::ETIMEDOUT,
            Kind::Stopped => libc::ESHUTDOWN,
            Kind::Short { .. } | Kind::Lost | Kind::Degraded { .. } => libc::EIO,
        }
    }

    /// Whether the issuer's memory is at fault, not the device.
    pub fn is_memory(&self) -> bool {
        matches!(self.kind, Kind::Memory(_) | Kind::System(libc::EFAULT))
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, op, device, at, len } = self;
        match op {
            OpName::Open => write!(f, "{device}: {kind}"),
            OpName::Flush => write!(f, "{device}: flush: {kind}"),
            _ => write!(f, "{device}: {op} at {at}+{len}: {kind}"),
        }
    }
}

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpName::Open => "open",
            OpName::Read => "read",
            OpName::Write => "write",
            OpName::Flush => "flush",
            OpName::Discard => "discard",
            OpName::WriteZeroes => "write zeroes",
            OpName::Map => "map",
        })
    }
}
