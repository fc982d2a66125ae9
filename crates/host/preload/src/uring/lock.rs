//! A lock for the few lines in which threads share a ring.
//!
//! A signal handler of the program must not find one held by the thread that it interrupted:
//! whoever takes it is `inside` (`uring.rs`), where a handler does not get to, or has all signals
//! blocked.

use core::hint;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::gate::syscall;

const FREE: u32 = 0;
const HELD: u32 = 1;
const AWAITED: u32 = 2;

pub(super) struct Lock(AtomicU32);

/// Frees the lock when it goes.
pub(super) struct Held<'a>(&'a Lock);

impl Lock {
    pub(super) const fn new() -> Lock {
        Lock(AtomicU32::new(FREE))
    }

    pub(super) fn try_take(&self) -> Option<Held<'_>> {
        self.0
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            .then(|| Held(self))
    }

    pub(super) fn take(&self) -> Held<'_> {
        for _ in 0..100 {
            if let Some(held) = self.try_take() {
                return held;
            }
            hint::spin_loop();
        }
        while self.0.swap(AWAITED, Ordering::Acquire) != FREE {
            // SAFETY: the word is static, or as good as that; no time limit.
            unsafe {
                syscall!(
                    libc::SYS_futex,
                    self.0.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    AWAITED,
                    0
                )
            };
        }
        Held(self)
    }

    /// Makes it free, whoever held it: for a forked child, in which the holder is not.
    pub(super) fn reset(&self) {
        self.0.store(FREE, Ordering::Relaxed);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.0.0.swap(FREE, Ordering::Release) == AWAITED {
            let wake = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
            // SAFETY: a system call without memory.
            unsafe { syscall!(libc::SYS_futex, self.0.0.as_ptr(), wake, 1) };
        }
    }
}
