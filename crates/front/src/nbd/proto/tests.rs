use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MIB: u32 = 1 << 20;
const END: u64 = 1 << 40;
const WITH_STATUS: Replies = Replies::Structured { block_status: true };
const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

fn export() -> ExportInfo {
    let blocks = BlockSizes { minimum: 512, preferred: 4096, max_payload: MIB };
    ExportInfo::new("", END, blocks).unwrap()
}

fn header(flags: u16, kind: u16, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let fields: [&[u8]; 6] = [
        &REQUEST_MAGIC.to_be_bytes(),
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &COOKIE.0.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ];
    fields.concat().try_into().unwrap()
}

/// A command as a client would send it.
fn encode(command: Command) -> [u8; REQUEST_LEN] {
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let (kind, flags, Span { offset, len }) = match command {
        Command::Read { span, df } => (CMD_READ, flag(df, CMD_FLAG_DF), span),
        Command::Write { span, fua } => (CMD_WRITE, flag(fua, CMD_FLAG_FUA), span),
        Command::Disconnect => (CMD_DISC, 0, Span { offset: 0, len: 0 }),
        Command::Flush => (CMD_FLUSH, 0, Span { offset: 0, len: 0 }),
        Command::Trim { span, fua } => (CMD_TRIM, flag(fua, CMD_FLAG_FUA), span),
        Command::WriteZeroes { span, fua, no_hole, fast } => {
            let flags = flag(fua, CMD_FLAG_FUA)
                | flag(no_hole, CMD_FLAG_NO_HOLE)
                | flag(fast, CMD_FLAG_FAST_ZERO);
            (CMD_WRITE_ZEROES, flags, span)
        }
        Command::BlockStatus { span, one } => (CMD_BLOCK_STATUS, flag(one, CMD_FLAG_REQ_ONE), span),
    };
    header(flags, kind, offset, len)
}

fn any_command() -> impl Strategy<Value = Command> {
    let span = (0..(END >> 9) - 2048, 1_u32..=2048)
        .prop_map(|(block, blocks)| Span { offset: block << 9, len: blocks << 9 });
    (0_u8..7, span, any::<[bool; 3]>()).prop_map(|(kind, span, [a, b, c])| match kind {
        0 => Command::Read { span, df: a },
        1 => Command::Write { span, fua: a },
        2 => Command::Disconnect,
        3 => Command::Flush,
        4 => Command::Trim { span, fua: a },
        5 => Command::WriteZeroes { span, fua: a, no_hole: b, fast: c },
        _ => Command::BlockStatus { span, one: a },
    })
}

/// Parses, and expects success.
fn accepted(flags: u16, kind: u16, offset: u64, len: u32) -> Command {
    Request::parse(&header(flags, kind, offset, len), &export(), WITH_STATUS).unwrap().command
}

