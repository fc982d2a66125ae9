//! Which faults to inject: rules, their choices, what they hit.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

use stableio_mem::BLOCK;

use super::wakers::Wakers;

/// A range that every operation lies in, flushes too.
pub const EVERYWHERE: Range<u64> = 0..u64::MAX;

/// Operations that a rule is about. Writes of zeros are writes; discards and
/// maps go through untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the operations")]
pub struct Ops {
    pub reads: bool,
    pub writes: bool,
    pub flushes: bool,
}

impl Ops {
    /// Reads alone.
    pub const READS: Ops = Ops { reads: true, writes: false, flushes: false };
    /// Writes alone.
    pub const WRITES: Ops = Ops { reads: false, writes: true, flushes: false };
    /// Flushes alone.
    pub const FLUSHES: Ops = Ops { reads: false, writes: false, flushes: true };
    /// All three.
    pub const ANY: Ops = Ops { reads: true, writes: true, flushes: true };

    /// Those that are in both.
    pub fn and(self, other: Ops) -> Ops {
        Ops {
            reads: self.reads && other.reads,
            writes: self.writes && other.writes,
            flushes: self.flushes && other.flushes,
        }
    }

    /// Whether it is none at all.
    pub fn is_empty(self) -> bool {
        self == Ops { reads: false, writes: false, flushes: false }
    }
}

/// How often a rule acts, of the operations that it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Each time.
    Always,
    /// The next so many times.
    Next(u64),
    /// Once in so many times, by chance; 0 is never.
    OneIn(u64),
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno; the device below is not reached.
    Error(i32),
    /// The medium has a bad block: reads that touch it fail with `EIO` until
    /// its bytes are written. With [`How::Always`] the rule's range is bad at
    /// once; else a read finds that one of its blocks, chosen by chance, went
    /// bad.
    Latent,
    /// One bit of the operation's bytes, chosen by chance, turns over on the
    /// medium: before a read, which sees it as everybody after it, or after a
    /// write. Nobody is told.
    Flip,
    /// Less of a write reaches the medium than was asked for: a multiple of
    /// `unit` bytes, chosen by chance, or nothing.
    Torn {
        /// Bytes that are never torn; at least the device's logical block.
        unit: u32,
        /// Whether the write reports success, instead of `EIO`.
        silent: bool,
    },
    /// It reports success and the device below is not reached: a cache that
    /// lies. Of writes and flushes.
    Lost,
    /// It waits until the rule is removed or [`Faults::release`] is called;
    /// then it goes on.
    Stall,
}

impl Fault {
    /// The operations that it can happen to.
    pub fn ops(self) -> Ops {
        match self {
            Fault::Error(_) | Fault::Stall => Ops::ANY,
            Fault::Latent => Ops::READS,
            Fault::Flip => Ops { flushes: false, ..Ops::ANY },
            Fault::Torn { .. } => Ops::WRITES,
            Fault::Lost => Ops { reads: false, ..Ops::ANY },
        }
    }
}

/// What happens to which operations, and how often. In text, see
/// [`FromStr`](std::str::FromStr) below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Of these, those that [`Fault::ops`] has.
    pub ops: Ops,
    /// Operations that touch these bytes of the device; flushes only if it is
    /// [`EVERYWHERE`]. What is damaged lies in it, too.
    pub range: Range<u64>,
    /// How often.
    pub how: How,
    /// What.
    pub fault: Fault,
}

/// A rule that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RuleId(u64);

/// How often each kind of fault hit an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hits {
    /// [`Fault::Error`].
    pub error: u64,
    /// [`Fault::Latent`]: reads that failed at a bad block.
    pub latent: u64,
    /// [`Fault::Flip`]: bits that were to turn over.
    pub flip: u64,
    /// [`Fault::Torn`].
    pub torn: u64,
    /// [`Fault::Lost`].
    pub lost: u64,
    /// [`Fault::Stall`].
    pub stall: u64,
}

/// The faults of one device: rules, which any thread may add and remove while
/// the device works, and the choices among them, which a seed determines.
///
/// An operation meets the rules in the order in which they were added; the
/// first that acts is the only one.
pub struct Faults {
    state: Mutex<State>,
    /// Operations that stall.
    waiting: Wakers,
}

