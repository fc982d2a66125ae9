//! A guest: QEMU, emulating a machine, boots from the vhost-user-blk export.
//!
//! What the guest does, and what it says that it did, is drawn in `tests/guest/init.c` and
//! `boot.S`. Here its writes are looked at from the other side, through NBD.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stableio_testkit::{
    Child, Export, Raid5, Scratch, Serve, qemu_io, require_tools, run_tool, skip, status,
};

const MIB: u64 = 1 << 20;

/// The least that the guest's test needs.
const DISK_BYTES: u64 = 64 * MIB;

/// What QEMU boots, built once (`tests/guest/build.sh`); `None`, and said, where that can not be.
fn built() -> io::Result<Option<PathBuf>> {
    if !require_tools(&["qemu-system-x86_64", "nbdcopy", "qemu-io"]) {
        return Ok(None);
    }
    let guest = guest_dir();
    let out = guest.join("../../target/guest");
    match run_tool(&guest.join("build.sh"), [&out]) {
        Ok(_) => Ok(Some(out)),
        // The kernel is downloaded; a host may be on its own, or no Debian.
        Err(error) => {
            skip(&format!("the guest can not be built: {error}"));
            Ok(None)
        }
    }
}

fn guest_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guest")
}

/// Runs the guest to its end on the device at this socket and returns what its console showed.
fn boot(scratch: &Scratch, export: &Export, out: &Path, options: &[&str]) -> io::Result<String> {
    let mut command = Command::new(guest_dir().join("run.sh"));
    command.arg(export.socket()).arg(out).args(options);
    let ended = Child::spawn(command, scratch)?.wait_within(Duration::from_secs(240))?;
    assert!(ended.status.success(), "{}\n{}{}", ended.status, ended.stdout, ended.stderr);
    Ok(ended.stdout)
}

