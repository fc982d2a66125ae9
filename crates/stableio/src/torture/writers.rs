//! The program's two ways in: the library, and a guest's virtqueue.
//!
//! Both keep [`DEPTH`] writes in flight, from one list. Some that are done are read back at once,
//! into the same memory, which changes on: what came can not be told from what the program stored
//! since, but the read must succeed, and nothing be charged to a member for it.

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

/// Of so many writes one is read back.
const READ_ONE_OF: u64 = 4;

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

/// Reads back.
#[derive(Clone, Copy, Default)]
pub(super) struct Reads {
    pub(super) done: u64,
    /// Those whose memory changed meanwhile.
    pub(super) raced: u64,
    pub(super) failed: u64,
}

/// What a way has done.
#[derive(Default)]
pub(super) struct Done {
    pub(super) writes: Vec<Write>,
    pub(super) reads: Reads,
}

/// A request that is over: buffer, how it ended, and the buffer's count by then.
struct Landing {
    slot: usize,
    failed: bool,
    count: u64,
}

/// A way in. Takes requests, and tells when they are over.
trait Way {
    fn submit(&mut self, kind: Kind, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()>;
    fn land(&mut self) -> io::Result<Landing>;
}

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
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
    ) -> io::Result<Done> {
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
            let (mut done, more): (Done, Done) = (join(library)?, join(guest)?);
            done.writes.extend(more.writes);
            done.reads.add(more.reads);
            Ok(done)
        })
    }
}

impl Reads {
    fn add(&mut self, other: Reads) {
        self.done += other.done;
        self.raced += other.raced;
        self.failed += other.failed;
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
    fn work(&self, buffers: &[Buffer], way: &mut impl Way) -> io::Result<Done> {
        let mut done = Done::default();
        let mut in_flight: Vec<Option<(Kind, Write, u64)>> = (0..DEPTH).map(|_| None).collect();
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
                way.submit(Kind::Write, slot, lot, &pieces)?;
                let tag = buffer.tag();
                let write = Write { lot, tag, pieces, first, raced: false, failed: false };
                in_flight[slot] = Some((Kind::Write, write, before));
            }
            if free.len() == DEPTH {
                return Ok(done);
            }
            let landing = way.land()?;
            let slot = landing.slot;
            let (kind, mut write, before) = in_flight[slot].take().expect("it was in flight");
            let raced = landing.count != before;
            if kind == Kind::Read {
                done.reads.add(Reads {
                    done: 1,
                    raced: u64::from(raced),
                    failed: u64::from(landing.failed),
                });
                done.writes.push(write);
                free.push(slot);
                continue;
            }
            (write.raced, write.failed) = (raced, landing.failed);
            let writes = self.writes.fetch_add(1, Ordering::Relaxed);
            self.raced.fetch_add(u64::from(raced), Ordering::Relaxed);
            if writes.is_multiple_of(READ_ONE_OF) {
                let before = buffers[slot].stay();
                way.submit(Kind::Read, slot, write.lot, &write.pieces)?;
                in_flight[slot] = Some((Kind::Read, write, before));
                continue;
            }
            done.writes.push(write);
            free.push(slot);
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
    fn submit(&mut self, kind: Kind, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()> {
        let memory = self.buffers[slot].foreign(pieces);
        let request = match kind {
            Kind::Write => Request::write(lot.at, Body::Foreign(memory), false),
            Kind::Read => Request::read(lot.at, memory),
        };
        let ticket = self.stack.submit(request);
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
    fn submit(&mut self, kind: Kind, slot: usize, lot: Lot, pieces: &Pieces) -> io::Result<()> {
        let segments: SmallVec<[Segment; SEGMENTS]> =
            pieces.iter().map(|piece| self.buffers[slot].segment(piece)).collect();
        let command = match kind {
            Kind::Write => Command::Write(lot.at, &segments),
            Kind::Read => Command::Read(lot.at, &segments),
        };
        self.queue.submit(slot as u64, command)?;
        self.queue.kick()
    }

    fn land(&mut self) -> io::Result<Landing> {
        let completion = self.queue.wait()?;
        let slot = completion.tag as usize;
        let failed = completion.result().is_err();
        Ok(Landing { slot, failed, count: self.buffers[slot].land() })
    }
}
