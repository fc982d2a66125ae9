//! A device that fails as disks do, by rules.
//!
//! It stands over another device, as a RAID does, in tests and in drills:
//! [`Faults`] holds the rules, which any thread changes while it works. It
//! never looks at a request's memory: what it does not stop, it hands on as
//! it is, and of a torn write it hands on the first ranges (MEM-1). What it
//! damages it damages on the medium, with memory of its own.
//!
//! FAULT-1: what is chosen depends on the seed and on the order in which the
//! requests reach the worker, and on nothing else.
//!
//! FAULT-2: a bit turns over between writes, never across one: nothing that
//! was written in the meantime is undone (the module `gate`).
//!
//! FAULT-3: nothing here blocks the worker or needs its ring.

mod gate;
mod rules;
mod text;
mod wakers;

use std::sync::{Arc, OnceLock};

use stableio_mem::{BLOCK, Pool};

use self::gate::Gate;
use self::rules::{Class, Flip, Verdict};
use crate::Outcome;
use crate::device::Device;
use crate::error::{Error, Kind, OpName};
use crate::exec::{self, Handle, Ticket};
use crate::limits::Limits;
use crate::request::{Body, Op, Reply, Request};

pub use rules::{EVERYWHERE, Fault, Faults, Hits, How, Ops, Rule, RuleId};
pub use text::ParseFaultError;

/// Bytes for the blocks in which bits turn over: of so many at once.
const ASIDE: usize = 1 << 20;

/// A device that injects faults above another.
///
/// Over a device that wants sums of what is written (`Limits::pass`), as
/// arrays do, nothing is flipped or torn; all else works there, too.
pub struct FaultDevice {
    inner: Arc<Inner>,
    worker: Handle,
}

struct Inner {
    below: Arc<dyn Device>,
    faults: Arc<Faults>,
    gate: Arc<Gate>,
    /// Made at the first flip.
    aside: OnceLock<Arc<Pool>>,
}

impl FaultDevice {
    /// Puts `faults`, which are this device's alone, over `inner`. Its tasks
    /// run on `worker`, which may be the one of `inner`.
    pub fn new(inner: Arc<dyn Device>, faults: Arc<Faults>, worker: Handle) -> Self {
        let (gate, aside) = (Arc::default(), OnceLock::new());
        Self { inner: Arc::new(Inner { below: inner, faults, gate, aside }), worker }
    }

    /// The rules and their counters.
    pub fn faults(&self) -> &Arc<Faults> {
        &self.inner.faults
    }
}

impl Device for FaultDevice {
    fn limits(&self) -> &Limits {
        self.inner.below.limits()
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let inner = self.inner.clone();
        if !self.worker.is_here() {
            return self.worker.spawn(move || async move { inner.begin(request).await });
        }
        inner.begin(request)
    }
}

impl Inner {
    /// Decides on the worker's thread, before this returns (FAULT-1).
    fn begin(self: Arc<Self>, request: Request) -> Ticket<Outcome> {
        let (op, at, len) = request.op.range();
        let class = match op {
            OpName::Read => Class::Read,
            OpName::Write | OpName::WriteZeroes => Class::Write,
            OpName::Flush => Class::Flush,
            // A discard excludes a flip as a write does.
            OpName::Discard => {
                return exec::spawn_begun(async move { self.write(request, Verdict::Pass).await });
            }
            OpName::Open | OpName::Map => return self.below.submit(request),
        };
        let (limits, range) = (self.below.limits(), at..at + len);
        let raw = !limits.pass.guards;
        let verdict = self.faults.decide(class, &range, limits.logical, raw);
        match verdict {
            Verdict::Pass if class != Class::Write => self.below.submit(request),
            Verdict::Fail(errno) => {
                Ticket::ready(Err(error(Kind::System(errno), request.op.range())))
            }
            Verdict::Lost => Ticket::ready(Ok(Reply::Done)),
            verdict => exec::spawn_begun(async move { self.run(request, verdict).await }),
        }
    }

