//! Shadows: what stands in the kernel for the program's iocbs, and what becomes of their results.

use core::cell::UnsafeCell;
use core::mem::zeroed;
use core::sync::atomic::{AtomicU32, Ordering};

use super::abi::{Event, Iocb};
use super::context::Context;
use crate::files::File;
use crate::gate::syscall;
use crate::io::{Dir, Io};
use crate::uncached;

/// An iocb of ours, for one of the program's that is under way.
pub(super) struct Shadow {
    /// Number plus one of the next free shadow.
    pub(super) next: AtomicU32,
    pub(super) state: AtomicU32,
    pub(super) iocb: UnsafeCell<Iocb>,
    pub(super) what: UnsafeCell<What>,
}

impl Shadow {
    const FREE: u32 = 0;
    pub(super) const IN_FLIGHT: u32 = 1;
    /// `io_cancel` looks at it. Its event waits for that.
    pub(super) const LOOKED_AT: u32 = 2;
}

/// What the program's iocb is.
#[derive(Debug, Clone, Copy)]
pub(super) struct What {
    /// Its address.
    pub(super) obj: u64,
    /// Its `data`.
    pub(super) data: u64,
    /// Its eventfd; -1: none.
    pub(super) resfd: i32,
    pub(super) kind: Kind,
}

/// What is to be done when it completes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Nothing.
    Other,
    /// The I/O is to be ended.
    Ours(Io),
    /// It is to be counted.
    Direct(File, Dir),
    /// It went through the page cache. `settles`: and has to be brought out of it.
    Uncached { file: File, dir: Dir, fd: i32, offset: i64, settles: bool },
}

impl Kind {
    /// Whether `io_destroy` need not see its end.
    fn is_carefree(self) -> bool {
        matches!(self, Kind::Other | Kind::Direct(..))
    }

    /// Says that it goes to the kernel.
    pub(super) fn begun(self, context: &Context) {
        if self.is_carefree() {
            context.carefree.fetch_add(1, Ordering::Relaxed);
        }
        // Before the watch is asked whether it sleeps, see `watch`.
        context.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    fn over(self, context: &Context) {
        context.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.is_carefree() {
            context.carefree.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// `data` of an event that is nobody's: it wakes those who wait.
pub(super) const KICK: u64 = u64::MAX;

/// Ends what the kernel's event is about (AIO-2). Returns the program's event, and its eventfd or -1.
/// `None`: there is none for the program.
pub(super) fn finish(context: &Context, event: &Event) -> Option<(Event, i32)> {
    let what = retire(context, event.data)?;
    let res = event.res as isize;
    let res = match what.kind {
        Kind::Other => res,
        Kind::Ours(io) => io.end(res),
        Kind::Direct(file, dir) => {
            file.count(dir, res);
            res
        }
        Kind::Uncached { file, dir, fd, offset, settles } => {
            let res = if settles && res > 0 { settled(fd, dir, offset, res) } else { res };
            file.count(dir, res);
            if dir == Dir::Write
                && let Some(shared) = file.shared()
            {
                shared.fallen_back.fetch_add(1, Ordering::Relaxed);
            }
            res
        }
    };
    what.kind.over(context);
    let ours = Event { data: what.data, obj: what.obj, res: res as i64, res2: event.res2 };
    Some((ours, what.resfd))
}

/// Takes back a shadow that the kernel did not take.
pub(super) fn take_back(context: &Context, index: u32) {
    if let Some(what) = retire(context, u64::from(index)) {
        if let Kind::Ours(io) = what.kind {
            io.cancel();
        }
        what.kind.over(context);
    }
}

/// Frees the shadow of this number, and returns what was in it.
fn retire(context: &Context, data: u64) -> Option<What> {
    let shadow = context.shadow(data)?;
    let state = &shadow.state;
    loop {
        match state.compare_exchange(
            Shadow::IN_FLIGHT,
            Shadow::FREE,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => break,
            // `io_cancel` does not look for long, and no handler interrupts it.
            Err(Shadow::LOOKED_AT) => core::hint::spin_loop(),
            Err(_) => return None,
        }
    }
    // SAFETY: it was in flight, so it was filled, and now it is ours alone until it is given back.
    let what = unsafe { *shadow.what.get() };
    context.give_shadow(data as u32);
    Some(what)
}

/// Brings a buffered I/O out of the page cache. If the program has closed the descriptor meanwhile,
/// it has given up hearing of writeback from it.
fn settled(fd: i32, dir: Dir, offset: i64, res: isize) -> isize {
    let settled = uncached::settle(fd, dir, offset, res);
    if settled == -(libc::EBADF as isize) { res } else { settled }
}

/// Tells eventfds of completions, one each; the events are there to be seen before.
pub(super) fn tell(resfds: &[i32]) {
    for same in resfds.chunk_by(|a, b| a == b) {
        let fd = same[0];
        if fd < 0 || !is_anonymous(fd) {
            continue;
        }
        let count = same.len() as u64;
        // SAFETY: writes eight bytes that are there.
        unsafe { syscall!(libc::SYS_write, fd, &raw const count, size_of::<u64>()) };
    }
}

/// Whether the descriptor may be an eventfd, and is no file: the program may have closed the one
/// that it gave, and the number may be another file's by now, which must not be written to.
fn is_anonymous(fd: i32) -> bool {
    eventfd_error(fd).is_none()
}

/// The error of an iocb with this eventfd, if it has one.
pub(super) fn eventfd_error(fd: i32) -> Option<isize> {
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let (result, stat) = unsafe {
        let mut stat: libc::stat = zeroed();
        (syscall!(libc::SYS_fstat, fd, &raw mut stat), stat)
    };
    match result {
        0 if stat.st_mode & libc::S_IFMT == 0 => None,
        0 => Some(-(libc::EINVAL as isize)),
        error => Some(error),
    }
}
