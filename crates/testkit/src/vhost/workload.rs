//! Load on a device, and what it took.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::queue::{Command, Queue, Segment};
use crate::Random;

/// What a workload does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads.
    Read,
    /// Writes.
    Write,
}

/// In which order it goes over its area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Each block as likely as any other; the same sequence every time.
    Random,
    /// One after the other, and again from the beginning.
    Sequential,
}

/// A constant load, the same on every queue.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// What it does.
    pub op: Op,
    /// In which order.
    pub order: Order,
    /// Bytes per request.
    pub block: usize,
    /// Requests in flight per queue.
    pub depth: usize,
    /// It stays in the first `area` bytes of the device.
    pub area: u64,
    /// For how long.
    pub runtime: Duration,
}

/// What was done, and in what time.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    /// Completed requests.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// From the first submission to the last completion.
    pub elapsed: Duration,
}

impl Throughput {
    /// Requests per second.
    pub fn ops_per_s(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    /// Bytes per second.
    pub fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64()
    }
}

impl Workload {
    /// The memory that one queue needs.
    pub fn memory_per_queue(&self) -> usize {
        self.block * self.depth
    }

    /// Runs on all queues, each with a thread and a share of the memory of its own.
    pub(super) fn run(&self, queues: &mut [Queue]) -> io::Result<Throughput> {
        let start = Instant::now();
        let operations = thread::scope(|scope| {
            let threads: Vec<_> = queues
                .iter_mut()
                .enumerate()
                .map(|(index, queue)| scope.spawn(move || self.run_queue(index, queue, start)))
                .collect();
            let counts = threads.into_iter().map(|t| t.join().expect("a load thread panicked"));
            counts.sum::<io::Result<u64>>()
        })?;
        Ok(Throughput {
            operations,
            bytes: operations * self.block as u64,
            elapsed: start.elapsed(),
        })
    }

    /// Keeps `depth` requests in flight until the time is over, then waits for the rest.
    fn run_queue(&self, index: usize, queue: &mut Queue, start: Instant) -> io::Result<u64> {
        let mut blocks = Blocks::new(self, index as u64);
        for tag in 0..self.depth as u64 {
            self.submit(index, queue, tag, blocks.next())?;
        }
        let mut in_flight = self.depth;
        let mut operations = 0;
        while in_flight > 0 {
            // All that is done is answered together, with one kick: as a guest's driver does it.
            let more = start.elapsed() < self.runtime;
            let mut next = Some(queue.wait()?);
            while let Some(completion) = next {
                completion.result()?;
                operations += 1;
                if more {
                    self.submit(index, queue, completion.tag, blocks.next())?;
                } else {
                    in_flight -= 1;
                }
                next = queue.completion()?;
            }
        }
        Ok(operations)
    }

    fn submit(&self, index: usize, queue: &mut Queue, tag: u64, block: u64) -> io::Result<()> {
        let at = index * self.memory_per_queue() + tag as usize * self.block;
        let segments = [Segment { at, len: self.block }];
        let offset = block * self.block as u64;
        queue.submit(
            tag,
            match self.op {
                Op::Read => Command::Read(offset, &segments),
                Op::Write => Command::Write(offset, &segments),
            },
        )
    }
}

/// The sequence of blocks that a queue goes through.
struct Blocks {
    order: Order,
    count: u64,
    /// The next one, of a sequential order.
    next: u64,
    random: Random,
}

impl Blocks {
    fn new(workload: &Workload, queue: u64) -> Blocks {
        let count = workload.area / workload.block as u64;
        assert!(count > 0, "the area holds no block");
        // Queues start apart from each other, wherever that is.
        let next = queue * (count / 8);
        Blocks { order: workload.order, count, next, random: Random::new(queue) }
    }

    fn next(&mut self) -> u64 {
        match self.order {
            Order::Random => self.random.below(self.count),
            Order::Sequential => {
                let block = self.next % self.count;
                self.next += 1;
                block
            }
        }
    }
}
