//! Full rows: copies, guards, P and Q of all columns in one pass.
//!
//! The columns take turns, a few intervals each, so that what P and Q are made of lies in a near
//! cache from the first column to the last. P's guards follow from those of the data; Q's
//! are computed while it is still there.

use crate::pass::Source;
use crate::segments::Cursor;
use crate::{Fault, Format, Kernels, Parities, Parity, Pass, gf};

/// A column of a full row.
#[derive(Debug)]
pub struct Column<'a> {
    source: Source<'a>,
    copy: Option<*mut u8>,
    guards: &'a mut [u64],
}

impl<'a> Column<'a> {
    /// Foreign bytes that are copied.
    pub fn foreign(
        source: impl Into<Cursor<'a>>,
        copy: *mut u8,
        guards: &'a mut [u64],
    ) -> Column<'a> {
        Column { copy: Some(copy), ..Column::promised(source, guards) }
    }

    /// Foreign bytes that are promised to be stable, and stay where they are.
    pub fn promised(source: impl Into<Cursor<'a>>, guards: &'a mut [u64]) -> Column<'a> {
        Column { source: Source::Foreign(source.into()), copy: None, guards }
    }

    /// Stable bytes of ours.
    pub fn stable(data: &'a [u8], guards: &'a mut [u64]) -> Column<'a> {
        Column { source: Source::Stable(data), copy: None, guards }
    }
}

/// A parity of full rows.
#[derive(Debug)]
pub struct RowParity<'a> {
    /// Where it goes; the bytes need not be initialised.
    pub to: *mut u8,
    /// Its guards.
    pub guards: &'a mut [u64],
}

/// Bytes of a column that are taken in turn: few enough that a parity stays in the L1 cache, enough
/// to make little of what a turn costs (ADR 0014).
const TURN: usize = 16 << 10;

/// Copies the columns of full rows, and computes all guards, P and Q on the way.
///
/// Each column's bytes are loaded once (ONCE-1): guards and parities fit the copies.
///
/// # Errors
///
/// [`Fault`] if a segment was not accessible; the contents of all destinations are unspecified.
///
/// # Panics
///
/// If the columns are not equally long, a number of whole intervals; if there is not one guard for
/// each of these; or if there are more columns than Q can tell apart ([`gf::MAX_COLUMNS`]).
///
/// # Safety
///
/// The copies and the parities are valid for writes of the length of a column. For them and for
/// the segments holds what [`Pass::foreign`] says.
pub unsafe fn row(
    format: Format,
    columns: &mut [Column<'_>],
    p: Option<RowParity<'_>>,
    q: Option<RowParity<'_>>,
) -> Result<(), Fault> {
    // SAFETY: the caller's promises.
    unsafe { row_with(Kernels::chosen(), format, columns, p, q) }
}

/// [`row`] on a tier.
///
/// # Errors
///
/// As there.
///
/// # Safety
///
/// As there.
#[doc(hidden)]
pub unsafe fn row_with(
    kernels: &Kernels,
    format: Format,
    columns: &mut [Column<'_>],
    mut p: Option<RowParity<'_>>,
    mut q: Option<RowParity<'_>>,
) -> Result<(), Fault> {
    let interval = format.interval.bytes();
    let len = columns.first().map_or(0, |column| column.source.len());
    let intervals = len / interval;
    assert!(q.is_none() || columns.len() <= gf::MAX_COLUMNS, "columns that Q tells apart");
    assert!(len.is_multiple_of(interval), "whole intervals");
    assert!(columns.iter().all(|c| c.source.len() == len && c.guards.len() == intervals));
    assert!([&p, &q].into_iter().flatten().all(|parity| parity.guards.len() == intervals));
    // A column without parity waits for no other.
    let turn = if p.is_some() || q.is_some() { TURN } else { len.max(1) };
    for at in (0..len).step_by(turn) {
        let now = turn.min(len - at);
        let here = at / interval..(at + now) / interval;
        for (k, column) in columns.iter_mut().enumerate() {
            let take_up = if k == 0 { Parity::Set } else { Parity::Xor };
            let place = |parity: &Option<RowParity<'_>>| {
                parity.as_ref().map_or(Parity::None, |to| take_up(to.to.wrapping_add(at)))
            };
            let pass = Pass {
                copy: column.copy.map(|copy| copy.wrapping_add(at)),
                parities: Parities { p: place(&p), q: place(&q), coefficient: gf::exp(k) },
                ..Pass::guards(format)
            };
            let guards = &mut column.guards[here.clone()];
            // SAFETY: these bytes of the caller's ranges; after the first column the parities are
            // initialised.
            unsafe { pass.advance(kernels, &mut column.source, now, guards)? };
        }
        if let Some(p) = &mut p {
            for index in here.clone() {
                p.guards[index] = format.guard_of_xor(columns.iter().map(|c| c.guards[index]));
            }
        }
        if let Some(q) = &mut q {
            // SAFETY: the columns have just initialised these bytes; they are ours.
            let made = unsafe { std::slice::from_raw_parts(q.to.wrapping_add(at), now) };
            // SAFETY: only guards are written.
            unsafe { Pass::guards(format).stable_with(kernels, made, &mut q.guards[here]) };
        }
    }
    Ok(())
}
