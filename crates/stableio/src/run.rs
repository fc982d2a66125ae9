//! `stableio run`.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use stableio_host::{Error, FileUse, Launch, Outcome, Policy, RemarkCount, replace};
use stableio_mem::Bytes;
use stableio_session::{Effect, POOL_LEAST};

use crate::table;

#[derive(Args)]
pub(crate) struct RunArgs {
    /// What is done with its direct I/O
    #[arg(long, value_enum, default_value = "auto")]
    policy: PolicyArg,
    /// Let through what can not be protected, and count it, instead of refusing it
    #[arg(long)]
    best_effort: bool,
    /// Memory that each process may use for copies, 64MiB at least
    #[arg(long, default_value = "256MiB")]
    pool: Bytes,
    /// Say at the end what was done, file by file
    #[arg(short, long)]
    verbose: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PolicyArg {
    /// 'bounce' for files whose storage reads the data twice, or may; nothing for others
    Auto,
    /// Write from private memory, and read into it where the storage verifies reads
    Bounce,
    /// Through the page cache, and not kept there
    Uncached,
    /// No direct I/O on storage that reads the data twice, or may
    Refuse,
    /// Nothing
    Off,
}

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    let policy = match args.policy {
        PolicyArg::Auto => Policy::Auto,
        PolicyArg::Bounce => Policy::Bounce,
        PolicyArg::Uncached => Policy::Uncached,
        PolicyArg::Refuse => Policy::Refuse,
        PolicyArg::Off => return Ok(failed(replace(&args.command))),
    };
    if args.pool.0 < POOL_LEAST {
        bail!("--pool is at least {}: the largest copy must find room", Bytes(POOL_LEAST));
    }
    let launch = Launch {
        policy,
        best_effort: args.best_effort,
        pool_bytes: args.pool.0,
        command: args.command,
    };
    let outcome = match launch.run() {
        Ok(outcome) => outcome,
        Err(error) => return Ok(failed(error)),
    };
    if args.verbose {
        say_all(&outcome);
    }
    if args.verbose || args.best_effort {
        say_unprotected(&outcome, args.best_effort);
    }
    Ok(outcome.end.follow())
}

/// Says in a line why a command did not run.
pub(crate) fn failed(error: Error) -> ExitCode {
    let code = error.exit_code();
    eprintln!("stableio: {:#}", anyhow::Error::from(error));
    ExitCode::from(code)
}

fn say_all(outcome: &Outcome) {
    let processes = stableio_host::totals(&outcome.session).processes;
    let files = stableio_host::files(&outcome.session);
    let still = if outcome.goes_on { "; some still run, and stay protected" } else { "" };
    eprintln!("stableio: {} with the library{still}", count(processes, "process", "processes"));
    if files.is_empty() {
        eprintln!("stableio: no file was opened for direct I/O");
    } else {
        eprintln!("{}", file_table(&files));
    }
}

fn file_table(files: &[FileUse]) -> comfy_table::Table {
    let mut table = table::table([
        "FILE",
        "DONE",
        "WRITES",
        "READS",
        "BOUNCED W/R",
        "FELL BACK",
        "REFUSED",
        "UNPROTECTED",
        "DEPTH",
        "WHY",
    ]);
    for file in files {
        table.add_row([
            file.path.clone(),
            done(file).to_owned(),
            file.writes.to_string(),
            file.reads.to_string(),
            format!("{}/{}", file.bounced, file.reads_bounced),
            file.fallen_back.to_string(),
            file.refused.to_string(),
            file.unprotected.to_string(),
            file.depth.to_string(),
            file.reason.clone(),
        ]);
    }
    table
}

fn done(file: &FileUse) -> &'static str {
    match (file.effect, file.private_reads) {
        (Some(Effect::Untouched), false) => "untouched",
        (Some(Effect::Untouched), true) => "reads bounced",
        (Some(Effect::Bounce), false) => "writes bounced",
        (Some(Effect::Bounce), true) => "bounced",
        (Some(Effect::Uncached), _) => "uncached",
        (Some(Effect::Refuse), _) => "refused",
        (None, _) => "?",
    }
}

/// Says in a line what could not be protected: refused, or with `--best-effort` let through.
fn say_unprotected(outcome: &Outcome, best_effort: bool) {
    let mut parts = Vec::new();
    if let Some(error) = &outcome.no_net {
        parts.push(format!("whatever programs without the library did (no net: {error})"));
    }
    let remarks = stableio_host::remarks(&outcome.session);
    if !remarks.is_empty() {
        parts.push(list(&remarks));
    }
    let files = stableio_host::files(&outcome.session);
    let unprotected: u64 = files.iter().map(|file| file.unprotected).sum();
    if unprotected > 0 {
        parts.push(format!("openings and I/Os of files ({unprotected})"));
    }
    if !parts.is_empty() {
        let what = if best_effort { "went unprotected (--best-effort)" } else { "was refused" };
        eprintln!("stableio: {what}: {}", parts.join("; "));
    }
}

/// Remarks as part of a sentence.
pub(crate) fn list(remarks: &[RemarkCount]) -> String {
    let each = remarks.iter().map(|remark| format!("{} ({})", remark.text, remark.count));
    each.collect::<Vec<_>>().join(", ")
}

/// A number and its noun.
pub(crate) fn count(number: u64, one: &str, more: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { more })
}
