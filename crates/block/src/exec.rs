//! The executor: futures that never block and never leave their thread.
//!
//! An [`Executor`] belongs to one thread. A [`Handle`] reaches it from any:
//! [`Handle::spawn`] sends a function over, which makes its future there. A
//! task is one allocation (the crate `async-task`): future, waker and result.
//!
//! EXEC-1: a future runs, and is dropped, only on its executor's thread.
//!
//! EXEC-2: a task runs to its end whether or not anybody waits for it.
//!
//! EXEC-3: an executor that is dropped drops its tasks, also those that wait
//! for something, whoever holds their wakers: a task and what it waits for
//! often hold each other.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use async_task::{FallibleTask, Runnable};

thread_local! {
    /// The executor whose `enter` guard lives on this thread.
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

struct Current {
    shared: Arc<Shared>,
    queue: Rc<RefCell<VecDeque<Runnable>>>,
    parked: Rc<Parked>,
}

/// The tasks of an executor that have waited for something (EXEC-3).
#[derive(Default)]
struct Parked {
    wakers: RefCell<Vec<Option<Waker>>>,
    free: RefCell<Vec<usize>>,
}

impl Parked {
    fn add(self: Rc<Self>, waker: Waker) -> Place {
        let free = self.free.borrow_mut().pop();
        let mut wakers = self.wakers.borrow_mut();
        let index = free.unwrap_or_else(|| {
            wakers.push(None);
            wakers.len() - 1
        });
        wakers[index] = Some(waker);
        drop(wakers);
        Place { parked: self, index }
    }

    /// Wakes all that still wait; says whether there were any.
    fn wake(&self) -> bool {
        let woken: Vec<Waker> =
            self.wakers.borrow_mut().iter_mut().filter_map(Option::take).collect();
        let any = !woken.is_empty();
        woken.into_iter().for_each(Waker::wake);
        any
    }
}

/// A task's place among the parked; given up when dropped.
struct Place {
    parked: Rc<Parked>,
    index: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Dropped apart: it may be the last that keeps something else.
        let waker = self.parked.wakers.borrow_mut()[self.index].take();
        self.parked.free.borrow_mut().push(self.index);
        drop(waker);
    }
}

/// A task's future, known to its executor from its first wait on. One that is
/// done at once costs nothing.
struct Known<F> {
    future: F,
    place: Option<Place>,
}

impl<F> Known<F> {
    fn new(future: F) -> Self {
        Self { future, place: None }
    }
}

impl<F: Future> Future for Known<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `future` is not moved out of the pinned value, here or when
        // it is dropped, which has no `Drop` of its own; `place` is not pinned.
        let this = unsafe { self.get_unchecked_mut() };
        // SAFETY: as above.
        let polled = unsafe { Pin::new_unchecked(&mut this.future) }.poll(cx);
        if polled.is_pending() && this.place.is_none() {
            let parked = CURRENT.with(|c| c.borrow().as_ref().map(|c| c.parked.clone()));
            this.place = parked.map(|parked| parked.add(cx.waker().clone()));
        }
        polled
    }
}

/// What other threads see of an executor.
struct Shared {
    remote: Mutex<Remote>,
    /// Set when the owner has been told to look at `remote`.
    told: AtomicBool,
    tell: Box<dyn Fn() + Send + Sync>,
}

struct Remote {
    queue: Vec<Runnable>,
    closed: bool,
}

/// Runs tasks on the thread that made it.
pub struct Executor {
    shared: Arc<Shared>,
    queue: Rc<RefCell<VecDeque<Runnable>>>,
    parked: Rc<Parked>,
}

/// Reaches an executor from any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// The receiver of a task's result: a future, or [`wait`](Self::wait) for
/// threads. Dropping it detaches; the task goes on (EXEC-2).
pub struct Ticket<T>(Inner<T>);

enum Inner<T> {
    Task(FallibleTask<T>),
    Ready(T),
    Taken,
}

impl Executor {
    /// An executor of this thread. `tell` is called, from any thread, when
    /// the owner should call [`run`](Self::run) again.
    pub fn new(tell: impl Fn() + Send + Sync + 'static) -> Self {
        let remote = Mutex::new(Remote { queue: Vec::new(), closed: false });
        let shared =
            Arc::new(Shared { remote, told: AtomicBool::new(false), tell: Box::new(tell) });
        Self { shared, queue: Rc::default(), parked: Rc::default() }
    }

    /// Reaches this executor.
    pub fn handle(&self) -> Handle {
        Handle { shared: self.shared.clone() }
    }

