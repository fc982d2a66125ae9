//! What the log costs: arrays with it against the same without, on members whose flush takes as
//! long as that of a good SSD.

use std::sync::Arc;
use std::time::Duration;

use stableio_array::Level;
use stableio_block::dev::{DelayDevice, Delays};
use stableio_block::{Device, Handle, Worker};

use crate::Plan;
use crate::array::close;
use crate::bed::{Bed, Shape};
use crate::compare::{Case, Row, Unit, compare};
use crate::load::{Load, Order, What};

pub(crate) const NAME: &str = "log";
pub(crate) const ABOUT: &str =
    "arrays with a log against the same without, where a flush takes 100 µs";

const PEER: &str = "no log";
const FLUSH: Duration = Duration::from_micros(100);
const AREA_BYTES: u64 = 256 << 20;
/// In the order of the names.
const DEPTHS: [usize; 4] = [1, 4, 16, 64];

/// An array, what power failure does not tear on its members, how it is written to, in blocks of
/// how many bytes, and the names of the rows by depth.
type Try = (Level, u32, Order, usize, [&'static str; 4]);

const TRIES: [Try; 5] = [
    (
        Level::Raid5,
        4096,
        Order::Random,
        4 << 10,
        [
            "raid5-randwrite-4k-qd1",
            "raid5-randwrite-4k-qd4",
            "raid5-randwrite-4k-qd16",
            "raid5-randwrite-4k-qd64",
        ],
    ),
    (
        Level::Raid5,
        4096,
        Order::Sequential,
        1 << 20,
        ["raid5-write-1m-qd1", "raid5-write-1m-qd4", "raid5-write-1m-qd16", "raid5-write-1m-qd64"],
    ),
    // Where blocks may be torn, all content goes through the log.
    (
        Level::Raid5,
        512,
        Order::Sequential,
        1 << 20,
        [
            "raid5-torn-write-1m-qd1",
            "raid5-torn-write-1m-qd4",
            "raid5-torn-write-1m-qd16",
            "raid5-torn-write-1m-qd64",
        ],
    ),
    (
        Level::Raid1,
        4096,
        Order::Random,
        4 << 10,
        [
            "raid1-randwrite-4k-qd1",
            "raid1-randwrite-4k-qd4",
            "raid1-randwrite-4k-qd16",
            "raid1-randwrite-4k-qd64",
        ],
    ),
    (
        Level::Raid1,
        4096,
        Order::Sequential,
        1 << 20,
        ["raid1-write-1m-qd1", "raid1-write-1m-qd4", "raid1-write-1m-qd16", "raid1-write-1m-qd64"],
    ),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let worker = Worker::start("bench")?;
    let mut rows = Vec::new();
    for (level, atomic_unit, order, block, names) in TRIES {
        let shape = Shape::new(level, *level.members().start(), AREA_BYTES);
        let shape = Shape { atomic_unit, ..shape };
        let with = plan.ours(|| Bed::new(shape, &worker, late))?;
        let without = Bed::new(Shape { log: false, ..shape }, &worker, late)?;
        let mut side = with.as_ref().map(|bed| bed.stack.clone()).map_err(String::clone);
        let mut peer = plan.peer(without.stack.clone());
        for (name, depth) in names.into_iter().zip(DEPTHS) {
            if !plan.wants(name) {
                continue;
            }
            let unit = if block == 4 << 10 { Unit::OpsPerS } else { Unit::MibPerS };
            let case = Case { family: NAME, name, unit, target: None };
            let load = Load { what: What::Write, order, block, depth, area: AREA_BYTES };
            rows.push(compare(case, &mut side, &mut peer, PEER, |stack| {
                Ok(unit.of(load.run(stack, plan.sample)?, block))
            }));
        }
        close(with)?;
        close(Ok(without))?;
    }
    Ok(rows)
}

/// A device with the flush of a disk.
fn late(device: Arc<dyn Device>, worker: &Handle) -> Arc<dyn Device> {
    let delays = Delays { flush: FLUSH, ..Delays::default() };
    Arc::new(DelayDevice::new(device, delays, worker.clone()))
}
