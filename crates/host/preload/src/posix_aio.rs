//! POSIX AIO (`aio_read`, `aio_write`, `lio_listio` …).
//!
//! The C library does these in threads of its own, by calls that pass by every hook. So what
//! concerns us is handed to it as a *shadow*: a control block of ours that says the same but for
//! the memory, kept in a table under the address of the program's.
//!
//! ```text
//!  aio_write(cb) ── begin ──> shadow ──> C library        cb itself is only read
//!  aio_error(cb), aio_return(cb), aio_suspend, lio_listio ── the shadow's answer ── end
//! ```
//!
//! - **PAIO-1** A control block is read once; the C library gets ours.
//! - **PAIO-2** An I/O is ended ([`Io::end`]) before the program is told that it is complete, once.
//! - **PAIO-3** The program asks in signal handlers, too: nothing here waits for a thread that a
//!   handler may have interrupted. Who ends an I/O is not interrupted; others hear "in progress"
//!   until it is done.
//! - **PAIO-4** A shadow is the C library's until it says that it is complete. When the program asks
//!   and hears so, the outcome goes to its control block, where the C library has it, and the shadow
//!   is free: nothing depends on `aio_return` being called.

mod table;

use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;

use libc::{aiocb, iovec, sigevent, timespec};
use stableio_onepass as onepass;
use stableio_session::{Engine, Remark};

use crate::ask;
use crate::files::{self, File};
use crate::gate::real;
use crate::io::{self, Dir, Io, Request};
use crate::names::{caller, hook};
use crate::pool::{PAGE, Slot};
use crate::process;
use crate::session;
use crate::site::Caller;
use crate::sync;
use crate::uncached;
use table::{Found, Kind};

/// A list that is longer than this lies in private memory while it is handed over.
const ON_STACK: usize = 16;
/// How often memory is waited for, 100 µs each.
const PATIENCE: u32 = 20_000;

pub(crate) use table::after_fork;

/// What becomes of a request of the program's.
enum Way {
    /// The C library gets it as it is.
    AsItIs,
    /// The C library gets the shadow.
    By(Found),
    /// It fails with this error number.
    Fails(c_int),
}

/// Finds out what a request is, and begins it if it concerns us.
fn begin(block: *const aiocb, opcode: Option<c_int>, caller: Caller) -> Way {
    if session::get().is_none() {
        return Way::AsItIs;
    }
    // The address is used for something new.
    if let Some(old) = table::find(block as usize)
        && !old.tell(block)
    {
        // It is still in flight.
        return Way::Fails(libc::EINVAL);
    }
    let Some(cb) = read(block) else { return Way::Fails(libc::EFAULT) };
    let dir = match opcode.unwrap_or(cb.aio_lio_opcode) {
        libc::LIO_READ => Dir::Read,
        libc::LIO_WRITE => Dir::Write,
        _ => return Way::AsItIs,
    };
    let file = files::of(cb.aio_fildes);
    if !file.is_direct() {
        return Way::AsItIs;
    }
    if !file.is_uncached() && !io::concerns(file, dir) {
        // Nobody tells what becomes of it.
        file.count(dir, cb.aio_nbytes as isize);
        return Way::AsItIs;
    }
    let Some(shadow) = table::claim(block as usize) else { return Way::Fails(libc::EAGAIN) };
    match fill(shadow, cb, file, dir, caller) {
        Ok(way) => way,
        Err(error) => {
            shadow.not_filled();
            Way::Fails(error)
        }
    }
}

/// Fills a shadow for the program's control block.
fn fill(shadow: Found, mut cb: aiocb, file: File, dir: Dir, caller: Caller) -> Result<Way, c_int> {
    cb.aio_lio_opcode = if dir == Dir::Read { libc::LIO_READ } else { libc::LIO_WRITE };
    if file.is_uncached() {
        shadow.fill(cb, Kind::Uncached(file, dir));
        return Ok(Way::By(shadow));
    }
    let segs = [iovec { iov_base: cb.aio_buf, iov_len: cb.aio_nbytes }];
    let request = Request {
        dir,
        engine: Engine::PosixAio,
        file,
        segs: &segs,
        offset: cb.aio_offset as u64,
        caller,
    };
    match begin_patiently(&request) {
        Ok(io) => {
            cb.aio_buf = io.iovs()[0].iov_base;
            shadow.fill(cb, Kind::Ours(io));
            Ok(Way::By(shadow))
        }
        Err(_) if session::detects() => {
            sync::unwatched(dir);
            file.count(dir, cb.aio_nbytes as isize);
            shadow.not_filled();
            Ok(Way::AsItIs)
        }
        Err(error) if error == -(libc::EFAULT as isize) => {
            // The request is taken, and fails when it is done. It gets an address in the first page,
            // where nothing is, instead of the program's, where something may be by now.
            cb.aio_buf = (cb.aio_buf as usize % PAGE) as *mut c_void;
            shadow.fill(cb, Kind::Direct(file, dir));
            Ok(Way::By(shadow))
        }
        Err(error) => {
            if error == -(libc::EINVAL as isize) {
                ask::say(
                    Remark::Other,
                    &[b"refused: an asynchronous I/O that is larger than any private memory"],
                );
            }
            Err(-error as c_int)
        }
    }
}

