//! The clients that people have: `qemu-io`, `nbdinfo`, fio's nbd engine, and a virtio driver in
//! this process. Each does what it knows, and checks it itself where it can.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use stableio_testkit::vhost::{self, Guest, Op, Order, Segment, Workload};
use stableio_testkit::{
    Child, Export, Raid5, Random, Scratch, Serve, fio, qemu_io, quick, require_tools, run_tool,
    stableio, status,
};

const MIB: u64 = 1 << 20;

/// Writes, reads, discards, zeroes and flushes of `qemu-io`, from parts of a sector's block to
/// several stripes, alone and many at once; its reads compare.
#[test]
fn qemu_io_reads_what_it_wrote() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    let uri = array.nbd.uri();
    qemu_io(
        &uri,
        &[
            "read -P 0 0 4M",
            // Whole stripes, a part of a block in them, a write across two chunks, one FUA write.
            "write -P 0x11 0 2M",
            "write -P 0x22 512 512",
            "write -P 0x33 65024 1024",
            "write -f -P 0x44 1M 4096",
            "flush",
            "read -P 0x11 0 512",
            "read -P 0x22 512 512",
            "read -P 0x11 1024 64000",
            "read -P 0x33 65024 1024",
            "read -P 0x11 66048 982528",
            "read -P 0x44 1M 4096",
            "read -P 0x11 1052672 1044480",
            // Zeroes, not aligned to blocks; then with the space given back; then a discard.
            "write -z 4608 8192",
            "read -P 0x11 4096 512",
            "read -P 0 4608 8192",
            "read -P 0x11 12800 512",
            "write -z -u 256k 256k",
            "read -P 0 256k 256k",
            "discard 1536k 256k",
            "read -P 0 1536k 256k",
            "read -P 0x11 1280k 256k",
            "read -P 0x11 1792k 256k",
            // Many at once, of which neighbours share rows.
            "aio_write -P 0x51 8M 20k",
            "aio_write -P 0x52 8212k 44k",
            "aio_write -P 0x53 8256k 64k",
            "aio_write -z 8320k 512k",
            "aio_write -P 0x54 8832k 512",
            "aio_flush",
            "read -P 0x51 8M 20k",
            "read -P 0x52 8212k 44k",
            "read -P 0x53 8256k 64k",
            "read -P 0 8320k 512k",
            "read -P 0x54 8832k 512",
        ],
    )?;
    // Its comparisons are worth something.
    qemu_io(&uri, &["read -P 0x12 0 512"]).expect_err("another pattern is there");
    qemu_io(&uri, &["write -P 1 1G 4096"]).expect_err("nothing is there");
    assert!(server.terminate()?.status.success());

    let server = array.serve()?;
    let after = ["read -P 0x22 512 512", "read -P 0x54 8832k 512", "read -P 0 1536k 256k"];
    qemu_io(&uri, &after)?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// `nbdinfo` lists the exports of a socket, and sees of each what it can: flush, FUA, trim,
