//! Kernel AIO (`io_setup`, `io_submit`, `io_getevents` …).
//!
//! The program gets contexts of ours. Behind each is one of the kernel's, H, that the program never
//! hears of; each of its iocbs goes to H as a *shadow*, from private memory where that is due, and
//! each event of H is finished before the program can see it, by a call or by a look at the ring
//! that the context's address points to, as QEMU, fio and libaio do.
//!
//! ```text
//!  io_submit: iocb ── submit ──> shadow ──> H ──┬── reap: finish ──> io_getevents
//!                                               └── agent: finish ──> visible ring, eventfd
//! ```
//!
//! - **AIO-1** An iocb is read once, and so is its vector; what the kernel gets is ours.
//! - **AIO-2** An event is finished ([`crate::io::Io::end`]) before the program can know of it:
//!   before its memory is read by the program (a private read) or may be written again (`detect`).
//! - **AIO-3** An event lies in the visible ring before the tail says so, and before its eventfd is
//!   told.
//! - **AIO-4** No event is published while somebody waits for it elsewhere (`reap`).
//! - **AIO-5** H lives as long as anybody holds its context: its address is never another's while
//!   it may still be used (`context`).
//! - **AIO-6** Nothing that the program can write to is trusted with memory safety: neither the
//!   visible ring's numbers nor what comes with a call.
//!
//! A context that is none of ours is the kernel's business.

mod abi;
mod agent;
mod context;
mod finish;
mod names;
mod reap;
mod submit;

use libc::timespec;
use stableio_onepass as onepass;

use crate::calls::SYS_IO_PGETEVENTS;
use crate::gate::syscall;
use crate::net;
use crate::session;
use crate::signals;
use crate::site::Caller;
use crate::sync;
use abi::SigSet;
use reap::Want;

/// Does one of the calls by number. `None`: it goes to the kernel as it is.
///
/// # Safety
///
/// `args` are those of the system call, from the program.
pub(crate) unsafe fn take(number: i64, args: &[usize; 6], caller: Caller) -> Option<isize> {
    // A handler of ours waits with the mask of the code that it interrupted.
    perform(number, args, caller, net::interrupted_mask())
}

/// As [`take`], waiting with this mask instead of the thread's.
fn perform(number: i64, args: &[usize; 6], caller: Caller, mask: Option<u64>) -> Option<isize> {
    session::get()?;
    if number == libc::SYS_io_setup {
        return Some(setup(args[0], args[1]));
    }
    let context = context::hold(args[0])?;
    Some(match number {
        libc::SYS_io_submit => submit::submit(&context, args[1] as i64, args[2], caller),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => {
            let with_mask = number == SYS_IO_PGETEVENTS;
            match want(args, with_mask, mask) {
                Ok(want) => reap::get_events(&context, &want),
                Err(error) => error,
            }
        }
        libc::SYS_io_cancel => submit::cancel(&context, args[1]),
        libc::SYS_io_destroy => destroy(&context),
        _ => return None,
    })
}

/// A forked child has none of its parent's contexts.
pub(crate) fn after_fork() {
    context::after_fork();
    agent::after_fork();
}

/// `io_setup`: a context of the kernel's, which says what is wrong with the arguments, and ours
/// around it.
fn setup(events: usize, at: usize) -> isize {
    let mut kernel = 0usize;
    let bytes = size_of::<usize>();
    // SAFETY: the program's memory is foreign, and may be inaccessible; ours holds an address.
    if unsafe { onepass::copy_in(at as *const u8, (&raw mut kernel).cast(), bytes) }.is_err() {
        return -(libc::EFAULT as isize);
    }
    // SAFETY: the kernel looks at the address, which has to be 0, and writes the new one.
    let result = unsafe { syscall!(libc::SYS_io_setup, events as u32, &raw mut kernel) };
    if result < 0 {
        return result;
    }
    let Some(ours) = context::make(kernel) else {
        // SAFETY: just made, and known to nobody.
        unsafe { syscall!(libc::SYS_io_destroy, kernel) };
        return -(libc::ENOMEM as isize);
    };
    // SAFETY: as above.
    if unsafe { onepass::copy_out((&raw const ours).cast(), at as *mut u8, bytes) }.is_err() {
        if let Some(context) = context::hold(ours) {
            context.condemn();
        }
        return -(libc::EFAULT as isize);
    }
    agent::start_watch();
    0
}

/// `io_destroy`. The program may use its buffers again when it comes back, so what is under way
/// ends first.
fn destroy(context: &context::Held) -> isize {
    /// How often others are waited for who are still inside, 100 µs each. Only a call that this
    /// thread itself has interrupted can be inside for longer.
    const PATIENCE: u32 = 10_000;
    if !context.condemn() {
        return -(libc::EINVAL as isize);
    }
    while context.has_cares() {
        reap::discard(context);
    }
    // AIO-5: the last one of us takes it down.
    for _ in 0..PATIENCE {
        if context.holders() == 1 {
            break;
        }
        agent::ring(context);
        reap::kick(context);
        sync::nap();
    }
    0
}

/// What a program wants of `io_getevents` or, `with_mask`, of `io_pgetevents`.
fn want(args: &[usize; 6], with_mask: bool, mask: Option<u64>) -> Result<Want, isize> {
    let mut want =
        Want { min: args[1] as i64, max: args[2] as i64, events: args[3], time: None, mask };
    if args[4] != 0 {
        let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
        read(args[4], &mut time)?;
        want.time = Some(time);
    }
    if with_mask && args[5] != 0 {
        let mut set = SigSet { mask: 0, size: 0 };
        read(args[5], &mut set)?;
        if set.mask != 0 {
            if set.size != size_of::<u64>() {
                return Err(-(libc::EINVAL as isize));
            }
            let mut theirs = 0u64;
            read(set.mask, &mut theirs)?;
            want.mask = Some(signals::without_ours(theirs));
        }
    }
    Ok(want)
}

/// Reads plain numbers from the program's memory, once.
fn read<T: Copy>(at: usize, into: &mut T) -> Result<(), isize> {
    // SAFETY: the program's memory is foreign, and may be inaccessible; `T` is made of plain
    // numbers here, for which any bytes are valid.
    let read = unsafe {
        onepass::copy_in(at as *const u8, core::ptr::from_mut(into).cast(), size_of::<T>())
    };
    read.map_err(|_| -(libc::EFAULT as isize))
}
