//! The four doors between foreign memory and everything else.
//!
//! | door | gives | may be used for |
//! |---|---|---|
//! | [`stabilize`] | [`StableBuf`] with guards and parity | anything |
//! | [`promise`] (needs a [`Grant`]) | [`PromisedBuf`]: raw loads, never `&[u8]` | guards, parity, members |
//! | [`verify_in_place`] | a [`Verdict`] only | answering a lazy read; never cache, repair, read-modify-write or a member's health |
//! | [`copy_out`], [`zero_out`] | nothing | writing verified stable bytes into foreign memory |
//!
//! [`load`] is the first door in small: a guest's request header is loaded
//! once into memory of ours, and only that is looked at.
//!
//! DOOR-1: [`stabilize`] loads each foreign byte once and in the same pass
//! copies it, sums it and folds it into parity, so that the copy, its guards
//! and its parity always fit each other, whatever the owner does meanwhile.
//!
//! DOOR-2: every naturally aligned 8-byte word of the source that lies inside
//! one segment is loaded whole: what is stored is a word that somebody wrote.
//!
//! A source that vanishes in the middle (the file behind it was truncated)
//! gives a [`Fault`]; buffers taken so far go back to their pool.

use smallvec::SmallVec;
use stableio_onepass::{self as onepass, Column, Cursor, Format, Parities, Parity, RowParity};

use crate::error::Fault;
use crate::foreign::{ForeignBuf, Segment, WORD};
use crate::pool::{PoolBuf, Reservation};
use crate::rows::{ParitySpan, RowShape, Run, whole_blocks};
use crate::sg::SgList;
use crate::stable::StableBuf;
use crate::units::BLOCK;

/// From so many bytes on a copy is a large one: with all that is under way at
/// once it would not stay in the caches anyway, and others would go
/// (docs/adr/0014).
const LARGE: usize = 512 << 10;

/// A pass for guards and no more.
const GUARDS: onepass::Pass = onepass::Pass::guards(Format::NATIVE);

/// What a pass over the data of a write computes along the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    /// A guard of every whole block.
    pub guards: bool,
    /// Parity of every full row; needs `guards`.
    pub rows: Option<RowShape>,
    /// Whether a large copy goes past the caches: nothing that the processor
    /// does reads it soon.
    pub streams: bool,
}

/// What a pass computed. It travels with the request: whoever stores the data
/// stores these, and nobody computes them again from elsewhere.
#[derive(Debug, Default)]
pub struct Sums {
    /// Number of the first whole block on the device.
    pub first_block: u64,
    /// Guards of the whole blocks, in order.
    pub guards: SmallVec<[u64; 4]>,
    /// Parity blocks (P) of the full rows, placed by `spans`.
    pub parity: Option<StableBuf>,
    /// Guards of these, in order.
    pub parity_guards: Vec<u64>,
    /// Their Q, if the rows have two parities; placed by `spans` too.
    pub q: Option<StableBuf>,
    /// Guards of these, in order.
    pub q_guards: Vec<u64>,
    /// Where each stripe's full rows lie in `parity` and in `q`.
    pub spans: Vec<ParitySpan>,
}

impl Sums {
    /// What was computed of a part of the bytes: `len` of them at `at`, cut
    /// where stripes end.
    pub fn part(&self, rows: RowShape, at: u64, len: usize) -> Sums {
        let whole = whole_blocks(at, len);
        let first = (whole.start - self.first_block) as usize;
        let guards = &self.guards[first..first + whole.clone().count()];
        let stripes = whole.start / rows.stripe_blocks()..whole.end.div_ceil(rows.stripe_blocks());
        let spans = self.spans.iter().filter(|span| stripes.contains(&span.stripe));
        Sums {
            first_block: whole.start,
            guards: SmallVec::from_slice(guards),
            parity: self.parity.clone(),
            parity_guards: self.parity_guards.clone(),
            q: self.q.clone(),
            q_guards: self.q_guards.clone(),
            spans: spans.cloned().collect(),
        }
    }
}

impl Pass {
    /// Bytes of parity that a write of `len` bytes at `at` produces: what to
    /// reserve beside the payload.
    pub fn parity_bytes(&self, at: u64, len: usize) -> usize {
        self.rows.map_or(0, |rows| usize::from(rows.parities) * rows.parity_spans(at, len).1)
    }

