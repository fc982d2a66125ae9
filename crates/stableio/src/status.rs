//! `stableio status`: how the arrays of running servers are, for a person.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use stableio_mem::Bytes;

use crate::control::{self, Found};
use crate::report::{Report, State};
use crate::{StatusArgs, table};

/// Of a `status` that found an array with members missing.
const DEGRADED: u8 = 10;
/// Of one that found an array that lost something.
const DAMAGED: u8 = 11;
/// Events that are shown; `stableio events` shows all.
const EVENTS: usize = 5;

pub(crate) fn run(args: &StatusArgs) -> Result<ExitCode> {
    loop {
        let (text, worst) = look(args)?;
        let redraws = args.watch.is_some() && std::io::stdout().is_terminal();
        let mut out = std::io::stdout().lock();
        if redraws {
            write!(out, "\x1b[H\x1b[2J")?;
        }
        writeln!(out, "{text}")?;
        if args.watch.is_some() && !redraws {
            writeln!(out)?;
        }
        out.flush()?;
        match args.watch {
            Some(seconds) => std::thread::sleep(Duration::from_secs(seconds)),
            None => {
                return Ok(match worst {
                    State::Damaged => ExitCode::from(DAMAGED),
                    State::Degraded => ExitCode::from(DEGRADED),
                    State::Healthy | State::Raw => ExitCode::SUCCESS,
                });
            }
        }
    }
}

/// What to print, and the worst state in it.
fn look(args: &StatusArgs) -> Result<(String, State)> {
    let mut found = control::servers()?;
    found.retain(|found| args.name.as_ref().is_none_or(|name| found.report.name == *name));
    if let Some(name) = &args.name
        && found.is_empty()
    {
        bail!("'{name}' is not served by you");
    }
    let reports: Vec<Report> = found.into_iter().map(|Found { report, .. }| report).collect();
    let worst = reports.iter().map(|report| report.state).max().unwrap_or(State::Raw);
    let text = if args.json {
        serde_json::to_string_pretty(&reports)?
    } else if reports.is_empty() {
        "nothing is served by you".to_owned()
    } else {
        reports.iter().map(show).collect::<Vec<_>>().join("\n\n")
    };
    Ok((text, worst))
}

fn show(r: &Report) -> String {
    let level = r.level.as_deref().unwrap_or("image");
    let mut lines = vec![format!(
        "{}: {}, {level}, {}, pid {}, up {}",
        r.name,
        r.state.word(),
        Bytes(r.size_bytes),
        r.pid,
        duration(r.uptime_seconds)
    )];
    if !r.members.is_empty() {
        lines.push(members(r));
        lines.extend(about_array(r).into_iter().map(|(what, text)| format!("  {what:<9} {text}")));
    }
    let traffic = [
        ("reads", format!("{} ({})", r.reads, Bytes(r.read_bytes))),
        (
            "writes",
            format!(
                "{} ({}), {} copied once, {} from memory declared stable",
                r.writes,
                Bytes(r.written_bytes),
                r.writes_stabilized,
                r.writes_promised
            ),
        ),
        ("failed", format!("{} requests", r.failed)),
        ("memory", format!("{} of {} in use", Bytes(r.pool_used_bytes), Bytes(r.pool_bytes))),
    ];
    lines.extend(traffic.iter().map(|(what, text)| format!("  {what:<9} {text}")));
    let waiting: Vec<_> =
        r.waiting.iter().filter(|(_, n)| *n > 0).map(|(s, n)| format!("{n} in {s}")).collect();
    if !waiting.is_empty() {
        lines.push(format!("  waiting   {}", waiting.join(", ")));
    }
    lines.extend(r.exports.iter().map(|line| format!("  export    {line}")));
    let last = r.events.len().saturating_sub(EVENTS);
    lines.extend(r.events[last..].iter().map(|event| format!("  event     {event}")));
    lines.join("\n")
}

fn members(r: &Report) -> String {
    let headings = ["  ROLE", "MEMBER", "STATE", "READ ERRORS", "WRITE ERRORS", "BAD BLOCKS"];
    let mut members = table::table(headings);
    for m in &r.members {
        members.add_row([
            format!("  {}", m.role),
            m.name.clone(),
            m.state(r.rebuild.as_ref()),
            m.read_errors.to_string(),
            m.write_errors.to_string(),
            m.mismatches.to_string(),
        ]);
    }
    // The last column is padded, too.
    members.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// What is known of an array beside its members.
fn about_array(r: &Report) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    for (what, progress) in [("rebuild", &r.rebuild), ("scrub", &r.scrub)] {
        if let Some(progress) = progress {
            lines.push((what, progress.line()));
        }
    }
    let unguarded = r.checksums == Some(false);
    if unguarded {
        let differed = format!("{} found to differ in scrubs", r.blocks_differed);
        let why = "what a member reads back wrong is not noticed";
        lines.push(("checksums", format!("off: {why}; {differed}")));
    }
    let lost = if unguarded { "hold anything" } else { "be lost" };
    lines.push(match &r.log {
        Some(log) => ("log", log.line()),
        None => ("log off:", format!("a block in flight at a crash may {lost}")),
    });
    lines.push(("mended", format!("{} blocks, {} tuples", r.blocks_mended, r.tuples_mended)));
    lines.push(("lost", format!("{} blocks; {} reads failed", r.blocks_lost, r.lost_reads)));
    if r.rows_recovered > 0 {
        lines.push(("recovered", format!("{} rows, after a crash", r.rows_recovered)));
    }
    let by: Vec<_> = r
        .issuers
        .iter()
        .filter(|issuer| issuer.benign_mismatches > 0 || issuer.reads_privately)
        .map(|issuer| {
            let now = if issuer.reads_privately { " (reads privately now)" } else { "" };
            format!("{} {}{now}", issuer.name, issuer.benign_mismatches)
        })
        .collect();
    let by = if by.is_empty() { String::new() } else { format!(": {}", by.join(", ")) };
    lines.push(("benign", format!("{} buffers changed during reads{by}", r.benign_mismatches)));
    lines
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}
