//! The handshake of the NBD protocol: fixed newstyle, without TLS.
//!
//! Sans I/O. The server sends [`GREETING`], reads the client's flags, makes a
//! [`Negotiation`], and then, option by option, reads an [`OptionHeader`] and
//! its data, asks for the [`Answer`] and sends it, until the [`Outcome`] is not
//! [`Outcome::Continue`]. Quoted names are sections of the NBD protocol
//! document, `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>.
//! Integers are big-endian ("Conventions").
//!
//! - NBD-5: an option is answered by exactly one final reply, an acknowledgment
//!   or an error, and nothing after it.
//! - NBD-6: block status is agreed on only for the export for which the last
//!   `NBD_OPT_SET_META_CONTEXT` selected it, and only with structured replies.
//! - NBD-7: no allocation is larger than the data that the client did send.

use std::str;

use thiserror::Error;

/// What the server sends first ("Newstyle negotiation"). The flags are
/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`.
///
/// ```text
///   0            8            16      18
///   ┌────────────┬────────────┬───────┐
///   │ "NBDMAGIC" │ "IHAVEOPT" │ flags │
///   └────────────┴────────────┴───────┘
/// ```
pub const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";

/// Length of the client's flags, its answer to the [`GREETING`].
pub const CLIENT_FLAGS_LEN: usize = 4;

/// Length of an option without its data.
pub const OPTION_HEADER_LEN: usize = 16;

/// The ID under which `base:allocation` is selected and reported. Any value
/// would do; there is one context.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
const ALLOCATION_CONTEXT: &str = "base:allocation";

/// Option data up to here is read, up to the second it is skipped and refused;
/// a client that sends more is hostile.
const MAX_OPTION_DATA: u32 = 64 << 10;
const MAX_SKIPPED_DATA: u32 = 1 << 20;

/// Longest string of the protocol, in bytes ("Conventions").
const MAX_STRING: usize = 4096;

// "Size constraints". The smallest payload limit is what the protocol
// recommends; the greatest is ours, and keeps lengths of replies in 32 bits.
const MAX_MINIMUM_BLOCK: u32 = 1 << 16;
const LEAST_PREFERRED_BLOCK: u32 = 512;
pub(super) const LEAST_MAX_PAYLOAD: u32 = 1 << 20;
pub(super) const GREATEST_MAX_PAYLOAD: u32 = 1 << 30;

const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

// "Client flags".
const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
const CLIENT_NO_ZEROES: u32 = 1 << 1;

// "Transmission flags".
const HAS_FLAGS: u16 = 1 << 0;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
const SEND_DF: u16 = 1 << 7;
const CAN_MULTI_CONN: u16 = 1 << 8;
const SEND_FAST_ZERO: u16 = 1 << 11;

// "Option types". NBD_OPT_STARTTLS (5) is not among them: in "NOTLS mode" it
// is an unknown option.
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;

// "Option reply types".
const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
const REP_ERR_INVALID: u32 = (1 << 31) + 3;
const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

// Information types (`NBD_REP_INFO`).
const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

/// The size constraints of an export, in bytes ("Size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest length and alignment of a request; a power of two, at most 65536.
    pub minimum: u32,
    /// Length and alignment from which requests are efficient; a power of two,
    /// at least 512 and at least `minimum`.
    pub preferred: u32,
    /// Longest data of a read or a write; from 1 MiB (and `preferred`) to 1 GiB.
    pub max_payload: u32,
}

/// An export, as clients are told of it and as their requests are checked against it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    name: String,
    description: String,
    size: u64,
    blocks: BlockSizes,
    read_only: bool,
    fast_zero: bool,
}

/// An export that the protocol can not describe: a mistake of ours, not of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadExport {
    /// A name or description breaks a rule of "Conventions".
    #[error("a name or description has a NUL or more than {MAX_STRING} bytes")]
    Text,
    /// The block sizes break a rule of "Size constraints".
    #[error("{0:?} break the size constraints of NBD")]
    Blocks(BlockSizes),
    /// Clients could not reach the last bytes.
    #[error("the size {size} is no multiple of the minimum block {minimum}")]
    Size {
        /// The size asked for.
        size: u64,
        /// The minimum block that does not divide it.
        minimum: u32,
    },
}

