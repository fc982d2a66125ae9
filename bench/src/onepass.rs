//! The kernels of `onepass` beside what people call for the same work: `memcpy`, `crc-fast` and
//! ISA-L. One thread; no devices, no requests.
//!
//! ISA-L is loaded when the family starts (Debian: `libisal2`); rows that need it say so where it
//! is not there.

use std::cell::RefCell;
use std::ffi::{CStr, c_int, c_void};
use std::hint::black_box;

use crc_fast::CrcAlgorithm;
use stableio_onepass::{
    Column, Format, Guard, Interval, Kernels, Pass, RowParity, Segment, Tier, row_with, tier,
};

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare_in};

pub(crate) const NAME: &str = "onepass";
pub(crate) const ABOUT: &str = "copies, guards and parity in one pass, against a call for each";

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Samples of each side: short ones, and many.
pub(crate) const ROUNDS: usize = 31;
/// Data columns of the rows with parity, and their chunk.
const COLUMNS: usize = 4;
const CHUNK: usize = 64 * KIB;

/// Work that both sides do, each in its way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Work {
    /// Our guards of a copy that is made on the way; the peer copies not at all.
    Crc64CopyOverCrc64,
    /// The peer copies and then computes.
    Crc64Copy,
    /// The peer only copies.
    Crc64CopyOverMemcpy,
    /// The peer's kernel copies on the way.
    Crc16Copy,
    /// Guards of four columns and of P, and the copies of the columns.
    RowP,
    /// And of Q.
    RowPq,
    /// P and Q of four stable columns, without guards.
    Pq,
}

/// A row: its name, the work, the bytes of a call, the target.
type Try = (&'static str, Work, usize, Option<f64>);

const TRIES: [Try; 17] = [
    ("copy-crc64-4k", Work::Crc64CopyOverCrc64, 4 * KIB, Some(0.95)),
    ("copy-crc64-64k", Work::Crc64CopyOverCrc64, 64 * KIB, Some(0.95)),
    ("copy-crc64-1m", Work::Crc64CopyOverCrc64, MIB, None),
    ("copy-crc16-4k", Work::Crc16Copy, 4 * KIB, Some(3.5)),
    ("copy-crc16-64k", Work::Crc16Copy, 64 * KIB, None),
    ("copy-crc64-256m", Work::Crc64CopyOverMemcpy, 256 * MIB, Some(0.85)),
    ("copy-crc64-4k-memcpy", Work::Crc64CopyOverMemcpy, 4 * KIB, None),
    ("copy-crc64-64k-memcpy", Work::Crc64CopyOverMemcpy, 64 * KIB, None),
    ("copy-crc64-1m-memcpy", Work::Crc64CopyOverMemcpy, MIB, None),
    ("copy-guards-p-4+1", Work::RowP, COLUMNS * CHUNK, Some(1.8)),
    ("copy-guards-pq-4+2", Work::RowPq, COLUMNS * CHUNK, Some(1.6)),
    ("pq-4k", Work::Pq, COLUMNS * 4 * KIB, None),
    ("pq-64k", Work::Pq, COLUMNS * CHUNK, Some(1.0)),
    ("copy-crc64-4k-two-calls", Work::Crc64Copy, 4 * KIB, None),
    ("copy-crc64-4k-avx2", Work::Crc64Copy, 4 * KIB, Some(1.0)),
    ("copy-crc64-64k-avx2", Work::Crc64Copy, 64 * KIB, None),
    ("copy-crc64-4k-portable", Work::Crc64Copy, 4 * KIB, None),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let isal = Isal::load();
    let mut rows = Vec::new();
    for (name, work, bytes, target) in TRIES {
        if !plan.wants(name) {
            continue;
        }
        let case = Case { family: NAME, name, unit: Unit::GbPerS, target };
        let memory = RefCell::new(Memory::new(bytes));
        let mut ours =
            plan.ours(|| Ok(kernels_for(name)))?.and_then(|kernels| Ok(Caller::Ours(kernels?)));
        let needs_isal = matches!(work, Work::Crc16Copy | Work::RowP | Work::RowPq | Work::Pq);
        let mut peer = plan.peer(()).and_then(|()| match &isal {
            Ok(isal) => Ok(Caller::Peer(Some(isal))),
            Err(why) if needs_isal => Err(why.clone()),
            Err(_) => Ok(Caller::Peer(None)),
        });
        let sample = |caller: &mut Caller<'_>| {
            let mut memory = memory.borrow_mut();
            Ok(sample(plan, bytes, || caller.call(work, &mut memory)))
        };
        rows.push(compare_in(ROUNDS, case, &mut ours, &mut peer, peer_name(work), sample));
    }
    Ok(rows)
}

