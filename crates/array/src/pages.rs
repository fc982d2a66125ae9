//! The tuples of the rows in use, and their way to the members.
//!
//! One copy of each data block's tuple is held here; on disk it lies with the
//! block and, once more, with the row's parity. The guard of P is not stored:
//! it follows from those of the data.
//!
//! PAGE-1: a page written to a member holds only tuples that the log knows
//! (the log comes first), so a page torn out of a crash is never ahead of it.
//!
//! PAGE-2: a page goes to a member as a private copy, so changes meanwhile
//! wait for the next write of the same page, which then carries them all.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use smallvec::SmallVec;
use stableio_block::sync::Condition;
use stableio_block::{Error, Kind};
use stableio_mem::BLOCK;

use crate::engine::Engine;
use crate::geometry::{Geometry, Place, Role};
use crate::health::Health;
use crate::tuple::{Owner, ParsedPage, State, Tuple, encode_page, parse_page};

/// The cached pages of an array.
pub(crate) struct Pages {
    cache: RefCell<Cache>,
    loaded: Condition,
    slots: Rc<Slots>,
}

/// By member, for each tuple of its copy of a page, in order, where it is in
/// the set. The same for every page, as the parity's place repeats with each
/// group of stripes.
type Slots = Vec<Vec<u16>>;

struct Cache {
    sets: HashMap<u64, Option<Rc<PageSet>>>,
    order: VecDeque<u64>,
    capacity: usize,
}

/// The pages of the same number on all members: all tuples of some rows.
pub(crate) struct PageSet {
    page: u64,
    geometry: Geometry,
    /// By record, position in the group, column.
    tuples: RefCell<Vec<Tuple>>,
    /// Tuples whose second copy says something else: both were written well,
    /// so the data decides.
    disputes: RefCell<Vec<(usize, Tuple)>>,
    slots: Rc<Slots>,
    commits: Vec<Commit>,
    sequence: Cell<u64>,
    settled: Condition,
    used: Cell<bool>,
}

/// How far a member's copy of the page is written.
#[derive(Default)]
struct Commit {
    wanted: Cell<u64>,
    done: Cell<u64>,
    busy: Cell<bool>,
}

impl Pages {
    pub(crate) fn new(geometry: &Geometry, bytes: usize) -> Self {
        let set =
            geometry.page_rows() * geometry.members * geometry.columns() * size_of::<Tuple>() + 512;
        let capacity = (bytes / set).max(16);
        let cache = Cache { sets: HashMap::new(), order: VecDeque::new(), capacity };
        let slots = (0..geometry.members).map(|member| slots(geometry, member)).collect();
        Self { cache: RefCell::new(cache), loaded: Condition::default(), slots: Rc::new(slots) }
    }

    /// Whether the page is cached, or on its way.
    pub(crate) fn holds(&self, page: u64) -> bool {
        self.cache.borrow().sets.contains_key(&page)
    }

    fn get(&self, page: u64) -> Option<Rc<PageSet>> {
        let found = self.cache.borrow().sets.get(&page).cloned().flatten();
        if let Some(set) = &found {
            set.used.set(true);
        }
        found
    }
}

impl Cache {
    /// Makes room by dropping what nobody uses and nobody used lately.
    fn shrink(&mut self) {
        let mut tries = 2 * self.order.len();
        while self.sets.len() >= self.capacity && tries > 0 {
            tries -= 1;
            let Some(page) = self.order.pop_front() else { return };
            match self.sets.get(&page) {
                Some(Some(set))
                    if Rc::strong_count(set) == 1 && !set.used.replace(false) && set.is_clean() =>
                {
                    self.sets.remove(&page);
                }
                Some(_) => self.order.push_back(page),
                None => {}
            }
        }
    }
}

impl Engine {
    /// The page with the tuples of a row, read from the members if need be.
    pub(crate) async fn page(&self, stripe: u64, row: u32) -> Result<Rc<PageSet>, Kind> {
        let (page, _) = self.geometry.page_of(stripe, row);
        loop {
            if let Some(set) = self.pages.get(page) {
                return Ok(set);
            }
            let loading = self.pages.cache.borrow().sets.contains_key(&page);
            if !loading {
                break;
            }
            let arrived =
                || (!matches!(self.pages.cache.borrow().sets.get(&page), Some(None))).then_some(());
            self.pages.loaded.wait_for(arrived).await;
        }
        self.pages.cache.borrow_mut().shrink();
        self.pages.cache.borrow_mut().sets.insert(page, None);
        let set = Box::pin(self.load(page)).await;
        let mut cache = self.pages.cache.borrow_mut();
        cache.sets.insert(page, Some(set.clone()));
        cache.order.push_back(page);
        drop(cache);
        self.pages.loaded.notify();
        Ok(set)
    }

