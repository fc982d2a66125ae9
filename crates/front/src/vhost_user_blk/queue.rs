//! A started virtqueue: a task on the worker that takes requests from the
//! available ring, and one task per request that puts it into the used ring.
//!
//! QUEUE-1: no more requests are under way than the queue has entries, however
//! often a driver makes the same chain available.
//!
//! QUEUE-2: the task ends when it is told to *and* every request has settled:
//! who waits for it may take the guest's memory away.
//!
//! QUEUE-3: no driver can keep the worker from its other tasks: the requests
//! of one round are counted, kicks are read without waiting whatever the
//! descriptor is, calls are made non-blocking.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use rustix::io::{Errno, IoSliceMut, ReadWriteFlags};
use smallvec::SmallVec;
use stableio_block::sync::Condition;
use stableio_block::{Outcome, Request, Stack, Ticket, exec, ring};
use stableio_mem::{ForeignBuf, StableBuf, doors};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Broken, Chain, Command, Status};
use super::config::{ID_BYTES, Terms};
use super::memory::GuestMap;

/// Requests taken before the driver is called for those that have settled:
/// few, so that it goes on while we do; more, to call less often.
const ROUND: u16 = 8;

/// What a queue works on.
pub(super) struct Setup {
    /// The rings, with the next index to look at.
    pub(super) ring: Queue,
    /// The memory that they and the requests lie in.
    pub(super) map: Arc<GuestMap>,
    /// Rung by the driver.
    pub(super) kick: Arc<OwnedFd>,
    /// To ring when requests are done.
    pub(super) call: Arc<Bell>,
    /// What requests may do.
    pub(super) terms: Terms,
    /// Answer to GET_ID.
    pub(super) id: [u8; ID_BYTES],
    /// Where the requests go.
    pub(super) stack: Stack,
    /// Told, once, on the worker, why the queue can not go on.
    pub(super) broken: Box<dyn FnOnce(Broken) + Send>,
}

/// An eventfd of the front end's, or none: it may be changed at any time.
#[derive(Default)]
pub(super) struct Bell(Mutex<Option<OwnedFd>>);

impl Bell {
    /// Rings `fd` from now on. It is made non-blocking: a full counter means
    /// that it rings already.
    pub(super) fn set(&self, fd: Option<OwnedFd>) -> std::io::Result<()> {
        if let Some(fd) = &fd {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fd;
        Ok(())
    }

    /// Rings.
    pub(super) fn ring(&self) {
        if let Some(fd) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }
}

/// A queue that runs on the worker. It must be stopped, not dropped.
pub(super) struct Running {
    orders: Arc<Orders>,
    done: Ticket<u16>,
}

impl Running {
    /// Starts it.
    pub(super) fn start(setup: Setup) -> Self {
        let orders = Arc::new(Orders::default());
        let (worker, heard) = (setup.stack.worker().clone(), orders.clone());
        Self { orders, done: worker.spawn(move || Live::run(setup, heard)) }
    }

    /// Takes no more requests, waits until those under way have settled
    /// (QUEUE-2), and gives the index of the next one, which nobody has
    /// looked at. `None` when the worker is gone.
    pub(super) fn stop(self) -> Option<u16> {
        self.orders.stop.store(true, Ordering::Release);
        self.orders.wake();
        self.done.wait_opt()
    }
}

/// What wakes a queue's task, from its own thread and from others.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Orders {
    fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        waker.into_iter().for_each(Waker::wake);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Why a queue's task woke up.
enum Event {
    Kicked,
    Settled,
    Stopped,
}

/// A queue on its worker, shared by its tasks.
struct Live {
    ring: RefCell<Queue>,
    map: Arc<GuestMap>,
    kick: Arc<OwnedFd>,
    call: Arc<Bell>,
    terms: Terms,
    id: [u8; ID_BYTES],
    stack: Stack,
    orders: Arc<Orders>,
    in_flight: Cell<u16>,
    /// Requests have been put into the used ring since the last call.
    uncalled: Cell<bool>,
    /// The rings did not take a settled request.
    damaged: Cell<bool>,
    drained: Condition,
}

impl Live {
    /// The task: serves, then waits for what is under way.
    async fn run(setup: Setup, orders: Arc<Orders>) -> u16 {
        let Setup { ring, map, kick, call, terms, id, stack, broken } = setup;
        let queue = Rc::new(Live {
            ring: RefCell::new(ring),
            map,
            kick,
            call,
            terms,
            id,
            stack,
            orders,
            in_flight: Cell::new(0),
            uncalled: Cell::new(false),
            damaged: Cell::new(false),
            drained: Condition::default(),
        });
        if let Err(reason) = queue.serve().await {
            broken(reason);
        }
        let drained = || (queue.in_flight.get() == 0).then_some(());
        queue.drained.wait_for(drained).await;
        let _ = queue.signal();
        queue.ring.borrow().next_avail()
    }

    /// Serves until it is told to stop.
    async fn serve(self: &Rc<Self>) -> Result<(), Broken> {
        loop {
            let mut kick = pin!(ring::poll(self.kick.as_fd(), libc::POLLIN));
            loop {
                // Also at the start: a kick may have come before us.
                while self.work()? && !self.orders.stopped() {
                    exec::yield_now().await;
                }
                match poll_fn(|cx| self.poll_event(cx, kick.as_mut())).await {
                    Event::Settled => {}
                    Event::Kicked => break self.take_kick()?,
                    Event::Stopped => return Ok(()),
                }
            }
        }
    }

