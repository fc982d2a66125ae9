//! racer, a program that changes its buffers while it writes from them and logs when
//! (`tests/programs/racer.c` says how it can be sure, `log.c` what it logs).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use serde_json::Value;

use crate::{run_tool, skip};

/// The status with which `build.sh` says that it lacks something.
const CAN_NOT_BUILD: i32 = 3;

/// The built program.
#[derive(Clone, Debug)]
pub struct Racer {
    programs: PathBuf,
}

/// Whether the buffer of a write changed while the write was in flight.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Verdict {
    /// Certainly not at all, from before the submission until after the completion.
    Clean,
    /// It did, but too near to the submission or the completion to say whether in between.
    Maybe,
    /// Certainly; unless [`Write::reverted`], it also differed at the end from what it was.
    Changed,
    /// The write ended with an error.
    Failed,
    /// Nobody asked how the write went.
    Abandoned,
}

/// One write, a line of the log. Times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug)]
pub struct Write {
    /// Which write it is, counted over all threads.
    pub index: u64,
    /// The submitting thread, counted from 0.
    pub thread: u64,
    /// The submitting thread, as the kernel knows it.
    pub tid: u32,
    /// The function of the program that submitted it.
    pub function: String,
    /// Where in the file.
    pub offset: u64,
    /// Bytes in all; more than the buffer has if it is in the request twice.
    pub length: u64,
    /// Address of the buffer in the program.
    pub buffer: u64,
    /// The submitting call began after this.
    pub before_submit_ns: u64,
    /// The submitting call had ended by this time.
    pub after_submit_ns: u64,
    /// When it was last seen to be unfinished.
    pub pending_ns: Option<u64>,
    /// The call that collected the completion began after this.
    pub before_reap_ns: u64,
    /// The completion had been collected by this time; 0 if it never was.
    pub reaped_ns: u64,
    /// Changes that were certainly in flight.
    pub certain: u64,
    /// Other changes that may have been.
    pub margin: u64,
    /// The first and the last byte of the buffer that changed: of the certain changes, if any.
    pub changed_bytes: Option<(u64, u64)>,
    /// Whether each change was undone at once.
    pub reverted: bool,
    /// The conclusion.
    pub verdict: Verdict,
    /// Bytes written, or the negative number of the error.
    pub result: i64,
}

/// What the program logged.
#[derive(Clone, Debug)]
pub struct Log {
    /// All writes, by index.
    pub writes: Vec<Write>,
}

/// What the program printed at its end.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Writes in all.
    pub writes: u64,
    /// Those whose verdict is [`Verdict::Clean`].
    pub clean: u64,
    /// Those whose verdict is [`Verdict::Maybe`].
    pub maybe: u64,
    /// Those whose verdict is [`Verdict::Changed`].
    pub changed: u64,
    /// Those whose verdict is [`Verdict::Failed`].
    pub errors: u64,
    /// The name of the first error, as in `EIO`.
    pub first_error: Option<String>,
    /// Those that ended without an error before their end.
    pub short: u64,
    /// The most that were submitted and not collected, over all threads.
    pub max_in_flight: u64,
    /// The most of one thread that it saw unfinished when it looked.
    pub max_pending: u64,
    /// The mean of that, over all looks (asynchronous engines).
    pub mean_pending: f64,
    /// Blocks of 4 KiB read back that hold what was never written, or that can not be read.
    pub bad_blocks: Option<u64>,
    /// Those that can not be read.
    pub read_errors: Option<u64>,
    /// What `--check` wants to know of this run.
    pub last_version: u64,
    /// How long the writes took.
    pub seconds: f64,
    /// All that it said.
    pub json: Value,
}

impl Racer {
    /// Builds it, if it is not there or not up to date.
    ///
    /// `None` after [`skip`] where that can not be: no compiler, no liburing, no libaio.
    pub fn build() -> io::Result<Option<Racer>> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
        let (source, programs) = (root.join("tests/programs"), root.join("target/programs"));
        // Tests may do this at once: the script locks.
        let mut build = Command::new(source.join("build.sh"));
        let output = build.arg(&programs).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => Ok(Some(Racer { programs })),
            Some(CAN_NOT_BUILD) => {
                skip(&format!("racer can not be built: {}", said.trim_end()));
                Ok(None)
            }
            _ => Err(io::Error::other(format!("{build:?}: {}\n{said}", output.status))),
        }
    }

    /// The program.
    pub fn path(&self) -> PathBuf {
        self.programs.join("racer")
    }

    /// The same linked statically, with the engines that need no library (sync, vsync, syscall,
    /// inline and uring): nothing can be preloaded into it.
    pub fn static_path(&self) -> PathBuf {
        self.programs.join("racer-static")
    }

    /// Its neighbour: odd uses of direct I/O, and what came of each (`tests/programs/corners.c`).
    pub fn corners(&self) -> PathBuf {
        self.programs.join("corners")
    }

    /// Another neighbour: reads into a buffer that changes (`tests/programs/reader.c`).
    pub fn reader(&self) -> PathBuf {
        self.programs.join("reader")
    }

    /// Another: reads into a buffer that is being written (`tests/programs/reuser.c`).
    pub fn reuser(&self) -> PathBuf {
        self.programs.join("reuser")
    }

    /// Runs it to its end, as it is.
    pub fn run<I, S>(&self, args: I) -> io::Result<Summary>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        run_tool(&self.path(), args)?.parse()
    }
}

