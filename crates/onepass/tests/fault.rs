//! Foreign memory that vanishes ends a call, not the process; everything else that used to kill
//! the process still does.

mod support;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::ptr;

use onepass::{
    BLOCK, Column, Fault, Format, Kernels, Parities, Parity, RowParity, Segment, available_tiers,
    fault, tier,
};
use stableio_onepass as onepass;
use support::{sample, stabilize};

const PAGE: usize = 4096;

/// A shared mapping of a file in memory, as a client hands it over.
struct Mapping {
    file: OwnedFd,
    start: *mut u8,
    len: usize,
}

// SAFETY: addresses only; the tests do not touch one mapping from two threads.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(len: usize) -> Mapping {
        // SAFETY: a valid name; the descriptor that comes back is ours alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"foreign".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        truncate(&file, len);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: maps where nothing is.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Mapping { file, start: start.cast(), len }
    }

    /// A mapping of which the second half has vanished.
    fn half_gone(len: usize) -> Mapping {
        let mapping = Mapping::new(len);
        truncate(&mapping.file, len / 2);
        mapping
    }

    fn gap(&self) -> Result<(), Fault> {
        Err(Fault { addr: self.start.addr() + self.len / 2 })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nobody uses any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

fn truncate(file: &OwnedFd, len: usize) {
    // SAFETY: a system call without memory.
    let done = unsafe { libc::ftruncate(file.as_raw_fd(), len as libc::off_t) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Runs the test `name` again in a process of its own, where it calls `body`, which must kill it;
/// returns the signal that did, and what it wrote to standard error.
fn killed(name: &str, body: impl FnOnce()) -> (Option<i32>, String) {
    const CHILD: &str = "STABLEIO_ONEPASS_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: reads `none`. A core dump would be of no use.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
        body();
        std::process::exit(0);
    }
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .output()
        .expect("this test can be started");
    (output.status.signal(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_kernel_reports_the_gap_and_lives() {
    let mapping = Mapping::half_gone(8 * PAGE);
    let mut buffer = vec![0; mapping.len];
    let (mut p, mut q) = (vec![0; mapping.len], vec![0; mapping.len]);
    for kernels in available_tiers().iter().map(|tier| Kernels::of(*tier).unwrap()) {
        for offset in [0, 8, 3, 64, 100] {
            let src = mapping.start.wrapping_add(offset);
            let blocks = (mapping.len - offset) / BLOCK;
            let mut guards = vec![0; blocks];
            let (p, q) = (Parity::Set(p.as_mut_ptr()), Parity::Set(q.as_mut_ptr()));
            let both = Parities { p, q, coefficient: 29 };
            for parities in [Parities::NONE, Parities::only_p(p), both] {
                let ours = buffer.as_mut_ptr();
                // SAFETY: buffer, P and Q are as long as the mapping, which nobody else uses.
                unsafe {
                    let done = stabilize(kernels, src, ours, &mut guards, parities);
                    assert_eq!(done, mapping.gap());
                    let done = sample(kernels, src, &mut guards, parities);
                    assert_eq!(done, mapping.gap());
                }
            }
            let (ours, len) = (buffer.as_mut_ptr(), mapping.len - offset);
            // SAFETY: as above.
            unsafe {
                assert_eq!((kernels.copy_in)(src, ours, len), mapping.gap());
                assert_eq!((kernels.copy_out)(ours, src, len), mapping.gap());
                assert_eq!((kernels.zero_out)(src, len), mapping.gap());
                assert_eq!((kernels.differ)(src, ours, len).map(drop), mapping.gap());
                // The half that is left can be used as ever.
                let left = mapping.len / 2 - offset;
                assert_eq!((kernels.copy_in)(src, ours, left), Ok(()));
            }
        }
    }
}

#[test]
fn rows_report_the_gap_of_any_column() {
    let (whole, half) = (Mapping::new(12 * PAGE), Mapping::half_gone(12 * PAGE));
    let len = half.len;
    let [mut first, mut second, mut p, mut q] = std::array::from_fn(|_| vec![0_u8; len]);
    for kernels in available_tiers().iter().map(|tier| Kernels::of(*tier).unwrap()) {
        for sources in [[&half, &whole], [&whole, &half]] {
            let sources = sources.map(|mapping| [Segment { addr: mapping.start, len }]);
            let mut guards = vec![vec![0; len / BLOCK]; 4];
            let [of_first, of_second, of_p, of_q] = &mut guards[..] else { unreachable!() };
            let mut row = [
                Column::foreign(&sources[0], first.as_mut_ptr(), of_first),
                Column::foreign(&sources[1], second.as_mut_ptr(), of_second),
            ];
            let p = RowParity { to: p.as_mut_ptr(), guards: of_p };
            let q = RowParity { to: q.as_mut_ptr(), guards: of_q };
            // SAFETY: copies and parities are as long as the mappings, which nobody else uses.
            let done =
                unsafe { onepass::row_with(kernels, Format::NATIVE, &mut row, Some(p), Some(q)) };
            assert_eq!(done, half.gap());
        }
    }
}

#[test]
fn unmapped_memory_is_a_fault_too() {
    let mapping = Mapping::new(2 * PAGE);
    let start = mapping.start;
    // SAFETY: nobody uses the mapping; from here on only its address matters.
    let denied = unsafe { libc::mprotect(start.cast(), mapping.len, libc::PROT_NONE) };
    assert_eq!(denied, 0);
    let mut guards = [0; 2];
    let kernels = Kernels::of(tier()).expect("available");
    // SAFETY: no parity; the range is nobody's but ours, and inaccessible.
    let done = unsafe { sample(kernels, start, &mut guards, Parities::NONE) };
    assert_eq!(done, Err(Fault { addr: start.addr() }));
}

#[test]
fn without_the_guard_the_gap_kills() {
    let (signal, _) = killed("without_the_guard_the_gap_kills", || {
        fault::install();
        let mapping = Mapping::half_gone(2 * PAGE);
        // SAFETY: not safe at all: this is what the kernels are there to avoid.
        unsafe { mapping.start.add(PAGE).read_volatile() };
    });
    assert_eq!(signal, Some(libc::SIGBUS));
}

#[test]
fn ten_thousand_faults_on_each_of_two_threads() {
    let fault_often = || {
        let mapping = Mapping::half_gone(2 * PAGE);
        let mut copy = vec![0; mapping.len];
        let kernels = Kernels::of(tier()).expect("available");
        for _ in 0..10_000 {
            // SAFETY: both are one length, and nobody else has them.
            let done = unsafe {
                stabilize(kernels, mapping.start, copy.as_mut_ptr(), &mut [0; 2], Parities::NONE)
            };
            assert_eq!(done, mapping.gap());
        }
    };
    let other = std::thread::spawn(fault_often);
    fault_often();
    other.join().expect("the other thread lives");
}

#[test]
fn guards_nest() {
    let (outer, inner) = (Mapping::half_gone(2 * PAGE), Mapping::half_gone(2 * PAGE));
    let (outer_start, inner_start) = (outer.start, inner.start);
    let mut inner_fault = Ok(());
    let seen = &raw mut inner_fault;
    // SAFETY: the bodies own nothing; `seen` is a local that outlives them.
    let outer_fault = unsafe {
        fault::guarded(outer_start, outer.len, move || {
            *seen = fault::guarded(inner_start, 2 * PAGE, move || {
                inner_start.add(PAGE + 5).read_volatile();
            });
            outer_start.add(PAGE + 7).read_volatile();
        })
    };
    assert_eq!(inner_fault, Err(Fault { addr: inner_start.addr() + PAGE + 5 }));
    assert_eq!(outer_fault, Err(Fault { addr: outer_start.addr() + PAGE + 7 }));
}

#[test]
fn a_region_reads_zeros_and_tells() {
    let mapping = Mapping::new(4 * PAGE);
    let intact = Mapping::new(PAGE);
    // SAFETY: the mappings are ours.
    unsafe { mapping.start.write_bytes(7, mapping.len) };
    let region = fault::register(mapping.start.addr(), mapping.len).expect("there is room");
    let other = fault::register(intact.start.addr(), intact.len).expect("there is room");
    truncate(&mapping.file, 2 * PAGE);

    // SAFETY: ours; where it has vanished, the region makes it readable.
    unsafe {
        assert_eq!(mapping.start.add(2 * PAGE - 1).read_volatile(), 7);
        assert!(!region.faulted());
        assert_eq!(mapping.start.add(3 * PAGE + 9).read_volatile(), 0);
        assert!(region.faulted());
        mapping.start.add(2 * PAGE).write_volatile(1);
        assert_eq!(mapping.start.add(2 * PAGE).read_volatile(), 1);
        assert_eq!(mapping.start.read_volatile(), 7);
    }
    assert!(!other.faulted());
}

#[test]
fn a_guarded_fault_leaves_its_region_alone() {
    let mapping = Mapping::half_gone(2 * PAGE);
    let region = fault::register(mapping.start.addr(), mapping.len).expect("there is room");
    let mut copy = vec![0; mapping.len];
    // SAFETY: both are one length, and nobody else has them.
    let done = unsafe { onepass::copy_in(mapping.start, copy.as_mut_ptr(), copy.len()) };
    assert_eq!(done, mapping.gap());
    assert!(!region.faulted());
}

#[test]
fn a_dropped_region_protects_no_more() {
    let (signal, _) = killed("a_dropped_region_protects_no_more", || {
        let mapping = Mapping::half_gone(2 * PAGE);
        drop(fault::register(mapping.start.addr(), mapping.len));
        // SAFETY: not safe at all: the process dies of it.
        unsafe { mapping.start.add(PAGE).read_volatile() };
    });
    assert_eq!(signal, Some(libc::SIGBUS));
}

#[test]
fn the_table_of_regions_is_finite_and_reused() {
    // In a process of its own: the other tests need slots, too. Exits with 0 if all went well.
    let name = "the_table_of_regions_is_finite_and_reused";
    let (signal, errors) = killed(name, || {
        assert!(fault::register(usize::MAX, 2).is_none(), "over the end of the address space");
        assert!(fault::register(PAGE, 0).is_none(), "empty");
        for _ in 0..3 {
            let all: Vec<_> = (1..=fault::CAPACITY)
                .map(|page| fault::register(page * PAGE, PAGE).expect("there is room"))
                .collect();
            assert!(fault::register(PAGE, PAGE).is_none(), "the table is full");
            drop(all);
        }
        // SAFETY: a system call that ends the process.
        unsafe { libc::raise(libc::SIGKILL) };
    });
    assert_eq!(signal, Some(libc::SIGKILL), "{errors}");
}

#[test]
fn a_bad_access_elsewhere_still_kills() {
    let (signal, _) = killed("a_bad_access_elsewhere_still_kills", || {
        fault::install();
        let mapping = Mapping::new(PAGE);
        let stray = ptr::without_provenance::<u8>(8);
        // SAFETY: not safe at all. The access is outside the range, so the process dies of it.
        let done = unsafe {
            fault::guarded(mapping.start, mapping.len, move || {
                stray.read_volatile();
            })
        };
        panic!("survived: {done:?}");
    });
    assert_eq!(signal, Some(libc::SIGSEGV));
}

#[test]
fn a_sent_signal_still_kills() {
    let (signal, _) = killed("a_sent_signal_still_kills", || {
        fault::install();
        // SAFETY: a system call without memory.
        unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
        std::thread::sleep(std::time::Duration::from_secs(10));
    });
    assert_eq!(signal, Some(libc::SIGBUS));
}

#[test]
fn a_stack_overflow_is_still_reported() {
    #[allow(unconditional_recursion)]
    fn overflow() -> u64 {
        std::hint::black_box(overflow()) + 1
    }
    let (signal, errors) = killed("a_stack_overflow_is_still_reported", || {
        fault::install();
        overflow();
    });
    assert_eq!(signal, Some(libc::SIGABRT));
    assert!(errors.contains("overflowed its stack"), "{errors}");
}