    fn poll_event(
        &self,
        cx: &mut Context<'_>,
        kick: Pin<&mut impl Future<Output = std::io::Result<()>>>,
    ) -> Poll<Event> {
        // First the waker, then a look at what it is for: an order that comes
        // between the two wakes us once more.
        *self.orders.waker.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(cx.waker().clone());
        if self.orders.stopped() {
            Poll::Ready(Event::Stopped)
        } else if kick.poll(cx).is_ready() {
            Poll::Ready(Event::Kicked)
        } else if self.uncalled.get() {
            Poll::Ready(Event::Settled)
        } else {
            Poll::Pending
        }
    }

    /// Resets the kick's counter.
    fn take_kick(&self) -> Result<(), Broken> {
        let mut count = [0; 8];
        let mut into = [IoSliceMut::new(&mut count)];
        // At no position and without waiting, even if the front end has made
        // the descriptor a blocking one again and read it first (QUEUE-3).
        match rustix::io::preadv2(&self.kick, &mut into, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(1..) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Ok(0) | Err(_) => Err(Broken::Kick),
        }
    }

    /// Calls the driver for what has settled, and takes what it has made
    /// available; says whether it should be called again soon.
    fn work(self: &Rc<Self>) -> Result<bool, Broken> {
        self.signal()?;
        let more = self.take_available()?;
        // For what was answered at once.
        self.signal()?;
        if self.damaged.get() {
            return Err(Broken::Rings);
        }
        if self.map.is_broken() { Err(Broken::Vanished) } else { Ok(more) }
    }

    /// Begins the requests that are there, but no more than [`ROUND`] before
    /// others have their turn, and the driver is called for what has settled
    /// meanwhile; says whether more may be there.
    fn take_available(self: &Rc<Self>) -> Result<bool, Broken> {
        let memory = self.map.regions();
        let size = self.ring.borrow().size();
        let mut taken = 0;
        self.ring.borrow_mut().disable_notification(memory).map_err(|_| Broken::Rings)?;
        loop {
            if self.in_flight.get() == size {
                // QUEUE-1: the next that settles brings us back.
                return Ok(false);
            }
            if taken == ROUND {
                return Ok(true);
            }
            if self.take_one()? {
                taken += 1;
                continue;
            }
            let more = self.ring.borrow_mut().enable_notification(memory);
            if !more.map_err(|_| Broken::Rings)? {
                return Ok(false);
            }
        }
    }

    /// Takes a chain, if there is one, and begins its request.
    fn take_one(self: &Rc<Self>) -> Result<bool, Broken> {
        let mut ring = self.ring.borrow_mut();
        let mut chains = ring.iter(self.map.regions()).map_err(|_| Broken::Rings)?;
        let Some(chain) = chains.next() else { return Ok(false) };
        let head = chain.head_index();
        let Chain { status, writable, command } = Chain::parse(chain, &self.map, self.terms)?;
        drop(ring);
        self.in_flight.set(self.in_flight.get() + 1);
        match command {
            Err(answer) => self.settle(head, status, answer, 0),
            Ok(Command::GetId(into)) => {
                let answer = self.tell_id(into);
                self.settle(head, status, answer, writable);
            }
            Ok(Command::Ops(ops)) => {
                let submit = |op| self.stack.submit(Request::of(op));
                let mut tickets: SmallVec<[_; 1]> = ops.into_iter().map(submit).collect();
                if tickets.len() == 1 {
                    match tickets.remove(0).now() {
                        Ok(outcome) => {
                            let answer = outcome.map_or(Status::IoErr, |_| Status::Ok);
                            self.settle(head, status, answer, writable);
                            return Ok(true);
                        }
                        Err(waiting) => tickets.push(waiting),
                    }
                }
                let queue = self.clone();
                drop(exec::spawn(async move {
                    let answer = answer(tickets).await;
                    queue.settle(head, status, answer, writable);
                }));
            }
        }
        Ok(true)
    }

    fn tell_id(&self, into: ForeignBuf) -> Status {
        let id = StableBuf::from_owned(self.id).slice(0..into.len().min(ID_BYTES));
        doors::copy_out(&id, &into, 0).map_or(Status::IoErr, |()| Status::Ok)
    }

    /// Puts a request into the used ring; `written` bytes of its data were.
    fn settle(&self, head: u16, status: GuestAddress, answer: Status, written: u32) {
        let memory = self.map.regions();
        let written = if answer == Status::Ok { written + 1 } else { 1 };
        let stored = memory.write_obj(answer as u8, status).is_ok()
            && self.ring.borrow_mut().add_used(memory, head, written).is_ok();
        if !stored {
            self.damaged.set(true);
        }
        self.in_flight.set(self.in_flight.get() - 1);
        if self.in_flight.get() == 0 {
            self.drained.notify();
        }
        // The first that settles wakes the queue's task, which runs after all
        // others that are ready now: one call for the lot.
        if !self.uncalled.replace(true) {
            self.orders.wake();
        }
    }

    /// Calls the driver, if something has settled and it wants to know.
    fn signal(&self) -> Result<(), Broken> {
        if self.uncalled.replace(false) {
            let wanted = self.ring.borrow_mut().needs_notification(self.map.regions());
            if wanted.map_err(|_| Broken::Rings)? {
                self.call.ring();
            }
        }
        Ok(())
    }
}

/// Waits for all parts of a request.
async fn answer(tickets: SmallVec<[Ticket<Outcome>; 1]>) -> Status {
    let mut answer = Status::Ok;
    for ticket in tickets {
        if ticket.await.is_err() {
            answer = Status::IoErr;
        }
    }
    answer
}
