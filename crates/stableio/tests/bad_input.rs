//! Bad input: one clear line (what, which file, what to do), an exit code, and nothing changed.
//!
//! Every refusal here is checked for all three: the line is one and names what it must name, the
//! code is 1 (2 for a wrong command line), and no file of the test's directory is other than it
//! was before: not its bytes, not its metadata, none more and none fewer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use stableio_array::Superblock;
use stableio_array::superblock::Id;
use stableio_testkit::{
    Child, Ended, Export, Random, Scratch, Serve, qemu_io, require_tools, run_tool, skip, stableio,
};

const BLOCK: usize = 4096;
const MEMBER_BYTES: u64 = 8 << 20;

/// A directory for the files of a test, beside what the processes say.
struct Place {
    scratch: Scratch,
    dir: PathBuf,
}

impl Place {
    fn new() -> io::Result<Place> {
        let scratch = Scratch::new()?;
        let dir = scratch.path("d");
        fs::create_dir(&dir)?;
        Ok(Place { scratch, dir })
    }

    /// The path of a file here.
    fn path(&self, name: &str) -> String {
        self.dir.join(name).into_os_string().into_string().expect("paths here are text")
    }

    /// A file of `bytes` bytes: random up to `filled`, then a hole.
    fn file(&self, name: &str, filled: u64, bytes: u64) -> io::Result<String> {
        let path = self.path(name);
        fs::write(&path, Random::new(1).bytes(filled as usize))?;
        File::options().write(true).open(&path)?.set_len(bytes)?;
        Ok(path)
    }

    /// The members of a new raid5 array.
    fn array(&self, name: &str) -> io::Result<[String; 3]> {
        let members = [0, 1, 2].map(|role| self.path(&format!("{name}-{role}")));
        let size = MEMBER_BYTES.to_string();
        let ended = self.run(&[
            "create",
            name,
            "--member-size",
            &size,
            &members[0],
            &members[1],
            &members[2],
        ])?;
        assert!(ended.status.success(), "{ended:?}");
        Ok(members)
    }

    /// An `--export` at a socket here, which nothing but a running server leaves there.
    fn export(&self) -> String {
        format!("--export=nbd,name=disk,path={}", self.path("nbd.sock"))
    }

    fn serve(&self, members: &[&str]) -> io::Result<Serve> {
        let members: Vec<_> = members.iter().map(PathBuf::from).collect();
        let export = Export::nbd("disk", &self.dir.join("nbd.sock"));
        Serve::array(&self.scratch, &members, &[export])
    }

    fn run(&self, args: &[&str]) -> io::Result<Ended> {
        let mut command = stableio(&self.scratch)?;
        command.args(args);
        // Those that should be refused and are served instead do not end.
        Child::spawn(command, &self.scratch)?.wait_within(Duration::from_secs(20))
    }

    /// Runs `stableio ARG…`, which must refuse in one line that contains all of `says`.
    fn refused(&self, args: &[&str], says: &[&str]) -> io::Result<()> {
        let before = self.snapshot()?;
        let ended = self.run(args)?;
        let what = format!("stableio {}\n{}{}", args.join(" "), ended.stdout, ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{what}");
        let lines: Vec<_> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one line, please: {what}");
        assert!(lines[0].starts_with("stableio: "), "{what}");
        for text in says {
            assert!(lines[0].contains(text), "the line does not say {text:?}: {what}");
        }
        assert_eq!(ended.stdout, "", "{what}");
        assert_same(&before, &self.snapshot()?, &what);
        Ok(())
    }

    /// The same of `stableio serve MEMBER…`.
    fn serve_refused(&self, members: &[&str], says: &[&str]) -> io::Result<()> {
        let export = self.export();
        self.refused(&[&["serve", &export], members].concat(), says)
    }

    /// A wrong command line: exit code 2, and what is wrong in the first line.
    fn misused(&self, args: &[&str], says: &[&str]) -> io::Result<()> {
        let before = self.snapshot()?;
        let ended = self.run(args)?;
        let what = format!("stableio {}\n{}{}", args.join(" "), ended.stdout, ended.stderr);
        assert_eq!(ended.status.code(), Some(2), "{what}");
        for text in says {
            assert!(ended.stderr.contains(text), "it does not say {text:?}: {what}");
        }
        assert_same(&before, &self.snapshot()?, &what);
        Ok(())
    }

    fn snapshot(&self) -> io::Result<BTreeMap<PathBuf, String>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            let mut hasher = DefaultHasher::new();
            if meta.is_file() {
                fs::read(&path)?.hash(&mut hasher);
            }
            let (mode, len, changed) = (meta.mode(), meta.len(), (meta.mtime(), meta.mtime_nsec()));
            let (inode, hash) = (meta.ino(), hasher.finish());
            let state =
                format!("inode {inode} mode {mode:o} {len} bytes, changed {changed:?}, {hash:x}");
            all.insert(path, state);
        }
        Ok(all)
    }
}

