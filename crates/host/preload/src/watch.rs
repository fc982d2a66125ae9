//! Finding buffers that change while they are in flight (`detect`).
//!
//! At submission the data is copied; at completion the program's memory is compared with the copy,
//! fast, and byte by byte where the two differ. What changed and changed back in between is not
//! seen.

use core::sync::atomic::Ordering;

use stableio_onepass as onepass;
use stableio_session::{Finding, Kind, RANGES, TICK_NS, TICKS};

use crate::io::{Body, Dir, INLINE_SEGS, Io, Record, Request, records};
use crate::process;
use crate::session;
use crate::site::Site;

/// Takes note of an I/O that goes to the kernel, and of others on the same memory.
pub(crate) fn begin(io: Io, request: &Request) {
    let body = io.body();
    body.site = Site::of(request.caller, request.engine);
    body.submitted_ns = now_ns(libc::CLOCK_MONOTONIC);
    body.submitter = process::thread_id();
    let record = io.record();
    for (i, shared) in record.shared_segs.iter().enumerate() {
        let (start, len) =
            request.segs.get(i).map_or((0, 0), |seg| (seg.iov_base as usize, seg.iov_len));
        shared[0].store(start, Ordering::Relaxed);
        shared[1].store(len, Ordering::Relaxed);
    }
    record.site.store(body.site.0, Ordering::Relaxed);
    // IO-4: before it looks for others, so that of two that begin at once one sees the other.
    record.in_flight.store(Record::dir_of(request.dir), Ordering::SeqCst);
    if uses_memory_again(io, request) {
        let session = session::get();
        if let Some(session) = session {
            session.totals.reused.fetch_add(1, Ordering::Relaxed);
            session.sites.sites[body.site.0 as usize].reused.fetch_add(1, Ordering::Relaxed);
        }
        report(body, Kind::Reused, body.submitted_ns, 0, &[]);
    }
}

/// Whether a read goes into memory that is in flight otherwise, or a write comes from memory that a
/// read in flight goes into, or a read uses one piece of memory twice.
fn uses_memory_again(io: Io, request: &Request) -> bool {
    let segs = &request.segs[..request.segs.len().min(INLINE_SEGS)];
    let ranges = || segs.iter().map(|seg| (seg.iov_base as usize, seg.iov_len));
    let twice = request.dir == Dir::Read
        && ranges().enumerate().any(|(i, a)| ranges().skip(i + 1).any(|b| overlap(a, b)));
    twice
        || records().iter().any(|other| {
            let theirs = other.in_flight.load(Ordering::SeqCst);
            let hazard = theirs == Record::dir_of(Dir::Read)
                || theirs == Record::dir_of(Dir::Write) && request.dir == Dir::Read;
            hazard
                && !core::ptr::eq(other, io.record())
                && other.shared_segs.iter().any(|seg| {
                    let b = (seg[0].load(Ordering::Relaxed), seg[1].load(Ordering::Relaxed));
                    ranges().any(|a| overlap(a, b))
                })
        })
}