/// Begins an I/O. If memory is used up by others, ends those that are complete, of which the program
/// may never ask, and waits for the rest.
fn begin_patiently(request: &Request) -> Result<Io, isize> {
    let mut waits = 0;
    loop {
        let result = io::begin(request);
        let again = result == Err(-(libc::EAGAIN as isize));
        if !again || waits == PATIENCE {
            return result;
        }
        if waits > 0 {
            sync::nap();
        }
        table::look_at_all();
        waits += 1;
    }
}

/// Reads a control block of the program's, once.
fn read(block: *const aiocb) -> Option<aiocb> {
    let mut ours = MaybeUninit::<aiocb>::uninit();
    // SAFETY: the program's memory is foreign, and may be inaccessible; ours has room for it, and
    // it is plain data, for which any bytes are valid.
    unsafe {
        onepass::copy_in(block.cast(), ours.as_mut_ptr().cast(), size_of::<aiocb>()).ok()?;
        Some(ours.assume_init())
    }
}

/// Gives an error as the C library does: -1, with `errno`.
fn fail(error: c_int) -> c_int {
    crate::gate::answer(-(error as isize)) as c_int
}

/// Defines the hooks that submit one request.
macro_rules! submit {
    ($($name:ident)+ => $inner:ident, $real:literal, $opcode:ident) => {
        hook!($($name)+ => $inner);
        unsafe extern "C" fn $inner(
            block: *mut aiocb, _: usize, _: usize, _: usize, _: usize, stack: *const usize,
        ) -> c_int {
            process::arm_thread();
            // SAFETY: the hook passed its stack pointer.
            let caller = unsafe { caller(stack) };
            let way = begin(block, Some(libc::$opcode), caller);
            let next = match way {
                Way::AsItIs => block,
                Way::By(shadow) => shadow.block(),
                Way::Fails(error) => return fail(error),
            };
            // SAFETY: the program's own call, or one with a control block that stays (PAIO-4).
            let result = unsafe { real!($real as fn(*mut aiocb) -> c_int)(next) };
            if let Way::By(shadow) = way && result != 0 {
                shadow.not_taken();
            }
            result
        }
    };
}

submit!(aio_read aio_read64 => on_read, c"aio_read64", LIO_READ);
submit!(aio_write aio_write64 => on_write, c"aio_write64", LIO_WRITE);

hook!(lio_listio lio_listio64 => on_list);
unsafe extern "C" fn on_list(
    mode: c_int,
    list: *const *mut aiocb,
    count: c_int,
    event: *mut sigevent,
    _: usize,
    stack: *const usize,
) -> c_int {
    process::arm_thread();
    // SAFETY: the hook passed its stack pointer.
    let caller = unsafe { caller(stack) };
    let next = |list: *const *mut aiocb| {
        // SAFETY: the program's own call, or one with control blocks that stay (PAIO-4).
        unsafe {
            real!(c"lio_listio64" as fn(c_int, *const *mut aiocb, c_int, *mut sigevent) -> c_int)(
                mode, list, count, event,
            )
        }
    };
    if session::get().is_none() || count < 0 {
        return next(list);
    }
    let result = with_list(list, count, |blocks| {
        let ours: *const [*mut aiocb] = blocks;
        for i in 0..blocks.len() {
            if blocks[i].is_null() {
                continue;
            }
            match begin(blocks[i], None, caller) {
                Way::AsItIs => {}
                Way::By(shadow) => blocks[i] = shadow.block(),
                Way::Fails(error) => {
                    // Nothing was handed over, so nothing of it has happened.
                    take_back(&blocks[..i]);
                    return fail(error);
                }
            }
        }
        let result = next(ours.cast());
        if mode == libc::LIO_WAIT {
            look_at(blocks);
        }
        result
    });
    result.unwrap_or_else(fail)
}

/// Takes back what was begun for a list that is not handed over.
fn take_back(blocks: &[*mut aiocb]) {
    for block in blocks {
        if let Some(shadow) = table::of_block(*block) {
            shadow.not_taken();
        }
    }
}

/// Ends those of these that are complete: the program is about to be told.
fn look_at(blocks: &[*mut aiocb]) {
    for block in blocks {
        if let Some(shadow) = table::of_block(*block) {
            shadow.is_complete();
        }
    }
}

