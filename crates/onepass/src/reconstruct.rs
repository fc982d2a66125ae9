//! Blocks that are missing, made from the others of their rows; all are verified on the way.
//!
//! A turn is a few intervals of every member. What is missing is summed up in its own place, which
//! stays in the fastest cache from the first survivor to the last:
//!
//! | missing    | its place sums up               | and then                                      |
//! |------------|---------------------------------|-----------------------------------------------|
//! | data x, y  | P + data; Q + multiples of data | [`gf::reconstruct_two`]                       |
//! | data x, P  | Q + multiples; data             | x is divided by its coefficient; P + x        |
//! | data x, Q  | P + data; multiples of data     | Q + x times its coefficient                   |
//! | P, Q       | data; multiples of data         |                                               |
//! | data x     | P + data, or Q + multiples      | x is divided by its coefficient, if it is Q's |
//! | P, or Q    | data, or its multiples          |                                               |

use crate::{Format, Kernels, Parities, Parity, Pass, gf};

/// A member of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// A data column, by its number.
    Data(usize),
    /// The first parity.
    P,
    /// The second parity.
    Q,
}

/// A member whose bytes are there.
#[derive(Debug, Clone, Copy)]
pub struct Survivor<'a> {
    /// Which one.
    pub member: Member,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// What its guards must be; `None` where nobody kept them: then its bytes are taken as they are.
    pub expected: Option<&'a [u64]>,
}

/// A member whose bytes are to be made.
#[derive(Debug)]
pub struct Missing<'a> {
    /// Which one.
    pub member: Member,
    /// Where its bytes go.
    pub bytes: &'a mut [u8],
    /// What its guards must be, if anybody kept them.
    pub expected: Option<&'a [u64]>,
}

/// A member whose guard was not as expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Which member: a survivor, or one that was made of good survivors.
    pub member: Member,
    /// Which interval of it.
    pub interval: usize,
}

/// Bytes of each member in a turn.
const TURN: usize = 4096;

