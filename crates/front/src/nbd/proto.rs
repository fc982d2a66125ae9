//! The transmission phase of the NBD protocol: requests parsed, replies encoded.
//!
//! Sans I/O. The server reads [`REQUEST_LEN`] bytes, calls [`Request::parse`],
//! and writes what the encoders return. Quoted names are sections of the NBD
//! protocol document, `doc/proto.md` of
//! <https://github.com/NetworkBlockDevice/nbd>. Integers are big-endian
//! ("Conventions").
//!
//! All that can be wrong with a request is found in [`Request::parse`]; what
//! leaves it is right:
//!
//! - NBD-1: a [`Span`] is not empty, lies inside its export, and begins and
//!   ends on multiples of the export's minimum block.
//! - NBD-2: the data of a [`Command::Read`] or [`Command::Write`] is no longer
//!   than the export's maximum payload.
//! - NBD-3: a command is one that the negotiated transmission flags allow.
//! - NBD-4: a [`Refusal`] says how many bytes of payload follow, so that the
//!   next request is found where it begins.

use std::array;

use thiserror::Error;

use super::export::{BlockSizes, ExportInfo, GREATEST_MAX_PAYLOAD, LEAST_MAX_PAYLOAD, Replies};
use super::negotiate::ALLOCATION_CONTEXT_ID;

/// Length of a request without its payload ("Request message").
pub const REQUEST_LEN: usize = 28;

/// The payload up to which a client is not deemed hostile ("Size constraints");
/// a refused one up to here is skipped, a longer one ends the connection.
const MAX_SKIPPED_PAYLOAD: u32 = 1 << 25;

/// Descriptors of 8 bytes in one block status chunk: half of what the smallest
/// maximum payload holds, and fewer than the 2^20 of the protocol.
const MAX_EXTENTS: usize = LEAST_MAX_PAYLOAD as usize / 16;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

// "Request types". NBD_CMD_CACHE (5) is not offered: it counts as unknown.
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;

// "Command flags".
const CMD_FLAG_FUA: u16 = 1 << 0;
const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
const CMD_FLAG_DF: u16 = 1 << 2;
const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

// "Structured reply flags" and "Structured reply types".
const REPLY_FLAG_DONE: u16 = 1 << 0;
const REPLY_TYPE_NONE: u16 = 0;
const REPLY_TYPE_OFFSET_DATA: u16 = 1;
const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

/// The client's name for a request, returned with every reply to it. Opaque.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

/// What the protocol lets a server fail with ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdErrno {
    /// Operation not permitted: a write to a read-only export.
    Eperm = 1,
    /// Input/output error.
    Eio = 5,
    /// Cannot allocate memory.
    Enomem = 12,
    /// Invalid argument.
    Einval = 22,
    /// No space left on device, or a write beyond its end.
    Enospc = 28,
    /// Value too large: a read longer than the maximum payload.
    Eoverflow = 75,
    /// Operation not supported: zeroing that would not be fast.
    Enotsup = 95,
    /// The server is being shut down.
    Eshutdown = 108,
}

/// A range of bytes of an export that satisfies NBD-1; only the parser makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    offset: u64,
    len: u32,
}

impl Span {
    /// First byte.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes, never zero.
    #[expect(clippy::len_without_is_empty, reason = "a span is never empty")]
    pub fn len(self) -> u32 {
        self.len
    }

    /// The byte after the last.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

/// What a client asks for ("Request types", "Command flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Return data.
    Read {
        /// What to read, at most the maximum payload.
        span: Span,
        /// Answer with one content chunk at most ("don't fragment").
        df: bool,
    },
    /// Store the `span.len()` bytes of payload that follow the request.
    Write {
        /// Where to write, at most the maximum payload.
        span: Span,
        /// Answer only when the data is durable.
        fua: bool,
    },
    /// Finish what is in flight, then close. Has no reply.
    Disconnect,
    /// Make durable whatever write was answered before.
    Flush,
    /// A hint that the data is no longer needed.
    Trim {
        /// What may be dropped; may exceed the maximum payload.
        span: Span,
        /// Answer only when the effect is durable.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// What to zero; may exceed the maximum payload.
        span: Span,
        /// Answer only when the zeroes are durable.
        fua: bool,
        /// Leave the range fully provisioned.
        no_hole: bool,
        /// Fail with [`NbdErrno::Enotsup`] if no faster than a write.
        fast: bool,
    },
    /// Describe the allocation of the range.
    BlockStatus {
        /// What to describe; may exceed the maximum payload.
        span: Span,
        /// Answer with one extent.
        one: bool,
    },
}