struct State {
    random: Random,
    rules: Vec<Live>,
    next: u64,
    /// Bad bytes, by the rule that made them so.
    bad: Vec<(RuleId, Range<u64>)>,
    hits: Hits,
    stalled: usize,
    /// Counts the calls of `release`.
    released: u64,
}

struct Live {
    id: RuleId,
    rule: Rule,
    hits: u64,
}

/// An operation, as rules see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Read,
    Write,
    Flush,
}

/// What is to happen to an operation; every choice is made.
pub(super) enum Verdict {
    Pass,
    Fail(i32),
    Flip(Flip),
    Torn { land: u64, silent: bool },
    Lost,
    Stall(Stalled),
}

/// A bit of the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flip {
    pub(super) at: u64,
    pub(super) mask: u8,
}

/// An operation that stalls; counted until it is dropped.
pub(super) struct Stalled {
    faults: Arc<Faults>,
    rule: RuleId,
    released: u64,
}

impl Faults {
    /// No faults yet; `seed` determines the choices.
    pub fn new(seed: u64) -> Arc<Self> {
        let state = State {
            random: Random(seed),
            rules: Vec::new(),
            next: 0,
            bad: Vec::new(),
            hits: Hits::default(),
            stalled: 0,
            released: 0,
        };
        Arc::new(Self { state: Mutex::new(state), waiting: Wakers::default() })
    }

    /// Adds a rule, behind all others.
    pub fn add(&self, rule: Rule) -> RuleId {
        let mut state = self.lock();
        let id = RuleId(state.next);
        state.next += 1;
        if rule.fault == Fault::Latent && rule.how == How::Always && !rule.range.is_empty() {
            state.bad.push((id, rule.range.clone()));
        }
        state.rules.push(Live { id, rule, hits: 0 });
        id
    }

    /// Removes a rule with the bad blocks that it made, and lets the
    /// operations go on that it stalled. Says whether it was there.
    pub fn remove(&self, id: RuleId) -> bool {
        let mut state = self.lock();
        let before = state.rules.len();
        state.rules.retain(|live| live.id != id);
        state.bad.retain(|(by, _)| *by != id);
        let found = state.rules.len() < before;
        drop(state);
        self.waiting.wake();
        found
    }

