//! Waiting for something that any thread may bring about.

use std::sync::{Mutex, MutexGuard};
use std::task::Waker;

/// Who waits. Works on any executor: it needs no ring and no thread.
#[derive(Default)]
pub(super) struct Wakers(Mutex<Vec<Waker>>);

impl Wakers {
    /// Wakes `waker`, once, at the next [`wake`](Self::wake).
    pub(super) fn add(&self, waker: &Waker) {
        let mut wakers = self.lock();
        if !wakers.iter().any(|w| w.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    /// Lets all that wait look again, oldest first.
    pub(super) fn wake(&self) {
        // Not under the lock: a waker is the code of somebody's executor.
        let wakers = std::mem::take(&mut *self.lock());
        wakers.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
