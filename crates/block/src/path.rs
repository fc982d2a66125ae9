//! The way of a request, stop by stop.
//!
//! | stage | what happens | where |
//! |---|---|---|
//! | [`Check`](Stage::Check) | range and alignment, once | here |
//! | [`Reserve`](Stage::Reserve) | payload, parity and scratch memory, together | here |
//! | [`Stabilize`](Stage::Stabilize) | copy, guards and parity in one pass | here |
//! | [`Token`](Stage::Token) | the rows are ours | array |
//! | [`Lack`](Stage::Lack) | what a partial row lacks is read and verified | array |
//! | [`Log`](Stage::Log) | old and new guards are noted | array |
//! | [`Members`](Stage::Members) | data, parity and tuples go to the members | array |
//! | [`Settle`](Stage::Settle) | failures are absorbed, rows released | array |
//!
//! PATH-1: foreign memory is stabilized once, here, above the first device
//! that samples more than once; what is stable is never copied again below.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use stableio_mem::{
    BLOCK, ForeignBuf, Grant, Pass, Pool, PoolTooSmall, Reservation, StableBuf, Sums, doors,
};

use crate::Outcome;
use crate::device::Device;
use crate::error::{Error, Kind, OpName};
use crate::exec::{Handle, Ticket};
use crate::issuer::Issuer;
use crate::limits::{Limits, Radius};
use crate::request::{Body, Into, Op, Reply, Request};

/// The stops of a request, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table above")]
pub enum Stage {
    Check,
    Reserve,
    Stabilize,
    Token,
    Lack,
    Log,
    Members,
    Settle,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Stage; 8] = [
        Stage::Check,
        Stage::Reserve,
        Stage::Stabilize,
        Stage::Token,
        Stage::Lack,
        Stage::Log,
        Stage::Members,
        Stage::Settle,
    ];
}

/// What a stack did, and where its requests are: for `status`.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Requests by the stage in which they wait now.
    waiting: [AtomicUsize; Stage::ALL.len()],
    /// Settled reads.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Settled writes.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Writes copied once, since their memory was foreign.
    pub stabilized: AtomicU64,
    /// Writes taken from foreign memory as it is, by a grant.
    pub promised: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
}

impl Traffic {
    /// Counts a request as waiting in `stage` until the guard is dropped.
    pub fn enter(self: &Arc<Self>, stage: Stage) -> InStage {
        self.waiting[stage as usize].fetch_add(1, Ordering::Relaxed);
        InStage { traffic: self.clone(), stage }
    }

    /// Requests so far, for whoever wants to know whether there are any.
    pub fn requests(&self) -> u64 {
        self.reads.load(Ordering::Relaxed) + self.writes.load(Ordering::Relaxed)
    }

    /// How many requests wait in `stage` now.
    pub fn waiting(&self, stage: Stage) -> usize {
        self.waiting[stage as usize].load(Ordering::Relaxed)
    }
}

/// A request's place on its way.
pub struct InStage {
    traffic: Arc<Traffic>,
    stage: Stage,
}

impl InStage {
    /// The request goes on to `stage`.
    pub fn advance(&mut self, stage: Stage) {
        debug_assert!(stage as usize > self.stage as usize, "{stage:?} after {:?}", self.stage);
        self.traffic.waiting[self.stage as usize].fetch_sub(1, Ordering::Relaxed);
        self.traffic.waiting[stage as usize].fetch_add(1, Ordering::Relaxed);
        self.stage = stage;
    }
}