    /// Removes all rules.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.rules.clear();
        state.bad.clear();
        drop(state);
        self.waiting.wake();
    }

    /// Lets every operation go on that stalls now; the rules stay. Call it
    /// before the worker stops: an operation that stalls then never settles.
    pub fn release(&self) {
        self.lock().released += 1;
        self.waiting.wake();
    }

    /// How many operations stall now.
    pub fn stalled(&self) -> usize {
        self.lock().stalled
    }

    /// How often each kind hit, since the beginning.
    pub fn hits(&self) -> Hits {
        self.lock().hits
    }

    /// How often a rule hit; `None` if it was removed.
    pub fn hits_of(&self, id: RuleId) -> Option<u64> {
        self.lock().rules.iter().find(|live| live.id == id).map(|live| live.hits)
    }

    /// The ranges that are bad now, in the order in which they became so.
    pub fn bad(&self) -> Vec<Range<u64>> {
        self.lock().bad.iter().map(|(_, range)| range.clone()).collect()
    }

    /// What happens to an operation on `range`. Of a device that wants more
    /// than bytes (`raw` is false) nothing is flipped or torn.
    pub(super) fn decide(
        self: &Arc<Self>,
        class: Class,
        range: &Range<u64>,
        logical: u32,
        raw: bool,
    ) -> Verdict {
        let mut state = self.lock();
        let state = &mut *state;
        if class == Class::Read
            && let Some((by, _)) = state.bad.iter().find(|(_, bad)| overlap(bad, range).is_some())
        {
            let by = *by;
            state.hits.latent += 1;
            state.rules.iter_mut().filter(|live| live.id == by).for_each(|live| live.hits += 1);
            return Verdict::Fail(libc::EIO);
        }
        for live in &mut state.rules {
            let Some(touched) = live.rule.touches(class, range, raw) else { continue };
            if !live.rule.acts(&mut state.random) {
                continue;
            }
            live.hits += 1;
            let (hits, random) = (&mut state.hits, &mut state.random);
            return match live.rule.fault {
                Fault::Error(errno) => {
                    hits.error += 1;
                    Verdict::Fail(errno)
                }
                Fault::Latent => {
                    hits.latent += 1;
                    let block = random.within(&touched) / BLOCK as u64 * BLOCK as u64;
                    let bad = overlap(&(block..block + BLOCK as u64), &live.rule.range);
                    state.bad.extend(bad.map(|bad| (live.id, bad)));
                    Verdict::Fail(libc::EIO)
                }
                Fault::Flip => {
                    hits.flip += 1;
                    let at = random.within(&touched);
                    Verdict::Flip(Flip { at, mask: 1 << random.below(8) })
                }
                Fault::Torn { unit, silent } => {
                    hits.torn += 1;
                    let unit = u64::from(unit.max(logical));
                    let pieces = (range.end - range.start).div_ceil(unit);
                    Verdict::Torn { land: unit * random.below(pieces), silent }
                }
                Fault::Lost => {
                    hits.lost += 1;
                    Verdict::Lost
                }
                Fault::Stall => {
                    hits.stall += 1;
                    state.stalled += 1;
                    let (faults, released) = (self.clone(), state.released);
                    Verdict::Stall(Stalled { faults, rule: live.id, released })
                }
            };
        }
        Verdict::Pass
    }

    /// The bytes of `range` were written: they are good again.
    pub(super) fn heal(&self, range: &Range<u64>) {
        let mut state = self.lock();
        if range.is_empty() || state.bad.iter().all(|(_, bad)| overlap(bad, range).is_none()) {
            return;
        }
        let bad = std::mem::take(&mut state.bad);
        state.bad = bad
            .into_iter()
            .flat_map(|(by, bad)| {
                let before = bad.start..bad.end.min(range.start);
                let after = bad.start.max(range.end)..bad.end;
                [(by, before), (by, after)]
            })
            .filter(|(_, rest)| !rest.is_empty())
            .collect();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below panics half way through a change.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Rule {
    /// The bytes of an operation that the rule is about, if it is about it.
    fn touches(&self, class: Class, range: &Range<u64>, raw: bool) -> Option<Range<u64>> {
        let ops = self.ops.and(self.fault.ops());
        let damages = matches!(self.fault, Fault::Flip | Fault::Torn { .. });
        let about = match class {
            Class::Read => ops.reads,
            Class::Write => ops.writes,
            Class::Flush => return (ops.flushes && self.range == EVERYWHERE).then_some(0..0),
        };
        // What is bad at once was looked at before.
        let at_once = self.fault == Fault::Latent && self.how == How::Always;
        overlap(range, &self.range).filter(|_| about && !at_once && (raw || !damages))
    }

    /// Whether it is its turn.
    fn acts(&mut self, random: &mut Random) -> bool {
        match &mut self.how {
            How::Always => true,
            How::Next(0) | How::OneIn(0) => false,
            How::Next(left) => {
                *left -= 1;
                true
            }
            How::OneIn(n) => random.below(*n) == 0,
        }
    }
}

impl Stalled {
    /// Waits until the rule is gone or the operations were released.
    pub(super) async fn wait(self) {
        let faults = &self.faults;
        std::future::poll_fn(|cx| {
            let stalls = || {
                let state = faults.lock();
                state.released == self.released && state.rules.iter().any(|l| l.id == self.rule)
            };
            if !stalls() {
                return Poll::Ready(());
            }
            faults.waiting.add(cx.waker());
            // A release between the two looks woke nobody.
            if stalls() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        self.faults.lock().stalled -= 1;
    }
}

/// What lies in both ranges, if there is anything.
pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (!both.is_empty()).then_some(both)
}

/// splitmix64: small, and every seed begins well mixed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn within(&mut self, range: &Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }
}

impl fmt::Display for Hits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { error, latent, flip, torn, lost, stall } = self;
        write!(
            f,
            "error {error}, latent {latent}, flip {flip}, torn {torn}, lost {lost}, stall {stall}"
        )
    }
}
