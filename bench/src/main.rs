//! stableio beside the programs that people use today, on the same machine, in the same minute.
//!
//! A *family* is a set of rows that share their servers and their client; a *row* is one load on
//! both sides and the ratio of what they made of it. `main` picks families, a family starts its
//! servers and names its rows, [`compare`] takes the samples in turn, [`report`] prints.
//!
//! A new family is a module with a `run` like the others' and an entry in [`FAMILIES`].

mod chart;
mod compare;
mod guests;
mod host;
mod nbd;
mod protect;
mod report;
mod servers;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{CommandFactory, Parser, error::ErrorKind};
use stableio_testkit::build_stableio;

use compare::Row;
use report::Header;

/// A set of rows that share their servers and their client.
struct Family {
    name: &'static str,
    about: &'static str,
    run: fn(&Plan) -> anyhow::Result<Vec<Row>>,
}

/// In the order in which `all` runs them.
const FAMILIES: &[Family] = &[
    Family { name: nbd::NAME, about: nbd::ABOUT, run: nbd::run },
    Family { name: guests::NAME, about: guests::ABOUT, run: guests::run },
    Family { name: host::NAME, about: host::ABOUT, run: host::run },
    Family { name: protect::NAME, about: protect::ABOUT, run: protect::run },
];

/// How to measure; the same for every family.
struct Plan {
    /// The length of one sample.
    sample: Duration,
    /// Leave our side out.
    peers_only: bool,
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
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
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
    if !args.peers_only && std::env::var_os("STABLEIO_BIN").is_none() {
        // An old binary would be measured without a word otherwise.
        build_stableio().context("cannot build the command to be measured")?;
    }
    let seconds = if args.quick { 1 } else { 4 };
    let plan = Plan { sample: Duration::from_secs(seconds), peers_only: args.peers_only };
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
    let mut all = Vec::new();
    for family in families {
        let rows = (family.run)(plan).with_context(|| format!("family {}", family.name))?;
        without_ours += rows.iter().filter(|row| row.ours.is_none()).count();
        if json {
            report::print_json(&header, &rows)?;
        } else {
            report::print_table(&header, family.about, &rows);
        }
        all.extend(rows);
    }
    if let Some(path) = chart {
        chart::draw(path, &header, &all).with_context(|| path.display().to_string())?;
    }
    if without_ours > 0 && !plan.peers_only {
        bail!("{without_ours} rows lack our side");
    }
    Ok(())
}
