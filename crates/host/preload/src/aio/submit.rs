//! `io_submit` and `io_cancel`.

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;

use libc::iovec;
use stableio_onepass as onepass;
use stableio_session::{Engine, Remark};

use super::abi::{
    IOCB_CMD_PREAD, IOCB_CMD_PREADV, IOCB_CMD_PWRITE, IOCB_CMD_PWRITEV, IOCB_FLAG_RESFD, Iocb,
    KEY_AT, KIOCB_KEY,
};
use super::context::{Context, Held};
use super::finish::{Kind, Shadow, What, eventfd_error, take_back};
use super::{agent, reap};
use crate::ask;
use crate::files::{self, File};
use crate::gate::syscall;
use crate::io::{self, Dir, Io, Request};
use crate::pool::PAGE;
use crate::session;
use crate::signals;
use crate::site::Caller;
use crate::sync;
use crate::uncached::{self, RWF_DONTCACHE};

/// How many iocbs go to the kernel at once.
const BATCH: usize = 32;
/// How often memory is waited for, 100 µs each.
const PATIENCE: u32 = 20_000;

/// `io_submit`. `iocbs` is the program's array of `count` addresses.
pub(super) fn submit(context: &Held, count: i64, iocbs: usize, caller: Caller) -> isize {
    if count < 0 {
        return -(libc::EINVAL as isize);
    }
    // Not counted, only changed: two that write the same are no harm.
    context.calls.store(context.calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    let agent = context.peeked_at.load(Ordering::Relaxed) != 0;
    if agent {
        context.submitting.fetch_add(1, Ordering::SeqCst);
    }
    let mut batch = Batch { context, caller, iocbs: [core::ptr::null_mut(); BATCH], filled: 0 };
    let (mut taken, mut error) = (0, 0);
    while (taken as i64) < count && error == 0 {
        while batch.filled < BATCH && ((taken + batch.filled) as i64) < count && error == 0 {
            let nth = taken + batch.filled;
            let at = iocbs.wrapping_add(nth * size_of::<usize>());
            error = match batch.add(at, nth == 0) {
                Ok(()) => 0,
                Err(error) => error,
            };
        }
        let (sent, refused) = batch.send();
        taken += sent;
        if refused != 0 {
            error = refused;
        }
    }
    reap::after_submit(context);
    if agent {
        context.submitting.fetch_sub(1, Ordering::SeqCst);
    }
    let in_flight = context.in_flight.load(Ordering::SeqCst) != 0;
    if in_flight {
        agent::ring(context);
    }
    if taken == 0 {
        return error;
    }
    if in_flight {
        agent::wake_watch();
    }
    taken as isize
}

/// Shadow iocbs on their way to the kernel.
struct Batch<'a> {
    context: &'a Held,
    caller: Caller,
    iocbs: [*mut Iocb; BATCH],
    filled: usize,
}

