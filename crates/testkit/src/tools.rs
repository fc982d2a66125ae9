//! Programs that a test may find on the host, and what it does when they are not there.

use std::env;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// The path of the program `name` in `PATH`, or `None` if it is not installed.
pub fn tool(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| {
        path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    })
}

/// As [`tool`], for a test that can not run without it: says so with [`skip`] if it is absent.
pub fn require_tool(name: &str) -> Option<PathBuf> {
    let path = tool(name);
    if path.is_none() {
        skip(&format!("{name} is not installed"));
    }
    path
}

/// Whether all of these are installed; says which one is not with [`skip`].
pub fn require_tools(names: &[&str]) -> bool {
    names.iter().all(|name| require_tool(name).is_some())
}

/// Whether long tests are to be short (`STABLEIO_QUICK=1`).
pub fn quick() -> bool {
    env::var_os("STABLEIO_QUICK").is_some_and(|value| value != "0")
}

/// Runs a program to its end and returns its standard output.
///
/// An exit status other than success is an error that quotes what the program said.
pub fn run_tool<I, S>(program: &Path, args: I) -> io::Result<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    let output = command.args(args).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    // Both: some programs say on standard output what is wrong.
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    Err(io::Error::other(format!("{command:?}: {}\n{}", output.status, said.trim_end())))
}

/// Says that the calling test can not run here, and why. The test then returns.
///
/// The line `SKIP test-name: reason` goes to standard error, past the harness' capture, so that
/// a skipped test never looks like one that passed; and to the end of the file that
/// `STABLEIO_SKIP_LOG` names, if it is set, so that CI can hold the list against what it expects.
pub fn skip(reason: &str) {
    let thread = thread::current();
    let line = format!("SKIP {}: {reason}\n", thread.name().unwrap_or("unnamed"));
    // One write per line: tests run side by side, and appended writes do not mix.
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(log) = env::var_os("STABLEIO_SKIP_LOG") {
        let file = OpenOptions::new().create(true).append(true).open(&log);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("STABLEIO_SKIP_LOG={}: {error}", log.display()));
    }
}
