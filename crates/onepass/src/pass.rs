//! One pass over the bytes of one column: what is made of each byte while it is at hand.
//!
//! Whole intervals that lie one after the other from a word boundary on go through the fused loop
//! of the tier. An interval that straddles segments, or starts inside a word, is put together in
//! its copy first (or on the stack), and summed from there while it is in the cache: each foreign
//! byte is still loaded once.

use crate::fault::guarded;
use crate::segments::{Cursor, Segment, total};
use crate::{BLOCK, Fault, Format, Kernels, Parities, Run, portable};

/// What a pass makes of the bytes it loads, besides their guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// What the guards are.
    pub format: Format,
    /// Where the copy goes, if there is one.
    pub copy: Option<*mut u8>,
    /// Whether the copy is stored past the caches: for one that is large, and not read soon. Then
    /// it should be aligned to 64 bytes; otherwise nothing comes of it.
    pub streams: bool,
    /// What the parities hold of this column at present, if they are to hold the new bytes
    /// instead: they take up the difference.
    pub old: Option<*const u8>,
    /// What the parities take up.
    pub parities: Parities,
}

impl Pass {
    /// Guards and nothing else.
    pub const fn guards(format: Format) -> Pass {
        Pass { format, copy: None, streams: false, old: None, parities: Parities::NONE }
    }

    /// Guards and a copy.
    pub const fn copy(format: Format, to: *mut u8) -> Pass {
        Pass { copy: Some(to), ..Pass::guards(format) }
    }

    /// Runs over foreign bytes, scattered over segments. Everything is made from one load of each
    /// (ONCE-1): the guards fit the copy, and the parities change by exactly its bytes.
    ///
    /// # Errors
    ///
    /// [`Fault`] if a segment was not accessible. Copy, guards and parities are then initialised as
    /// far as they were before, but their contents are unspecified: a parity may have taken up a
    /// part of the data and must be thrown away.
    ///
    /// # Panics
    ///
    /// If there is not one guard for each interval and one for a last part of one.
    ///
    /// # Safety
    ///
    /// - Nothing but foreign memory lies in the segments.
    /// - The copy is valid for writes of the total length; so are the parities, and for reads of
    ///   initialised bytes too if they are [`Parity::Xor`](crate::Parity::Xor); `old` is valid for
    ///   reads of as many initialised bytes. None needs an alignment.
    /// - None of these overlaps another, or the segments, or `guards`; nobody else touches any but
    ///   the segments during the call.
    /// - This thread does not block SIGBUS and SIGSEGV.
    pub unsafe fn foreign<'a>(
        &self,
        source: impl Into<Cursor<'a>>,
        guards: &mut [u64],
    ) -> Result<(), Fault> {
        // SAFETY: the caller's promises.
        unsafe { self.foreign_with(Kernels::chosen(), source, guards) }
    }

    /// Runs over our own, stable bytes.
    ///
    /// # Panics
    ///
    /// As [`foreign`](Self::foreign).
    ///
    /// # Safety
    ///
    /// As [`foreign`](Self::foreign), but for what it says about segments and signals.
    pub unsafe fn stable(&self, data: &[u8], guards: &mut [u64]) {
        // SAFETY: the caller's promises.
        unsafe { self.stable_with(Kernels::chosen(), data, guards) }
    }

    /// [`foreign`](Self::foreign) on a tier.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Safety
    ///
    /// As there.
    #[doc(hidden)]
    pub unsafe fn foreign_with<'a>(
        &self,
        kernels: &Kernels,
        source: impl Into<Cursor<'a>>,
        guards: &mut [u64],
    ) -> Result<(), Fault> {
        let source = source.into();
        let len = source.len();
        assert_eq!(self.format.guards_of(len), guards.len(), "one guard per interval");
        // SAFETY: the caller's promises.
        unsafe { self.advance(kernels, &mut Source::Foreign(source), len, guards) }
    }

    /// [`stable`](Self::stable) on a tier.
    ///
    /// # Safety
    ///
    /// As there.
    #[doc(hidden)]
    pub unsafe fn stable_with(&self, kernels: &Kernels, data: &[u8], guards: &mut [u64]) {
        assert_eq!(self.format.guards_of(data.len()), guards.len(), "one guard per interval");
        // SAFETY: the caller's promises.
        let done = unsafe { self.advance(kernels, &mut Source::Stable(data), data.len(), guards) };
        done.expect("stable memory does not fault");
    }

    /// Runs over the next `len` bytes of a source, whose guards these are.
    ///
    /// # Safety
    ///
    /// That of [`foreign`](Self::foreign), for `len` bytes, which are not more than there are.
    pub(crate) unsafe fn advance(
        &self,
        kernels: &Kernels,
        source: &mut Source<'_>,
        len: usize,
        guards: &mut [u64],
    ) -> Result<(), Fault> {
        debug_assert_eq!(self.format.guards_of(len), guards.len());
        let interval = self.format.interval.bytes();
        let mut run = Run {
            format: self.format,
            src: std::ptr::null(),
            copy: self.copy.unwrap_or_default(),
            streams: self.streams,
            old: self.old.unwrap_or_default(),
            parities: self.parities,
            guards: guards.as_mut_ptr(),
            intervals: 0,
        };
        let mut left = len;
        while left > 0 {
            // SAFETY: the run has the rest of the caller's ranges.
            let done = unsafe {
                match source {
                    Source::Stable(data) => run_stable(kernels, data, &mut run, left),
                    Source::Foreign(cursor) => run_foreign(kernels, cursor, &mut run, left)?,
                }
            };
            left -= done;
            if left > 0 {
                run = run.at(done);
                run.guards = run.guards.wrapping_add(done / interval);
            }
        }
        Ok(())
    }
}