impl ExportInfo {
    /// A writable export of `size` bytes, a multiple of `blocks.minimum`.
    pub fn new(name: &str, size: u64, blocks: BlockSizes) -> Result<Self, BadExport> {
        let BlockSizes { minimum, preferred, max_payload } = blocks;
        let right = minimum.is_power_of_two()
            && minimum <= MAX_MINIMUM_BLOCK
            && preferred.is_power_of_two()
            && preferred >= minimum.max(LEAST_PREFERRED_BLOCK)
            && max_payload >= preferred.max(LEAST_MAX_PAYLOAD)
            && max_payload <= GREATEST_MAX_PAYLOAD;
        if !right {
            return Err(BadExport::Blocks(blocks));
        }
        if !size.is_multiple_of(minimum.into()) {
            return Err(BadExport::Size { size, minimum });
        }
        Ok(Self {
            name: our_text(name)?,
            description: String::new(),
            size,
            blocks,
            read_only: false,
            fast_zero: false,
        })
    }

    /// The same export with a text for humans.
    pub fn with_description(self, description: &str) -> Result<Self, BadExport> {
        Ok(Self { description: our_text(description)?, ..self })
    }

    /// The same export, refusing whatever writes.
    pub fn with_read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The same export, accepting write zeroes requests that are to fail with
    /// `NBD_ENOTSUP` where zeroing is no faster than writing.
    pub fn with_fast_zero(self) -> Self {
        Self { fast_zero: true, ..self }
    }

    /// The name that clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size constraints.
    pub fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether fast zeroing may be asked for.
    pub fn fast_zero(&self) -> bool {
        self.fast_zero
    }

    /// What the client is told that it may use ("Transmission flags").
    ///
    /// `NBD_FLAG_CAN_MULTI_CONN` is a promise of the server's: connections
    /// share one device, and a flush on one covers what was answered on any.
    fn transmission_flags(&self, replies: Replies) -> u16 {
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
        if replies != Replies::Simple {
            flags |= SEND_DF;
        }
        if self.read_only {
            return flags | READ_ONLY;
        }
        if self.fast_zero {
            flags |= SEND_FAST_ZERO;
        }
        flags | SEND_TRIM | SEND_WRITE_ZEROES
    }
}

/// How the server answers requests on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Simple replies only.
    Simple,
    /// Structured replies for whatever carries data, and for errors.
    Structured {
        /// `base:allocation` was selected for this export.
        block_status: bool,
    },
}

/// What the client says of itself ("Client flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    fixed_newstyle: bool,
    no_zeroes: bool,
}

impl ClientFlags {
    /// Parses the client's answer to the [`GREETING`].
    pub fn parse(bytes: [u8; CLIENT_FLAGS_LEN]) -> Result<Self, HangUp> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
            return Err(HangUp::UnknownClientFlags(flags));
        }
        Ok(Self {
            fixed_newstyle: flags & CLIENT_FIXED_NEWSTYLE != 0,
            no_zeroes: flags & CLIENT_NO_ZEROES != 0,
        })
    }
}

/// Why the connection must be closed without an answer ("Termination of the
/// session during option haggling").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HangUp {
    /// The client wants something that was not offered.
    #[error("unknown client flags {0:#010x}")]
    UnknownClientFlags(u32),
    /// The stream is out of step.
    #[error("an option without its magic")]
    OptionMagic,
    /// More option data than is worth skipping.
    #[error("an option with {0} bytes of data")]
    OptionTooLong(u32),
    /// `NBD_OPT_EXPORT_NAME`, which has no error reply, named no export of ours.
    #[error("no such export")]
    NoSuchExport,
    /// Only `NBD_OPT_EXPORT_NAME` is valid in a handshake that is not fixed newstyle.
    #[error("option {0} from a client without fixed newstyle")]
    NotFixedNewstyle(u32),
}

/// The announcement of an option ("Newstyle negotiation").
///
/// ```text
///   0            8        12       16
///   ┌────────────┬────────┬────────┐
///   │ "IHAVEOPT" │ option │ length │  then the data
///   └────────────┴────────┴────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    option: u32,
    len: u32,
}

impl OptionHeader {
    /// Parses what precedes an option's data.
    pub fn parse(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, HangUp> {
        let [magic @ .., o0, o1, o2, o3, l0, l1, l2, l3] = *bytes;
        if magic != OPTION_MAGIC {
            return Err(HangUp::OptionMagic);
        }
        let option = u32::from_be_bytes([o0, o1, o2, o3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        if len > MAX_SKIPPED_DATA {
            return Err(HangUp::OptionTooLong(len));
        }
        Ok(Self { option, len })
    }

    /// What to do with the data that follows.
    pub fn data(self) -> OptionData {
        if self.len <= MAX_OPTION_DATA {
            OptionData::Read(self.len as usize)
        } else {
            OptionData::Skip(self.len as usize)
        }
    }
}

/// The bytes that follow an [`OptionHeader`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionData {
    /// Read so many, then call [`Negotiation::answer`].
    Read(usize),
    /// Read and drop so many, then call [`Negotiation::answer_too_big`].
    Skip(usize),
}

/// What to send for an option, and what then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// To be sent, complete.
    pub bytes: Vec<u8>,
    /// What to do once it is sent.
    pub outcome: Outcome,
}

/// Where an option leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Another option follows.
    Continue,
    /// Requests follow.
    Transmission {
        /// Index of the export among those given to [`Negotiation::new`].
        export: usize,
        /// How its requests are answered.
        replies: Replies,
    },
    /// The client takes its leave: close.
    Abort,
}