/// A request that can be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// To be returned with each reply.
    pub cookie: Cookie,
    /// What to do.
    pub command: Command,
}

/// Why 28 bytes are not a [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadRequest {
    /// The stream is out of step. Hang up.
    #[error("request with the magic {0:#010x}")]
    Magic(u32),
    /// A write so long that skipping its payload would do an attacker's work. Hang up.
    #[error("write with a payload of {0} bytes")]
    Flood(u32),
    /// Answer with an error, and go on.
    #[error("refused: {}", .0.why)]
    Refused(Refusal),
}

/// The error owed to a client, and where its next request begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The request that is refused.
    pub cookie: Cookie,
    /// The error to answer with.
    pub errno: NbdErrno,
    /// The same for a human.
    pub why: &'static str,
    /// Bytes of payload to read and drop before the next request.
    pub skip: u32,
}

impl Request {
    /// Parses a request to `export` on a connection that answers with `replies`.
    ///
    /// A range of length zero, whose effect the protocol leaves open, is
    /// `EINVAL`; FUA is accepted wherever the protocol lets clients set it,
    /// which is everywhere. Never refused: `NBD_CMD_DISC`, which has no reply.
    pub fn parse(
        header: &[u8; REQUEST_LEN],
        export: &ExportInfo,
        replies: Replies,
    ) -> Result<Self, BadRequest> {
        let raw = RawRequest::split(header);
        if raw.magic != REQUEST_MAGIC {
            return Err(BadRequest::Magic(raw.magic));
        }
        let payload = if raw.kind == CMD_WRITE { raw.len } else { 0 };
        if payload > export.blocks().max_payload.max(MAX_SKIPPED_PAYLOAD) {
            return Err(BadRequest::Flood(payload));
        }
        match raw.command(export, replies) {
            Ok(command) => Ok(Self { cookie: raw.cookie, command }),
            Err(Fault(errno, why)) => {
                let refusal = Refusal { cookie: raw.cookie, errno, why, skip: payload };
                Err(BadRequest::Refused(refusal))
            }
        }
    }
}

/// The fields of a request, still without meaning ("Request message").
///
/// ```text
///   0       4       6       8        16        24       28
///   ┌───────┬───────┬───────┬─────────┬─────────┬────────┐
///   │ magic │ flags │ type  │ cookie  │ offset  │ length │  then a write's payload
///   └───────┴───────┴───────┴─────────┴─────────┴────────┘
/// ```
struct RawRequest {
    magic: u32,
    flags: u16,
    kind: u16,
    cookie: Cookie,
    offset: u64,
    len: u32,
}