impl Log {
    /// Reads what `--log PATH` left.
    pub fn read(path: &Path) -> io::Result<Log> {
        let text = fs::read_to_string(path)?;
        let mut lines = text.lines();
        let names: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
        let writes = lines.map(|line| {
            Write::parse(&names, line)
                .ok_or_else(|| io::Error::other(format!("{}: what is {line:?}?", path.display())))
        });
        Ok(Log { writes: writes.collect::<io::Result<_>>()? })
    }

    /// The writes of which a detector has to find (nearly) all: those that certainly changed in
    /// flight, and did not change back.
    pub fn changed(&self) -> impl Iterator<Item = &Write> {
        self.writes.iter().filter(|write| write.verdict == Verdict::Changed && !write.reverted)
    }
}

impl Write {
    fn parse(names: &[&str], line: &str) -> Option<Write> {
        let fields: Vec<&str> = line.split('\t').collect();
        let text = |name| fields.get(names.iter().position(|known| *known == name)?).copied();
        let signed = |name| text(name)?.parse::<i64>().ok();
        let number = |name| text(name)?.parse::<u64>().ok();
        Some(Write {
            index: number("index")?,
            thread: number("thread")?,
            tid: text("tid")?.parse().ok()?,
            function: text("function")?.to_owned(),
            offset: number("offset")?,
            length: number("length")?,
            buffer: u64::from_str_radix(text("buffer")?.strip_prefix("0x")?, 16).ok()?,
            before_submit_ns: number("before_submit")?,
            after_submit_ns: number("after_submit")?,
            pending_ns: Some(number("pending")?).filter(|time| *time > 0),
            before_reap_ns: number("before_reap")?,
            reaped_ns: number("reaped")?,
            certain: number("certain")?,
            margin: number("margin")?,
            // Both are -1 if there was no change.
            changed_bytes: match (signed("first")?, signed("last")?) {
                (-1, -1) => None,
                (first, last) => Some((first.try_into().ok()?, last.try_into().ok()?)),
            },
            reverted: number("reverted")? == 1,
            verdict: text("verdict")?.parse().ok()?,
            result: signed("result")?,
        })
    }
}

impl FromStr for Verdict {
    type Err = io::Error;

    fn from_str(name: &str) -> io::Result<Verdict> {
        match name {
            "clean" => Ok(Verdict::Clean),
            "maybe" => Ok(Verdict::Maybe),
            "changed" => Ok(Verdict::Changed),
            "failed" => Ok(Verdict::Failed),
            "abandoned" => Ok(Verdict::Abandoned),
            _ => Err(io::Error::other(format!("there is no verdict {name:?}"))),
        }
    }
}

/// From the standard output of a run that wrote.
impl FromStr for Summary {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Summary> {
        let json: Value = serde_json::from_str(text)?;
        let absent = |name: &str| io::Error::other(format!("no {name} in {text}"));
        let number = |name: &str| json[name].as_u64().ok_or_else(|| absent(name));
        let real = |name: &str| json[name].as_f64().ok_or_else(|| absent(name));
        Ok(Summary {
            writes: number("writes")?,
            clean: number("clean")?,
            maybe: number("maybe")?,
            changed: number("changed")?,
            errors: number("errors")?,
            first_error: json["first_error"].as_str().map(str::to_owned),
            short: number("short")?,
            max_in_flight: number("max_in_flight")?,
            max_pending: number("max_pending")?,
            mean_pending: real("mean_pending")?,
            bad_blocks: json["bad_blocks"].as_u64(),
            read_errors: json["read_errors"].as_u64(),
            last_version: number("last_version")?,
            seconds: real("seconds")?,
            json,
        })
    }
}

#[cfg(test)]
mod tests {
    //! The racer's word can be relied upon: what it stores, and which of its writes it says
    //! changed.

    use super::*;
    use crate::{Mounted, Scratch};

    const ENGINES: [&str; 8] =
        ["sync", "vsync", "syscall", "inline", "posixaio", "libaio", "liburing", "uring"];

