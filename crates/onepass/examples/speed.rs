//! How fast the kernels are on this machine: `cargo run --release --example speed`.
//!
//! GB/s of data (10^9 bytes), median of three runs, one thread, everything in ordinary memory that
//! is touched again and again. Time is the thread's processor time, so that other processes on the
//! machine disturb less. `guarded call` is the cost of an empty fault-guarded call.

use std::hint::black_box;

use onepass::{
    BLOCK, Format, Kernels, Parities, Parity, Pass, Segment, available_tiers, fault, gf, guard,
    tier,
};
use stableio_onepass as onepass;

/// Bytes that each run processes.
const VOLUME: usize = 1 << 30;

fn main() {
    println!("tier in use: {:?}; GB/s, median of 3", tier());
    println!("guarded call: {:.1} ns", guarded_call_ns());
    println!("{:<40}{:>10}{:>10}{:>10}", "", "4 KiB", "64 KiB", "1 MiB");
    row("memcpy", |b| b.dst.copy_from_slice(&b.src));
    row("memcpy, then crc-fast", |b| {
        b.dst.copy_from_slice(&b.src);
        b.guards.iter_mut().zip(b.dst.chunks(BLOCK)).for_each(|(g, block)| *g = guard(block));
    });
    row("crc-fast alone", |b| {
        b.guards.iter_mut().zip(b.src.chunks(BLOCK)).for_each(|(g, block)| *g = guard(block));
    });
    for tier in available_tiers() {
        tier_rows(&format!("{tier:?}"), Kernels::of(*tier).expect("available"));
    }
}

fn tier_rows(name: &str, kernels: &Kernels) {
    row(&format!("{name}: copy_in"), |b| {
        // SAFETY: both buffers have this length.
        unsafe { (kernels.copy_in)(b.src.as_ptr(), b.dst.as_mut_ptr(), b.src.len()) }.unwrap();
    });
    row(&format!("{name}: copy_in, then guards"), |b| {
        // SAFETY: as above; one guard per block.
        unsafe {
            (kernels.copy_in)(b.src.as_ptr(), b.dst.as_mut_ptr(), b.src.len()).unwrap();
            Pass::guards(Format::NATIVE).stable_with(kernels, &b.dst, &mut b.guards);
        }
    });
    row(&format!("{name}: fused"), |b| stabilize(kernels, b, 0, Parities::NONE));
    row(&format!("{name}: fused, P set"), |b| {
        let p = Parity::Set(b.p.as_mut_ptr());
        stabilize(kernels, b, 0, Parities::only_p(p));
    });
    row(&format!("{name}: fused, P xor"), |b| {
        let p = Parity::Xor(b.p.as_mut_ptr());
        stabilize(kernels, b, 0, Parities::only_p(p));
    });
    row(&format!("{name}: fused, P and Q set"), |b| {
        let (p, q) = (Parity::Set(b.p.as_mut_ptr()), Parity::Set(b.q.as_mut_ptr()));
        stabilize(kernels, b, 0, Parities { p, q, coefficient: 1 });
    });
    row(&format!("{name}: fused, P and Q xor"), |b| {
        let (p, q) = (Parity::Xor(b.p.as_mut_ptr()), Parity::Xor(b.q.as_mut_ptr()));
        stabilize(kernels, b, 0, Parities { p, q, coefficient: gf::exp(3) });
    });
    rows(&format!("{name}: fused, row of 4 + P and Q"), 4, |b| {
        let chunk = b.p.len();
        let guards = b.guards.chunks_mut(chunk / BLOCK);
        let columns = b.src.chunks(chunk).zip(b.dst.chunks_mut(chunk)).zip(guards);
        for (column, ((src, dst), guards)) in columns.enumerate() {
            let mode = if column == 0 { Parity::Set } else { Parity::Xor };
            let (p, q) = (mode(b.p.as_mut_ptr()), mode(b.q.as_mut_ptr()));
            let parities = Parities { p, q, coefficient: gf::exp(column) };
            // SAFETY: all of them have a chunk, and its guards.
            unsafe { copy(kernels, src.as_ptr(), dst.as_mut_ptr(), guards, parities) };
        }
    });
    row(&format!("{name}: fused, src odd"), |b| stabilize(kernels, b, 3, Parities::NONE));
    row(&format!("{name}: mul_xor_into"), |b| (kernels.mul_xor_into)(&mut b.q, &b.src, 142));
    row(&format!("{name}: sample"), |b| {
        // SAFETY: one guard per block.
        unsafe {
            let all = [Segment { addr: b.src.as_ptr(), len: b.src.len() }];
            Pass::guards(Format::NATIVE).foreign_with(kernels, &all, &mut b.guards).unwrap();
        }
    });
}

fn stabilize(kernels: &Kernels, b: &mut Buffers, offset: usize, parities: Parities) {
    let src = b.src_with_slack.as_ptr().wrapping_add(offset);
    // SAFETY: all buffers have a block per guard, and `src_with_slack` one more.
    unsafe { copy(kernels, src, b.dst.as_mut_ptr(), &mut b.guards, parities) };
}

/// # Safety
///
/// That of [`Pass::foreign`], for a block for each guard.
unsafe fn copy(
    kernels: &Kernels,
    src: *const u8,
    dst: *mut u8,
    guards: &mut [u64],
    parities: Parities,
) {
    let all = [Segment { addr: src, len: guards.len() * BLOCK }];
    let pass = Pass { parities, ..Pass::copy(Format::NATIVE, dst) };
    // SAFETY: the caller's promises.
    unsafe { pass.foreign_with(kernels, &all, guards) }.unwrap();
}

/// What the kernels work on.
struct Buffers {
    src: Vec<u8>,
    src_with_slack: Vec<u8>,
    dst: Vec<u8>,
    p: Vec<u8>,
    q: Vec<u8>,
    guards: Vec<u64>,
}

/// Prints the speed of `work` for each size.
fn row(name: &str, work: impl Fn(&mut Buffers)) {
    rows(name, 1, work);
}

/// Prints the speed of `work` on that many columns for each size of a chunk.
fn rows(name: &str, columns: usize, work: impl Fn(&mut Buffers)) {
    print!("{name:<40}");
    for size in [4 << 10, 64 << 10, 1 << 20] {
        let mut buffers = Buffers {
            src: vec![1; columns * size],
            src_with_slack: vec![2; columns * size + BLOCK],
            dst: vec![3; columns * size],
            p: vec![4; size],
            q: vec![6; size],
            guards: vec![5; columns * size / BLOCK],
        };
        let mut speeds = [0.0; 3].map(|_: f64| {
            let start = cpu_ns();
            for _ in 0..VOLUME / (columns * size) {
                work(black_box(&mut buffers));
            }
            VOLUME as f64 / (cpu_ns() - start)
        });
        speeds.sort_by(f64::total_cmp);
        print!("{:>10.1}", speeds[1]);
    }
    println!();
}

fn guarded_call_ns() -> f64 {
    const CALLS: u32 = 20_000_000;
    let byte = 0_u8;
    let start = cpu_ns();
    for _ in 0..CALLS {
        // SAFETY: the body does nothing.
        unsafe { fault::guarded(black_box(&raw const byte), 1, || {}) }.unwrap();
    }
    (cpu_ns() - start) / f64::from(CALLS)
}

/// The processor time of this thread so far.
fn cpu_ns() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes `now`.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(done, 0);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}