/// The state of one connection's handshake.
#[derive(Debug)]
pub struct Negotiation<'a> {
    exports: &'a [ExportInfo],
    client: ClientFlags,
    structured: bool,
    /// NBD-6: the export for which `base:allocation` is selected.
    allocation_of: Option<usize>,
}

impl<'a> Negotiation<'a> {
    /// Begins to negotiate over `exports`. The first is the default, which
    /// clients get by the empty name; of equal names the first is found.
    pub fn new(exports: &'a [ExportInfo], client: ClientFlags) -> Self {
        Self { exports, client, structured: false, allocation_of: None }
    }

    /// Answers an option.
    ///
    /// # Panics
    /// If `data` is not as long as `header` announced.
    pub fn answer(&mut self, header: OptionHeader, data: &[u8]) -> Result<Answer, HangUp> {
        assert_eq!(data.len(), header.len as usize, "option data as announced");
        if header.option == OPT_EXPORT_NAME {
            return self.export_name(data);
        }
        self.needs_fixed_newstyle(header)?;
        let mut replies = OptionReplies::to(header);
        let end = self.dispatch(header.option, data, &mut replies);
        Ok(replies.finish(end))
    }

    /// Answers an option whose data was dropped ([`OptionData::Skip`]).
    pub fn answer_too_big(&mut self, header: OptionHeader) -> Result<Answer, HangUp> {
        if header.option == OPT_EXPORT_NAME {
            return Err(HangUp::NoSuchExport);
        }
        self.needs_fixed_newstyle(header)?;
        if header.option == OPT_SET_META_CONTEXT {
            self.allocation_of = None;
        }
        let too_big = Refusal(REP_ERR_TOO_BIG, "too much option data");
        Ok(OptionReplies::to(header).finish(Err(too_big)))
    }

    fn needs_fixed_newstyle(&self, header: OptionHeader) -> Result<(), HangUp> {
        if self.client.fixed_newstyle {
            Ok(())
        } else {
            Err(HangUp::NotFixedNewstyle(header.option))
        }
    }

    /// Every option but `NBD_OPT_EXPORT_NAME` ("Option types"), up to its final reply.
    fn dispatch(
        &mut self,
        option: u32,
        data: &[u8],
        replies: &mut OptionReplies,
    ) -> Result<Outcome, Refusal> {
        match option {
            OPT_ABORT => return Ok(Outcome::Abort),
            OPT_LIST => self.list(data, replies)?,
            OPT_INFO => drop(self.info(data, replies)?),
            OPT_GO => return self.info(data, replies).map(|export| self.transmission(export)),
            OPT_STRUCTURED_REPLY => {
                Fields(data).end()?;
                self.structured = true;
            }
            OPT_LIST_META_CONTEXT => self.list_meta_context(data, replies)?,
            OPT_SET_META_CONTEXT => self.set_meta_context(data, replies)?,
            _ => return Err(Refusal(REP_ERR_UNSUP, "unknown option")),
        }
        Ok(Outcome::Continue)
    }

