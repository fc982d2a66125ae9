//! One virtqueue: requests out, completions in, in any order.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{EventFd, QueueNotifier, iovec};

use super::memory::SharedMemory;

/// Descriptors per queue. A request of one segment takes three.
pub(super) const QUEUE_SIZE: u16 = 256;

/// The longest that a healthy device takes over a request.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device speaks of sectors, whatever its block size is.
const SECTOR: u64 = 512;

/// A piece of the shared memory; a request's data is a list of them.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where it begins in the memory, in bytes.
    pub at: usize,
    /// Its length in bytes.
    pub len: usize,
}

/// What a request asks for. Offsets, on the device, and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Read from `offset` into the segments.
    Read(u64, &'a [Segment]),
    /// Write the segments at `offset`.
    Write(u64, &'a [Segment]),
    /// Make durable what was written.
    Flush,
    /// Forget `len` bytes at `offset`.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make `len` bytes at `offset` read as zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// Tell the device's name.
    GetId,
}

/// The end of a request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The tag that it was submitted with.
    pub tag: u64,
    /// The status byte: `VIRTIO_BLK_S_OK` is 0, `_IOERR` 1, `_UNSUPP` 2.
    pub status: u8,
    /// The device's name, of a [`Command::GetId`].
    pub id: [u8; 20],
}

impl Completion {
    /// The status as Linux' driver reports it: EIO or ENOTSUP; EPROTO if it is none.
    pub fn result(&self) -> io::Result<()> {
        match self.status {
            0 => Ok(()),
            1 => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
            2 => Err(io::Error::from_raw_os_error(rustix::io::Errno::NOTSUP.raw_os_error())),
            _ => Err(io::Error::from_raw_os_error(rustix::io::Errno::PROTO.raw_os_error())),
        }
    }
}

/// A queue of a device.
pub struct Queue {
    ring: Virtqueue<'static, Slot>,
    doorbell: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    memory: Arc<SharedMemory>,
    /// The tags of the requests in flight, by descriptor.
    tags: Vec<Option<u64>>,
}

/// What a request shares with the device apart from its data (VIRTIO 1.2, section 5.2.6).
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Slot {
    header: Header,
    extent: Extent,
    id: [u8; 20],
    status: u8,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Extent {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Queue {
    pub(super) fn new(
        mut ring: Virtqueue<'static, Slot>,
        doorbell: Box<dyn QueueNotifier>,
        completed: Arc<EventFd>,
        memory: Arc<SharedMemory>,
    ) -> Queue {
        // Without it, and with event indices negotiated, only the first completion wakes us.
        ring.set_used_notif_enabled(true);
        Queue { ring, doorbell, completed, memory, tags: vec![None; QUEUE_SIZE.into()] }
    }

    /// Puts a request into the ring; the device learns of it with the next [`kick`](Self::kick).
    ///
    /// From then until its completion the device reads, or writes, the segments. The caller may
    /// change them all the same: they are atomic words, and to see what the device makes of that
    /// is what this client is for.
    pub fn submit(&mut self, tag: u64, command: Command<'_>) -> io::Result<()> {
        let memory = &self.memory;
        let descriptor = self.ring.add_request(|slot, add| {
            *slot = Slot::new(command);
            add(part(&mut slot.header), false)?;
            match command {
                Command::Read(_, segments) => {
                    segments.iter().try_for_each(|s| add(segment(memory, s), true))?
                }
                Command::Write(_, segments) => {
                    segments.iter().try_for_each(|s| add(segment(memory, s), false))?
                }
                Command::Discard { .. } | Command::WriteZeroes { .. } => {
                    add(part(&mut slot.extent), false)?
                }
                Command::GetId => add(part(&mut slot.id), true)?,
                Command::Flush => {}
            }
            add(part(&mut slot.status), true)
        })?;
        let earlier = self.tags[usize::from(descriptor)].replace(tag);
        assert!(earlier.is_none(), "descriptor {descriptor} is in flight twice");
        Ok(())
    }

    /// Tells the device of what was submitted, if it wants to be told.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() { self.doorbell.notify() } else { Ok(()) }
    }

    /// A completion that is there already.
    ///
    /// One for a request that is not in flight is an error: the device completed it twice.
    pub fn completion(&mut self) -> io::Result<Option<Completion>> {
        let Some(used) = self.ring.completions().next() else { return Ok(None) };
        match self.tags[usize::from(used.id)].take() {
            Some(tag) => Ok(Some(Completion { tag, status: used.req.status, id: used.req.id })),
            None => Err(io::Error::other("the device completed a request twice")),
        }
    }

    /// Kicks, and waits for a completion, for as long as a healthy device could take over it.
    pub fn wait(&mut self) -> io::Result<Completion> {
        self.wait_within(PATIENCE)
    }

    /// As [`wait`](Self::wait), but gives up with `TimedOut` after `patience` without a sign of
    /// the device. A device that died gives none: its socket says so, its queues do not.
    pub fn wait_within(&mut self, patience: Duration) -> io::Result<Completion> {
        self.kick()?;
        loop {
            if let Some(completion) = self.completion()? {
                return Ok(completion);
            }
            self.sleep(patience)?;
        }
    }

    /// Waits until the device has rung.
    fn sleep(&self, patience: Duration) -> io::Result<()> {
        let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
        let mut rung = [PollFd::new(&*self.completed, PollFlags::IN)];
        if poll(&mut rung, Some(&timeout))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the device does not answer"));
        }
        self.completed.read().map(drop)
    }
}

impl Slot {
    /// A status that no device sets, so that one which forgets to is found out.
    const UNANSWERED: u8 = 0xff;

    fn new(command: Command<'_>) -> Slot {
        let mut slot = Slot { status: Self::UNANSWERED, ..Slot::default() };
        let extent = |offset, len, flags| Extent {
            sector: offset / SECTOR,
            sectors: (len / SECTOR) as u32,
            flags,
        };
        // VIRTIO_BLK_T_*.
        (slot.header.kind, slot.header.sector, slot.extent) = match command {
            Command::Read(offset, _) => (0, offset / SECTOR, Extent::default()),
            Command::Write(offset, _) => (1, offset / SECTOR, Extent::default()),
            Command::Flush => (4, 0, Extent::default()),
            Command::GetId => (8, 0, Extent::default()),
            Command::Discard { offset, len } => (11, 0, extent(offset, len, 0)),
            Command::WriteZeroes { offset, len, unmap } => {
                (13, 0, extent(offset, len, u32::from(unmap)))
            }
        };
        slot
    }
}

/// A part of a request's slot, for a descriptor.
fn part<T>(part: &mut T) -> iovec {
    iovec { iov_base: (&raw mut *part).cast(), iov_len: size_of::<T>() }
}

/// A segment of the memory, for a descriptor.
fn segment(memory: &SharedMemory, segment: &Segment) -> iovec {
    let Segment { at, len } = *segment;
    assert!(at + len <= memory.len(), "{segment:?} is not in the memory");
    iovec { iov_base: memory.address(at).cast(), iov_len: len }
}