    /// Bytes that a copy of the payload takes, padding included.
    pub fn payload_bytes(at: u64, len: usize) -> usize {
        ((at % BLOCK as u64) as usize + len).next_multiple_of(BLOCK)
    }
}

/// Copies a foreign buffer into stable memory, with guards and parity, in one
/// pass (DOOR-1). `at` is the device offset that the first byte goes to: the
/// copy lies at the same offset inside its first block, padded with zeros.
///
/// Takes [`Pass::payload_bytes`] and [`Pass::parity_bytes`] of `memory`. The
/// handle is consumed; the program may reuse its memory at once.
///
/// # Errors
///
/// [`Fault`] when the memory vanished; nothing stays allocated.
pub fn stabilize(
    buf: ForeignBuf,
    at: u64,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<(StableBuf, Sums), Fault> {
    let len = buf.len();
    let lead = (at % BLOCK as u64) as usize;
    let mut copy = memory.take(lead + len);
    copy.zero_outside(lead..lead + len);
    let segments = ranges(buf.for_kernel());
    let mut source = Cursor::new(&segments);

    let whole = if pass.guards { whole_blocks(at, len) } else { 0..0 };
    let head = if whole.is_empty() { 0 } else { (whole.start * BLOCK as u64 - at) as usize };
    let body = whole.count() * BLOCK;
    // SAFETY: the segments are foreign ranges kept alive by `buf`, and the
    // copy is ours alone.
    let sums = unsafe {
        load_to(source.split_to(head)?, &mut copy, lead)?;
        let blocks = source.split_to(body)?;
        let sums = sum_blocks(at, len, pass, memory, blocks, Some((&mut copy, lead + head)))?;
        load_to(source, &mut copy, lead + head + body)?;
        sums
    };
    Ok((copy.freeze().slice(lead..lead + len), sums))
}

/// Guards and parity of memory that is stable already; nothing is copied.
/// `data` must be congruent to `at` (see [`StableBuf::is_congruent`]).
///
/// Takes [`Pass::parity_bytes`] of `memory`.
///
/// # Panics
///
/// When a block lies in two pieces: the data is not congruent.
pub fn sums_of_stable(data: &StableBuf, at: u64, pass: Pass, memory: &mut Reservation) -> Sums {
    assert!(data.is_congruent(at, BLOCK), "the data is not congruent to {at}");
    let list = data.source();
    // SAFETY: `list` keeps the memory alive, and nobody writes to it.
    let sums = unsafe { sums_in_place(list.segments(), at, data.len(), pass, memory) };
    sums.expect("stable memory does not fault")
}

/// Loads a small foreign structure, as a request's header, into memory of
/// ours: the first door for what is looked at and not stored. The handle is
/// consumed.
///
/// # Errors
///
/// [`Fault`] when the memory vanished; a part of `into` may have been written.
///
/// # Panics
///
/// When the lengths differ.
pub fn load(buf: ForeignBuf, into: &mut [u8]) -> Result<(), Fault> {
    assert_eq!(buf.len(), into.len());
    let segments = ranges(buf.for_kernel());
    // SAFETY: the segments are foreign ranges kept alive by `buf`; `into` is
    // ours alone and as long.
    unsafe { Cursor::new(&segments).load(into.as_mut_ptr()) }
}

/// Takes the first `at` bytes off into a handle of their own, as
/// [`ForeignBuf::split_to`] does, but keeps words whole (DOOR-2): a naturally
/// aligned word of the memory that the cut goes through is loaded here, once,
/// and both handles go on with what was loaded.
///
/// # Errors
///
/// [`Fault`] when the memory vanished; the buffer is as it was.
///
/// # Panics
///
/// When `at` is more than the buffer has.
pub fn split_words(buf: &mut ForeignBuf, at: usize) -> Result<ForeignBuf, Fault> {
    let Some((start, addr)) = buf.word_at(at) else { return Ok(buf.split_to(at)) };
    let mut word = [0; WORD];
    // SAFETY: `word_at` gives a word that lies in a segment, which the
    // handle's keep-alive holds; the target is on our stack.
    unsafe { onepass::copy_in(addr as *const u8, word.as_mut_ptr(), WORD)? };
    Ok(buf.split_around(at, start, word))
}

/// The right to take an issuer's word that its memory stays unchanged.
///
/// Without it a lie could damage data that is not the issuer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant(());

impl Grant {
    /// The administrator said so, in the configuration of this export or in
    /// the program that embeds the library.
    pub fn by_administrator() -> Self {
        Grant(())
    }

    /// Nobody but the issuer can be hurt: the device below has no redundancy
    /// and shares nothing.
    pub fn only_own_data() -> Self {
        Grant(())
    }
}

/// Foreign memory whose owner promised not to change it until the request is
/// done. It may be loaded more than once, by raw loads: a broken promise gives
/// wrong sums, never undefined behaviour.
#[derive(Debug)]
pub struct PromisedBuf(ForeignBuf);

/// Takes the owner's word; see [`Grant`]. The handle is consumed.
pub fn promise(buf: ForeignBuf, _grant: Grant) -> PromisedBuf {
    PromisedBuf(buf)
}

impl PromisedBuf {
    /// Gives the promise back: the memory is to be treated as foreign.
    pub fn into_foreign(self) -> ForeignBuf {
        self.0
    }

    /// Takes the first `at` bytes off into a handle of their own.
    ///
    /// # Panics
    ///
    /// When `at` is more than [`len`](Self::len).
    pub fn split_to(&mut self, at: usize) -> PromisedBuf {
        PromisedBuf(self.0.split_to(at))
    }

    /// Whether every segment begins and ends at a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.0.is_aligned(align)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A part of the promised bytes as a source for the kernel.
    pub fn source(&self, from: usize, len: usize) -> SgList {
        self.0.target(from, len)
    }

    /// Guards and parity of the promised bytes, in place.
    ///
    /// # Errors
    ///
    /// [`Fault`] when the memory vanished.
    pub fn sums(&self, at: u64, pass: Pass, memory: &mut Reservation) -> Result<Sums, Fault> {
        // SAFETY: the segments are foreign ranges kept alive by the handle.
        unsafe { sums_in_place(self.0.for_kernel(), at, self.len(), pass, memory) }
    }

    /// Takes the promised blocks that begin at byte `from` up in parities.
    ///
    /// # Errors
    ///
    /// [`Fault`] when the memory vanished.
    pub fn take_up(&self, from: usize, blocks: usize, parities: Update<'_>) -> Result<(), Fault> {
        let segments: SmallVec<[_; 2]> =
            self.0.range(from, blocks * BLOCK).map(Segment::range).collect();
        // SAFETY: foreign ranges kept alive by the handle.
        unsafe { parities.take_up_all(Cursor::new(&segments)) }
    }
}

/// What blocks of one column are taken up in: P and Q of rows that follow each
/// other.
#[derive(Debug)]
pub struct Update<'a> {
    /// The blocks are XORed into P,
    pub p: Option<&'a mut PoolBuf>,
    /// and, times `coefficient`, into Q,
    pub q: Option<&'a mut PoolBuf>,
    /// which is [`gf::exp`](onepass::gf::exp) of the column,
    pub coefficient: u8,
    /// from this byte of each on.
    pub at: usize,
    /// What P and Q hold of the column now: it goes out of them, in the same
    /// pass. In blocks, as the parities.
    pub old: Option<&'a StableBuf>,
}