    /// In clean mode it changes its buffers all the time, but never in flight; so it says, and so it
    /// is: storage that reads twice stores what it wrote.
    #[test]
    fn clean_is_clean() -> io::Result<()> {
        let Some(racer) = Racer::build()? else { return Ok(()) };
        let Some(fs) = Mounted::xfs_on_zram(512 << 20)? else { return Ok(()) };
        let scratch = Scratch::new()?;
        let (file, log) = (fs.path().join("file"), scratch.path("log"));
        for engine in ENGINES {
            for mutator in ["thread", "process", "none"] {
                let summary = racer.run([
                    "--mode=clean",
                    "--verify",
                    "--count=2000",
                    &format!("--engine={engine}"),
                    &format!("--mutator={mutator}"),
                    &format!("--log={}", log.display()),
                    &file.display().to_string(),
                ])?;
                assert_eq!((summary.writes, summary.clean), (2000, 2000), "{}", summary.json);
                assert_eq!(summary.bad_blocks, Some(0), "{}", summary.json);
                let writes = Log::read(&log)?.writes;
                assert!(writes.iter().all(|write| write.verdict == Verdict::Clean));
            }
        }
        Ok(())
    }

    /// Its twin: the same writes, but raced. Each engine hits, the log says where, and what the
    /// device stores is not what was written, unless the kernel copies it first.
    #[test]
    fn race_is_garbage_on_zram() -> io::Result<()> {
        let Some(racer) = Racer::build()? else { return Ok(()) };
        let Some(fs) = Mounted::xfs_on_zram(512 << 20)? else { return Ok(()) };
        let scratch = Scratch::new()?;
        let (file, log) = (fs.path().join("file"), scratch.path("log"));
        for engine in ENGINES {
            for mutator in ["thread", "process"] {
                let summary = racer.run([
                    "--verify",
                    "--count=10000",
                    &format!("--engine={engine}"),
                    &format!("--mutator={mutator}"),
                    &format!("--log={}", log.display()),
                    &file.display().to_string(),
                ])?;
                assert!(summary.bad_blocks > Some(0) || kernel_bounces()?, "{}", summary.json);
                let log = Log::read(&log)?;
                assert_eq!(log.changed().count() as u64, summary.changed);
                assert!(summary.changed > 0, "{}", summary.json);
                for write in log.changed() {
                    let (first, last) = write.changed_bytes.expect("it changed somewhere");
                    assert!(first < last && last < write.length, "{write:?}");
                    assert!(write.before_submit_ns < write.after_submit_ns, "{write:?}");
                    assert_eq!(write.function, format!("submit_{engine}"));
                    assert_eq!(write.result, write.length as i64);
                }
            }
        }
        Ok(())
    }

    /// Storage that reads once stores words that were written, in every mode.
    #[test]
    fn what_is_read_once_is_whole() -> io::Result<()> {
        let Some(racer) = Racer::build()? else { return Ok(()) };
        let Some(fs) = Mounted::on_loop("ext4", 512 << 20)? else { return Ok(()) };
        let file = fs.path().join("file").display().to_string();
        for engine in ["libaio", "liburing", "uring"] {
            for mode in ["race", "clean", "twice", "overlap", "revert", "abandon"] {
                let [engine, mode] = [format!("--engine={engine}"), format!("--mode={mode}")];
                let args = [&engine, &mode, "--verify", "--block=64K", "--count=500", "--depth=16"];
                let summary = racer.run(args.into_iter().chain([&*file]))?;
                assert_eq!((summary.bad_blocks, summary.errors), (Some(0), 0), "{}", summary.json);
                assert!(summary.max_in_flight > 4, "{}", summary.json);
            }
        }
        Ok(())
    }

    /// A run's file can be verified by a later one, which sees what does not belong there.
    #[test]
    fn check_finds_what_was_never_written() -> io::Result<()> {
        let Some(racer) = Racer::build()? else { return Ok(()) };
        let scratch = Scratch::new()?;
        let file = scratch.path("file");
        let args = ["--count=100", "--span=400K", "--mutator=none"];
        let written = racer.run(args.iter().map(AsRef::as_ref).chain([file.as_os_str()]))?;
        let check = |last: u64| -> io::Result<u64> {
            let check = format!("--check={last}");
            let args = args.iter().copied().chain([&*check]).map(AsRef::as_ref);
            let said = run_tool(&racer.path(), args.chain([file.as_os_str()]))?;
            let json: serde_json::Value = serde_json::from_str(&said)?;
            json["bad_blocks"].as_u64().ok_or_else(|| io::Error::other(said))
        };
        assert_eq!(check(written.last_version)?, 0);
        // The last write's version is not known to this one.
        assert_eq!(check(written.last_version - 1)?, 1);
        let mut bytes = std::fs::read(&file)?;
        bytes[4096 * 7 + 3] ^= 1;
        std::fs::write(&file, bytes)?;
        assert_eq!(check(written.last_version)?, 1);
        Ok(())
    }

    /// Since Linux 7.0 XFS copies direct writes to a device that reads them more than once.
    fn kernel_bounces() -> io::Result<bool> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
        Ok(major.is_some_and(|major| major >= 7))
    }
}
