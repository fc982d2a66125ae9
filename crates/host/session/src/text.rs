//! A string in shared memory, written by one and read by many.

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Up to `N` bytes of text. It is cut where it is longer.
#[repr(C)]
pub struct Text<const N: usize> {
    len: AtomicU32,
    bytes: [AtomicU8; N],
}

impl<const N: usize> Text<N> {
    /// Writes it. Whoever reads at the same time may see a mixture, never memory outside.
    pub fn set(&self, text: &[u8]) {
        let len = text.len().min(N);
        for (to, from) in self.bytes.iter().zip(&text[..len]) {
            to.store(*from, Ordering::Relaxed);
        }
        self.len.store(len as u32, Ordering::Release);
    }

    /// Copies it to the front of `into`, and returns what is there then.
    pub fn get<'a>(&self, into: &'a mut [u8]) -> &'a [u8] {
        let len = (self.len.load(Ordering::Acquire) as usize).min(N).min(into.len());
        for (to, from) in into[..len].iter_mut().zip(&self.bytes) {
            *to = from.load(Ordering::Relaxed);
        }
        &into[..len]
    }
}