fn assert_same(before: &BTreeMap<PathBuf, String>, after: &BTreeMap<PathBuf, String>, what: &str) {
    for path in before.keys().chain(after.keys()) {
        assert_eq!(before.get(path), after.get(path), "{} was changed by {what}", path.display());
    }
}

// ---- members that do not make an array ----

#[test]
fn a_tier_that_is_not_there_is_refused() -> io::Result<()> {
    let command = std::process::Command::new(env!("CARGO_BIN_EXE_stableio"))
        .args(["list", "."])
        .env("STABLEIO_ONEPASS", "avx3")
        .output()?;
    let said = String::from_utf8_lossy(&command.stderr);
    assert_eq!(command.status.code(), Some(1), "{said}");
    assert!(said.starts_with("stableio: STABLEIO_ONEPASS=avx3: "), "{said}");
    assert!(said.contains("portable") && said.lines().count() == 1, "{said}");
    Ok(())
}

#[test]
fn members_must_be_there_and_be_enough() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let export = place.export();
    place.misused(&["serve", &export], &["<MEMBERS>"])?;
    place.misused(&["serve", &a0, &a1, &a2], &["--export"])?;
    let empty = place.path("empty-dir");
    fs::create_dir(&empty)?;
    place.serve_refused(&[&empty], &["no members"])?;
    let absent = place.path("absent");
    place.serve_refused(&[&absent, &a0, &a1], &[&absent, "No such file"])?;
    place.serve_refused(&[&a1], &["'a' has 1 of 3", "at least 2", "role 0, role 2"])?;
    // Any order, and a directory for its members.
    for members in [&[&*a2, &a0, &a1][..], &[place.dir.to_str().expect("text")]] {
        assert!(place.serve(members)?.terminate()?.status.success());
    }
    Ok(())
}

#[test]
fn a_member_counts_once() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let (copy, link, hard) = (place.path("copy"), place.path("link"), place.path("hard"));
    fs::copy(&a1, &copy)?;
    symlink(&a1, &link)?;
    fs::hard_link(&a1, &hard)?;
    for twin in [&a1, &copy, &link, &hard] {
        place.serve_refused(&[&a0, &a1, &a2, twin], &[&a1, twin, "same member"])?;
        place.serve_refused(&[&a1, twin], &[&a1, twin, "same member"])?;
    }
    Ok(())
}

#[test]
fn members_are_of_one_array() -> io::Result<()> {
    let place = Place::new()?;
    let ([a0, a1, a2], [b0, _, b2]) = (place.array("a")?, place.array("b")?);
    place.serve_refused(&[&a0, &b2, &a1], &[&a0, &b2, "'a'", "'b'", "one array at a time"])?;
    place.serve_refused(&[place.dir.to_str().expect("text")], &["'a'", "'b'"])?;
    // Of the same name it is another array all the same.
    let other = Place::new()?;
    let [_, other1, _] = other.array("a")?;
    place.serve_refused(&[&a0, &other1, &a2], &[&a0, &other1])?;

    // A member that the array replaced some time ago is left out; the others are enough.
    let mut old = superblock(&a2)?;
    assert!(place.serve(&[&a0, &a1, &a2])?.terminate()?.status.success());
    old.member = Id::random();
    old.roles[2].id = old.member;
    let former = place.path("former");
    fs::copy(&a2, &former)?;
    put_superblock(&former, &old)?;
    let ended = place.serve(&[&a0, &a1, &former])?.terminate()?;
    let says =
        |line: &str| [&*former, "replaced", "LEFT OUT"].iter().all(|text| line.contains(text));
    assert!(ended.stderr.lines().any(says), "{ended:?}");
    drop(b0);
    Ok(())
}

