//! The memory that a ring shares with the kernel, mapped by this library for itself.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::abi::{
    CQE_F_32, CQE_F_SKIP, Cqe, FEAT_SINGLE_MMAP, OFF_CQ_RING, OFF_SQ_RING, OFF_SQES, Params,
    SETUP_CQE_MIXED, SETUP_CQE32, SETUP_NO_SQARRAY, SETUP_SQE128, SQE_WORDS, Sqe,
};
use crate::gate::syscall;

/// A ring's memory. Sizes and masks are from the kernel's answer at setup, not from the memory
/// itself, in which the program may scribble.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
    pub(super) flags: u32,
    sq: usize,
    sq_len: usize,
    cq: usize,
    cq_len: usize,
    sqes: usize,
    sqes_len: usize,
    params: Params,
}

impl Map {
    /// No memory at all.
    pub(super) const NONE: Map = Map {
        sq_entries: 0,
        cq_entries: 0,
        flags: 0,
        sq: 0,
        sq_len: 0,
        cq: 0,
        cq_len: 0,
        sqes: 0,
        sqes_len: 0,
        params: Params::ZERO,
    };

    /// Maps the memory of a ring that the kernel made with this answer.
    pub(super) fn new(fd: i32, params: &Params) -> Option<Map> {
        let sqe_size = if params.flags & SETUP_SQE128 != 0 { 128 } else { 64 };
        let cqe_size = if params.flags & SETUP_CQE32 != 0 { 32 } else { 16 };
        let array = if params.flags & SETUP_NO_SQARRAY != 0 { 0 } else { params.sq_entries * 4 };
        let mut sq_len = (params.sq_off.array + array) as usize;
        let cq_len = params.cq_off.cqes as usize + params.cq_entries as usize * cqe_size;
        let single = params.features & FEAT_SINGLE_MMAP != 0;
        if single {
            sq_len = sq_len.max(cq_len);
        }
        let sqes_len = params.sq_entries as usize * sqe_size;
        let sq = map(fd, sq_len, OFF_SQ_RING)?;
        let cq = if single { Some(sq) } else { map(fd, cq_len, OFF_CQ_RING) };
        let (Some(cq), Some(sqes)) = (cq, map(fd, sqes_len, OFF_SQES)) else {
            unmap(sq, sq_len);
            return None;
        };
        let cq_len = if single { 0 } else { cq_len };
        let &Params { sq_entries, cq_entries, flags, .. } = params;
        Some(Map {
            sq_entries,
            cq_entries,
            flags,
            sq,
            sq_len,
            cq,
            cq_len,
            sqes,
            sqes_len,
            params: *params,
        })
    }

    /// Gives the memory back: the mapping holds the ring as a descriptor does.
    pub(super) fn unmap(&self) {
        unmap(self.sq, self.sq_len);
        unmap(self.sqes, self.sqes_len);
        unmap(self.cq, self.cq_len);
    }