/// zeroes, several connections, block sizes, holes. A read-only one says so and is.
#[test]
fn nbdinfo_sees_what_an_export_can() -> io::Result<()> {
    if !require_tools(&["nbdinfo", "qemu-io"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let archive = Export::nbd("archive", array.nbd.socket()).with("readonly", "on");
    let exports = [array.nbd.clone(), archive.clone()];
    let server = Serve::array(&array.scratch, &array.members, &exports)?;
    let size = status(&array.scratch)?["size_bytes"].as_u64().expect("a size");

    let list = nbdinfo(&["--list", "--json", &array.nbd.uri()])?;
    let names: Vec<_> = list.iter().map(|e| e["export-name"].as_str().unwrap_or("?")).collect();
    assert_eq!(names, ["disk", "archive"]);
    for (export, writable) in exports.iter().zip([true, false]) {
        let info = nbdinfo(&["--json", &export.uri()])?.remove(0);
        assert_eq!(info["export-size"], size);
        assert_eq!(info["is_read_only"], !writable);
        for can in ["can_flush", "can_fua", "can_multi_conn", "can_df"] {
            assert_eq!(info[can], true, "{can} of {info:#}");
        }
        for can in ["can_trim", "can_zero"] {
            assert_eq!(info[can], writable, "{can} of {info:#}");
        }
        assert_eq!(info["block_size_minimum"], 512);
        assert_eq!(info["block_size_preferred"], 4096);
        assert_eq!(info["contexts"], serde_json::json!(["base:allocation"]));
    }
    let absent = Export::nbd("absent", array.nbd.socket()).uri();
    nbdinfo(&["--json", &absent]).expect_err("there is no such export");

    qemu_io(&array.nbd.uri(), &["write -P 7 0 4096"])?;
    qemu_io(&archive.uri(), &["write -P 8 0 4096"]).expect_err("it is read-only");
    run_tool(Path::new("qemu-io"), ["-r", "-f", "raw", "-c", "read -P 7 0 4096", &archive.uri()])?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// The same over TCP, which is served on the loopback address.
#[test]
fn nbd_works_over_tcp() -> io::Result<()> {
    if !require_tools(&["nbdinfo", "qemu-io"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut command = stableio(&array.scratch)?;
    command.arg("serve").args(&array.members).arg(format!("--export=nbd,name=disk,tcp={address}"));
    let mut server = Child::spawn(command, &array.scratch)?;
    let uri = server.wait_for_line("nbd://")?;
    assert_eq!(uri.trim(), format!("nbd://{address}/disk"));
    assert_eq!(nbdinfo(&["--json", uri.trim()])?[0]["export-name"], "disk");
    qemu_io(uri.trim(), &["write -P 9 1M 1M", "flush", "read -P 9 1M 1M"])?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// fio's own verification, with several connections that write and read at random.
#[test]
fn fio_verifies_its_random_writes() -> io::Result<()> {
    if !require_tools(&["fio"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "128MiB")?;
    let server = array.serve()?;
    let uri = array.nbd.uri();
    let size = if quick() { "8m" } else { "32m" };
    let common = [
        ("ioengine", "nbd"),
        ("uri", uri.as_str()),
        ("size", size),
        ("verify", "crc32c"),
        ("verify_fatal", "1"),
        ("verify_state_save", "0"),
        ("iodepth", "16"),
    ];
    // Four connections, each in a part of its own, since fio verifies only what is not
    // overwritten by another. Sizes from less than a block to more than a row.
    let several = [("numjobs", "4"), ("offset_increment", "32m"), ("rw", "randrw")];
    let mixed = [("bssplit", "512/10:4k/40:12k/20:64k/20:256k/10")];
    fio(&[&common[..], &several, &mixed].concat())?;
    // Read back and verified while the writes go on, with flushes between.
    let backlog = [("rw", "randwrite"), ("bs", "4k"), ("verify_backlog", "64"), ("fsync", "128")];
    fio(&[&common[..], &backlog].concat())?;

    let now = status(&array.scratch)?;
    assert_eq!(now["failed"], 0, "{now:#}");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// The twin of the test above: the same verification on an image as it is, one byte of which is
/// changed in between, fails. On an array, which mends it, it passes.
#[test]
fn fio_sees_one_changed_byte_but_not_on_an_array() -> io::Result<()> {
    if !require_tools(&["fio"]) {
        return Ok(());
    }
    let job = |uri: &str, options: &[(&str, &str)]| {
        let common = [("ioengine", "nbd"), ("uri", uri), ("rw", "randwrite"), ("bs", "4k")];
        let verify = [("size", "4m"), ("verify", "crc32c"), ("verify_state_save", "0")];
        fio(&[&common[..], &verify, options].concat())
    };
    let (write, verify) = ([("do_verify", "0")], [("verify_only", "1")]);

    let scratch = Scratch::new()?;
    let image = scratch.sparse("disk.img", 8 * MIB)?;
    let nbd = Export::nbd("disk", &scratch.path("nbd.sock"));
    let server = Serve::raw(&scratch, &image, std::slice::from_ref(&nbd))?;
    job(&nbd.uri(), &write)?;
    job(&nbd.uri(), &verify)?;
    assert!(server.terminate()?.status.success());
    change_byte(&image, MIB + 5)?;
    let server = Serve::raw(&scratch, &image, std::slice::from_ref(&nbd))?;
    job(&nbd.uri(), &verify).expect_err("a byte was changed");
    assert!(server.terminate()?.status.success());

    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    job(&array.nbd.uri(), &write)?;
    assert!(server.terminate()?.status.success());
    let data = array.examine(0)?["data_at"].as_u64().expect("an offset");
    // One that surely holds data: every member has parity in one of three stripes.
    for at in [5, 65541, 131077] {
        change_byte(&array.members[0], data + at)?;
    }
    let server = array.serve()?;
    job(&array.nbd.uri(), &verify)?;
    assert_eq!(status(&array.scratch)?["blocks_mended"], 2, "the third byte is in parity");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// A virtio driver: what the device says of itself, every kind of request, and an error for what
/// can not be, after which it goes on.
#[test]
fn a_virtio_driver_finds_a_whole_device() -> io::Result<()> {
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    let mut guest = Guest::connect(array.vhost.socket(), 2, 4 << 20)?;
    let config = guest.config()?;
    let size = status(&array.scratch)?["size_bytes"].as_u64().expect("a size");
    assert_eq!(guest.size()?, size);
    assert_eq!(config.blk_size.to_native(), 512);
    assert_eq!(512 << config.physical_block_exp, 4096);
    assert_eq!(config.num_queues.to_native(), 2);
    assert_eq!(guest.get_id()?, "disk");

    let bytes = Random::new(1).bytes(2 << 20);
    guest.write(512, &bytes)?;
    guest.flush()?;
    assert!(guest.read(512, bytes.len())? == bytes);
    assert_eq!(guest.read(0, 512)?, [0; 512], "what nobody wrote is zero");
    // Half a block of the written, then a range without regard to blocks.
    guest.write_zeroes(4096 + 512, 512, false)?;
    guest.write_zeroes(MIB - 512, 8192, true)?;
    guest.discard(MIB + 64 * 1024, 256 * 1024)?;
    let found = guest.read(0, 2 << 20)?;
    for (at, want) in found.chunks(512).enumerate().map(|(i, c)| (i as u64 * 512, c)).skip(1) {
        let zeroed = [(4608, 512), (MIB - 512, 8192), (MIB + 64 * 1024, 256 * 1024)];
        if zeroed.iter().any(|(from, len)| (*from..from + len).contains(&at)) {
            assert_eq!(want, [0; 512], "byte {at}");
        } else {
            assert!(want == &bytes[at as usize - 512..][..512], "byte {at}");
        }
    }

    let error = guest.read(size, 512).expect_err("there is nothing there");
    assert_eq!(error.raw_os_error(), Some(5));
    let error = guest.write(size - 512, &[1; 1024]).expect_err("half of it is not there");
    assert_eq!(error.raw_os_error(), Some(5));
    guest.write(size - 512, &[1; 512])?;
    // Every byte of it out of one segment twice, and scattered.
    let queue = &mut guest.queues()[1];
    let segments =
        [(0, 512), (512, 1024), (0, 512), (8192, 2048)].map(|(at, len)| Segment { at, len });
    queue.submit(5, vhost::Command::Write(MIB, &segments))?;
    let completion = queue.wait()?;
    assert_eq!((completion.tag, completion.status), (5, 0));
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// Both protocols serve one disk: what a guest writes an NBD client reads at once, and vice
/// versa, while both are under load elsewhere.
#[test]
fn guests_and_network_clients_share_a_disk() -> io::Result<()> {
    if !require_tools(&["qemu-io", "fio"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    let uri = array.nbd.uri();
    let load = [
        ("ioengine", "nbd"),
        ("uri", uri.as_str()),
        ("rw", "randrw"),
        ("bssplit", "512/20:4k/60:64k/20"),
        ("iodepth", "8"),
        ("offset", "32m"),
        ("size", "32m"),
        ("time_based", "1"),
        ("runtime", if quick() { "1" } else { "3" }),
    ];
    thread::scope(|scope| {
        let load = scope.spawn(|| fio(&load));
        let mut guest = Guest::connect(array.vhost.socket(), 2, 16 << 20)?;
        for pattern in 1u8.. {
            let at = MIB * u64::from(pattern % 31 + 1);
            guest.write(at, &[pattern; 8192])?;
            let read = format!("read -P {pattern} {at} 8192");
            qemu_io(&uri, &[&read, &format!("write -P 0xee {at} 512")])?;
            assert_eq!(guest.read(at, 1024)?, [[0xee; 512], [pattern; 512]].concat());
            let (op, order, runtime) = (Op::Write, Order::Random, Duration::from_millis(50));
            guest.run(&Workload { op, order, block: 16 << 10, depth: 32, area: MIB, runtime })?;
            if load.is_finished() {
                break;
            }
        }
        load.join().expect("fio's thread does not panic").map(drop)
    })?;
    let now = status(&array.scratch)?;
    assert_eq!(now["failed"], 0, "{now:#}");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// The exports that `nbdinfo` finds.
fn nbdinfo(args: &[&str]) -> io::Result<Vec<Value>> {
    let found: Value = serde_json::from_str(&run_tool(Path::new("nbdinfo"), args)?)?;
    Ok(found["exports"].as_array().cloned().unwrap_or_default())
}

/// Changes one byte of a file.
fn change_byte(path: &Path, at: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[!byte[0]], at)
}
