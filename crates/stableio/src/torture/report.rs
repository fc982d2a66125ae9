//! What came of it, for people, programs and exit codes.

use std::io::{self, IsTerminal, Write as _};
use std::time::Duration;

use stableio_array::Geometry;

use super::audit::Findings;
use super::oracle::Seen;
use super::writers::{Reads, Write};
use super::{TortureOptions, Until, bed};

/// What came of a run.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Report {
    /// What the array was told of the program's memory.
    pub(crate) memory: &'static str,
    /// The array's level and members.
    pub(crate) array: String,
    /// Rounds of writing and looking.
    pub(crate) rounds: u64,
    /// Writes.
    pub(crate) writes: u64,
    /// Writes whose memory changed between submission and completion.
    pub(crate) raced: u64,
    /// Raced writes that failed, or with a bad guard or a bad row.
    pub(crate) damaged: u64,
    /// Writes that ended in an error.
    pub(crate) failed: u64,
    /// Reads into memory that changes.
    pub(crate) reads: u64,
    /// Reads whose memory changed between submission and completion.
    pub(crate) reads_raced: u64,
    /// Reads that ended in an error.
    pub(crate) reads_failed: u64,
    /// Blocks that do not match their guard or can not be read.
    pub(crate) bad_guards: u64,
    /// Blocks and tuples that the array found wrong, and mended, while it was
    /// written to.
    pub(crate) mended: u64,
    /// Members left out and blocks lost, and errors of members that have no
    /// faults injected.
    pub(crate) charged: u64,
    /// What the injected faults hit.
    pub(crate) faults_hit: Option<String>,
    /// Rows whose data does not make their parity.
    pub(crate) bad_rows: u64,
    /// Words read back that the program never stored.
    pub(crate) strange_words: u64,
    /// Blocks that changed though nobody wrote to them.
    pub(crate) neighbours_changed: u64,
    /// Blocks that nobody wrote to, good, which would be lost with their
    /// member, or come back as something else.
    pub(crate) neighbours_exposed: u64,
    /// Bytes written.
    pub(crate) bytes: u64,
    /// How long writing took.
    #[serde(rename = "writing_s", serialize_with = "seconds")]
    pub(crate) writing: Duration,
    /// How long everything took.
    #[serde(rename = "elapsed_s", serialize_with = "seconds")]
    pub(crate) elapsed: Duration,
}

/// How far a run is.
pub(crate) struct Progress<'a> {
    /// Since it began.
    pub(crate) elapsed: Duration,
    /// When it has been enough.
    pub(crate) until: Until,
    /// Writes so far.
    pub(crate) writes: u64,
    /// Raced among them.
    pub(crate) raced: u64,
    /// What the rounds so far have found.
    pub(crate) report: &'a Report,
}

impl Report {
    /// Fewer raced writes than this show nothing.
    const LEAST_RACED: u64 = 100;

    /// The headings of [`row`](Self::row).
    pub(crate) const HEADINGS: [&str; 9] = [
        "memory",
        "writes",
        "raced",
        "damaged",
        "bad\nguards",
        "bad\nparity",
        "words never\nstored",
        "neighbours\nchanged",
        "GB/s",
    ];

    pub(super) fn new(options: &TortureOptions, members: usize) -> Self {
        Self {
            memory: if options.unprotected { "declared stable" } else { "protected" },
            array: bed::describe(options.level, members),
            rounds: 0,
            writes: 0,
            raced: 0,
            damaged: 0,
            failed: 0,
            reads: 0,
            reads_raced: 0,
            reads_failed: 0,
            bad_guards: 0,
            mended: 0,
            charged: 0,
            faults_hit: None,
            bad_rows: 0,
            strange_words: 0,
            neighbours_changed: 0,
            neighbours_exposed: 0,
            bytes: 0,
            writing: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// Adds what a round has done and left.
    pub(super) fn note_round(
        &mut self,
        writes: &[Write],
        findings: &Findings,
        seen: &Seen,
        geometry: &Geometry,
    ) {
        self.rounds += 1;
        self.note_damage(findings);
        self.bad_guards += seen.unreadable.difference(&findings.bad_blocks).count() as u64;
        self.strange_words += seen.strangers;
        self.neighbours_changed += seen.changed.len() as u64;
        let mut exposed = findings.exposed.clone();
        for write in writes {
            self.writes += 1;
            self.bytes += write.lot.len as u64;
            self.failed += u64::from(write.failed);
            self.raced += u64::from(write.raced);
            let hurt = write.failed
                || write.blocks().any(|block| {
                    let place = geometry.place(block);
                    findings.bad_blocks.contains(&block)
                        || seen.unreadable.contains(&block)
                        || findings.bad_rows.contains(&geometry.row_number(place.stripe, place.row))
                });
            self.damaged += u64::from(write.raced && hurt);
            for block in write.blocks() {
                exposed.remove(&block);
            }
        }
        self.neighbours_exposed += exposed.len() as u64;
    }

    /// Adds the reads of a round.
    pub(super) fn note_reads(&mut self, reads: Reads) {
        self.reads += reads.done;
        self.reads_raced += reads.raced;
        self.reads_failed += reads.failed;
    }

    /// Adds what the members' files show.
    pub(super) fn note_damage(&mut self, findings: &Findings) {
        self.bad_guards += findings.bad_blocks.len() as u64;
        self.bad_rows += findings.bad_rows.len() as u64;
    }

    /// Whether anything was damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        let signs = [
            self.failed,
            self.reads_failed,
            self.bad_guards,
            self.mended,
            self.charged,
            self.bad_rows,
            self.strange_words,
            self.neighbours_changed,
        ];
        signs.iter().any(|count| *count > 0)
    }

