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
use stableio_onepass as onepass;
use stableio_onepass::{Parities, Parity, gf};

use crate::error::Fault;
use crate::foreign::{ForeignBuf, Segment, Segments, WORD};
use crate::pool::{PoolBuf, Reservation};
use crate::rows::{ParitySpan, RowShape, Run, whole_blocks};
use crate::sg::SgList;
use crate::stable::StableBuf;
use crate::units::BLOCK;

/// What a pass over the data of a write computes along the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    /// A guard of every whole block.
    pub guards: bool,
    /// Parity of every full row; needs `guards`.
    pub rows: Option<RowShape>,
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
    /// Their Q, if the rows have two parities; placed by `spans` too.
    pub q: Option<StableBuf>,
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
            q: self.q.clone(),
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
    let (segments, _, _keep) = buf.into_parts();
    let mut source = Cursor::new(&segments);

    let whole = whole_blocks(at, len);
    let head = if whole.is_empty() { len } else { (whole.start * BLOCK as u64 - at) as usize };
    source.copy_to(&mut copy, lead, head)?;
    let sums = if pass.guards {
        sum_blocks(at, len, pass, memory, |step, guards| {
            let (dst, room) = copy.at(lead + step.offset);
            let blocks = step.blocks.min(room / BLOCK);
            let direct = blocks.min(source.contiguous() / BLOCK);
            if direct > 0 && source.cuts_no_word(direct * BLOCK) {
                let src = source.take(direct * BLOCK);
                // SAFETY: `src` is a foreign range kept alive by `_keep`;
                // `dst` has room for `direct` blocks and is ours alone; the
                // parities have room for `step.blocks` (see `Step`).
                unsafe {
                    onepass::stabilize_blocks(src, dst, &mut guards[..direct], step.parities)?
                };
                return Ok(direct);
            }
            // The block is pieced together from several segments, or its edge
            // cuts a word of the source: each byte is still loaded once; the
            // sums are taken of the copy.
            source.copy_to(&mut copy, lead + step.offset, BLOCK)?;
            // SAFETY: `copy_to` just filled these bytes, contiguous as one
            // block never crosses an extent; nobody else writes to them.
            let block = unsafe { std::slice::from_raw_parts(dst, BLOCK) };
            // SAFETY: the parities have room for a block (see `Step`).
            unsafe { onepass::stable_blocks(block, &mut guards[..1], step.parities) };
            Ok(1)
        })?
    } else {
        source.copy_to(&mut copy, lead + head, whole.count() * BLOCK)?;
        Sums::default()
    };
    let done = lead + len - source.left();
    source.copy_to(&mut copy, done, lead + len - done)?;
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
    if !pass.guards {
        return Sums::default();
    }
    let sums = sum_blocks(at, data.len(), pass, memory, |step, guards| {
        let piece = data.slice(step.offset..step.offset + step.blocks * BLOCK);
        let first = piece.pieces().next().expect("at least a block");
        let blocks = first.len() / BLOCK;
        assert!(blocks > 0, "the data is not congruent to {at}");
        // SAFETY: the parities have room for `step.blocks` (see `Step`).
        unsafe {
            onepass::stable_blocks(&first[..blocks * BLOCK], &mut guards[..blocks], step.parities)
        };
        Ok(blocks)
    });
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
    let mut rest = into;
    for segment in buf.for_kernel() {
        let (now, later) = rest.split_at_mut(segment.len);
        // SAFETY: the segment is a foreign range kept alive by `buf`; `now` is
        // ours alone and as long.
        unsafe { onepass::copy_in(segment.addr as *const u8, now.as_mut_ptr(), segment.len)? };
        rest = later;
    }
    Ok(())
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
        if !pass.guards {
            return Ok(Sums::default());
        }
        let mut source = Cursor::new(self.0.for_kernel());
        source.skip((at.next_multiple_of(BLOCK as u64) - at).min(self.len() as u64) as usize);
        sum_blocks(at, self.len(), pass, memory, |step, guards| {
            source.sample(step.blocks, guards, step.parities)
        })
    }

    /// XORs the promised blocks that begin at byte `from` into whole blocks
    /// of `parity` beginning at byte `to`.
    ///
    /// # Errors
    ///
    /// [`Fault`] when the memory vanished.
    pub fn xor_into(
        &self,
        from: usize,
        blocks: usize,
        parity: &mut PoolBuf,
        to: usize,
    ) -> Result<(), Fault> {
        self.take_up(from, blocks, parity, to, |p| Parities::only_p(Parity::Xor(p)))
    }

    /// As [`xor_into`](Self::xor_into), but what is XORed into `q` is the
    /// bytes times `coefficient` ([`gf::exp`] of their column).
    ///
    /// # Errors
    ///
    /// [`Fault`] when the memory vanished.
    pub fn mul_xor_into(
        &self,
        from: usize,
        blocks: usize,
        coefficient: u8,
        q: &mut PoolBuf,
        to: usize,
    ) -> Result<(), Fault> {
        self.take_up(from, blocks, q, to, |q| Parities::only_q(Parity::Xor(q), coefficient))
    }

    fn take_up(
        &self,
        from: usize,
        blocks: usize,
        parity: &mut PoolBuf,
        to: usize,
        place: impl Fn(*mut u8) -> Parities,
    ) -> Result<(), Fault> {
        let mut source = Cursor::new(self.0.for_kernel());
        source.skip(from);
        let mut done = 0;
        while done < blocks {
            let (dst, room) = parity.at(to + done * BLOCK);
            let count = (blocks - done).min(room / BLOCK);
            let mut guards: SmallVec<[u64; 16]> = SmallVec::from_elem(0, count);
            done += source.sample(count, &mut guards, place(dst))?;
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
    let segments: Segments = buf.range(from, expected.len() * BLOCK).collect();
    let mut source = Cursor::new(&segments);
    let mut found: SmallVec<[u64; 64]> = SmallVec::from_elem(0, expected.len());
    let mut done = 0;
    while done < expected.len() {
        done += source.sample(expected.len() - done, &mut found[done..], Parities::NONE)?;
    }
    let pairs = found.iter().zip(expected).enumerate();
    Ok(Verdict { mismatches: pairs.filter(|(_, (f, e))| f != e).map(|(i, _)| i as u32).collect() })
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

/// Part of a pass: up to `blocks` blocks from byte `offset` of the payload.
/// The parities have room for all of them.
struct Step {
    offset: usize,
    blocks: usize,
    parities: Parities,
}

/// Walks the whole blocks of `at..at + len` in the order of the data, gives
/// each step the place of its parities, and gathers guards. `each` says how
/// many blocks it did.
fn sum_blocks(
    at: u64,
    len: usize,
    pass: Pass,
    memory: &mut Reservation,
    mut each: impl FnMut(Step, &mut [u64]) -> Result<usize, Fault>,
) -> Result<Sums, Fault> {
    let whole = whole_blocks(at, len);
    let (spans, parity_bytes) =
        pass.rows.map_or((Vec::new(), 0), |rows| rows.parity_spans(at, len));
    let has_q = pass.rows.is_some_and(|rows| rows.has_q());
    let mut take = |wanted: bool| (wanted && parity_bytes > 0).then(|| memory.take(parity_bytes));
    let (mut parity, mut q) = (take(true), take(has_q));
    let mut guards: SmallVec<[u64; 4]> = SmallVec::from_elem(0, whole.clone().count());
    let mut result = Ok(());
    let mut one_run = |run: Run| {
        let mut done = 0;
        while done < run.count && result.is_ok() {
            let mut blocks = run.count - done;
            let mut place = |parity: &mut Option<PoolBuf>| match (run.parity, parity) {
                (Some((start, column)), Some(parity)) => {
                    let (ptr, room) = parity.at(start + done * BLOCK);
                    blocks = blocks.min(room / BLOCK);
                    if column == 0 { Parity::Set(ptr) } else { Parity::Xor(ptr) }
                }
                _ => Parity::None,
            };
            let (p, q) = (place(&mut parity), place(&mut q));
            let coefficient = run.parity.map_or(0, |(_, column)| gf::exp(column as usize));
            let parities = Parities { p, q, coefficient };
            let block = run.block + done as u64;
            let offset = (block * BLOCK as u64 - at) as usize;
            let into = &mut guards[(block - whole.start) as usize..][..blocks];
            match each(Step { offset, blocks, parities }, into) {
                Ok(count) => done += count,
                Err(fault) => result = Err(fault),
            }
        }
    };
    match pass.rows {
        Some(rows) => rows.runs(at, len, &spans, one_run),
        None => one_run(Run { block: whole.start, count: whole.clone().count(), parity: None }),
    }
    result?;
    let (parity, q) = (parity.map(PoolBuf::freeze), q.map(PoolBuf::freeze));
    Ok(Sums { first_block: whole.start, guards, parity, q, spans })
}

/// Where the next byte of a foreign buffer is to be loaded. It only moves
/// forward: that is MEM-1 for whoever loads through it.
struct Cursor<'a> {
    segments: &'a [Segment],
    offset: usize,
    /// The word that was loaded last, whole (DOOR-2), though fewer of its
    /// bytes were asked for: its last `ahead` bytes are the next to give.
    /// Only [`copy_to`](Self::copy_to) leaves such bytes, and takes them up.
    word: [u8; WORD],
    ahead: usize,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment]) -> Self {
        Self { segments, offset: 0, word: [0; WORD], ahead: 0 }
    }

    /// Bytes up to the end of the current segment.
    fn contiguous(&self) -> usize {
        self.segments.first().map_or(0, |s| s.len - self.offset)
    }

    fn left(&self) -> usize {
        self.segments.iter().map(|s| s.len).sum::<usize>() - self.offset + self.ahead
    }

    /// Whether the next `len` bytes of the current segment begin and end
    /// between words.
    fn cuts_no_word(&self, len: usize) -> bool {
        self.ahead == 0 && self.to_last_whole_word(len) == len
    }

    /// `len` bytes of the current segment, less the beginning of a word that
    /// would be cut at their end. A word that the segment itself cuts does not
    /// count.
    fn to_last_whole_word(&self, len: usize) -> usize {
        let Some(segment) = self.segments.first() else { return len };
        let end = segment.addr + self.offset + len;
        let word = end - end % WORD;
        let is_cut = word < end && end < segment.addr + segment.len;
        let is_whole = segment.addr <= word && word + WORD <= segment.addr + segment.len;
        if is_cut && is_whole { len - (end - word) } else { len }
    }

    /// The address of the next `len` bytes of the current segment.
    fn take(&mut self, len: usize) -> *const u8 {
        let segment = self.segments[0];
        assert!(self.offset + len <= segment.len, "inside a segment");
        let addr = segment.addr + self.offset;
        self.offset += len;
        if self.offset == segment.len {
            (self.segments, self.offset) = (&self.segments[1..], 0);
        }
        addr as *const u8
    }

    fn skip(&mut self, mut len: usize) {
        while len > 0 {
            let now = len.min(self.contiguous());
            self.take(now);
            len -= now;
        }
    }

    /// Puts the next `len` bytes into `dst` from byte `to` on.
    fn copy_to(&mut self, dst: &mut PoolBuf, mut to: usize, mut len: usize) -> Result<(), Fault> {
        while len > 0 {
            let (ptr, room) = dst.at(to);
            let room = len.min(room);
            let now = if self.ahead > 0 {
                let rest = &self.word[WORD - self.ahead..];
                let now = rest.len().min(room);
                // SAFETY: `ptr` has room for `now` bytes of ours.
                unsafe { ptr.copy_from_nonoverlapping(rest.as_ptr(), now) };
                self.ahead -= now;
                now
            } else {
                let now = self.to_last_whole_word(room.min(self.contiguous()));
                if now == 0 {
                    self.load_word()?;
                    continue;
                }
                // SAFETY: `take` gives a foreign range that the buffer's
                // keep-alive holds; `ptr` has room for `now` bytes of ours.
                unsafe { onepass::copy_in(self.take(now), ptr, now)? };
                now
            };
            to += now;
            len -= now;
        }
        Ok(())
    }

    /// Loads a word of which the next step takes only the first bytes.
    fn load_word(&mut self) -> Result<(), Fault> {
        // SAFETY: a foreign range as in `copy_to`; the target is ours.
        unsafe { onepass::copy_in(self.take(WORD), self.word.as_mut_ptr(), WORD)? };
        self.ahead = WORD;
        Ok(())
    }

    /// Guards and parity of up to `blocks` next blocks without keeping them;
    /// at least one. Says how many.
    ///
    /// It may cut words at the edges of blocks: of what it loads here only a
    /// verdict is made, or sums of bytes that are promised not to change.
    fn sample(
        &mut self,
        blocks: usize,
        guards: &mut [u64],
        parities: Parities,
    ) -> Result<usize, Fault> {
        let direct = blocks.min(self.contiguous() / BLOCK);
        if direct > 0 {
            // SAFETY: a foreign range that the buffer's keep-alive holds; the
            // caller's parities have room for `blocks`.
            unsafe {
                onepass::sample_blocks(self.take(direct * BLOCK), &mut guards[..direct], parities)?
            };
            return Ok(direct);
        }
        let mut block = [0u8; BLOCK];
        let mut done = 0;
        while done < BLOCK {
            let now = (BLOCK - done).min(self.contiguous());
            // SAFETY: a foreign range as above; the target is on our stack.
            unsafe { onepass::copy_in(self.take(now), block.as_mut_ptr().add(done), now)? };
            done += now;
        }
        // SAFETY: the caller's parities have room for a block.
        unsafe { onepass::stable_blocks(&block, &mut guards[..1], parities) };
        Ok(1)
    }
}
