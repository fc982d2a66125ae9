//! Guests: our vhost-user-blk exports against `qemu-storage-daemon`'s on a plain file, with the
//! same client in this process for both.

use std::io;
use std::path::Path;
use std::time::Duration;

use stableio_testkit::vhost::{Guest, Op, Order, Workload};
use stableio_testkit::{Export, Scratch, StorageDaemon};

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare};
use crate::servers::{self, AREA_BYTES, Mode, start_ours, start_peers};

pub(crate) const NAME: &str = "guests";
pub(crate) const ABOUT: &str =
    "a file and RAID5 over vhost-user-blk, against qemu-storage-daemon on a file";

/// A guest's memory: 8 requests of 1 MiB, and some.
const MEMORY_BYTES: usize = 16 << 20;

/// What of ours a row is about.
#[derive(Clone, Copy)]
enum Ours {
    Raw,
    Raid5,
}

/// What the guest does.
#[derive(Clone, Copy)]
enum Load {
    RandRead4k,
    RandWrite4k,
    Read1m,
    Write1m,
}

const ROWS: [(&str, Ours, Load, Option<f64>); 8] = [
    ("raw-randread-4k-qd32", Ours::Raw, Load::RandRead4k, Some(1.2)),
    ("raw-randwrite-4k-qd32", Ours::Raw, Load::RandWrite4k, None),
    ("raw-read-1m", Ours::Raw, Load::Read1m, None),
    ("raw-write-1m", Ours::Raw, Load::Write1m, None),
    ("raid5-randread-4k-qd32", Ours::Raid5, Load::RandRead4k, Some(0.8)),
    ("raid5-randwrite-4k-qd32", Ours::Raid5, Load::RandWrite4k, None),
    ("raid5-read-1m", Ours::Raid5, Load::Read1m, Some(0.8)),
    ("raid5-write-1m", Ours::Raid5, Load::Write1m, Some(0.5)),
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let scratch = servers::scratch()?;
    let export = |name: &str| Export::vhost_user_blk(name, &scratch.path(&format!("{name}.sock")));
    let (raw_export, raid5_export) = (export("raw"), export("bench"));
    let raw_server = start_ours(plan, || servers::raw(&scratch, &raw_export));
    let raid5_server = start_ours(plan, || servers::raid5(&scratch, &raid5_export));
    let peer_servers = start_peers("qemu-storage-daemon", |mode| peer(&scratch, mode));

    let mut raw = connect(&raw_server, |_| raw_export.socket());
    let mut raid5 = connect(&raid5_server, |_| raid5_export.socket());
    let mut peers = peer_servers.each_ref().map(|server| connect(server, StorageDaemon::socket));
    let rows = ROWS.iter().map(|&(name, which, load, target)| {
        let ours = match which {
            Ours::Raw => &mut raw,
            Ours::Raid5 => &mut raid5,
        };
        let case = Case { family: NAME, name, unit: load.unit(), target };
        let peer_name = format!("qemu-storage-daemon, {}", load.best_peer().name());
        let peer = &mut peers[load.best_peer() as usize];
        compare(case, ours, peer, &peer_name, |guest| load.sample(guest, plan.sample))
    });
    Ok(rows.collect())
}

impl Load {
    fn unit(self) -> Unit {
        match self {
            Load::RandRead4k | Load::RandWrite4k => Unit::OpsPerS,
            Load::Read1m | Load::Write1m => Unit::MibPerS,
        }
    }

    fn best_peer(self) -> Mode {
        match self {
            Load::RandRead4k | Load::RandWrite4k => Mode::Native,
            Load::Read1m | Load::Write1m => Mode::Uring,
        }
    }

    fn workload(self, runtime: Duration) -> Workload {
        let (op, order, block, depth) = match self {
            Load::RandRead4k => (Op::Read, Order::Random, 4 << 10, 32),
            Load::RandWrite4k => (Op::Write, Order::Random, 4 << 10, 32),
            Load::Read1m => (Op::Read, Order::Sequential, 1 << 20, 8),
            Load::Write1m => (Op::Write, Order::Sequential, 1 << 20, 8),
        };
        Workload { op, order, block, depth, area: AREA_BYTES, runtime }
    }

    fn sample(self, guest: &mut Guest, runtime: Duration) -> io::Result<f64> {
        let done = guest.run(&self.workload(runtime))?;
        Ok(match self.unit() {
            Unit::OpsPerS => done.ops_per_s(),
            Unit::MibPerS => done.bytes_per_s() / f64::from(1 << 20),
            Unit::GbPerS => done.bytes_per_s() / 1e9,
        })
    }
}

fn peer(scratch: &Scratch, mode: Mode) -> io::Result<StorageDaemon> {
    let image = servers::peer_image(scratch, mode)?;
    let socket = scratch.path(&format!("{}.sock", mode.name()));
    StorageDaemon::start(scratch, &image, socket, mode.host_io())
}

/// A guest on a server, its area written.
fn connect<'a, S>(server: &'a Side<S>, socket: impl FnOnce(&'a S) -> &'a Path) -> Side<Guest> {
    let socket = socket(server.as_ref().map_err(String::clone)?);
    let guest = Guest::connect(socket, 1, MEMORY_BYTES).and_then(|mut guest| {
        guest.fill(AREA_BYTES)?;
        Ok(guest)
    });
    guest.map_err(|error| format!("{}: {error}", socket.display()))
}