#[test]
fn a_member_in_use_is_locked() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let server = place.serve(&[&a0, &a1, &a2])?;
    let second = format!("--export=nbd,path={}", place.path("second.sock"));
    let raw = place.file("raw", 0, MEMBER_BYTES)?;
    let raw_server = Serve::raw(
        &place.scratch,
        Path::new(&raw),
        &[Export::nbd("raw", &place.dir.join("raw.sock"))],
    )?;
    place.refused(&["serve", &second, &a0, &a1, &a2], &[&a0, "in use"])?;
    place.refused(&["serve", &second, &a1, &a2], &[&a1, "in use"])?;
    place.refused(&["serve", &second, "--raw", &raw], &[&raw, "in use"])?;
    let size = MEMBER_BYTES.to_string();
    let new = place.path("new");
    for force in [&[][..], &["--force"]] {
        let create = [&["create", "b", "--level=single"], force, &[&a1]].concat();
        place.refused(&create, &[&a1, "in use"])?;
        let create = ["create", "b", "--member-size", &size, &new, &a1, &raw];
        place.refused(&[&create[..], force].concat(), &["in use"])?;
    }
    assert!(server.terminate()?.status.success());
    assert!(raw_server.terminate()?.status.success());
    assert!(place.serve(&[&a0, &a1, &a2])?.terminate()?.status.success());
    Ok(())
}

// ---- members that are damaged ----

#[test]
fn what_is_no_member_is_refused() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let refused = |bad: &str, says: &[&str]| {
        place.serve_refused(&[&a0, &a1, bad], &[&[bad], says].concat())?;
        place.refused(&["examine", bad], &[&[bad], says].concat())
    };
    refused(&place.file("nothing", 0, 0)?, &["too short"])?;
    refused(&place.file("short", 5000, 5000)?, &["too short"])?;
    refused(&place.file("zeros", 0, MEMBER_BYTES)?, &["not a stableio member"])?;
    refused(&place.file("noise", MEMBER_BYTES, MEMBER_BYTES)?, &["not a stableio member"])?;
    let cut = place.path("cut");
    fs::copy(&a2, &cut)?;
    File::options().write(true).open(&cut)?.set_len(MEMBER_BYTES / 2)?;
    refused(&cut, &["truncated", "4 MiB of 8 MiB"])?;
    // Neither a file nor a disk: to read the first would never end, the second has no end.
    let pipe = place.path("pipe");
    run_tool(Path::new("mkfifo"), [&pipe])?;
    refused(&pipe, &["neither a regular file nor a block device"])?;
    refused("/dev/zero", &["neither a regular file nor a block device"])?;
    place.serve_refused(&["/proc/version", &a0], &["/proc/version"])?;
    Ok(())
}

/// A format of the future, and content that is impossible under a checksum that is right.
#[test]
fn what_this_version_does_not_know_is_refused() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let strange = place.path("strange");
    for (at, bytes, says) in [
        (8, &7u32.to_le_bytes()[..], "format 7 is not known to this version"),
        (75, &[9], "unknown checksum"),
        (72, &[9], "unknown level"),
        (73, &[200], "impossible geometry"),
        (74, &[3], "role outside the array"),
        (88, &u64::MAX.to_le_bytes(), "impossible geometry"),
        (96, b"\x1b[31m", "impossible name"),
    ] {
        fs::copy(&a2, &strange)?;
        let mut block = superblock(&a2)?.encode();
        block[at..at + bytes.len()].copy_from_slice(bytes);
        let guard = stableio_onepass::guard(&block[..BLOCK - 8]);
        block[BLOCK - 8..].copy_from_slice(&guard.to_le_bytes());
        put_block(&strange, &block)?;
        place.serve_refused(&[&a0, &a1, &strange], &[&strange, says])?;
        place.refused(&["examine", &strange], &[&strange, says])?;
    }
    Ok(())
}

