//! `stableio detect`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde::Serialize;
use stableio_host::{Detected, End, FindingUse, Launch, Outcome, Policy, SiteUse, chart, detected};

use crate::run::{count, failed, list};

/// Places, frames of each, files and findings that a summary shows; the report has all.
const PLACES: usize = 5;
const FRAMES: usize = 4;
const FILES: usize = 8;
const FINDINGS: usize = 5;

/// What nobody who compares two samples can see.
const NOT_SEEN: &str = "a change that is undone before its write completes is not seen";

#[derive(Args)]
pub(crate) struct DetectArgs {
    /// Write all that was found to this file, for programs (JSON)
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Exit with this code if something was found
    #[arg(long, value_name = "N")]
    error_exitcode: Option<u8>,
    /// Draw writes and findings over time into this file (SVG)
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(args: DetectArgs) -> Result<ExitCode> {
    // Before the command runs: a long run is not to end with nowhere to put what it found.
    let report = args.report.as_deref().map(Sink::open).transpose()?;
    let picture = args.chart.as_deref().map(Sink::open).transpose()?;
    let name = args.command[0].to_string_lossy().into_owned();
    let command: Vec<_> = args.command.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let launch = Launch {
        policy: Policy::Watch,
        best_effort: false,
        pool_bytes: POOL_BYTES,
        command: args.command,
    };
    let outcome = match launch.run() {
        Ok(outcome) => outcome,
        Err(error) => {
            report.into_iter().chain(picture).for_each(Sink::give_up);
            return Ok(failed(error));
        }
    };
    let found = detected(&outcome.session, outcome.ended_ns);
    summarize(&name, &outcome, &found);
    if let Some(report) = report {
        let json = serde_json::to_vec(&MachineReport::new(&command, &outcome, &found))?;
        report.fill(&json)?;
    }
    if let Some(picture) = picture {
        let title = format!("{name}: {}", headline(&found));
        let svg = chart(&found.timeline, &title).map_err(|error| anyhow!("the chart: {error}"))?;
        picture.fill(svg.as_bytes())?;
    }
    let something = found.totals.changed + found.totals.reused > 0;
    match args.error_exitcode.filter(|_| something) {
        Some(code) => Ok(ExitCode::from(code)),
        None => Ok(outcome.end.follow()),
    }
}

/// Memory that each process may use to keep what it compares with.
const POOL_BYTES: u64 = 256 << 20;

/// A file that is there to be written at the end; what was in it stays until then.
struct Sink {
    path: PathBuf,
    file: File,
    is_new: bool,
}

impl Sink {
    fn open(path: &Path) -> Result<Sink> {
        let is_new = !path.exists();
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("{} can not be written", path.display()))?;
        Ok(Sink { path: path.to_path_buf(), file, is_new })
    }