/// Where the bytes of a column come from.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    Foreign(Cursor<'a>),
    /// What of it has not been taken yet.
    Stable(&'a [u8]),
}

impl Source<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Source::Foreign(cursor) => cursor.len(),
            Source::Stable(data) => data.len(),
        }
    }

    /// How many of the next bytes the fused loops can take, foreign ones under guard.
    pub(crate) fn ahead(&mut self) -> usize {
        match self {
            Source::Foreign(cursor) => cursor.ahead(),
            Source::Stable(data) => data.len(),
        }
    }

    /// The next `len` bytes, which are [`ahead`](Self::ahead) and now taken.
    pub(crate) fn take(&mut self, len: usize) -> Segment {
        match self {
            Source::Foreign(cursor) => Segment { addr: cursor.take(len), len },
            Source::Stable(data) => {
                let (taken, rest) = data.split_at(len);
                *data = rest;
                Segment { addr: taken.as_ptr(), len }
            }
        }
    }
}

/// Runs over the whole intervals of stable bytes, or over less than one; says how many bytes.
///
/// # Safety
///
/// That of [`Pass::foreign`], for `len` bytes.
unsafe fn run_stable(kernels: &Kernels, data: &mut &[u8], run: &mut Run, len: usize) -> usize {
    let interval = run.format.interval.bytes();
    let intervals = len / interval;
    let now = if intervals > 0 { intervals * interval } else { len };
    let (taken, rest) = data.split_at(now);
    *data = rest;
    (run.src, run.intervals) = (taken.as_ptr(), intervals);
    // SAFETY: the source has `now` bytes; the rest is the caller's promise.
    unsafe {
        if intervals > 0 {
            (kernels.sum)(run);
        } else {
            run.guards.write(portable::interval(run, now));
        }
    }
    now
}