/// One damaged copy of a superblock is mended from the other, and said; both are too many.
#[test]
fn a_superblock_has_two_copies() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let last = MEMBER_BYTES - BLOCK as u64;
    for (copy, at) in [("first", 100), ("first", 0), ("last", last + 3000), ("last", last)] {
        let file = File::options().write(true).open(&a1)?;
        file.write_all_at(&[0xff; 16], at)?;
        let ended = place.run(&["examine", &a1])?;
        assert!(ended.status.success() && ended.stdout.contains("damaged"), "{ended:?}");
        let ended = place.serve(&[&a0, &a1, &a2])?.terminate()?;
        assert!(ended.status.success(), "{ended:?}");
        let says = |line: &str| [&*a1, copy, "mended"].iter().all(|text| line.contains(text));
        assert!(ended.stderr.lines().any(says), "{ended:?}");
        let ended = place.run(&["examine", &a1])?;
        assert!(ended.status.success() && !ended.stdout.contains("damaged"), "{ended:?}");
        let mut blocks = [[0; BLOCK]; 2];
        let file = File::open(&a1)?;
        file.read_exact_at(&mut blocks[0], 0)?;
        file.read_exact_at(&mut blocks[1], last)?;
        assert!(blocks[0] == blocks[1], "both copies are the same again");
    }
    let file = File::options().write(true).open(&a1)?;
    file.write_all_at(&[0xff; 16], 100)?;
    file.write_all_at(&[0xff; 16], last + 100)?;
    place.serve_refused(&[&a0, &a1, &a2], &[&a1, "both superblock copies are damaged", "leave"])?;
    assert!(place.serve(&[&a0, &a2])?.terminate()?.status.success());
    Ok(())
}

// ---- members of another time ----

/// A member that the others did without is left out, loudly, and not touched; what was written
/// without it is what is served.
#[test]
fn a_stale_member_is_left_out() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let uri = Export::nbd("disk", &place.dir.join("nbd.sock")).uri();
    let server = place.serve(&[&a0, &a1, &a2])?;
    qemu_io(&uri, &["write -P 1 0 1M"])?;
    assert!(server.terminate()?.status.success());
    let server = place.serve(&[&a0, &a1])?;
    qemu_io(&uri, &["write -P 2 0 1M"])?;
    assert!(server.terminate()?.status.success());

    let stale = fs::read(&a2)?;
    let server = place.serve(&[&a0, &a1, &a2])?;
    qemu_io(&uri, &["read -P 2 0 1M"])?;
    let ended = server.terminate()?;
    let says = |line: &str| [&*a2, "WARNING", "stale", "LEFT OUT"].iter().all(|t| line.contains(t));
    assert!(ended.stderr.lines().any(says), "{ended:?}");
    assert!(fs::read(&a2)? == stale, "the stale member was written");
    // With it alone and one of the others there are not enough.
    place.serve_refused(&[&a1, &a2], &["'a' has 1 of 3"])?;
    Ok(())
}

