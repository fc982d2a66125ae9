//! Replays the world of a seed, or plays many: findings are printed, and the
//! exit code is 1 where there is one.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use stableio_sim::fleet::{Log, Progress, Voyage, sail};
use stableio_sim::play::{Options, STEPS, play};
use stableio_sim::{Coverage, Finding, Protection};

/// Replays the simulated world of a seed, or plays many.
#[derive(Parser)]
struct Arguments {
    /// The seed of a world to replay.
    #[arg(required_unless_present = "seeds", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Play so many worlds, up to the first with findings.
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// The first of their seeds.
    #[arg(long, value_name = "S", default_value_t = 1, requires = "seeds")]
    from: u64,
    /// Threads; as many as there are cores unless given.
    #[arg(long, value_name = "J", requires = "seeds")]
    jobs: Option<usize>,
    /// Begin no world after so many minutes.
    #[arg(long, value_name = "M", requires = "seeds")]
    minutes: Option<f64>,
    /// Go on after findings.
    #[arg(long, requires = "seeds")]
    keep_going: bool,
    /// Steps that a world lasts, about.
    #[arg(long, default_value_t = STEPS)]
    steps: u64,
    /// Take a protection away: `stabilize`, `tickets-that-detach`, `recovery`,
    /// `flushes`, `log`, `logged-guards`, `verified-parity`, `row-token`,
    /// `tuples-before-tail`, `content-backwards`, `flushed-versions`,
    /// `writes-to-incoming`, `zone-token`, `flushed-zones`, `blank-copies`,
    /// `logged-content`, `read-token`.
    #[arg(long, value_name = "PROTECTION")]
    without: Option<Protection>,
    /// In one of so many worlds, `tools/extract.py` takes the data out of what
    /// is left before each opening, and it is compared; 0: in none.
    #[arg(long, value_name = "ONE_IN", default_value_t = 0)]
    extract: u64,
    /// Print what happens while it does.
    #[arg(long, conflicts_with = "seeds")]
    trace: bool,
    /// Print what happened as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = Options {
        steps: arguments.steps,
        without: arguments.without,
        extract_one_in: arguments.extract,
        trace: arguments.trace,
    };
    let log = match (arguments.seed, arguments.seeds) {
        (Some(seed), _) => {
            let report = play(seed, options);
            let findings = u64::from(!report.findings.is_empty());
            let first = (findings > 0).then_some((seed, report.findings));
            Log { done: 1, findings, coverage: report.coverage, first }
        }
        (None, seeds) => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let minutes = arguments.minutes.map(|m| Duration::from_secs_f64(m.max(0.0) * 60.0));
            // A panic is a finding, told with its seed.
            std::panic::set_hook(Box::new(|_| {}));
            many(Voyage {
                from: arguments.from,
                seeds: seeds.unwrap_or_default(),
                jobs: arguments.jobs.unwrap_or(cores),
                limit: minutes,
                keep_going: arguments.keep_going,
                options,
            })
        }
    };
    tell(&log, &arguments);
    if log.findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(voyage: Voyage) -> Log {
    let terminal = std::io::stderr().is_terminal();
    let period = Duration::from_millis(if terminal { 200 } else { 10_000 });
    let log = sail(voyage, period, |progress| {
        let Progress { done, findings, elapsed } = progress;
        let (start, end) = if terminal { ("\r", "\x1b[K") } else { ("", "\n") };
        eprint!(
            "{start}{done} of {} worlds, {:.0} a second, {findings} with findings, {:.0} s{end}",
            voyage.seeds,
            progress.rate(),
            elapsed.as_secs_f64(),
        );
        let _ = std::io::stderr().flush();
    });
    if terminal {
        eprintln!();
    }
    log
}

fn tell(log: &Log, arguments: &Arguments) {
    if arguments.json {
        println!("{}", json(log, &log.coverage));
        return;
    }
    print!("{}", log.coverage);
    for event in log.coverage.too_rare(log.done) {
        println!("too rare: {}", event.name());
    }
    let Some((seed, findings)) = &log.first else { return };
    findings.iter().for_each(|finding| println!("seed {seed}: {finding}"));
    let mut replay = format!("sim {seed}");
    if arguments.steps != STEPS {
        replay += &format!(" --steps {}", arguments.steps);
    }
    if arguments.extract > 0 {
        replay += &format!(" --extract {}", arguments.extract);
    }
    if let Some(protection) = arguments.without {
        replay += &format!(" --without {}", protection.name());
    }
    println!("replay with: {replay}");
}

fn json(log: &Log, coverage: &Coverage) -> serde_json::Value {
    let events: serde_json::Map<_, _> =
        coverage.rows().map(|(name, count)| (name.to_owned(), count.into())).collect();
    let first = log.first.as_ref().map(|(seed, findings)| {
        let findings: Vec<String> = findings.iter().map(Finding::to_string).collect();
        serde_json::json!({ "seed": seed, "findings": findings })
    });
    serde_json::json!({
        "worlds": log.done,
        "with findings": log.findings,
        "first": first,
        "coverage": events,
    })
}
