//! A member in memory that takes its payload as late as it may.
//!
//! A write keeps the address ranges that it was given and loads them piece by
//! piece, one a step, while everybody else goes on (SIM-2). It reaches the
//! image when the last piece is taken, just before it completes. A read looks
//! at the image piece by piece, so it may see two versions of a block.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use stableio_block::exec::yield_now;
use stableio_block::{
    Cache, Device, Error, Extent, Handle, Into, Kind, Limits, Op, Outcome, Radius, Reply, Request,
    Ticket,
};
use stableio_mem::{BLOCK, Pass, Segment, SgList};

use crate::image::Image;
use crate::program;
use crate::random::Random;

/// Bytes of a piece, at least.
const PIECE: usize = 512;
/// Pieces of a request, at most: a long one has longer pieces.
const PIECES: usize = 64;
/// Steps that a request may idle before its first piece.
const IDLE: u64 = 12;

/// A simulated member.
pub struct SimMember {
    name: Arc<str>,
    limits: Limits,
    worker: Handle,
    disk: Arc<Mutex<Disk>>,
}

struct Disk {
    /// What a read sees.
    live: Image,
    /// What a flush covered.
    durable: Image,
    /// Blocks in which the two differ.
    dirty: BTreeSet<u64>,
    under_way: BTreeMap<u64, Taking>,
    next: u64,
    random: Random,
    broken: bool,
    unreadable: Vec<Range<u64>>,
}

/// A write that has not landed.
struct Taking {
    at: u64,
    list: SgList,
    taken: Vec<u8>,
}

impl SimMember {
    /// A member with this content, of `size` bytes, that wants memory aligned
    /// to `memory_align` bytes. All that it holds is durable.
    pub fn new(
        name: &str,
        image: Image,
        size: u64,
        memory_align: u32,
        random: Random,
        worker: Handle,
    ) -> Self {
        let limits = Limits {
            size,
            logical: 512,
            physical: BLOCK as u32,
            memory_align,
            max_transfer: 8 << 20,
            atomic: 512,
            cache: Cache::Volatile,
            write_radius: Radius::Nobody,
            read_radius: Radius::Nobody,
            pass: Pass::default(),
        };
        let disk = Disk {
            durable: image.clone(),
            live: image,
            dirty: BTreeSet::new(),
            under_way: BTreeMap::new(),
            next: 0,
            random,
            broken: false,
            unreadable: Vec::new(),
        };
        Self { name: name.into(), limits, worker, disk: Arc::new(Mutex::new(disk)) }
    }

    /// What it holds now.
    pub fn live(&self) -> Image {
        lock(&self.disk).live.clone()
    }

    /// What it would hold after a loss of power.
    pub fn durable(&self) -> Image {
        lock(&self.disk).durable.clone()
    }

    /// From now on every operation fails, those under way included; of their
    /// blocks some land.
    pub fn break_down(&self) {
        lock(&self.disk).broken = true;
    }

    /// Whether it broke down.
    pub fn is_broken(&self) -> bool {
        lock(&self.disk).broken
    }

    /// Reads that touch these bytes fail from now on, until they are written.
    pub fn make_unreadable(&self, bytes: Range<u64>) {
        lock(&self.disk).unreadable.push(bytes);
    }

    /// Silent corruption: turns one bit over.
    pub fn flip(&self, at: u64, bit: u8) {
        lock(&self.disk).live.flip(at, bit);
    }