fn peer_name(work: Work) -> &'static str {
    match work {
        Work::Crc64CopyOverCrc64 => "crc-fast, no copy",
        Work::Crc64Copy => "memcpy, then crc-fast",
        Work::Crc64CopyOverMemcpy => "memcpy",
        Work::Crc16Copy => "ISA-L crc16_t10dif_copy",
        Work::RowP => "memcpy, crc-fast, ISA-L xor_gen",
        Work::RowPq => "memcpy, crc-fast, ISA-L pq_gen",
        Work::Pq => "ISA-L pq_gen",
    }
}

/// The tier that a row is about: the one in use, if its name does not end in another.
fn kernels_for(name: &str) -> Side<&'static Kernels> {
    let asked = match name.rsplit('-').next() {
        Some("avx2") => Tier::Avx2Vpclmul,
        Some("portable") => Tier::Portable,
        _ => tier(),
    };
    Kernels::of(asked).ok_or_else(|| format!("this machine has no {}", asked.name()))
}

/// GB/s of data, by the processor time of this thread: other programs disturb less.
pub(crate) fn sample(plan: &Plan, bytes: usize, mut call: impl FnMut()) -> f64 {
    let enough = plan.sample.as_nanos() as f64 / ROUNDS as f64;
    let round = (MIB / bytes).max(1);
    // What the other side left in the caches is not ours.
    call();
    let (start, mut calls, mut taken) = (cpu_ns(), 0, 0.0);
    while taken < enough {
        (0..round).for_each(|_| call());
        calls += round;
        taken = cpu_ns() - start;
    }
    (calls * bytes) as f64 / taken
}

/// The processor time of this thread so far.
fn cpu_ns() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `now`.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(done, 0);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// What the calls work on.
struct Memory {
    src: Aligned,
    dst: Aligned,
    p: Aligned,
    q: Aligned,
    guards: Vec<u64>,
    parity_guards: [Vec<u64>; 2],
}

impl Memory {
    fn new(bytes: usize) -> Memory {
        let guards = bytes / Interval::B512.bytes();
        Memory {
            src: Aligned::new(bytes),
            dst: Aligned::new(bytes),
            p: Aligned::new(bytes / COLUMNS),
            q: Aligned::new(bytes / COLUMNS),
            guards: vec![0; guards],
            parity_guards: [vec![0; guards], vec![0; guards]],
        }
    }
}

/// Bytes on a page boundary, as pools give them.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// With the same content each time, wherever the allocator puts it.
    fn new(len: usize) -> Aligned {
        let bytes = vec![0; len + 4096];
        let mut new = Aligned { start: bytes.as_ptr().align_offset(4096), bytes, len };
        new.get().iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 + (i >> 12)) as u8);
        new
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Who does the work.
enum Caller<'a> {
    Ours(&'static Kernels),
    Peer(Option<&'a Isal>),
}

impl Caller<'_> {
    fn call(&self, work: Work, memory: &mut Memory) {
        match self {
            Caller::Ours(kernels) => ours(kernels, work, memory),
            Caller::Peer(isal) => peer(*isal, work, memory),
        }
        black_box(&memory.guards);
    }
}

