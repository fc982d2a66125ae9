//! Row tokens: whoever changes or mends rows holds them alone.
//!
//! TOKEN-1: a request, or a part of one that is written apart (JOIN-1), takes
//! one range of rows, all at once, first come first served, and no other while
//! it holds that; so waiting is never in a circle.
//!
//! TOKEN-2: without checksums a read holds its rows too, together with other
//! reads: nothing else would tell it that a block was being written meanwhile,
//! and holds a part of each version, or what was on the medium before.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;

use stableio_block::sync::Condition;

/// The tokens of an array's rows, by row number.
#[derive(Default)]
pub(crate) struct Tokens {
    queue: RefCell<VecDeque<Entry>>,
    next: Cell<u64>,
    released: Condition,
}

struct Entry {
    id: u64,
    rows: Range<u64>,
    shared: bool,
}

/// A held range; released when dropped.
pub(crate) struct Token<'a> {
    tokens: &'a Tokens,
    id: u64,
}

impl Tokens {
    /// Waits until nobody who came earlier wants any of `rows`.
    pub(crate) async fn acquire(&self, rows: Range<u64>) -> Token<'_> {
        self.enter(rows, false).await
    }

    /// The same for who may share them with others who may.
    pub(crate) async fn share(&self, rows: Range<u64>) -> Token<'_> {
        self.enter(rows, true).await
    }

    async fn enter(&self, rows: Range<u64>, shared: bool) -> Token<'_> {
        let id = self.next.replace(self.next.get() + 1);
        self.queue.borrow_mut().push_back(Entry { id, rows: rows.clone(), shared });
        // The guard exists before the wait, so that giving up releases too.
        let token = Token { tokens: self, id };
        let free = || {
            let queue = self.queue.borrow();
            let mut earlier = queue.iter().take_while(|e| e.id != id);
            let apart = |e: &Entry| e.rows.end <= rows.start || rows.end <= e.rows.start;
            earlier.all(|e| (shared && e.shared) || apart(e)).then_some(())
        };
        self.released.wait_for(free).await;
        token
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.tokens.queue.borrow_mut().retain(|e| e.id != self.id);
        self.tokens.released.notify();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn first_come_first_served() {
        let tokens = Tokens::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut first = Box::pin(tokens.acquire(0..10));
        let Poll::Ready(held) = first.as_mut().poll(&mut cx) else { panic!() };
        let mut second = Box::pin(tokens.acquire(5..15));
        let mut third = Box::pin(tokens.acquire(12..13));
        let mut apart = Box::pin(tokens.acquire(20..30));
        assert!(second.as_mut().poll(&mut cx).is_pending());
        // Free, but the second came earlier and wants it too.
        assert!(third.as_mut().poll(&mut cx).is_pending());
        assert!(apart.as_mut().poll(&mut cx).is_ready());
        drop(held);
        // One that gives up lets those behind it pass.
        drop(second);
        assert!(third.as_mut().poll(&mut cx).is_ready());
    }

    /// TOKEN-2.
    #[test]
    fn who_shares_waits_for_who_does_not() {
        let tokens = Tokens::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut read = Box::pin(tokens.share(0..10));
        let Poll::Ready(held) = read.as_mut().poll(&mut cx) else { panic!() };
        assert!(Box::pin(tokens.share(5..6)).as_mut().poll(&mut cx).is_ready());
        let mut write = Box::pin(tokens.acquire(5..15));
        let mut behind = Box::pin(tokens.share(5..6));
        assert!(write.as_mut().poll(&mut cx).is_pending());
        assert!(behind.as_mut().poll(&mut cx).is_pending());
        drop(held);
        let Poll::Ready(held) = write.as_mut().poll(&mut cx) else { panic!() };
        assert!(behind.as_mut().poll(&mut cx).is_pending());
        drop(held);
        assert!(behind.as_mut().poll(&mut cx).is_ready());
    }
}
