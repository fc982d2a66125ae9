//! A device in memory: for measuring and for tests.

use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use stableio_mem::SgList;
use stableio_onepass as onepass;

use super::null::memory_limits;
use crate::Outcome;
use crate::device::Device;
use crate::error::{Error, Kind, OpName};
use crate::exec::{Handle, Ticket};
use crate::limits::Limits;
use crate::request::{Extent, Into, Op, Reply, Request};

/// A RAM disk. Its bytes go when the last handle does.
pub struct RamDevice {
    limits: Limits,
    worker: Handle,
    disk: Arc<Disk>,
}

/// A mapping that only the device's worker loads and stores, through raw
/// pointers.
struct Disk {
    addr: usize,
    len: usize,
}

impl RamDevice {
    /// A disk of `size` bytes, all zero. Memory is used as it is written.
    ///
    /// # Errors
    ///
    /// The system's, when the mapping is refused.
    pub fn new(size: u64, worker: Handle) -> std::io::Result<Self> {
        let len = size as usize;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh anonymous mapping touches no memory of ours.
        let addr = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        Ok(Self {
            limits: memory_limits(size),
            worker,
            disk: Arc::new(Disk { addr: addr as usize, len }),
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; whoever works on it holds
        // the `Arc`.
        let _ = unsafe { munmap(self.addr as *mut _, self.len) };
    }
}

impl Device for RamDevice {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let disk = self.disk.clone();
        self.worker.spawn(move || async move {
            let (op, at, len) = request.op.range();
            disk.run(request).map_err(|kind| Error { kind, op, device: "ram".into(), at, len })
        })
    }
}

impl Disk {
    fn run(&self, request: Request) -> Result<Reply, Kind> {
        let Request { op, memory, .. } = request;
        let (name, at, len) = op.range();
        if !matches!(name, OpName::Flush)
            && at.checked_add(len).is_none_or(|end| end > self.len as u64)
        {
            return Err(Kind::OutOfRange { size: self.len as u64 });
        }
        let place = (self.addr + at as usize) as *mut u8;
        match op {
            Op::Read { into, .. } => match into {
                Into::Foreign(buf) => fill(&buf.into(), place).map(|()| Reply::Done),
                Into::Segments(list) => fill(&list, place).map(|()| Reply::Done),
                Into::Pool(len) => {
                    let mut buf = memory.ok_or(Kind::Unsupported)?.take(len);
                    fill(&buf.target(0..len), place)?;
                    Ok(Reply::Data(buf.freeze()))
                }
            },
            Op::Write { body, .. } => {
                let mut to = place;
                for segment in body.into_segments().segments() {
                    // SAFETY: the segment is kept alive by the list; the range
                    // was checked above, and only this worker stores there.
                    unsafe {
                        onepass::copy_in(segment.addr as *const u8, to, segment.len)?;
                        to = to.add(segment.len);
                    }
                }
                Ok(Reply::Done)
            }
            Op::WriteZeroes { .. } | Op::Discard { .. } => {
                // SAFETY: as for a write.
                unsafe { onepass::zero_out(place, len as usize)? };
                Ok(Reply::Done)
            }
            Op::Flush => Ok(Reply::Done),
            Op::Map { .. } => Ok(Reply::Map(vec![Extent { len, data: true }])),
        }
    }
}

fn fill(list: &SgList, mut from: *const u8) -> Result<(), Kind> {
    for segment in list.segments() {
        // SAFETY: the segment is kept alive by the list; the disk's range was
        // checked by the caller.
        unsafe {
            onepass::copy_out(from, segment.addr as *mut u8, segment.len)?;
            from = from.add(segment.len);
        }
    }
    Ok(())
}
