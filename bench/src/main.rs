//! stableio beside the programs that people use today, on the same machine, in the same minute.
//!
//! A *family* is a set of rows that share their servers and their client; a *row* is one load on
//! both sides and the ratio of what they made of it. `main` picks families, a family starts its
//! servers and names its rows, [`compare`] takes the samples in turn, [`report`] prints.
//!
//! A new family is a module with a `run` like the others' and an entry in [`FAMILIES`].

mod array;
mod bed;
mod chart;
mod compare;
mod declared;
mod growth;
mod guests;
mod host;
mod load;
mod log;
mod nbd;
mod onepass;
mod protect;
mod report;
mod servers;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{CommandFactory, Parser, error::ErrorKind};
use stableio_testkit::build_stableio;

use compare::{Row, Side};
use growth::Grown;
use report::Header;

/// A set of rows that share their servers and their client.
struct Family {
    name: &'static str,
    about: &'static str,
    /// Whether it starts the command; else all is in this process.
    needs_command: bool,
    run: Run,
}

/// How a family measures, which is also how its chart looks.
enum Run {
    /// A ratio a row, drawn as a bar.
    Bars(fn(&Plan) -> anyhow::Result<Vec<Row>>),
    /// A ratio a row, over the depth that ends the row's name, drawn as lines.
    Lines(fn(&Plan) -> anyhow::Result<Vec<Row>>),
    /// Figures of ours alone.
    Growth,
}

/// In the order in which `all` runs them.
const FAMILIES: &[Family] = &[
    Family { name: nbd::NAME, about: nbd::ABOUT, needs_command: true, run: Run::Bars(nbd::run) },
    Family {
        name: guests::NAME,
        about: guests::ABOUT,
        needs_command: true,
        run: Run::Bars(guests::run),
    },
    Family { name: host::NAME, about: host::ABOUT, needs_command: true, run: Run::Bars(host::run) },
    Family {
        name: protect::NAME,
        about: protect::ABOUT,
        needs_command: false,
        run: Run::Bars(protect::run),
    },
    Family {
        name: array::NAME,
        about: array::ABOUT,
        needs_command: false,
        run: Run::Bars(array::run),
    },
    Family { name: log::NAME, about: log::ABOUT, needs_command: false, run: Run::Lines(log::run) },
    Family {
        name: onepass::NAME,
        about: onepass::ABOUT,
        needs_command: false,
        run: Run::Bars(onepass::run),
    },
    Family { name: growth::NAME, about: growth::ABOUT, needs_command: false, run: Run::Growth },
];

/// How to measure; the same for every family.
struct Plan {
    /// The length of one sample.
    sample: Duration,
    /// Leave our side out.
    peers_only: bool,
    /// Leave the peers out.
    ours_only: bool,
    /// The only rows that are wanted; all, if empty.
    only: Vec<String>,
}

impl Plan {
    /// Whether to measure a row.
    fn wants(&self, row: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == row)
    }

    /// Our side, where it is wanted.
    fn ours<S>(&self, make: impl FnOnce() -> anyhow::Result<S>) -> anyhow::Result<Side<S>> {
        if self.peers_only { Ok(Err("left out (--peers-only)".to_owned())) } else { make().map(Ok) }
    }

    /// The peer's side, where it is wanted.
    fn peer<S>(&self, peer: S) -> Side<S> {
        if self.ours_only { Err("left out (--ours-only)".to_owned()) } else { Ok(peer) }
    }
}

/// Compares stableio with its peers: medians of three, both sides in turn.
#[derive(Parser)]
struct Args {
    /// A family, `all`, or `list` to see what there is.
    name: String,
    /// One JSON object per row instead of a table.
    #[arg(long)]
    json: bool,
    /// Samples of one second instead of four.
    #[arg(long)]
    quick: bool,
    /// Draw the ratios, as an SVG.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Measure the peers alone, to check a machine or the clients.
    #[arg(long)]
    peers_only: bool,
    /// Measure our side alone, of `array`, `log` and `onepass`: for a profiler.
    #[arg(long, conflicts_with = "peers_only")]
    ours_only: bool,
    /// Measure this row alone, of `array`, `log` and `onepass`; more than once for several.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// What a process that `growth` starts does.
    #[arg(long, hide = true)]
    part: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if !args.part.is_empty() {
        return growth::do_part(&args.part);
    }
    if args.name == "list" {
        for Family { name, about, .. } in FAMILIES {
            println!("{name:8} {about}");
        }
        return Ok(());
    }
    let chosen: Vec<_> =
        FAMILIES.iter().filter(|f| args.name == "all" || args.name == f.name).collect();
    if chosen.is_empty() {
        let text = format!("no family is called {:?}; see `list`", args.name);
        Args::command().error(ErrorKind::InvalidValue, text).exit();
    }
    if cfg!(debug_assertions) {
        bail!("figures of a debug build mean nothing: cargo run --release -p stableio-bench");
    }
    let needs_command = chosen.iter().any(|family| family.needs_command);
    if needs_command && !args.peers_only && std::env::var_os("STABLEIO_BIN").is_none() {
        // An old binary would be measured without a word otherwise.
        build_stableio().context("cannot build the command to be measured")?;
    }
    let seconds = if args.quick { 1 } else { 4 };
    let plan = Plan {
        sample: Duration::from_secs(seconds),
        peers_only: args.peers_only,
        ours_only: args.ours_only,
        only: args.only,
    };
    measure(&chosen, &plan, args.json, args.chart.as_deref())
}

/// Runs the families and prints each as soon as it is complete.
fn measure(
    families: &[&Family],
    plan: &Plan,
    json: bool,
    chart: Option<&Path>,
) -> anyhow::Result<()> {
    let header = Header::of_this_machine()?;
    let mut without_ours = 0;
    let (mut all, mut grown) = (Vec::new(), Vec::<Grown>::new());
    for family in families {
        let run = match family.run {
            Run::Bars(run) | Run::Lines(run) => run,
            Run::Growth => {
                let lines = growth::run()?;
                match json {
                    true => report::print_json(&header, &lines)?,
                    false => report::print_growth(&header, family.about, &lines),
                }
                grown.extend(lines);
                continue;
            }
        };
        let rows = run(plan).with_context(|| format!("family {}", family.name))?;
        without_ours += rows.iter().filter(|row| row.ours.is_none()).count();
        if json {
            report::print_json(&header, &rows)?;
        } else {
            report::print_table(&header, family.about, &rows);
        }
        all.extend(rows);
    }
    if let Some(path) = chart {
        let drawn = match families {
            [Family { run: Run::Growth, .. }] => chart::growth(path, &header, &grown),
            [Family { run: Run::Lines(_), .. }] => chart::lines(path, &header, &all),
            _ => chart::draw(path, &header, &all),
        };
        drawn.with_context(|| path.display().to_string())?;
    }
    if without_ours > 0 && !plan.peers_only {
        bail!("{without_ours} rows lack our side");
    }
    Ok(())
}