    /// Makes this the thread's executor while `body` runs.
    pub fn enter<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Leave(Option<Current>);
        impl Drop for Leave {
            fn drop(&mut self) {
                CURRENT.with(|c| *c.borrow_mut() = self.0.take());
            }
        }
        let (shared, queue) = (self.shared.clone(), self.queue.clone());
        let current = Current { shared, queue, parked: self.parked.clone() };
        let _leave = Leave(CURRENT.with(|c| c.borrow_mut().replace(current)));
        body()
    }

    /// Runs up to `budget` ready tasks in the order in which they became
    /// ready; says whether more are ready. Call inside [`enter`](Self::enter).
    pub fn run(&self, budget: usize) -> bool {
        self.take_remote();
        for _ in 0..budget {
            let Some(runnable) = self.queue.borrow_mut().pop_front() else { break };
            runnable.run();
        }
        !self.queue.borrow().is_empty() || self.shared.told.load(Ordering::Acquire)
    }

    /// Runs one ready task, chosen by `pick` among so many: for simulation.
    /// False when none is ready.
    pub fn run_one(&self, pick: impl FnOnce(usize) -> usize) -> bool {
        self.take_remote();
        let ready = self.queue.borrow().len();
        if ready == 0 {
            return false;
        }
        let runnable = self.queue.borrow_mut().remove(pick(ready) % ready).expect("in range");
        runnable.run();
        true
    }

    fn take_remote(&self) {
        if self.shared.told.swap(false, Ordering::AcqRel) {
            let arrived = std::mem::take(&mut self.shared.lock().queue);
            self.queue.borrow_mut().extend(arrived);
        }
    }
}

impl Drop for Executor {
    /// Drops every task (EXEC-3), here, on its own thread (EXEC-1).
    fn drop(&mut self) {
        self.enter(|| {
            self.shared.lock().closed = true;
            loop {
                self.shared.told.store(true, Ordering::Release);
                self.take_remote();
                let runnable = self.queue.borrow_mut().pop_front();
                match runnable {
                    Some(runnable) => drop(runnable),
                    None if self.parked.wake() => {}
                    None => break,
                }
            }
        });
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Remote> {
        self.remote.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn schedule(self: &Arc<Self>, runnable: Runnable) {
        let mut runnable = Some(runnable);
        // On the owner's thread the queue is at hand.
        let _ = CURRENT.try_with(|current| {
            if let Some(current) = &*current.borrow()
                && Arc::ptr_eq(&current.shared, self)
            {
                current.queue.borrow_mut().extend(runnable.take());
            }
        });
        let Some(runnable) = runnable else { return };
        let mut remote = self.lock();
        if remote.closed {
            // The executor is gone and its futures may only be dropped on a
            // thread that no longer runs: leaking is the safe end (EXEC-1).
            std::mem::forget(runnable);
            return;
        }
        remote.queue.push(runnable);
        drop(remote);
        if !self.told.swap(true, Ordering::AcqRel) {
            (self.tell)();
        }
    }
}

impl Handle {
    /// Runs the future that `make` gives on the executor's thread.
    pub fn spawn<F, Fut>(&self, make: F) -> Ticket<Fut::Output>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future + 'static,
        Fut::Output: Send + 'static,
    {
        let shared = self.shared.clone();
        let schedule = move |runnable| shared.schedule(runnable);
        // SAFETY: `async_task::spawn_unchecked` asks, for a future that is not
        // `Send`, that the runnable is used and dropped only on its thread.
        // Until its first run the future holds only `make`, which is `Send`;
        // it is run only by `Executor::run`/`run_one` and dropped only by
        // `Executor::drop`, all on the executor's thread (`Executor` is not
        // `Send`: it holds an `Rc`); `Shared::schedule` leaks it otherwise.
        // Future and schedule function are `'static`; the schedule function
        // is `Send + Sync`.
        let (runnable, task) = unsafe {
            async_task::spawn_unchecked(Known::new(async move { make().await }), schedule)
        };
        runnable.schedule();
        Ticket(Inner::Task(task.fallible()))
    }

    /// Whether this thread is the executor's.
    pub fn is_here(&self) -> bool {
        CURRENT.with(|c| c.borrow().as_ref().is_some_and(|c| Arc::ptr_eq(&c.shared, &self.shared)))
    }
}

/// Runs a future on this thread's executor.
///
/// # Panics
///
/// On a thread that has none.
pub fn spawn<Fut>(future: Fut) -> Ticket<Fut::Output>
where
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    let (runnable, ticket) = task(future);
    runnable.schedule();
    ticket
}

/// The same, with its first step done before this returns: what that begins
/// is under way then.
///
/// # Panics
///
/// On a thread that has none.
pub fn spawn_begun<Fut>(future: Fut) -> Ticket<Fut::Output>
where
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    let (runnable, ticket) = task(future);
    runnable.run();
    ticket
}

fn task<Fut>(future: Fut) -> (Runnable, Ticket<Fut::Output>)
where
    Fut: Future + 'static,
    Fut::Output: Send + 'static,
{
    let shared = CURRENT.with(|c| c.borrow().as_ref().map(|c| c.shared.clone()));
    let shared = shared.expect("on a worker's thread");
    let schedule = move |runnable| shared.schedule(runnable);
    // SAFETY: as in `Handle::spawn`; the future is made on the executor's own
    // thread and never leaves it: `spawn_begun` runs it there once itself.
    let (runnable, task) = unsafe { async_task::spawn_unchecked(Known::new(future), schedule) };
    (runnable, Ticket(Inner::Task(task.fallible())))
}