impl Drop for InStage {
    fn drop(&mut self) {
        self.traffic.waiting[self.stage as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// A device with the memory and the trust that its requests get.
///
/// Cheap to clone; every export of a device has its own.
#[derive(Clone)]
pub struct Stack {
    device: Arc<dyn Device>,
    name: Arc<str>,
    pool: Arc<Pool>,
    worker: Handle,
    grant: Option<Grant>,
    issuer: Arc<Issuer>,
    eager: bool,
    traffic: Arc<Traffic>,
}

impl Stack {
    /// A stack whose foreign memory is not trusted.
    pub fn new(name: &str, device: Arc<dyn Device>, pool: Arc<Pool>, worker: Handle) -> Self {
        let issuer = Arc::new(Issuer::new(name));
        let (name, traffic) = (name.into(), Arc::default());
        Self { device, name, pool, worker, grant: None, issuer, eager: false, traffic }
    }

    /// The same stack for another source of requests, which is told apart.
    pub fn for_issuer(&self, issuer: Arc<Issuer>) -> Self {
        Self { issuer, ..self.clone() }
    }

    /// Reads everything privately first and copies it out: for a program that
    /// is known to change the buffers of its reads.
    pub fn with_eager_reads(mut self) -> Self {
        self.eager = true;
        self
    }

    /// Whose requests come through this stack.
    pub fn issuer(&self) -> &Arc<Issuer> {
        &self.issuer
    }

    /// Trusts all foreign memory that comes through this stack.
    pub fn with_grant(mut self, grant: Grant) -> Self {
        self.grant = Some(grant);
        self
    }

    /// With counters shared with the device.
    pub fn with_traffic(mut self, traffic: Arc<Traffic>) -> Self {
        self.traffic = traffic;
        self
    }

    /// The device's limits.
    pub fn limits(&self) -> &Limits {
        self.device.limits()
    }

    /// The counters.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// The worker whose tasks run the requests.
    pub fn worker(&self) -> &Handle {
        &self.worker
    }

    /// Reserves what a request of this shape needs, for a front end that
    /// wants to receive its payload into the same reservation.
    ///
    /// # Errors
    ///
    /// When the whole pool is too small for it.
    pub async fn reserve_write(&self, at: u64, len: usize) -> Result<Reservation, PoolTooSmall> {
        self.pool.reserve(Pass::payload_bytes(at, len) + self.beside_payload(at, len)).await
    }

    /// Takes the request over; the ticket gives its outcome.
    ///
    /// Foreign memory is sampled before this returns where no memory has to
    /// be waited for. A read into the pool is at most `max_transfer` long.
    pub fn submit(&self, request: Request) -> Ticket<Outcome> {
        let Request { op, memory, .. } = request;
        if let Err(error) = self.check(&op) {
            return self.fail(error);
        }
        self.count(&op);
        let foreign = matches!(&op, Op::Read { into: Into::Foreign(_), .. });
        let private = foreign && self.limits().pass.guards && self.issuer.begin_read();
        if !self.is_whole(&op) || private || (foreign && self.eager) {
            let stack = self.clone();
            return self.worker.spawn(move || async move { stack.in_pieces(op).await });
        }
        let need = self.need(&op);
        if memory.is_some() || need == 0 {
            return self.go(op, memory);
        }
        match self.pool.try_reserve(need) {
            Ok(Some(memory)) => self.go(op, Some(memory)),
            Ok(None) => {
                let stack = self.clone();
                self.worker.spawn(move || async move {
                    let place = stack.traffic.enter(Stage::Reserve);
                    let memory = stack.pool.reserve(need).await.expect("smaller than the pool");
                    drop(place);
                    stack.go(op, Some(memory)).await
                })
            }
            Err(error) => self.fail(self.error(&op, error.into())),
        }
    }

    /// Range and alignment, for every request, once.
    fn check(&self, op: &Op) -> Result<(), Error> {
        let limits = self.limits();
        let (_, at, len) = op.range();
        if at.checked_add(len).is_none_or(|end| end > limits.size) {
            return Err(self.error(op, Kind::OutOfRange { size: limits.size }));
        }
        let logical = u64::from(limits.logical);
        if !at.is_multiple_of(logical) || !len.is_multiple_of(logical) {
            return Err(self.error(op, Kind::Misaligned { logical: limits.logical }));
        }
        match op {
            Op::Read { into: Into::Pool(len), .. } if *len > limits.max_transfer as usize => {
                Err(self.error(op, Kind::Unsupported))
            }
            _ => Ok(()),
        }
    }

    /// Whether the device takes the request as one: not too long, reads in
    /// whole units and into memory that direct I/O takes.
    fn is_whole(&self, op: &Op) -> bool {
        let limits = self.limits();
        let (_, at, len) = op.range();
        let units = (at | len).is_multiple_of(self.unit());
        match op {
            Op::Read { into: Into::Foreign(buf), .. } => {
                units
                    && buf.is_aligned(limits.memory_align as usize)
                    && len <= u64::from(limits.max_transfer)
            }
            Op::Read { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => units,
            Op::Write { .. } => len <= u64::from(limits.max_transfer),
            Op::Flush | Op::Map { .. } => true,
        }
    }

    /// What the device reads, discards and zeroes in whole: protection
    /// intervals where it verifies.
    fn unit(&self) -> u64 {
        if self.limits().pass.guards { BLOCK as u64 } else { u64::from(self.limits().logical) }
    }

    /// Bytes of memory that a whole request needs, all at once.
    fn need(&self, op: &Op) -> usize {
        match op {
            Op::Read { into: Into::Pool(len), .. } => *len,
            Op::Write { at, body, .. } if self.passes_untouched(body) => {
                self.beside_payload(*at, body.len())
            }
            Op::Write { at, body, .. } => {
                Pass::payload_bytes(*at, body.len()) + self.beside_payload(*at, body.len())
            }
            _ => 0,
        }
    }

    fn beside_payload(&self, at: u64, len: usize) -> usize {
        let limits = self.limits();
        limits.pass.parity_bytes(at, len) + limits.scratch_bytes(at, len)
    }

    /// Whether the device samples once, so that any memory goes to it as it is.
    fn passes_untouched(&self, body: &Body) -> bool {
        let limits = self.limits();
        let align = limits.memory_align as usize;
        limits.write_radius == Radius::Nobody
            && match body {
                Body::Stable(b) => b.is_aligned(align),
                Body::Promised(b) => b.is_aligned(align),
                Body::Foreign(b) => b.is_aligned(align),
                Body::Segments(b) => b.is_aligned(align),
            }
    }

    /// Whether stable memory goes down as it is: congruent, and what reaches
    /// members (whole blocks, where sub-block ends are merged) aligned.
    fn fits(&self, buf: &StableBuf, at: u64) -> bool {
        let (align, len) = (self.limits().memory_align as usize, buf.len());
        let (start, end) = match self.limits().pass.guards {
            true => inner(at, len as u64, BLOCK as u64),
            false => (at, at + len as u64),
        };
        let end = end.min(at + len as u64).max(start);
        let whole = (start - at) as usize..(end - at) as usize;
        buf.is_congruent(at, BLOCK) && (whole.is_empty() || buf.slice(whole).is_aligned(align))
    }

    /// Stabilizes and submits a whole request.
    fn go(&self, op: Op, mut memory: Option<Reservation>) -> Ticket<Outcome> {
        let op = match op {
            Op::Write { at, body, fua, .. } => {
                let len = body.len() as u64;
                match self.stabilize(at, body, &mut memory) {
                    Ok((body, sums)) => Op::Write { at, body, sums: sums.map(Box::new), fua },
                    Err(kind) => {
                        let (op, device) = (OpName::Write, self.name.clone());
                        return self.fail(Error { kind, op, device, at, len });
                    }
                }
            }
            other => other,
        };
        self.device.submit(Request { op, memory, issuer: Some(self.issuer.clone()) })
    }

    /// The table of who may be hurt against who is trusted (PATH-1).
    fn stabilize(
        &self,
        at: u64,
        body: Body,
        memory: &mut Option<Reservation>,
    ) -> Result<(Body, Option<Sums>), Kind> {
        if self.passes_untouched(&body) {
            return Ok((body, None));
        }
        let limits = self.limits();
        let (pass, align) = (limits.pass, limits.memory_align as usize);
        let memory = memory.as_mut().expect("MEM-3: reserved in `submit`");
        let blocks = !pass.guards || (at | body.len() as u64).is_multiple_of(BLOCK as u64);
        let body = match (body, self.grant) {
            (Body::Foreign(buf), Some(grant)) => Body::Promised(doors::promise(buf, grant)),
            (body, _) => body,
        };
        match body {
            Body::Stable(buf) if self.fits(&buf, at) => {
                let sums = doors::sums_of_stable(&buf, at, pass, memory);
                Ok((Body::Stable(buf), Some(sums)))
            }
            Body::Stable(buf) => {
                let buf = copy_aligned(&buf, at, memory);
                let sums = doors::sums_of_stable(&buf, at, pass, memory);
                Ok((Body::Stable(buf), Some(sums)))
            }
            // Sub-block ends are merged with old data: that needs a copy.
            Body::Promised(buf) if buf.is_aligned(align) && blocks => {
                self.traffic.promised.fetch_add(1, Ordering::Relaxed);
                let sums = buf.sums(at, pass, memory)?;
                Ok((Body::Promised(buf), Some(sums)))
            }
            Body::Promised(buf) => self.copy(buf.into_foreign(), at, memory),
            Body::Foreign(buf) => self.copy(buf, at, memory),
            Body::Segments(list) => Ok((Body::Segments(list), None)),
        }
    }

    fn copy(
        &self,
        buf: ForeignBuf,
        at: u64,
        memory: &mut Reservation,
    ) -> Result<(Body, Option<Sums>), Kind> {
        self.traffic.stabilized.fetch_add(1, Ordering::Relaxed);
        let (copy, sums) = doors::stabilize(buf, at, self.limits().pass, memory)?;
        Ok((Body::Stable(copy), Some(sums)))
    }

    fn count(&self, op: &Op) {
        let add = |counter: &AtomicU64, by: u64| counter.fetch_add(by, Ordering::Relaxed);
        match op.range() {
            (OpName::Read, _, len) => {
                add(&self.traffic.reads, 1);
                add(&self.traffic.read_bytes, len);
            }
            (OpName::Write, _, len) => {
                add(&self.traffic.writes, 1);
                add(&self.traffic.written_bytes, len);
            }
            _ => {}
        }
    }

    fn fail(&self, error: Error) -> Ticket<Outcome> {
        self.traffic.failed.fetch_add(1, Ordering::Relaxed);
        Ticket::ready(Err(error))
    }

    fn error(&self, op: &Op, kind: Kind) -> Error {
        let (op, at, len) = op.range();
        Error { kind, op, device: self.name.clone(), at, len }
    }

    /// Requests that the device does not take as one.
    async fn in_pieces(&self, op: Op) -> Outcome {
        match op {
            Op::Read { at, into } => self.read_in_pieces(at, into).await,
            Op::Write { at, body, fua, .. } => self.write_in_pieces(at, body, fua).await,
            Op::Discard { at, len } => {
                let (start, end) = inner(at, len, self.unit());
                let op = Op::Discard { at: start, len: end - start };
                if start == end { Ok(Reply::Done) } else { self.go(op, None).await }
            }
            Op::WriteZeroes { at, len, fua } => self.zero_in_pieces(at, len, fua).await,
            Op::Flush | Op::Map { .. } => unreachable!("always whole"),
        }
    }

    async fn read_in_pieces(&self, mut at: u64, into: Into) -> Outcome {
        let mut buf = match into {
            Into::Foreign(buf) => buf,
            Into::Pool(len) => return self.read_around(at, len).await.map(Reply::Data),
            Into::Segments(_) => {
                unreachable!("from a device to its members, never through a stack")
            }
        };
        let mut pieces = Vec::new();
        while !buf.is_empty() {
            let piece = buf.split_to(self.piece(at, buf.len()));
            let (stack, start) = (self.clone(), at);
            at += piece.len() as u64;
            let op = Op::Read { at: start, into: Into::Foreign(piece) };
            let private = self.eager || self.issuer.reads_privately();
            pieces.push(if self.is_whole(&op) && !private {
                self.go(op, None)
            } else {
                self.worker.spawn(move || stack.read_aside(op))
            });
        }
        settle_all(pieces).await
    }

    /// Reads privately what can not be read in place, and copies it out.
    async fn read_aside(self, op: Op) -> Outcome {
        let Op::Read { at, into: Into::Foreign(buf) } = op else { unreachable!("a foreign read") };
        let data = self.read_around(at, buf.len()).await?;
        let copied = doors::copy_out(&data, &buf, 0);
        copied.map_err(|e| self.error(&Op::Read { at, into: Into::Pool(buf.len()) }, e.into()))?;
        Ok(Reply::Done)
    }

    /// Reads the whole units around a range into the pool; gives the range.
    async fn read_around(&self, at: u64, len: usize) -> Result<StableBuf, Error> {
        let start = at - at % self.unit();
        let end = (at + len as u64).next_multiple_of(self.unit());
        let op = Op::Read { at: start, into: Into::Pool((end - start) as usize) };
        let memory =
            self.pool.reserve(self.need(&op)).await.map_err(|e| self.error(&op, e.into()))?;
        match self.go(op, Some(memory)).await? {
            Reply::Data(data) => Ok(data.slice((at - start) as usize..(at - start) as usize + len)),
            _ => unreachable!("a read into the pool gives data"),
        }
    }

    async fn write_in_pieces(&self, mut at: u64, mut body: Body, fua: bool) -> Outcome {
        let mut pieces = Vec::new();
        while !body.is_empty() {
            let len = self.piece(at, body.len());
            match split_body(&mut body, len) {
                Ok(piece) => pieces.push(self.submit(Request::write(at, piece, fua))),
                Err(kind) => {
                    let (op, device) = (OpName::Write, self.name.clone());
                    pieces.push(self.fail(Error { kind, op, device, at, len: len as u64 }));
                    break;
                }
            }
            at += len as u64;
        }
        settle_all(pieces).await
    }

    /// The sub-block ends as writes of zeros, the whole blocks as such.
    async fn zero_in_pieces(&self, at: u64, len: u64, fua: bool) -> Outcome {
        let (start, end) = inner(at, len, self.unit());
        let mut pieces = Vec::new();
        let mut zero = |from: u64, to: u64| {
            if from < to {
                let zeros = StableBuf::from_owned(&ZEROS.0[..(to - from) as usize]);
                pieces.push(self.submit(Request::write(from, Body::Stable(zeros), fua)));
            }
        };
        if start >= end && at / BLOCK as u64 == (at + len - 1) / BLOCK as u64 {
            zero(at, at + len);
        } else {
            zero(at, start);
            zero(end, at + len);
        }
        if start < end {
            pieces.push(self.go(Op::WriteZeroes { at: start, len: end - start, fua }, None));
        }
        settle_all(pieces).await
    }

    /// Bytes of the piece that begins at `at`: pieces end at multiples of the
    /// largest transfer, so that they share no block.
    fn piece(&self, at: u64, len: usize) -> usize {
        let max = u64::from(self.limits().max_transfer);
        len.min((max - at % max) as usize)
    }
}

/// A block of zeros, aligned for direct I/O.
#[repr(align(4096))]
struct Zeros([u8; BLOCK]);
static ZEROS: Zeros = Zeros([0; BLOCK]);

/// The whole units inside a range; empty where the bounds meet.
fn inner(at: u64, len: u64, unit: u64) -> (u64, u64) {
    let start = at.next_multiple_of(unit);
    (start, ((at + len) / unit * unit).max(start))
}

/// A congruent, aligned copy of stable bytes.
fn copy_aligned(buf: &StableBuf, at: u64, memory: &mut Reservation) -> StableBuf {
    let lead = (at % BLOCK as u64) as usize;
    let mut copy = memory.take(lead + buf.len());
    copy.zero_outside(lead..lead + buf.len());
    let mut to = lead;
    for piece in buf.pieces() {
        copy.copy_from(to, piece);
        to += piece.len();
    }
    copy.freeze().slice(lead..to)
}

/// The first `len` bytes as a body of their own; no word of foreign memory is
/// torn by the cut (DOOR-2).
fn split_body(body: &mut Body, len: usize) -> Result<Body, Kind> {
    Ok(match body {
        Body::Stable(buf) => {
            let front = buf.slice(0..len);
            *buf = buf.slice(len..buf.len());
            Body::Stable(front)
        }
        Body::Promised(buf) => Body::Promised(buf.split_to(len)),
        Body::Foreign(buf) => Body::Foreign(doors::split_words(buf, len)?),
        Body::Segments(_) => unreachable!("from a device to its members, never through a stack"),
    })
}

/// Waits for all; the first error is the result.
async fn settle_all(tickets: Vec<Ticket<Outcome>>) -> Outcome {
    let mut result = Ok(Reply::Done);
    for ticket in tickets {
        let outcome = ticket.await;
        if result.is_ok() && outcome.is_err() {
            result = outcome;
        }
    }
    result
}
