//! One row: samples of both sides in turn, their medians, the ratio.

use std::io;

use serde::Serialize;

/// Samples per side and row.
const ROUNDS: usize = 3;

/// What a row measures and what we want of it.
pub(crate) struct Case {
    pub(crate) family: &'static str,
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// The ratio that we promise; `None` where we only report.
    pub(crate) target: Option<f64>,
}

/// Units, all of them "the more, the better".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    #[serde(rename = "ops/s")]
    OpsPerS,
    #[serde(rename = "MiB/s")]
    MibPerS,
    #[serde(rename = "GB/s")]
    GbPerS,
}

impl Unit {
    /// The figure of a load that moved this many bytes a second, in requests of `block`.
    pub(crate) fn of(self, bytes_per_s: f64, block: usize) -> f64 {
        match self {
            Unit::OpsPerS => bytes_per_s / block as f64,
            Unit::MibPerS => bytes_per_s / f64::from(1 << 20),
            Unit::GbPerS => bytes_per_s / 1e9,
        }
    }
}

/// One of the two that are compared: where to send the load, or why that is not possible.
///
/// A side that fails stays out of all later rows, and each of them says why.
pub(crate) type Side<S> = Result<S, String>;

/// A row of a report; also its JSON.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) family: &'static str,
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// Our median.
    pub(crate) ours: Option<f64>,
    /// The peer's median.
    pub(crate) peer: Option<f64>,
    /// Who the peer is, or why it is not there.
    pub(crate) peer_name: String,
    /// Ours by peer's.
    pub(crate) ratio: Option<f64>,
    pub(crate) target: Option<f64>,
    /// Why our side is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

/// Takes the samples of a row, ours and the peer's in turn, so that what else happens on the
/// machine happens to both.
pub(crate) fn compare<S>(
    case: Case,
    ours: &mut Side<S>,
    peer: &mut Side<S>,
    peer_name: &str,
    sample: impl Fn(&mut S) -> io::Result<f64>,
) -> Row {
    compare_in(ROUNDS, case, ours, peer, peer_name, sample)
}

/// The same with so many samples of each side: where they are short, more of them.
pub(crate) fn compare_in<S>(
    rounds: usize,
    case: Case,
    ours: &mut Side<S>,
    peer: &mut Side<S>,
    peer_name: &str,
    sample: impl Fn(&mut S) -> io::Result<f64>,
) -> Row {
    let (mut our_samples, mut peer_samples) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        take(ours, &sample, &mut our_samples);
        take(peer, &sample, &mut peer_samples);
    }
    let (our_median, peer_median) = (median(our_samples, rounds), median(peer_samples, rounds));
    let row = Row {
        family: case.family,
        name: case.name,
        unit: case.unit,
        ours: our_median,
        peer: peer_median,
        peer_name: peer.as_ref().err().map_or(peer_name, String::as_str).to_owned(),
        ratio: our_median.zip(peer_median).map(|(ours, peer)| ours / peer),
        target: case.target,
        note: ours.as_ref().err().map(|why| format!("ours: {why}")),
    };
    eprintln!("{}/{}: {} {}", row.family, row.name, show(row.ours), show(row.peer));
    row
}

/// A figure for people.
pub(crate) fn show(figure: Option<f64>) -> String {
    match figure {
        None => "–".to_owned(),
        Some(small) if small < 100.0 => format!("{small:.2}"),
        Some(figure) => format!("{figure:.0}"),
    }
}

fn take<S>(side: &mut Side<S>, sample: impl Fn(&mut S) -> io::Result<f64>, samples: &mut Vec<f64>) {
    let Ok(target) = side else { return };
    match sample(target) {
        Ok(figure) => samples.push(figure),
        Err(error) => *side = Err(error.to_string()),
    }
}

/// The median of a full set of samples.
fn median(mut samples: Vec<f64>, rounds: usize) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    (samples.len() == rounds).then(|| samples[rounds / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const CASE: Case = Case { family: "test", name: "row", unit: Unit::OpsPerS, target: None };

    #[test]
    fn samples_are_taken_in_turn_and_their_medians_compared() {
        let taken = RefCell::new(Vec::new());
        let figures = RefCell::new(vec![3.0, 50.0, 2.0, 10.0, 90.0, 1.0]);
        let row = compare(CASE, &mut Ok("ours"), &mut Ok("peer"), "peer", |side| {
            taken.borrow_mut().push(*side);
            Ok(figures.borrow_mut().pop().expect("six samples"))
        });
        assert_eq!(*taken.borrow(), ["ours", "peer", "ours", "peer", "ours", "peer"]);
        // Ours: 1, 10, 50. The peer's: 90, 2, 3.
        assert_eq!((row.ours, row.peer), (Some(10.0), Some(3.0)));
        assert_eq!(row.ratio, Some(10.0 / 3.0));
    }

    #[test]
    fn a_side_that_fails_says_why_and_stays_out() {
        let (mut ours, mut peer) = (Ok(1.0), Err("qemu-nbd: not installed".to_owned()));
        let row = compare(CASE, &mut ours, &mut peer, "qemu-nbd", |figure| Ok(*figure));
        assert_eq!((row.ours, row.peer, row.ratio), (Some(1.0), None, None));
        assert_eq!(row.peer_name, "qemu-nbd: not installed");

        let row = compare(CASE, &mut ours, &mut peer, "qemu-nbd", |_| {
            Err(io::Error::other("connection refused"))
        });
        assert_eq!(row.note.as_deref(), Some("ours: connection refused"));
        assert!(ours.is_err());
    }
}
