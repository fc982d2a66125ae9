//! io_uring: `io_uring_setup`, `io_uring_enter`, `io_uring_register`.
//!
//! The program has its ring, maps its memory, and takes completions from there without a call. So
//! what is to happen between the kernel and the program happens before the kernel sees an entry,
//! in the call that submits it; and what is to happen before the program sees a completion takes a
//! second ring, of ours.
//!
//! | I/O | way |
//! |---|---|
//! | write, bounced | in place: its entry points to the copy while the kernel takes it |
//! | read into private memory; all that `detect` watches | mediated: by the ring behind (`back`) |
//! | write that can not be told from others by its `user_data` | mediated |
//! | any of these in a chain with a mediated one | mediated |
//!
//! - **URING-1** Each entry is read once, before the kernel reads it; what is decided is about what
//!   was read, and the kernel gets that.
//! - **URING-2** After the call an entry is what it was before: programs may submit it again as it
//!   lies there.
//! - **URING-3** The copy of an in-place write is given back after its completion was seen in the
//!   ring's memory, never on a guess (`seen`, SEEN-1).
//! - **URING-4** A ring that nothing is known of submits nothing for a protected program.
//!
//! A [`Ring`] belongs to the descriptors that mean it (`files` counts them), and to the threads
//! that registered it. Its `lock` is held while entries are looked at and submitted, never while
//! somebody waits for completions.
//!
//! | file | what |
//! |---|---|
//! | `uring/submit.rs` | entries on their way to the kernel |
//! | `uring/judge.rs` | what is done with each of them |
//! | `uring/back.rs` | the ring behind, its agent, the messages |
//! | `uring/seen.rs` | what is in flight, by `user_data` |
//! | `uring/files.rs` | registered files |
//! | `uring/shortcut.rs` | from the instruction to here without a signal |
//! | `uring/map.rs`, `abi.rs`, `lock.rs` | the ring's memory, the kernel's numbers, a lock |

mod abi;
mod back;
mod files;
mod judge;
mod lock;
mod map;
mod seen;
mod shortcut;
mod submit;

use core::cell::{Cell, UnsafeCell};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use stableio_onepass as onepass;
use stableio_session::Remark;

use abi::{Params, RsrcRegister, RsrcUpdate, Sqe};
use back::Back;
use lock::Lock;
use map::Map;
use submit::Inner;

use crate::ask;
use crate::gate::{call, call_with_cookie, syscall};
use crate::session;
use crate::signals;
use crate::site::Caller;

/// Rings that a process has at a time.
const RINGS: usize = 256;

const FREE: u32 = 0;
const MADE: u32 = 1;
const LIVE: u32 = 2;

/// A ring of the program.
struct Ring {
    state: AtomicU32,
    /// Descriptors, and registrations, that mean it.
    refs: AtomicU32,
    lock: Lock,
    /// Under `lock`.
    inner: UnsafeCell<Inner>,
    back: Back,
}

// SAFETY: `inner` is touched under `lock`.
unsafe impl Sync for Ring {}

impl Ring {
    /// The ring behind this one, made when it is first needed. Under `lock`.
    fn make_back(&'static self) -> Option<&'static Back> {
        if !self.back.is_ready() {
            let number = TABLE.iter().position(|ring| core::ptr::eq(ring, self))?;
            let fd = crate::files::some_ring_fd(number as u32)?;
            if !self.back.make(fd) {
                return None;
            }
        }
        Some(&self.back)
    }
}

static TABLE: [Ring; RINGS] = [const {
    Ring {
        state: AtomicU32::new(FREE),
        refs: AtomicU32::new(0),
        lock: Lock::new(),
        inner: UnsafeCell::new(Inner::NONE),
        back: Back::new(),
    }
}; RINGS];

/// Whether rings get completions that no entry of theirs asked for (SEEN-2).
static FOREIGN_COMPLETIONS: AtomicBool = AtomicBool::new(false);
/// Whether there ever was a ring.
static ANY: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether the thread is in a ring's critical section ([`inside`]).
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// Number plus one of the ring that the thread registered at each index.
    static REGISTERED: [Cell<u32>; abi::RING_FDS] =
        const { [const { Cell::new(0) }; abi::RING_FDS] };
}