/// Calls `f` with a copy of a list of control blocks, taken once.
///
/// # Errors
///
/// An error number.
fn with_list(
    list: *const *mut aiocb,
    count: c_int,
    f: impl FnOnce(&mut [*mut aiocb]) -> c_int,
) -> Result<c_int, c_int> {
    let count = usize::try_from(count).unwrap_or(0);
    let bytes = count * size_of::<*mut aiocb>();
    let mut on_stack = [core::ptr::null_mut(); ON_STACK];
    let (slot, at) = if count <= ON_STACK {
        (None, on_stack.as_mut_ptr())
    } else {
        let slot = Slot::take(bytes).ok_or(libc::EAGAIN)?;
        (Some(slot), slot.start().cast::<*mut aiocb>())
    };
    // SAFETY: the list is the program's, foreign; the copy is ours, large enough, and used only
    // once it is filled.
    let result = unsafe {
        match onepass::copy_in(list.cast(), at.cast(), bytes) {
            Ok(()) => Ok(f(core::slice::from_raw_parts_mut(at, count))),
            Err(_) => Err(libc::EFAULT),
        }
    };
    if let Some(slot) = slot {
        slot.release();
    }
    result
}

/// Defines functions that stand in front of the C library's, each under two names.
macro_rules! in_front {
    ($($name:ident $name64:ident = $inner:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)+) => {$(
        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: the program's own call.
            unsafe { $inner($($arg),*) }
        }

        /// Stands in front of the C library's.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name64($($arg: $ty),*) -> $ret {
            // SAFETY: the program's own call.
            unsafe { $inner($($arg),*) }
        }
    )+};
}

in_front! {
    aio_error aio_error64 = error(block: *const aiocb) -> c_int;
    aio_return aio_return64 = result(block: *mut aiocb) -> isize;
    aio_cancel aio_cancel64 = cancel(fd: c_int, block: *mut aiocb) -> c_int;
    aio_fsync aio_fsync64 = fsync(operation: c_int, block: *mut aiocb) -> c_int;
    aio_suspend aio_suspend64 =
        suspend(list: *const *mut aiocb, count: c_int, time: *const timespec) -> c_int;
}

/// # Safety
///
/// As `aio_error`, here and below as the function that it stands for.
unsafe fn error(block: *const aiocb) -> c_int {
    if let Some(shadow) = table::find(block as usize)
        && !shadow.tell(block)
    {
        return libc::EINPROGRESS;
    }
    // SAFETY: the program's own call.
    unsafe { real!(c"aio_error64" as fn(*const aiocb) -> c_int)(block) }
}

unsafe fn result(block: *mut aiocb) -> isize {
    if let Some(shadow) = table::find(block as usize) {
        // If it is not complete, the program must not ask, and is told nothing that means anything.
        shadow.tell(block);
    }
    // SAFETY: the program's own call.
    unsafe { real!(c"aio_return64" as fn(*mut aiocb) -> isize)(block) }
}

unsafe fn cancel(fd: c_int, block: *mut aiocb) -> c_int {
    let shadow = table::find(block as usize);
    let next = shadow.map_or(block, Found::block);
    // SAFETY: the program's own call, or one with a control block that stays.
    let result = unsafe { real!(c"aio_cancel64" as fn(c_int, *mut aiocb) -> c_int)(fd, next) };
    // The answer may be that this one is complete, or that all are.
    match shadow {
        Some(shadow) => {
            shadow.is_complete();
        }
        None if block.is_null() => table::look_at_all(),
        None => {}
    }
    result
}

unsafe fn fsync(operation: c_int, block: *mut aiocb) -> c_int {
    // The address is used for something new.
    if let Some(old) = table::find(block as usize)
        && !old.tell(block)
    {
        return fail(libc::EINVAL);
    }
    // SAFETY: the program's own call.
    unsafe { real!(c"aio_fsync64" as fn(c_int, *mut aiocb) -> c_int)(operation, block) }
}

unsafe fn suspend(list: *const *mut aiocb, count: c_int, time: *const timespec) -> c_int {
    let next = |list: *const *mut aiocb| {
        // SAFETY: the program's own call, or one with control blocks that stay.
        unsafe {
            real!(c"aio_suspend64" as fn(*const *mut aiocb, c_int, *const timespec) -> c_int)(
                list, count, time,
            )
        }
    };
    if !table::is_used() || count < 0 {
        return next(list);
    }
    let result = with_list(list, count, |blocks| {
        for block in &mut *blocks {
            if let Some(shadow) = table::find(*block as usize) {
                *block = shadow.block();
            }
        }
        let result = next(blocks.as_ptr());
        look_at(blocks);
        result
    });
    result.unwrap_or_else(fail)
}

/// Ends what a shadow stands for, with the C library's result; returns the program's.
fn end(kind: Kind, cb: &aiocb, result: isize) -> isize {
    match kind {
        Kind::Ours(io) => Io::end(io, result),
        Kind::Direct(file, dir) => {
            file.count(dir, result);
            result
        }
        Kind::Uncached(file, dir) => {
            let settled = match result {
                1.. => uncached::settle(cb.aio_fildes, dir, cb.aio_offset, result),
                _ => result,
            };
            // If the program has closed the descriptor meanwhile, it has given up hearing of
            // writeback from it.
            let result = if settled == -(libc::EBADF as isize) { result } else { settled };
            file.count(dir, result);
            if dir == Dir::Write
                && let Some(shared) = file.shared()
            {
                shared.fallen_back.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
            }
            result
        }
    }
}
