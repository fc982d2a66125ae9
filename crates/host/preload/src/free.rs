//! A stack of free numbers: places of a table that are to be used again.
//!
//! Taking and giving is lock-free (SLOT-1): hooks run in signal handlers, and a handler may
//! interrupt a hook at any instruction. What links the numbers lies with whoever owns the places.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The stack. All zeros is an empty one.
pub(crate) struct Free {
    /// Number plus one of the topmost, and above it a count that makes each value different: who
    /// was interrupted between looking and taking must not take what is another's by now (ABA).
    head: AtomicU64,
}

impl Free {
    /// An empty stack.
    pub(crate) const fn new() -> Free {
        Free { head: AtomicU64::new(0) }
    }

    /// Takes the topmost number. `next` finds the link of a number that was given.
    pub(crate) fn take<'a>(&self, next: impl Fn(u32) -> Option<&'a AtomicU32>) -> Option<u32> {
        let mut seen = self.head.load(Ordering::Acquire);
        loop {
            let number = (seen as u32).checked_sub(1)?;
            let below = next(number)?.load(Ordering::Relaxed);
            match self.replace(seen, below) {
                Ok(()) => return Some(number),
                Err(now) => seen = now,
            }
        }
    }

    /// Gives a number, with its link.
    pub(crate) fn give(&self, number: u32, next: &AtomicU32) {
        let mut seen = self.head.load(Ordering::Acquire);
        loop {
            next.store(seen as u32, Ordering::Relaxed);
            match self.replace(seen, number + 1) {
                Ok(()) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Forgets all numbers, when nobody else is there.
    pub(crate) fn clear(&self) {
        self.head.store(0, Ordering::Relaxed);
    }

    fn replace(&self, seen: u64, top: u32) -> Result<(), u64> {
        let new = ((seen >> 32) + 1) << 32 | u64::from(top);
        let done = self.head.compare_exchange_weak(seen, new, Ordering::AcqRel, Ordering::Acquire);
        done.map(drop)
    }
}
