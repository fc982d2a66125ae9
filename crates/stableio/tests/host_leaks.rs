//! What a program under `run` and `detect` leaves behind: nothing, however it ends.
//!
//! Memory for copies and records of I/Os are bounded in each process (`--pool`; 8192 records). A
//! leak of one in a hundred I/Os would use them up long before a million, and writes would fail.

use std::fs;
use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use stableio_testkit::racer::{Racer, Summary};
use stableio_testkit::{Child, Ended, Mounted, Scratch, Signal, quick, stableio};

const ENGINES: [&str; 8] =
    ["sync", "vsync", "syscall", "inline", "posixaio", "libaio", "liburing", "uring"];

/// The command, without its program.
fn command(scratch: &Scratch, words: &[&str]) -> io::Result<Command> {
    let mut command = stableio(scratch)?;
    command.args(words);
    Ok(command)
}

const BOUNCE: [&str; 6] = ["run", "--policy", "bounce", "--pool", "64MiB", "--"];

fn end(mut command: Command, scratch: &Scratch, args: &[&str]) -> io::Result<Ended> {
    command.args(args);
    let ended = Child::spawn(command, scratch)?.wait_within(Duration::from_secs(300))?;
    match ended.status.success() {
        true => Ok(ended),
        false => Err(io::Error::other(format!("{args:?}: {ended:?}"))),
    }
}

/// Directories of sessions that are still there.
fn sessions(scratch: &Scratch) -> io::Result<usize> {
    let entries = fs::read_dir(scratch.dir())?.collect::<io::Result<Vec<_>>>()?;
    let ours = entries.iter().filter(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with("stableio-run")
    });
    Ok(ours.count())
}

/// The supervisor ends a little after the command.
fn no_session_is_left(scratch: &Scratch) -> io::Result<()> {
    let began = Instant::now();
    while sessions(scratch)? > 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "a session's directory is left");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn a_million(words: &[&str]) -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let count = if quick() { "--count=50000" } else { "--count=125000" };
    // Eight engines: a million together.
    for engine in ENGINES {
        let mut run = command(&scratch, words)?;
        run.arg(racer.path());
        let file = scratch.path("file");
        let load = [
            count,
            "--span=64M",
            "--mutator=none",
            "--depth=32",
            &format!("--engine={engine}"),
            file.to_str().expect("a path of ours"),
        ];
        let summary: Summary = end(run, &scratch, &load)?.stdout.parse()?;
        assert_eq!((summary.errors, summary.short), (0, 0), "{engine}: {}", summary.json);
    }
    no_session_is_left(&scratch)
}

#[test]
fn a_million_writes_bounced() -> io::Result<()> {
    a_million(&BOUNCE)
}

#[test]
fn a_million_writes_watched() -> io::Result<()> {
    a_million(&["detect", "--"])
}

/// Threads submit, and end: what they have in flight is the kernel's to cancel, and ours to forget.
#[test]
fn threads_that_end_with_io_open() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    let Some(fs) = Mounted::on_loop("ext4", 1 << 30)? else { return Ok(()) };
    let (scratch, file) = (Scratch::new()?, fs.path().join("file"));
    for words in [&BOUNCE[..], &["detect", "--"]] {
        for engine in ["posixaio", "libaio", "liburing", "uring"] {
            let mut run = command(&scratch, words)?;
            run.arg(racer.path());
            let load = [
                "--mode=abandon",
                "--count=800",
                &format!("--engine={engine}"),
                file.to_str().expect("a path of ours"),
            ];
            let summary: Summary = end(run, &scratch, &load)?.stdout.parse()?;
            assert_eq!(summary.errors, 0, "{words:?} {engine}: {}", summary.json);
        }
    }
    no_session_is_left(&scratch)
}

/// A program that is killed in the middle of its I/O leaves no process and no directory.
#[test]
fn a_program_that_is_killed() -> io::Result<()> {
    let Some(racer) = Racer::build()? else { return Ok(()) };
    for engine in ["sync", "libaio", "uring"] {
        let scratch = Scratch::new()?;
        let (file, pid) = (scratch.path("file"), scratch.path("pid"));
        let mut run = command(&scratch, &BOUNCE)?;
        // The shell becomes the program that it says it is.
        let script = format!(
            "echo $$ >{}; exec {} --engine={engine} --count=100000000 --span=64M {}",
            pid.display(),
            racer.path().display(),
            file.display()
        );
        run.args(["sh", "-c", &script]);
        let child = Child::spawn(run, &scratch)?;
        let began = Instant::now();
        while fs::metadata(&file).map_or(0, |file| file.len()) < 4096 {
            assert!(began.elapsed() < Duration::from_secs(20), "{engine} never wrote");
            std::thread::sleep(Duration::from_millis(20));
        }
        let pid: i32 = fs::read_to_string(&pid)?.trim().parse().map_err(io::Error::other)?;
        // SAFETY: a signal to a process that this test started, and that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, Signal::KILL.as_raw()) }, 0);
        let ended = child.wait_within(Duration::from_secs(20))?;
        assert!(ended.was_killed(), "{engine}: {ended:?}");
        no_session_is_left(&scratch)?;
    }
    Ok(())
}