fn overlap(a: (usize, usize), b: (usize, usize)) -> bool {
    a.1 > 0 && b.1 > 0 && a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

/// Looks at the memory of an I/O that the kernel is done with, and reports what changed.
pub(crate) fn end(io: Io, result: isize) {
    let body = io.body();
    io.record().in_flight.store(0, Ordering::SeqCst);
    if body.dir == Dir::Read {
        return;
    }
    let Some(session) = session::get() else { return };
    let site = &session.sites.sites[body.site.0 as usize];
    // A step of the timeline is long: the clock of the last tick of the timer will do.
    let done_ns = now_ns(libc::CLOCK_MONOTONIC_COARSE);
    let tick = (done_ns.saturating_sub(session.started_ns.load(Ordering::Relaxed)) / TICK_NS)
        .min(TICKS as u64 - 1) as usize;
    session.totals.watched.fetch_add(1, Ordering::Relaxed);
    site.writes.fetch_add(1, Ordering::Relaxed);
    session.ticks[tick].watched.fetch_add(1, Ordering::Relaxed);
    if result < 0 {
        return;
    }
    let mut changes = Changes { bytes: 0, ranges: [(0, 0); RANGES], count: 0 };
    compare(body, &mut changes);
    if changes.bytes == 0 {
        return;
    }
    session.totals.changed.fetch_add(1, Ordering::Relaxed);
    session.ticks[tick].changed.fetch_add(1, Ordering::Relaxed);
    site.changed.fetch_add(1, Ordering::Relaxed);
    if let Some(file) = body.file.shared() {
        file.changed.fetch_add(1, Ordering::Relaxed);
    }
    let ranges = &changes.ranges[..changes.count.min(RANGES)];
    let done_ns = now_ns(libc::CLOCK_MONOTONIC);
    report(body, Kind::Changed, done_ns, changes.bytes, ranges);
}

/// Bytes that are compared at a time before it is asked which of them differ.
const PIECE: usize = 16 << 10;

/// The bytes of a write that changed; positions count from its start.
struct Changes {
    bytes: u64,
    ranges: [(u32, u32); RANGES],
    count: usize,
}

impl Changes {
    fn add(&mut self, at: usize) {
        self.bytes += 1;
        let at = u32::try_from(at).unwrap_or(u32::MAX);
        if self.count > 0
            && let Some(last) = self.ranges.get_mut(self.count - 1)
            && last.1 == at
        {
            last.1 = at.saturating_add(1);
            return;
        }
        // Ranges behind the last that is kept are counted by their bytes alone.
        if let Some(next) = self.ranges.get_mut(self.count) {
            *next = (at, at.saturating_add(1));
            self.count += 1;
        }
    }
}

fn compare(body: &Body, changes: &mut Changes) {
    let mut begin = 0;
    for (now, then) in body.user().iter().zip(body.private()) {
        for at in (0..now.iov_len).step_by(PIECE) {
            let len = PIECE.min(now.iov_len - at);
            let now_at = now.iov_base.cast::<u8>().wrapping_add(at);
            let then_at = then.iov_base.cast::<u8>().wrapping_add(at);
            // SAFETY: the program's memory is foreign, and may be inaccessible by now; the copy is
            // ours until the I/O has ended. The signals are not blocked.
            let differ = unsafe { onepass::differ(now_at, then_at, len) };
            if differ == Ok(true) {
                compare_bytes(now, then, at..at + len, begin, changes);
            }
        }
        begin += now.iov_len;
    }
}

/// Compares a range of a segment byte by byte, by way of a copy of what is there now.
fn compare_bytes(
    now: &libc::iovec,
    then: &libc::iovec,
    range: core::ops::Range<usize>,
    begin: usize,
    changes: &mut Changes,
) {
    let mut piece = [0u8; 256];
    for at in range.clone().step_by(piece.len()) {
        let len = piece.len().min(range.end - at);
        // SAFETY: as in `compare`; the copy is on this stack.
        let copied = unsafe {
            onepass::copy_in(now.iov_base.cast::<u8>().wrapping_add(at), piece.as_mut_ptr(), len)
        };
        if copied.is_err() {
            return;
        }
        // SAFETY: the copy of the whole segment, which is ours until the I/O has ended.
        let before =
            unsafe { core::slice::from_raw_parts(then.iov_base.cast::<u8>().add(at), len) };
        for i in 0..len {
            if piece[i] != before[i] {
                changes.add(begin + at + i);
            }
        }
    }
}

/// Writes a finding down.
fn report(body: &Body, kind: Kind, done_ns: u64, changed: u64, ranges: &[(u32, u32)]) {
    let Some(session) = session::get() else { return };
    let Some(finding) = session.findings.claim() else {
        session.totals.lost.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let Finding { engine, file, site, pid, tid, offset, len, .. } = finding;
    engine.store(body.engine as u32, Ordering::Relaxed);
    file.store(body.file.slot() as u32, Ordering::Relaxed);
    site.store(body.site.0, Ordering::Relaxed);
    pid.store(crate::process::id(), Ordering::Relaxed);
    tid.store(body.submitter, Ordering::Relaxed);
    offset.store(body.offset, Ordering::Relaxed);
    len.store(body.len as u64, Ordering::Relaxed);
    finding.changed.store(changed, Ordering::Relaxed);
    for (to, (start, end)) in finding.ranges.iter().zip(ranges) {
        to[0].store(*start, Ordering::Relaxed);
        to[1].store(*end, Ordering::Relaxed);
    }
    finding.submitted_ns.store(body.submitted_ns, Ordering::Relaxed);
    finding.completed_ns.store(done_ns, Ordering::Relaxed);
    finding.kind.store(kind as u32, Ordering::Release);
}

/// The time by a clock, in nanoseconds.
fn now_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time there; answered without a system call.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