/// A guest reads, writes, discards, zeroes and flushes, over two queues, partly from buffers that
/// it changes in flight. What it says that it left is what NBD clients find: on the raid5 array
/// at once and after a restart, where every block they read matches its checksum.
#[test]
fn linux_finds_a_disk_and_nbd_finds_what_linux_wrote() -> io::Result<()> {
    let Some(out) = built()? else { return Ok(()) };
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    prefill(&array.nbd)?;
    let console = boot(&array.scratch, &array.vhost, &out, &["--prefilled"])?;
    assert_is_a_disk(&console);

    let expected = Expected::parse(&console);
    expected.hold_against(&fs::read(array.read_all("live.img")?)?);
    let now = status(&array.scratch)?;
    assert_eq!(now["failed"], 0, "{now:#}");
    assert!(now["writes_stabilized"].as_u64() > Some(0), "a guest's memory is copied: {now:#}");
    assert_eq!(now["writes_promised"], 0, "nobody declared the guest's memory stable: {now:#}");
    assert!(server.terminate()?.status.success());

    let server = array.serve()?;
    expected.hold_against(&fs::read(array.read_all("restarted.img")?)?);
    let now = status(&array.scratch)?;
    let mended = [&now["blocks_mended"], &now["tuples_mended"], &now["lost_reads"]];
    assert_eq!(
        mended,
        [0, 0, 0],
        "writes that raced with their buffers damaged something: {now:#}"
    );
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// The same guest on an image as it is: no array, and what it wrote is in the file.
#[test]
fn linux_finds_an_image_as_it_is() -> io::Result<()> {
    let Some(out) = built()? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let image = scratch.sparse("disk.img", DISK_BYTES)?;
    let vhost = Export::vhost_user_blk("disk", &scratch.path("vhost.sock")).with("queues", "2");
    let nbd = Export::nbd("disk", &scratch.path("nbd.sock"));
    let server = Serve::raw(&scratch, &image, &[vhost.clone(), nbd.clone()])?;
    prefill(&nbd)?;
    let console = boot(&scratch, &vhost, &out, &["--prefilled"])?;
    assert_is_a_disk(&console);
    assert!(server.terminate()?.status.success());
    Expected::parse(&console).hold_against(&fs::read(&image)?);
    Ok(())
}

/// A BIOS boots from the array, and its boot program reads and writes single sectors of 512
/// bytes: firmware that knows nothing of 4 KiB blocks leaves the rest of each block alone.
#[test]
fn a_bios_boots_from_the_array() -> io::Result<()> {
    const WRITTEN: [usize; 3] = [2, 9, 2047];
    let Some(out) = built()? else { return Ok(()) };
    let array = Raid5::create(Scratch::new()?, "64MiB")?;
    let server = array.serve()?;
    let program = fs::read(out.join("boot.img"))?;
    // The sectors after it hold something that must survive.
    let mut disk = program.clone();
    disk.resize(2 * MIB as usize, 0xcc);
    put(&array, &disk)?;

    let console = boot(&array.scratch, &array.vhost, &out, &["--boot"])?;
    assert!(console.lines().any(|line| line == "BOOT OK"), "{console}");

    for sector in WRITTEN {
        let words = (0..256).map(|i| 0x5a00 + sector as u16 + i);
        let bytes: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
        disk[sector * 512..][..512].copy_from_slice(&bytes);
    }
    let found = fs::read(array.read_all("copy.img")?)?;
    let wrong = disk.chunks(512).zip(found.chunks(512)).position(|(want, found)| want != found);
    assert_eq!(wrong, None, "the first sector that is not as it should be");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// What the guest calls a range of 1 MiB that the host wrote before the boot.
fn prefill(nbd: &Export) -> io::Result<()> {
    let (at, seed) = (48 * MIB, 7);
    let file = tempfile::NamedTempFile::new()?;
    let bytes: Vec<u8> =
        (at..at + MIB).step_by(8).flat_map(|o| word(seed, o).to_le_bytes()).collect();
    fs::write(file.path(), bytes)?;
    let write = format!("write -s {} {at} {MIB}", file.path().display());
    qemu_io(&nbd.uri(), &[&write]).map(drop)
}

/// Puts bytes at the start of the array, through NBD.
fn put(array: &Raid5, bytes: &[u8]) -> io::Result<()> {
    let file = array.scratch.path("start.img");
    fs::write(&file, bytes)?;
    let write = format!("write -s {} 0 {}", file.display(), bytes.len());
    qemu_io(&array.nbd.uri(), &[&write, "flush"]).map(drop)
}

/// What a guest's kernel takes the export for.
fn assert_is_a_disk(console: &str) {
    for line in [
        "DISK ro=0",
        "DISK serial=disk",
        "DISK logical_block_size=512",
        "DISK physical_block_size=4096",
        // So that its fsync reaches us.
        "DISK write_cache=write back",
        "DISK queues=2",
        "GUEST OK",
    ] {
        assert!(console.lines().any(|l| l == line), "the guest did not say {line:?}:\n{console}");
    }
}

/// The pattern of `init.c`.
fn word(seed: u64, offset: u64) -> u64 {
    stableio_testkit::Random::new(offset ^ (seed << 48)).word()
}

/// What the guest says that it left behind.
struct Expected(Vec<(String, u64, u64, [u64; 2])>);

impl Expected {
    fn parse(console: &str) -> Expected {
        let lines = console.lines().filter_map(|line| line.strip_prefix("EXPECT "));
        let ranges: Vec<_> = lines.map(Self::parse_line).collect();
        // Every step of its test, or nothing was looked at.
        for kind in ["pattern", "zero", "race"] {
            assert!(ranges.iter().any(|range| range.0 == kind), "no range of {kind}:\n{console}");
        }
        Expected(ranges)
    }

    /// `KIND off=… len=… [two more numbers]`
    fn parse_line(line: &str) -> (String, u64, u64, [u64; 2]) {
        let (kind, numbers) = line.split_once(' ').expect("a kind and numbers");
        let mut numbers = numbers.split(' ').map(|number| {
            let value = number.split_once('=').map(|(_, value)| value.parse());
            value.unwrap_or_else(|| panic!("{line}")).unwrap_or_else(|_| panic!("{line}"))
        });
        let mut next = || numbers.next();
        let (off, len) = (next().expect("off"), next().expect("len"));
        (kind.to_owned(), off, len, [next().unwrap_or(0), next().unwrap_or(0)])
    }

    fn hold_against(&self, disk: &[u8]) {
        for (kind, off, len, [a, b]) in &self.0 {
            let bytes = &disk[*off as usize..(*off + *len) as usize];
            for (i, found) in (0..).step_by(8).zip(bytes.as_chunks().0) {
                let (at, found) = (off + i, u64::from_le_bytes(*found));
                let right = match kind.as_str() {
                    "pattern" => found == word(*a, b + i),
                    "zero" => found == 0,
                    "discarded" => found == 0 || found == word(*a, at),
                    "race" => (*a..a + b).any(|seed| found == word(seed, at)),
                    other => panic!("the guest speaks of {other}, which is not known here"),
                };
                assert!(right, "{kind} of {off}+{len} ({a}, {b}): byte {at} begins {found:016x}");
            }
        }
    }
}