    /// `NBD_OPT_EXPORT_NAME`, which has a reply of its own ("Newstyle negotiation").
    ///
    /// ```text
    ///   0      8       10         134
    ///   ┌──────┬───────┬──────────┐
    ///   │ size │ flags │ 124 × 0  │  zeroes only without NBD_FLAG_C_NO_ZEROES
    ///   └──────┴───────┴──────────┘
    /// ```
    fn export_name(&self, name: &[u8]) -> Result<Answer, HangUp> {
        let export =
            text(name).and_then(|name| self.find(name).ok()).ok_or(HangUp::NoSuchExport)?;
        let info = &self.exports[export];
        let flags = info.transmission_flags(self.replies(export));
        let mut bytes = Vec::with_capacity(134);
        bytes.extend_from_slice(&info.size.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        if !self.client.no_zeroes {
            bytes.extend_from_slice(&[0; 124]);
        }
        Ok(Answer { bytes, outcome: self.transmission(export) })
    }

    fn list(&self, data: &[u8], replies: &mut OptionReplies) -> Result<(), Refusal> {
        Fields(data).end()?;
        for export in self.exports {
            let name = export.name.as_bytes();
            let len = (name.len() as u32).to_be_bytes();
            replies.put(REP_SERVER, &[&len, name, export.description.as_bytes()]);
        }
        Ok(())
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`: describes the export and returns it.
    /// The block sizes go out unasked, as sizes other than the default must.
    fn info(&self, data: &[u8], replies: &mut OptionReplies) -> Result<usize, Refusal> {
        let query = InfoQuery::parse(data)?;
        let export = self.find(query.export)?;
        let info = &self.exports[export];
        let flags = info.transmission_flags(self.replies(export));
        let size_and_flags = [&info.size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
        replies.put_info(INFO_EXPORT, &size_and_flags);
        let BlockSizes { minimum, preferred, max_payload } = info.blocks;
        let sizes = [minimum, preferred, max_payload].map(u32::to_be_bytes);
        replies.put_info(INFO_BLOCK_SIZE, sizes.as_flattened());
        if query.wants_name {
            replies.put_info(INFO_NAME, info.name.as_bytes());
        }
        if query.wants_description && !info.description.is_empty() {
            replies.put_info(INFO_DESCRIPTION, info.description.as_bytes());
        }
        Ok(export)
    }

    /// Without queries all contexts are listed; the query `base:` is a wildcard
    /// ("The `base:` metadata namespace").
    fn list_meta_context(&self, data: &[u8], replies: &mut OptionReplies) -> Result<(), Refusal> {
        let (_, names) = self.meta_query(data)?;
        let asked = |name: &&str| ["base:", ALLOCATION_CONTEXT].contains(name);
        if names.is_empty() || names.iter().any(asked) {
            replies.put_context(0);
        }
        Ok(())
    }

    /// NBD-6: replaces what was selected before, even if it fails.
    fn set_meta_context(
        &mut self,
        data: &[u8],
        replies: &mut OptionReplies,
    ) -> Result<(), Refusal> {
        self.allocation_of = None;
        let (export, names) = self.meta_query(data)?;
        if names.contains(&ALLOCATION_CONTEXT) {
            self.allocation_of = Some(export);
            replies.put_context(ALLOCATION_CONTEXT_ID);
        }
        Ok(())
    }

    /// The export and the context names of either option about contexts.
    fn meta_query<'d>(&self, data: &'d [u8]) -> Result<(usize, Vec<&'d str>), Refusal> {
        let query = MetaQuery::parse(data)?;
        if !self.structured {
            return Err(Refusal(REP_ERR_INVALID, "structured replies come first"));
        }
        Ok((self.find(query.export)?, query.names))
    }

    fn find(&self, name: &str) -> Result<usize, Refusal> {
        let wanted = |export: &ExportInfo| name.is_empty() || export.name == name;
        self.exports.iter().position(wanted).ok_or(Refusal(REP_ERR_UNKNOWN, "no such export"))
    }

    fn transmission(&self, export: usize) -> Outcome {
        Outcome::Transmission { export, replies: self.replies(export) }
    }

    /// NBD-6.
    fn replies(&self, export: usize) -> Replies {
        if self.structured {
            Replies::Structured { block_status: self.allocation_of == Some(export) }
        } else {
            Replies::Simple
        }
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
///
/// ```text
///   0        4              4+n     6+n
///   ┌────────┬──────────────┬───────┬──────┬─┄
///   │ length │ name (n)     │ count │ type │    and so on, `count` times 16 bits
///   └────────┴──────────────┴───────┴──────┴─┄
/// ```
struct InfoQuery<'d> {
    export: &'d str,
    wants_name: bool,
    wants_description: bool,
}

impl<'d> InfoQuery<'d> {
    fn parse(data: &'d [u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(data);
        let export = fields.text()?;
        let mut query = Self { export, wants_name: false, wants_description: false };
        for _ in 0..fields.u16()? {
            match fields.u16()? {
                INFO_NAME => query.wants_name = true,
                INFO_DESCRIPTION => query.wants_description = true,
                _ => {} // Sent unasked, or not known: to be ignored.
            }
        }
        fields.end()?;
        Ok(query)
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
///
/// ```text
///   0        4              4+n     8+n
///   ┌────────┬──────────────┬───────┬────────┬──────────────┬─┄
///   │ length │ export (n)   │ count │ length │ context name │    and so on
///   └────────┴──────────────┴───────┴────────┴──────────────┴─┄
/// ```
struct MetaQuery<'d> {
    export: &'d str,
    names: Vec<&'d str>,
}

impl<'d> MetaQuery<'d> {
    fn parse(data: &'d [u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(data);
        let export = fields.text()?;
        // NBD-7: no room is reserved for a count that the data may not honour.
        let mut names = Vec::new();
        for _ in 0..fields.u32()? {
            names.push(fields.text()?);
        }
        fields.end()?;
        Ok(Self { export, names })
    }
}

/// The error reply that an option deserves: its type, and why for a human.
#[derive(Clone, Copy)]
struct Refusal(u32, &'static str);

/// Option data, taken field by field from the front.
struct Fields<'d>(&'d [u8]);

impl<'d> Fields<'d> {
    const SHORT: Refusal = Refusal(REP_ERR_INVALID, "the option's data ends too early");

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Self::SHORT)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u16(&mut self) -> Result<u16, Refusal> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        self.array().map(u32::from_be_bytes)
    }

    /// A string behind its length of 32 bits.
    fn text(&mut self) -> Result<&'d str, Refusal> {
        let len = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Self::SHORT)?;
        self.0 = rest;
        text(bytes).ok_or(Refusal(REP_ERR_INVALID, "not a string of the protocol"))
    }

    fn end(self) -> Result<(), Refusal> {
        match self.0 {
            [] => Ok(()),
            _ => Err(Refusal(REP_ERR_INVALID, "more data than the option takes")),
        }
    }
}

