//! The session that this process is in.

use core::ffi::CStr;
use core::mem::{MaybeUninit, zeroed};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use stableio_session::{ASK, ENV, Mode, STATE, Session};

use crate::gate::syscall;

static SESSION: AtomicPtr<Session> = AtomicPtr::new(core::ptr::null_mut());
static DETECTS: AtomicBool = AtomicBool::new(false);
static mut ADDRESS: MaybeUninit<libc::sockaddr_un> = MaybeUninit::zeroed();

/// The session, if the process is in one.
pub(crate) fn get() -> Option<&'static Session> {
    // SAFETY: null, or the mapping that `attach` made and that stays.
    unsafe { SESSION.load(Ordering::Acquire).as_ref() }
}

/// Whether it is one of `detect`.
pub(crate) fn detects() -> bool {
    DETECTS.load(Ordering::Relaxed)
}

/// Whether what can not be protected is let through.
pub(crate) fn best_effort() -> bool {
    get().is_none_or(|session| session.best_effort.load(Ordering::Relaxed) != 0)
}

/// Where the launcher listens.
pub(crate) fn ask_address() -> Option<&'static libc::sockaddr_un> {
    get()?;
    // SAFETY: written once, by `attach`, before the session was published.
    Some(unsafe { &*(&raw const ADDRESS).cast::<libc::sockaddr_un>() })
}

/// Maps the session that the environment names. Called once, by the constructor.
pub(crate) fn attach() -> Option<&'static Session> {
    // SAFETY: the name is a C string, and nobody changes the environment in a constructor.
    let dir = unsafe { libc::getenv(ENV.as_ptr()) };
    if dir.is_null() {
        return None;
    }
    // SAFETY: getenv returns a C string.
    let dir = unsafe { CStr::from_ptr(dir) };
    let session = map(dir)?;
    let mode = session.mode()?;
    DETECTS.store(mode == Mode::Detect, Ordering::Relaxed);
    // SAFETY: nobody reads it before the session is published, below.
    let address = unsafe { &mut *(&raw mut ADDRESS).cast::<libc::sockaddr_un>() };
    address.sun_family = libc::AF_UNIX as u16;
    join(dir, ASK, &mut address.sun_path)?;
    SESSION.store(core::ptr::from_ref(session).cast_mut(), Ordering::Release);
    Some(session)
}

fn map(dir: &CStr) -> Option<&'static Session> {
    let mut path = [0; 256];
    join(dir, STATE, &mut path)?;
    let flags = libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: `path` is a C string.
    let fd = unsafe { syscall!(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return None;
    }
    // SAFETY: plain data, for which zeros are valid; the kernel fills it.
    let stat = unsafe {
        let mut stat: libc::stat = zeroed();
        syscall!(libc::SYS_fstat, fd, &raw mut stat);
        stat
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new shared mapping of the file, then the descriptor is not needed any more.
    let at = unsafe {
        let at = syscall!(libc::SYS_mmap, 0, Session::BYTES, prot, libc::MAP_SHARED, fd, 0);
        syscall!(libc::SYS_close, fd);
        at
    };
    if at < 0 || (stat.st_size as usize) < Session::BYTES {
        return None;
    }
    // SAFETY: mapped for good, of this size, aligned to a page, and made of atomics, for which any
    // bytes are valid.
    Some(unsafe { &*(at as *const Session) })
}

/// `dir/name` as a C string; `None` if it does not fit.
fn join(dir: &CStr, name: &CStr, into: &mut [libc::c_char]) -> Option<()> {
    let (dir, name) = (dir.to_bytes(), name.to_bytes_with_nul());
    if dir.len() + 1 + name.len() > into.len() {
        return None;
    }
    let bytes = dir.iter().chain(b"/").chain(name);
    for (to, from) in into.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Some(())
}
