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

use thiserror::Error;

use super::export::{BlockSizes, ExportInfo, Replies, text};

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
        let flags = transmission_flags(info, self.replies(export));
        let mut bytes = Vec::with_capacity(134);
        bytes.extend_from_slice(&info.size().to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        if !self.client.no_zeroes {
            bytes.extend_from_slice(&[0; 124]);
        }
        Ok(Answer { bytes, outcome: self.transmission(export) })
    }

    fn list(&self, data: &[u8], replies: &mut OptionReplies) -> Result<(), Refusal> {
        Fields(data).end()?;
        for export in self.exports {
            let name = export.name().as_bytes();
            let len = (name.len() as u32).to_be_bytes();
            replies.put(REP_SERVER, &[&len, name, export.description().as_bytes()]);
        }
        Ok(())
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`: describes the export and returns it.
    /// The block sizes go out unasked, as sizes other than the default must.
    fn info(&self, data: &[u8], replies: &mut OptionReplies) -> Result<usize, Refusal> {
        let query = InfoQuery::parse(data)?;
        let export = self.find(query.export)?;
        let info = &self.exports[export];
        let flags = transmission_flags(info, self.replies(export));
        let size_and_flags = [&info.size().to_be_bytes()[..], &flags.to_be_bytes()].concat();
        replies.put_info(INFO_EXPORT, &size_and_flags);
        let BlockSizes { minimum, preferred, max_payload } = info.blocks();
        let sizes = [minimum, preferred, max_payload].map(u32::to_be_bytes);
        replies.put_info(INFO_BLOCK_SIZE, sizes.as_flattened());
        if query.wants_name {
            replies.put_info(INFO_NAME, info.name().as_bytes());
        }
        if query.wants_description && !info.description().is_empty() {
            replies.put_info(INFO_DESCRIPTION, info.description().as_bytes());
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
        let wanted = |export: &ExportInfo| name.is_empty() || export.name() == name;
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

/// What the client is told that it may use ("Transmission flags").
///
/// `NBD_FLAG_CAN_MULTI_CONN` is a promise of the server's: connections
/// share one device, and a flush on one covers what was answered on any.
fn transmission_flags(export: &ExportInfo, replies: Replies) -> u16 {
    let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
    if replies != Replies::Simple {
        flags |= SEND_DF;
    }
    if export.read_only() {
        return flags | READ_ONLY;
    }
    if export.fast_zero() {
        flags |= SEND_FAST_ZERO;
    }
    flags | SEND_TRIM | SEND_WRITE_ZEROES
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
mod tests;
