//! What `detect` keeps: places in programs, findings, and a timeline.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::Text;

/// Frames of a stack that are kept.
pub const FRAMES: usize = 16;
/// Places that are kept; a power of two.
pub const SITES: usize = 4096;
/// Programs and libraries that are kept.
pub const MODULES: usize = 512;
/// Ranges of changed bytes that a finding keeps.
pub const RANGES: usize = 4;
/// Findings that are kept.
const FINDINGS: usize = 65536;
/// Nanoseconds of a step of the timeline.
pub const TICK_NS: u64 = 100_000_000;
/// Steps of the timeline; the last one takes all that comes later.
pub const TICKS: usize = 36_000;

/// The interface that an I/O came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Engine {
    /// write, pwrite, writev, pwritev, pwritev2.
    Sync = 1,
    /// aio_write, lio_listio.
    PosixAio = 2,
    /// io_submit.
    KernelAio = 3,
    /// io_uring.
    Uring = 4,
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The bytes at completion are not those at submission.
    Changed = 1,
    /// A read went into memory that another I/O in flight was using, or used one piece of memory
    /// twice.
    Reused = 2,
}

/// A frame: an address in a program or library as it lies in its file.
#[repr(C)]
pub struct Frame {
    /// Number of the module plus one; 0: unknown, and `offset` is an address in the process.
    pub module: AtomicU32,
    _pad: u32,
    /// The address, less where the module is loaded.
    pub offset: AtomicU64,
}

/// A place from which direct writes are submitted: a stack, innermost frame first.
#[repr(C)]
pub struct Site {
    /// Of the place; 0: free.
    pub key: AtomicU64,
    /// Frames that are there; 0 until they all are.
    pub depth: AtomicU32,
    /// [`Engine`] as a number.
    pub engine: AtomicU32,
    /// Direct writes from here.
    pub writes: AtomicU64,
    /// Those whose buffer changed.
    pub changed: AtomicU64,
    /// Findings of the other kind.
    pub reused: AtomicU64,
    /// The stack. An address is where the call returns to, so its line is that of the byte before.
    pub frames: [Frame; FRAMES],
}

/// A program or library.
#[repr(C)]
pub struct Module {
    /// Of its path; 0: free.
    pub key: AtomicU64,
    /// Its path.
    pub path: Text<504>,
}

/// All places.
#[repr(C)]
pub struct Sites {
    /// By [`Site::key`], open addressing with linear probing. Place 0 is for what found no room.
    pub sites: [Site; SITES],
    /// Their modules, in no order.
    pub modules: [Module; MODULES],
}

/// One finding. Bytes and ranges count from the start of the write's data.
#[repr(C)]
pub struct Finding {
    /// [`Kind`] as a number; 0: not there yet.
    pub kind: AtomicU32,
    /// [`Engine`] as a number.
    pub engine: AtomicU32,
    /// Slot of the file.
    pub file: AtomicU32,
    /// Slot of the place.
    pub site: AtomicU32,
    /// Process that submitted.
    pub pid: AtomicU32,
    /// Thread that submitted.
    pub tid: AtomicU32,
    /// Where in the file; `u64::MAX`: at the file's own position.
    pub offset: AtomicU64,
    /// Bytes of the write.
    pub len: AtomicU64,
    /// How many of them had changed.
    pub changed: AtomicU64,
    /// The first ranges of them: start and end; both 0: no more.
    pub ranges: [[AtomicU32; 2]; RANGES],
    /// `CLOCK_MONOTONIC` of submission, in nanoseconds.
    pub submitted_ns: AtomicU64,
    /// `CLOCK_MONOTONIC` of completion.
    pub completed_ns: AtomicU64,
}

/// All findings.
#[repr(C)]
pub struct Findings {
    /// How many were made; more than fit are counted only.
    pub made: AtomicU64,
    /// The first of them.
    pub kept: [Finding; FINDINGS],
}

impl Findings {
    /// Takes room for a finding; its `kind` is to be stored last. `None` if there is none left.
    pub fn claim(&self) -> Option<&Finding> {
        let index = self.made.fetch_add(1, Ordering::Relaxed);
        self.kept.get(usize::try_from(index).ok()?)
    }
}

/// A step of the timeline.
#[repr(C)]
pub struct Tick {
    /// Direct writes that completed.
    pub watched: AtomicU32,
    /// Those whose buffer had changed.
    pub changed: AtomicU32,
}
