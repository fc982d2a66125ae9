//! Threads, children and new programs: the protection goes with them.

use core::cell::Cell;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::sync::atomic::{AtomicU32, Ordering};

use stableio_session::{ENV, Remark};

use crate::gate::{answer, real, syscall};
use crate::{aio, ask, io, net, pool, posix_aio, session, signals, uring};

thread_local! {
    /// Whether the net is spread under this thread.
    static ARMED: Cell<bool> = const { Cell::new(false) };
    /// The thread's number; 0: not asked yet.
    static THREAD: Cell<u32> = const { Cell::new(0) };
}

/// Spreads the net under this thread if it is not (threads that the C library makes for itself
/// come by no hook of ours).
#[inline]
pub(crate) fn arm_thread() {
    ARMED.with(|armed| {
        // Initialization functions of other libraries come by before there is a session.
        if !armed.get() && session::get().is_some() {
            armed.set(true);
            arm();
        }
    });
}

#[cold]
fn arm() {
    if session::get().is_none() {
        return;
    }
    signals::unblock();
    if !net::arm() {
        ask::say(
            Remark::NoNet,
            &[b"this kernel has no syscall user dispatch (Linux 5.11): system calls that do not \
                go through the C library are not covered"],
        );
    }
}

/// The number of this process, asked for once: the C library asks the kernel each time.
pub(crate) fn id() -> u32 {
    match PROCESS.load(Ordering::Relaxed) {
        0 => {
            let id = std::process::id();
            PROCESS.store(id, Ordering::Relaxed);
            id
        }
        id => id,
    }
}

static PROCESS: AtomicU32 = AtomicU32::new(0);

/// This thread's number.
pub(crate) fn thread_id() -> u32 {
    THREAD.with(|thread| {
        if thread.get() == 0 {
            // SAFETY: a system call without memory.
            thread.set(unsafe { syscall!(libc::SYS_gettid) } as u32);
        }
        thread.get()
    })
}

/// Makes a forked child one of the session: the parent's I/Os are not its own, and nothing but the
/// calling thread is there.
pub(crate) fn after_fork() {
    THREAD.with(|thread| thread.set(0));
    PROCESS.store(0, Ordering::Relaxed);
    ARMED.with(|armed| armed.set(true));
    io::after_fork();
    pool::after_fork();
    aio::after_fork();
    posix_aio::after_fork();
    uring::after_fork();
    arm();
}

/// Has [`after_fork`] called in each child that the C library makes.
pub(crate) fn follow_forks() {
    unsafe extern "C" fn child() {
        after_fork();
    }
    // SAFETY: a function without arguments, that stays.
    unsafe { libc::pthread_atfork(None, None, Some(child)) };
}

/// What a new thread is to do.
struct Start {
    function: extern "C" fn(*mut c_void) -> *mut c_void,
    arg: *mut c_void,
}

extern "C" fn begin(start: *mut c_void) -> *mut c_void {
    // SAFETY: made by `pthread_create` below, for this thread alone.
    let start = unsafe { Box::from_raw(start.cast::<Start>()) };
    arm_thread();
    let Start { function, arg } = *start;
    function(arg)
}

/// Stands in front of the C library's: the new thread arms itself before it runs.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    function: extern "C" fn(*mut c_void) -> *mut c_void,
    arg: *mut c_void,
) -> c_int {
    type Create = unsafe extern "C" fn(
        *mut libc::pthread_t,
        *const libc::pthread_attr_t,
        extern "C" fn(*mut c_void) -> *mut c_void,
        *mut c_void,
    ) -> c_int;
    // SAFETY: the C library's function of this name has this signature.
    let create: Create = unsafe { core::mem::transmute(crate::gate::next(c"pthread_create")) };
    if session::get().is_none() {
        // SAFETY: the program's own call.
        return unsafe { create(thread, attributes, function, arg) };
    }
    let start = Box::into_raw(Box::new(Start { function, arg }));
    // SAFETY: the program's own call, but for where the thread begins.
    let result = unsafe { create(thread, attributes, begin, start.cast()) };
    if result != 0 {
        // SAFETY: there is no thread that would take it.
        drop(unsafe { Box::from_raw(start) });
    }
    result
}

/// Starts a thread of the C library's that does not belong to the program's: without its signals.
/// False if there can be none.
pub(crate) fn spawn(function: extern "C" fn(*mut c_void) -> *mut c_void, arg: *mut c_void) -> bool {
    signals::undisturbed(|| {
        let mut thread = 0;
        // SAFETY: `pthread_create` here is the hook above, which arms the thread; nobody joins it.
        unsafe {
            pthread_create(&raw mut thread, core::ptr::null(), function, arg) == 0
                && libc::pthread_detach(thread) == 0
        }
    })
}

/// The variables that a new program needs to be in the session.
const VARIABLES: [&CStr; 2] = [c"LD_PRELOAD", ENV];

/// Calls `f` with an environment that has our variables: the given one if it does.
///
/// # Safety
///
/// `environment` is null or a vector as `execve` takes it.
unsafe fn with_environment<T>(
    environment: *const *const c_char,
    f: impl FnOnce(*const *const c_char) -> T,
) -> T {
    // SAFETY: the caller's promise.
    let (count, missing) = unsafe { look_through(environment) };
    if session::get().is_none() || !missing {
        return f(environment);
    }
    // As `execve` itself, this has to work where nothing can be allocated: in a child that shares
    // its parent's memory. The mapping goes with the exec, or stays if that fails.
    let bytes = (count + 3) * size_of::<*const c_char>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, of room for all entries, ours, and the end.
    unsafe {
        let at = syscall!(libc::SYS_mmap, 0, bytes, prot, flags, -1isize, 0);
        if at < 0 {
            return f(environment);
        }
        let vector = at as *mut *const c_char;
        let mut filled = 0;
        for i in 0..count {
            let entry = *environment.add(i);
            if !VARIABLES.iter().any(|name| names(entry, name)) {
                vector.add(filled).write(entry);
                filled += 1;
            }
        }
        for ours in OUR_ENVIRONMENT.iter() {
            vector.add(filled).write(ours.as_ptr().cast());
            filled += 1;
        }
        let result = f(vector);
        syscall!(libc::SYS_munmap, at, bytes);
        result
    }
}

