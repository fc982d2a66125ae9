//! `stableio probe`: whether a buffer that changes in flight does damage under
//! a path, by what lies there and by what this kernel does.
//!
//! Exit codes: 0 safe, 1 at risk, 2 a path that is not there, 3 can not tell.
//! Of several paths the worst counts: 2, then 1, then 3.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use stableio_inspect::{DirectWrite, Host, Layer, Report, Tristate, Verdict};

use crate::table;

const AT_RISK: u8 = 1;
const NOT_THERE: u8 = 2;
const CAN_NOT_TELL: u8 = 3;

#[derive(Args)]
#[command(
    after_help = "Exit code: 0 safe, 1 at risk, 2 a path that is not there, 3 can not tell. \
                        Of several paths the worst counts."
)]
pub(crate) struct ProbeArgs {
    /// Files, directories or block devices
    #[arg(required_unless_present = "all")]
    paths: Vec<PathBuf>,
    /// Every mounted file system
    #[arg(long, conflicts_with = "paths")]
    all: bool,
    /// For programs
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ProbeArgs) -> Result<ExitCode> {
    let host = Host::this();
    let mut missing = false;
    let reports: Vec<Report> = match args.all {
        true => host.mounted(),
        false => args
            .paths
            .iter()
            .filter_map(|path| {
                let report = host.of_path(path);
                report.inspect_err(|error| eprintln!("stableio: {error}")).ok()
            })
            .collect(),
    };
    missing |= !args.all && reports.len() < args.paths.len();
    match () {
        () if args.json => println!("{}", serde_json::to_string_pretty(&reports)?),
        () if args.all => print_summary(&reports),
        () => {
            for (at, report) in reports.iter().enumerate() {
                if at > 0 {
                    println!();
                }
                print_report(report);
            }
        }
    }
    Ok(ExitCode::from(code(&reports, missing)))
}

fn code(reports: &[Report], missing: bool) -> u8 {
    let some = |is: fn(&Verdict) -> bool| reports.iter().any(|report| is(&report.verdict));
    match () {
        () if missing => NOT_THERE,
        () if some(|v| matches!(v, Verdict::AtRisk)) => AT_RISK,
        () if some(|v| matches!(v, Verdict::Unknown { .. })) => CAN_NOT_TELL,
        () => 0,
    }
}

/// A row for each file system.
fn print_summary(reports: &[Report]) {
    let mut table = table::table([
        "PATH",
        "TYPE",
        "SOURCE",
        "VERDICT",
        "DIRECT WRITES",
        "CHANGED WHILE WRITTEN",
        "CHANGED WHILE READ",
        "WHY",
    ]);
    for report in reports {
        let (kind, source) = match &report.file_system {
            Some(fs) => (fs.kind.as_str(), fs.source.as_str()),
            None => ("", ""),
        };
        table.add_row([
            shown(&report.path),
            printable(kind),
            printable(source),
            report.verdict.to_string(),
            short(&report.direct_write),
            hurt_by_writes(report),
            hurt_by_reads(report),
            printable(&report.reason),
        ]);
    }
    println!("{table}");
    for report in reports.iter().filter(|report| report.verdict != Verdict::Safe) {
        println!("{}: {}", shown(&report.path), printable(&report.advice));
    }
}

/// All of one path.
fn print_report(report: &Report) {
    println!("{}: {}", shown(&report.path), report.verdict);
    let mut layers = table::table([
        "LAYER",
        "KIND",
        "SAMPLES TWICE",
        "VERIFIES READS",
        "WHAT IT DOES",
        "HOW WE KNOW",
    ]);
    for layer in &report.layers {
        layers.add_row([
            format!("{}{}", "  ".repeat(layer.depth), printable(&layer.name)),
            printable(&layer.kind),
            layer.samples_writes_twice.to_string(),
            layer.verifies_reads.to_string(),
            printable(&layer.does),
            how_we_know(layer),
        ]);
    }
    println!("{layers}");
    let say = |what: &str, text: &str| println!("{what}: {}", printable(text));
    if let Some(fs) = &report.file_system {
        let at = fs.mount_point.as_ref().map_or("elsewhere".to_owned(), |path| shown(path));
        let options = match fs.options.is_empty() {
            true => String::new(),
            false => format!(" ({})", fs.options.join(",")),
        };
        say("file system", &format!("{} on {}, mounted at {at}{options}", fs.kind, fs.source));
    }
    say("kernel", &report.kernel);
    say("direct writes", &report.direct_write.to_string());
    if let Some(alignment) = report.alignment {
        let (memory, offset) = (alignment.memory_bytes, alignment.offset_bytes);
        say("alignment", &format!("memory {memory} bytes, offset and length {offset} bytes"));
    }
    if let Some(atomic) = report.atomic_writes {
        say("atomic writes", &format!("{} to {} bytes", atomic.min_bytes, atomic.max_bytes));
    }
    say("changed while written", &hurt_by_writes(report));
    say("changed while read", &hurt_by_reads(report));
    say("why", &report.reason);
    if let Verdict::Unknown { root_would_show: Some(what), .. } = &report.verdict {
        say("root would see", what);
    }
    say("what to do", &report.advice);
}

fn how_we_know(layer: &Layer) -> String {
    if layer.evidence.is_empty() { "-".to_owned() } else { printable(&layer.evidence) }
}

fn short(write: &DirectWrite) -> String {
    match write {
        DirectWrite::NotDirect { .. } => "none, each is a copy".to_owned(),
        DirectWrite::Unknown { .. } => "unknown".to_owned(),
        known => known.to_string(),
    }
}

/// The blast radius of a write, and how it shows.
fn hurt_by_writes(report: &Report) -> String {
    match (report.samples_writes_twice(), report.shows) {
        (Tristate::No, _) => "nobody is hurt".to_owned(),
        (Tristate::Unknown, _) => "unknown".to_owned(),
        (Tristate::Yes, Some(shows)) => format!("{}, {shows}", report.write_radius),
        (Tristate::Yes, None) => report.write_radius.to_string(),
    }
}

/// The same for a read: what is hurt is an answer, or the health of a member
/// that gave it.
fn hurt_by_reads(report: &Report) -> String {
    match report.verifies_reads() {
        Tristate::No => "nobody is hurt".to_owned(),
        Tristate::Unknown => "unknown".to_owned(),
        Tristate::Yes => format!("{}, false error", report.read_radius),
    }
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Names come from anywhere; a control character must not reach a terminal
/// or tear a line.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
