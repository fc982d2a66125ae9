//! Passes, verification and rows, against definitions: every format and tier, any length, any
//! segments, with nothing mapped on either side.

mod support;

use onepass::{Column, Cursor, Fault, Format, Guard, Interval, Parities, Pass, RowParity, Segment};
use proptest::prelude::*;
use stableio_onepass as onepass;
use support::*;

#[test]
fn check_values_of_the_definitions() {
    let values = Guard::ALL.map(|guard| naive_guard(guard, b"123456789"));
    assert_eq!(values, [0xd0db, 0xe306_9283, 0xae8b_1486_0a79_9888]);
}

/// RFC 3720, appendix B.4: CRC-32C of 32 bytes.
#[test]
fn published_vectors() {
    assert_eq!(Guard::Crc32c.of(&[0; 32]), 0x8a91_36aa);
    assert_eq!(Guard::Crc32c.of(&[0xff; 32]), 0x62a8_ab43);
    let up: Vec<u8> = (0..32).collect();
    assert_eq!(Guard::Crc32c.of(&up), 0x46dd_794e);
    assert_eq!(Guard::Crc16T10Dif.of(&[0; 512]), 0);
}

fn times(c: u8, data: &[u8]) -> Vec<u8> {
    data.iter().map(|byte| naive_mul(c, *byte)).collect()
}

/// Lengths of up to three intervals: whole ones, and any.
fn any_len() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![(0_usize..4, Just(0)), (0_usize..3, 0_usize..4096)]
}

