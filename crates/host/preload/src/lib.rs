//! The library that `stableio run` and `stableio detect` load into a program (`LD_PRELOAD`).
//!
//! It stands between the program and its C library, finds the I/O on files that are open for
//! direct I/O (`O_DIRECT`), and has it go from private memory (`run`) or looks at its memory before
//! and after (`detect`). What it does with which file the launcher decides (`crates/host`); the two
//! share a session (`crates/host/session`).
//!
//! ```text
//!   by name            syscall()          an instruction elsewhere
//!  names, process,        │                  net (SIGSYS)
//!  signals, posix_aio     │                     │
//!       └──────────── calls: by number ─────────┘
//!                         │
//!        files: what is this descriptor?  ── ask: the launcher
//!                         │
//!          sync │ uncached │ aio │ uring │ posix_aio
//!                         │
//!             io: begin ── kernel (gate) ── end
//!             pool, watch, site
//! ```
//!
//! It lives in somebody else's process. So: no panics to speak of, no allocation and no lock on
//! any path that a signal handler can be on, `errno` only where the program expects it, no
//! descriptor kept. `unsafe` is everywhere here, and has two reasons: memory that the program
//! names, which only `onepass` touches, and system calls, which the kernel checks.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod aio;
mod ask;
mod calls;
mod files;
mod free;
mod gate;
mod io;
mod names;
mod net;
mod pool;
mod posix_aio;
mod process;
mod session;
mod signals;
mod site;
mod sync;
mod uncached;
mod uring;
mod watch;

use core::sync::atomic::Ordering;

use stableio_onepass as onepass;

/// Runs before the program does (System V ABI: initialization functions).
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = load;

extern "C" fn load() {
    // Before anything of ours goes through the net.
    let code = gate::find();
    let Some(session) = session::attach() else { return };
    gate::set_cookie(session.cookie.load(Ordering::Relaxed));
    process::keep_environment();
    if !pool::reserve(session.pool_bytes.load(Ordering::Relaxed)) {
        pool::reserve(0);
    }
    signals::install_for_memory();
    warm_up();
    process::follow_forks();
    if let Some(code) = code {
        net::ready(code);
    }
    process::arm_thread();
    session.totals.processes.fetch_add(1, Ordering::Relaxed);
}

/// The kernels choose their instruction set when they are first used, which takes the C library's
/// allocator: here, not in a signal handler.
fn warm_up() {
    let (from, mut to) = ([0u8; 8], [0u8; 8]);
    // SAFETY: both are ours, of this length.
    let _ = unsafe { onepass::copy_in(from.as_ptr(), to.as_mut_ptr(), from.len()) };
}