/// What is wrong with a request: the error to answer, and why for a human.
struct Fault(NbdErrno, &'static str);

impl RawRequest {
    fn split(header: &[u8; REQUEST_LEN]) -> Self {
        Self {
            magic: u32::from_be_bytes(field(header, 0)),
            flags: u16::from_be_bytes(field(header, 4)),
            kind: u16::from_be_bytes(field(header, 6)),
            cookie: Cookie(u64::from_be_bytes(field(header, 8))),
            offset: u64::from_be_bytes(field(header, 16)),
            len: u32::from_be_bytes(field(header, 24)),
        }
    }

    fn command(&self, export: &ExportInfo, replies: Replies) -> Result<Command, Fault> {
        let fua = self.has(CMD_FLAG_FUA);
        match self.kind {
            CMD_READ => {
                // Only READ may overflow, and only where DF exists ("Error values").
                let (flags, too_long) = match replies {
                    Replies::Simple => (0, NbdErrno::Einval),
                    Replies::Structured { .. } => (CMD_FLAG_DF, NbdErrno::Eoverflow),
                };
                self.only_flags(flags)?;
                let span = self.span(export, NbdErrno::Einval)?;
                self.fits_payload(export, too_long)?;
                Ok(Command::Read { span, df: self.has(CMD_FLAG_DF) })
            }
            CMD_WRITE => {
                self.only_flags(0)?;
                let span = self.span_to_change(export, NbdErrno::Enospc)?;
                self.fits_payload(export, NbdErrno::Einval)?;
                Ok(Command::Write { span, fua })
            }
            CMD_DISC => Ok(Command::Disconnect),
            CMD_FLUSH => {
                self.only_flags(0)?;
                if (self.offset, self.len) != (0, 0) {
                    return Err(Fault(NbdErrno::Einval, "flush with a range"));
                }
                Ok(Command::Flush)
            }
            CMD_TRIM => {
                self.only_flags(0)?;
                Ok(Command::Trim { span: self.span_to_change(export, NbdErrno::Einval)?, fua })
            }
            CMD_WRITE_ZEROES => {
                let fast_flag = if export.fast_zero() { CMD_FLAG_FAST_ZERO } else { 0 };
                self.only_flags(CMD_FLAG_NO_HOLE | fast_flag)?;
                Ok(Command::WriteZeroes {
                    span: self.span_to_change(export, NbdErrno::Enospc)?,
                    fua,
                    no_hole: self.has(CMD_FLAG_NO_HOLE),
                    fast: self.has(CMD_FLAG_FAST_ZERO),
                })
            }
            CMD_BLOCK_STATUS => {
                self.only_flags(CMD_FLAG_REQ_ONE)?;
                if replies != (Replies::Structured { block_status: true }) {
                    return Err(Fault(NbdErrno::Einval, "no metadata context was selected"));
                }
                let span = self.span(export, NbdErrno::Einval)?;
                Ok(Command::BlockStatus { span, one: self.has(CMD_FLAG_REQ_ONE) })
            }
            _ => Err(Fault(NbdErrno::Einval, "unknown command")),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// No flags but `allowed` and FUA, which is valid with all commands.
    fn only_flags(&self, allowed: u16) -> Result<(), Fault> {
        match self.flags & !(allowed | CMD_FLAG_FUA) {
            0 => Ok(()),
            _ => Err(Fault(NbdErrno::Einval, "flag not valid with this command")),
        }
    }

    /// NBD-1. What reaches beyond the end fails with `beyond`: which error that
    /// is depends on the command ("Error values").
    fn span(&self, export: &ExportInfo, beyond: NbdErrno) -> Result<Span, Fault> {
        if self.len == 0 {
            return Err(Fault(NbdErrno::Einval, "range of length zero"));
        }
        match self.offset.checked_add(self.len.into()) {
            Some(end) if end <= export.size() => {}
            _ => return Err(Fault(beyond, "range reaches beyond the end of the export")),
        }
        let minimum = export.blocks().minimum;
        if !self.offset.is_multiple_of(minimum.into()) || !self.len.is_multiple_of(minimum) {
            return Err(Fault(NbdErrno::Einval, "range not aligned to the minimum block"));
        }
        Ok(Span { offset: self.offset, len: self.len })
    }

    fn span_to_change(&self, export: &ExportInfo, beyond: NbdErrno) -> Result<Span, Fault> {
        if export.read_only() {
            return Err(Fault(NbdErrno::Eperm, "the export is read-only"));
        }
        self.span(export, beyond)
    }

    /// NBD-2.
    fn fits_payload(&self, export: &ExportInfo, too_long: NbdErrno) -> Result<(), Fault> {
        if self.len > export.blocks().max_payload {
            return Err(Fault(too_long, "longer than the maximum payload"));
        }
        Ok(())
    }
}

/// The `N` bytes of `header` from `at` on.
fn field<const N: usize>(header: &[u8; REQUEST_LEN], at: usize) -> [u8; N] {
    array::from_fn(|i| header[at + i])
}

/// Whether a chunk is the last of its reply (`NBD_REPLY_FLAG_DONE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// More chunks for the same cookie come.
    More,
    /// This chunk ends the reply. A content chunk may only if its data is
    /// already at hand: no error may turn up while it is sent.
    Done,
}

/// A simple reply, before the data if it answers a read ("Simple reply message").
/// On any connection the shortest answer to a success without data.
///
/// ```text
///   0       4       8        16
///   ┌───────┬───────┬─────────┐
///   │ magic │ error │ cookie  │  then a successful read's data
///   └───────┴───────┴─────────┘
/// ```
pub fn simple_reply(cookie: Cookie, error: Option<NbdErrno>) -> [u8; 16] {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[4..8].copy_from_slice(&error.map_or(0, |errno| errno as u32).to_be_bytes());
    reply[8..].copy_from_slice(&cookie.0.to_be_bytes());
    reply
}

/// The end of a structured reply whose other chunks were sent with
/// [`Follow::More`] (`NBD_REPLY_TYPE_NONE`).
pub fn none_chunk(cookie: Cookie) -> [u8; 20] {
    chunk_header(cookie, Follow::Done, REPLY_TYPE_NONE, 0)
}

/// What stands before `len` bytes of data, read from `offset`
/// (`NBD_REPLY_TYPE_OFFSET_DATA`).
///
/// ```text
///   0              20        28
///   ┌──────────────┬─────────┐
///   │ chunk header │ offset  │  then the data
///   └──────────────┴─────────┘
/// ```
///
/// # Panics
/// If `len` is zero or above the largest of maximum payloads.
pub fn offset_data_header(cookie: Cookie, follow: Follow, offset: u64, len: u32) -> [u8; 28] {
    assert!((1..=GREATEST_MAX_PAYLOAD).contains(&len), "data chunk of {len} bytes");
    let mut chunk = [0; 28];
    chunk[..20].copy_from_slice(&chunk_header(cookie, follow, REPLY_TYPE_OFFSET_DATA, 8 + len));
    chunk[20..].copy_from_slice(&offset.to_be_bytes());
    chunk
}

/// Says that `len` bytes from `offset` read as zeroes (`NBD_REPLY_TYPE_OFFSET_HOLE`).
///
/// ```text
///   0              20        28     32
///   ┌──────────────┬─────────┬──────┐
///   │ chunk header │ offset  │ size │
///   └──────────────┴─────────┴──────┘
/// ```
///
/// # Panics
/// If `len` is zero.
pub fn offset_hole(cookie: Cookie, follow: Follow, offset: u64, len: u32) -> [u8; 32] {
    assert_ne!(len, 0, "hole chunk of no bytes");
    let mut chunk = [0; 32];
    chunk[..20].copy_from_slice(&chunk_header(cookie, follow, REPLY_TYPE_OFFSET_HOLE, 12));
    chunk[20..28].copy_from_slice(&offset.to_be_bytes());
    chunk[28..].copy_from_slice(&len.to_be_bytes());
    chunk
}

/// The failure of a request, complete. `message` is for a human; simple replies
/// have no room for it.
pub fn error_reply(replies: Replies, cookie: Cookie, errno: NbdErrno, message: &str) -> Vec<u8> {
    match replies {
        Replies::Simple => simple_reply(cookie, Some(errno)).to_vec(),
        Replies::Structured { .. } => error_chunk(cookie, errno, message),
    }
}

/// Ends a structured reply with an error (`NBD_REPLY_TYPE_ERROR`).
///
/// ```text
///   0              20      24       26
///   ┌──────────────┬───────┬────────┬─────────┐
///   │ chunk header │ error │ length │ message │
///   └──────────────┴───────┴────────┴─────────┘
/// ```
fn error_chunk(cookie: Cookie, errno: NbdErrno, message: &str) -> Vec<u8> {
    // 1024 characters are at most the 4096 bytes of the protocol's strings,
    // which contain no NUL.
    let message: String = message.chars().filter(|&c| c != '\0').take(1024).collect();
    let len = message.len() as u16;
    let mut chunk = Vec::with_capacity(26 + message.len());
    let header = chunk_header(cookie, Follow::Done, REPLY_TYPE_ERROR, 6 + u32::from(len));
    chunk.extend_from_slice(&header);
    chunk.extend_from_slice(&(errno as u32).to_be_bytes());
    chunk.extend_from_slice(&len.to_be_bytes());
    chunk.extend_from_slice(message.as_bytes());
    chunk
}

/// What every chunk begins with ("Structured reply chunk message").
///
/// ```text
///   0       4       6      8        16       20
///   ┌───────┬───────┬──────┬─────────┬────────┐
///   │ magic │ flags │ type │ cookie  │ length │  then the payload
///   └───────┴───────┴──────┴─────────┴────────┘
/// ```
fn chunk_header(cookie: Cookie, follow: Follow, kind: u16, len: u32) -> [u8; 20] {
    let flags = match follow {
        Follow::More => 0,
        Follow::Done => REPLY_FLAG_DONE,
    };
    let mut header = [0; 20];
    header[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.0.to_be_bytes());
    header[16..].copy_from_slice(&len.to_be_bytes());
    header
}

/// The status of a range in the context `base:allocation`, as the bits
/// `NBD_STATE_HOLE` (1) and `NBD_STATE_ZERO` (2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Allocation {
    /// Allocated, or not known.
    Data = 0,
    /// Allocated, and reads as zeroes.
    Zeroes = 2,
    /// Not allocated, and reads as zeroes. (A hole of undefined contents, which
    /// the protocol knows too, does not exist here.)
    Hole = 3,
}

/// The answer to a [`Command::BlockStatus`], gathered extent by extent
/// (`NBD_REPLY_TYPE_BLOCK_STATUS`). Neighbours of equal status become one
/// descriptor, and no descriptor reaches beyond the range asked for.
///
/// ```text
///   0              20           24       28       32
///   ┌──────────────┬────────────┬────────┬────────┬─┄
///   │ chunk header │ context ID │ length │ status │    and so on, (length, status)
///   └──────────────┴────────────┴────────┴────────┴─┄
/// ```
#[derive(Clone, Debug)]
pub struct Extents {
    found: Vec<(u32, Allocation)>,
    /// Bytes of the range not described yet; zero once no more are wanted.
    wanted: u32,
    most: usize,
}

impl Extents {
    /// For a command's `span` and `one`.
    pub fn new(span: Span, one: bool) -> Self {
        Self { found: Vec::new(), wanted: span.len, most: if one { 1 } else { MAX_EXTENTS } }
    }

    /// Describes the next `len` bytes. Returns whether more are wanted.
    pub fn push(&mut self, len: u64, status: Allocation) -> bool {
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(self.wanted);
        if len == 0 {
            return self.wanted > 0;
        }
        self.wanted -= len;
        if let Some((last_len, last)) = self.found.last_mut()
            && *last == status
        {
            *last_len += len;
        } else if self.found.len() < self.most {
            self.found.push((len, status));
        } else {
            self.wanted = 0;
        }
        self.wanted > 0
    }

    /// The complete reply.
    ///
    /// # Panics
    /// If nothing was described: the protocol wants at least one extent.
    pub fn encode(&self, cookie: Cookie) -> Vec<u8> {
        assert!(!self.found.is_empty(), "block status without an extent");
        let len = 4 + 8 * self.found.len();
        let mut chunk = Vec::with_capacity(20 + len);
        let header = chunk_header(cookie, Follow::Done, REPLY_TYPE_BLOCK_STATUS, len as u32);
        chunk.extend_from_slice(&header);
        chunk.extend_from_slice(&ALLOCATION_CONTEXT_ID.to_be_bytes());
        for (len, status) in &self.found {
            chunk.extend_from_slice(&len.to_be_bytes());
            chunk.extend_from_slice(&(*status as u32).to_be_bytes());
        }
        chunk
    }
}

/// For fuzzers: `data` is a row of requests. Panics if one is parsed to
/// something that is not right.
#[doc(hidden)]
pub fn fuzz_request(data: &[u8]) {
    let blocks = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 20 };
    let export = ExportInfo::new("", 1 << 40, blocks).expect("valid");
    for header in data.as_chunks().0 {
        for replies in [Replies::Simple, Replies::Structured { block_status: true }] {
            if let Ok(request) = Request::parse(header, &export, replies) {
                assert_right(request.command, &export);
            }
        }
    }
}

/// NBD-1 and NBD-2.
fn assert_right(command: Command, export: &ExportInfo) {
    let BlockSizes { minimum, max_payload, .. } = export.blocks();
    let (span, max_len) = match command {
        Command::Disconnect | Command::Flush => return,
        Command::Read { span, .. } | Command::Write { span, .. } => (span, max_payload),
        Command::Trim { span, .. }
        | Command::WriteZeroes { span, .. }
        | Command::BlockStatus { span, .. } => (span, u32::MAX),
    };
    assert!((1..=max_len).contains(&span.len()) && span.end() <= export.size(), "{command:?}");
    assert!((span.offset() | span.end()).is_multiple_of(minimum.into()), "{command:?}");
}

#[cfg(test)]
mod tests;
