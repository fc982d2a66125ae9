//! A member in memory that takes its payload as late as it may.
//!
//! A write keeps the address ranges that it was given and loads them piece by
//! piece, one a step, while everybody else goes on (SIM-2). It reaches the
//! medium's cache when the last piece is taken, just before it completes. A
//! read looks at the medium piece by piece, so it may see two versions of a
//! block.
//!
//! What a member does wrong, it is told to: see [`SimMember::stall`],
//! [`fail_reads`](SimMember::fail_reads), [`fail_a_write`](SimMember::fail_a_write),
//! [`break_down`](SimMember::break_down), [`flip`](SimMember::flip),
//! [`make_unreadable`](SimMember::make_unreadable).

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use stableio_block::exec::yield_now;
use stableio_block::{
    Cache, Device, Error, Extent, Handle, Into, Kind, Limits, Op, Outcome, Radius, Reply, Request,
    Ticket,
};
use stableio_mem::{BLOCK, Pass, Segment, SgList};

use crate::image::{Block, Image, block_of, blocks_of, zeros};
use crate::medium::Medium;
use crate::program;
use crate::random::Random;

const BLOCK64: u64 = BLOCK as u64;
/// Bytes of a piece, at least.
const PIECE: usize = 512;
/// Pieces of a request, at most: a long one has longer pieces.
const PIECES: usize = 64;
/// Steps that a request may idle before its first piece.
const IDLE: u64 = 12;
/// One of so many requests is slow, and may idle for this long.
const SLOW: (u64, u64) = (300, 2_000);

/// A simulated member.
pub struct SimMember {
    name: Arc<str>,
    limits: Limits,
    worker: Handle,
    disk: Arc<Mutex<Disk>>,
}

/// What members demand of memory, and keep whole when power is lost.
#[derive(Debug, Clone, Copy)]
pub struct Build {
    /// Bytes.
    pub size: u64,
    /// Bytes that they want memory aligned to.
    pub memory_align: u32,
    /// Bytes of the power-fail atomic unit.
    pub atomic: u32,
    /// Where settled writes are until a flush.
    pub cache: Cache,
    /// Whether a flush, or FUA, does what it says: for a twin.
    pub flushes: bool,
}

/// What a crash found and left on a member.
pub struct Wreck {
    /// What it holds.
    pub medium: Medium,
    /// Byte ranges of the writes that were under way.
    pub under_way: Vec<Range<u64>>,
    /// Numbers of the blocks that are neither old nor new.
    pub torn: Vec<u64>,
}

struct Disk {
    medium: Medium,
    under_way: BTreeMap<u64, Taking>,
    /// Whether a write is durable when it settles.
    write_through: bool,
    flushes: bool,
    next: u64,
    random: Random,
    broken: bool,
    stalled: bool,
    /// Who waits for the stall to end.
    waiting: Vec<Waker>,
    /// So many reads fail.
    failing_reads: u32,
    /// The next write fails.
    failing_write: bool,
    /// One did.
    failed_write: bool,
}

/// A write that has not landed.
struct Taking {
    at: u64,
    list: SgList,
    taken: Vec<u8>,
    fua: bool,
}

impl SimMember {
    /// A member with this content.
    pub fn new(name: &str, medium: Medium, build: Build, random: Random, worker: Handle) -> Self {
        let limits = Limits {
            size: build.size,
            logical: 512,
            physical: BLOCK as u32,
            memory_align: build.memory_align,
            max_transfer: 8 << 20,
            atomic: build.atomic,
            cache: build.cache,
            write_radius: Radius::Nobody,
            read_radius: Radius::Nobody,
            pass: Pass::default(),
        };
        let disk = Disk {
            medium,
            under_way: BTreeMap::new(),
            write_through: build.cache == Cache::WriteThrough,
            flushes: build.flushes,
            next: 0,
            random,
            broken: false,
            stalled: false,
            waiting: Vec::new(),
            failing_reads: 0,
            failing_write: false,
            failed_write: false,
        };
        Self { name: name.into(), limits, worker, disk: Arc::new(Mutex::new(disk)) }
    }

    /// How it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it holds now.
    pub fn live(&self) -> Image {
        lock(&self.disk).medium.live().clone()
    }

    /// What was flushed.
    pub fn durable(&self) -> Image {
        lock(&self.disk).medium.durable()
    }

    /// From now on every operation fails, those under way included; of their
    /// blocks some land.
    pub fn break_down(&self) {
        lock(&self.disk).broken = true;
        self.resume();
    }

    /// Whether it broke down.
    pub fn is_broken(&self) -> bool {
        lock(&self.disk).broken
    }

    /// Whether it broke down, or failed a write.
    pub fn has_failed(&self) -> bool {
        let disk = lock(&self.disk);
        disk.broken || disk.failed_write
    }

    /// Whether nothing is wrong with it, or about to be.
    pub fn is_sound(&self) -> bool {
        let disk = lock(&self.disk);
        let fails = disk.broken || disk.failing_write || disk.failed_write;
        !fails && !disk.stalled && disk.failing_reads == 0
    }