/// The way that a call came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// A function: it may wait, and signal handlers may interrupt it.
    Hook,
    /// The net's handler: all signals are blocked, and what waits is replayed.
    Net,
}

/// What is left to do of an `io_uring_enter`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next {
    /// Nothing: this is the result.
    Done(isize),
    /// All, as it is.
    Kernel,
    /// This call, whose result is not the program's: that is `result`.
    Wait { args: [usize; 6], result: isize },
}

/// Does a call of a hook, if it concerns us.
///
/// # Safety
///
/// It is the program's own, with its own arguments.
pub(crate) unsafe fn take(number: i64, args: &[usize; 6], caller: Caller) -> Option<isize> {
    session::get()?;
    match number {
        // SAFETY: the caller's promise.
        libc::SYS_io_uring_setup => unsafe { setup(args) },
        // SAFETY: the caller's promise.
        libc::SYS_io_uring_register => unsafe { register(args) },
        libc::SYS_io_uring_enter => {
            // SAFETY: the caller's promise.
            let next = unsafe { enter(args, caller, Way::Hook) };
            match next {
                Next::Done(result) => Some(result),
                Next::Kernel => None,
                Next::Wait { args, result } => {
                    // SAFETY: the program's own call, in two: this is the part that waits.
                    unsafe {
                        if let Next::Kernel = enter(&args, caller, Way::Hook) {
                            call(number, args);
                        }
                    }
                    Some(result)
                }
            }
        }
        _ => None,
    }
}

/// The submitting part of `io_uring_enter`.
///
/// The kernel submits, and waits only if it could submit all; then the number submitted is the
/// result, whatever came of the waiting.
///
/// # Safety
///
/// As [`take`].
pub(crate) unsafe fn enter(args: &[usize; 6], caller: Caller, way: Way) -> Next {
    if session::get().is_none() {
        return Next::Kernel;
    }
    if way == Way::Net {
        shortcut::look_at(caller.address);
    }
    let (fd, wanted, flags) = (args[0] as i32, args[1] as u32, args[3] as u32);
    let Some(ring) = find(fd, flags & abi::ENTER_REGISTERED_RING != 0) else {
        return if wanted > 0 && is_ring(fd, flags) { unknown_ring() } else { Next::Kernel };
    };
    if wanted == 0 {
        if ring.back.is_ready() && flags & abi::ENTER_GETEVENTS != 0 {
            return pass_on(ring, args, way);
        }
        return Next::Kernel;
    }
    let result = inside(|| {
        let _held = ring.lock.take();
        // SAFETY: under `lock`.
        let inner = unsafe { &mut *ring.inner.get() };
        let submitted = inner.submit(ring, args, caller);
        if flags & abi::ENTER_GETEVENTS != 0 {
            ring.back.reap();
        }
        submitted
    });
    match result {
        // A handler of the program submits while it interrupts a submission.
        None => Next::Done(-(libc::EAGAIN as isize)),
        Some(None) => Next::Kernel,
        Some(Some(result)) if flags & abi::ENTER_GETEVENTS != 0 && result == wanted as isize => {
            let mut args = *args;
            args[1] = 0;
            Next::Wait { args, result }
        }
        Some(Some(result)) => Next::Done(result),
    }
}