impl Batch<'_> {
    /// Adds a shadow for the iocb whose address the program has at `at`. `alone`: nothing was
    /// submitted by this call.
    fn add(&mut self, at: usize, alone: bool) -> Result<(), isize> {
        let again = -(libc::EAGAIN as isize);
        let obj: u64 = read(at)?;
        // AIO-1: this is the only look at it.
        let iocb: Iocb = read(obj as usize)?;
        // The kernel does this, too; it costs nothing where nothing changes.
        if iocb.key != KIOCB_KEY {
            let key = KIOCB_KEY.to_ne_bytes();
            // SAFETY: the program's memory is foreign, and may be inaccessible; ours holds the key.
            let written = unsafe {
                onepass::copy_out(key.as_ptr(), (obj as usize + KEY_AT) as *mut u8, key.len())
            };
            written.map_err(|_| -(libc::EFAULT as isize))?;
        }
        let mut resfd = -1;
        if iocb.flags & IOCB_FLAG_RESFD != 0 {
            resfd = iocb.resfd as i32;
            if let Some(error) = eventfd_error(resfd) {
                return Err(error);
            }
            agent::is_peeked_at(self.context);
        }
        if self.context.full() {
            return Err(again);
        }
        let mut shadow = iocb;
        shadow.flags &= !IOCB_FLAG_RESFD;
        shadow.resfd = 0;
        let kind = self.classify(&mut shadow, alone)?;
        let Some(index) = self.context.take_shadow() else {
            if let Kind::Ours(io) = kind {
                io.cancel();
            }
            return Err(again);
        };
        shadow.data = u64::from(index);
        shadow.key = KIOCB_KEY;
        kind.begun(self.context);
        let what = What { obj, data: iocb.data, resfd, kind };
        self.iocbs[self.filled] = self.context.fill(index, shadow, what);
        self.filled += 1;
        Ok(())
    }

    /// Finds out what an iocb is, begins it if it is ours, and has the shadow ask for the right
    /// thing.
    fn classify(&self, iocb: &mut Iocb, alone: bool) -> Result<Kind, isize> {
        let dir = match iocb.opcode {
            IOCB_CMD_PREAD | IOCB_CMD_PREADV => Dir::Read,
            IOCB_CMD_PWRITE | IOCB_CMD_PWRITEV => Dir::Write,
            _ => return Ok(Kind::Other),
        };
        let fd = iocb.fildes as i32;
        let file = files::of(fd);
        // What is longer than there can be the kernel refuses.
        if !file.is_direct() || iocb.nbytes > isize::MAX as u64 {
            return Ok(Kind::Other);
        }
        if file.is_uncached() {
            if let Some(error) = uncached::refuses(iocb.rw_flags) {
                return Err(error);
            }
            let settles = !uncached::has_dontcache(file.slot());
            if !settles {
                iocb.rw_flags |= RWF_DONTCACHE;
            }
            return Ok(Kind::Uncached { file, dir, fd, offset: iocb.offset, settles });
        }
        if !io::concerns(file, dir) {
            return Ok(Kind::Direct(file, dir));
        }
        match self.begin(iocb, file, dir, alone) {
            Ok(io) => {
                self.point(iocb, io);
                Ok(Kind::Ours(io))
            }
            Err(_) if session::detects() => {
                sync::unwatched(dir);
                Ok(Kind::Direct(file, dir))
            }
            Err(Refusal::Data) => {
                // The kernel takes such an iocb, and its event says that the memory is not there.
                // It gets an address in the first page, where nothing is, instead of the program's,
                // where something may be by now.
                if iocb.opcode == IOCB_CMD_PWRITEV {
                    (iocb.opcode, iocb.buf, iocb.nbytes) = (IOCB_CMD_PWRITE, 0, PAGE as u64);
                }
                iocb.buf %= PAGE as u64;
                Ok(Kind::Direct(file, dir))
            }
            Err(Refusal::Call(error)) => Err(error),
        }
    }

    fn begin(&self, iocb: &Iocb, file: File, dir: Dir, alone: bool) -> Result<Io, Refusal> {
        let (buf, len) = (iocb.buf as usize, iocb.nbytes as usize);
        if matches!(iocb.opcode, IOCB_CMD_PREAD | IOCB_CMD_PWRITE) {
            let segs = [iovec { iov_base: buf as *mut _, iov_len: len }];
            return self.begin_on(iocb, file, dir, &segs, alone);
        }
        let mut begun = Err(Refusal::Call(0));
        let result = sync::with_vector(buf as *const iovec, len, |segs| {
            begun = self.begin_on(iocb, file, dir, segs, alone);
            0
        });
        if result < 0 { Err(Refusal::Call(result)) } else { begun }
    }

    fn begin_on(
        &self,
        iocb: &Iocb,
        file: File,
        dir: Dir,
        segs: &[iovec],
        alone: bool,
    ) -> Result<Io, Refusal> {
        let (caller, offset) = (self.caller, iocb.offset as u64);
        let request = Request { dir, engine: Engine::KernelAio, file, segs, offset, caller };
        let mut waits = 0;
        loop {
            let error = match io::begin(&request) {
                Ok(io) => return Ok(io),
                Err(error) => error,
            };
            match -error as i32 {
                libc::EFAULT => return Err(Refusal::Data),
                // Who has nothing under way here has nothing to wait for before it tries again, and
                // some programs (QEMU) do not: others have the memory, and give it back.
                libc::EAGAIN if alone && self.is_idle() && waits < PATIENCE => {
                    waits += 1;
                    sync::nap();
                }
                libc::EINVAL => {
                    ask::say(
                        Remark::Other,
                        &[b"refused: an asynchronous I/O that is larger than any private memory"],
                    );
                    return Err(Refusal::Call(error));
                }
                _ => return Err(Refusal::Call(error)),
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.context.in_flight.load(Ordering::Relaxed) == 0 && self.context.visible() == 0
    }

    /// Has the iocb ask for what the kernel is to be given.
    fn point(&self, iocb: &mut Iocb, io: Io) {
        match (iocb.opcode, io.iovs()) {
            (IOCB_CMD_PREAD | IOCB_CMD_PWRITE, [one]) => iocb.buf = one.iov_base as u64,
            (_, many) => iocb.buf = many.as_ptr() as u64,
        }
    }

    /// Sends it all; returns how many the kernel took, and the error of the first that it did not.
    fn send(&mut self) -> (usize, isize) {
        let (mut sent, mut error) = (0, 0);
        while sent < self.filled && error == 0 {
            let rest = &self.iocbs[sent..self.filled];
            // SAFETY: filled shadows, which the kernel reads, and whose memory stays until they are
            // finished; the kernel checks what the program named.
            let result = unsafe {
                syscall!(libc::SYS_io_submit, self.context.kernel(), rest.len(), rest.as_ptr())
            };
            match result {
                0 => error = -(libc::EAGAIN as isize),
                1.. => sent += result as usize,
                _ if result == -(libc::EOPNOTSUPP as isize) && self.keeps_cached(rest[0]) => {}
                _ => error = result,
            }
        }
        for iocb in &self.iocbs[sent..self.filled] {
            // SAFETY: the kernel has not taken it, so it is still ours.
            take_back(self.context, unsafe { (**iocb).data } as u32);
        }
        self.filled = 0;
        (sent, error)
    }

    /// Takes back `RWF_DONTCACHE` from a shadow whose file system has no such thing. False if it
    /// does not ask for it.
    fn keeps_cached(&self, iocb: *mut Iocb) -> bool {
        // SAFETY: a shadow's iocb that the kernel has not taken: nobody else touches it.
        let iocb = unsafe { &mut *iocb };
        let Some(shadow) = self.context.shadow(iocb.data) else { return false };
        // SAFETY: as above.
        let what = unsafe { &mut *shadow.what.get() };
        let Kind::Uncached { file, settles: settles @ false, .. } = &mut what.kind else {
            return false;
        };
        uncached::lacks_dontcache(file.slot());
        *settles = true;
        iocb.rw_flags &= !RWF_DONTCACHE;
        true
    }
}

/// Why an I/O can not begin.
enum Refusal {
    /// The call fails with this error.
    Call(isize),
    /// The I/O does, because its memory is not there.
    Data,
}

/// Reads plain data from the program's memory, once.
fn read<T: Copy>(at: usize) -> Result<T, isize> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the program's memory is foreign, and may be inaccessible; ours has room for a `T`,
    // which here are plain numbers, for which any bytes are valid.
    unsafe {
        match onepass::copy_in(at as *const u8, value.as_mut_ptr().cast(), size_of::<T>()) {
            Ok(()) => Ok(value.assume_init()),
            Err(_) => Err(-(libc::EFAULT as isize)),
        }
    }
}