    /// No operation goes on from now on, until [`resume`](Self::resume) or
    /// [`break_down`](Self::break_down).
    pub fn stall(&self) {
        lock(&self.disk).stalled = true;
    }

    /// Goes on.
    pub fn resume(&self) {
        let waiting = {
            let mut disk = lock(&self.disk);
            disk.stalled = false;
            std::mem::take(&mut disk.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// So many reads fail; later ones give what is there.
    pub fn fail_reads(&self, count: u32) {
        lock(&self.disk).failing_reads += count;
    }

    /// The next write fails, after which it is as good as ever: who believes
    /// it again reads something old.
    pub fn fail_a_write(&self) {
        lock(&self.disk).failing_write = true;
    }

    /// Reads that touch these bytes fail from now on, until they are written.
    pub fn make_unreadable(&self, bytes: Range<u64>) {
        lock(&self.disk).medium.make_unreadable(bytes);
    }

    /// Silent corruption: turns one bit over.
    pub fn flip(&self, at: u64, bit: u8) {
        lock(&self.disk).medium.flip(at, bit);
    }

    /// Silent corruption: the block at `at` becomes zeros.
    pub fn blank(&self, at: u64) {
        lock(&self.disk).medium.blank(at);
    }

    /// The process dies (SIM-4). What was under way is in or not, block by
    /// block: the kernel may or may not have begun it.
    pub fn crash(&self) -> Wreck {
        let mut disk = lock(&self.disk);
        let writes = disk.stop();
        for write in &writes {
            disk.land_torn(write);
        }
        disk.wreck(&writes, Vec::new())
    }

    /// Power is lost (SIM-5).
    pub fn lose_power(&self) -> Wreck {
        let mut disk = lock(&self.disk);
        let writes = disk.stop();
        let mut blocks: BTreeMap<u64, Vec<Block>> = BTreeMap::new();
        for write in &writes {
            for (number, block) in write.blocks() {
                blocks.entry(number).or_default().push(block);
            }
        }
        let Disk { medium, random, .. } = &mut *disk;
        let torn = medium.lose_power(blocks, self.limits.atomic as usize, random);
        disk.wreck(&writes, torn.into_iter().collect())
    }
}

impl Device for SimMember {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let (name, at, len) = request.op.range();
        let device = self.name.clone();
        let disk = self.disk.clone();
        let (work, idle) = {
            let mut disk = lock(&self.disk);
            (disk.begin(request.op), disk.idle())
        };
        self.worker.spawn(move || async move {
            for _ in 0..idle {
                yield_now().await;
            }
            while_stalled(&disk).await;
            let done = match work {
                Work::Write(number) => {
                    while !lock(&disk).take_piece(number) {
                        yield_now().await;
                    }
                    while_stalled(&disk).await;
                    lock(&disk).land(number)
                }
                Work::Read(at, list) => {
                    let mut done = 0;
                    for piece in pieces(list.len()) {
                        lock(&disk).deliver(at, &list, piece.clone());
                        done = piece.end;
                        yield_now().await;
                    }
                    lock(&disk).check_read(at..at + done as u64)
                }
                Work::Flush(covers) => lock(&disk).finish_flush(covers),
                Work::Zeros { at, len, fua } => lock(&disk).zero(at, len, fua),
                Work::Discard(at, len) => lock(&disk).discard(at, len),
                Work::Map(len) => Ok(Reply::Map(vec![Extent { len, data: true }])),
                Work::Unsupported => Err(Kind::Unsupported),
            };
            done.map_err(|kind| Error { kind, op: name, device, at, len })
        })
    }
}

async fn while_stalled(disk: &Mutex<Disk>) {
    poll_fn(|cx| {
        let mut disk = lock(disk);
        if !disk.stalled {
            return Poll::Ready(());
        }
        disk.waiting.push(cx.waker().clone());
        Poll::Pending
    })
    .await;
}

enum Work {
    Write(u64),
    Read(u64, SgList),
    Flush(u64),
    Zeros { at: u64, len: u64, fua: bool },
    Discard(u64, u64),
    Map(u64),
    Unsupported,
}

impl Disk {
    fn begin(&mut self, op: Op) -> Work {
        match op {
            Op::Write { at, body, fua, .. } => {
                let list = body.into_segments();
                let whole = (at as usize | list.len()).is_multiple_of(BLOCK);
                assert!(whole, "an array writes whole blocks");
                self.next += 1;
                self.under_way.insert(self.next, Taking { at, list, taken: Vec::new(), fua });
                Work::Write(self.next)
            }
            Op::Read { at, into: Into::Segments(list) } => Work::Read(at, list),
            Op::Flush => Work::Flush(self.medium.begin_flush()),
            Op::WriteZeroes { at, len, fua } => Work::Zeros { at, len, fua },
            Op::Discard { at, len } => Work::Discard(at, len),
            Op::Map { len, .. } => Work::Map(len),
            Op::Read { .. } => Work::Unsupported,
        }
    }

    fn is_durable(&self, fua: bool) -> bool {
        self.write_through || fua && self.flushes
    }

    fn idle(&mut self) -> u64 {
        let (one_in, most) = SLOW;
        let most = if self.random.one_in(one_in) { most } else { IDLE };
        self.random.below(most)
    }

    fn alive(&self) -> Result<Reply, Kind> {
        if self.broken { Err(Kind::System(libc::EIO)) } else { Ok(Reply::Done) }
    }

    /// Takes the next piece; says whether that was the last.
    fn take_piece(&mut self, number: u64) -> bool {
        let Some(write) = self.under_way.get_mut(&number) else { return true };
        write.take(piece_len(write.list.len()));
        write.taken.len() == write.list.len()
    }

    fn land(&mut self, number: u64) -> Result<Reply, Kind> {
        let write = self.under_way.remove(&number).ok_or(Kind::Stopped)?;
        let fails = std::mem::take(&mut self.failing_write);
        self.failed_write |= fails;
        if self.broken || fails {
            self.land_torn(&write);
            return Err(Kind::System(libc::EIO));
        }
        for (number, block) in write.blocks() {
            self.medium.land(number, block, self.is_durable(write.fua));
        }
        Ok(Reply::Done)
    }

    fn land_torn(&mut self, write: &Taking) {
        for (number, block) in write.blocks() {
            if self.random.one_in(2) {
                self.medium.land(number, block, self.is_durable(false));
            }
        }
    }

    /// Writes that were under way, with all of their payload.
    fn stop(&mut self) -> Vec<Taking> {
        let mut writes: Vec<_> = std::mem::take(&mut self.under_way).into_values().collect();
        writes.iter_mut().for_each(|write| write.take(usize::MAX));
        writes
    }

    fn wreck(&mut self, writes: &[Taking], torn: Vec<u64>) -> Wreck {
        let range = |write: &Taking| write.at..write.at + write.taken.len() as u64;
        let under_way = writes.iter().map(range).collect();
        Wreck { medium: std::mem::take(&mut self.medium), under_way, torn }
    }

    fn deliver(&self, at: u64, list: &SgList, piece: Range<usize>) {
        let image = self.medium.live();
        let mut at = at + piece.start as u64;
        for segment in clip(list.segments(), piece) {
            for (number, range, done) in blocks_of(at, segment.len) {
                program::store(segment.addr + done, &image.block(number)[range]);
            }
            at += segment.len as u64;
        }
    }

    fn check_read(&mut self, bytes: Range<u64>) -> Result<Reply, Kind> {
        let transient = self.failing_reads > 0;
        self.failing_reads -= u32::from(transient);
        if transient || !self.medium.is_readable(&bytes) {
            return Err(Kind::System(libc::EIO));
        }
        self.alive()
    }

    fn finish_flush(&mut self, covers: u64) -> Result<Reply, Kind> {
        self.alive()?;
        if self.flushes {
            self.medium.finish_flush(covers);
        }
        Ok(Reply::Done)
    }

    fn zero(&mut self, at: u64, len: u64, fua: bool) -> Result<Reply, Kind> {
        self.alive()?;
        for number in at / BLOCK64..(at + len) / BLOCK64 {
            self.medium.land(number, zeros(), self.is_durable(fua));
        }
        Ok(Reply::Done)
    }

    /// A block that nobody needs reads as zeros afterwards, or as before.
    fn discard(&mut self, at: u64, len: u64) -> Result<Reply, Kind> {
        for number in at / BLOCK64..(at + len) / BLOCK64 {
            if self.random.one_in(2) {
                self.medium.land(number, zeros(), self.is_durable(false));
            }
        }
        self.alive()
    }
}

impl Taking {
    /// The blocks of what was taken, by number.
    fn blocks(&self) -> impl Iterator<Item = (u64, Block)> + '_ {
        let first = self.at / BLOCK64;
        let blocks = self.taken.chunks_exact(BLOCK).enumerate();
        blocks.map(move |(i, bytes)| (first + i as u64, block_of(bytes)))
    }

    /// Loads up to `len` more bytes of the payload, now.
    fn take(&mut self, len: usize) {
        let from = self.taken.len();
        let to = self.list.len().min(from.saturating_add(len));
        for segment in clip(self.list.segments(), from..to) {
            let start = self.taken.len();
            self.taken.resize(start + segment.len, 0);
            program::load(segment.addr, &mut self.taken[start..]);
        }
    }
}

fn piece_len(len: usize) -> usize {
    PIECE.max((len / PIECES).next_multiple_of(PIECE))
}

fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    let piece = piece_len(len);
    (0..len).step_by(piece).map(move |from| from..len.min(from + piece))
}

/// The parts of `segments` that lie in `range` of their sum.
fn clip(segments: &[Segment], range: Range<usize>) -> impl Iterator<Item = Segment> {
    let mut at = 0;
    segments.iter().filter_map(move |segment| {
        let (from, to) = (at.max(range.start), (at + segment.len).min(range.end));
        let addr = segment.addr + from.saturating_sub(at);
        at += segment.len;
        (from < to).then(|| Segment { addr, len: to - from })
    })
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    // One thread; a panic while it was held has already failed the test.
    disk.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