    /// Reads a page from every member and puts the tuples together.
    async fn load(&self, page: u64) -> Rc<PageSet> {
        let mut merge = Merge::new(self.geometry, page, self.pages.slots.clone());
        let at = self.geometry.page_at(page);
        let mut memory =
            self.meta.reserve(BLOCK * self.members.len()).await.expect("smaller than the pool");
        let mut reads = Vec::new();
        for member in (0..self.members.len()).filter(|m| self.alive(*m)) {
            let mut buf = memory.take(BLOCK);
            let ticket = self.read_member(member, at, buf.target(0..BLOCK));
            reads.push((member, buf, ticket));
        }
        let mut to_mend = Vec::new();
        for (member, buf, ticket) in reads {
            let parsed = match ticket.await {
                Ok(_) => {
                    let count = self.geometry.page_rows() * self.geometry.record_tuples();
                    parse_page(buf.freeze().contiguous(0, BLOCK), page, self.owner(member), count)
                }
                Err(error) => {
                    Health::add(&self.health.members[member].read_errors);
                    self.health.event(format!("read error: {error}"));
                    ParsedPage::Bad
                }
            };
            if merge.add(member, parsed) == Worth::Nothing {
                Health::add(&self.health.members[member].mismatches);
                to_mend.push(member);
            }
        }
        let (set, blank_but_written) = merge.finish();
        to_mend.extend(blank_but_written);
        let set = Rc::new(set);
        for member in to_mend {
            let name = &self.health.members[member].name;
            self.health.event(format!(
                "{name}: page {page} of tuples was damaged, mended from its copies"
            ));
            Health::add(&self.health.tuples_mended);
            set.commits[member].wanted.set(1);
            if let Err(error) = self.commit(&set, member).await {
                self.drop_member(member, &error);
            }
        }
        set
    }

    fn owner(&self, role: usize) -> Owner {
        Owner { array: self.array, role }
    }

    /// Waits until a member's copy of the page has every change so far; writes
    /// it if nobody else does (PAGE-2).
    pub(crate) async fn commit(&self, set: &PageSet, member: usize) -> Result<(), Error> {
        let commit = &set.commits[member];
        let goal = commit.wanted.get();
        while commit.done.get() < goal && self.alive(member) {
            if commit.busy.get() {
                set.settled.wait_for(|| (!commit.busy.get()).then_some(())).await;
                continue;
            }
            commit.busy.set(true);
            let mut memory = self.meta.reserve(BLOCK).await.expect("smaller than the pool");
            let covers = commit.wanted.get();
            set.sequence.set(set.sequence.get() + 1);
            let mut buf = memory.take(BLOCK);
            set.encode(
                self.owner(member),
                buf.pieces_mut().next().expect("one block is one piece"),
            );
            let written = self
                .write_member(member, self.geometry.page_at(set.page), buf.freeze().source())
                .await;
            commit.busy.set(false);
            if written.is_ok() {
                commit.done.set(covers);
            }
            set.settled.notify();
            written?;
        }
        Ok(())
    }
}

impl PageSet {
    /// The page's number.
    pub(crate) fn number(&self) -> u64 {
        self.page
    }

    fn index(&self, place: Place) -> usize {
        let g = &self.geometry;
        let (page, record) = g.page_of(place.stripe, place.row);
        debug_assert_eq!(page, self.page);
        index(g, record, (place.stripe % g.members as u64) as usize, place.column)
    }

    /// What is known of a block.
    pub(crate) fn tuple(&self, place: Place) -> Tuple {
        self.tuples.borrow()[self.index(place)]
    }

    /// What is known of `count` blocks in rows that follow each other.
    pub(crate) fn tuples(&self, first: Place, count: usize) -> SmallVec<[Tuple; 16]> {
        let (from, step) = (self.index(first), self.geometry.members * self.geometry.columns());
        let tuples = self.tuples.borrow();
        (0..count).map(|i| tuples[from + i * step]).collect()
    }

    /// The other version of a disputed tuple.
    pub(crate) fn disputed(&self, place: Place) -> Option<Tuple> {
        let index = self.index(place);
        self.disputes.borrow().iter().find(|(i, _)| *i == index).map(|(_, t)| *t)
    }

    /// Sets a tuple; the pages of its member and of the parity's want to be
    /// written, which [`Engine::commit`] does. Says which members.
    pub(crate) fn set(&self, place: Place, tuple: Tuple) -> impl Iterator<Item = usize> + use<> {
        let index = self.index(place);
        self.tuples.borrow_mut()[index] = tuple;
        self.disputes.borrow_mut().retain(|(i, _)| *i != index);
        let data = self.geometry.data_member(place.stripe, place.column);
        let holders = [Some(data), self.geometry.parity_member(place.stripe)];
        for member in holders.into_iter().flatten() {
            let wanted = &self.commits[member].wanted;
            wanted.set(wanted.get() + 1);
        }
        holders.into_iter().flatten()
    }