fn len_of(format: Format, (whole, more): (usize, usize)) -> usize {
    let interval = format.interval.bytes();
    whole * interval + more % interval
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_pass_is_what_it_is_defined_to_be(
        seed: u64, format in any_format(), len in any_len(), cuts in any_cuts(),
        (p_mode, q_mode, c) in (any_mode(), any_mode(), any::<u8>()),
        (is_copy, streams, is_delta) in any::<(bool, bool, bool)>(),
        places in [any_place(), any_place(), any_place(), any_place()],
    ) {
        let len = len_of(format, len);
        let data = noise(seed, len);
        let [old, old_p, old_q] = [1, 2, 3].map(|i| noise(seed ^ i, len));
        let change = if is_delta { xor(&old, &data) } else { data.clone() };
        let expected = naive_guards(format, &data);
        let expected_p = p_mode.expected(&old_p, &change);
        let expected_q = q_mode.expected(&old_q, &times(c, &change));
        let nothing = vec![0x11; len];
        let expected_copy = if is_copy { &data } else { &nothing };

        for (tier, kernels) in tiers() {
            for is_foreign in [true, false] {
                let what = format!("{tier:?}, foreign: {is_foreign}");
                let mut copy = Fenced::new(places[0], &nothing);
                let mut p = Fenced::new(places[1], &old_p);
                let mut q = Fenced::new(places[2], &old_q);
                let mut was = Fenced::new(places[3], &old);
                let mut guards = vec![0; expected.len()];
                let pass = Pass {
                    format,
                    copy: is_copy.then_some(copy.ptr()),
                    streams,
                    old: is_delta.then_some(was.ptr().cast_const()),
                    parities: Parities { p: p_mode.of(p.ptr()), q: q_mode.of(q.ptr()), coefficient: c },
                };
                let mut pieces = scatter(&data, &cuts);
                if is_foreign {
                    // SAFETY: all are as long as the data, and nobody else has any of them.
                    unsafe { pass.foreign_with(kernels, &segments(&pieces), &mut guards) }
                        .expect("memory is there");
                } else {
                    let mut whole = Fenced::new(places[1], &data);
                    // SAFETY: as above.
                    unsafe { pass.stable_with(kernels, whole.bytes(), &mut guards) };
                }
                assert_eq!(guards, expected, "{what}");
                copy.check(expected_copy, &what);
                p.check(&expected_p, &what);
                q.check(&expected_q, &what);
                was.check(&old, &what);
                for piece in &mut pieces {
                    let content = piece.bytes().to_vec();
                    piece.check(&content, &what);
                }
            }
        }
    }

    #[test]
    fn what_is_verified(
        seed: u64, format in any_format(), len in any_len(), cuts in any_cuts(), bad: u16,
    ) {
        let len = len_of(format, len);
        let data = noise(seed, len);
        let right = naive_guards(format, &data);
        let mut wrong = right.clone();
        let bad = (!wrong.is_empty()).then(|| usize::from(bad) % wrong.len());
        if let Some(bad) = bad {
            wrong[bad] ^= 1;
        }
        for (_, kernels) in tiers() {
            for (expected, answer) in [(&right, None), (&wrong, bad)] {
                let mut found = Vec::new();
                onepass::verify_with(kernels, format, &data, expected, |i| found.push(i));
                prop_assert_eq!(&found[..], answer.as_slice());
                let pieces = scatter(&data, &cuts);
                let (all, mut found) = (segments(&pieces), Vec::new());
                // SAFETY: the pieces are there.
                let done = unsafe {
                    onepass::verify_foreign_with(kernels, format, &all, expected, |i| found.push(i))
                };
                prop_assert_eq!(done, Ok(()));
                prop_assert_eq!(&found[..], answer.as_slice());

                let before = vec![0x22; len];
                let mut pieces = scatter(&before, &cuts);
                // SAFETY: the pieces are as long as the data.
                let found = unsafe {
                    let to = segments(&pieces);
                    onepass::verify_out_with(kernels, format, &data, expected, &to)
                };
                prop_assert_eq!(found, Ok(answer));
                let stored: Vec<u8> = pieces.iter_mut().flat_map(|p| p.bytes().to_vec()).collect();
                let good = answer.map_or(len, |bad| bad * format.interval.bytes());
                // Of a word across the edge nothing is stored.
                let sure = if answer.is_some() { good.saturating_sub(7) } else { good };
                prop_assert!(stored[..sure] == data[..sure], "what is good comes out");
                prop_assert!(stored[good..] == before[good..], "what is bad does not");
            }
        }
    }

    #[test]
    fn rows_are_what_they_are_defined_to_be(
        seed: u64, format in any_format(), columns in 1_usize..15, intervals in 0_usize..12,
        cuts in any_cuts(), (is_p, is_q) in any::<(bool, bool)>(), kind in 0..3,
        places in [any_place(), any_place(), any_place()],
    ) {
        let intervals = if format.interval == Interval::B4096 { intervals % 3 } else { intervals };
        let len = intervals * format.interval.bytes();
        let data: Vec<_> = (0..columns).map(|k| noise(seed ^ k as u64, len)).collect();
        let [expected_p, expected_q] = naive_parities(&data);
        for (tier, kernels) in tiers() {
            let what = format!("{tier:?}");
            let mut p = Fenced::new(places[0], &vec![0x33; len]);
            let mut q = Fenced::new(places[1], &vec![0x33; len]);
            let mut copies: Vec<_> =
                data.iter().map(|_| Fenced::new(places[2], &vec![0x33; len])).collect();
            let pieces: Vec<_> = data.iter().map(|data| scatter(data, &cuts)).collect();
            let lists: Vec<_> = pieces.iter().map(|pieces| segments(pieces)).collect();
            let mut guards = vec![vec![0; intervals]; columns];
            let (mut p_guards, mut q_guards) = (vec![0; intervals], vec![0; intervals]);
            let mut row: Vec<_> = guards.iter_mut().enumerate().map(|(k, guards)| match kind {
                0 => Column::foreign(&lists[k], copies[k].ptr(), guards),
                1 => Column::promised(&lists[k], guards),
                _ => Column::stable(&data[k], guards),
            }).collect();
            let to_p = is_p.then_some(RowParity { to: p.ptr(), guards: &mut p_guards });
            let to_q = is_q.then_some(RowParity { to: q.ptr(), guards: &mut q_guards });
            // SAFETY: all are as long as a column, and nobody else has any of them.
            unsafe { onepass::row_with(kernels, format, &mut row, to_p, to_q) }
                .expect("memory is there");
            for (k, data) in data.iter().enumerate() {
                assert_eq!(guards[k], naive_guards(format, data), "{what}");
                if kind == 0 {
                    copies[k].check(data, &what);
                }
            }
            if is_p {
                p.check(&expected_p, &what);
                // Derived from the guards of the data, and the same as that of P itself.
                assert_eq!(p_guards, naive_guards(format, &expected_p), "{what}");
            }
            if is_q {
                q.check(&expected_q, &what);
                assert_eq!(q_guards, naive_guards(format, &expected_q), "{what}");
            }
        }
    }

    /// Wherever a cursor is cut: through segments, words, and words that were cut before.
    #[test]
    fn parts_of_a_cursor_are_the_whole(
        seed: u64, len in 0_usize..3000, cuts in any_cuts(),
        parts in prop::collection::vec(prop_oneof![0_usize..10, 0_usize..2000], 0..12),
    ) {
        let data = noise(seed, len);
        let pieces = scatter(&data, &cuts);
        let all = segments(&pieces);
        let mut rest = Cursor::new(&all);
        let mut loaded = Vec::new();
        let mut load = |part: Cursor<'_>| {
            let mut bytes = vec![0; part.len()];
            // SAFETY: the pieces are there, and `bytes` has the length of the part.
            unsafe { part.load(bytes.as_mut_ptr()) }.expect("memory is there");
            loaded.extend(bytes);
        };
        for part in parts {
            let before = rest.len();
            // SAFETY: the pieces are there.
            let part = unsafe { rest.split_to(part.min(before)) }.expect("memory is there");
            prop_assert_eq!(part.len() + rest.len(), before);
            load(part);
        }
        load(rest);
        prop_assert!(loaded == data);
    }

    #[test]
    fn parities_without_guards(
        seed: u64, columns in 0_usize..15, len in 0_usize..1000,
        places in [any_place(), any_place()],
    ) {
        let data: Vec<_> = (0..columns).map(|k| noise(seed ^ k as u64, len)).collect();
        let data = if columns == 0 { vec![vec![0; len]] } else { data };
        let [expected_p, expected_q] = naive_parities(&data);
        let columns: Vec<_> = data.iter().take(columns).map(|data| &data[..]).collect();
        for (tier, kernels) in tiers() {
            let mut p = Fenced::new(places[0], &vec![0x33; len]);
            let mut q = Fenced::new(places[1], &vec![0x33; len]);
            (kernels.parities)(&columns, p.bytes(), q.bytes());
            p.check(&expected_p, tier.name());
            q.check(&expected_q, tier.name());
        }
    }

    #[test]
    fn guards_of_sums(seed: u64, format in any_format(), count in 0_usize..17) {
        let len = format.interval.bytes();
        let blocks: Vec<_> = (0..count).map(|i| noise(seed ^ i as u64, len)).collect();
        let sum = blocks.iter().fold(vec![0; len], |sum, block| xor(&sum, block));
        let guards = blocks.iter().map(|block| naive_guard(format.guard, block));
        prop_assert_eq!(format.guard_of_xor(guards), naive_guard(format.guard, &sum));
    }
}

