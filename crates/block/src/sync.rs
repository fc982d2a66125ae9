//! Waiting between tasks of one thread.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Tasks that wait for something to become true. Not `Send`: it lives beside
/// the state that it is about, on one worker.
#[derive(Default)]
pub struct Condition {
    wakers: RefCell<Vec<Waker>>,
}

impl Condition {
    /// Waits until `test` gives something. It is called at once, and again
    /// after each [`notify`](Self::notify).
    pub async fn wait_for<T>(&self, mut test: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match test() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut wakers = self.wakers.borrow_mut();
                if !wakers.iter().any(|w| w.will_wake(cx.waker())) {
                    wakers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }

    /// Lets every waiter test again.
    pub fn notify(&self) {
        let wakers = std::mem::take(&mut *self.wakers.borrow_mut());
        wakers.into_iter().for_each(Waker::wake);
    }
}