/// A string of the protocol: UTF-8 without NUL, not too long ("Conventions").
fn text(bytes: &[u8]) -> Option<&str> {
    let fits = bytes.len() <= MAX_STRING && !bytes.contains(&0);
    str::from_utf8(bytes).ok().filter(|_| fits)
}

fn our_text(text_of_ours: &str) -> Result<String, BadExport> {
    text(text_of_ours.as_bytes()).map(str::to_owned).ok_or(BadExport::Text)
}

/// Writes the replies to one option ("Fixed newstyle negotiation").
///
/// ```text
///   0        8        12     16       20
///   ┌────────┬────────┬──────┬────────┐
///   │ magic  │ option │ type │ length │  then the data
///   └────────┴────────┴──────┴────────┘
/// ```
struct OptionReplies {
    option: u32,
    bytes: Vec<u8>,
}

impl OptionReplies {
    fn to(header: OptionHeader) -> Self {
        Self { option: header.option, bytes: Vec::new() }
    }

    /// NBD-5: the final reply, an acknowledgment or an error.
    fn finish(mut self, end: Result<Outcome, Refusal>) -> Answer {
        let outcome = match end {
            Ok(outcome) => {
                self.put(REP_ACK, &[]);
                outcome
            }
            Err(Refusal(kind, why)) => {
                self.put(kind, &[why.as_bytes()]);
                Outcome::Continue
            }
        };
        Answer { bytes: self.bytes, outcome }
    }

    /// One reply; `data` is sent piece after piece.
    fn put(&mut self, kind: u32, data: &[&[u8]]) {
        let len: usize = data.iter().map(|piece| piece.len()).sum();
        self.bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend_from_slice(&self.option.to_be_bytes());
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&(len as u32).to_be_bytes());
        self.bytes.extend(data.iter().copied().flatten());
    }

    /// `NBD_REP_INFO`: a type of 16 bits, then what it says.
    fn put_info(&mut self, kind: u16, says: &[u8]) {
        self.put(REP_INFO, &[&kind.to_be_bytes(), says]);
    }

    /// `NBD_REP_META_CONTEXT`: an ID of 32 bits, then the name.
    fn put_context(&mut self, id: u32) {
        self.put(REP_META_CONTEXT, &[&id.to_be_bytes(), ALLOCATION_CONTEXT.as_bytes()]);
    }
}

/// For fuzzers: `data` is the client's side of a handshake, without magics so
/// that most of it is understood: flags (1 byte), then options, each a type
/// (1 byte), a length (2 bytes) and its data. Panics if an answer is malformed.
#[doc(hidden)]
pub fn fuzz_negotiation(data: &[u8]) {
    if let Some(header) = data.first_chunk() {
        let _ = OptionHeader::parse(header);
    }
    let blocks = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 20 };
    let exports = ["a", "b"].map(|name| ExportInfo::new(name, 1 << 20, blocks).expect("valid"));
    let mut stream = Fields(data);
    let Ok([flags]) = stream.array() else { return };
    let Ok(client) = ClientFlags::parse([0, 0, 0, flags]) else { return };
    let mut negotiation = Negotiation::new(&exports, client);
    while let (Ok([option]), Ok(len)) = (stream.array(), stream.u16()) {
        let (data, rest) = stream.0.split_at(stream.0.len().min(len.into()));
        stream.0 = rest;
        let header = OptionHeader { option: option.into(), len: data.len() as u32 };
        let Ok(answer) = negotiation.answer(header, data) else { return };
        if header.option != OPT_EXPORT_NAME {
            assert_final(&answer.bytes);
        }
        if answer.outcome != Outcome::Continue {
            return;
        }
    }
}