/// Lets other ready tasks run first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Wakes a thread that is parked in [`block_on`].
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future to its end on a thread that is no worker, which sleeps
/// meanwhile.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

impl<T> Ticket<T> {
    /// The receiver of a result that is there already.
    pub fn ready(value: T) -> Self {
        Ticket(Inner::Ready(value))
    }

    /// The result, if it is there without waiting.
    ///
    /// # Errors
    ///
    /// The ticket again, if it is not.
    pub fn now(mut self) -> Result<T, Self> {
        match std::mem::replace(&mut self.0, Inner::Taken) {
            Inner::Ready(value) => Ok(value),
            other => Err(Ticket(other)),
        }
    }

    /// Blocks this thread, which must not be a worker's, until the result is
    /// there. `None` when the executor stopped first.
    pub fn wait_opt(mut self) -> Option<T> {
        match std::mem::replace(&mut self.0, Inner::Taken) {
            Inner::Task(task) => block_on(task),
            Inner::Ready(value) => Some(value),
            Inner::Taken => None,
        }
    }
}

/// An error that can say that the worker stopped before a task's end.
pub trait Stopped {
    /// That error.
    fn stopped() -> Self;
}

impl<T, E: Stopped> Ticket<Result<T, E>> {
    /// Blocks this thread, which must not be a worker's, until the request
    /// settles.
    ///
    /// # Errors
    ///
    /// The task's, or that the worker stopped.
    pub fn wait(self) -> Result<T, E> {
        self.wait_opt().unwrap_or_else(|| Err(E::stopped()))
    }
}

impl Stopped for crate::Error {
    fn stopped() -> Self {
        let (kind, op) = (crate::Kind::Stopped, crate::OpName::Open);
        crate::Error { kind, op, device: "worker".into(), at: 0, len: 0 }
    }
}

impl<T, E: Stopped> Future for Ticket<Result<T, E>> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Inner::Task(task) = &mut self.0 {
            return Pin::new(task).poll(cx).map(|value| value.unwrap_or_else(|| Err(E::stopped())));
        }
        match std::mem::replace(&mut self.0, Inner::Taken) {
            Inner::Ready(value) => Poll::Ready(value),
            _ => panic!("a ticket was polled after it gave its result"),
        }
    }
}

impl<T> Unpin for Ticket<T> {}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        if let Inner::Task(task) = std::mem::replace(&mut self.0, Inner::Taken) {
            #[cfg(feature = "twins")]
            if ABORT_DROPPED.get() {
                return drop(task);
            }
            task.detach();
        }
    }
}

#[cfg(feature = "twins")]
thread_local! {
    static ABORT_DROPPED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Takes EXEC-2 away from this thread: a ticket that is dropped here aborts
/// its task. For the twins of tests that need the rule.
#[cfg(feature = "twins")]
pub fn abort_dropped_tickets(abort: bool) {
    ABORT_DROPPED.set(abort);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_detached_and_tickets_give_results() {
        let executor = Executor::new(|| {});
        let seen = Rc::new(RefCell::new(Vec::new()));
        let ticket = executor.enter(|| {
            let s = seen.clone();
            drop(spawn(async move {
                yield_now().await;
                s.borrow_mut().push("detached");
            }));
            spawn(async { Ok::<_, crate::Error>(7) })
        });
        executor.enter(|| while executor.run(10) {});
        assert_eq!(*seen.borrow(), ["detached"]);
        assert_eq!(ticket.wait(), Ok(7));
    }

    #[test]
    fn tasks_that_wait_are_dropped_with_their_executor() {
        let executor = Executor::new(|| {});
        let kept = Rc::new(crate::sync::Condition::default());
        let ticket = executor.enter(|| {
            // One that waits for what it keeps itself, one for that one.
            let condition = kept.clone();
            let inner = spawn(async move {
                condition.wait_for(|| None::<()>).await;
                Ok::<_, crate::Error>(())
            });
            spawn(inner)
        });
        executor.enter(|| while executor.run(10) {});
        assert_eq!(Rc::strong_count(&kept), 2);
        drop(executor);
        assert_eq!(Rc::strong_count(&kept), 1);
        assert_eq!(ticket.wait().unwrap_err().kind, crate::Kind::Stopped);
    }

    #[test]
    fn other_threads_send_work_and_a_stopped_executor_answers() {
        let executor = Executor::new(|| {});
        let handle = executor.handle();
        let ticket = std::thread::spawn(move || {
            handle.spawn(|| async { Ok::<_, crate::Error>(std::thread::current().id()) })
        });
        let ticket = ticket.join().unwrap();
        executor.enter(|| executor.run(10));
        assert_eq!(ticket.wait(), Ok(std::thread::current().id()));

        let handle = executor.handle();
        let late = handle.spawn(|| async { Ok::<_, crate::Error>(()) });
        drop(executor);
        assert_eq!(late.wait().unwrap_err().kind, crate::Kind::Stopped);
    }
}