/// `io_cancel`. The kernel can cancel polls only; what is cancelled has its event like any other.
pub(super) fn cancel(context: &Context, obj: usize) -> isize {
    match read::<u32>(obj.wrapping_add(KEY_AT)) {
        Ok(KIOCB_KEY) => {}
        Ok(_) => return -(libc::EINVAL as isize),
        Err(error) => return error,
    }
    // So that no handler has to wait for this thread, see `retire`.
    signals::undisturbed(|| {
        for shadow in context.used_shadows() {
            let looked = shadow.state.compare_exchange(
                Shadow::IN_FLIGHT,
                Shadow::LOOKED_AT,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if looked.is_err() {
                continue;
            }
            // SAFETY: it was in flight, so it was filled; it is not freed while it is looked at.
            let result = (unsafe { (*shadow.what.get()).obj } == obj as u64).then(|| {
                // The last argument is not used by any kernel that this runs on.
                // SAFETY: the kernel knows the iocb by its address.
                unsafe { syscall!(libc::SYS_io_cancel, context.kernel(), shadow.iocb.get(), 0) }
            });
            shadow.state.store(Shadow::IN_FLIGHT, Ordering::Release);
            if let Some(result) = result {
                return result;
            }
        }
        -(libc::EINVAL as isize)
    })
}