    /// The process dies (SIM-4); gives what the member then holds. What was
    /// under way is torn: the kernel may or may not have begun a block.
    pub fn crash(&self) -> Image {
        let mut disk = lock(&self.disk);
        for (_, mut write) in std::mem::take(&mut disk.under_way) {
            write.take(usize::MAX);
            disk.land_torn(&write);
        }
        std::mem::take(&mut disk.live)
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
        let idle = lock(&self.disk).idle();
        let write = match request.op {
            Op::Write { at, body, .. } => {
                Work::Write(lock(&self.disk).begin(at, body.into_segments()))
            }
            Op::Read { at, into: Into::Segments(list) } => Work::Read(at, list),
            Op::Flush => Work::Flush(lock(&self.disk).begin_flush()),
            Op::Discard { at, len } => Work::Discard(at, len),
            Op::Map { len, .. } => Work::Map(len),
            _ => Work::Unsupported,
        };
        self.worker.spawn(move || async move {
            for _ in 0..idle {
                yield_now().await;
            }
            let done = match write {
                Work::Write(number) => {
                    while !lock(&disk).take_piece(number) {
                        yield_now().await;
                    }
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
                Work::Flush(blocks) => lock(&disk).finish_flush(blocks),
                Work::Discard(at, len) => lock(&disk).discard(at, len),
                Work::Map(len) => Ok(Reply::Map(vec![Extent { len, data: true }])),
                Work::Unsupported => Err(Kind::Unsupported),
            };
            done.map_err(|kind| Error { kind, op: name, device, at, len })
        })
    }
}

enum Work {
    Write(u64),
    Read(u64, SgList),
    Flush(Image),
    Discard(u64, u64),
    Map(u64),
    Unsupported,
}

impl Disk {
    fn idle(&mut self) -> u64 {
        self.random.below(IDLE)
    }

    fn alive(&self) -> Result<Reply, Kind> {
        if self.broken { Err(Kind::System(libc::EIO)) } else { Ok(Reply::Done) }
    }

    fn begin(&mut self, at: u64, list: SgList) -> u64 {
        assert!((at as usize | list.len()).is_multiple_of(BLOCK), "an array writes whole blocks");
        self.next += 1;
        self.under_way.insert(self.next, Taking { at, list, taken: Vec::new() });
        self.next
    }

    /// Takes the next piece; says whether that was the last.
    fn take_piece(&mut self, number: u64) -> bool {
        let Some(write) = self.under_way.get_mut(&number) else { return true };
        write.take(piece_len(write.list.len()));
        write.taken.len() == write.list.len()
    }

    fn land(&mut self, number: u64) -> Result<Reply, Kind> {
        let write = self.under_way.remove(&number).ok_or(Kind::Stopped)?;
        if self.broken {
            self.land_torn(&write);
        } else {
            (0..write.taken.len() / BLOCK).for_each(|i| self.land_block(&write, i));
        }
        self.alive()
    }

    fn land_torn(&mut self, write: &Taking) {
        for i in 0..write.taken.len() / BLOCK {
            if self.random.one_in(2) {
                self.land_block(write, i);
            }
        }
    }

    fn land_block(&mut self, write: &Taking, i: usize) {
        let at = write.at + (i * BLOCK) as u64;
        let number = at / BLOCK as u64;
        self.live.set_block(number, &write.taken[i * BLOCK..(i + 1) * BLOCK]);
        self.dirty.insert(number);
        self.unreadable.retain(|bad| bad.end <= at || at + BLOCK as u64 <= bad.start);
    }

    fn deliver(&self, at: u64, list: &SgList, piece: Range<usize>) {
        let mut bytes = vec![0; piece.len()];
        self.live.read(at + piece.start as u64, &mut bytes);
        let mut rest = &bytes[..];
        for segment in clip(list.segments(), piece) {
            let (now, later) = rest.split_at(segment.len);
            program::store(segment.addr, now);
            rest = later;
        }
    }

    fn check_read(&self, bytes: Range<u64>) -> Result<Reply, Kind> {
        if self.unreadable.iter().any(|bad| bad.start < bytes.end && bytes.start < bad.end) {
            return Err(Kind::System(libc::EIO));
        }
        self.alive()
    }

    /// A flush covers what had landed when it began, as it was then.
    fn begin_flush(&mut self) -> Image {
        let mut covered = Image::default();
        for number in &self.dirty {
            covered.set_block(*number, self.live.block(*number));
        }
        covered
    }

    fn finish_flush(&mut self, covered: Image) -> Result<Reply, Kind> {
        self.alive()?;
        for number in covered.written() {
            self.durable.set_block(number, covered.block(number));
            if self.durable.block(number) == self.live.block(number) {
                self.dirty.remove(&number);
            }
        }
        Ok(Reply::Done)
    }

    /// A block that nobody needs reads as zeros afterwards, or as before.
    fn discard(&mut self, at: u64, len: u64) -> Result<Reply, Kind> {
        for number in at / BLOCK as u64..(at + len) / BLOCK as u64 {
            if self.random.one_in(2) {
                self.live.set_block(number, &[0; BLOCK]);
                self.dirty.insert(number);
            }
        }
        self.alive()
    }
}

impl Taking {
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
