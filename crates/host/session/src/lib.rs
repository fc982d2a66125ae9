//! What the launcher of `run` and `detect` shares with the programs that it started.
//!
//! A *session* is one `stableio run` or `stableio detect`: a launcher, and the processes that
//! descend from its command. It has a private directory, named to them by [`ENV`]:
//!
//! | file | what |
//! |---|---|
//! | [`PRELOAD`] | the library that `LD_PRELOAD` names |
//! | [`STATE`] | one [`Session`], mapped by the launcher and by each process |
//! | [`ASK`] | a socket (`SOCK_SEQPACKET`) on which the launcher answers [`Request`]s |
//!
//! Everything in [`Session`] that changes is an atomic, because several processes write to it and
//! any of them may be killed at any instruction. Nobody waits for another in it: slots are claimed
//! by one compare-and-swap and published by one store, and a slot whose owner died stays unused.
//!
//! - **SHARE-1** The launcher alone writes [`File`]s; processes look them up and count in them.
//! - **SHARE-2** Nothing read from here is trusted with memory safety: a program under test may
//!   scribble over the mapping. Numbers are checked before they index anything.
//! - **SHARE-3** Its size is fixed; what finds no room is counted ([`Totals::lost`]), not kept.

#![no_std]

mod findings;
mod protocol;
mod text;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub use findings::{
    Engine, FRAMES, Finding, Findings, Frame, Kind, MODULES, Module, RANGES, SITES, Site, Sites,
    TICK_NS, TICKS, Tick,
};
pub use protocol::{Answer, Effect, Question, Remark, Request};
pub use text::Text;

/// Names the directory of the session to the processes in it.
pub const ENV: &core::ffi::CStr = c"STABLEIO_SESSION";
/// The library, in the directory of the session.
pub const PRELOAD: &core::ffi::CStr = c"libstableio_preload.so";
/// The shared memory, in the directory of the session.
pub const STATE: &core::ffi::CStr = c"state";
/// The launcher's socket, in the directory of the session.
pub const ASK: &core::ffi::CStr = c"ask";

/// First bytes of [`Session`]: "stableio", and the version of the layout.
pub const MAGIC: u64 = u64::from_le_bytes(*b"stblio01");

/// Least private memory of a process: its largest copy must find room.
pub const POOL_LEAST: u64 = 64 << 20;

/// Files that a session tells apart; a power of two.
pub const FILES: usize = 1024;

/// What a session does with direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// Protects it: `stableio run`.
    Run = 1,
    /// Watches it: `stableio detect`.
    Detect = 2,
}

/// The shared memory of a session. All zeros is a valid value, but for [`Session::magic`].
#[repr(C)]
pub struct Session {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`Mode`] as a number; see [`Session::mode`].
    pub mode: AtomicU32,
    /// 1: what can not be protected is let through and counted, not refused.
    pub best_effort: AtomicU32,
    /// What the sixth argument of a system call says that the session's net lets through.
    pub cookie: AtomicU64,
    /// Bytes of private memory that each process may use for copies.
    pub pool_bytes: AtomicU64,
    /// `CLOCK_MONOTONIC` of the start, in nanoseconds.
    pub started_ns: AtomicU64,
    /// Sums over all files.
    pub totals: Totals,
    /// How often each [`Remark`] was made, by its number.
    pub remarks: [AtomicU64; Remark::COUNT],
    /// The files, by [`File::key`], open addressing with linear probing.
    pub files: [File; FILES],
    /// Where direct writes come from (`detect`).
    pub sites: Sites,
    /// What `detect` found.
    pub findings: Findings,
    /// I/Os and findings over time (`detect`).
    pub ticks: [Tick; TICKS],
}