/// Halves of an array that went on without each other: only the administrator knows which to
/// believe. That they do not meet the newest member, but each other, changes nothing.
#[test]
fn members_with_different_histories_are_refused() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let place = Place::new()?;
    let uri = Export::nbd("disk", &place.dir.join("nbd.sock")).uri();
    let [a0, a1, a2] = place.array("a")?;
    let (b0, b2) = (place.path("b-0"), place.path("b-2"));
    fs::copy(&a0, &b0)?;
    fs::copy(&a2, &b2)?;
    let write = |members: &[&str], pattern: u8| {
        let server = place.serve(members)?;
        qemu_io(&uri, &[&format!("write -P {pattern} 0 1M")])?;
        let ended = server.terminate()?;
        assert!(ended.status.success(), "{ended:?}");
        Ok::<_, io::Error>(())
    };
    write(&[&a0, &a1], 1)?;
    write(&[&b0, &b2], 2)?;
    place.serve_refused(&[&a1, &b2], &[&a1, &b2, "--trust-member"])?;
    for others in [[&a0, &a1], [&a1, &a0]] {
        place.serve_refused(&[others[0], others[1], &b2], &[&b2, "--trust-member"])?;
    }
    // One side grows older than the other.
    write(&[&a0, &a1], 3)?;
    place.serve_refused(&[&a1, &b2], &[&a1, &b2, "--trust-member"])?;
    for others in [[&a0, &a1], [&a1, &a0]] {
        place.serve_refused(&[others[0], others[1], &b2], &[&b2, "--trust-member"])?;
    }

    let absent = place.path("absent");
    place
        .serve_refused(&["--trust-member", &absent, &a0, &a1, &b2], &["--trust-member", &absent])?;
    let left_out = fs::read(&b2)?;
    let server = place.serve(&["--trust-member", &a0, &a0, &a1, &b2])?;
    qemu_io(&uri, &["read -P 3 0 1M"])?;
    let ended = server.terminate()?;
    assert!(ended.stderr.lines().any(|l| l.contains(&b2) && l.contains("LEFT OUT")), "{ended:?}");
    assert!(fs::read(&b2)? == left_out, "the member that is not trusted was written");
    Ok(())
}

// ---- create ----

#[test]
fn create_overwrites_nothing_unasked() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let refused = |file: &str, says: &[&str]| {
        let says = [&[file, "--force"], says].concat();
        place.refused(&["create", "b", "--level=single", file], &says)?;
        // The others are fit to be members; they stay as they are.
        let (x, y) = (place.file("x", 0, MEMBER_BYTES)?, place.path("y"));
        let size = MEMBER_BYTES.to_string();
        place.refused(&["create", "b", "--member-size", &size, &x, &y, file], &says)
    };
    refused(&a1, &["stableio array"])?;
    refused(&place.file("noise", MEMBER_BYTES, MEMBER_BYTES)?, &["data"])?;
    // A file may hold little, and anywhere.
    for (name, at) in [("start", 1), ("middle", MEMBER_BYTES / 2), ("end", MEMBER_BYTES - 1)] {
        let path = place.file(name, 0, MEMBER_BYTES)?;
        File::options().write(true).open(&path)?.write_all_at(&[1], at)?;
        refused(&path, &["data"])?;
    }
    if require_tools(&["mke2fs"]) {
        let ext4 = place.file("ext4", 0, MEMBER_BYTES)?;
        run_tool(Path::new("mke2fs"), ["-q", "-t", "ext4", &ext4])?;
        refused(&ext4, &["ext4 file system"])?;
    }
    // A member all the same, though its first superblock is gone.
    File::options().write(true).open(&a2)?.write_all_at(&[0; BLOCK], 0)?;
    refused(&a2, &[])?;
    let ended = place.run(&["create", "b", "--force", &a0, &a1, &a2])?;
    assert!(ended.status.success(), "{ended:?}");
    assert!(place.serve(&[&a0, &a1, &a2])?.terminate()?.status.success());
    Ok(())
}

