//! A device that takes everything and keeps nothing: for measuring.

use stableio_mem::Pass;

use crate::device::Device;
use crate::exec::{Handle, Ticket};
use crate::limits::{Cache, Limits, Radius};
use crate::request::{Extent, Into, Op, Reply, Request};
use crate::{Outcome, error::Kind};

/// Writes vanish; reads give zeros (into the pool) or leave the target as it
/// is (elsewhere).
pub struct NullDevice {
    limits: Limits,
    worker: Handle,
}

impl NullDevice {
    /// A null device of `size` bytes.
    pub fn new(size: u64, worker: Handle) -> Self {
        Self { limits: memory_limits(size), worker }
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
            let Request { op, memory } = request;
            match op {
                Op::Read { into: Into::Pool(len), at } => {
                    let Some(mut memory) = memory else {
                        let (kind, op) = (Kind::Unsupported, crate::OpName::Read);
                        return Err(crate::Error {
                            kind,
                            op,
                            device: "null".into(),
                            at,
                            len: len as u64,
                        });
                    };
                    let mut buf = memory.take(len);
                    buf.zero(0..len);
                    Ok(Reply::Data(buf.freeze()))
                }
                Op::Map { len, .. } => Ok(Reply::Map(vec![Extent { len, data: true }])),
                _ => Ok(Reply::Done),
            }
        })
    }
}