fn refusal(header: &[u8; REQUEST_LEN], export: &ExportInfo, replies: Replies) -> (NbdErrno, u32) {
    match Request::parse(header, export, replies) {
        Err(BadRequest::Refused(refusal)) => {
            assert_eq!(refusal.cookie, COOKIE);
            (refusal.errno, refusal.skip)
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// Parses, and expects the error and the payload to skip.
fn refused(flags: u16, kind: u16, offset: u64, len: u32) -> (NbdErrno, u32) {
    refusal(&header(flags, kind, offset, len), &export(), WITH_STATUS)
}

#[test]
fn a_write_is_parsed_byte_by_byte() {
    let bytes = [
        0x25, 0x60, 0x95, 0x13, 0x00, 0x01, 0x00, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0xff, 0,
        0, 0x10, 0, 0, 0, 0x20, 0,
    ];
    let span = Span { offset: 0xff_0000_1000, len: 0x2000 };
    let write = Request { cookie: COOKIE, command: Command::Write { span, fua: true } };
    assert_eq!(Request::parse(&bytes, &export(), Replies::Simple), Ok(write));
}

#[test]
fn ranges_beyond_the_end_fail_as_their_command_does() {
    use NbdErrno::*;
    for (offset, len) in [(END, 512), (END - 512, 1024), (u64::MAX - 511, 512)] {
        assert_eq!(refused(0, CMD_READ, offset, len), (Einval, 0));
        assert_eq!(refused(0, CMD_WRITE, offset, len), (Enospc, len));
        assert_eq!(refused(0, CMD_TRIM, offset, len), (Einval, 0));
        assert_eq!(refused(0, CMD_WRITE_ZEROES, offset, len), (Enospc, 0));
        assert_eq!(refused(0, CMD_BLOCK_STATUS, offset, len), (Einval, 0));
    }
    accepted(0, CMD_READ, END - 512, 512);
}

#[test]
fn ranges_are_neither_empty_nor_unaligned() {
    for kind in [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
        for (offset, len) in [(0, 0), (0, 511), (1, 512), (256, 256)] {
            let skip = if kind == CMD_WRITE { len } else { 0 };
            assert_eq!(refused(0, kind, offset, len), (NbdErrno::Einval, skip));
        }
    }
}

#[test]
fn only_data_is_bound_by_the_maximum_payload() {
    let too_long = MIB + 512;
    accepted(0, CMD_READ, 0, MIB);
    accepted(0, CMD_WRITE, 0, MIB);
    assert_eq!(refused(0, CMD_READ, 0, too_long), (NbdErrno::Eoverflow, 0));
    assert_eq!(refused(0, CMD_WRITE, 0, too_long), (NbdErrno::Einval, too_long));
    let simple = refusal(&header(0, CMD_READ, 0, too_long), &export(), Replies::Simple);
    assert_eq!(simple, (NbdErrno::Einval, 0));
    for kind in [CMD_TRIM, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
        accepted(0, kind, 0, u32::MAX - 511);
    }
}

#[test]
fn what_can_not_be_skipped_ends_the_session() {
    let parse = |bytes| Request::parse(&bytes, &export(), Replies::Simple);
    assert_eq!(parse([0; REQUEST_LEN]), Err(BadRequest::Magic(0)));
    assert_eq!(refused(0, CMD_WRITE, 0, 1 << 25), (NbdErrno::Einval, 1 << 25));
    let flood = (1 << 25) + 1;
    assert_eq!(parse(header(0, CMD_WRITE, 0, flood)), Err(BadRequest::Flood(flood)));
}

#[test]
fn flags_go_with_their_commands() {
    let fua = CMD_FLAG_FUA;
    let valid = [
        (CMD_READ, CMD_FLAG_DF | fua),
        (CMD_WRITE, fua),
        (CMD_TRIM, fua),
        (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE | fua),
        (CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE | fua),
    ];
    for (kind, valid) in valid {
        for flag in (0..16).map(|bit| 1 << bit) {
            if valid & flag != 0 {
                accepted(flag, kind, 0, 512);
            } else {
                assert_eq!(refused(flag, kind, 0, 512).0, NbdErrno::Einval);
            }
        }
    }
    assert_eq!(accepted(fua, CMD_FLUSH, 0, 0), Command::Flush);
    assert_eq!(refused(0, CMD_FLUSH, 0, 512), (NbdErrno::Einval, 0));
    assert_eq!(accepted(0xffff, CMD_DISC, 1, 1), Command::Disconnect);
    let cache = 5;
    assert_eq!(refused(0, cache, 0, 512), (NbdErrno::Einval, 0));
}

#[test]
fn what_was_not_negotiated_is_refused() {
    use NbdErrno::*;
    let df = header(CMD_FLAG_DF, CMD_READ, 0, 512);
    assert_eq!(refusal(&df, &export(), Replies::Simple), (Einval, 0));
    let status = header(0, CMD_BLOCK_STATUS, 0, 512);
    for replies in [Replies::Simple, Replies::Structured { block_status: false }] {
        assert_eq!(refusal(&status, &export(), replies), (Einval, 0));
    }
    let fast = header(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 0, 512);
    assert_eq!(refusal(&fast, &export(), WITH_STATUS), (Einval, 0));
    let read_only = export().with_read_only();
    for (kind, skip) in [(CMD_WRITE, 512), (CMD_TRIM, 0), (CMD_WRITE_ZEROES, 0)] {
        let change = header(0, kind, 0, 512);
        assert_eq!(refusal(&change, &read_only, WITH_STATUS), (Eperm, skip));
    }
}

#[test]
fn replies_are_those_of_the_protocol() {
    let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
    let chunk = |flags, kind: [u8; 2], len| {
        let magic_and_flags = [0x66, 0x8e, 0x33, 0xef, 0, flags];
        [&magic_and_flags[..], &kind, &cookie, &[0, 0, 0, len]].concat()
    };
    let simple = simple_reply(COOKIE, Some(NbdErrno::Enospc));
    assert_eq!(simple[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28]);
    assert_eq!(simple[8..], cookie);
    assert_eq!(simple_reply(COOKIE, None)[4..8], [0; 4]);
    assert_eq!(none_chunk(COOKIE)[..], chunk(1, [0, 0], 0));

    let data = offset_data_header(COOKIE, Follow::More, 0x200, 16);
    assert_eq!(data[..], [chunk(0, [0, 1], 24), vec![0, 0, 0, 0, 0, 0, 2, 0]].concat());
    let hole = offset_hole(COOKIE, Follow::Done, 0x200, 16);
    let place = vec![0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 16];
    assert_eq!(hole[..], [chunk(1, [0, 2], 12), place].concat());

    let error = error_reply(WITH_STATUS, COOKIE, NbdErrno::Eio, "b\0ad");
    let text = b"\0\0\0\x05\0\x03bad".to_vec();
    assert_eq!(error, [chunk(1, [0x80, 1], 9), text].concat());
    assert_eq!(error_reply(Replies::Simple, COOKIE, NbdErrno::Enospc, "bad"), simple);
    let long = error_reply(WITH_STATUS, COOKIE, NbdErrno::Eio, &"𝄞".repeat(2000));
    assert_eq!(long.len(), 26 + 4096);
}

#[test]
fn extents_are_merged_and_cut_to_the_range() {
    let mut extents = Extents::new(Span { offset: 0, len: 0x1000 }, false);
    assert!(extents.push(0x400, Allocation::Data));
    assert!(extents.push(0, Allocation::Zeroes));
    assert!(extents.push(0x400, Allocation::Data));
    assert!(!extents.push(u64::MAX, Allocation::Hole));
    assert!(!extents.push(0x400, Allocation::Data));
    let payload = [0, 0, 0, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 3];
    assert_eq!(extents.encode(COOKIE)[20..], payload);
    assert_eq!(extents.encode(COOKIE)[16..20], [0, 0, 0, 20]);
}

#[test]
fn one_extent_is_one_extent() {
    let mut extents = Extents::new(Span { offset: 0, len: 0x1000 }, true);
    assert!(extents.push(0x400, Allocation::Hole));
    assert!(extents.push(0x400, Allocation::Hole));
    assert!(!extents.push(0x400, Allocation::Data));
    assert!(!extents.push(0x400, Allocation::Hole));
    assert_eq!(extents.found, [(0x800, Allocation::Hole)]);
}

proptest! {
    #[test]
    fn a_command_is_read_as_it_was_written(command in any_command()) {
        let parsed = Request::parse(&encode(command), &export().with_fast_zero(), WITH_STATUS);
        prop_assert_eq!(parsed, Ok(Request { cookie: COOKIE, command }));
    }

    #[test]
    fn what_is_parsed_is_right(
        flags in any::<u16>().prop_map(|bits| bits & 0x1f),
        kind in 0_u16..9,
        offset in prop_oneof![any::<u64>(), 0..=END],
        len in prop_oneof![any::<u32>(), 0..4 * MIB],
        aligned in any::<bool>(),
    ) {
        let mask = if aligned { 511 } else { 0 };
        fuzz_request(&header(flags, kind, offset & !mask, len & !(mask as u32)));
    }

    #[test]
    fn arbitrary_bytes_are_parsed_or_refused(data in vec(any::<u8>(), 0..200)) {
        fuzz_request(&data);
    }
}