/// How many entries there are, and whether one of ours is missing.
///
/// # Safety
///
/// As [`with_environment`].
unsafe fn look_through(environment: *const *const c_char) -> (usize, bool) {
    let (mut count, mut there) = (0, [false; VARIABLES.len()]);
    if environment.is_null() {
        return (0, true);
    }
    // SAFETY: the vector ends with a null.
    unsafe {
        while !(*environment.add(count)).is_null() {
            for (there, name) in there.iter_mut().zip(VARIABLES) {
                *there |= names(*environment.add(count), name);
            }
            count += 1;
        }
    }
    (count, there.contains(&false))
}

/// Whether an entry sets this variable.
///
/// # Safety
///
/// `entry` is a C string.
unsafe fn names(entry: *const c_char, name: &CStr) -> bool {
    // SAFETY: the caller's promise; the comparison ends at the first difference.
    name.to_bytes()
        .iter()
        .chain(b"=")
        .enumerate()
        .all(|(i, byte)| unsafe { *entry.add(i) } as u8 == *byte)
}

/// `NAME=value` of our variables as they were when the library was loaded, each with its end.
static OUR_ENVIRONMENT: [Entry; 2] = [const { Entry::new() }; 2];

struct Entry(core::cell::UnsafeCell<[u8; 512]>);

// SAFETY: written by the constructor, before there are threads; read afterwards.
unsafe impl Sync for Entry {}

impl Entry {
    const fn new() -> Entry {
        Entry(core::cell::UnsafeCell::new([0; 512]))
    }

    fn as_ptr(&self) -> *const u8 {
        self.0.get().cast()
    }
}

/// Keeps our variables, for programs that are started without them. For the constructor.
pub(crate) fn keep_environment() {
    for (entry, name) in OUR_ENVIRONMENT.iter().zip(VARIABLES) {
        // SAFETY: a C string; nobody changes the environment, or reads the entry, in a constructor.
        unsafe {
            let value = libc::getenv(name.as_ptr());
            if value.is_null() {
                continue;
            }
            let value = CStr::from_ptr(value).to_bytes();
            let room = &mut *entry.0.get();
            let bytes = name.to_bytes().iter().chain(b"=").chain(value);
            for (to, from) in room.iter_mut().take(511).zip(bytes) {
                *to = *from;
            }
        }
    }
}

/// `execve` and `execveat` by number. `None`: they go to the kernel as they are.
///
/// # Safety
///
/// `args` are those of the system call, from the program.
pub(crate) unsafe fn take_exec(number: i64, args: &[usize; 6]) -> Option<isize> {
    let at = if number == libc::SYS_execve { 2 } else { 3 };
    let mut args = *args;
    // SAFETY: the program's own call.
    unsafe {
        with_environment(args[at] as *const *const c_char, |environment| {
            args[at] = environment as usize;
            Some(crate::gate::call(number, args))
        })
    }
}

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// Stands in front of the C library's: the new program stays in the session.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn execve(
    path: *const c_char,
    args: *const *const c_char,
    environment: *const *const c_char,
) -> c_int {
    // SAFETY: the program's own call.
    let result = unsafe {
        with_environment(environment, |environment| {
            syscall!(libc::SYS_execve, path, args, environment)
        })
    };
    answer(result) as c_int
}

/// Stands in front of the C library's: the new program stays in the session.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn execv(path: *const c_char, args: *const *const c_char) -> c_int {
    // SAFETY: the program's own call.
    unsafe { execve(path, args, environ) }
}

/// Stands in front of the C library's: the new program stays in the session.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn execvpe(
    file: *const c_char,
    args: *const *const c_char,
    environment: *const *const c_char,
) -> c_int {
    // SAFETY: the program's own call.
    unsafe {
        with_environment(environment, |environment| {
            real!(
                c"execvpe"
                    as fn(*const c_char, *const *const c_char, *const *const c_char) -> c_int
            )(file, args, environment)
        })
    }
}

/// Stands in front of the C library's: the new program stays in the session.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn execvp(file: *const c_char, args: *const *const c_char) -> c_int {
    // SAFETY: the program's own call.
    unsafe { execvpe(file, args, environ) }
}

/// Defines the functions that start a program in a child.
macro_rules! posix_spawn {
    ($($name:ident, $real:literal;)+) => {$(
        /// Stands in front of the C library's: the new program stays in the session.
        ///
        /// # Safety
        ///
        /// As the C library's.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            pid: *mut libc::pid_t,
            path: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            args: *const *const c_char,
            environment: *const *const c_char,
        ) -> c_int {
            // SAFETY: the program's own call.
            unsafe {
                with_environment(environment, |environment| {
                    real!($real as fn(
                        *mut libc::pid_t, *const c_char, *const c_void, *const c_void,
                        *const *const c_char, *const *const c_char,
                    ) -> c_int)(pid, path, actions, attributes, args, environment)
                })
            }
        }
    )+};
}

posix_spawn! {
    posix_spawn, c"posix_spawn";
    posix_spawnp, c"posix_spawnp";
}