/// Makes one or two missing members of full rows from the others, and verifies all of them in the
/// same pass, as far as their guards are known.
///
/// `survivors` are all the other members, in any order; data that is zeros may be left out. If only
/// one member is missing, the parity that is not needed may be left out.
///
/// # Errors
///
/// [`Mismatch`] for the first guard that is not as expected. What was made before is good; the
/// interval it names, and what lies behind it, is unspecified.
///
/// # Panics
///
/// If not one or two members are missing, if one is there twice, if a parity that is needed is not
/// there, if the lengths are not the same number of whole intervals, with a guard for each, or if a
/// column is not below [`gf::MAX_COLUMNS`].
pub fn reconstruct(
    format: Format,
    survivors: &[Survivor<'_>],
    missing: &mut [Missing<'_>],
) -> Result<(), Mismatch> {
    reconstruct_with(Kernels::chosen(), format, survivors, missing)
}

/// [`reconstruct`] on a tier.
///
/// # Errors
///
/// As there.
#[doc(hidden)]
pub fn reconstruct_with(
    kernels: &Kernels,
    format: Format,
    survivors: &[Survivor<'_>],
    missing: &mut [Missing<'_>],
) -> Result<(), Mismatch> {
    let plan = Plan::of(survivors, missing);
    let (interval, len) = (format.interval.bytes(), missing[0].bytes.len());
    assert!(len.is_multiple_of(interval), "whole intervals");
    let fits = |bytes: usize, expected: Option<&[u64]>| {
        bytes == len && expected.is_none_or(|guards| guards.len() * interval == len)
    };
    assert!(survivors.iter().all(|s| fits(s.bytes.len(), s.expected)), "lengths");
    assert!(missing.iter().all(|m| fits(m.bytes.len(), m.expected)), "lengths");
    for at in (0..len).step_by(TURN) {
        let here = at..len.min(at + TURN);
        let guards = here.start / interval..here.end / interval;
        let mut sums = plan.sums(missing, here.start);
        for survivor in survivors {
            let parities = sums.take_up(survivor.member);
            let bytes = &survivor.bytes[here.clone()];
            let expected = survivor.expected.map(|expected| &expected[guards.clone()]);
            // SAFETY: the sums are as long as what is left of the places that nobody else has
            // now; what is to be read of them has been set.
            let bad = unsafe { pass(kernels, format, parities, bytes, expected) };
            mismatch(survivor.member, guards.start, bad)?;
        }
        let mut made = missing.iter_mut().map(|m| &mut m.bytes[here.clone()]);
        let first = made.next().expect("something is missing");
        plan.solve(kernels, &sums, first, made.next());
        for m in &*missing {
            let Some(expected) = m.expected.map(|expected| &expected[guards.clone()]) else {
                continue;
            };
            // SAFETY: only guards are written.
            let bad = unsafe {
                pass(kernels, format, Parities::NONE, &m.bytes[here.clone()], Some(expected))
            };
            mismatch(m.member, guards.start, bad)?;
        }
    }
    Ok(())
}

/// Which of the missing members are summed up as P is, and as Q is.
struct Plan {
    members: [Option<Member>; 2],
    p_sum: Option<usize>,
    q_sum: Option<usize>,
}

impl Plan {
    fn of(survivors: &[Survivor<'_>], missing: &[Missing<'_>]) -> Plan {
        let there = |member| survivors.iter().any(|s| s.member == member);
        let all = || survivors.iter().map(|s| s.member).chain(missing.iter().map(|m| m.member));
        for (index, member) in all().enumerate() {
            assert!(!all().skip(index + 1).any(|other| other == member), "{member:?} twice");
            assert!(!matches!(member, Member::Data(k) if k >= gf::MAX_COLUMNS), "{member:?}");
        }
        assert!(matches!(missing.len(), 1..=2), "{} members are missing", missing.len());
        let members = [0, 1].map(|index| missing.get(index).map(|m| m.member));
        let (p_sum, q_sum) = match (missing[0].member, members[1]) {
            (Member::P, None) => (Some(0), None),
            (Member::Data(_), None) if there(Member::P) => (Some(0), None),
            (Member::Data(_) | Member::Q, None) => (None, Some(0)),
            (Member::Q, Some(_)) | (_, Some(Member::P)) => (Some(1), Some(0)),
            _ => (Some(0), Some(1)),
        };
        let is_data = |index: Option<usize>| {
            index.is_some_and(|index| matches!(members[index], Some(Member::Data(_))))
        };
        assert!(!is_data(p_sum) || there(Member::P), "P is needed");
        assert!(!is_data(q_sum) || there(Member::Q), "Q is needed");
        Plan { members, p_sum, q_sum }
    }

    /// The places of the sums, `at` bytes further on.
    fn sums(&self, missing: &mut [Missing<'_>], at: usize) -> Sums {
        let mut place =
            |index: Option<usize>| index.map(|index| missing[index].bytes[at..].as_mut_ptr());
        Sums { p: Sum::at(place(self.p_sum)), q: Sum::at(place(self.q_sum)) }
    }

    /// Makes the missing bytes of their sums.
    fn solve(&self, kernels: &Kernels, sums: &Sums, first: &mut [u8], second: Option<&mut [u8]>) {
        let mut made = [Some(first), second];
        // A sum that nothing was taken up in.
        for (sum, index) in [(&sums.p, self.p_sum), (&sums.q, self.q_sum)] {
            if let (true, Some(index)) = (sum.is_first, index) {
                made[index].as_mut().expect("it is missing").fill(0);
            }
        }
        let column = |index: Option<usize>| match index.and_then(|index| self.members[index]) {
            Some(Member::Data(column)) => Some(column),
            _ => None,
        };
        let p = self.p_sum.and_then(|index| made[index].take());
        let q = self.q_sum.and_then(|index| made[index].take());
        match (column(self.p_sum), column(self.q_sum), p, q) {
            (Some(x), Some(y), Some(p), Some(q)) => {
                (kernels.mul_xor_into)(q, p, gf::exp(x));
                (kernels.scale)(q, gf::inv(gf::exp(x) ^ gf::exp(y)));
                (kernels.xor_into)(p, q);
            }
            (Some(x), None, Some(p), Some(q)) => (kernels.mul_xor_into)(q, p, gf::exp(x)),
            (None, Some(y), p, Some(q)) => {
                (kernels.scale)(q, gf::inv(gf::exp(y)));
                if let Some(p) = p {
                    (kernels.xor_into)(p, q);
                }
            }
            _ => {}
        }
    }
}

/// Where the sums of a turn are made.
struct Sums {
    p: Sum,
    q: Sum,
}

impl Sums {
    /// What a survivor is to be taken up in.
    fn take_up(&mut self, member: Member) -> Parities {
        match member {
            Member::Data(k) => {
                Parities { p: self.p.next(), q: self.q.next(), coefficient: gf::exp(k) }
            }
            Member::P => Parities::only_p(self.p.next()),
            Member::Q => Parities::only_q(self.q.next(), 1),
        }
    }
}

struct Sum {
    to: Option<*mut u8>,
    is_first: bool,
}

impl Sum {
    fn at(to: Option<*mut u8>) -> Sum {
        Sum { to, is_first: true }
    }

    /// How the next term is taken up.
    fn next(&mut self) -> Parity {
        let Some(to) = self.to else { return Parity::None };
        if std::mem::replace(&mut self.is_first, false) { Parity::Set(to) } else { Parity::Xor(to) }
    }
}

/// Takes bytes up in the sums; says which interval has another guard than expected.
///
/// # Safety
///
/// That of [`Pass::stable`].
unsafe fn pass(
    kernels: &Kernels,
    format: Format,
    parities: Parities,
    bytes: &[u8],
    expected: Option<&[u64]>,
) -> Option<usize> {
    let mut guards = [0; TURN / 512];
    let guards = &mut guards[..format.guards_of(bytes.len())];
    // SAFETY: the caller's promise.
    unsafe { Pass { parities, ..Pass::guards(format) }.stable_with(kernels, bytes, guards) };
    guards.iter().zip(expected?).position(|(guard, expected)| guard != expected)
}

fn mismatch(member: Member, first: usize, bad: Option<usize>) -> Result<(), Mismatch> {
    bad.map_or(Ok(()), |bad| Err(Mismatch { member, interval: first + bad }))
}
