//! A guest in this process: the client of a vhost-user-blk device.
//!
//! It does what a virtual machine does, without one: it shares its memory with the device, puts
//! requests into virtqueues, and may change the memory of a request while the device has it.
//! The rings are those of `virtio-driver`; what a request is, is ours, so that every kind of it
//! can be sent and every answer be seen.
//!
//! [`Guest::read`], [`Guest::write`] and their like take one request at a time, for tests of what
//! a device does. [`Guest::queues`] gives the queues themselves, for tests of what it does when
//! many requests, or a program that changes its buffers, are at it; [`Stamper`] loads them and
//! knows afterwards what must be there. [`Guest::run`] measures.

mod memory;
mod queue;
mod stamps;
mod workload;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioFeatureFlags, VirtioTransport,
};

pub use memory::SharedMemory;
pub use queue::{Command, Completion, Queue, Segment};
pub use stamps::{Owes, Stamper};
pub use workload::{Op, Order, Throughput, Workload};

use queue::{QUEUE_SIZE, Slot};

use crate::Random;

type Transport = dyn VirtioTransport<VirtioBlkConfig, Slot>;

/// The largest request of [`Guest::fill`].
const FILL_BYTES: usize = 1 << 20;

/// A connection to a device, its queues and the memory shared with it.
pub struct Guest {
    // Before the transport, which owns the memory that the rings lie in.
    queues: Vec<Queue>,
    memory: Arc<SharedMemory>,
    transport: Box<Transport>,
}

impl Guest {
    /// Connects to the device at `socket` with this many queues, and shares `memory_bytes` of
    /// zeroed memory with it.
    pub fn connect(socket: &Path, queues: usize, memory_bytes: usize) -> io::Result<Guest> {
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut transport: Box<Transport> = Box::new(VhostUser::new(path, accepted_features())?);
        let memory = SharedMemory::new(memory_bytes)?;
        transport.map_mem_region(memory.address(0) as usize, memory.len(), memory.raw_fd(), 0)?;
        let rings = set_up_rings(&mut *transport, queues)?;
        let queues = rings.into_iter().enumerate().map(|(index, ring)| {
            let doorbell = transport.get_submission_notifier(index);
            Queue::new(ring, doorbell, transport.get_completion_fd(index), memory.clone())
        });
        let queues = queues.collect();
        Ok(Guest { queues, memory, transport })
    }

    /// The memory, to look into and to change whenever one likes.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The queues, to have many requests in flight.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// The device's configuration space.
    pub fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// The device's size in bytes.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.config()?.capacity.to_native() * 512)
    }

    /// The feature bits that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// Reads `len` bytes at `offset`, through the beginning of the memory.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.call(Command::Read(offset, &[Segment { at: 0, len }]))?;
        Ok(self.memory.load(0..len))
    }

    /// The first `len` bytes by blocks of 4096, MiB by MiB, and block by block
    /// where that fails; none for a block that is an error. The memory has at
    /// least a MiB, of which `len` is a multiple.
    pub fn read_blocks(&mut self, len: usize) -> io::Result<Vec<Option<Vec<u8>>>> {
        const MIB: usize = 1 << 20;
        const BLOCK: usize = 4096;
        let mut blocks = Vec::new();
        for piece in (0..len).step_by(MIB) {
            match self.read(piece as u64, MIB) {
                Ok(bytes) => blocks.extend(bytes.chunks(BLOCK).map(|block| Some(block.to_vec()))),
                Err(_) => {
                    let places = (piece..piece + MIB).step_by(BLOCK);
                    blocks.extend(places.map(|at| self.read(at as u64, BLOCK).ok()));
                }
            }
        }
        Ok(blocks)
    }

    /// Writes `bytes` at `offset`, through the beginning of the memory.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.store(0, bytes);
        self.call(Command::Write(offset, &[Segment { at: 0, len: bytes.len() }])).map(drop)
    }

    /// Makes durable what was written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(Command::Flush).map(drop)
    }

    /// Lets the device forget `len` bytes at `offset`.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.call(Command::Discard { offset, len }).map(drop)
    }

    /// Makes `len` bytes at `offset` read as zeroes; the space is kept unless `unmap`.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call(Command::WriteZeroes { offset, len, unmap }).map(drop)
    }

    /// The device's name, without the zeroes after it.
    pub fn get_id(&mut self) -> io::Result<String> {
        let id = self.call(Command::GetId)?.id;
        let name = id.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    /// Writes the first `area` bytes of the device once, with bytes that do not compress.
    pub fn fill(&mut self, area: u64) -> io::Result<()> {
        self.scramble(FILL_BYTES);
        let mut offset = 0;
        while offset < area {
            let len = FILL_BYTES.min((area - offset) as usize);
            self.call(Command::Write(offset, &[Segment { at: 0, len }]))?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Runs a workload; see there.
    pub fn run(&mut self, workload: &Workload) -> io::Result<Throughput> {
        let memory = workload.memory_per_queue() * self.queues.len();
        assert!(memory <= self.memory.len(), "the workload needs {memory} bytes of memory");
        if workload.op == Op::Write {
            self.scramble(memory);
        }
        workload.run(&mut self.queues)
    }

    /// One request, and nothing else in flight.
    fn call(&mut self, command: Command<'_>) -> io::Result<Completion> {
        let queue = &mut self.queues[0];
        queue.submit(0, command)?;
        let completion = queue.wait()?;
        completion.result()?;
        Ok(completion)
    }

    fn scramble(&self, bytes: usize) {
        let mut random = Random::new(1);
        for word in self.memory.range(0..bytes) {
            word.store(random.word(), Ordering::Relaxed);
        }
    }
}

/// What we can deal with, which is all that Linux' driver can but packed rings and indirection.
fn accepted_features() -> u64 {
    let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    ring.bits() | VirtioBlkFeatureFlags::all().bits()
}

/// Allocates the queues' rings in memory that the device sees, and starts the queues.
fn set_up_rings(
    transport: &mut Transport,
    queues: usize,
) -> io::Result<Vec<Virtqueue<'static, Slot>>> {
    if transport.max_queues().is_some_and(|max| max < queues) {
        let text = format!("the device has fewer than {queues} queues");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let layout = VirtqueueLayout::new::<Slot>(queues, QUEUE_SIZE.into(), features)?;
    let translators: Vec<_> = (0..queues).map(|_| transport.iova_translator()).collect();
    let memory: *mut [u8] = transport.alloc_queue_mem(&layout)?;
    // SAFETY: the transport keeps this mapping, and never touches it, until it is dropped; `Guest`
    // drops the rings before it. Nobody else has a reference to the memory.
    let memory: &'static mut [u8] = unsafe { &mut *memory };
    let rings = memory
        .chunks_exact_mut(layout.end_offset)
        .zip(translators)
        .map(|(memory, translator)| Virtqueue::new(translator, memory, QUEUE_SIZE, features))
        .collect::<io::Result<Vec<_>>>()?;
    transport.setup_queues(&rings)?;
    Ok(rings)
}
