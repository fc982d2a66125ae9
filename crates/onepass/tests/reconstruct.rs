//! Every pair of missing members comes back; what does not verify is named.

mod support;

use onepass::{Format, Member, Mismatch, Missing, Survivor};
use stableio_onepass as onepass;
use support::*;

/// A full row: members with their bytes and guards.
struct Row {
    format: Format,
    /// Whether anybody kept the guards.
    guarded: bool,
    members: Vec<(Member, Vec<u8>, Vec<u64>)>,
}

impl Row {
    fn new(format: Format, columns: usize, intervals: usize) -> Row {
        let len = intervals * format.interval.bytes();
        let data: Vec<_> = (0..columns).map(|k| noise(k as u64 + 5, len)).collect();
        let [p, q] = naive_parities(&data);
        let data = data.into_iter().enumerate().map(|(k, data)| (Member::Data(k), data));
        let members = data.chain([(Member::P, p), (Member::Q, q)]);
        let members = members.map(|(member, bytes)| {
            let guards = naive_guards(format, &bytes);
            (member, bytes, guards)
        });
        Row { format, guarded: true, members: members.collect() }
    }

    /// Makes the members at these places from those that are not `absent`.
    fn reconstruct(
        &self,
        kernels: &onepass::Kernels,
        wanted: &[usize],
        absent: &[usize],
    ) -> (Result<(), Mismatch>, Vec<Vec<u8>>) {
        let survivors: Vec<_> = self
            .members
            .iter()
            .enumerate()
            .filter(|(i, _)| !wanted.contains(i) && !absent.contains(i))
            .map(|(_, (member, bytes, guards))| {
                let expected = self.guarded.then_some(&guards[..]);
                Survivor { member: *member, bytes, expected }
            })
            .collect();
        let len = self.members[0].1.len();
        let mut made = vec![vec![0x44; len]; wanted.len()];
        let mut missing: Vec<_> = made
            .iter_mut()
            .zip(wanted)
            .map(|(bytes, i)| {
                let (member, _, guards) = &self.members[*i];
                let expected = self.guarded.then_some(&guards[..]);
                Missing { member: *member, bytes, expected }
            })
            .collect();
        let done = onepass::reconstruct_with(kernels, self.format, &survivors, &mut missing);
        (done, made)
    }
}

#[test]
fn every_pair_of_up_to_sixteen_members_comes_back() {
    for format in all_formats() {
        for members in 3..=16 {
            // More than a turn only now and then.
            let intervals = if members % 5 == 0 { 9 } else { 1 };
            let row = Row::new(format, members - 2, intervals);
            for (_, kernels) in tiers() {
                for x in 0..members {
                    for y in 0..members {
                        let wanted = if x == y { vec![x] } else { vec![x, y] };
                        let (done, made) = row.reconstruct(kernels, &wanted, &[]);
                        assert_eq!(done, Ok(()), "{x} and {y} of {members}");
                        for (made, i) in made.iter().zip(&wanted) {
                            assert!(*made == row.members[*i].1, "{x} and {y} of {members}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn one_member_needs_one_parity() {
    let row = Row::new(Format::NATIVE, 3, 2);
    let (p, q) = (3, 4);
    for (_, kernels) in tiers() {
        for (wanted, absent) in [(0, p), (2, p), (0, q), (2, q), (p, q), (q, p)] {
            let (done, made) = row.reconstruct(kernels, &[wanted], &[absent]);
            assert_eq!(done, Ok(()));
            assert!(made[0] == row.members[wanted].1, "{wanted} without {absent}");
        }
    }
}

#[test]
fn what_does_not_verify_is_named() {
    for format in all_formats() {
        for (_, kernels) in tiers() {
            for bad in 0..6 {
                for wanted in [vec![1], vec![1, 2], vec![0, 4], vec![3, 5], vec![4, 5]] {
                    let mut row = Row::new(format, 4, 10);
                    let (member, bytes, guards) = &mut row.members[bad];
                    if wanted.contains(&bad) {
                        // What is made is right; then it is the guard that is not.
                        guards[9] ^= 1;
                    } else {
                        bytes[9 * format.interval.bytes() + 17] ^= 0x40;
                    }
                    let expected = Err(Mismatch { member: *member, interval: 9 });
                    assert_eq!(row.reconstruct(kernels, &wanted, &[]).0, expected);
                }
            }
        }
    }
}

/// Without guards everything is taken as it is, and comes out as it is.
#[test]
fn what_has_no_guards_is_believed() {
    for (_, kernels) in tiers() {
        for wanted in [vec![1], vec![1, 2], vec![0, 4], vec![3, 5], vec![4, 5]] {
            let mut row = Row::new(Format::NATIVE, 4, 3);
            row.guarded = false;
            let (done, made) = row.reconstruct(kernels, &wanted, &[]);
            assert_eq!(done, Ok(()));
            for (made, i) in made.iter().zip(&wanted) {
                assert!(*made == row.members[*i].1, "{wanted:?}");
            }
            row.members[(wanted[0] + 3) % 6].1[17] ^= 0x40;
            assert_eq!(row.reconstruct(kernels, &wanted, &[]).0, Ok(()));
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let row = Row::new(Format::NATIVE, 3, 1);
    let kernels = onepass::Kernels::of(onepass::tier()).unwrap();
    let refused = |wanted: &[usize], absent: &[usize]| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            row.reconstruct(kernels, wanted, absent)
        }))
        .is_err()
    };
    let (p, q) = (3, 4);
    assert!(refused(&[], &[]), "nothing is missing");
    assert!(refused(&[0, 1, 2], &[]), "three are missing");
    assert!(refused(&[0], &[p, q]), "no parity");
    assert!(refused(&[0, 1], &[p]), "one parity for two");
    assert!(refused(&[0, 0], &[]), "one is there twice");
}
