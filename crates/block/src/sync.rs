//! Waiting between tasks of one thread.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
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

/// Runs futures side by side on this task; gives their results in order.
pub async fn join<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    enum Slot<F: Future> {
        Running(Pin<Box<F>>),
        Done(F::Output),
    }
    let mut slots: Vec<Slot<F>> = futures.into_iter().map(|f| Slot::Running(Box::pin(f))).collect();
    poll_fn(|cx| {
        let mut all = true;
        for slot in &mut slots {
            if let Slot::Running(future) = slot {
                match future.as_mut().poll(cx) {
                    Poll::Ready(value) => *slot = Slot::Done(value),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    let done = slots.into_iter().map(|slot| match slot {
        Slot::Done(value) => value,
        Slot::Running(_) => unreachable!("polled until all were done"),
    });
    done.collect()
}
