//! Load that begins in this process: requests on foreign memory through a [`Stack`], some of them
//! always under way.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stableio_block::{Body, Error, Request, Stack, exec};
use stableio_mem::{ForeignBuf, Segment};
use stableio_testkit::vhost::SharedMemory;

/// Loads so far, and one.
static LOADS: AtomicU64 = AtomicU64::new(1);

/// What requests do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write,
    /// A block of the first half of the area is read, then written to the second half.
    Copy,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Sequential,
    Random,
}

/// A load. It lies in the first `area` bytes of a device.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) what: What,
    pub(crate) order: Order,
    pub(crate) block: usize,
    pub(crate) depth: usize,
    pub(crate) area: u64,
}

/// How long it goes on.
#[derive(Clone, Copy)]
pub(crate) enum Until {
    After(Duration),
    Requests(u64),
}

impl Load {
    /// Bytes a second, those read and those written.
    pub(crate) fn run(&self, stack: &Stack, length: Duration) -> io::Result<f64> {
        self.begin(stack, Until::After(length))?.wait().map_err(io::Error::other)
    }

    /// Begins on the stack's worker, as a front end's requests do; the ticket gives bytes a
    /// second.
    pub(crate) fn begin(
        self,
        stack: &Stack,
        until: Until,
    ) -> io::Result<exec::Ticket<Result<f64, Error>>> {
        let memory = SharedMemory::new(self.depth * self.block)?;
        // Not zeros, which a file system may leave out.
        memory.fill(0..self.depth * self.block, 0x5ab1_e105_5ab1_e105);
        // Each load goes to blocks of its own choice.
        let seed = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(LOADS.fetch_add(1, Ordering::Relaxed));
        let there = stack.clone();
        Ok(stack.worker().spawn(move || async move {
            let began = Instant::now();
            let running = Rc::new(Running {
                load: self,
                stack: there,
                memory,
                until,
                began,
                begun: Cell::new(0),
                bytes: Cell::new(0),
                random: RefCell::new(seed),
            });
            let slots: Vec<_> =
                (0..self.depth).map(|slot| exec::spawn(running.clone().slot(slot))).collect();
            for slot in slots {
                slot.await?;
            }
            Ok(running.bytes.get() as f64 / began.elapsed().as_secs_f64())
        }))
    }
}

/// What requests under way have in common.
struct Running {
    load: Load,
    stack: Stack,
    memory: Arc<SharedMemory>,
    until: Until,
    began: Instant,
    begun: Cell<u64>,
    bytes: Cell<u64>,
    random: RefCell<u64>,
}

impl Running {
    /// One request after the other, with one buffer.
    async fn slot(self: Rc<Self>, slot: usize) -> Result<(), Error> {
        let Load { what, block, area, .. } = self.load;
        while self.goes_on() {
            match what {
                What::Read => self.read(slot, self.next(area)).await?,
                What::Write => self.write(slot, self.next(area)).await?,
                What::Copy => {
                    let at = self.next(area / 2);
                    self.read(slot, at).await?;
                    self.write(slot, area / 2 + at).await?;
                    self.bytes.set(self.bytes.get() + block as u64);
                }
            }
            self.bytes.set(self.bytes.get() + block as u64);
            // A request may be done at once; as with a front end's, others have their turn then.
            exec::yield_now().await;
        }
        Ok(())
    }

    async fn read(&self, slot: usize, at: u64) -> Result<(), Error> {
        self.stack.submit(Request::read(at, self.buffer(slot))).await.map(drop)
    }

    async fn write(&self, slot: usize, at: u64) -> Result<(), Error> {
        let body = Body::Foreign(self.buffer(slot));
        self.stack.submit(Request::write(at, body, false)).await.map(drop)
    }

    fn buffer(&self, slot: usize) -> ForeignBuf {
        let len = self.load.block;
        let addr = self.memory.words().as_ptr() as usize + slot * len;
        // SAFETY: the slot lies in the mapping, which `memory` keeps; it was never the
        // allocator's, and no reference to it is used.
        unsafe { ForeignBuf::new([Segment { addr, len }], self.memory.clone()) }
    }

    fn goes_on(&self) -> bool {
        match self.until {
            Until::After(length) => self.began.elapsed() < length,
            Until::Requests(all) => self.begun.get() < all,
        }
    }

    /// Where the next request of the first `area` bytes goes.
    fn next(&self, area: u64) -> u64 {
        let (number, blocks) = (self.begun.get(), area / self.load.block as u64);
        self.begun.set(number + 1);
        let block = match self.load.order {
            Order::Sequential => number % blocks,
            Order::Random => self.random() % blocks,
        };
        block * self.load.block as u64
    }

    /// xorshift64*.
    fn random(&self) -> u64 {
        let mut state = self.random.borrow_mut();
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
}