    fn fill(self, bytes: &[u8]) -> Result<()> {
        let write = || -> io::Result<()> {
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
                (&self.file).rewind()?;
            }
            let mut to = BufWriter::new(&self.file);
            to.write_all(bytes)?;
            to.write_all(b"\n")?;
            to.flush()
        };
        write().with_context(|| self.path.display().to_string())
    }

    fn give_up(self) {
        if self.is_new {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn headline(found: &Detected) -> String {
    let totals = found.totals;
    let watched = count(totals.watched, "direct write", "direct writes");
    if totals.changed == 0 {
        return format!("{watched}, none changed in flight");
    }
    let share = totals.changed as f64 / totals.watched.max(1) as f64 * 100.0;
    format!("{watched}, {} changed in flight ({share:.2} %)", totals.changed)
}

fn summarize(name: &str, outcome: &Outcome, found: &Detected) {
    let totals = found.totals;
    eprintln!("stableio: {name}: {}", headline(found));
    if totals.reused > 0 {
        let times = count(totals.reused, "time", "times");
        eprintln!("  {times} an I/O used memory that another I/O in flight was using");
    }
    if totals.processes == 0 {
        eprintln!("  no process loaded the library: nothing was watched");
    }
    if totals.unwatched > 0 {
        let remarks = list(&found.remarks);
        let why = if remarks.is_empty() { String::new() } else { format!(": {remarks}") };
        eprintln!("  {} not watched{why}", count(totals.unwatched, "I/O was", "I/Os were"));
    }
    if let Some(error) = &outcome.no_net {
        eprintln!("  no net was spread, so programs without the library went unseen: {error}");
    }
    if totals.lost > 0 {
        let lost = count(totals.lost, "item was", "items were");
        eprintln!("  {lost} counted, and not listed for want of room");
    }
    if outcome.goes_on {
        eprintln!("  some processes still run; what they do from now on is not in here");
    }
    if totals.changed + totals.reused > 0 {
        say_places(&found.sites);
        say_files(found);
        say_findings(found);
    }
    eprintln!("  {NOT_SEEN}");
}

fn say_places(sites: &[SiteUse]) {
    eprintln!("places:");
    for site in sites.iter().filter(|site| site.changed + site.reused > 0).take(PLACES) {
        let reused = match site.reused {
            0 => String::new(),
            reused => format!(", {reused} reused"),
        };
        eprintln!("  {} of {} changed{reused} ({})", site.changed, site.writes, site.engine);
        if site.stack.is_empty() {
            eprintln!("      in places for which there was no room");
        }
        // What calls `main` is no news.
        let main = site.stack.iter().position(|place| place.function.as_deref() == Some("main"));
        let frames = main.map_or(FRAMES, |at| at + 1).min(FRAMES);
        for (depth, place) in site.stack.iter().take(frames).enumerate() {
            eprintln!("      {} {place}", if depth == 0 { "in" } else { "by" });
        }
    }
}

fn say_files(found: &Detected) {
    eprintln!("files:");
    for file in found.files.iter().filter(|file| file.changed > 0).take(FILES) {
        eprintln!("  {} of {} changed  {}", file.changed, file.writes, file.path);
    }
}

fn say_findings(found: &Detected) {
    eprintln!("first findings:");
    for finding in found.findings.iter().take(FINDINGS) {
        eprintln!("  {}", line(finding));
    }
}

fn line(finding: &FindingUse) -> String {
    let at = match finding.offset {
        Some(offset) => format!("at {offset}"),
        None => "at the file's position".to_owned(),
    };
    let path = if finding.file.is_empty() { "(unknown file)" } else { &finding.file };
    let ranges: Vec<_> = finding
        .ranges
        .iter()
        .map(|[from, to]| format!("{from}-{}", to.saturating_sub(1)))
        .collect();
    let what = match finding.kind {
        "reused" => "into memory in flight".to_owned(),
        _ => format!("{} changed ({})", count(finding.changed, "byte", "bytes"), ranges.join(", ")),
    };
    let flight_ms = (finding.completed_s - finding.submitted_s).max(0.0) * 1e3;
    format!(
        "{path} {at}, {} bytes: {what}, thread {}, in flight {flight_ms:.3} ms, {:.3} s after the start",
        finding.len, finding.tid, finding.submitted_s
    )
}

/// The report for programs.
#[derive(Serialize)]
struct MachineReport<'a> {
    /// Of this layout.
    version: u32,
    command: &'a [String],
    exit: Exit,
    still_running: bool,
    /// Whether programs without the library were seen.
    net: bool,
    not_seen: &'a str,
    #[serde(flatten)]
    found: &'a Detected,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Exit {
    Code(u8),
    Signal(i32),
}

impl MachineReport<'_> {
    fn new<'a>(command: &'a [String], outcome: &Outcome, found: &'a Detected) -> MachineReport<'a> {
        MachineReport {
            version: 1,
            command,
            exit: match outcome.end {
                End::Exited(code) => Exit::Code(code),
                End::Killed(signal) => Exit::Signal(signal),
            },
            still_running: outcome.goes_on,
            net: outcome.no_net.is_none(),
            not_seen: NOT_SEEN,
            found,
        }
    }
}