#[test]
fn shapes_that_can_not_be_are_refused() -> io::Result<()> {
    let place = Place::new()?;
    let new: Vec<_> = (0..17).map(|i| place.path(&format!("new-{i}"))).collect();
    let new: Vec<_> = new.iter().map(String::as_str).collect();
    let create = |options: &[&str], members: &[&str], says: &[&str]| {
        place.refused(&[&["create", "a"], options, members].concat(), says)
    };
    let sized = ["--member-size=8MiB"];
    create(&sized, &new[..2], &["raid5", "3 to 16 members", "not 2"])?;
    create(&sized, &new, &["raid5", "3 to 16 members", "not 17"])?;
    create(&[&sized[..], &["--level=single"]].concat(), &new[..2], &["single", "not 2"])?;
    create(&["--member-size=100KiB"], &new[..3], &["too small", "at least"])?;
    create(&[], &new[..3], &[new[0], "does not exist", "--member-size"])?;
    for chunk in ["48KiB", "2KiB", "2MiB", "0"] {
        let chunk = format!("--chunk={chunk}");
        create(&[sized[0], &chunk], &new[..3], &["chunk", "power of two"])?;
    }
    create(&sized, &[new[0], new[1], new[0]], &[new[0], "twice"])?;
    let (x, link) = (place.file("x", 0, MEMBER_BYTES)?, place.path("link"));
    symlink(&x, &link)?;
    create(&sized, &[&x, new[1], &link], &[&link, "twice"])?;
    create(&["--member-size=9MiB"], &[&x, new[1], new[2]], &[&x, "8 MiB", "9 MiB"])?;
    let nowhere = place.path("no/such/directory/m");
    create(&sized, &[new[0], new[1], &nowhere], &[&nowhere, "No such file"])?;
    create(&sized, &[new[0], new[1], "/dev/null"], &["/dev/null", "neither a regular file"])?;
    let dir = place.dir.to_str().expect("text");
    create(&sized, &[new[0], new[1], dir], &[dir, "neither a regular file"])?;
    for name in ["", "a/b", "..", "a b", "\u{1b}[31m", &"n".repeat(65)] {
        let args = ["create", name, sized[0], new[0], new[1], new[2]];
        place.refused(&args, &["letters, digits"])?;
    }
    place.misused(&["create", "a"], &["<MEMBERS>"])?;
    for (option, says) in
        [("--level=raid0", "raid5"), ("--chunk=64XB", "64XB"), ("--checksums=md5", "on, off")]
    {
        place.misused(&["create", "a", option, sized[0], new[0], new[1], new[2]], &[says])?;
    }
    for level in ["raid1", "raid5", "raid6"] {
        let level = &format!("--level={level}");
        let neither = [level, "--checksums=off", "--log=off", sized[0], new[0], new[1], new[2]];
        place.refused(&[&["create", "a"], &neither[..]].concat(), &["--checksums off", "log"])?;
    }
    // Files may be sparse, but not of any size: 2 EiB is a file that a file system in memory
    // would make, 4 EiB none that any would, and 16 EiB no number of bytes.
    create(&["--member-size=2097152TiB"], &new[..3], &[])?;
    create(&["--member-size=4194304TiB"], &new[..3], &[])?;
    let size = "--member-size=16777216TiB";
    place.misused(&["create", "a", size, new[0], new[1], new[2]], &["16777216TiB"])
}

// ---- exports ----

#[test]
fn a_socket_takes_nobodys_place() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let at = |path: &str, says: &[&str]| {
        for kind in ["nbd", "vhost-user-blk"] {
            let export = format!("--export={kind},path={path}");
            place.refused(&["serve", &export, &a0, &a1, &a2], &[&[path], says].concat())?;
        }
        Ok::<_, io::Error>(())
    };
    at(&place.file("precious", 100, 100)?, &["no socket", "not touched"])?;
    let dangling = place.path("dangling");
    symlink("nowhere", &dangling)?;
    at(&dangling, &["not touched"])?;
    let live = place.path("live");
    let listener = UnixListener::bind(&live)?;
    at(&live, &["in use by another server"])?;
    drop(listener);
    fs::remove_file(&live)?;
    let nowhere = place.path("no/such/directory");
    let export = format!("--export=nbd,path={nowhere}/nbd.sock");
    place.refused(&["serve", &export, &a0, &a1, &a2], &[&nowhere, "does not exist"])?;
    at(&place.path(&"x".repeat(120)), &["too long", "107"])?;
    // A good one beside a bad one goes as it came.
    let bad = format!("--export=nbd,path={nowhere}/nbd.sock");
    place.refused(&["serve", &place.export(), &bad, &a0, &a1, &a2], &[&nowhere])?;
    let twice = format!("--export=vhost-user-blk,path={}", place.path("nbd.sock"));
    place.refused(&["serve", &place.export(), &twice, &a0, &a1, &a2], &["two exports"])?;
    place.refused(
        &["serve", &place.export(), &place.export(), &a0, &a1, &a2],
        &["'disk'", "name="],
    )?;

    // What a killed server left is no obstacle, and its removal is said.
    drop(UnixListener::bind(place.path("nbd.sock"))?);
    let ended = place.serve(&[&a0, &a1, &a2])?.terminate()?;
    assert!(ended.status.success());
    let says = |line: &str| line.contains(&place.path("nbd.sock")) && line.contains("removed");
    assert!(ended.stderr.lines().any(says), "{ended:?}");
    assert!(!Path::new(&place.path("nbd.sock")).exists(), "its socket goes with it");
    Ok(())
}

