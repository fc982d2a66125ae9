//! fio, the load generator that storage people trust, and its figures.

use std::ffi::{OsStr, OsString};
use std::io;
use std::process::Command;

use serde_json::Value;
use tempfile::NamedTempFile;

/// What a run of fio measured, reads and writes together.
#[derive(Debug)]
pub struct FioReport {
    /// Operations per second.
    pub iops: f64,
    /// Throughput.
    pub bytes_per_s: f64,
    /// The 99th percentile of the completion latency, of reads or writes, whichever is worse.
    pub p99_us: f64,
    /// All that fio said, for whatever is not above.
    pub json: Value,
}

/// Runs one fio job and returns its figures; each option becomes `--key=value`.
///
/// An error of the I/O itself, such as a failed verification, is an error here.
pub fn fio(options: &[(&str, &str)]) -> io::Result<FioReport> {
    fio_under(&[], options)
}

/// The same under another program, which starts it: `stableio run --policy bounce --`.
pub fn fio_under(launcher: &[OsString], options: &[(&str, &str)]) -> io::Result<FioReport> {
    // Not from its standard output: there the nbd engine announces its connection, before the JSON.
    let output = NamedTempFile::new()?;
    let mut words = launcher.iter().map(OsString::as_os_str).chain([OsStr::new("fio")]);
    let mut command = Command::new(words.next().expect("fio at least"));
    command.args(words);
    command.args(["--name=job", "--group_reporting", "--output-format=json"]);
    command.arg(format!("--output={}", output.path().display()));
    command.args(options.iter().map(|(key, value)| format!("--{key}={value}")));
    let ended = command.output()?;
    if !ended.status.success() {
        let stderr = String::from_utf8_lossy(&ended.stderr);
        return Err(io::Error::other(format!("{command:?}: {}\n{stderr}", ended.status)));
    }
    let text = std::fs::read(output.path())?;
    parse(serde_json::from_slice(&text)?)
}

fn parse(json: Value) -> io::Result<FioReport> {
    let job = &json["jobs"][0];
    if job["error"] != 0 {
        return Err(io::Error::other(format!("fio ended with error {}", job["error"])));
    }
    let [read, write] = [&job["read"], &job["write"]];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let p99_ns = |of: &Value| number(&of["clat_ns"]["percentile"]["99.000000"]);
    Ok(FioReport {
        iops: number(&read["iops"]) + number(&write["iops"]),
        bytes_per_s: number(&read["bw_bytes"]) + number(&write["bw_bytes"]),
        p99_us: p99_ns(read).max(p99_ns(write)) / 1000.0,
        json,
    })
}
