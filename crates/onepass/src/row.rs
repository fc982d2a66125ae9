//! Full rows: copies, guards, P and Q of all columns in one pass.
//!
//! The columns take turns, a few intervals each, so that what P and Q are made of lies in a near
//! cache from the first column to the last. With Q some columns are taken at once, if the tier can
//! do that and each of them lies straight: then the guards of Q, too, are made of registers. P's
//! guards follow from those of the data.

use std::ops::Range;

use crate::fault::guarded_in;
use crate::pass::Source;
use crate::segments::{Cursor, Segment};
use crate::{ABREAST, Across, Fault, Format, Kernels, Parities, Parity, Pass, Place, gf};

/// A column of a full row.
#[derive(Debug)]
pub struct Column<'a> {
    source: Source<'a>,
    copy: Option<*mut u8>,
    streams: bool,
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
        Column { source: Source::Foreign(source.into()), copy: None, streams: false, guards }
    }

    /// Stable bytes of ours.
    pub fn stable(data: &'a [u8], guards: &'a mut [u64]) -> Column<'a> {
        Column { source: Source::Stable(data), copy: None, streams: false, guards }
    }

    /// The copy may be stored past the caches, as [`Pass::streams`] says. Of rows with Q it is not:
    /// columns that are taken at once have no loop for that.
    pub fn past_caches(self, streams: bool) -> Column<'a> {
        Column { streams, ..self }
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
        // The last columns come first: when the first ones are in Q, it is as it is to be.
        let mut parity = Parity::Set as fn(*mut u8) -> Parity;
        let mut q_is_guarded = false;
        for (group, columns) in columns.chunks_mut(ABREAST).enumerate().rev() {
            let place = |row_parity: &Option<RowParity<'_>>| {
                row_parity.as_ref().map_or(Parity::None, |to| parity(to.to.wrapping_add(at)))
            };
            let coefficient = gf::exp(group * ABREAST);
            let parities = Parities { p: place(&p), q: place(&q), coefficient };
            let turn = Turn { kernels, format, at, intervals: here.clone(), parities };
            let q_guards = q.as_mut().filter(|_| group == 0).map(|q| &mut q.guards[here.clone()]);
            // SAFETY: these bytes of the caller's ranges; after the first group the parities are
            // initialised.
            q_is_guarded = unsafe { turn.take(columns, q_guards)? };
            parity = Parity::Xor;
        }
        if let Some(p) = &mut p {
            for index in here.clone() {
                p.guards[index] = format.guard_of_xor(columns.iter().map(|c| c.guards[index]));
            }
        }
        if let (Some(q), false) = (&mut q, q_is_guarded) {
            // SAFETY: the columns have just initialised these bytes; they are ours.
            let made = unsafe { std::slice::from_raw_parts(q.to.wrapping_add(at), now) };
            // SAFETY: only guards are written.
            unsafe { Pass::guards(format).stable_with(kernels, made, &mut q.guards[here]) };
        }
    }
    Ok(())
}

/// Some intervals of neighbouring columns.
struct Turn<'a> {
    kernels: &'a Kernels,
    format: Format,
    /// Where they start in their columns, and which they are.
    at: usize,
    intervals: Range<usize>,
    /// What the parities of these intervals take up; the coefficient is that of the first column.
    parities: Parities,
}

impl Turn<'_> {
    /// Takes the columns at once, if there is a loop for it; else one after the other. Says whether
    /// the guards of Q as it is left behind have been written, if they are asked for.
    ///
    /// # Safety
    ///
    /// That of [`row`], for these intervals.
    unsafe fn take(
        &self,
        columns: &mut [Column<'_>],
        q_guards: Option<&mut [u64]>,
    ) -> Result<bool, Fault> {
        let len = self.intervals.len() * self.format.interval.bytes();
        if self.parities.q != Parity::None
            && let Some(across) = self.kernels.across
            && let Ok(abreast) = <&mut [Column<'_>; ABREAST]>::try_from(&mut *columns)
            && abreast.iter_mut().all(|column| column.source.ahead() >= len)
        {
            // SAFETY: the caller's promises; that many bytes are straight.
            unsafe { self.take_at_once(across, abreast, len, q_guards)? };
            return Ok(true);
        }
        // SAFETY: the caller's promises.
        unsafe { self.take_in_turn(columns, len)? };
        Ok(false)
    }

    /// # Safety
    ///
    /// That of [`take`](Self::take); `len` bytes of each column are straight, and there is Q.
    unsafe fn take_at_once(
        &self,
        across: unsafe fn(&Across),
        columns: &mut [Column<'_>; ABREAST],
        len: usize,
        q_guards: Option<&mut [u64]>,
    ) -> Result<(), Fault> {
        let sources = columns.each_mut().map(|column| column.source.take(len));
        let places = std::array::from_fn(|k| Place {
            src: sources[k].addr,
            copy: self.copy_of(&columns[k]).unwrap_or_default(),
            guards: columns[k].guards[self.intervals.clone()].as_mut_ptr(),
        });
        let run = &Across {
            format: self.format,
            columns: places,
            parities: self.parities,
            q_guards: q_guards.map_or(std::ptr::null_mut(), <[u64]>::as_mut_ptr),
            intervals: self.intervals.len(),
        };
        let foreign = std::array::from_fn::<_, ABREAST, _>(|k| match columns[k].source {
            Source::Foreign(_) => sources[k],
            Source::Stable(_) => Segment { len: 0, ..sources[k] },
        });
        // SAFETY: what is foreign is guarded, and lies in one segment from a word boundary on; the
        // rest is the caller's promise. What is called owns nothing.
        unsafe { guarded_in(&foreign, move || across(run)) }
    }

    /// # Safety
    ///
    /// That of [`take`](Self::take); the intervals have `len` bytes.
    unsafe fn take_in_turn(&self, columns: &mut [Column<'_>], len: usize) -> Result<(), Fault> {
        let mut parities = self.parities;
        for column in columns {
            let (copy, streams) = (self.copy_of(column), column.streams);
            let pass = Pass { copy, streams, parities, ..Pass::guards(self.format) };
            let guards = &mut column.guards[self.intervals.clone()];
            // SAFETY: the caller's promises; after the first column the parities are initialised.
            unsafe { pass.advance(self.kernels, &mut column.source, len, guards)? };
            parities = Parities {
                p: parities.p.added_to(),
                q: parities.q.added_to(),
                coefficient: gf::mul(parities.coefficient, gf::exp(1)),
            };
        }
        Ok(())
    }

    /// Where the copy of these intervals goes.
    fn copy_of(&self, column: &Column<'_>) -> Option<*mut u8> {
        column.copy.map(|copy| copy.wrapping_add(self.at))
    }
}
