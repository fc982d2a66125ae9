//! The program's two ways in: the library, and a guest's virtqueue.
//!
//! Both keep [`DEPTH`] writes in flight, from one list.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use stableio_block::{Body, Request, Stack};
use stableio_testkit::vhost::{Command, Queue, Segment};

use super::plan::{Lot, Pieces, Random, SEGMENTS, scatter};
use super::program::{Buffer, DEPTH, Program};

/// What to write.
pub(super) struct Order<'a> {
    /// Where, in this order.
    pub(super) lots: &'a [Lot],
    /// Begin nothing afterwards.
    pub(super) deadline: Option<Instant>,
    /// Begin nothing after so many raced writes.
    pub(super) most_raced: u64,
}

/// A write that is done.
pub(super) struct Write {
    pub(super) lot: Lot,
    /// The buffer that it came from, and where in it.
    pub(super) tag: u8,
    pub(super) pieces: Pieces,
    /// The count that its words carried at least.
    pub(super) first: u64,
    /// TORTURE-1.
    pub(super) raced: bool,
    /// Whether it ended in an error.
    pub(super) failed: bool,
}

/// How far it is.
#[derive(Clone, Copy)]
pub(super) struct Pace {
    pub(super) writes: u64,
    pub(super) raced: u64,
}

/// The ways in.
pub(super) struct Ways<'a> {
    pub(super) stack: &'a Stack,
    pub(super) queue: &'a mut Queue,
    pub(super) program: &'a Program,
}

/// A write that is over: buffer, how it ended, and the buffer's count by then.
struct Landing {
    slot: usize,
    failed: bool,
    count: u64,
}

/// A way in. Takes writes, and tells when they are over.
trait Way {
    fn submit(&mut self, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()>;
    fn land(&mut self) -> io::Result<Landing>;
}

/// What both writers share.
struct List<'a> {
    order: &'a Order<'a>,
    next: AtomicUsize,
    writes: AtomicU64,
    raced: AtomicU64,
}

impl Ways<'_> {
    /// Carries an order out; calls `progress` now and then.
    ///
    /// # Errors
    ///
    /// When a way is blocked; a write that fails is no error.
    pub(super) fn write(
        self,
        order: &Order<'_>,
        progress: &mut dyn FnMut(Pace),
    ) -> io::Result<Vec<Write>> {
        let list = &List::new(order);
        let (done, all_done) = mpsc::channel::<()>();
        let Ways { stack, queue, program } = self;
        thread::scope(|scope| {
            let also_done = done.clone();
            let library = scope.spawn(move || {
                let _done = done;
                list.work(&program.library, &mut Library::new(stack, program.library.clone()))
            });
            let guest = scope.spawn(move || {
                let _done = also_done;
                list.work(&program.guest, &mut Guest { queue, buffers: &program.guest })
            });
            while let Err(RecvTimeoutError::Timeout) =
                all_done.recv_timeout(Duration::from_millis(100))
            {
                progress(list.pace());
            }
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            let (mut writes, more): (Vec<Write>, Vec<Write>) = (join(library)?, join(guest)?);
            writes.extend(more);
            Ok(writes)
        })
    }
}

impl<'a> List<'a> {
    fn new(order: &'a Order<'a>) -> Self {
        let (next, writes, raced) = Default::default();
        Self { order, next, writes, raced }
    }

    fn pace(&self) -> Pace {
        Pace {
            writes: self.writes.load(Ordering::Relaxed),
            raced: self.raced.load(Ordering::Relaxed),
        }
    }

    /// The next lot, until it has been enough. Its number seeds the shape of
    /// its memory.
    fn next(&self) -> Option<(u64, Lot)> {
        let late = self.order.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if late || self.raced.load(Ordering::Relaxed) >= self.order.most_raced {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.order.lots.get(number).map(|lot| (number as u64, *lot))
    }

    /// A writer: keeps all buffers in flight until the list is done.
    fn work(&self, buffers: &[Buffer], way: &mut impl Way) -> io::Result<Vec<Write>> {
        let mut writes = Vec::new();
        let mut in_flight: Vec<Option<(Write, u64)>> = (0..DEPTH).map(|_| None).collect();
        let mut free: Vec<usize> = (0..DEPTH).collect();
        loop {
            while let Some(slot) = free.pop() {
                let Some((number, lot)) = self.next() else {
                    free.push(slot);
                    break;
                };
                let buffer = &buffers[slot];
                let pieces = scatter(lot.len, &mut Random::new(number));
                let first = buffer.prepare(&pieces);
                let before = buffer.count();
                way.submit(slot, lot, &pieces)?;
                let tag = buffer.tag();
                let write = Write { lot, tag, pieces, first, raced: false, failed: false };
                in_flight[slot] = Some((write, before));
            }
            if free.len() == DEPTH {
                return Ok(writes);
            }
            let landing = way.land()?;
            let (mut write, before) = in_flight[landing.slot].take().expect("it was in flight");
            write.raced = landing.count != before;
            write.failed = landing.failed;
            self.writes.fetch_add(1, Ordering::Relaxed);
            self.raced.fetch_add(u64::from(write.raced), Ordering::Relaxed);
            writes.push(write);
            free.push(landing.slot);
        }
    }
}

/// The library, in this process.
struct Library<'a> {
    stack: &'a Stack,
    buffers: Arc<[Buffer]>,
    landed: Sender<Landing>,
    landings: Receiver<Landing>,
}

impl<'a> Library<'a> {
    fn new(stack: &'a Stack, buffers: Arc<[Buffer]>) -> Self {
        let (landed, landings) = mpsc::channel();
        Self { stack, buffers, landed, landings }
    }
}

impl Way for Library<'_> {
    fn submit(&mut self, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()> {
        let body = Body::Foreign(self.buffers[slot].foreign(pieces));
        let ticket = self.stack.submit(Request::write(lot.at, body, false));
        let (buffers, landed) = (self.buffers.clone(), self.landed.clone());
        // The end is seen where it happens, not where a thread wakes up to
        // hear of it: a longer flight would only look like a braver one.
        drop(self.stack.worker().spawn(move || async move {
            let failed = ticket.await.is_err();
            let _ = landed.send(Landing { slot, failed, count: buffers[slot].land() });
        }));
        Ok(())
    }

    fn land(&mut self) -> io::Result<Landing> {
        self.landings.recv().map_err(io::Error::other)
    }
}

/// A guest with a disk.
struct Guest<'a> {
    queue: &'a mut Queue,
    buffers: &'a [Buffer],
}

impl Way for Guest<'_> {
    fn submit(&mut self, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()> {
        let segments: SmallVec<[Segment; SEGMENTS]> =
            pieces.iter().map(|piece| self.buffers[slot].segment(piece)).collect();
        self.queue.submit(slot as u64, Command::Write(lot.at, &segments))?;
        self.queue.kick()
    }

    fn land(&mut self) -> io::Result<Landing> {
        let completion = self.queue.wait()?;
        let slot = completion.tag as usize;
        let failed = completion.result().is_err();
        Ok(Landing { slot, failed, count: self.buffers[slot].land() })
    }
}
