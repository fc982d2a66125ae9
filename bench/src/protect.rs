//! What protection costs: the library in this process, from memory that may change at any time,
//! against the same memory declared stable.
//!
//! Protected, a write is copied, summed and folded into parity in one pass, and what goes on is
//! the copy. Declared stable, it is summed where it lies, and goes on as it is. All else is the
//! same: the array, its devices, the buffers, the offsets.
//!
//! Then the way of declared memory beside a loop by hand: that what protection is compared with
//! is no slow thing itself.
//!
//! Over `null` it is the software alone, with all of its costs in the ratio; over `ram` a copy is
//! added to both sides, as any medium adds something.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use stableio_array::array::ArrayOptions;
use stableio_array::superblock::Id;
use stableio_array::{Array, Assembly, Attached, Geometry, Level, RoleEntry, Superblock};
use stableio_block::dev::{NullDevice, RamDevice};
use stableio_block::{Body, Device, Error, Handle, Request, Stack, Worker, exec};
use stableio_mem::{ForeignBuf, Grant, Pool, Segment, StableBuf};
use stableio_testkit::vhost::SharedMemory;

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare};
use crate::declared;

pub(crate) const NAME: &str = "protect";
pub(crate) const ABOUT: &str =
    "writes from memory that may change, against the same memory declared stable";

const PEER: &str = "memory declared stable";

/// Writes in flight.
const DEPTH: usize = 8;
/// Load stays in this much of an array: more than caches hold.
const AREA_BYTES: u64 = 256 << 20;
/// The size of a member.
const MEMBER_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: u64 = 64 << 10;
/// The largest write.
const LARGEST: usize = 1 << 20;

/// What the members are.
#[derive(Clone, Copy)]
enum Medium {
    Null,
    Ram,
}

const ARRAYS: [(Medium, Level, [&str; 3]); 4] = [
    (
        Medium::Null,
        Level::Raid5,
        ["null-raid5-write-4k", "null-raid5-write-64k", "null-raid5-write-1m"],
    ),
    (
        Medium::Null,
        Level::Single,
        ["null-single-write-4k", "null-single-write-64k", "null-single-write-1m"],
    ),
    (
        Medium::Ram,
        Level::Raid5,
        ["ram-raid5-write-4k", "ram-raid5-write-64k", "ram-raid5-write-1m"],
    ),
    (
        Medium::Ram,
        Level::Single,
        ["ram-single-write-4k", "ram-single-write-64k", "ram-single-write-1m"],
    ),
];

/// In the order of the names.
const BLOCKS: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];
/// What they must reach over `null`.
const TARGETS: [f64; 3] = [0.9, 0.9, 0.85];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (medium, level, names) in ARRAYS {
        let bed = Bed::new(medium, level)?;
        let mut ours: Side<Stack> = match plan.peers_only {
            true => Err("left out (--peers-only)".to_owned()),
            false => Ok(bed.stack.clone()),
        };
        let mut peer = Ok(bed.stack.clone().with_grant(Grant::by_administrator()));
        for ((name, block), target) in names.into_iter().zip(BLOCKS).zip(TARGETS) {
            if !plan.wants(name) {
                continue;
            }
            let target = Some(target).filter(|_| matches!(medium, Medium::Null));
            let case = Case { family: NAME, name, unit: Unit::GbPerS, target };
            rows.push(compare(case, &mut ours, &mut peer, PEER, |stack| {
                bed.sample(stack, block, plan.sample)
            }));
        }
        bed.array.close()?;
    }
    rows.extend(declared::run(plan, NAME)?);
    Ok(rows)
}

/// An array over devices in this process, and a program's memory.
struct Bed {
    array: Array,
    /// Without a grant.
    stack: Stack,
    /// Zeros: what `null` gives back must match its guard, wherever a write reads what it lacks.
    /// No kernel asks what it sums.
    memory: Arc<SharedMemory>,
    worker: Worker,
}

impl Bed {
    fn new(medium: Medium, level: Level) -> anyhow::Result<Self> {
        let worker = Worker::start("protect")?;
        let assembly = assembly(level)?;
        let members = assembly.superblock.geometry.members;
        let attached = (0..members).map(|_| {
            let device = Some(medium.device(worker.handle())?);
            Ok(Attached { name: String::new(), device, incoming: None })
        });
        let attached = attached.collect::<io::Result<_>>()?;
        let array = Array::over(&assembly, attached, ArrayOptions::default(), worker.handle())?;
        let pool = Pool::new(64 << 20)?;
        let stack = Stack::new("protect", array.device().clone(), pool, worker.handle().clone());
        let bed = Self { array, stack, memory: SharedMemory::new(DEPTH * LARGEST)?, worker };
        bed.fill()?;
        Ok(bed)
    }

