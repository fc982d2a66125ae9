//! The helpers against servers that are known to be right: QEMU's.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use stableio_testkit::vhost::{Command, Guest, Op, Order, Segment, Workload};
use stableio_testkit::{
    HostIo, QemuNbd, Scratch, StorageDaemon, fio, is_listening, nbd_uri, require_tool, run_tool,
};

const IMAGE_BYTES: u64 = 64 << 20;

/// A guest on a storage daemon on an empty image, and what they live in; `None` without QEMU.
fn guest(memory_bytes: usize) -> io::Result<Option<(Scratch, StorageDaemon, Guest)>> {
    if require_tool("qemu-storage-daemon").is_none() {
        return Ok(None);
    }
    let scratch = Scratch::new()?;
    let image = scratch.sparse("disk.img", IMAGE_BYTES)?;
    let socket = scratch.path("vhost.sock");
    let daemon = StorageDaemon::start(&scratch, &image, socket, HostIo::DEFAULT)?;
    let guest = Guest::connect(daemon.socket(), 1, memory_bytes)?;
    Ok(Some((scratch, daemon, guest)))
}

#[test]
fn a_guest_reads_what_it_wrote_until_it_discards_it() -> io::Result<()> {
    let Some((scratch, _daemon, mut guest)) = guest(1 << 20)? else { return Ok(()) };
    assert_eq!(guest.size()?, IMAGE_BYTES);
    assert_eq!(guest.get_id()?, "vhost_user_blk");

    let bytes: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    guest.write(4096, &bytes)?;
    guest.flush()?;
    assert_eq!(guest.read(4096, bytes.len())?, bytes);
    assert_eq!(std::fs::read(scratch.path("disk.img"))?[4096..][..bytes.len()], bytes);

    guest.write_zeroes(4096, 4096, true)?;
    assert_eq!(guest.read(4096, 4096)?, [0; 4096]);
    guest.discard(8192, 4096)?;
    assert_eq!(guest.read(8192, 4096)?, [0; 4096]);
    Ok(())
}

#[test]
fn a_request_beyond_the_end_is_an_error() -> io::Result<()> {
    let Some((_scratch, _daemon, mut guest)) = guest(1 << 20)? else { return Ok(()) };
    let error = guest.read(IMAGE_BYTES, 4096).expect_err("there is nothing there");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    guest.read(IMAGE_BYTES - 4096, 4096)?;
    Ok(())
}

#[test]
fn a_request_may_name_one_segment_twice() -> io::Result<()> {
    let Some((_scratch, _daemon, mut guest)) = guest(1 << 20)? else { return Ok(()) };
    let segment = Segment { at: 0, len: 4096 };
    guest.memory().fill(0..segment.len, u64::MAX);
    let queue = &mut guest.queues()[0];
    queue.submit(7, Command::Write(0, &[segment; 2]))?;
    let completion = queue.wait()?;
    assert_eq!((completion.tag, completion.status), (7, 0));
    assert_eq!(guest.read(0, 8192)?, [0xff; 8192]);
    Ok(())
}

#[test]
fn memory_can_change_while_a_write_is_in_flight() -> io::Result<()> {
    let Some((_scratch, _daemon, mut guest)) = guest(1 << 20)? else { return Ok(()) };
    let memory = guest.memory().clone();
    let segment = Segment { at: 0, len: memory.len() };
    let queue = &mut guest.queues()[0];
    queue.submit(0, Command::Write(0, &[segment]))?;
    queue.kick()?;
    for word in memory.words() {
        word.store(u64::MAX, Ordering::Relaxed);
    }
    queue.wait()?.result()?;
    // Each word is one that was there at some time; which, nobody can say.
    let stored = guest.read(0, segment.len)?;
    let words = stored.as_chunks::<8>().0;
    assert!(words.iter().all(|word| *word == [0; 8] || *word == [0xff; 8]));
    Ok(())
}

#[test]
fn a_workload_is_counted() -> io::Result<()> {
    let Some((_scratch, _daemon, mut guest)) = guest(4 << 20)? else { return Ok(()) };
    guest.fill(IMAGE_BYTES)?;
    for op in [Op::Read, Op::Write] {
        for order in [Order::Random, Order::Sequential] {
            let runtime = Duration::from_millis(50);
            let load = Workload { op, order, block: 4096, depth: 32, area: IMAGE_BYTES, runtime };
            let done = guest.run(&load)?;
            assert!(done.operations > 32, "{done:?}");
            assert_eq!(done.bytes, done.operations * 4096);
            assert!(done.elapsed >= runtime);
        }
    }
    Ok(())
}

#[test]
fn every_queue_of_a_device_carries_load() -> io::Result<()> {
    let Some((_scratch, daemon, first)) = guest(1 << 20)? else { return Ok(()) };
    drop(first);
    Guest::connect(daemon.socket(), 5, 1 << 20).err().expect("it has four queues");
    let mut guest = Guest::connect(daemon.socket(), 3, 1 << 20)?;
    let (op, order, area) = (Op::Write, Order::Sequential, IMAGE_BYTES);
    let runtime = Duration::from_millis(20);
    let load = Workload { op, order, block: 4096, depth: 8, area, runtime };
    guest.run(&load)?;
    for queue in guest.queues() {
        queue.submit(3, Command::Flush)?;
        assert_eq!(queue.wait()?.tag, 3);
    }
    Ok(())
}

#[test]
fn a_daemon_that_died_does_not_hang_its_guest() -> io::Result<()> {
    let Some((_scratch, daemon, mut guest)) = guest(1 << 20)? else { return Ok(()) };
    assert!(daemon.kill9()?.was_killed());
    let queue = &mut guest.queues()[0];
    queue.submit(0, Command::Flush)?;
    let error = queue.wait_within(Duration::from_millis(50)).expect_err("nobody is there");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    Ok(())
}

#[test]
fn fio_drives_an_nbd_server() -> io::Result<()> {
    if require_tool("qemu-nbd").is_none() || require_tool("fio").is_none() {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let image = scratch.sparse("disk.img", IMAGE_BYTES)?;
    let socket = scratch.path("nbd.sock");
    let server = QemuNbd::start(&scratch, &image, socket.clone(), HostIo::DEFAULT)?;
    let uri = server.uri();
    let options = [("ioengine", "nbd"), ("uri", uri.as_str()), ("rw", "write"), ("bs", "1m")];
    let report = fio(&[&options[..], &[("size", "64m"), ("iodepth", "4")]].concat())?;
    assert!(report.iops > 0.0 && report.bytes_per_s > report.iops && report.p99_us > 0.0);

    let absent = nbd_uri("absent", &scratch.path("absent.sock"));
    fio(&[("ioengine", "nbd"), ("uri", &absent), ("rw", "read"), ("size", "4k")])
        .expect_err("nobody listens there");

    if let Some(nbdinfo) = require_tool("nbdinfo") {
        assert_eq!(run_tool(&nbdinfo, ["--size", &uri])?.trim(), IMAGE_BYTES.to_string());
    }
    assert!(is_listening(&socket));
    server.terminate()?;
    assert!(!is_listening(&socket));
    Ok(())
}