impl Update<'_> {
    /// Takes stable blocks up.
    ///
    /// # Panics
    ///
    /// When the data is not whole blocks, or when it does not fit.
    pub fn take_up(self, data: &StableBuf) {
        assert!(data.len().is_multiple_of(BLOCK), "{} bytes are no blocks", data.len());
        let list = data.source();
        let segments = ranges(list.segments());
        // SAFETY: `list` keeps the memory alive, and nobody writes to it.
        let done = unsafe { self.take_up_all(Cursor::new(&segments)) };
        done.expect("stable memory does not fault");
    }

    /// # Safety
    ///
    /// That of [`onepass::Pass::foreign`] about its segments.
    unsafe fn take_up_all(mut self, mut source: Cursor<'_>) -> Result<(), Fault> {
        let mut done = 0;
        while !source.is_empty() {
            let mut len = source.len();
            let at = self.at + done;
            let mut place = |parity: &mut Option<&mut PoolBuf>| match parity {
                Some(parity) => Parity::Xor(parity.place(at, &mut len)),
                None => Parity::None,
            };
            let (p, q) = (place(&mut self.p), place(&mut self.q));
            let parities = Parities { p, q, coefficient: self.coefficient };
            let old = self.old.map(|old| old.place(done, &mut len));
            let pass = onepass::Pass { parities, old, ..GUARDS };
            let mut guards: SmallVec<[u64; 16]> = SmallVec::from_elem(0, len / BLOCK);
            // SAFETY: the caller's promise; the parities are ours alone, hold
            // bytes and have room for `len` of them, and so many has `old`.
            unsafe { pass.foreign(source.split_to(len)?, &mut guards)? };
            done += len;
        }
        Ok(())
    }
}

