//! How fast the kernels are on this machine: `cargo run --release --example speed`.
//!
//! GB/s of data (10^9 bytes), median of three runs, one thread, everything in ordinary memory that
//! is touched again and again. Time is the thread's processor time, so that other processes on the
//! machine disturb less. `guarded call` is the cost of an empty fault-guarded call.

use std::hint::black_box;

use onepass::{BLOCK, Kernels, Parity, available_tiers, fault, guard, tier};
use stableio_onepass as onepass;

/// Bytes that each run processes.
const VOLUME: usize = 1 << 30;

fn main() {
    println!("tier in use: {:?}; GB/s, median of 3", tier());
    println!("guarded call: {:.1} ns", guarded_call_ns());
    println!("{:<32}{:>10}{:>10}{:>10}", "", "4 KiB", "64 KiB", "1 MiB");
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
            (kernels.stable_blocks)(&b.dst, &mut b.guards, Parity::None);
        }
    });
    row(&format!("{name}: fused"), |b| stabilize(kernels, b, 0, |_| Parity::None));
    row(&format!("{name}: fused, parity set"), |b| stabilize(kernels, b, 0, Parity::Set));
    row(&format!("{name}: fused, parity xor"), |b| stabilize(kernels, b, 0, Parity::Xor));
    row(&format!("{name}: fused, src odd"), |b| stabilize(kernels, b, 3, |_| Parity::None));
    row(&format!("{name}: sample"), |b| {
        // SAFETY: one guard per block.
        unsafe { (kernels.sample_blocks)(b.src.as_ptr(), &mut b.guards, Parity::None) }.unwrap();
    });
}

fn stabilize(kernels: &Kernels, b: &mut Buffers, offset: usize, mode: fn(*mut u8) -> Parity) {
    let src = b.src_with_slack.as_ptr().wrapping_add(offset);
    let parity = mode(b.parity.as_mut_ptr());
    // SAFETY: all buffers have a block per guard, and `src_with_slack` one more.
    unsafe { (kernels.stabilize_blocks)(src, b.dst.as_mut_ptr(), &mut b.guards, parity) }.unwrap();
}

/// What the kernels work on.
struct Buffers {
    src: Vec<u8>,
    src_with_slack: Vec<u8>,
    dst: Vec<u8>,
    parity: Vec<u8>,
    guards: Vec<u64>,
}

/// Prints the speed of `work` for each size.
fn row(name: &str, work: impl Fn(&mut Buffers)) {
    print!("{name:<32}");
    for size in [4 << 10, 64 << 10, 1 << 20] {
        let mut buffers = Buffers {
            src: vec![1; size],
            src_with_slack: vec![2; size + BLOCK],
            dst: vec![3; size],
            parity: vec![4; size],
            guards: vec![5; size / BLOCK],
        };
        let mut speeds = [0.0; 3].map(|_: f64| {
            let start = cpu_ns();
            for _ in 0..VOLUME / size {
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
