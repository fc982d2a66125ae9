//! A real disk image, through the programs that people move images with.
//!
//! An ext4 file system with some hundred files goes onto the array with `qemu-img convert` and
//! comes back with `nbdcopy`: after a restart, after rot on a member, and without that member.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stableio_testkit::{
    Raid5, Random, Scratch, bytes_taken, first_difference, qemu_io, quick, require_tools,
    run_stableio, run_tool, status,
};

const MIB: u64 = 1 << 20;

/// What all tests here need.
const TOOLS: [&str; 5] = ["qemu-img", "qemu-io", "nbdcopy", "mke2fs", "e2fsck"];

/// A file system in an image, and an array that it fits into.
struct Filled {
    array: Raid5,
    image: PathBuf,
    bytes: u64,
}

impl Filled {
    /// Makes both, and puts the image onto the array; the server is stopped.
    fn new(seed: u64) -> io::Result<Filled> {
        let mib = if quick() { 64 } else { 256 };
        let scratch = Scratch::with_room(6 * mib * MIB)?;
        let image = ext4(&scratch, seed, mib)?;
        // Two of three members hold data: a little more than the image, as in practice.
        let array = Raid5::create(scratch, &format!("{}MiB", mib / 2 + 8))?;
        let server = array.serve()?;
        convert(&image, &array.nbd.uri())?;
        assert!(server.terminate()?.status.success());
        Ok(Filled { array, image, bytes: mib * MIB })
    }

    /// Reads the whole export into a file and holds it against the image.
    fn compare(&self, what: &str) -> io::Result<PathBuf> {
        let copy = self.array.read_all("copy.img")?;
        let difference = first_difference(&self.image, &copy, self.bytes)?;
        assert_eq!(difference, None, "{what}: the first byte that differs from the image");
        Ok(copy)
    }
}

/// The image comes out of the array as it went in, and the file system in it is clean.
#[test]
fn an_image_is_the_same_after_a_restart() -> io::Result<()> {
    if !require_tools(&TOOLS) {
        return Ok(());
    }
    let filled = Filled::new(1)?;
    let server = filled.array.serve()?;
    let copy = filled.compare("after a restart")?;
    let now = status(&filled.array.scratch)?;
    assert_eq!(now["state"], "healthy");
    assert_eq!(damage(&now), [0, 0, 0], "a sound array has nothing to mend: {now:#}");
    assert!(server.terminate()?.status.success());

    File::options().write(true).open(&copy)?.set_len(filled.bytes)?;
    run_tool(Path::new("e2fsck"), [Path::new("-fn"), &copy])?;
    Ok(())
}

