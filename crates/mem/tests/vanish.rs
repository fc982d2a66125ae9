//! Foreign memory whose owner takes it away: every door says so with an error,
//! nothing leaks, and the process goes on.
//!
//! The twins read the same memory without a door, and are seen to die.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use mem::{BLOCK, Fault, ForeignBuf, Grant, Pass, Pool, RowShape, StableBuf, Update, doors};
use stableio_mem as mem;
use support::{Mapping, noise};

const PAGES: usize = 8;
const LEN: usize = PAGES * BLOCK;
/// Where the memory ends that is left.
const GAP: usize = LEN / 2;
const PASS: Pass = Pass {
    guards: true,
    rows: Some(RowShape { chunk_blocks: 1, columns: 2, parities: 2 }),
    streams: true,
};

/// Counts what a thread has on the heap: a call that is abandoned in the middle
/// must not leave anything there.
struct Counting;

thread_local! {
    static ON_HEAP: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends may free after its counter is gone.
    let _ = ON_HEAP.try_with(|on_heap| on_heap.set(on_heap.get() + bytes));
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Foreign memory with a gap from [`GAP`] on.
fn truncated() -> Arc<Mapping> {
    let foreign = Mapping::holding(&noise(1, LEN));
    foreign.truncate(GAP);
    foreign
}

/// Memory of which a page in the middle may not be touched.
fn denied() -> Arc<Mapping> {
    let foreign = Mapping::holding(&noise(2, LEN));
    foreign.protect(GAP..GAP + BLOCK, libc::PROT_NONE);
    foreign
}

fn pool() -> Arc<Pool> {
    Pool::new(1 << 20).unwrap()
}

/// Passes memory through every door, one after the other.
fn through_every_door(
    pool: &Arc<Pool>,
    at: u64,
    mut foreign: impl FnMut() -> ForeignBuf,
) -> [(&'static str, Result<(), Fault>); 9] {
    let reserve = |bytes| pool.try_reserve(bytes).unwrap().expect("nobody else has any");
    let len = foreign().len();
    let blocks = len / BLOCK;
    let promised = |buf| doors::promise(buf, Grant::by_administrator());
    let need = Pass::payload_bytes(at, len) + PASS.parity_bytes(at, len);

    let stabilize = |buf, pass| doors::stabilize(buf, at, pass, &mut reserve(need)).map(drop);
    let sums = |buf| promised(buf).sums(at, PASS, &mut reserve(need)).map(drop);
    let take_up = |buf| {
        let mut p = reserve(len).take(blocks * BLOCK);
        let update = Update { p: Some(&mut p), q: None, coefficient: 1, at: 0, old: None };
        promised(buf).take_up(0, blocks, update)
    };
    let take_up_in_q = |buf| {
        let mut q = reserve(len).take(blocks * BLOCK);
        let update = Update { p: None, q: Some(&mut q), coefficient: 2, at: 0, old: None };
        promised(buf).take_up(0, blocks, update)
    };
    let verify = |buf| doors::verify_in_place(&buf, 0, &vec![0; blocks]).map(drop);
    let copy_out = |buf| doors::copy_out(&StableBuf::from_owned(vec![7; len]), &buf, 0);
    [
        ("stabilize with sums", stabilize(foreign(), PASS)),
        ("stabilize", stabilize(foreign(), Pass::default())),
        ("load", doors::load(foreign(), &mut vec![0; len])),
        ("promised sums", sums(foreign())),
        ("promised parity", take_up(foreign())),
        ("promised Q", take_up_in_q(foreign())),
        ("verify_in_place", verify(foreign())),
        ("copy_out", copy_out(foreign())),
        ("zero_out", doors::zero_out(&foreign(), 0, len)),
    ]
}

/// Panics unless every door stops in `gap`, and unless nothing is left behind.
///
/// Where in the gap is left open: the columns of a row are loaded in turns.
fn assert_stops(foreign: &Arc<Mapping>, at: u64, segments: &[(usize, usize)], gap: Range<usize>) {
    let pool = pool();
    for (door, result) in through_every_door(&pool, at, || foreign.buf(segments)) {
        let fault = result.expect_err(door);
        let place = fault.addr - foreign.addr();
        assert!(gap.contains(&place), "{door}: {fault}");
        let inside = |&(offset, len): &(usize, usize)| (offset..offset + len).contains(&place);
        assert!(segments.iter().any(inside), "{door}: {fault} is not in the request");
        assert_eq!(pool.used(), 0, "{door}");
        assert_eq!(Arc::strong_count(foreign), 1, "{door}");
    }
    let mut all = pool.try_reserve(pool.size()).unwrap().unwrap();
    assert_eq!(all.take(pool.size()).freeze().pieces().count(), 1, "every block went back");
}

/// The process goes on: what is left of the memory still passes every door.
fn assert_left(foreign: &Arc<Mapping>) {
    for (door, result) in through_every_door(&pool(), 0, || foreign.buf(&[(0, GAP)])) {
        assert_eq!(result, Ok(()), "{door}");
    }
}

/// Requests that begin in memory that is there and end in the gap.
const STRADDLING: [&[(usize, usize)]; 5] = [
    &[(0, LEN)],
    &[(GAP - BLOCK, 2 * BLOCK)],
    // By a byte, where a page is pieced together of segments.
    &[(3, BLOCK - 7), (GAP - 8, 9), (BLOCK + 2, 2 * BLOCK)],
    // A gap first.
    &[(GAP + 100, BLOCK - 100), (0, BLOCK)],
    // Whole pages, one of them gone.
    &[(0, BLOCK), (2 * BLOCK, BLOCK), (GAP, BLOCK), (BLOCK, BLOCK)],
];

#[test]
fn a_truncated_file_is_an_error_at_every_door() {
    let foreign = truncated();
    for at in [0, 512, 3 * BLOCK as u64 - 1] {
        for segments in STRADDLING {
            assert_stops(&foreign, at, segments, GAP..LEN);
        }
    }
    assert_left(&foreign);
}

#[test]
fn a_page_that_may_not_be_read_is_an_error_at_every_door() {
    let foreign = denied();
    for at in [0, 512, 3 * BLOCK as u64 - 1] {
        for segments in STRADDLING {
            assert_stops(&foreign, at, segments, GAP..GAP + BLOCK);
        }
    }
    assert_left(&foreign);
    // What lies behind the page is there as well.
    let behind = foreign.buf(&[(GAP + BLOCK, LEN - GAP - BLOCK)]);
    let blocks = behind.len() / BLOCK;
    assert!(doors::verify_in_place(&behind, 0, &vec![0; blocks]).is_ok());
}

#[test]
fn a_page_that_may_not_be_written_is_an_error_on_the_way_out_only() {
    let foreign = Mapping::holding(&noise(3, LEN));
    foreign.protect(GAP..LEN, libc::PROT_READ);
    let before = foreign.bytes();
    for (door, result) in through_every_door(&pool(), 0, || foreign.buf(&[(GAP - 1, BLOCK + 1)])) {
        let expected = match door {
            "copy_out" | "zero_out" => Err(Fault { addr: foreign.addr() + GAP }),
            _ => Ok(()),
        };
        assert_eq!(result, expected, "{door}");
    }
    assert!(foreign.bytes()[..GAP - 1] == before[..GAP - 1], "in front of the range");
    assert!(foreign.bytes()[GAP..] == before[GAP..], "what may not be written");
    assert_eq!(Arc::strong_count(&foreign), 1);
}

/// Memory that came back is foreign memory like any other.
#[test]
fn what_comes_back_can_be_used_again() {
    let foreign = truncated();
    assert_stops(&foreign, 0, &[(0, LEN)], GAP..LEN);
    foreign.truncate(LEN);
    for (door, result) in through_every_door(&pool(), 0, || foreign.buf(&[(0, LEN)])) {
        assert_eq!(result, Ok(()), "{door}");
    }
}

#[test]
fn ten_thousand_faults_leave_nothing_behind() {
    let (foreign, pool) = (truncated(), pool());
    let mut faults = 0;
    let mut round = |segments: &[(usize, usize)]| {
        for (door, result) in through_every_door(&pool, 512, || foreign.buf(segments)) {
            result.expect_err(door);
            faults += 1;
        }
    };
    // The first round sets up what stays for good.
    STRADDLING.into_iter().for_each(&mut round);
    let before = ON_HEAP.get();
    STRADDLING.into_iter().cycle().take(10_000 / 9 + 1).for_each(&mut round);
    assert_eq!(ON_HEAP.get(), before, "bytes on the heap after {faults} faults");
    assert!(faults > 10_000);
    assert_eq!(pool.used(), 0);
    assert_eq!(Arc::strong_count(&foreign), 1);
    assert_left(&foreign);
}

/// Runs the test `name` again in a process of its own, where it calls `body`,
/// which must kill it. Returns the signal that did.
fn killed(name: &str, body: impl FnOnce()) -> Option<i32> {
    const CHILD: &str = "STABLEIO_MEM_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: reads `none`. A core dump would be of no use.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
        body();
        std::process::exit(0);
    }
    let status = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("this test can be started");
    status.signal()
}

/// Reads memory as a program does that trusts it. The handler of the doors is
/// there, and does not hide what happens elsewhere.
fn read_without_a_door(foreign: &Mapping) {
    mem::fixup::install();
    for offset in 0..foreign.len() {
        // SAFETY: not safe at all: this is what the doors are there to avoid.
        unsafe { foreign.at(offset).read_volatile() };
    }
}

#[test]
fn without_a_door_the_gap_kills() {
    let signal = killed("without_a_door_the_gap_kills", || read_without_a_door(&truncated()));
    assert_eq!(signal, Some(libc::SIGBUS));
}

#[test]
fn without_a_door_the_denied_page_kills() {
    let signal = killed("without_a_door_the_denied_page_kills", || read_without_a_door(&denied()));
    assert_eq!(signal, Some(libc::SIGSEGV));
}
