//! NBD: our RAID5 array against `qemu-nbd` on a plain file, with fio as the client of both.

use std::io;
use std::time::Duration;

use stableio_testkit::{Export, QemuNbd, Scratch, fio};

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare};
use crate::servers::{self, AREA_BYTES, Mode, need, start_ours, start_peers};

pub(crate) const NAME: &str = "nbd";
pub(crate) const ABOUT: &str = "RAID5 over NBD, against qemu-nbd on a file";

/// A row: fio's job on both sides, and the peer's mode that is best at it.
struct Load {
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: &'static str,
    unit: Unit,
    target: f64,
    peer: Mode,
}

const LOADS: [Load; 4] = [
    Load {
        name: "randread-4k-qd32",
        rw: "randread",
        block: "4k",
        depth: "32",
        unit: Unit::OpsPerS,
        target: 1.0,
        peer: Mode::Native,
    },
    Load {
        name: "read-1m",
        rw: "read",
        block: "1m",
        depth: "8",
        unit: Unit::MibPerS,
        target: 1.0,
        peer: Mode::Uring,
    },
    Load {
        name: "write-1m",
        rw: "write",
        block: "1m",
        depth: "8",
        unit: Unit::MibPerS,
        target: 0.8,
        peer: Mode::Uring,
    },
    Load {
        name: "randwrite-4k-qd32",
        rw: "randwrite",
        block: "4k",
        depth: "32",
        unit: Unit::OpsPerS,
        target: 0.4,
        peer: Mode::Native,
    },
];

pub(crate) fn run(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let scratch = servers::scratch()?;
    let export = Export::nbd("bench", &scratch.path("ours.sock"));
    let our_server = start_ours(plan, || servers::raid5(&scratch, &export));
    let peer_servers = start_peers("qemu-nbd", |mode| peer(&scratch, mode));

    let mut ours = reach(&our_server, |_| export.uri());
    let mut peers = peer_servers.each_ref().map(|server| reach(server, QemuNbd::uri));
    let rows = LOADS.iter().map(|load| {
        let peer = &mut peers[load.peer as usize];
        let peer_name = format!("qemu-nbd, {}", load.peer.name());
        compare(load.case(), &mut ours, peer, &peer_name, |uri| load.sample(uri, plan.sample))
    });
    Ok(rows.collect())
}

impl Load {
    fn case(&self) -> Case {
        Case { family: NAME, name: self.name, unit: self.unit, target: Some(self.target) }
    }

    fn sample(&self, uri: &str, runtime: Duration) -> io::Result<f64> {
        let runtime = runtime.as_secs().to_string();
        let timed = [("time_based", "1"), ("runtime", runtime.as_str()), ("norandommap", "1")];
        let job = job(uri, self.rw, self.block, self.depth);
        let report = fio(&[&job[..], &[("size", &area()[..])], &timed].concat())?;
        Ok(match self.unit {
            Unit::OpsPerS => report.iops,
            Unit::MibPerS => report.bytes_per_s / f64::from(1 << 20),
            Unit::GbPerS => report.bytes_per_s / 1e9,
        })
    }
}

fn peer(scratch: &Scratch, mode: Mode) -> io::Result<QemuNbd> {
    let image = servers::peer_image(scratch, mode)?;
    let socket = scratch.path(&format!("{}.sock", mode.name()));
    QemuNbd::start(scratch, &image, socket, mode.host_io())
}

/// The address of a server, its area written, if there is a client for it.
fn reach<S>(server: &Side<S>, uri: impl FnOnce(&S) -> String) -> Side<String> {
    need("fio")?;
    let uri = uri(server.as_ref().map_err(String::clone)?);
    fill(&uri).map_err(|error| error.to_string())?;
    Ok(uri)
}

fn fill(uri: &str) -> io::Result<()> {
    fio(&[&job(uri, "write", "1m", "8")[..], &[("size", &area()[..])]].concat()).map(drop)
}

fn job<'a>(
    uri: &'a str,
    rw: &'a str,
    block: &'a str,
    depth: &'a str,
) -> [(&'static str, &'a str); 5] {
    [("ioengine", "nbd"), ("uri", uri), ("rw", rw), ("bs", block), ("iodepth", depth)]
}

fn area() -> String {
    AREA_BYTES.to_string()
}
