//! Programs that people have, under `stableio run`: what they write is what they read, whatever
//! the policy, and what they are told is what they would have been told without.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stableio_testkit::racer::Racer;
use stableio_testkit::{
    Child, Ended, Mounted, Scratch, fio_under, require_tool, require_tools, run_tool, stableio,
    stableio_bin,
};

const DEVICE_BYTES: u64 = 1 << 30;

/// Those that change what a program's direct I/O does.
const POLICIES: [&str; 3] = ["auto", "bounce", "uncached"];

/// Storage that reads twice, so that `auto` has something to do.
fn storage() -> io::Result<Option<Mounted>> {
    Mounted::xfs_on_zram(DEVICE_BYTES)
}

fn launcher(policy: &str) -> io::Result<Vec<OsString>> {
    let words = ["run", "--policy", policy, "--"].map(OsString::from);
    Ok([stableio_bin()?.into_os_string()].into_iter().chain(words).collect())
}

/// Runs a program under a policy to a successful end.
fn run(scratch: &Scratch, policy: &str, program: &Path, args: &[&str]) -> io::Result<Ended> {
    let mut command = stableio(scratch)?;
    command.args(["run", "-v", "--policy", policy, "--"]).arg(program).args(args);
    let ended = Child::spawn(command, scratch)?.wait()?;
    if ended.status.success() {
        return Ok(ended);
    }
    Err(io::Error::other(format!("{policy}: {ended:?}")))
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

/// fio writes at random, and verifies each block by its checksum.
fn fio(engine: &str, more: &[(&str, &str)]) -> io::Result<()> {
    if require_tool("fio").is_none() {
        return Ok(());
    }
    let Some(fs) = storage()? else { return Ok(()) };
    let file = fs.path().join("file");
    for policy in POLICIES {
        for (rw, block) in [("randwrite", "4k"), ("randrw", "4k"), ("randrw", "64k")] {
            let job = [
                ("ioengine", engine),
                ("filename", utf8(&file)),
                ("rw", rw),
                ("bs", block),
                ("size", "32m"),
                ("direct", "1"),
                ("verify", "crc32c"),
                ("verify_fatal", "1"),
                ("do_verify", "1"),
                // Or it leaves a file where it runs.
                ("verify_state_save", "0"),
            ];
            let report = fio_under(&launcher(policy)?, &[&job[..], more].concat())
                .map_err(|error| io::Error::other(format!("{engine} {policy} {rw}: {error}")))?;
            assert_eq!(report.json["jobs"][0]["error"], 0, "{engine} {policy}");
            assert!(report.iops > 0.0);
        }
    }
    Ok(())
}

#[test]
fn fio_psync() -> io::Result<()> {
    fio("psync", &[])
}

#[test]
fn fio_pvsync2() -> io::Result<()> {
    fio("pvsync2", &[])
}

#[test]
fn fio_libaio() -> io::Result<()> {
    fio("libaio", &[("iodepth", "32")])?;
    fio("libaio", &[("iodepth", "32"), ("userspace_reap", "1")])
}

#[test]
fn fio_posixaio() -> io::Result<()> {
    fio("posixaio", &[("iodepth", "16")])
}

#[test]
fn fio_io_uring() -> io::Result<()> {
    fio("io_uring", &[("iodepth", "32")])?;
    fio("io_uring", &[("iodepth", "32"), ("registerfiles", "1"), ("fixedbufs", "1")])
}

#[test]
fn qemu_io() -> io::Result<()> {
    if !require_tools(&["qemu-io", "qemu-img"]) {
        return Ok(());
    }
    let Some(fs) = storage()? else { return Ok(()) };
    let (scratch, image) = (Scratch::new()?, fs.path().join("image"));
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    for policy in POLICIES {
        for aio in ["threads", "native", "io_uring"] {
            // Direct ("none"), and of each pattern a part that is not aligned to anything.
            let args = [
                "-f",
                "raw",
                "-t",
                "none",
                "-i",
                aio,
                "-c",
                "write -P 0x5a 0 1M",
                "-c",
                "write -P 0xa5 5000 70000",
                "-c",
                "aio_write -P 0x3c 2M 512k",
                "-c",
                "aio_write -P 0x7e 3M 4k",
                "-c",
                "aio_flush",
                "-c",
                "writev -P 0x11 4M 4k 8k 512",
                "-c",
                "read -P 0x5a 0 5000",
                "-c",
                "read -P 0xa5 5000 70000",
                "-c",
                "read -P 0x5a 75000 900k",
                "-c",
                "read -P 0x3c 2M 512k",
                "-c",
                "read -P 0x7e 3M 4k",
                "-c",
                "readv -P 0x11 4M 512 12k",
                utf8(&image),
            ];
            let ended = run(&scratch, policy, Path::new("qemu-io"), &args)?;
            assert!(!ended.stdout.contains("failed"), "{policy} {aio}: {}", ended.stdout);
        }
    }
    Ok(())
}

#[test]
fn qemu_img_bench() -> io::Result<()> {
    if require_tool("qemu-img").is_none() {
        return Ok(());
    }
    let Some(fs) = storage()? else { return Ok(()) };
    let (scratch, image) = (Scratch::new()?, fs.path().join("image"));
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    for policy in POLICIES {
        for aio in ["threads", "native", "io_uring"] {
            let args = [
                "bench",
                "-f",
                "raw",
                "-t",
                "none",
                "-i",
                aio,
                "-w",
                "-c",
                "4000",
                "-d",
                "32",
                "-s",
                "4k",
                "--pattern",
                "90",
                utf8(&image),
            ];
            let ended = run(&scratch, policy, Path::new("qemu-img"), &args)?;
            // Each write was seen, and went from private memory.
            let bounced = ended.stderr.contains(" 4000/");
            assert!(bounced || policy == "uncached", "{policy} {aio}: {}", ended.stderr);
            // Without help, through the page cache: the pattern is all there.
            let stored = std::fs::read(&image)?;
            let wrong = stored[..4000 * 4096].iter().position(|byte| *byte != 90);
            assert_eq!(wrong, None, "{policy} {aio}");
            std::fs::write(&image, vec![0; 64 << 20])?;
        }
    }
    Ok(())
}

/// A database in each journal mode, checked by its own check.
const SQLITE: &str = r#"
import sqlite3, sys
for mode in ("delete", "wal"):
    db = sqlite3.connect(sys.argv[1] + mode)
    db.execute("pragma journal_mode=" + mode)
    db.execute("pragma synchronous=full")
    db.execute("create table t (k integer primary key, v blob)")
    for i in range(300):
        with db:
            db.executemany("insert into t values (?, ?)", ((i * 10 + j, bytes([j] * 3000)) for j in range(10)))
    db.close()
    db = sqlite3.connect(sys.argv[1] + mode)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert db.execute("select count(*) from t").fetchone() == (3000,)
"#;

#[test]
fn sqlite() -> io::Result<()> {
    let Some(python) = require_tool("python3") else { return Ok(()) };
    let Some(fs) = storage()? else { return Ok(()) };
    let scratch = Scratch::new()?;
    for policy in POLICIES {
        let database = fs.path().join(policy);
        run(&scratch, policy, &python, &["-c", SQLITE, utf8(&database)])?;
    }
    Ok(())
}

/// Vectors of memory maps to a file that is open for direct I/O, from threads and a child.
const PYTHON: &str = r#"
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
def write(first):
    for block in range(first, first + 64):
        parts = [mmap.mmap(-1, 4096) for _ in range(2)]
        for i, part in enumerate(parts):
            part[:] = bytes([block, i]) * 2048
        assert os.pwritev(fd, parts, block * 8192) == 8192
threads = [threading.Thread(target=write, args=(first,)) for first in (0, 64)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if os.fork() == 0:
    write(128)
    os._exit(0)
assert os.wait()[1] == 0
for block in range(192):
    parts = [mmap.mmap(-1, 4096) for _ in range(2)]
    assert os.preadv(fd, parts, block * 8192) == 8192
    for i, part in enumerate(parts):
        assert part[:] == bytes([block, i]) * 2048, block
with open(sys.argv[1], "rb") as file:
    for block in range(192):
        assert file.read(8192) == bytes([block, 0]) * 2048 + bytes([block, 1]) * 2048
"#;

#[test]
fn python() -> io::Result<()> {
    let Some(python) = require_tool("python3") else { return Ok(()) };
    let Some(fs) = storage()? else { return Ok(()) };
    let scratch = Scratch::new()?;
    for policy in POLICIES {
        let file = fs.path().join(policy);
        let ended = run(&scratch, policy, &python, &["-c", PYTHON, utf8(&file)])?;
        let done = if policy == "uncached" { "uncached" } else { "bounced" };
        assert!(ended.stderr.contains(done), "{policy}: {}", ended.stderr);
    }
    Ok(())
}

/// Results and errors are those that the program would have seen, in all corners.
fn corners_on(fs: &Mounted) -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let (scratch, file) = (Scratch::new()?, fs.path().join("corners"));
    let corners: PathBuf = racer.corners();
    let plain = run(&scratch, "off", &corners, &[utf8(&file)])?;
    assert!(plain.stdout.lines().count() > 90, "{}", plain.stdout);
    for policy in ["auto", "bounce"] {
        let with = run(&scratch, policy, &corners, &[utf8(&file)])?;
        for (ours, theirs) in with.stdout.lines().zip(plain.stdout.lines()) {
            assert_eq!(ours, theirs, "{policy}");
        }
        assert_eq!(with.stdout.len(), plain.stdout.len());
    }
    Ok(())
}

#[test]
fn corners_where_data_is_read_twice() -> io::Result<()> {
    storage()?.map_or(Ok(()), |fs| corners_on(&fs))
}

#[test]
fn corners_where_data_is_read_once() -> io::Result<()> {
    Mounted::on_loop("ext4", DEVICE_BYTES)?.map_or(Ok(()), |fs| corners_on(&fs))
}

/// Errors reach the writer, whatever way its data takes: here, that there is no room.
#[test]
fn a_full_file_system_is_told_to_the_writer() -> io::Result<()> {
    let Some(dd) = require_tool("dd") else { return Ok(()) };
    let Some(fs) = Mounted::on_loop("ext4", 16 << 20)? else { return Ok(()) };
    let (scratch, file) = (Scratch::new()?, fs.path().join("file"));
    for policy in ["off", "bounce", "uncached"] {
        let mut command = stableio(&scratch)?;
        command.args(["run", "--policy", policy, "--"]).arg(&dd);
        command.args(["if=/dev/zero", "bs=1M", "oflag=direct"]);
        command.arg(format!("of={}", file.display()));
        let ended = Child::spawn(command, &scratch)?.wait()?;
        assert_eq!(ended.status.code(), Some(1), "{policy}: {ended:?}");
        assert!(ended.stderr.contains("No space left"), "{policy}: {ended:?}");
        assert!(std::fs::metadata(&file)?.len() > 4 << 20, "{policy}");
        std::fs::remove_file(&file)?;
    }
    Ok(())
}

/// What went through the page cache is not kept there; without the policy's care it would be.
#[test]
fn uncached_data_is_not_kept() -> io::Result<()> {
    let (Some(dd), Some(fincore)) = (require_tool("dd"), require_tool("fincore")) else {
        return Ok(());
    };
    for fs in ["ext4", "xfs"] {
        let Some(fs) = Mounted::on_loop(fs, DEVICE_BYTES)? else { return Ok(()) };
        let (scratch, file) = (Scratch::new()?, fs.path().join("file"));
        let of = format!("of={}", file.display());
        let cached = || -> io::Result<u64> {
            let said = run_tool(&fincore, ["-b", "-n", "-o", "RES", utf8(&file)])?;
            said.trim().parse().map_err(io::Error::other)
        };
        let args = ["if=/dev/zero", "bs=64K", "count=256", "oflag=direct", &of];
        run(&scratch, "uncached", &dd, &args)?;
        let began = Instant::now();
        while cached()? > 0 {
            // Pages are dropped as they become clean.
            assert!(began.elapsed() < Duration::from_secs(30), "{} bytes are kept", cached()?);
            std::thread::sleep(Duration::from_millis(50));
        }
        run_tool(&dd, args[..3].iter().chain(&[of.as_str()]))?;
        assert!(cached()? > 0, "the twin");
    }
    Ok(())
}

/// An atomic write can not be kept through the page cache: it is refused, and stays atomic under
/// `bounce` where the file system knows it.
#[test]
fn atomic_writes_are_atomic_or_refused() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let Some(fs) = storage()? else { return Ok(()) };
    let (scratch, file) = (Scratch::new()?, fs.path().join("file"));
    let atomic = |policy: &str| -> io::Result<String> {
        let ended = run(&scratch, policy, &racer.corners(), &[utf8(&file), "ways"])?;
        let mut lines = ended.stdout.lines();
        let line = lines.find(|line| line.starts_with("atomic: "));
        line.map(str::to_owned).ok_or_else(|| io::Error::other(format!("{ended:?}")))
    };
    assert_eq!(atomic("bounce")?, atomic("off")?);
    assert_eq!(atomic("uncached")?, "atomic: -1 EOPNOTSUPP");
    Ok(())
}
