//! `stableio replace`, `remove`, `scrub`, `pause`, `resume` and `events`: what
//! a running server is asked to do, and what it says of it.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::control::{self, Ask, Begun, EventReport, Found, Named};
use crate::report::{ProgressReport, Report};
use crate::{EventsArgs, RemoveArgs, ReplaceArgs, ScrubArgs};

/// Between two looks at a server.
const LOOK: Duration = Duration::from_millis(250);
/// Between two lines of progress, where nobody sees a line redrawn.
const LINE: Duration = Duration::from_secs(10);

pub(crate) fn replace(args: &ReplaceArgs) -> Result<ExitCode> {
    let server = control::server(&args.array)?;
    let new = std::path::absolute(&args.new).with_context(|| args.new.display().to_string())?;
    let question = Ask::Replace { old: Named::of(&args.old)?, new: new.clone(), force: args.force };
    let begun: Begun = server.ask(&question)?;
    let role = begun.role.context("the server does not say which role")?;
    println!("filling {} for role {role}", new.display());
    if !args.wait {
        return Ok(ExitCode::SUCCESS);
    }
    let is_filled = |report: &Report| match report.members.get(role) {
        Some(member) if member.filling.is_some() => None,
        Some(member) => Some(member.in_sync && member.name == new.display().to_string()),
        None => Some(false),
    };
    let filled = wait(&server, is_filled, |report| report.rebuild.as_ref())?;
    if !filled {
        let events: Vec<EventReport> = server.ask(&Ask::Events { after: begun.after })?;
        let why = events.last().map(|event| event.text.clone()).unwrap_or_default();
        bail!("{}: was not filled: {why}", new.display());
    }
    println!("{} is in sync", new.display());
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn remove(args: &RemoveArgs) -> Result<ExitCode> {
    let server = control::server(&args.array)?;
    let _: Begun = server.ask(&Ask::Remove { member: Named::of(&args.member)? })?;
    println!("{} is left out; served with it again, the array takes it back", args.member);
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn scrub(args: &ScrubArgs) -> Result<ExitCode> {
    let server = control::server(&args.array)?;
    if args.pause || args.resume {
        return pause(&args.array, args.pause);
    }
    if args.stop {
        let _: Begun = server.ask(&Ask::StopScrub)?;
        println!("the scrub is stopped; the next one goes on from there");
        return Ok(ExitCode::SUCCESS);
    }
    let before = server.report.mending();
    let begun: Begun = server.ask(&Ask::Scrub)?;
    if !args.wait {
        println!("the scrub has begun");
        return Ok(ExitCode::SUCCESS);
    }
    // A short one may begin and end between two looks; it says so itself.
    let mut seen = false;
    let is_over = |report: &Report| {
        seen |= report.scrub.is_some();
        let said = || has_said(&server, begun.after, "the scrub ");
        (report.scrub.is_none() && (seen || said()) || said()).then_some(())
    };
    wait(&server, is_over, |report| report.scrub.as_ref())?;
    let now = control::server(&args.array)?.report.mending();
    let events: Vec<EventReport> = server.ask(&Ask::Events { after: begun.after })?;
    if let Some(event) = events.iter().find(|event| event.text.starts_with("the scrub stopped")) {
        bail!("{}", event.text);
    }
    let [blocks, tuples, lost, differed] =
        std::array::from_fn(|i| now[i].saturating_sub(before[i]));
    println!("scrubbed: {blocks} blocks and {tuples} tuples mended, {lost} blocks can not be read");
    if differed > 0 {
        println!(
            "{differed} copies or parities differed from the data of their row, and are made anew \
             from that: without checksums nothing says which was right"
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn pause(array: &str, paused: bool) -> Result<ExitCode> {
    let server = control::server(array)?;
    let _: Begun = server.ask(if paused { &Ask::Pause } else { &Ask::Resume })?;
    println!("rebuild and scrub {}", if paused { "are paused" } else { "go on" });
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn events(args: &EventsArgs) -> Result<ExitCode> {
    let server = control::server(&args.array)?;
    let mut after = 0;
    loop {
        let events: Vec<EventReport> = match server.ask(&Ask::Events { after }) {
            // It has ended, and what follows it has an end, too.
            Err(_) if after > 0 && control::server(&args.array).is_err() => {
                return Ok(ExitCode::SUCCESS);
            }
            events => events?,
        };
        let mut out = io::stdout().lock();
        for event in &events {
            writeln!(out, "{}  {}", utc(event.time), event.text)?;
            after = event.number;
        }
        out.flush()?;
        drop(out);
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        sleep(LOOK);
    }
}

fn has_said(server: &Found, after: u64, start: &str) -> bool {
    let events: Result<Vec<EventReport>> = server.ask(&Ask::Events { after });
    events.is_ok_and(|events| events.iter().any(|event| event.text.starts_with(start)))
}

/// Looks at the server until `is_over` says something, and shows how far it is.
fn wait<T>(
    server: &Found,
    mut is_over: impl FnMut(&Report) -> Option<T>,
    progress: impl Fn(&Report) -> Option<&ProgressReport>,
) -> Result<T> {
    let redraws = io::stderr().is_terminal();
    let mut last = Instant::now();
    loop {
        let report: Report = server.ask(&Ask::Status)?;
        if let Some(over) = is_over(&report) {
            if redraws {
                eprint!("\r\x1b[K");
            }
            return Ok(over);
        }
        let line = progress(&report).map_or_else(|| "begins".to_owned(), ProgressReport::line);
        if redraws {
            eprint!("\r\x1b[K{line}");
        } else if last.elapsed() >= LINE {
            eprintln!("{line}");
            last = Instant::now();
        }
        sleep(LOOK);
    }
}

/// Seconds since 1970 as a date and time of day, UTC.
fn utc(time: f64) -> String {
    let seconds = time.max(0.0) as u64;
    let (days, of_day) = (seconds / 86400, seconds % 86400);
    // Days from 1 March of year 0; eras of 400 years have 146 097 days.
    // Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        // As `date -u -d @SECONDS` says.
        assert_eq!(utc(0.0), "1970-01-01 00:00:00Z");
        assert_eq!(utc(951_782_400.5), "2000-02-29 00:00:00Z");
        assert_eq!(utc(1_709_251_199.0), "2024-02-29 23:59:59Z");
        assert_eq!(utc(1_709_251_200.0), "2024-03-01 00:00:00Z");
        assert_eq!(utc(4_102_444_799.0), "2099-12-31 23:59:59Z");
    }
}
