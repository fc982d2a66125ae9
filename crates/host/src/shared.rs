//! The session's shared memory, as the launcher and its supervisor have it.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::Ordering;

use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::time::{ClockId, clock_gettime};
use stableio_session::{MAGIC, Mode, Session};

/// What a session is told at its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) mode: Mode,
    pub(crate) best_effort: bool,
    pub(crate) pool_bytes: u64,
}

/// Makes the file of the shared memory and maps it for the life of this process.
pub(crate) fn create(path: &Path, settings: Settings) -> io::Result<&'static Session> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(Session::BYTES as u64)?;
    // SAFETY: a fresh mapping of a file of exactly this size. It is never unmapped.
    let at = unsafe {
        mmap(
            ptr::null_mut(),
            Session::BYTES,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )?
    };
    // SAFETY: mapped above, page-aligned, zeroed by the kernel, and all zeros is a valid session,
    // all of whose fields are atomics: others may change them at any time.
    let session = unsafe { &*at.cast::<Session>() };
    session.mode.store(settings.mode as u32, Ordering::Relaxed);
    session.best_effort.store(u32::from(settings.best_effort), Ordering::Relaxed);
    session.pool_bytes.store(settings.pool_bytes, Ordering::Relaxed);
    session.cookie.store(random()? | COOKIE_MARK, Ordering::Relaxed);
    session.started_ns.store(now_ns(), Ordering::Relaxed);
    session.magic.store(MAGIC, Ordering::Release);
    Ok(session)
}

/// In every cookie: no argument of a 32-bit program has the upper half, and no small number is
/// one by accident.
const COOKIE_MARK: u64 = 1 << 63;

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: the kernel writes at most the 8 bytes that are there.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(io::Error::last_os_error()) }
}

/// Now, as the session counts time.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