/// The answer of [`verify_in_place`]: which blocks did not match. It holds no
/// bytes, so it can feed neither a cache nor a repair, and a mismatch says
/// nothing about any member: the owner may have changed its memory.
#[derive(Debug, Default)]
pub struct Verdict {
    mismatches: SmallVec<[u32; 4]>,
}

impl Verdict {
    /// Whether every block matched.
    pub fn is_good(&self) -> bool {
        self.mismatches.is_empty()
    }

    /// Indices of the blocks that did not match, ascending.
    pub fn mismatches(&self) -> &[u32] {
        &self.mismatches
    }
}

/// Compares the blocks of a foreign buffer that begin at byte `from` with the
/// guards that they should have, one each, where they lie.
///
/// # Errors
///
/// [`Fault`] when the memory vanished.
pub fn verify_in_place(buf: &ForeignBuf, from: usize, expected: &[u64]) -> Result<Verdict, Fault> {
    let segments: SmallVec<[_; 2]> =
        buf.range(from, expected.len() * BLOCK).map(Segment::range).collect();
    let mut mismatches = SmallVec::new();
    // SAFETY: the segments are foreign ranges kept alive by `buf`.
    unsafe {
        let mismatch = |i| mismatches.push(i as u32);
        onepass::verify_foreign(Format::NATIVE, &segments, expected, mismatch)?;
    }
    Ok(Verdict { mismatches })
}

/// Writes stable bytes into a foreign buffer from its byte `to` on.
///
/// # Errors
///
/// [`Fault`] when the memory vanished.
///
/// # Panics
///
/// When they do not fit.
pub fn copy_out(from: &StableBuf, buf: &ForeignBuf, to: usize) -> Result<(), Fault> {
    assert!(to + from.len() <= buf.len(), "{to}+{} of {} bytes", from.len(), buf.len());
    let mut segments = buf.range(to, from.len());
    let mut target = Segment { addr: 0, len: 0 };
    for mut piece in from.pieces() {
        while !piece.is_empty() {
            if target.len == 0 {
                target = segments.next().expect("as long as the source");
            }
            let (now, later) = piece.split_at(piece.len().min(target.len));
            // SAFETY: `now` is ours; the target range is a foreign one kept
            // alive by `buf`, and writing to it is what the owner asked for.
            unsafe { onepass::copy_out(now.as_ptr(), target.addr as *mut u8, now.len())? };
            target = Segment { addr: target.addr + now.len(), len: target.len - now.len() };
            piece = later;
        }
    }
    Ok(())
}

/// Writes zeros into a foreign buffer: what an unwritten block reads as.
///
/// # Errors
///
/// [`Fault`] when the memory vanished.
///
/// # Panics
///
/// When the range does not lie in the buffer.
pub fn zero_out(buf: &ForeignBuf, to: usize, len: usize) -> Result<(), Fault> {
    assert!(to + len <= buf.len(), "{to}+{len} of {} bytes", buf.len());
    for segment in buf.range(to, len) {
        // SAFETY: as in `copy_out`.
        unsafe { onepass::zero_out(segment.addr as *mut u8, segment.len)? };
    }
    Ok(())
}

/// The segments as a pass takes them.
fn ranges(segments: &[Segment]) -> SmallVec<[onepass::Segment; 2]> {
    segments.iter().copied().map(Segment::range).collect()
}

/// Loads bytes into `copy` from its byte `to` on.
///
/// # Safety
///
/// That of [`Cursor::load`], but for what it says about its destination.
unsafe fn load_to(mut source: Cursor<'_>, copy: &mut PoolBuf, mut to: usize) -> Result<(), Fault> {
    while !source.is_empty() {
        let mut len = source.len();
        let place = copy.place(to, &mut len);
        // SAFETY: the caller's promise; `place` has room for `len` bytes.
        unsafe { source.split_to(len)?.load(place)? };
        to += len;
    }
    Ok(())
}