/// Sums over all files and processes.
#[repr(C)]
pub struct Totals {
    /// Processes that loaded the library.
    pub processes: AtomicU64,
    /// Direct writes that were watched from submission to completion (`detect`).
    pub watched: AtomicU64,
    /// Direct writes that could not be watched, for want of memory or of a way.
    pub unwatched: AtomicU64,
    /// Watched writes whose buffer changed.
    pub changed: AtomicU64,
    /// I/Os into a buffer that was in flight.
    pub reused: AtomicU64,
    /// Files, sites, modules or findings that found no room in the session.
    pub lost: AtomicU64,
}

/// A file that was opened for direct I/O, and what is done with it.
///
/// Slot 0 is never looked up: it stands for files that found no room, and for those whose
/// launcher did not answer.
#[repr(C)]
pub struct File {
    /// Of device and inode: [`File::key_of`]; 0: the slot is free. Written before `answer`.
    pub key: AtomicU64,
    /// The [`Answer`] as [`Answer::to_bits`] has it; 0: not there yet.
    pub answer: AtomicU32,
    _pad: u32,
    /// Direct writes that the program asked for.
    pub writes: AtomicU64,
    /// Bytes that they wrote.
    pub write_bytes: AtomicU64,
    /// Those of them that went from private memory.
    pub bounced: AtomicU64,
    /// Those of them that went through the page cache and out of it again.
    pub fallen_back: AtomicU64,
    /// Direct reads.
    pub reads: AtomicU64,
    /// Those of them that went to private memory first.
    pub reads_bounced: AtomicU64,
    /// I/Os and openings that were refused.
    pub refused: AtomicU64,
    /// I/Os that went unprotected, because of `--best-effort`.
    pub unprotected: AtomicU64,
    /// Watched writes whose buffer changed (`detect`).
    pub changed: AtomicU64,
    /// Most I/Os in flight at once, as far as this library saw them.
    pub depth: AtomicU64,
    /// Its path when it was first seen.
    pub path: Text<512>,
    /// Why it is treated so, in a line.
    pub reason: Text<416>,
}

impl File {
    /// The key of a file: never 0, and as good as unique.
    pub fn key_of(dev: u64, ino: u64) -> u64 {
        // SplitMix64's mixing of both numbers: neighbours in inode number spread over the table.
        let mut x = ino ^ dev.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) | 1
    }
}

impl Session {
    /// Bytes of the shared memory.
    pub const BYTES: usize = size_of::<Session>();

    /// What the session does; `None` if the memory is no session of this version.
    pub fn mode(&self) -> Option<Mode> {
        if self.magic.load(Ordering::Acquire) != MAGIC {
            return None;
        }
        match self.mode.load(Ordering::Relaxed) {
            1 => Some(Mode::Run),
            2 => Some(Mode::Detect),
            _ => None,
        }
    }

    /// The file's slot, if the launcher has one for it.
    pub fn find(&self, dev: u64, ino: u64) -> Option<usize> {
        let key = File::key_of(dev, ino);
        slots(key).find_map(|slot| match self.files[slot].key.load(Ordering::Acquire) {
            0 => Some(None),
            k if k == key => Some(Some(slot)),
            _ => None,
        })?
    }

    /// The file's slot, taken for it if it has none. For the launcher only (SHARE-1).
    ///
    /// `None` if the table is full; [`Totals::lost`] counts it.
    pub fn enter(&self, dev: u64, ino: u64) -> Option<usize> {
        let key = File::key_of(dev, ino);
        let slot = slots(key).find(|slot| {
            let there = self.files[*slot].key.load(Ordering::Acquire);
            there == 0 || there == key
        });
        match slot {
            Some(slot) => self.files[slot].key.store(key, Ordering::Release),
            None => {
                self.totals.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        slot
    }

    /// Counts a remark; true for the first of its kind.
    pub fn remark(&self, remark: Remark) -> bool {
        self.remarks[remark as usize].fetch_add(1, Ordering::Relaxed) == 0
    }
}

/// The slots in which a key may be, in the order in which they are tried.
fn slots(key: u64) -> impl Iterator<Item = usize> {
    let first = (key >> 32) as usize;
    (0..FILES).map(move |step| (first + step) % FILES).filter(|slot| *slot != 0)
}
