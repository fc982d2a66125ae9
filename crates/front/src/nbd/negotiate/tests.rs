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