/// Whole intervals at each alignment, so that none is left to chance.
#[test]
fn every_alignment_of_source_and_copy() {
    for format in all_formats() {
        let len = 2 * format.interval.bytes();
        let data = noise(7, len);
        let expected = naive_guards(format, &data);
        for at in 0..64 {
            let src = Fenced::new(Place::At(at), &data);
            for (tier, kernels) in tiers() {
                for to in [0, 1, 8, 32, 63 - at] {
                    for streams in [false, true] {
                        let mut copy = Fenced::new(Place::At(to), &vec![0; len]);
                        let pass = Pass { streams, ..Pass::copy(format, copy.ptr()) };
                        let mut guards = vec![0; expected.len()];
                        // SAFETY: both have this length.
                        unsafe { pass.foreign_with(kernels, &[src.segment()], &mut guards) }
                            .expect("memory is there");
                        assert_eq!(guards, expected, "{tier:?} {format:?} {at} to {to}");
                        copy.check(&data, &format!("{tier:?} {format:?} {at} to {to}"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_segment_that_is_not_there_is_a_fault() {
    let data = noise(1, 3000);
    let (first, last) = (Fenced::new(Place::Last, &data), Fenced::new(Place::First, &data));
    // Behind the end of `first` nothing is mapped.
    let gone = Segment { addr: first.ptr().wrapping_add(3000), len: 4000 };
    let all = [first.segment(), gone, last.segment()];
    let fault = Fault { addr: gone.addr.addr() };
    for format in all_formats() {
        let mut guards = vec![0; format.guards_of(10_000)];
        let mut copy = Fenced::new(Place::Last, &vec![0; 10_000]);
        for (_, kernels) in tiers() {
            for pass in [Pass::guards(format), Pass::copy(format, copy.ptr())] {
                // SAFETY: the copy has this length.
                let done = unsafe { pass.foreign_with(kernels, &all, &mut guards) };
                assert_eq!(done, Err(fault));
            }
            // SAFETY: nothing is written.
            let done = unsafe {
                onepass::verify_foreign_with(
                    kernels,
                    format,
                    &[gone],
                    &guards[..format.guards_of(4000)],
                    |_| {},
                )
            };
            assert_eq!(done, Err(fault));
            let bytes = copy.bytes();
            let right = naive_guards(format, bytes);
            // SAFETY: the segments have the length of the data.
            let done = unsafe { onepass::verify_out_with(kernels, format, bytes, &right, &all) };
            assert_eq!(done, Err(fault));
        }
    }
}

#[test]
fn wrong_numbers_of_guards_are_refused() {
    let refused = |body: fn()| assert!(std::panic::catch_unwind(body).is_err());
    // SAFETY: it does not get to write anything.
    refused(|| unsafe { Pass::guards(Format::NATIVE).stable(&[0; 4097], &mut [0]) });
    // SAFETY: as above.
    refused(|| unsafe {
        let segment = Segment { addr: std::ptr::null(), len: 1 };
        let _ = Pass::guards(Format::NATIVE).foreign(&[segment], &mut []);
    });
    refused(|| {
        onepass::verify(Format::NATIVE, &[0; 8192], &[0], |_| {});
    });
}