    fn word(&self, base: usize, offset: u32) -> &'static AtomicU32 {
        // SAFETY: one of the ring's own words, at an offset from the kernel, inside of the mapping
        // and aligned. It is used as long as the record that holds this map is.
        unsafe { &*((base + offset as usize) as *const AtomicU32) }
    }

    /// Where the kernel goes on reading.
    pub(super) fn sq_head(&self) -> u32 {
        self.word(self.sq, self.params.sq_off.head).load(Ordering::Acquire)
    }

    /// Up to where there is something to read.
    pub(super) fn sq_tail(&self) -> &'static AtomicU32 {
        self.word(self.sq, self.params.sq_off.tail)
    }

    /// Up to where the kernel has posted.
    pub(super) fn cq_tail(&self) -> u32 {
        self.word(self.cq, self.params.cq_off.tail).load(Ordering::Acquire)
    }

    /// Up to where completions have been taken.
    pub(super) fn cq_head(&self) -> &'static AtomicU32 {
        self.word(self.cq, self.params.cq_off.head)
    }

    /// The entry at a position of the submission queue; `None` if its index is none.
    pub(super) fn sqe(&self, position: u32) -> Option<&'static [AtomicU64; SQE_WORDS]> {
        let slot = position & (self.sq_entries - 1);
        let index = if self.flags & SETUP_NO_SQARRAY != 0 {
            slot
        } else {
            self.word(self.sq, self.params.sq_off.array + slot * 4).load(Ordering::Relaxed)
        };
        if index >= self.sq_entries {
            return None;
        }
        let shift = if self.flags & SETUP_SQE128 != 0 { 7 } else { 6 };
        // SAFETY: inside of the mapping of the entries, and aligned. Atomics, since others may
        // write there at any time.
        Some(unsafe { &*((self.sqes + ((index as usize) << shift)) as *const _) })
    }

    /// For a ring of ours: has position `slot` of the queue mean entry `slot`, for good.
    pub(super) fn number_array(&self) {
        for slot in 0..self.sq_entries {
            let at = self.params.sq_off.array + slot * 4;
            self.word(self.sq, at).store(slot, Ordering::Relaxed);
        }
    }

    /// The completion at this position, and how many positions it takes. `None` if it has been
    /// overwritten since.
    pub(super) fn cqe(&self, position: u32) -> Option<(Cqe, u32)> {
        let shift = if self.flags & SETUP_CQE32 != 0 { 5 } else { 4 };
        let slot = (position & (self.cq_entries - 1)) as usize;
        let at = self.cq + self.params.cq_off.cqes as usize + (slot << shift);
        // SAFETY: inside of the mapping, and aligned.
        let words = unsafe { &*(at as *const [AtomicU64; 2]) };
        let user_data = words[0].load(Ordering::Relaxed);
        let rest = words[1].load(Ordering::Relaxed);
        let cqe = Cqe { user_data, res: rest as u32 as i32, flags: (rest >> 32) as u32 };
        fence(Ordering::Acquire);
        let behind = self.cq_tail().wrapping_sub(position);
        let large = self.flags & SETUP_CQE_MIXED != 0 && cqe.flags & CQE_F_32 != 0;
        (behind <= self.cq_entries).then_some((cqe, if large { 2 } else { 1 }))
    }

    /// Whether a completion only fills the end of the ring.
    pub(super) fn is_filler(&self, cqe: &Cqe) -> bool {
        self.flags & SETUP_CQE_MIXED != 0 && cqe.flags & CQE_F_SKIP != 0
    }
}

/// Reads an entry, once.
pub(super) fn load(entry: &[AtomicU64; SQE_WORDS]) -> Sqe {
    Sqe::of_words(core::array::from_fn(|i| entry[i].load(Ordering::Relaxed)))
}

/// Writes those words of an entry that differ.
pub(super) fn patch(entry: &[AtomicU64; SQE_WORDS], from: &Sqe, to: &Sqe) {
    for ((word, from), to) in entry.iter().zip(from.words()).zip(to.words()) {
        if from != to {
            word.store(to, Ordering::Relaxed);
        }
    }
}

/// Takes a patch back, word by word where it still stands: the kernel has let go of the entry, and
/// another thread of the program may be filling it again.
pub(super) fn unpatch(entry: &[AtomicU64; SQE_WORDS], from: &Sqe, to: &Sqe) {
    for ((word, from), to) in entry.iter().zip(from.words()).zip(to.words()) {
        if from != to {
            let _ = word.compare_exchange(to, from, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

fn map(fd: i32, len: usize, offset: usize) -> Option<usize> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping, where the kernel likes it.
    let at = unsafe { syscall!(libc::SYS_mmap, 0, len, prot, flags, fd, offset) };
    usize::try_from(at).ok()
}

/// Anonymous memory of our own, zeroed.
pub(super) fn memory(bytes: usize) -> Option<usize> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, where the kernel likes it.
    let at = unsafe { syscall!(libc::SYS_mmap, 0, bytes, prot, flags, -1isize, 0) };
    usize::try_from(at).ok()
}

/// Gives memory back; none at 0.
pub(super) fn unmap(at: usize, len: usize) {
    if at != 0 && len != 0 {
        // SAFETY: a mapping of ours that nobody uses any more.
        unsafe { syscall!(libc::SYS_munmap, at, len) };
    }
}
