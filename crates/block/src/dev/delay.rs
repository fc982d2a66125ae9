//! A device that takes its time: for the latency of disks that a test lacks,
//! above all of their flushes.

use std::sync::Arc;
use std::time::Duration;

use crate::device::Device;
use crate::error::OpName;
use crate::exec::{Handle, Ticket};
use crate::limits::Limits;
use crate::request::{Op, Request};
use crate::{Outcome, exec, ring};

/// What each operation takes longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delays {
    /// Reads.
    pub read: Duration,
    /// Writes, of zeros too, and discards.
    pub write: Duration,
    /// Flushes; added to a write with FUA.
    pub flush: Duration,
}

/// A device that begins each operation on the one below late.
///
/// Operations overlap: each waits for its own delay from the moment in which
/// it reached the worker, not for those before it. So a delay is latency, and
/// limits nobody's throughput. Operations with the same delay begin below in
/// about the order in which they came; others overtake each other.
///
/// The wait comes first: until it is over the memory of a write has not been
/// looked at, so that memory used again too early shows.
///
/// The worker waits by its ring: inside a bare executor only operations
/// without a delay work.
pub struct DelayDevice {
    inner: Arc<dyn Device>,
    delays: Delays,
    worker: Handle,
}

impl DelayDevice {
    /// Puts `delays` over `inner`. Its tasks run on `worker`, which may be
    /// the one of `inner`.
    pub fn new(inner: Arc<dyn Device>, delays: Delays, worker: Handle) -> Self {
        Self { inner, delays, worker }
    }
}

impl Delays {
    fn of(&self, op: OpName) -> Duration {
        match op {
            OpName::Read => self.read,
            OpName::Write | OpName::WriteZeroes | OpName::Discard => self.write,
            OpName::Flush => self.flush,
            OpName::Open | OpName::Map => Duration::ZERO,
        }
    }
}

impl Device for DelayDevice {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let mut delay = self.delays.of(request.op.range().0);
        if let Op::Write { fua: true, .. } | Op::WriteZeroes { fua: true, .. } = request.op {
            delay += self.delays.flush;
        }
        if delay.is_zero() {
            return self.inner.submit(request);
        }
        let inner = self.inner.clone();
        let late = move || async move {
            ring::sleep(delay).await;
            inner.submit(request).await
        };
        match self.worker.is_here() {
            true => exec::spawn_begun(late()),
            false => self.worker.spawn(late),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::RamDevice;
    use crate::{Body, Reply, Worker};
    use stableio_mem::{Pool, StableBuf};
    use std::time::Instant;

    const DELAY: Duration = Duration::from_millis(50);

    fn delayed(worker: &Worker, delays: Delays) -> DelayDevice {
        let ram = RamDevice::new(1 << 20, worker.handle().clone()).unwrap();
        DelayDevice::new(Arc::new(ram), delays, worker.handle().clone())
    }

    #[test]
    fn delays_overlap() {
        let worker = Worker::start("t").unwrap();
        let device = delayed(&worker, Delays { read: DELAY, ..Delays::default() });
        let pool = Pool::new(1 << 20).unwrap();
        let reads = 100;
        let begun = Instant::now();
        let tickets: Vec<_> = (0..reads)
            .map(|i| {
                let memory = pool.try_reserve(4096).unwrap().unwrap();
                device.submit(Request::read_owned(i * 4096, 4096).with_memory(memory))
            })
            .collect();
        for ticket in tickets {
            assert!(matches!(ticket.wait(), Ok(Reply::Data(_))));
        }
        let took = begun.elapsed();
        println!("{reads} reads of {DELAY:?} side by side took {took:?}");
        assert!(took >= DELAY, "{took:?}");
        // One after the other takes at least this, on any machine.
        assert!(took < DELAY * reads as u32, "{took:?}");
    }

    #[test]
    fn each_operation_has_its_own_delay() {
        let worker = Worker::start("t").unwrap();
        let write = || Request::write(0, Body::Stable(StableBuf::from_owned([7u8; 4096])), false);
        for (delays, request, late) in [
            (Delays { flush: DELAY, ..Delays::default() }, Request::flush(), true),
            (Delays { write: DELAY, ..Delays::default() }, write(), true),
            (Delays { flush: DELAY * 1000, ..Delays::default() }, write(), false),
        ] {
            let device = delayed(&worker, delays);
            let begun = Instant::now();
            device.submit(request).wait().unwrap();
            assert!(!late || begun.elapsed() >= DELAY, "{delays:?} took {:?}", begun.elapsed());
            assert!(late || begun.elapsed() < DELAY * 1000);
        }
    }
}