/// Waiting, where completions come by the ring behind: passes on what is there; if nothing is, and
/// nothing can come otherwise, waits for it here and not for the agent.
fn pass_on(ring: &'static Ring, args: &[usize; 6], way: Way) -> Next {
    let leads = inside(|| {
        let reaped = ring.back.reap();
        if args[2] == 0 {
            // Who asks again and again needs no agent.
            ring.back.replaces_agent();
        }
        if reaped > 0 || way == Way::Net || args[2] == 0 {
            return false;
        }
        let simple = args[3] as u32 == abi::ENTER_GETEVENTS;
        let Some(_held) = ring.lock.try_take().filter(|_| simple) else { return false };
        // SAFETY: under `lock`.
        let inner = unsafe { &mut *ring.inner.get() };
        inner.look();
        inner.waits_behind(ring.back.in_flight())
    });
    if leads == Some(true) {
        // The size of a mask counts only where there is one.
        let mask_len = if args[4] == 0 { 0 } else { args[5] as u32 };
        if let Some(error @ ..0) = ring.back.lead(args[4] as u64, mask_len) {
            return Next::Done(error);
        }
        inside(|| ring.back.reap());
    }
    Next::Kernel
}

/// Runs `f`, which takes locks. `None`, and it is not run, if this thread is in such a section
/// already: a signal handler of the program has interrupted it. (To block signals would take two
/// system calls each time, as long as a small I/O.)
fn inside<T>(f: impl FnOnce() -> T) -> Option<T> {
    INSIDE.with(|inside| {
        if inside.replace(true) {
            return None;
        }
        let result = f();
        inside.set(false);
        Some(result)
    })
}

/// Says that something is not possible. True if it is refused, false if it passes unprotected.
fn refuses(remark: Remark, what: &[u8]) -> bool {
    let passes = session::best_effort() || session::detects();
    let verb: &[u8] = match (passes, session::detects()) {
        (true, true) => b": not watched: ",
        (true, false) => b": not protected: ",
        (false, _) => b": refused: ",
    };
    let mut name = [0; 16];
    ask::say(remark, &[ask::program(&mut name), verb, what]);
    !passes
}

#[cold]
fn unknown_ring() -> Next {
    let what = b"a ring that it did not make itself (of its parent, or received)";
    if refuses(Remark::Ring, what) {
        return Next::Done(-(libc::EPERM as isize));
    }
    Next::Kernel
}

/// Whether a descriptor is a ring: only those answer so to nothing at all.
fn is_ring(fd: i32, flags: u32) -> bool {
    let flags = flags & abi::ENTER_REGISTERED_RING;
    // SAFETY: asks for nothing.
    unsafe { syscall!(libc::SYS_io_uring_enter, fd, 0, 0, flags, 0, 0) >= 0 }
}

/// The record of the ring that a descriptor, or an index of the thread's registered rings, means.
fn find(fd: i32, registered: bool) -> Option<&'static Ring> {
    let number = if registered {
        let index = usize::try_from(fd).ok().filter(|index| *index < abi::RING_FDS)?;
        REGISTERED.with(|rings| rings[index].get()).checked_sub(1)?
    } else {
        match crate::files::ring_of(fd) {
            Some(number) => number,
            None => find_by_comparison(fd)?,
        }
    };
    TABLE.get(number as usize).filter(|ring| ring.state.load(Ordering::Acquire) == LIVE)
}

/// A descriptor that means a known ring without our knowledge: received, say, or come by a way
/// that has no hook.
#[cold]
fn find_by_comparison(fd: i32) -> Option<u32> {
    /// `KCMP_FILE` of linux/kcmp.h.
    const KCMP_FILE: usize = 0;
    if fd < 0 || !ANY.load(Ordering::Relaxed) {
        return None;
    }
    let pid = std::process::id();
    let number = TABLE.iter().position(|ring| {
        let known = ring.back.target();
        ring.state.load(Ordering::Acquire) == LIVE
            && known >= 0
            // SAFETY: a system call without memory.
            && unsafe { syscall!(libc::SYS_kcmp, pid, pid, KCMP_FILE, fd, known) } == 0
    })?;
    crate::files::set_ring(fd, number as u32);
    Some(number as u32)
}