/// NBD-5: well-formed replies, of which the last one and no other is final.
fn assert_final(replies: &[u8]) {
    let is_final = |&kind: &u32| kind == REP_ACK || kind >> 31 == 1;
    let kinds = reply_types(replies);
    let (last, before) = kinds.split_last().expect("an option is answered");
    assert!(is_final(last) && !before.iter().any(is_final), "reply types {kinds:x?}");
}

/// The types of the replies in `bytes`, which must be whole.
fn reply_types(mut bytes: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<20>() {
        let [magic @ .., _, _, _, _, k0, k1, k2, k3, l0, l1, l2, l3] = *header;
        assert_eq!(u64::from_be_bytes(magic), OPTION_REPLY_MAGIC);
        kinds.push(u32::from_be_bytes([k0, k1, k2, k3]));
        bytes = &rest[u32::from_be_bytes([l0, l1, l2, l3]) as usize..];
    }
    assert!(bytes.is_empty(), "a reply cut short");
    kinds
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 0x10_0000;
    const BLOCKS: BlockSizes = BlockSizes { minimum: 512, preferred: 4096, max_payload: 1 << 25 };

    fn exports() -> [ExportInfo; 2] {
        let first = ExportInfo::new("first", SIZE, BLOCKS).unwrap();
        let second = ExportInfo::new("second", 0, BLOCKS).unwrap().with_read_only();
        [first.with_description("all of it").unwrap(), second]
    }

    fn client(flags: u8) -> ClientFlags {
        ClientFlags::parse([0, 0, 0, flags]).unwrap()
    }

    fn option(option: u32, len: usize) -> OptionHeader {
        let (kind, len) = (option.to_be_bytes(), (len as u32).to_be_bytes());
        let bytes = [&OPTION_MAGIC[..], &kind, &len].concat();
        OptionHeader::parse(&bytes.try_into().unwrap()).unwrap()
    }

    fn send(negotiation: &mut Negotiation, kind: u32, data: &[u8]) -> (Vec<u32>, Outcome) {
        let answer = negotiation.answer(option(kind, data.len()), data).unwrap();
        assert_final(&answer.bytes);
        (reply_types(&answer.bytes), answer.outcome)
    }

    fn counted(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
    }

    fn info(export: &str, types: &[u16]) -> Vec<u8> {
        let mut data = counted(export);
        data.extend((types.len() as u16).to_be_bytes());
        data.extend(types.iter().flat_map(|kind| kind.to_be_bytes()));
        data
    }

    fn meta(export: &str, names: &[&str]) -> Vec<u8> {
        let mut data = counted(export);
        data.extend((names.len() as u32).to_be_bytes());
        data.extend(names.iter().flat_map(|name| counted(name)));
        data
    }

    /// What is agreed on for the first export if these options come before.
    fn replies_after<const N: usize>(options: [&(u32, Vec<u8>); N]) -> Replies {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        for (kind, data) in options {
            send(&mut negotiation, *kind, data);
        }
        match send(&mut negotiation, OPT_GO, &info("first", &[])).1 {
            Outcome::Transmission { export: 0, replies } => replies,
            other => panic!("not agreed: {other:?}"),
        }
    }

    #[test]
    fn the_greeting_is_that_of_the_protocol() {
        assert_eq!(GREETING[..8], 0x4e42_444d_4147_4943_u64.to_be_bytes());
        assert_eq!(GREETING[8..16], 0x4948_4156_454f_5054_u64.to_be_bytes());
        assert_eq!(GREETING[16..], [0, 3]);
    }

    #[test]
    fn client_flags_that_were_not_offered_end_the_session() {
        assert_eq!(ClientFlags::parse([0, 0, 0, 4]), Err(HangUp::UnknownClientFlags(4)));
        assert_eq!(client(2), ClientFlags { fixed_newstyle: false, no_zeroes: true });
    }

    #[test]
    fn export_name_is_answered_with_size_and_flags() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(0));
        let answer = negotiation.answer(option(OPT_EXPORT_NAME, 0), b"").unwrap();
        // HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN.
        assert_eq!(answer.bytes[..10], [0, 0, 0, 0, 0, 0x10, 0, 0, 0x01, 0x6d]);
        assert_eq!(answer.bytes[10..], [0; 124]);
        let simple = Outcome::Transmission { export: 0, replies: Replies::Simple };
        assert_eq!(answer.outcome, simple);

        let mut negotiation = Negotiation::new(&exports, client(3));
        let answer = negotiation.answer(option(OPT_EXPORT_NAME, 6), b"second").unwrap();
        // HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN.
        assert_eq!(answer.bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0x01, 0x0f]);
    }

    #[test]
    fn an_unknown_export_is_an_error_where_there_is_one() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        let go = send(&mut negotiation, OPT_GO, &info("third", &[]));
        assert_eq!(go, (vec![REP_ERR_UNKNOWN], Outcome::Continue));
        let named = negotiation.answer(option(OPT_EXPORT_NAME, 5), b"third");
        assert_eq!(named, Err(HangUp::NoSuchExport));
    }

    #[test]
    fn info_describes_an_export_byte_by_byte() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        send(&mut negotiation, OPT_STRUCTURED_REPLY, b"");
        let data = info("", &[INFO_DESCRIPTION, 0xffff, INFO_NAME]);
        let answer = negotiation.answer(option(OPT_INFO, data.len()), &data).unwrap();
        let head = |kind: u32, len: u8| {
            let magic = [0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
            [&magic[..], &[0, 0, 0, 6], &kind.to_be_bytes(), &[0, 0, 0, len]].concat()
        };
        let expected = [
            head(3, 12),
            vec![0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x01, 0xed],
            head(3, 14),
            vec![0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0],
            head(3, 7),
            b"\0\x01first".to_vec(),
            head(3, 11),
            b"\0\x02all of it".to_vec(),
            head(1, 0),
        ];
        assert_eq!(answer, Answer { bytes: expected.concat(), outcome: Outcome::Continue });
    }

    #[test]
    fn list_names_all_exports() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        let answer = negotiation.answer(option(OPT_LIST, 0), b"").unwrap();
        assert_eq!(reply_types(&answer.bytes), [REP_SERVER, REP_SERVER, REP_ACK]);
        assert_eq!(answer.bytes[20..38], *b"\0\0\0\x05firstall of it");
    }

    #[test]
    fn block_status_holds_for_the_export_it_was_selected_for() {
        let structured = (OPT_STRUCTURED_REPLY, vec![]);
        let set = |export, name| (OPT_SET_META_CONTEXT, meta(export, &[name]));
        let first = set("first", ALLOCATION_CONTEXT);
        let second = set("second", ALLOCATION_CONTEXT);
        let none = set("first", "base:");
        let malformed = (OPT_SET_META_CONTEXT, b"bad".to_vec());
        let listed = (OPT_LIST_META_CONTEXT, first.1.clone());
        let agreed = |block_status| Replies::Structured { block_status };

        assert_eq!(replies_after([&structured, &first]), agreed(true));
        assert_eq!(replies_after([&structured, &second]), agreed(false));
        assert_eq!(replies_after([&structured, &first, &none]), agreed(false));
        assert_eq!(replies_after([&structured, &first, &malformed]), agreed(false));
        assert_eq!(replies_after([&structured, &listed]), agreed(false));
        assert_eq!(replies_after([&first, &structured]), agreed(false));
        assert_eq!(replies_after([&first]), Replies::Simple);
    }

    #[test]
    fn contexts_are_listed_by_wildcard() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        let mut list =
            |names: &[&str]| send(&mut negotiation, OPT_LIST_META_CONTEXT, &meta("", names)).0;
        assert_eq!(list(&[]), [REP_ERR_INVALID], "without structured replies");
        send(&mut negotiation, OPT_STRUCTURED_REPLY, b"");
        let mut list =
            |names: &[&str]| send(&mut negotiation, OPT_LIST_META_CONTEXT, &meta("", names)).0;
        for names in [&[][..], &["base:"], &["x-y:z", ALLOCATION_CONTEXT]] {
            assert_eq!(list(names), [REP_META_CONTEXT, REP_ACK], "{names:?}");
        }
        assert_eq!(list(&["base:other", "qemu:", "no colon"]), [REP_ACK]);
    }

    #[test]
    fn what_is_malformed_or_unknown_is_refused_and_the_session_goes_on() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        let mut refused = |kind, data: &[u8]| send(&mut negotiation, kind, data).0;
        let starttls = 5;
        assert_eq!(refused(starttls, b""), [REP_ERR_UNSUP]);
        assert_eq!(refused(0xdead_beef, b"data"), [REP_ERR_UNSUP]);
        assert_eq!(refused(OPT_LIST, b"x"), [REP_ERR_INVALID]);
        assert_eq!(refused(OPT_STRUCTURED_REPLY, b"x"), [REP_ERR_INVALID]);
        assert_eq!(refused(OPT_GO, b"\xff\xff\xff\xff"), [REP_ERR_INVALID]);
        assert_eq!(refused(OPT_GO, &info("a\0b", &[])), [REP_ERR_INVALID]);
        assert_eq!(refused(OPT_GO, &[info("first", &[]), vec![0]].concat()), [REP_ERR_INVALID]);
        assert_eq!(send(&mut negotiation, OPT_ABORT, b"bye"), (vec![REP_ACK], Outcome::Abort));
    }

    #[test]
    fn long_data_is_skipped_and_refused() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(3));
        assert_eq!(option(OPT_LIST, 0x1_0000).data(), OptionData::Read(0x1_0000));
        let [named, list, set] =
            [OPT_EXPORT_NAME, OPT_LIST, OPT_SET_META_CONTEXT].map(|kind| option(kind, 0x1_0001));
        assert_eq!(list.data(), OptionData::Skip(0x1_0001));
        assert_eq!(negotiation.answer_too_big(named), Err(HangUp::NoSuchExport));
        send(&mut negotiation, OPT_STRUCTURED_REPLY, b"");
        send(&mut negotiation, OPT_SET_META_CONTEXT, &meta("", &[ALLOCATION_CONTEXT]));
        for (header, selected) in [(list, Some(0)), (set, None)] {
            let answer = negotiation.answer_too_big(header).unwrap();
            assert_eq!(reply_types(&answer.bytes), [REP_ERR_TOO_BIG]);
            assert_eq!(answer.outcome, Outcome::Continue);
            assert_eq!(negotiation.allocation_of, selected);
        }
    }

    #[test]
    fn hostile_headers_end_the_session() {
        let very_long = OptionHeader::parse(b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff");
        assert_eq!(very_long, Err(HangUp::OptionTooLong(u32::MAX)));
        let other_magic = OptionHeader::parse(b"IHAVEOPS\0\0\0\x03\0\0\0\0");
        assert_eq!(other_magic, Err(HangUp::OptionMagic));
    }

    #[test]
    fn only_fixed_newstyle_has_options() {
        let exports = exports();
        let mut negotiation = Negotiation::new(&exports, client(0));
        let list = negotiation.answer(option(OPT_LIST, 0), b"");
        assert_eq!(list, Err(HangUp::NotFixedNewstyle(OPT_LIST)));
    }

    #[test]
    fn exports_that_clients_could_not_use_are_not_made() {
        let with = |size, minimum, preferred, max_payload| {
            ExportInfo::new("", size, BlockSizes { minimum, preferred, max_payload })
        };
        assert!(with(0x1000, 4096, 4096, 1 << 20).is_ok());
        assert!(matches!(with(0x1001, 512, 4096, 1 << 20), Err(BadExport::Size { .. })));
        assert!(matches!(with(0, 0, 4096, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 1 << 17, 1 << 17, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 4096, 512, 1 << 20), Err(BadExport::Blocks(_))));
        assert!(matches!(with(0, 512, 4096, 4096), Err(BadExport::Blocks(_))));
        assert_eq!(ExportInfo::new("a\0b", 0, BLOCKS), Err(BadExport::Text));
        assert_eq!(ExportInfo::new(&"x".repeat(4097), 0, BLOCKS), Err(BadExport::Text));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_answered(data in vec(any::<u8>(), 0..2000)) {
            fuzz_negotiation(&data);
        }

        #[test]
        fn arbitrary_options_are_answered_once(
            options in vec((0_u8..12, vec(0_u8..8, 0..40)), 0..40),
        ) {
            let mut stream = vec![3];
            for (kind, data) in options {
                stream.extend([kind, 0, data.len() as u8]);
                stream.extend(data);
            }
            fuzz_negotiation(&stream);
        }

        #[test]
        fn a_query_is_read_as_it_was_written(
            export in "[a-zé:]{0,20}",
            names in vec("[a-z:]{0,20}", 0..10),
        ) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let data = meta(&export, &names);
            let query = MetaQuery::parse(&data).ok().unwrap();
            prop_assert_eq!((query.export, query.names), (&export[..], names));
            for cut in 0..data.len() {
                prop_assert!(MetaQuery::parse(&data[..cut]).is_err());
            }
        }
    }
}