fn ours(kernels: &Kernels, work: Work, memory: &mut Memory) {
    let Memory { src, dst, p, q, guards, parity_guards: [p_guards, q_guards] } = memory;
    let (src, dst, p, q) = (src.get(), dst.get(), p.get(), q.get());
    match work {
        Work::RowP | Work::RowPq => {
            let chunk = src.len() / COLUMNS;
            let intervals = Format::NATIVE.guards_of(chunk);
            let sources: Vec<_> = src
                .chunks(chunk)
                .map(|column| [Segment { addr: column.as_ptr(), len: chunk }])
                .collect();
            let places = dst.chunks_mut(chunk).zip(guards.chunks_mut(intervals));
            let mut columns: Vec<_> = sources
                .iter()
                .zip(places)
                .map(|(src, (dst, guards))| Column::foreign(src, dst.as_mut_ptr(), guards))
                .collect();
            let p = RowParity { to: p.as_mut_ptr(), guards: &mut p_guards[..intervals] };
            let q = RowParity { to: q.as_mut_ptr(), guards: &mut q_guards[..intervals] };
            let q = (work == Work::RowPq).then_some(q);
            // SAFETY: all have the length of a chunk; nothing overlaps.
            unsafe { row_with(kernels, Format::NATIVE, &mut columns, Some(p), q) }
                .expect("memory is there");
        }
        Work::Pq => {
            let columns: [&[u8]; COLUMNS] =
                std::array::from_fn(|k| &src[k * p.len()..(k + 1) * p.len()]);
            (kernels.parities)(&columns, p, q);
        }
        _ => {
            let guard = if work == Work::Crc16Copy { Guard::Crc16T10Dif } else { Guard::Crc64Nvme };
            let format = Format { guard, interval: Interval::B4096 };
            let segment = Segment { addr: src.as_ptr(), len: src.len() };
            let streams = src.len() >= 64 * MIB;
            let pass = Pass { streams, ..Pass::copy(format, dst.as_mut_ptr()) };
            let guards = &mut guards[..format.guards_of(src.len())];
            // SAFETY: both have this length; nothing overlaps.
            unsafe { pass.foreign_with(kernels, &[segment], guards) }.expect("memory is there");
        }
    }
}

fn peer(isal: Option<&Isal>, work: Work, memory: &mut Memory) {
    let Memory { src, dst, p, q, guards, parity_guards: [p_guards, q_guards] } = memory;
    let (src, dst, p, q) = (src.get(), dst.get(), p.get(), q.get());
    let sum = |bytes: &[u8], guards: &mut [u64]| {
        for (bytes, guard) in bytes.chunks(4096).zip(guards) {
            *guard = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes);
        }
    };
    match work {
        Work::Crc64CopyOverCrc64 => sum(src, guards),
        Work::Crc64Copy => {
            dst.copy_from_slice(src);
            sum(dst, guards);
        }
        Work::Crc64CopyOverMemcpy => dst.copy_from_slice(src),
        Work::Crc16Copy => {
            let isal = isal.expect("needed");
            for ((src, dst), guard) in src.chunks(4096).zip(dst.chunks_mut(4096)).zip(guards) {
                // SAFETY: both have this length.
                let crc = unsafe {
                    (isal.crc16_t10dif_copy)(0, dst.as_mut_ptr(), src.as_ptr(), src.len() as u64)
                };
                *guard = u64::from(crc);
            }
        }
        Work::RowP | Work::RowPq => {
            // Chunk by chunk, so that each is summed while it is in a cache.
            let isal = isal.expect("needed");
            let chunk = src.len() / COLUMNS;
            let columns = src.chunks(chunk).zip(dst.chunks_mut(chunk));
            for ((src, dst), guards) in columns.zip(guards.chunks_mut(chunk / 4096)) {
                dst.copy_from_slice(src);
                sum(dst, guards);
            }
            if work == Work::RowP {
                isal.xor(dst, p);
            } else {
                isal.pq(dst, p, q);
                sum(q, q_guards);
            }
            sum(p, p_guards);
        }
        Work::Pq => isal.expect("needed").pq(src, p, q),
    }
}

