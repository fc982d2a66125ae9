//! What can go wrong with memory.

pub use stableio_onepass::Fault;

/// A request needs more memory than the whole pool has.
///
/// This is a limit of the configuration, never of the load: a request that
/// fits waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("needs {need} bytes of buffer memory, the pool has {size}: enlarge the pool")]
pub struct PoolTooSmall {
    /// Bytes asked for, padding included.
    pub need: usize,
    /// Bytes that the pool has in all.
    pub size: usize,
}