    /// Whether too little was raced to show anything.
    pub(crate) fn is_vain(&self) -> bool {
        self.raced < Self::LEAST_RACED || self.raced * 100 < self.writes
    }

    /// 0 for no damage, 1 for damage, 4 for a run that shows nothing.
    pub(crate) fn exit_code(&self) -> u8 {
        match (self.is_damaged(), self.is_vain()) {
            (true, _) => 1,
            (false, true) => 4,
            (false, false) => 0,
        }
    }

    /// Bytes written by the time that writing took.
    pub(crate) fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.writing.as_secs_f64().max(1e-9) / 1e9
    }

    /// A line of the table.
    pub(crate) fn row(&self) -> [String; 9] {
        [
            self.memory.to_owned(),
            grouped(self.writes),
            grouped(self.raced),
            grouped(self.damaged),
            grouped(self.bad_guards + self.mended),
            grouped(self.bad_rows),
            grouped(self.strange_words),
            grouped(self.neighbours_changed),
            format!("{:.2}", self.gb_per_s()),
        ]
    }

    /// What it means, in a line.
    pub(crate) fn verdict(&self) -> String {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole.max(1) as f64;
        if self.is_damaged() {
            let mut text = format!(
                "{}: DAMAGED: {:.1} % of the raced writes",
                self.memory,
                percent(self.damaged, self.raced)
            );
            if self.failed > 0 {
                text += &format!("; {} writes failed", grouped(self.failed));
            }
            if self.reads_failed > 0 {
                text += &format!("; {} reads failed", grouped(self.reads_failed));
            }
            if self.neighbours_exposed > 0 {
                text += &format!(
                    "; {} blocks that nobody wrote to would be lost with their member",
                    grouped(self.neighbours_exposed)
                );
            }
            if self.charged > 0 {
                text += &format!("; {} errors charged to members", grouped(self.charged));
            }
            return text;
        }
        let raced = format!(
            "{:.1} % of the writes raced, {} of {} reads",
            percent(self.raced, self.writes),
            grouped(self.reads_raced),
            grouped(self.reads)
        );
        if self.is_vain() {
            return format!("{}: shows nothing: only {raced}", self.memory);
        }
        format!("{}: no damage; {raced}", self.memory)
    }
}

/// Prints reports on standard output: one table, and a line on each.
pub(crate) fn print(reports: &[Report], json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        for report in reports {
            writeln!(out, "{}", serde_json::to_string(&Line::of(report))?)?;
        }
        return Ok(());
    }
    let mut table = crate::table::table(Report::HEADINGS);
    for column in 1..Report::HEADINGS.len() {
        let column = table.column_mut(column).expect("as many as headings");
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table.add_rows(reports.iter().map(Report::row));
    writeln!(out, "{table}")?;
    for report in reports {
        writeln!(out, "{}, {}", report.array, report.verdict())?;
        if let Some(hit) = &report.faults_hit {
            writeln!(out, "faults that hit the first member: {hit}")?;
        }
    }
    Ok(())
}

/// A report's JSON.
#[derive(serde::Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    report: &'a Report,
    gb_per_s: f64,
    verdict: &'static str,
}

impl<'a> Line<'a> {
    fn of(report: &'a Report) -> Self {
        let verdict = match report.exit_code() {
            0 => "no damage",
            1 => "damage",
            _ => "too little raced",
        };
        Self { report, gb_per_s: report.gb_per_s(), verdict }
    }
}

impl Progress<'_> {
    /// Shows it on standard error, if somebody looks: one line, over and over.
    pub(crate) fn show(&self) {
        if !io::stderr().is_terminal() {
            return;
        }
        let goal = match self.until {
            Until::Elapsed(time) => format!("{} of {} s", self.elapsed.as_secs(), time.as_secs()),
            Until::Raced(writes) => {
                format!("{} s", self.elapsed.as_secs()) + &format!(", of {}", grouped(writes))
            }
        };
        let damage = if self.report.is_damaged() { ", DAMAGED" } else { "" };
        eprint!(
            "\r\x1b[K{}: {goal}: {} writes, {} raced{damage}",
            self.report.memory,
            grouped(self.writes),
            grouped(self.raced)
        );
    }

    /// Takes the line away again.
    pub(crate) fn clear() {
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}

/// A number in groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

fn seconds<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let shown = [0, 12, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(shown, ["0", "12", "999", "1 000", "1 234 567"]);
    }

    #[test]
    fn exit_codes() {
        let report = |raced, bad_rows| Report {
            writes: 10_000,
            raced,
            bad_rows,
            ..Report::new(&TortureOptions::default(), 3)
        };
        assert_eq!(report(5000, 0).exit_code(), 0);
        assert_eq!(report(5000, 1).exit_code(), 1);
        assert_eq!(report(99, 0).exit_code(), 4);
        assert_eq!(report(5, 1).exit_code(), 1);
    }
}