/// # Safety
///
/// As [`take`].
unsafe fn setup(args: &[usize; 6]) -> Option<isize> {
    let mut params = Params::ZERO;
    let size = size_of::<Params>();
    let (theirs, ours) = (args[1] as *mut u8, (&raw mut params).cast::<u8>());
    // SAFETY: the program's memory is foreign, ours is of this size.
    if unsafe { onepass::copy_in(theirs, ours, size) }.is_err() {
        return Some(-(libc::EFAULT as isize));
    }
    let covered = may_be_covered(&params);
    if let Err(error) = covered
        && refuses(error.0, error.1)
    {
        return Some(-(libc::EPERM as isize));
    }
    // SAFETY: the program's own call; the parameters are ours.
    let fd = unsafe {
        let at = (&raw mut params) as usize;
        call_with_cookie(libc::SYS_io_uring_setup, [args[0], at, 0, 0, 0])
    };
    if fd < 0 {
        return Some(fd);
    }
    let registered = params.flags & abi::SETUP_REGISTERED_FD_ONLY != 0;
    // SAFETY: as above.
    if unsafe { onepass::copy_out(ours, theirs, size) }.is_err() {
        if !registered {
            crate::files::close(fd as i32);
        }
        return Some(-(libc::EFAULT as isize));
    }
    if registered {
        return Some(fd);
    }
    crate::files::forget(fd as i32);
    ANY.store(true, Ordering::Relaxed);
    if covered.is_ok()
        && !signals::undisturbed(|| adopt(fd as i32, &params))
        && refuses(Remark::Ring, b"more rings, or larger ones, than it can keep account of")
    {
        crate::files::close(fd as i32);
        return Some(-(libc::ENOMEM as isize));
    }
    Some(fd)
}

/// Whether a ring with these parameters can be covered; else why not.
fn may_be_covered(params: &Params) -> Result<(), (Remark, &'static [u8])> {
    if params.flags & abi::SETUP_SQPOLL != 0 {
        return Err((
            Remark::SqPoll,
            b"a ring whose submissions a kernel thread polls for (IORING_SETUP_SQPOLL)",
        ));
    }
    if params.flags & (abi::SETUP_NO_MMAP | abi::SETUP_REGISTERED_FD_ONLY) != 0 {
        return Err((Remark::Ring, b"a ring in the program's own memory (IORING_SETUP_NO_MMAP)"));
    }
    if params.flags & !abi::SETUP_KNOWN != 0 {
        return Err((Remark::Ring, b"a ring with flags that this version does not know"));
    }
    Ok(())
}

