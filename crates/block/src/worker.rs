//! A worker: a thread with an executor and a ring.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use crate::dev;
use crate::exec::{self, Executor, Handle};
use crate::ring::{self, Ring};

/// Tasks run between two looks at the ring.
const BUDGET: usize = 64;

/// A thread that runs futures and their I/O. Dropping it stops it: tasks not
/// yet done are dropped, operations under way are waited for.
pub struct Worker {
    handle: Handle,
    stop: Arc<AtomicBool>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker whose thread is called `name`.
    ///
    /// # Errors
    ///
    /// The system's, where it has no io_uring or no thread left.
    pub fn start(name: &str) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stop = Arc::new(AtomicBool::new(false));
        let (send, receive) = std::sync::mpsc::channel();
        let thread = {
            let (bell, stop) = (bell.clone(), stop.clone());
            std::thread::Builder::new().name(name.into()).spawn(move || match Ring::new() {
                Ok(ring) => {
                    let ringer = bell.clone();
                    let executor = Executor::new(move || ring_bell(&ringer));
                    let _ = send.send(Ok(executor.handle()));
                    run(&executor, &ring, bell, &stop);
                }
                Err(e) => drop(send.send(Err(e))),
            })?
        };
        let handle =
            receive.recv().map_err(|_| io::Error::other("the worker died at its start"))??;
        Ok(Self { handle, stop, bell, thread: Some(thread) })
    }

    /// Reaches the worker from any thread.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        ring_bell(&self.bell);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ring_bell(bell: &OwnedFd) {
    // A full counter means that the bell is ringing already.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn run(executor: &Executor, ring: &Rc<Ring>, bell: Arc<OwnedFd>, stop: &AtomicBool) {
    executor.enter(|| {
        ring.enter(|| {
            drop(exec::spawn(listen(bell)));
            while !stop.load(Ordering::Acquire) {
                // What copies beside us is soon done, and takes the next.
                let budget = if dev::has_handed_over() { 1 } else { BUDGET };
                let more = executor.run(budget);
                ring.turn(!more).expect("io_uring_enter fails only for a bug");
            }
        });
    });
}

/// Keeps a poll of the bell in the ring, so that other threads end its sleep.
async fn listen(bell: Arc<OwnedFd>) {
    loop {
        if ring::poll(bell.as_fd(), libc::POLLIN).await.is_err() {
            return;
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&*bell, &mut count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::time::Duration;

    #[test]
    fn work_arrives_from_other_threads_and_timers_fire() {
        let worker = Worker::start("test").unwrap();
        for i in 0..1000 {
            let ticket = worker.handle().spawn(move || async move {
                if i % 100 == 0 {
                    ring::sleep(Duration::from_millis(1)).await;
                }
                Ok::<_, crate::Error>(i)
            });
            assert_eq!(ticket.wait(), Ok(i));
        }
    }

    #[test]
    fn events_that_never_come_keep_no_worker() {
        let never = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let worker = Worker::start("test").unwrap();
        let spawn = |fd: Arc<OwnedFd>, patience| {
            worker.handle().spawn(move || async move {
                let mut event = Box::pin(ring::poll(fd.as_fd(), libc::POLLIN));
                std::future::poll_fn(|cx| {
                    let _ = event.as_mut().poll(cx);
                    std::task::Poll::Ready(())
                })
                .await;
                ring::sleep(patience).await;
            })
        };
        // One poll is dropped with its future, one is there at the end.
        spawn(never.clone(), Duration::ZERO).wait_opt();
        drop(spawn(never, Duration::from_secs(3600)));
        drop(worker);
    }
}
