//! The memory of `serve`: little when nothing happens, however large the array, and bounded by
//! what the user set when much does.

use std::fs;
use std::io;
use std::path::PathBuf;

use stableio_testkit::{
    Raid5, Scratch, Serve, create, fio, qemu_io, quick, require_tools, skip, status,
};

const MIB: u64 = 1 << 20;

/// Stacks, rings, queues and buffers of sockets: what does not grow with the load.
const ALLOWANCE: u64 = 64 * MIB;

/// A server of a sparse array of 1 TiB, used a little all over, and left alone.
#[test]
fn an_idle_server_of_a_terabyte_is_small() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let Some(array) = terabyte()? else { return Ok(()) };
    let server = array.serve()?;
    let far = (0..16)
        .map(|i| i * 64)
        .flat_map(|gib| [format!("write -P 5 {gib}G 64k"), format!("read -P 5 {gib}G 64k")]);
    let far: Vec<_> = far.chain(["flush".to_owned()]).collect();
    qemu_io(&array.nbd.uri(), &far.iter().map(String::as_str).collect::<Vec<_>>())?;
    let memory = Memory::of(&server)?;
    assert!(memory.resident < 200 * MIB, "{memory:?}");
    assert!(memory.peak < 200 * MIB, "{memory:?}");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// Four clients with 32 requests of 1 MiB each ask for 128 MiB at once, which a smaller pool does
/// not have: then they wait, and memory does not grow.
#[test]
fn load_is_bounded_by_the_pool() -> io::Result<()> {
    if !require_tools(&["fio"]) {
        return Ok(());
    }
    for pool in [32, 128] {
        for rw in ["write", "randrw"] {
            under_load(pool, rw)?;
        }
    }
    Ok(())
}

fn under_load(pool_mib: u64, rw: &str) -> io::Result<()> {
    const CACHE_MIB: u64 = 16;
    let array = Raid5::create(Scratch::with_room(3 * 256 * MIB)?, "256MiB")?;
    let options =
        ["--pool", &format!("{pool_mib}MiB"), "--tuple-cache", &format!("{CACHE_MIB}MiB")];
    let server = Serve::array_with(
        &array.scratch,
        &options,
        &array.members,
        std::slice::from_ref(&array.nbd),
    )?;
    let idle = Memory::of(&server)?;
    let runtime = if quick() { "1" } else { "3" };
    let uri = array.nbd.uri();
    let load = [
        ("ioengine", "nbd"),
        ("uri", uri.as_str()),
        ("rw", rw),
        ("bs", "1m"),
        ("iodepth", "32"),
        ("numjobs", "4"),
        ("size", "100m"),
        ("offset_increment", "100m"),
        ("time_based", "1"),
        ("runtime", runtime),
    ];
    fio(&load)?;
    let memory = Memory::of(&server)?;
    let bound = (pool_mib + CACHE_MIB) * MIB + ALLOWANCE;
    let grown = memory.peak.saturating_sub(idle.resident);
    assert!(grown <= bound, "{rw}: idle {idle:?}, then {memory:?}: {grown} more, {bound} allowed");
    let now = status(&array.scratch)?;
    assert_eq!(now["pool_used_bytes"], 0, "what was taken was given back: {now:#}");
    assert_eq!(now["failed"], 0, "waiting is no error: {now:#}");
    let moved =
        [&now["read_bytes"], &now["written_bytes"]].map(|bytes| bytes.as_u64().unwrap_or(0));
    assert!(moved[0] + moved[1] > 2 * 128 * MIB, "that was no load: {now:#}");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// A sparse raid5 array of 1 TiB; `None`, and said, where files can not be that large.
fn terabyte() -> io::Result<Option<Raid5>> {
    let scratch = Scratch::new()?;
    let members: Vec<PathBuf> =
        (0..3).map(|role| scratch.path(&format!("member-{role}"))).collect();
    if let Err(error) = scratch.sparse("probe", 513 << 30) {
        skip(&format!("no file of 513 GiB: {error}"));
        return Ok(None);
    }
    create("disk", &["--member-size", "515GiB"], &members)?;
    let array = Raid5::of(scratch, members);
    Ok(Some(array))
}

/// What a process takes.
#[derive(Debug)]
struct Memory {
    /// In bytes, now.
    resident: u64,
    /// At most so far.
    peak: u64,
}

impl Memory {
    fn of(server: &Serve) -> io::Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", server.child().pid()))?;
        // `VmRSS:      1234 kB`, proc_pid_status(5).
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            number
                .map(|kib| kib * 1024)
                .ok_or_else(|| io::Error::other(format!("no {key} {status}")))
        };
        Ok(Memory { resident: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
    }
}