/// Guards and parity of `len` bytes where they lie.
///
/// # Safety
///
/// That of [`onepass::Pass::foreign`] about its segments.
unsafe fn sums_in_place(
    segments: &[Segment],
    at: u64,
    len: usize,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<Sums, Fault> {
    let segments = ranges(segments);
    let mut source = Cursor::new(&segments);
    let whole = whole_blocks(at, len);
    let head = (at.next_multiple_of(BLOCK as u64) - at).min(len as u64) as usize;
    // SAFETY: the caller's promise.
    unsafe {
        source.split_to(head)?;
        let blocks = source.split_to(whole.count() * BLOCK)?;
        sum_blocks(at, len, pass, memory, blocks, None)
    }
}

/// Goes over `source`, the whole blocks of `at..at + len`, once: copies them
/// to `copy` from the byte on that is said there, and gathers guards and the
/// parity of full rows.
///
/// # Safety
///
/// That of [`onepass::Pass::foreign`] about its segments.
unsafe fn sum_blocks(
    at: u64,
    len: usize,
    pass: Pass,
    memory: &mut Reservation,
    source: Cursor<'_>,
    copy: Option<(&mut PoolBuf, usize)>,
) -> Result<Sums, Fault> {
    if !pass.guards {
        return Ok(Sums::default());
    }
    let (spans, parity_bytes) =
        pass.rows.map_or((Vec::new(), 0), |rows| rows.parity_spans(at, len));
    let has_q = pass.rows.is_some_and(|rows| rows.has_q());
    let mut parity = |wanted: bool| {
        (wanted && parity_bytes > 0).then(|| ParityBuf::new(memory.take(parity_bytes)))
    };
    let (p, q) = (parity(true), parity(has_q));
    let streams = pass.streams && source.len() >= LARGE;
    let mut sink = Sink { copy, streams, p, q };
    let mut guards: SmallVec<[u64; 4]> = SmallVec::from_elem(0, source.len() / BLOCK);
    let columns = pass.rows.map_or(1, |rows| rows.columns as usize);
    let runs = pass.rows.iter().flat_map(|rows| rows.runs(at, len, &spans));
    let all = Run { count: guards.len(), parity: None };
    let runs = runs.chain(pass.rows.is_none().then_some(all));
    // SAFETY: the caller's promise.
    unsafe { sink.take_up(runs, columns, source, &mut guards)? };
    let first_block = whole_blocks(at, len).start;
    let (parity, parity_guards) = sink.p.map(ParityBuf::freeze).unwrap_or_default();
    let (q, q_guards) = sink.q.map(ParityBuf::freeze).unwrap_or_default();
    Ok(Sums { first_block, guards, parity, parity_guards, q, q_guards, spans })
}

/// Where a pass puts what it makes, beside guards.
///
/// The columns of full rows take turns ([`onepass::row`]): parity stays in the
/// nearest cache from the first of them to the last. Where the border of two
/// columns goes through a word, the cut has loaded it (DOOR-2).
struct Sink<'a> {
    /// The copy, and where in it the first block goes.
    copy: Option<(&'a mut PoolBuf, usize)>,
    streams: bool,
    p: Option<ParityBuf>,
    q: Option<ParityBuf>,
}

/// A parity that a pass makes, and its guards.
struct ParityBuf {
    blocks: PoolBuf,
    guards: Vec<u64>,
}

/// Blocks that follow each other in the data, in one column.
struct Blocks<'a> {
    source: Cursor<'a>,
    /// How many bytes lie before them in the data.
    offset: usize,
    guards: &'a mut [u64],
}