/// Runs over as many whole intervals as lie straight ahead, or over one interval or less; says how
/// many bytes.
///
/// # Safety
///
/// That of [`Pass::foreign`], for `len` bytes.
unsafe fn run_foreign(
    kernels: &Kernels,
    cursor: &mut Cursor<'_>,
    run: &mut Run,
    len: usize,
) -> Result<usize, Fault> {
    let interval = run.format.interval.bytes();
    let intervals = cursor.ahead().min(len) / interval;
    if kernels.loads_once && intervals > 0 {
        let (now, sum) = (intervals * interval, kernels.sum);
        (run.src, run.intervals) = (cursor.take(now), intervals);
        let run = &*run;
        // SAFETY: the source is the guarded range, which lies in one segment, at a word boundary;
        // the rest is the caller's promise. What is called owns nothing.
        unsafe { guarded(run.src, now, move || sum(run))? };
        return Ok(now);
    }
    // SAFETY: the caller's promises.
    unsafe { run_loaded(kernels, cursor, run, interval.min(len)) }
}

/// Loads an interval or less, and runs over what has been loaded; says how many bytes. On its own,
/// because its room makes a large stack frame, which costs something in every call.
///
/// # Safety
///
/// That of [`Pass::foreign`], for `now` bytes, which are not more than an interval.
#[inline(never)]
unsafe fn run_loaded(
    kernels: &Kernels,
    cursor: &mut Cursor<'_>,
    run: &Run,
    now: usize,
) -> Result<usize, Fault> {
    let mut room = std::mem::MaybeUninit::<[u8; BLOCK]>::uninit();
    let to = if run.copy.is_null() { room.as_mut_ptr().cast() } else { run.copy };
    // SAFETY: copy and room have an interval, which is at most a block; what has been loaded there
    // is stable.
    unsafe {
        cursor.load_next(kernels, to, now)?;
        let mut loaded = std::slice::from_raw_parts(to, now);
        let mut run = Run { copy: std::ptr::null_mut(), ..*run };
        Ok(run_stable(kernels, &mut loaded, &mut run, now))
    }
}

/// Tells `mismatch` which intervals of some stable bytes have another guard than expected, in order.
///
/// # Panics
///
/// If there is not one guard for each interval and one for a last part of one.
pub fn verify(format: Format, data: &[u8], expected: &[u64], mismatch: impl FnMut(usize)) {
    verify_with(Kernels::chosen(), format, data, expected, mismatch);
}

/// [`verify`] on a tier.
#[doc(hidden)]
pub fn verify_with(
    kernels: &Kernels,
    format: Format,
    data: &[u8],
    expected: &[u64],
    mismatch: impl FnMut(usize),
) {
    // SAFETY: only guards are written.
    let done = unsafe { compare(kernels, format, Source::Stable(data), expected, mismatch) };
    done.expect("stable memory does not fault");
}

/// Tells `mismatch` which intervals of some foreign bytes, as they are loaded, have another guard
/// than expected, in order. It says nothing about the bytes that are there afterwards.
///
/// # Errors
///
/// [`Fault`] if a segment was not accessible.
///
/// # Panics
///
/// As [`verify`].
///
/// # Safety
///
/// Nothing but foreign memory lies in the segments; this thread does not block SIGBUS and SIGSEGV.
pub unsafe fn verify_foreign<'a>(
    format: Format,
    source: impl Into<Cursor<'a>>,
    expected: &[u64],
    mismatch: impl FnMut(usize),
) -> Result<(), Fault> {
    // SAFETY: the caller's promises.
    unsafe { verify_foreign_with(Kernels::chosen(), format, source, expected, mismatch) }
}

/// [`verify_foreign`] on a tier.
///
/// # Errors
///
/// As there.
///
/// # Safety
///
/// As there.
#[doc(hidden)]
pub unsafe fn verify_foreign_with<'a>(
    kernels: &Kernels,
    format: Format,
    source: impl Into<Cursor<'a>>,
    expected: &[u64],
    mismatch: impl FnMut(usize),
) -> Result<(), Fault> {
    // SAFETY: the caller's promises.
    unsafe { compare(kernels, format, Source::Foreign(source.into()), expected, mismatch) }
}

