//! How rows are printed, and what is said about the machine they come from.

use std::fs;
use std::thread;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::compare::{Row, Unit, show};
use crate::growth::Grown;

/// Where the figures come from; a part of every JSON row, so that a row can stand alone.
#[derive(Serialize)]
pub(crate) struct Header {
    processor: String,
    kernel: String,
    command: String,
}

impl Header {
    pub(crate) fn of_this_machine() -> anyhow::Result<Header> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let model = fields.find(|(key, _)| key.trim() == "model name");
        let model = model.map_or("unknown", |(_, value)| value.trim());
        let threads = thread::available_parallelism()?;
        let args: Vec<String> = std::env::args().skip(1).collect();
        Ok(Header {
            processor: format!("{model}, {threads} threads"),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            command: format!("cargo run --release -p stableio-bench -- {}", args.join(" ")),
        })
    }
}

impl Header {
    /// In a line.
    pub(crate) fn machine(&self) -> String {
        format!("{}, Linux {}", self.processor, self.kernel)
    }
}

/// One object per line.
pub(crate) fn print_json<R: Serialize>(header: &Header, rows: &[R]) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Line<'a, R> {
        #[serde(flatten)]
        row: &'a R,
        #[serde(flatten)]
        header: &'a Header,
    }
    for row in rows {
        println!("{}", serde_json::to_string(&Line { row, header })?);
    }
    Ok(())
}

/// A table for people, under a header that says how to have it again.
pub(crate) fn print_table(header: &Header, about: &str, rows: &[Row]) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "ours", "peer", "unit", "ratio", "target", ""]);
    for row in rows {
        table.add_row([
            row.name.to_owned(),
            show(row.ours),
            show(row.peer),
            unit(row),
            two_digits(row.ratio),
            two_digits(row.target),
            remark(row),
        ]);
    }
    for figures in [1, 2, 4, 5] {
        let column = table.column_mut(figures).expect("the table has seven columns");
        column.set_cell_alignment(CellAlignment::Right);
    }
    print(header, about, &table);
}

/// The same of what has no peer.
pub(crate) fn print_growth(header: &Header, about: &str, lines: &[Grown]) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "size",
        "left",
        "log in use, %",
        "open, ms",
        "memory, MiB",
        "rows recovered",
    ]);
    for line in lines {
        table.add_row([
            line.size.to_owned(),
            line.left.clone(),
            format!("{:.0}", line.log_percent),
            format!("{:.1}", line.open_ms),
            format!("{:.1}", line.resident_mib),
            line.rows_recovered.to_string(),
        ]);
    }
    for figures in 2..6 {
        let column = table.column_mut(figures).expect("the table has six columns");
        column.set_cell_alignment(CellAlignment::Right);
    }
    print(header, about, &table);
}

fn print(header: &Header, about: &str, table: &Table) {
    println!("{about}");
    println!("{} | Linux {}", header.processor, header.kernel);
    println!("{}", header.command);
    println!("{table}\n");
}

fn unit(row: &Row) -> String {
    match row.unit {
        Unit::OpsPerS => "ops/s".to_owned(),
        Unit::MibPerS => "MiB/s".to_owned(),
        Unit::GbPerS => "GB/s".to_owned(),
    }
}

fn two_digits(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// Whatever a reader of the figures must know.
fn remark(row: &Row) -> String {
    let missed = row.ratio.zip(row.target).is_some_and(|(ratio, target)| ratio < target);
    let missed = missed.then(|| "below target".to_owned());
    let remarks = [Some(format!("peer: {}", row.peer_name)), row.note.clone(), missed];
    remarks.into_iter().flatten().collect::<Vec<_>>().join("\n")
}