impl Sink<'_> {
    /// Takes up all runs: those of full rows once every column of these is
    /// known, so that row by row is gone over, and the others by themselves.
    ///
    /// # Safety
    ///
    /// That of [`onepass::Pass::foreign`] about its segments.
    unsafe fn take_up(
        &mut self,
        runs: impl Iterator<Item = Run>,
        columns: usize,
        mut source: Cursor<'_>,
        mut guards: &mut [u64],
    ) -> Result<(), Fault> {
        let mut rows: SmallVec<[Blocks<'_>; 8]> = SmallVec::new();
        let mut offset = 0;
        for Run { count, parity } in runs {
            let guards = guards.split_off_mut(..count).expect("one for each block");
            // SAFETY: the caller's promise.
            let source = unsafe { source.split_to(count * BLOCK)? };
            let blocks = Blocks { source, offset, guards };
            offset += count * BLOCK;
            if parity.is_none() {
                // SAFETY: as above.
                unsafe { self.sum_run(blocks)? };
                continue;
            }
            rows.push(blocks);
            if let Some(parity) = parity.filter(|_| rows.len() == columns) {
                // SAFETY: as above.
                unsafe { self.sum_rows(&mut rows, parity)? };
                rows.clear();
            }
        }
        Ok(())
    }

    /// Goes over blocks that have no part in full rows.
    ///
    /// # Safety
    ///
    /// That of [`onepass::Pass::foreign`] about its segments.
    unsafe fn sum_run(&mut self, mut blocks: Blocks<'_>) -> Result<(), Fault> {
        while !blocks.source.is_empty() {
            let mut len = blocks.source.len();
            let copy = self.copy.as_mut();
            let copy = copy.map(|(copy, first)| copy.place(*first + blocks.offset, &mut len));
            let guards = blocks.guards.split_off_mut(..len / BLOCK).expect("one for each block");
            let pass = onepass::Pass { copy, streams: self.streams, ..GUARDS };
            // SAFETY: the caller's promise; the copy is ours alone, and has
            // room for `len` bytes there.
            unsafe { pass.foreign(blocks.source.split_to(len)?, guards)? };
            blocks.offset += len;
        }
        Ok(())
    }

    /// Goes over all columns of full rows, whose parity has its place at a
    /// byte.
    ///
    /// # Safety
    ///
    /// That of [`onepass::Pass::foreign`] about its segments.
    unsafe fn sum_rows(&mut self, columns: &mut [Blocks<'_>], parity: usize) -> Result<(), Fault> {
        let mut done = 0;
        while !columns[0].source.is_empty() {
            // As far as every buffer goes on in one extent.
            let mut len = columns[0].source.len();
            let at = parity + done;
            let mut place = |parity: &mut Option<ParityBuf>| {
                parity.as_mut().map(|parity| (at, parity.blocks.place(at, &mut len)))
            };
            let (to_p, to_q) = (place(&mut self.p), place(&mut self.q));
            let mut copies: SmallVec<[*mut u8; 8]> = SmallVec::new();
            if let Some((copy, first)) = &mut self.copy {
                let places = columns.iter().map(|column| *first + column.offset + done);
                copies.extend(places.map(|at| copy.place(at, &mut len)));
            }
            let mut row: SmallVec<[Column<'_>; 8]> = SmallVec::new();
            for (k, column) in columns.iter_mut().enumerate() {
                let guards =
                    column.guards.split_off_mut(..len / BLOCK).expect("one for each block");
                // SAFETY: the caller's promise.
                let source = unsafe { column.source.split_to(len)? };
                row.push(match copies.get(k) {
                    Some(copy) => Column::foreign(source, *copy, guards).past_caches(self.streams),
                    None => Column::promised(source, guards),
                });
            }
            let p = self.p.as_mut().zip(to_p).map(|(p, place)| p.part(place, len));
            let q = self.q.as_mut().zip(to_q).map(|(q, place)| q.part(place, len));
            // SAFETY: the caller's promise; the buffers are ours alone, and
            // have room for `len` bytes at each place.
            unsafe { onepass::row(Format::NATIVE, &mut row, p, q)? };
            done += len;
        }
        Ok(())
    }
}

impl ParityBuf {
    fn new(blocks: PoolBuf) -> ParityBuf {
        let guards = vec![0; blocks.len() / BLOCK];
        ParityBuf { blocks, guards }
    }

    /// What of it is made at a place: `len` bytes from `at` on, at an address.
    fn part(&mut self, (at, to): (usize, *mut u8), len: usize) -> RowParity<'_> {
        RowParity { to, guards: &mut self.guards[at / BLOCK..(at + len) / BLOCK] }
    }

    fn freeze(self) -> (Option<StableBuf>, Vec<u64>) {
        (Some(self.blocks.freeze()), self.guards)
    }
}