/// The functions of ISA-L that are peers.
struct Isal {
    crc16_t10dif_copy: unsafe extern "C" fn(u16, *mut u8, *const u8, u64) -> u16,
    xor_gen: Generate,
    pq_gen: Generate,
}

/// Of `vectors` arrays of `len` bytes, the last ones are the parities.
type Generate = unsafe extern "C" fn(vectors: c_int, len: c_int, arrays: *mut *mut c_void) -> c_int;

impl Isal {
    fn load() -> Side<Isal> {
        // SAFETY: its initialisation only asks the processor what it can do.
        let library = unsafe { libc::dlopen(c"libisal.so.2".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err("libisal.so.2: not installed".to_owned());
        }
        let symbol = |name: &CStr| {
            // SAFETY: the library stays open; a name ends in a zero.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            if address.is_null() { Err(format!("libisal has no {name:?}")) } else { Ok(address) }
        };
        // SAFETY: these are the signatures in ISA-L's crc.h and raid.h.
        unsafe {
            Ok(Isal {
                crc16_t10dif_copy: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(u16, *mut u8, *const u8, u64) -> u16,
                >(symbol(c"crc16_t10dif_copy")?),
                xor_gen: std::mem::transmute::<*mut c_void, Generate>(symbol(c"xor_gen")?),
                pq_gen: std::mem::transmute::<*mut c_void, Generate>(symbol(c"pq_gen")?),
            })
        }
    }

    fn xor(&self, data: &mut [u8], p: &mut [u8]) {
        let chunk = data.len() / COLUMNS;
        let mut arrays: [*mut c_void; COLUMNS + 1] = [p.as_mut_ptr().cast(); COLUMNS + 1];
        for (array, column) in arrays.iter_mut().zip(data.chunks_mut(chunk)) {
            *array = column.as_mut_ptr().cast();
        }
        // SAFETY: all arrays have a chunk, on a page boundary.
        let done =
            unsafe { (self.xor_gen)(arrays.len() as c_int, chunk as c_int, arrays.as_mut_ptr()) };
        assert_eq!(done, 0, "xor_gen");
    }

    fn pq(&self, data: &mut [u8], p: &mut [u8], q: &mut [u8]) {
        let chunk = data.len() / COLUMNS;
        let mut arrays: [*mut c_void; COLUMNS + 2] = [q.as_mut_ptr().cast(); COLUMNS + 2];
        arrays[COLUMNS] = p.as_mut_ptr().cast();
        for (array, column) in arrays.iter_mut().zip(data.chunks_mut(chunk)) {
            *array = column.as_mut_ptr().cast();
        }
        // SAFETY: all arrays have a chunk, on a page boundary.
        let done =
            unsafe { (self.pq_gen)(arrays.len() as c_int, chunk as c_int, arrays.as_mut_ptr()) };
        assert_eq!(done, 0, "pq_gen");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is compared is the same work: both sides leave the same bytes behind.
    #[test]
    fn both_sides_compute_the_same() {
        let isal = Isal::load();
        let Ok(isal) = &isal else { return eprintln!("skipped: {:?}", isal.err()) };
        let kernels = kernels_for("").unwrap();
        for work in [Work::Crc64Copy, Work::Crc16Copy, Work::RowP, Work::RowPq, Work::Pq] {
            let (mut a, mut b) = (Memory::new(64 * KIB), Memory::new(64 * KIB));
            ours(kernels, work, &mut a);
            peer(Some(isal), work, &mut b);
            assert!(a.dst.get() == b.dst.get(), "{work:?}: copies");
            assert_eq!(a.guards, b.guards, "{work:?}");
            assert!(a.p.get() == b.p.get() && a.q.get() == b.q.get(), "{work:?}: P or Q");
            assert_eq!(a.parity_guards, b.parity_guards, "{work:?}");
        }
    }
}