/// Rot on one member is found by its checksum, mended from the others, and counted against that
/// member alone. Then the array does without it: the same bytes, and new ones can be written.
#[test]
fn rot_is_mended_and_the_rotten_member_can_go() -> io::Result<()> {
    const ROTTEN: usize = 1;
    if !require_tools(&TOOLS) {
        return Ok(());
    }
    let mut filled = Filled::new(2)?;
    flip_bytes(&filled.array, ROTTEN)?;

    let server = filled.array.serve()?;
    filled.compare("with rot on a member")?;
    let now = status(&filled.array.scratch)?;
    let [blocks_mended, tuples_mended, lost_reads] = damage(&now);
    assert!(blocks_mended > 0 && tuples_mended > 0, "{now:#}");
    assert_eq!(lost_reads, 0, "{now:#}");
    for (role, member) in now["members"].as_array().expect("members").iter().enumerate() {
        let charged = number(&member["mismatches"]) > 0;
        assert_eq!(charged, role == ROTTEN, "rot is charged to the member that has it: {now:#}");
        assert_eq!(member["in_sync"], true, "rot is no reason to drop a member: {now:#}");
    }
    assert!(server.terminate()?.status.success());

    let server = filled.array.serve()?;
    filled.compare("after it was mended")?;
    let now = status(&filled.array.scratch)?;
    assert_eq!(damage(&now), [0, 0, 0], "nothing is left to mend: {now:#}");
    assert!(server.terminate()?.status.success());

    fs::remove_file(filled.array.members.remove(ROTTEN))?;
    let server = filled.array.serve()?;
    filled.compare("without the member")?;
    let now = status(&filled.array.scratch)?;
    assert_eq!(now["state"], "degraded");
    assert_eq!(now["members"][ROTTEN]["in_sync"], false);
    let listed = run_stableio(
        &filled.array.scratch,
        [Path::new("list"), Path::new("--json"), filled.array.scratch.dir()],
    )?;
    let listed: Value = serde_json::from_str(&listed.stdout)?;
    assert!(listed[0]["state"].as_str().is_some_and(|s| s.contains("DEGRADED")), "{listed:#}");

    write_and_expect(&filled)?;
    assert!(server.terminate()?.status.success());
    let server = filled.array.serve()?;
    filled.compare("after a restart without the member")?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// A range that nobody wrote is a hole to those who ask, and so a backup of a nearly empty array
/// is small.
#[test]
fn backups_skip_holes() -> io::Result<()> {
    if !require_tools(&TOOLS) || !require_tools(&["nbdinfo"]) {
        return Ok(());
    }
    let array = Raid5::create(Scratch::new()?, "1GiB")?;
    let server = array.serve()?;
    let uri = array.nbd.uri();
    qemu_io(&uri, &["write -P 0x5a 300M 1M"])?;

    let map = run_tool(Path::new("nbdinfo"), ["--map", "--json", &uri])?;
    let map: Value = serde_json::from_str(&map)?;
    let extents = map.as_array().expect("a list of extents");
    let of_data: Vec<_> = extents.iter().filter(|e| number(&e["type"]) == 0).collect();
    assert_eq!(of_data.len(), 1, "{map:#}");
    assert_eq!(number(&of_data[0]["offset"]), 300 * MIB);
    assert_eq!(number(&of_data[0]["length"]), MIB);
    let holes = extents.iter().filter(|e| e["description"] == "hole,zero");
    assert_eq!(holes.count(), extents.len() - 1, "the rest is holes that read as zeros: {map:#}");

    let copy = array.read_all("copy.img")?;
    let taken = bytes_taken(&copy)?;
    assert!(taken <= 2 * MIB, "nbdcopy's copy of 1 MiB takes {taken} bytes");
    let backup = array.scratch.path("backup.qcow2");
    let formats = ["convert", "-f", "raw", "-O", "qcow2"].map(Path::new);
    run_tool(Path::new("qemu-img"), formats.into_iter().chain([Path::new(&uri), &backup]))?;
    let taken = bytes_taken(&backup)?;
    assert!(taken <= 4 * MIB, "qemu-img's copy of 1 MiB takes {taken} bytes");
    // What was skipped was not lost: the image still compares with the export.
    let compare = ["compare", "-f", "qcow2", "-F", "raw"].map(Path::new);
    run_tool(Path::new("qemu-img"), compare.into_iter().chain([&backup, Path::new(&uri)]))?;
    for member in &array.members {
        let taken = bytes_taken(member)?;
        assert!(taken <= 4 * MIB, "{}: 1 MiB of data takes {taken} bytes", member.display());
    }
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// An ext4 file system of `mib` MiB, three quarters full of files of many sizes.
fn ext4(scratch: &Scratch, seed: u64, mib: u64) -> io::Result<PathBuf> {
    let mut random = Random::new(seed);
    let tree = scratch.path("tree");
    let mut left = mib * MIB * 3 / 4;
    for number in 0.. {
        // As many small files as large ones: the exponent is what is random.
        let exponent = random.below(24);
        let size = random.below(1 << exponent);
        if size > left {
            break;
        }
        left -= size;
        let dir = tree.join(format!("{}/{}", number % 7, number % 5));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("file-{number}")), random.bytes(size as usize))?;
    }
    let image = scratch.sparse("disk.img", mib * MIB)?;
    let options = ["-q", "-t", "ext4", "-d"].map(Path::new);
    run_tool(Path::new("mke2fs"), options.into_iter().chain([tree.as_path(), &image]))?;
    fs::remove_dir_all(&tree)?;
    Ok(image)
}

/// Puts an image onto an export.
fn convert(image: &Path, uri: &str) -> io::Result<()> {
    let options = ["convert", "-n", "-f", "raw", "-O", "raw"].map(Path::new);
    run_tool(Path::new("qemu-img"), options.into_iter().chain([image, Path::new(uri)])).map(drop)
}

/// Flips a bit or more of 100 bytes of a member whose server is stopped: 90 of them anywhere,
/// 10 of them where its checksums are.
fn flip_bytes(array: &Raid5, role: usize) -> io::Result<()> {
    let layout = array.examine(role)?;
    let [guards, data, end] =
        ["guards_at", "data_at", "member_size_bytes"].map(|key| number(&layout[key]));
    let member = File::options().read(true).write(true).open(&array.members[role])?;
    let mut random = Random::new(3);
    for nth in 0..100 {
        let (from, to) = if nth < 10 { (guards, data) } else { (0, end) };
        let at = from + random.below(to - from);
        let mut byte = [0];
        member.read_exact_at(&mut byte, at)?;
        byte[0] ^= 1 + random.below(255) as u8;
        member.write_all_at(&byte, at)?;
    }
    Ok(())
}

/// Changes some places of both the export and the image, which then must be the same again.
fn write_and_expect(filled: &Filled) -> io::Result<()> {
    let image = File::options().write(true).open(&filled.image)?;
    let mut commands = Vec::new();
    let mut random = Random::new(4);
    // Parts of a block, blocks, and more than a stripe.
    for (pattern, len) in (1u8..).zip([512, 4096, 3 * 512, 65536, MIB, 4096 + 512]) {
        let at = random.below((filled.bytes - len) / 512) * 512;
        commands.push(format!("write -P {pattern} {at} {len}"));
        image.write_all_at(&vec![pattern; len as usize], at)?;
    }
    commands.push("flush".to_owned());
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    qemu_io(&filled.array.nbd.uri(), &commands)?;
    filled.compare("written without the member").map(drop)
}

/// Blocks mended, tuples mended, reads lost.
fn damage(status: &Value) -> [u64; 3] {
    ["blocks_mended", "tuples_mended", "lost_reads"].map(|key| number(&status[key]))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))
}
