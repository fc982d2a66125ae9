//! The servers that families compare, on images in memory.

use std::io;
use std::path::PathBuf;

use anyhow::bail;
use stableio_testkit::{Aio, Export, HostIo, Scratch, Serve, create, tool};

use crate::Plan;
use crate::compare::Side;

/// All load stays in this much of an image, which is written once before it is read.
pub(crate) const AREA_BYTES: u64 = 512 << 20;

/// The size of an image; only the area takes up memory.
const IMAGE_BYTES: u64 = 1 << 30;

/// Room for our array, our raw image and the peers' images.
const ROOM_BYTES: u64 = 6 << 30;

/// How a peer of the QEMU family reaches its image.
///
/// No mode is the best at every size, so that a peer runs in both, and each row is held against
/// the one that is better at it.
#[derive(Clone, Copy)]
pub(crate) enum Mode {
    /// `io_submit` with `O_DIRECT`: tmpfs is done when the call returns, without another thread.
    /// Best at small requests.
    Native,
    /// io_uring through the page cache: copies are spread over the kernel's threads. Best at
    /// large requests.
    Uring,
}

impl Mode {
    /// In the order of their numbers (`mode as usize`).
    pub(crate) const ALL: [Mode; 2] = [Mode::Native, Mode::Uring];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Native => "native",
            Mode::Uring => "io_uring",
        }
    }

    pub(crate) fn host_io(self) -> HostIo {
        match self {
            Mode::Native => HostIo { direct: true, aio: Aio::Native },
            Mode::Uring => HostIo { direct: false, aio: Aio::IoUring },
        }
    }
}

/// A place for images that costs no disk time: what is compared is the software.
pub(crate) fn scratch() -> anyhow::Result<Scratch> {
    let scratch = Scratch::with_room(ROOM_BYTES)?;
    if !scratch.is_in_memory() {
        bail!("/dev/shm has no room of {} GiB", ROOM_BYTES >> 30);
    }
    Ok(scratch)
}

/// Serves a new RAID5 array of three members.
pub(crate) fn raid5(scratch: &Scratch, export: &Export) -> io::Result<Serve> {
    let members = ["m0.img", "m1.img", "m2.img"].map(|name| scratch.path(name));
    let options = ["--level", "raid5", "--chunk", "64KiB", "--member-size", "1GiB"];
    create("bench", &options, &members)?;
    Serve::array(scratch, &members, std::slice::from_ref(export))
}

/// Serves a new image as it is.
pub(crate) fn raw(scratch: &Scratch, export: &Export) -> io::Result<Serve> {
    let image = scratch.sparse("raw.img", IMAGE_BYTES)?;
    Serve::raw(scratch, &image, std::slice::from_ref(export))
}

/// Starts our side, unless the plan is without it.
pub(crate) fn start_ours<S>(plan: &Plan, start: impl FnOnce() -> io::Result<S>) -> Side<S> {
    if plan.peers_only {
        return Err("left out (--peers-only)".to_owned());
    }
    start().map_err(|error| error.to_string())
}

/// Starts a peer in each of its modes, or says that `program` is not there.
pub(crate) fn start_peers<S>(program: &str, start: impl Fn(Mode) -> io::Result<S>) -> [Side<S>; 2] {
    Mode::ALL.map(|mode| {
        need(program)?;
        start(mode).map_err(|error| error.to_string())
    })
}

/// A new image for a peer in this mode.
pub(crate) fn peer_image(scratch: &Scratch, mode: Mode) -> io::Result<PathBuf> {
    scratch.sparse(&format!("{}.img", mode.name()), IMAGE_BYTES)
}

/// That `program` is there, or why the rows that need it are empty.
pub(crate) fn need(program: &str) -> Side<()> {
    tool(program).map(drop).ok_or_else(|| format!("{program}: not installed"))
}