/// Makes a record of a new ring. False if there is no room.
fn adopt(fd: i32, params: &Params) -> bool {
    let free = TABLE.iter().position(|ring| {
        !ring.back.is_ready()
            && ring.state.compare_exchange(FREE, MADE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    });
    let Some(number) = free else { return false };
    let ring = &TABLE[number];
    let inner = Map::new(fd, params).and_then(Inner::new);
    let Some(inner) = inner else {
        ring.state.store(FREE, Ordering::Release);
        return false;
    };
    {
        let _held = ring.lock.take();
        // SAFETY: under `lock`.
        unsafe { *ring.inner.get() = inner };
    }
    ring.refs.store(0, Ordering::Relaxed);
    ring.state.store(LIVE, Ordering::Release);
    crate::files::set_ring(fd, number as u32);
    true
}

/// Takes note that one more descriptor means this ring.
pub(crate) fn joined(number: u32) {
    if let Some(ring) = TABLE.get(number as usize) {
        ring.refs.fetch_add(1, Ordering::AcqRel);
    }
}

/// Takes note that one less does; lets go of the ring after the last.
pub(crate) fn left(number: u32) {
    let Some(ring) = TABLE.get(number as usize) else { return };
    let less =
        ring.refs.fetch_update(Ordering::AcqRel, Ordering::Acquire, |refs| refs.checked_sub(1));
    if less == Ok(1) {
        signals::undisturbed(|| inside(|| let_go(ring)));
    }
}

#[cold]
fn let_go(ring: &Ring) {
    let _held = ring.lock.take();
    if ring.state.compare_exchange(LIVE, MADE, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return;
    }
    // SAFETY: under `lock`.
    let inner = unsafe { &mut *ring.inner.get() };
    let idle = inner.drain();
    if ring.back.is_ready() {
        ring.back.close();
    }
    if idle {
        inner.free();
        ring.state.store(FREE, Ordering::Release);
    }
    // Else a copy is under I/O that nobody will tell us the end of: the record stays as it is.
}

/// # Safety
///
/// As [`take`].
unsafe fn register(args: &[usize; 6]) -> Option<isize> {
    let [fd, operation, arg, count, ..] = *args;
    let by_index = operation as u32 & abi::REGISTER_USE_REGISTERED_RING != 0;
    let operation = operation as u32 & !abi::REGISTER_USE_REGISTERED_RING;
    if operation == abi::REGISTER_SEND_MSG_RING {
        FOREIGN_COMPLETIONS.store(true, Ordering::Relaxed);
        return None;
    }
    let ring = find(fd as i32, by_index)?;
    let mut args = *args;
    match operation {
        abi::REGISTER_RESIZE_RINGS => {
            // As a kernel that has no such thing (before Linux 6.13).
            Some(-(libc::EINVAL as isize))
        }
        abi::REGISTER_RESTRICTIONS => {
            let what = b"a ring that restricts its own operations";
            refuses(Remark::Ring, what).then_some(-(libc::EINVAL as isize))
        }
        abi::REGISTER_EVENTFD_ASYNC => {
            // It tells of what completes in a worker of the kernel; a message is posted elsewhere.
            args[1] = (args[1] & !0xff) | abi::REGISTER_EVENTFD as usize;
            // SAFETY: the program's own call.
            Some(unsafe { call(libc::SYS_io_uring_register, args) })
        }
        abi::REGISTER_RING_FDS | abi::UNREGISTER_RING_FDS => {
            // SAFETY: the caller's promise.
            Some(unsafe { register_rings(&args, operation == abi::REGISTER_RING_FDS) })
        }
        abi::REGISTER_FILES
        | abi::REGISTER_FILES2
        | abi::REGISTER_FILES_UPDATE
        | abi::REGISTER_FILES_UPDATE2
        | abi::UNREGISTER_FILES => inside(|| {
            let _held = ring.lock.take();
            // SAFETY: the program's own call; under `lock`.
            let (result, inner) =
                unsafe { (call(libc::SYS_io_uring_register, args), &mut *ring.inner.get()) };
            if result >= 0 {
                files_registered(ring, inner, operation, arg as u64, count as u32);
            }
            result
        })
        .or(Some(-(libc::EAGAIN as isize))),
        _ => None,
    }
}

/// Takes note of what the kernel has just registered.
fn files_registered(ring: &'static Ring, inner: &mut Inner, operation: u32, arg: u64, count: u32) {
    let back = || ring.make_back();
    match operation {
        abi::REGISTER_FILES => {
            if inner.files.begin(count) {
                inner.files.set_list(0, arg, count, back);
            }
        }
        abi::REGISTER_FILES2 => {
            let Some(list) = read::<RsrcRegister>(arg) else { return };
            if inner.files.begin(list.nr) && list.data != 0 {
                inner.files.set_list(0, list.data, list.nr, back);
            }
        }
        abi::REGISTER_FILES_UPDATE | abi::REGISTER_FILES_UPDATE2 => {
            // The first two members are the same in both structures.
            let Some([first, data]) = read::<[u64; 2]>(arg) else { return };
            let nr = if operation == abi::REGISTER_FILES_UPDATE {
                count
            } else {
                read::<RsrcUpdate>(arg).map_or(0, |update| update.nr)
            };
            inner.files.set_list(first as u32, data, nr, back);
        }
        _ => inner.files.free(),
    }
}

/// A structure of numbers in the program's memory.
fn read<T: Copy>(at: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the program's memory is foreign, the copy is ours; all bytes of what is read here
    // are numbers.
    unsafe {
        onepass::copy_in(at as *const u8, value.as_mut_ptr().cast(), size_of::<T>()).ok()?;
        Some(value.assume_init())
    }
}

/// # Safety
///
/// As [`take`].
unsafe fn register_rings(args: &[usize; 6], adds: bool) -> isize {
    let entry_at = |i: usize| (args[2] + i * 16) as u64;
    // `data` is the descriptor; the kernel writes `offset` where it was to pick the index.
    let before: [Option<[u64; 2]>; abi::RING_FDS] =
        core::array::from_fn(|i| if i < args[3] { read(entry_at(i)) } else { None });
    // SAFETY: the program's own call.
    let done = unsafe { call(libc::SYS_io_uring_register, *args) };
    let done_entries = usize::try_from(done).unwrap_or(0);
    for (i, was) in before.into_iter().enumerate().take(done_entries) {
        let (Some(was), Some(is)) = (was, read::<[u64; 2]>(entry_at(i))) else { continue };
        let index = is[0] as u32 as usize;
        let ring = if adds { crate::files::ring_of(was[1] as i32) } else { None };
        REGISTERED.with(|rings| {
            let Some(place) = rings.get(index) else { return };
            if let Some(number) = ring {
                joined(number);
            }
            if let Some(old) = place.replace(ring.map_or(0, |number| number + 1)).checked_sub(1) {
                left(old);
            }
        });
    }
    done
}

/// Whether the kernel's NOP gives a result that it is told (Linux 6.10).
fn injects() -> bool {
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    match KNOWN.load(Ordering::Relaxed) {
        0 => {
            let works = try_injecting().unwrap_or(false);
            KNOWN.store(1 + u8::from(works), Ordering::Relaxed);
            works
        }
        known => known == 2,
    }
}

/// Tries it, on a ring of its own.
#[cold]
fn try_injecting() -> Option<bool> {
    let mut params = Params::ZERO;
    let at = (&raw mut params) as usize;
    // SAFETY: the parameters are ours; the ring lives until it is closed here.
    unsafe {
        let fd = call_with_cookie(libc::SYS_io_uring_setup, [1, at, 0, 0, 0]);
        if fd < 0 {
            return None;
        }
        let map = Map::new(fd as i32, &params);
        let mut works = None;
        if let Some(map) = map {
            map.number_array();
            if let Some(entry) = map.sqe(0) {
                let told = Sqe::ZERO.with_result(77);
                map::patch(entry, &map::load(entry), &told);
                map.sq_tail().store(1, Ordering::Release);
                syscall!(libc::SYS_io_uring_enter, fd, 1, 1, abi::ENTER_GETEVENTS, 0, 0);
                works = map.cqe(0).map(|(cqe, _)| map.cq_tail() == 1 && cqe.res == 77);
            }
            map.unmap();
        }
        syscall!(libc::SYS_close, fd);
        works
    }
}

/// A forked child has none of its parent's rings: what it inherited of them it must not use, as
/// its parent's copies could not be told from its own.
pub(crate) fn after_fork() {
    if !ANY.load(Ordering::Relaxed) {
        return;
    }
    for ring in &TABLE {
        ring.lock.reset();
        if ring.state.swap(FREE, Ordering::Relaxed) != FREE {
            // SAFETY: only this thread is there.
            unsafe { (*ring.inner.get()).free() };
        }
        ring.refs.store(0, Ordering::Relaxed);
        ring.back.after_fork();
    }
    REGISTERED.with(|rings| rings.iter().for_each(|place| place.set(0)));
    crate::files::forget_rings();
}
