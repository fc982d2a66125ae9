//! A device that takes everything and keeps nothing: for measuring.

use stableio_mem::{Pass, SgList};
use stableio_onepass as onepass;

use crate::Outcome;
use crate::device::Device;
use crate::error::{Error, Kind, OpName};
use crate::exec::{Handle, Ticket};
use crate::limits::{Cache, Limits, Radius};
use crate::request::{Extent, Into, Op, Reply, Request};

/// Writes vanish; reads give zeros.
pub struct NullDevice {
    limits: Limits,
    worker: Handle,
}

impl NullDevice {
    /// A null device of `size` bytes.
    pub fn new(size: u64, worker: Handle) -> Self {
        let pass = Pass { streams: true, ..Pass::default() };
        Self { limits: Limits { pass, ..memory_limits(size) }, worker }
    }
}

/// The limits of a device that is memory: nothing is sampled twice.
pub(super) fn memory_limits(size: u64) -> Limits {
    Limits {
        size,
        logical: 512,
        physical: 4096,
        memory_align: 1,
        max_transfer: 1 << 20,
        atomic: 512,
        cache: Cache::WriteThrough,
        write_radius: Radius::Nobody,
        read_radius: Radius::Nobody,
        pass: Pass::default(),
    }
}

impl Device for NullDevice {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        self.worker.spawn(move || async move {
            let Request { op, memory, .. } = request;
            match op {
                Op::Read { into: Into::Pool(len), at } => {
                    let Some(mut memory) = memory else {
                        return Err(failed(Kind::Unsupported, at, len));
                    };
                    let mut buf = memory.take(len);
                    buf.zero(0..len);
                    Ok(Reply::Data(buf.freeze()))
                }
                Op::Read { into: Into::Foreign(buf), at } => zero(&buf.into(), at),
                Op::Read { into: Into::Segments(list), at } => zero(&list, at),
                Op::Map { len, .. } => Ok(Reply::Map(vec![Extent { len, data: true }])),
                _ => Ok(Reply::Done),
            }
        })
    }
}

fn zero(list: &SgList, at: u64) -> Outcome {
    for segment in list.segments() {
        // SAFETY: the list keeps the segment alive, and whoever made it wants
        // it filled.
        unsafe { onepass::zero_out(segment.addr as *mut u8, segment.len) }
            .map_err(|fault| failed(fault.into(), at, list.len()))?;
    }
    Ok(Reply::Done)
}

fn failed(kind: Kind, at: u64, len: usize) -> Error {
    Error { kind, op: OpName::Read, device: "null".into(), at, len: len as u64 }
}
