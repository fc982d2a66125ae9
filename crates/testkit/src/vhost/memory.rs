//! Memory that a guest shares with its device.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const WORD: usize = size_of::<AtomicU64>();

/// A guest's memory: a mapping that the device has as well, and that both may change at any time.
///
/// It is handed out as atomic words and never as bytes: the device writes into it while we look,
/// and a test may change it from one thread while another has it in flight. That is the point.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped, is not bound to a thread, and is
// reached through atomics only.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; shared access is atomic access.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `bytes` of zeroed memory, a multiple of the page size.
    pub fn new(bytes: usize) -> io::Result<Arc<SharedMemory>> {
        let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing of ours.
        let base = unsafe { mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) }?;
        let base = NonNull::new(base.cast()).expect("a mapping is not at address zero");
        Ok(Arc::new(SharedMemory { file, base, words: bytes / WORD }))
    }

    /// All of it, as words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is aligned to pages, as long as `words` says, initialised (zeroes of
        // the kernel's), and lives as long as `self`. Others change it, which atomics allow.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.words * WORD
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Stores `bytes` at `offset`; both a multiple of 8 bytes.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let words = self.range(offset..offset + bytes.len());
        for (word, bytes) in words.iter().zip(bytes.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
    }

    /// Loads the bytes of `range`, whose ends are multiples of 8.
    pub fn load(&self, range: Range<usize>) -> Vec<u8> {
        let words = self.range(range).iter();
        words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
    }

    /// Stores `word` all over `range`, whose ends are multiples of 8.
    pub fn fill(&self, range: Range<usize>, word: u64) {
        self.range(range).iter().for_each(|place| place.store(word, Ordering::Relaxed));
    }

    /// The words of a range of bytes whose ends are multiples of 8.
    pub fn range(&self, bytes: Range<usize>) -> &[AtomicU64] {
        assert!(
            bytes.start.is_multiple_of(WORD) && bytes.end.is_multiple_of(WORD),
            "{bytes:?} is not made of whole words"
        );
        &self.words()[bytes.start / WORD..bytes.end / WORD]
    }

    /// The address of the byte at `offset`, for a descriptor.
    pub(super) fn address(&self, offset: usize) -> *mut u8 {
        self.base.as_ptr().cast::<u8>().wrapping_add(offset)
    }

    /// The file to hand to the device.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and no reference to it outlives `self`. The
        // device keeps its own.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len()) };
    }
}