    async fn run(self: Arc<Self>, request: Request, mut verdict: Verdict) -> Outcome {
        if let Verdict::Stall(stalled) = verdict {
            stalled.wait().await;
            verdict = Verdict::Pass;
        }
        match request.op {
            Op::Write { .. } | Op::WriteZeroes { .. } => self.write(request, verdict).await,
            _ => {
                if let Verdict::Flip(flip) = verdict {
                    self.turn_over(flip).await;
                }
                self.below.submit(request).await
            }
        }
    }

    async fn write(&self, mut request: Request, verdict: Verdict) -> Outcome {
        let whole = request.op.range();
        if let Verdict::Torn { land, .. } = verdict {
            request.op = cut(request.op, land);
        }
        let (op, at, len) = request.op.range();
        let mut outcome = Ok(Reply::Done);
        if len > 0 || !matches!(verdict, Verdict::Torn { .. }) {
            let place = self.gate.enter(at..at + len, false).await;
            outcome = self.below.submit(request).await;
            drop(place);
        }
        if outcome.is_ok() && op != OpName::Discard {
            self.faults.heal(&(at..at + len));
        }
        match verdict {
            Verdict::Torn { silent: true, .. } => Ok(Reply::Done),
            Verdict::Torn { .. } => Err(error(Kind::System(libc::EIO), whole)),
            Verdict::Flip(flip) if outcome.is_ok() => {
                self.turn_over(flip).await;
                outcome
            }
            _ => outcome,
        }
    }

    /// Turns a bit of the medium over. Where the device below fails it stays.
    async fn turn_over(&self, Flip { at, mask }: Flip) {
        let logical = self.below.limits().logical as usize;
        let block = at / logical as u64 * logical as u64;
        let Some(aside) = self.aside() else { return };
        // Memory first: whoever has some waits only for what came before.
        let Ok(mut memory) = aside.reserve(2 * logical.next_multiple_of(BLOCK)).await else {
            return;
        };
        let _place = self.gate.enter(block..block + logical as u64, true).await;
        let read = Request::read_owned(block, logical).with_memory(memory.split(logical));
        let Ok(Reply::Data(data)) = self.below.submit(read).await else { return };
        let mut copy = memory.take(logical);
        let mut to = 0;
        for piece in data.pieces() {
            copy.copy_from(to, piece);
            to += piece.len();
        }
        let turned = (at - block) as usize;
        let byte = data.contiguous(turned, 1)[0] ^ mask;
        copy.copy_from(turned, &[byte]);
        let write = Request::write(block, Body::Stable(copy.freeze()), false);
        // Nobody asked for it, nobody hears of its failure.
        let _ = self.below.submit(write).await;
    }

    fn aside(&self) -> Option<&Arc<Pool>> {
        if self.aside.get().is_none() {
            let _ = self.aside.set(Pool::new(ASIDE).ok()?);
        }
        self.aside.get()
    }
}

/// The first `len` bytes of a write. The memory is not looked at: only the
/// address ranges are shortened.
fn cut(op: Op, len: u64) -> Op {
    let bytes = len as usize;
    match op {
        Op::Write { at, body, sums, fua } => {
            let body = match body {
                Body::Stable(buf) => Body::Stable(buf.slice(0..bytes)),
                Body::Promised(mut buf) => Body::Promised(buf.split_to(bytes)),
                Body::Foreign(mut buf) => Body::Foreign(buf.split_to(bytes)),
                Body::Segments(mut list) => {
                    list.truncate(bytes);
                    Body::Segments(list)
                }
            };
            Op::Write { at, body, sums, fua }
        }
        Op::WriteZeroes { at, fua, .. } => Op::WriteZeroes { at, len, fua },
        other => other,
    }
}

fn error(kind: Kind, (op, at, len): (OpName, u64, u64)) -> Error {
    Error { kind, op, device: "fault".into(), at, len }
}
