//! What a device demands and offers, fixed for its life.

use stableio_mem::Pass;

/// Who is hurt when bytes change between two samples of the same request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Radius {
    /// Nobody: the data is looked at once.
    Nobody,
    /// The program itself: its own block.
    Issuer,
    /// Others: the row's other blocks, the other leg, a shared extent.
    Everyone,
}

/// Where settled data is until a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Nowhere but on the medium: a settled write is durable.
    WriteThrough,
    /// Possibly in a volatile cache.
    Volatile,
}

/// The limits of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block: the unit of offsets and lengths.
    pub logical: u32,
    /// Bytes of a physical block: writes of less cost a read.
    pub physical: u32,
    /// Bytes that the memory of a direct transfer must be aligned to.
    pub memory_align: u32,
    /// Bytes of the largest request; the stack cuts larger ones.
    pub max_transfer: u32,
    /// Bytes of the largest write, aligned to its length, that is never seen
    /// half done after a crash.
    pub atomic: u32,
    /// Whether a flush does anything.
    pub cache: Cache,
    /// Who is hurt when the memory of a write changes in flight.
    pub write_radius: Radius,
    /// Who is hurt when the memory of a read changes in flight.
    pub read_radius: Radius,
    /// What the device wants computed in the pass that samples a write.
    pub pass: Pass,
}

impl Limits {
    /// Bytes beside payload and parity that a write of `len` bytes at `at`
    /// may need in the device: what partial rows must read, and their parity.
    pub fn scratch_bytes(&self, at: u64, len: usize) -> usize {
        let Some(rows) = self.pass.rows else {
            // Without rows only the two ends need their old block.
            return if self.pass.guards { 6 * stableio_mem::BLOCK } else { 0 };
        };
        // Once more for a row that has to be mended on the way.
        (rows.partial_rows(at, len) + 1) * rows.row_scratch() * stableio_mem::BLOCK
    }
}