#[test]
fn exports_that_are_none_are_refused() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    for address in ["0.0.0.0:10809", "[::]:10809", "192.0.2.1:10809"] {
        let export = format!("--export=nbd,tcp={address}");
        place.refused(&["serve", &export, &a0, &a1, &a2], &[address, "loopback"])?;
    }
    for (export, says) in [
        ("", "nbd or vhost-user-blk"),
        ("iscsi,path=x", "iscsi"),
        ("nbd", "path=SOCKET"),
        ("nbd,path=", "path="),
        ("nbd,path=a,path=b", "once"),
        ("nbd,path=a,queues=2", "queues=2"),
        ("nbd,path=a,colour=red", "colour=red"),
        ("nbd,path=a,mode=999", "octal"),
        ("nbd,path=a,group=no-such-group", "no-such-group"),
        ("nbd,path=a,name=../x", "letters, digits"),
        ("nbd,path=a,readonly=maybe", "on or off"),
        ("nbd,tcp=localhost", "127.0.0.1"),
        ("nbd,tcp=127.0.0.1:99999", "127.0.0.1:99999"),
        ("vhost-user-blk,tcp=127.0.0.1:1", "tcp"),
        ("vhost-user-blk,path=a,queues=0", "1 to 64"),
        ("vhost-user-blk,path=a,buffers=maybe", "unstable"),
    ] {
        let export = format!("--export={export}");
        place.misused(&["serve", &export, &a0, &a1, &a2], &["--export", says])?;
    }
    place.serve_refused(&["--pool=1MiB", &a0, &a1, &a2], &["--pool", "16 MiB"])?;
    place.misused(&["serve", &place.export(), "--pool=much", &a0, &a1, &a2], &["--pool", "much"])
}

// ---- images as they are, and the rest ----

#[test]
fn an_image_as_it_is_is_none_of_ours() -> io::Result<()> {
    let place = Place::new()?;
    let [a0, a1, a2] = place.array("a")?;
    let (export, absent) = (place.export(), place.path("absent"));
    let raw = |image: &str, says: &[&str]| {
        place.refused(&["serve", &export, "--raw", image], &[&[image], says].concat())
    };
    raw(&a0, &["member of an array", "without --raw"])?;
    // Not even one that is damaged: to write to it would end it.
    File::options().write(true).open(&a1)?.write_all_at(&[0xff; 16], 100)?;
    raw(&a1, &["member of an array"])?;
    let file = File::options().write(true).open(&a2)?;
    file.write_all_at(&[0xff; 16], 100)?;
    file.write_all_at(&[0xff; 16], MEMBER_BYTES - 100)?;
    raw(&a2, &["member of an array"])?;
    raw(&absent, &["No such file"])?;
    raw(&place.file("nothing", 0, 0)?, &["nothing to serve"])?;
    raw(&place.file("little", 100, 100)?, &["nothing to serve"])?;
    raw("/dev/zero", &["neither a regular file nor a block device"])?;
    raw(place.dir.to_str().expect("text"), &["neither a regular file nor a block device"])?;
    let image = place.file("image", 0, MEMBER_BYTES)?;
    place.misused(&["serve", &export, "--raw", &image, &a0], &["--raw", "cannot be used with"])
}

