//! Replays the world of a seed: one line for each finding, and exit code 1
//! where there is one.

use std::process::ExitCode;

use clap::Parser;
use stableio_sim::play::{STEPS, play};

/// Replays the simulated world of a seed.
#[derive(Parser)]
struct Arguments {
    /// The seed.
    seed: u64,
    /// Steps that the world lasts, about.
    #[arg(long, default_value_t = STEPS)]
    steps: u64,
}

fn main() -> ExitCode {
    let Arguments { seed, steps } = Arguments::parse();
    let findings = play(seed, steps);
    findings.iter().for_each(|finding| println!("seed {seed}: {finding}"));
    if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