    /// The guard that a row's parity has, by the guards of its data; `None`
    /// where no block of the row is written: then there is no parity.
    pub(crate) fn parity_guard(&self, stripe: u64, row: u32) -> Option<u64> {
        let columns = self.geometry.columns();
        let first = self.index(Place { stripe, row, column: 0 });
        let tuples = &self.tuples.borrow()[first..first + columns];
        let written = tuples.iter().any(|t| t.state == State::Written);
        written.then(|| stableio_onepass::guard_of_xor(tuples.iter().map(Tuple::parity_guard)))
    }

    fn is_clean(&self) -> bool {
        self.commits.iter().all(|c| !c.busy.get() && c.done.get() >= c.wanted.get())
    }

    /// Writes the bytes of a member's copy of the page.
    fn encode(&self, owner: Owner, into: &mut [u8]) {
        let tuples = self.tuples.borrow();
        let own = self.slots[owner.role].iter().map(|slot| &tuples[usize::from(*slot)]);
        encode_page(self.page, self.sequence.get(), owner, own, into);
    }
}

fn index(g: &Geometry, record: usize, position: usize, column: usize) -> usize {
    (record * g.members + position) * g.columns() + column
}

fn slots(g: &Geometry, member: usize) -> Vec<u16> {
    let mut slots = Vec::with_capacity(g.page_rows() * g.record_tuples());
    for record in 0..g.page_rows() {
        for position in 0..g.members {
            let slot = |column| index(g, record, position, column) as u16;
            match g.role(position as u64, member) {
                Role::Data(column) => slots.push(slot(column)),
                Role::Parity => slots.extend((0..g.columns()).map(slot)),
            }
            let end = record * g.record_tuples() + g.record_range(member, position).end;
            assert_eq!(slots.len(), end, "the order is the format's");
        }
    }
    slots
}

/// Puts the tuples of a page together from its copies.
struct Merge {
    geometry: Geometry,
    page: u64,
    slots: Rc<Slots>,
    sequence: u64,
    /// What the copies say, with whether a written page said it and whose.
    found: Vec<Vec<(Tuple, bool, usize)>>,
}

#[derive(PartialEq, Eq)]
enum Worth {
    Something,
    Nothing,
}

impl Merge {
    fn new(geometry: Geometry, page: u64, slots: Rc<Slots>) -> Self {
        let found = vec![Vec::new(); geometry.page_rows() * geometry.members * geometry.columns()];
        Self { geometry, page, slots, sequence: 0, found }
    }

    fn add(&mut self, member: usize, parsed: ParsedPage) -> Worth {
        let slots = self.slots[member].iter().map(|slot| usize::from(*slot));
        match parsed {
            ParsedPage::Bad => return Worth::Nothing,
            ParsedPage::Blank => {
                slots
                    .into_iter()
                    .for_each(|slot| self.found[slot].push((Tuple::UNWRITTEN, false, member)));
            }
            ParsedPage::Good(sequence, tuples) => {
                self.sequence = self.sequence.max(sequence);
                for (slot, tuple) in slots.zip(tuples) {
                    self.found[slot].push((tuple, true, member));
                }
            }
        }
        Worth::Something
    }

    /// The set, and the members whose page is blank although a copy of what
    /// it should hold was written.
    fn finish(self) -> (PageSet, Vec<usize>) {
        let mut tuples = Vec::with_capacity(self.found.len());
        let mut disputes = Vec::new();
        let mut blank_but_written = Vec::new();
        for (slot, found) in self.found.into_iter().enumerate() {
            let tuple = match found[..] {
                [] => Tuple { state: State::Lost, ..Tuple::UNWRITTEN },
                [(one, ..)] => one,
                [(one, ..), (other, ..), ..] if one == other => one,
                [(one, true, _), (_, false, blank), ..]
                | [(_, false, blank), (one, true, _), ..] => {
                    blank_but_written.push(blank);
                    one
                }
                [(one, ..), (other, ..), ..] => {
                    disputes.push((slot, other));
                    one
                }
            };
            tuples.push(tuple);
        }
        blank_but_written.sort_unstable();
        blank_but_written.dedup();
        let commits = (0..self.geometry.members).map(|_| Commit::default()).collect();
        let set = PageSet {
            page: self.page,
            geometry: self.geometry,
            tuples: RefCell::new(tuples),
            disputes: RefCell::new(disputes),
            slots: self.slots,
            commits,
            sequence: Cell::new(self.sequence),
            settled: Condition::default(),
            used: Cell::new(true),
        };
        (set, blank_but_written)
    }
}