#[test]
fn questions_that_have_no_answer_are_refused() -> io::Result<()> {
    let place = Place::new()?;
    place.refused(&["status", "absent"], &["'absent'", "not served"])?;
    let absent = place.path("absent");
    place.refused(&["list", &absent], &[&absent, "No such file"])?;
    place.refused(&["examine", &absent], &[&absent, "No such file"])?;
    place.misused(&["examine"], &["<MEMBER>"])?;
    place.misused(&["erase"], &["erase"])?;
    place.misused(&[], &["Usage"])
}

// ---- block devices ----

/// A loop device, which goes with the test.
struct Loop(String);

impl Loop {
    /// Where the host lets us have one.
    fn on(file: &str) -> Option<Loop> {
        match run_tool(Path::new("losetup"), ["--find", "--show", file]) {
            Ok(device) => Some(Loop(device.trim().to_owned())),
            Err(error) => {
                skip(&format!("no loop device: {error}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run_tool(Path::new("losetup"), ["--detach", &self.0]);
    }
}

/// Members may be block devices: they are taken exclusively, keep what they hold unless told
/// otherwise, and their order does not matter either.
#[test]
fn block_devices_are_members() -> io::Result<()> {
    if !require_tools(&["losetup", "qemu-io", "mke2fs"]) {
        return Ok(());
    }
    let place = Place::new()?;
    let uri = Export::nbd("disk", &place.dir.join("nbd.sock")).uri();
    let mut devices = Vec::new();
    for i in 0..3 {
        let Some(device) = Loop::on(&place.file(&format!("disk-{i}"), 0, 16 << 20)?) else {
            return Ok(());
        };
        devices.push(device);
    }
    let [a, b, c] = [0, 1, 2].map(|i| devices[i].0.as_str());
    run_tool(Path::new("mke2fs"), ["-q", "-t", "ext4", b])?;
    place.refused(&["create", "disks", a, b, c], &[b, "ext4 file system", "--force"])?;
    let ended = place.run(&["create", "disks", "--force", a, b, c])?;
    assert!(ended.status.success(), "{ended:?}");

    let server = place.serve(&[c, a, b])?;
    qemu_io(&uri, &["write -P 5 1000k 1M", "flush", "read -P 5 1000k 1M", "discard 1M 128k"])?;
    let second = format!("--export=nbd,path={}", place.path("second.sock"));
    place.refused(&["serve", &second, a, b, c], &["in use"])?;
    place.refused(&["serve", &second, "--raw", a], &["member of an array"])?;
    place.refused(&["create", "others", "--force", a, b, c], &["in use"])?;
    // O_EXCL keeps others out as well, such as mount and mke2fs.
    run_tool(Path::new("mke2fs"), ["-q", "-t", "ext4", a]).expect_err("it is in use");
    assert!(server.terminate()?.status.success());

    let server = place.serve(&[b, c])?;
    qemu_io(&uri, &["read -P 5 1000k 24k", "read -P 0 1M 128k", "read -P 5 1152k 872k"])?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

// ---- superblocks ----

fn superblock(member: &str) -> io::Result<Superblock> {
    let mut block = [0; BLOCK];
    File::open(member)?.read_exact_at(&mut block, 0)?;
    Superblock::parse(&block).map_err(io::Error::other)
}

fn put_superblock(member: &str, superblock: &Superblock) -> io::Result<()> {
    put_block(member, &superblock.encode())
}

/// Both copies.
fn put_block(member: &str, block: &[u8; BLOCK]) -> io::Result<()> {
    let file = File::options().write(true).open(member)?;
    file.write_all_at(block, 0)?;
    file.write_all_at(block, file.metadata()?.len() - BLOCK as u64)
}