/// Tells `mismatch` which intervals of a source have another guard than expected.
///
/// # Safety
///
/// That of [`verify_foreign`], if the source is foreign.
unsafe fn compare(
    kernels: &Kernels,
    format: Format,
    mut source: Source<'_>,
    expected: &[u64],
    mut mismatch: impl FnMut(usize),
) -> Result<(), Fault> {
    let mut left = source.len();
    assert_eq!(format.guards_of(left), expected.len(), "one guard per interval");
    let mut guards = [0; AT_ONCE];
    for (group, expected) in expected.chunks(AT_ONCE).enumerate() {
        let guards = &mut guards[..expected.len()];
        let now = left.min(AT_ONCE * format.interval.bytes());
        // SAFETY: the source has `left` bytes; only guards are written.
        unsafe { Pass::guards(format).advance(kernels, &mut source, now, guards)? };
        left -= now;
        for (index, (guard, expected)) in guards.iter().zip(expected).enumerate() {
            if guard != expected {
                mismatch(group * AT_ONCE + index);
            }
        }
    }
    Ok(())
}

/// Copies stable bytes out to foreign memory, as far as their guards are as expected: returns the
/// first interval of which that is not so. Nothing of it, or behind it, has been stored then, and
/// of a word that lies across its start nothing either.
///
/// # Errors
///
/// [`Fault`] if a segment was not accessible or not writable; a part may have been written.
///
/// # Panics
///
/// As [`verify`], or if the segments have not the length of the data.
///
/// # Safety
///
/// Nothing but foreign memory lies in the segments, and they do not overlap `data` or `expected`;
/// this thread does not block SIGBUS and SIGSEGV.
pub unsafe fn verify_out(
    format: Format,
    data: &[u8],
    expected: &[u64],
    to: &[Segment],
) -> Result<Option<usize>, Fault> {
    // SAFETY: the caller's promises.
    unsafe { verify_out_with(Kernels::chosen(), format, data, expected, to) }
}

/// [`verify_out`] on a tier.
///
/// # Errors
///
/// As there.
///
/// # Safety
///
/// As there.
#[doc(hidden)]
pub unsafe fn verify_out_with(
    kernels: &Kernels,
    format: Format,
    data: &[u8],
    expected: &[u64],
    to: &[Segment],
) -> Result<Option<usize>, Fault> {
    assert_eq!(format.guards_of(data.len()), expected.len(), "one guard per interval");
    assert_eq!(total(to), data.len(), "as much room as data");
    let interval = format.interval.bytes();
    let (mut verified, mut stored, mut segments) = (0, 0, to.iter());
    // The current segment, and how many bytes of it have been stored.
    let mut current = (Segment { addr: std::ptr::null(), len: 0 }, 0);
    for (index, (data_here, expected)) in data.chunks(interval).zip(expected).enumerate() {
        // While the interval is in the cache, it is stored from there.
        let mut guard = [0];
        // SAFETY: only the guard is written.
        unsafe { Pass::guards(format).stable_with(kernels, data_here, &mut guard) };
        if guard != [*expected] {
            return Ok(Some(index));
        }
        verified += data_here.len();
        while stored < verified {
            let (segment, offset) = &mut current;
            if *offset == segment.len {
                current = (*segments.next().expect("as much room as data"), 0);
                continue;
            }
            let end = segment.to_whole_words(segment.len.min(*offset + verified - stored));
            let now = end.saturating_sub(*offset);
            if now == 0 {
                // The rest of the word is not verified yet.
                break;
            }
            let place = segment.addr.wrapping_add(*offset).cast_mut();
            // SAFETY: `data` has `now` bytes there; the place lies in the segment.
            unsafe { (kernels.copy_out)(data[stored..].as_ptr(), place, now)? };
            *offset += now;
            stored += now;
        }
    }
    Ok(None)
}

/// Guards that are compared at once.
const AT_ONCE: usize = 32;
