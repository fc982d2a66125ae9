//! The clients that people use.

use std::path::Path;
use std::sync::Arc;

use stableio_block::{Stack, Worker};
use stableio_front::nbd::{Export, NbdServer, Options};
use stableio_front::socket::Listener;
use stableio_mem::Pool;
use stableio_testkit::{nbd_uri, require_tool, run_tool};

use crate::{MIB, Random, SIZE, Served, ram};

#[test]
fn nbdinfo_knows_the_export() {
    let Some(nbdinfo) = require_tool("nbdinfo") else { return };
    let served = Served::file();
    let uri = nbd_uri("disk", &served.path);
    let info = run_tool(&nbdinfo, ["--json", &uri]).unwrap();
    for fact in [
        "\"protocol\": \"newstyle-fixed\"".to_owned(),
        "\"structured\": true".to_owned(),
        "\"export-name\": \"disk\"".to_owned(),
        format!("\"export-size\": {SIZE}"),
        "\"can_multi_conn\": true".to_owned(),
        "\"can_fast_zero\": true".to_owned(),
        "\"base:allocation\"".to_owned(),
        "\"block_size_minimum\": 512".to_owned(),
    ] {
        assert!(info.contains(&fact), "no {fact} in {info}");
    }
    let map = run_tool(&nbdinfo, ["--map", &uri]).unwrap();
    assert!(map.contains("hole,zero"), "{map}");
    let list = run_tool(&nbdinfo, ["--list", &nbd_uri("", &served.path)]).unwrap();
    assert!(list.contains("export=\"disk\""), "{list}");
}

#[test]
fn tcp_works_as_well() {
    let Some(nbdinfo) = require_tool("nbdinfo") else { return };
    let worker = Worker::start("nbd").unwrap();
    let (pool, handle) = (Pool::new(MIB as usize).unwrap(), worker.handle().clone());
    let stack = Stack::new("disk", Arc::new(ram(&worker)), pool, handle.clone());
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), false).unwrap();
    let address = listener.tcp_address().unwrap();
    let export = Export::of("disk", stack).unwrap().with(|info| Ok(info.with_read_only()));
    let server = NbdServer::start(vec![export.unwrap()], listener, &handle, Options::default());
    let info = run_tool(&nbdinfo, [format!("nbd://{address}/disk")]).unwrap();
    assert!(info.contains("is_read_only: true"), "{info}");
    server.stop();
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn nbdcopy_brings_back_what_it_took_away() {
    let Some(nbdcopy) = require_tool("nbdcopy") else { return };
    let served = Served::file();
    let uri = nbd_uri("disk", &served.path);
    let scratch = stableio_testkit::Scratch::new().unwrap();
    let (source, target) = (scratch.path("source"), scratch.path("target"));
    let mut image = Random(5).bytes(SIZE as usize);
    image[3 * MIB as usize..9 * MIB as usize].fill(0);
    std::fs::write(&source, &image).unwrap();
    let text = |path: &Path| path.display().to_string();
    run_tool(&nbdcopy, [&text(&source), &uri]).unwrap();
    run_tool(&nbdcopy, [&uri, &text(&target)]).unwrap();
    assert!(std::fs::read(&target).unwrap() == image);
    served.wait_until_quiet();
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    let Some(qemu_io) = require_tool("qemu-io") else { return };
    let served = Served::file();
    let uri = nbd_uri("disk", &served.path);
    let commands = [
        "write -P 0xab 0 5M",
        "write -f -P 0xcd 1M 64k",
        "write -z -u 2M 1M",
        "write -z 3M 512",
        "discard 4M 1M",
        "flush",
        "read -P 0xab 0 1M",
        "read -P 0xcd 1M 64k",
        "read -P 0 2M 1M",
        "read -P 0 3M 512",
        "read -P 0xab 3146240 512",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    let said = run_tool(&qemu_io, args).unwrap();
    assert!(!said.contains("verification failed"), "{said}");
    assert_eq!(said.matches("5 MiB, 1 ops").count(), 1, "{said}");
    served.wait_until_quiet();
}

#[test]
fn fio_verifies_what_it_wrote() {
    if require_tool("fio").is_none() {
        return;
    }
    let served = Served::file();
    let uri = nbd_uri("disk", &served.path);
    let size = SIZE.to_string();
    for (pattern, block) in [("randwrite", "4k"), ("write", "1m")] {
        stableio_testkit::fio(&[
            ("ioengine", "nbd"),
            ("uri", &uri),
            ("rw", pattern),
            ("bs", block),
            ("iodepth", "32"),
            ("size", &size),
            ("verify", "crc32c"),
        ])
        .unwrap();
    }
    served.wait_until_quiet();
}