    /// Writes the area once, so that every sample finds the same.
    fn fill(&self) -> Result<(), Error> {
        for at in (0..AREA_BYTES).step_by(LARGEST) {
            let zeros = StableBuf::from_owned(vec![0; LARGEST]);
            self.stack.submit(Request::write(at, Body::Stable(zeros), false)).wait()?;
        }
        Ok(())
    }

    /// GB/s of writes of `block` bytes, all over the area. They begin on the worker, as a front
    /// end's do.
    fn sample(&self, stack: &mut Stack, block: usize, length: Duration) -> io::Result<f64> {
        let before = Counts::of(stack);
        let (stack_there, memory) = (stack.clone(), self.memory.clone());
        let ticket = self.worker.handle().spawn(move || async move {
            let load = Rc::new(Load {
                stack: stack_there,
                memory,
                block,
                until: Instant::now() + length,
                done: Cell::new(0),
                random: RefCell::new(1),
            });
            let began = Instant::now();
            let writers: Vec<_> =
                (0..DEPTH).map(|slot| exec::spawn(load.clone().write(slot))).collect();
            for writer in writers {
                writer.await?;
            }
            let bytes = (load.done.get() * block as u64) as f64;
            Ok::<f64, Error>(bytes / began.elapsed().as_secs_f64() / 1e9)
        });
        let figure = ticket.wait().map_err(io::Error::other)?;
        before.check(stack)?;
        Ok(figure)
    }
}

/// What writers have in common.
struct Load {
    stack: Stack,
    memory: Arc<SharedMemory>,
    block: usize,
    until: Instant,
    done: Cell<u64>,
    random: RefCell<u64>,
}

impl Load {
    /// One write after the other, from one buffer.
    async fn write(self: Rc<Self>, slot: usize) -> Result<(), Error> {
        let addr = self.memory.words().as_ptr() as usize + slot * LARGEST;
        while Instant::now() < self.until {
            let segment = Segment { addr, len: self.block };
            // SAFETY: the slot lies in the mapping, which `memory` keeps; it was never the
            // allocator's, and no reference to it is used.
            let buf = unsafe { ForeignBuf::new([segment], self.memory.clone()) };
            let at = self.next() * self.block as u64;
            self.stack.submit(Request::write(at, Body::Foreign(buf), false)).await?;
            self.done.set(self.done.get() + 1);
        }
        Ok(())
    }

    /// A block of the area, each as likely as any other (xorshift64*).
    fn next(&self) -> u64 {
        let mut state = self.random.borrow_mut();
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) % (AREA_BYTES / self.block as u64)
    }
}

/// How many writes a stack copied, and how many it passed on.
struct Counts {
    copied: u64,
    passed: u64,
}

impl Counts {
    fn of(stack: &Stack) -> Self {
        let traffic = stack.traffic();
        Self {
            copied: traffic.stabilized.load(Ordering::Relaxed),
            passed: traffic.promised.load(Ordering::Relaxed),
        }
    }

    /// That a sample did one of the two, and not some of both.
    fn check(&self, stack: &Stack) -> io::Result<()> {
        let now = Self::of(stack);
        match (now.copied > self.copied, now.passed > self.passed) {
            (true, true) => Err(io::Error::other("some writes were copied, some were not")),
            _ => Ok(()),
        }
    }
}

impl Medium {
    fn device(self, worker: &Handle) -> io::Result<Arc<dyn Device>> {
        Ok(match self {
            Medium::Null => Arc::new(NullDevice::new(MEMBER_BYTES, worker.clone())),
            Medium::Ram => Arc::new(RamDevice::new(MEMBER_BYTES, worker.clone())?),
        })
    }
}

/// A new array, of members that nothing was written to.
fn assembly(level: Level) -> anyhow::Result<Assembly> {
    let members = *level.members().start();
    let geometry = Geometry::new(level, members, CHUNK_BYTES, MEMBER_BYTES)?;
    let roles: Vec<_> = (0..members).map(|_| RoleEntry::in_sync(Id::random())).collect();
    let superblock = Superblock {
        array: Id::random(),
        name: "protect".to_owned(),
        member: roles[0].id,
        role: 0,
        generation: 1,
        epoch: 0,
        in_use: false,
        // What is compared is the way of the payload.
        log: false,
        checksums: true,
        created: 0,
        geometry,
        atomic_unit: 4096,
        log_from: 1,
        scrub: None,
        histories: Vec::new(),
        roles,
    };
    Ok(Assembly {
        superblock,
        members: vec![None; members],
        incoming: vec![None; members],
        notes: Vec::new(),
        crashed: false,
    })
}
