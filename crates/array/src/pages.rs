//! The tuples of the rows in use, and their way to the members.
//!
//! One copy of each tuple is held here; on disk it lies with the block and,
//! once more, with each parity of the row. The guard of P is not stored: it
//! follows from those of the data. That of Q is, as a column behind the data.
//!
//! PAGE-1: a page written to a member holds only tuples that the log knows
//! (the log comes first), so a page torn out of a crash is never ahead of it.
//!
//! PAGE-2: a page goes to a member as a private copy, so changes meanwhile
//! wait for the next write of the same page, which then carries them all.
//!
//! PAGE-3: tuples stay here until room is wanted, in this cache or in the
//! log; a set that was not written to all its members is never forgotten.
//!
//! PAGE-4: of two copies of a tuple the one with the higher sequence counts,
//! whatever the data says: a member that lost a write has lost its tuple too.
//!
//! PAGE-5: a read is content with the copy beside its block, where that is
//! whole and says that there is data, which must fit. All copies are compared
//! before a tuple is changed, a block mended, or anything else believed.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::rc::Rc;

use smallvec::SmallVec;
use stableio_block::sync::Condition;
use stableio_block::{Kind, sync::join};
use stableio_mem::BLOCK;

use crate::engine::Engine;
use crate::geometry::{Geometry, Place, Role};
use crate::health::{Health, Often};
use crate::tuple::{Owner, Sector, State, Tuple, data_tuple, encode_page, parse_page};

/// Sets of pages that are written to make room in the cache.
const WRITTEN_AT_ONCE: usize = 32;
/// Pages that are written as one, and such runs under way at once.
pub(crate) const RUN: usize = 32;
const RUNS_AT_ONCE: usize = 4;

/// The cached pages of an array.
pub(crate) struct Pages {
    cache: RefCell<Cache>,
    loaded: Condition,
    slots: Rc<Slots>,
    /// Whether guards are kept (TUPLE-2).
    guarded: bool,
}

/// Page numbers are ours: nobody outside can choose them to collide, so that
/// a multiplication is enough, and each lookup of the data path cheap.
#[derive(Default)]
struct PageHash(u64);

impl Hasher for PageHash {
    fn write(&mut self, _: &[u8]) {
        unreachable!("pages are numbers");
    }

    fn write_u64(&mut self, page: u64) {
        self.0 = page.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// By member, for each tuple of its copy of a page, in order, where it is in
/// the set. The same for every page, as the parity's place repeats with each
/// group of stripes.
type Slots = Vec<Vec<u16>>;

struct Cache {
    sets: HashMap<u64, Cached, BuildHasherDefault<PageHash>>,
    order: VecDeque<u64>,
    capacity: usize,
}

/// What is there of the pages of a number.
enum Cached {
    Loading,
    /// One member's, as it was read, for reads of its blocks (PAGE-5).
    Copy(PageCopy),
    All(Rc<PageSet>),
}

/// A member's copy of a page.
struct PageCopy {
    owner: Owner,
    bytes: Box<[u8]>,
    used: Cell<bool>,
}

/// The pages of the same number on all members: all tuples of some rows.
pub(crate) struct PageSet {
    page: u64,
    geometry: Geometry,
    /// By record, position in the group, column.
    tuples: RefCell<Vec<Tuple>>,
    /// How many of them are not of written blocks.
    not_written: Cell<usize>,
    slots: Rc<Slots>,
    guarded: bool,
    commits: Vec<Commit>,
    sequence: Cell<u64>,
    settled: Condition,
    used: Cell<bool>,
}

/// The tuple of a block that is written, or where it lies on a page of which
/// every block is: more tuples are cached than the processor has at hand, and
/// nobody need wait for one while the block is being read.
pub(crate) enum Written {
    Tuple(Tuple),
    OfPage(Rc<PageSet>, usize),
}

impl Written {
    fn of(tuple: Tuple) -> Option<Self> {
        (tuple.state == State::Written).then_some(Written::Tuple(tuple))
    }

    /// As it is by now.
    pub(crate) fn tuple(&self) -> Tuple {
        match self {
            Written::Tuple(tuple) => *tuple,
            Written::OfPage(set, index) => set.tuples.borrow()[*index],
        }
    }

    /// Keeps it as it is now, and not the page any longer.
    pub(crate) fn take(&mut self) {
        *self = Written::Tuple(self.tuple());
    }
}

/// How far a member's copy of the page is written.
#[derive(Default)]
struct Commit {
    wanted: Cell<u64>,
    done: Cell<u64>,
    busy: Cell<bool>,
}

impl Pages {
    pub(crate) fn new(geometry: &Geometry, guarded: bool, bytes: usize) -> Self {
        let set = geometry.page_rows() * row_tuples(geometry) * size_of::<Tuple>() + 512;
        let capacity = (bytes / set).max(16);
        let cache = Cache { sets: HashMap::default(), order: VecDeque::new(), capacity };
        let slots = (0..geometry.members).map(|member| slots(geometry, member)).collect();
        let (cache, slots) = (RefCell::new(cache), Rc::new(slots));
        Self { cache, loaded: Condition::default(), slots, guarded }
    }

    /// Whether the page is cached, or on its way.
    pub(crate) fn holds(&self, page: u64) -> bool {
        self.cache.borrow().sets.contains_key(&page)
    }

    fn get(&self, page: u64) -> Option<Rc<PageSet>> {
        match self.cache.borrow().sets.get(&page) {
            Some(Cached::All(set)) => {
                set.used.set(true);
                Some(set.clone())
            }
            _ => None,
        }
    }

    /// The tuples of blocks that a member has, in rows that follow each other,
    /// if they are at hand.
    pub(crate) fn known(
        &self,
        g: &Geometry,
        first: Place,
        count: usize,
        member: usize,
    ) -> Option<SmallVec<[Tuple; 16]>> {
        let (page, record) = g.page_of(first.stripe, first.row);
        match self.cache.borrow().sets.get(&page)? {
            Cached::Loading => None,
            Cached::All(set) => {
                set.used.set(true);
                Some(set.tuples(first, count))
            }
            Cached::Copy(copy) if copy.owner.role == member => {
                copy.used.set(true);
                let from = index_in_copy(g, record, first, member);
                let tuple =
                    |i| data_tuple(&copy.bytes, page, copy.owner, from + i * g.record_tuples());
                (0..count).map(tuple).collect()
            }
            Cached::Copy(_) => None,
        }
    }

    /// The tuple of one such block, if that is written.
    pub(crate) fn written(&self, g: &Geometry, place: Place, member: usize) -> Option<Written> {
        let (page, record) = g.page_of(place.stripe, place.row);
        if let Cached::All(set) = self.cache.borrow().sets.get(&page)? {
            set.used.set(true);
            let index = index(g, record, g.position(place.stripe), place.column);
            let tuples = set.tuples.borrow();
            if set.not_written.get() == 0 {
                stableio_onepass::prefetch(&tuples[index]);
                return Some(Written::OfPage(set.clone(), index));
            }
            return Written::of(tuples[index]);
        }
        Written::of(self.known(g, place, 1, member)?[0])
    }

    fn is_loading(&self, page: u64) -> bool {
        matches!(self.cache.borrow().sets.get(&page), Some(Cached::Loading))
    }

    /// Sets with changes that some member does not have, oldest first.
    fn dirty(&self, most: usize) -> Vec<Rc<PageSet>> {
        let cache = self.cache.borrow();
        let sets = cache.order.iter().filter_map(|page| match cache.sets.get(page) {
            Some(Cached::All(set)) if !set.is_clean() => Some(set.clone()),
            _ => None,
        });
        sets.take(most).collect()
    }
}

impl Cache {
    /// Makes room by dropping what nobody uses and nobody used lately; says
    /// whether there is.
    fn shrink(&mut self) -> bool {
        let mut tries = 2 * self.order.len();
        while self.sets.len() >= self.capacity && tries > 0 {
            tries -= 1;
            let Some(page) = self.order.pop_front() else { break };
            let unused = match self.sets.get(&page) {
                Some(Cached::Loading) => false,
                Some(Cached::Copy(copy)) => !copy.used.replace(false),
                Some(Cached::All(set)) => {
                    Rc::strong_count(set) == 1 && !set.used.replace(false) && set.is_clean()
                }
                None => continue,
            };
            match unused {
                true => drop(self.sets.remove(&page)),
                false => self.order.push_back(page),
            }
        }
        self.sets.len() < self.capacity
    }
}

impl Engine {
    /// The page with the tuples of a row, read from the members if need be.
    pub(crate) async fn page(&self, stripe: u64, row: u32) -> Result<Rc<PageSet>, Kind> {
        self.page_numbered(self.geometry.page_of(stripe, row).0).await
    }

    /// The same by the page's number.
    pub(crate) async fn page_numbered(&self, page: u64) -> Result<Rc<PageSet>, Kind> {
        loop {
            if let Some(set) = self.pages.get(page) {
                return Ok(set);
            }
            if !self.pages.is_loading(page) {
                break;
            }
            self.loaded(page).await;
        }
        let is_new = self.begin_load(page).await;
        let set = Box::pin(self.load(page)).await;
        self.end_load(page, is_new, Cached::All(set.clone()));
        Ok(set)
    }

    /// The tuples of blocks that a member has, in rows that follow each other:
    /// as its own copy says, where nothing else is known (PAGE-5).
    pub(crate) async fn tuples(
        &self,
        first: Place,
        count: usize,
        member: usize,
    ) -> Result<SmallVec<[Tuple; 16]>, Kind> {
        let g = &self.geometry;
        let (page, _) = g.page_of(first.stripe, first.row);
        while self.pages.is_loading(page) {
            self.loaded(page).await;
        }
        if !self.pages.holds(page) && self.holds(member, first.stripe) {
            Box::pin(self.load_copy(page, member)).await;
        }
        match self.pages.known(g, first, count, member) {
            Some(tuples) => Ok(tuples),
            // Another member is asked for too, or the copy does not do.
            None => Ok(self.page(first.stripe, first.row).await?.tuples(first, count)),
        }
    }

    /// Waits until a page is there that is on its way.
    async fn loaded(&self, page: u64) {
        self.pages.loaded.wait_for(|| (!self.pages.is_loading(page)).then_some(())).await;
    }

    /// Makes room for a page that nobody else loads; says whether nothing of
    /// it was there.
    async fn begin_load(&self, page: u64) -> bool {
        let is_new = self.pages.cache.borrow_mut().sets.insert(page, Cached::Loading).is_none();
        if !self.pages.cache.borrow_mut().shrink() {
            // All in use, or changed: some are written, so that the next ones
            // find room.
            Box::pin(self.write_pages(WRITTEN_AT_ONCE)).await;
            self.pages.cache.borrow_mut().shrink();
        }
        is_new
    }

    fn end_load(&self, page: u64, is_new: bool, what: Cached) {
        let mut cache = self.pages.cache.borrow_mut();
        cache.sets.insert(page, what);
        if is_new {
            cache.order.push_back(page);
        }
        drop(cache);
        self.pages.loaded.notify();
    }

    /// Reads a member's copy of a page that is not there.
    async fn load_copy(&self, page: u64, member: usize) {
        let is_new = self.begin_load(page).await;
        let mut buf = self.meta.reserve(BLOCK).await.expect("smaller than the pool").take(BLOCK);
        let sent = self.read_member(member, self.geometry.page_at(page), buf.target(0..BLOCK));
        match self.arrived(sent).await {
            Ok(_) => {
                let bytes = buf.freeze().contiguous(0, BLOCK).into();
                let copy = PageCopy { owner: self.owner(member), bytes, used: Cell::new(true) };
                self.end_load(page, is_new, Cached::Copy(copy));
            }
            Err(error) => {
                // It is asked again, with the others.
                self.note_read_error(member, &error);
                self.pages.cache.borrow_mut().sets.remove(&page);
                self.pages.loaded.notify();
            }
        }
    }

    /// Reads a page from every member and puts the tuples together.
    async fn load(&self, page: u64) -> Rc<PageSet> {
        let (set, to_mend) = self.read_copies(page..page + 1).await.remove(0);
        let set = Rc::new(set);
        for member in to_mend {
            self.mend_page(&set, member).await;
        }
        set
    }

    /// Pages as their copies on all members say, each with the members whose
    /// copy is damaged or old. At most [`RUN`], which the same members hold.
    pub(crate) async fn read_copies(&self, pages: Range<u64>) -> Vec<(PageSet, Vec<usize>)> {
        let g = &self.geometry;
        let merge = |page| Merge::new(*g, page, &self.pages);
        let mut merges: Vec<Merge> = pages.clone().map(merge).collect();
        let (at, zone) = (g.page_at(pages.start), g.zone_of_page(pages.start));
        let len = merges.len() * BLOCK;
        let mut memory =
            self.meta.reserve(len * self.members.len()).await.expect("smaller than the pool");
        let mut reads = Vec::new();
        for member in (0..self.members.len()).filter(|m| self.holds_zone(*m, zone)) {
            let mut buf = memory.take(len);
            let sent = self.read_member(member, at, buf.target(0..len));
            reads.push((member, buf, sent));
        }
        for (member, buf, sent) in reads {
            let owner = self.owner(member);
            if let Err(error) = self.arrived(sent).await {
                self.note_read_error(member, &error);
                merges.iter_mut().for_each(|merge| merge.add(member, None, owner));
                continue;
            }
            let copies = buf.freeze();
            for (i, merge) in merges.iter_mut().enumerate() {
                merge.add(member, Some(copies.contiguous(i * BLOCK, BLOCK)), owner);
            }
        }
        merges.into_iter().map(Merge::finish).collect()
    }

    /// Writes a member's copy of a page anew.
    pub(crate) async fn mend_page(&self, set: &PageSet, member: usize) {
        // What a crash cut short is nobody's damage.
        if !self.recovering.get() {
            let (name, page) = (self.health.members[member].name(), set.page);
            Health::add(&self.health.members[member].mismatches);
            self.health.often(Often::Tuple, || {
                format!("{name}: page {page} of tuples was damaged or old, mended from its copies")
            });
            Health::add(&self.health.tuples_mended);
        }
        set.want(member);
        self.commit(set, member).await;
    }

    fn owner(&self, role: usize) -> Owner {
        Owner { array: self.array, role }
    }

    /// Writes up to so many sets of pages to all members that lack changes;
    /// pages that follow each other go together.
    pub(crate) async fn write_pages(&self, most: usize) {
        let mut dirty = self.pages.dirty(most);
        dirty.sort_unstable_by_key(|set| set.page);
        let follows = |a: &Rc<PageSet>, b: &Rc<PageSet>| {
            let zone = |set: &PageSet| self.geometry.zone_of_page(set.page);
            a.page + 1 == b.page && (zone(a) == zone(b) || !self.is_filling())
        };
        let runs: Vec<&[Rc<PageSet>]> =
            dirty.chunk_by(follows).flat_map(|run| run.chunks(RUN)).collect();
        for runs in runs.chunks(RUNS_AT_ONCE) {
            let copies = runs.iter().flat_map(|run| {
                (0..self.members.len()).map(move |member| self.commit_run(run, member))
            });
            join(copies).await;
        }
    }

    /// The same for a member and pages that follow each other.
    async fn commit_run(&self, run: &[Rc<PageSet>], member: usize) {
        let zone = self.geometry.zone_of_page(run[0].page);
        let wants = |set: &Rc<PageSet>| {
            let commit = &set.commits[member];
            !commit.busy.get() && commit.done.get() < commit.wanted.get()
        };
        let together: Vec<&Rc<PageSet>> = run.iter().filter(|set| wants(set)).collect();
        if together.len() < run.len() || run.len() == 1 || !self.holds_zone(member, zone) {
            join(run.iter().map(|set| self.commit(set, member))).await;
            return;
        }
        for set in run {
            set.commits[member].busy.set(true);
        }
        let len = run.len() * BLOCK;
        let mut buf = self.meta.reserve(len).await.expect("smaller than the pool").take(len);
        let mut covers = SmallVec::<[u64; RUN]>::new();
        for (i, set) in run.iter().enumerate() {
            covers.push(set.commits[member].wanted.get());
            let block = buf.range_mut(i * BLOCK..(i + 1) * BLOCK).next();
            set.encode(self.owner(member), block.expect("a block is one piece"));
        }
        let at = self.geometry.page_at(run[0].page);
        self.settled(self.write_member(member, at, buf.freeze().source())).await;
        for (set, covers) in run.iter().zip(covers) {
            let commit = &set.commits[member];
            commit.busy.set(false);
            commit.done.set(covers);
            set.settled.notify();
        }
    }

    /// Waits until a member's copy of the page has every change so far; writes
    /// it if nobody else does (PAGE-2). A member that fails is dropped.
    pub(crate) async fn commit(&self, set: &PageSet, member: usize) {
        let commit = &set.commits[member];
        let goal = commit.wanted.get();
        let zone = self.geometry.zone_of_page(set.page);
        while commit.done.get() < goal && self.holds_zone(member, zone) {
            if commit.busy.get() {
                set.settled.wait_for(|| (!commit.busy.get()).then_some(())).await;
                continue;
            }
            commit.busy.set(true);
            let mut memory = self.meta.reserve(BLOCK).await.expect("smaller than the pool");
            let covers = commit.wanted.get();
            let mut buf = memory.take(BLOCK);
            set.encode(
                self.owner(member),
                buf.pieces_mut().next().expect("one block is one piece"),
            );
            let at = self.geometry.page_at(set.page);
            self.settled(self.write_member(member, at, buf.freeze().source())).await;
            commit.busy.set(false);
            commit.done.set(covers);
            set.settled.notify();
        }
        // Who does not hold it has nothing to be written.
        commit.done.set(commit.done.get().max(goal));
    }

    /// The bytes of a page for the member that is being filled, which does not
    /// have its zone yet.
    pub(crate) fn encode_for_incoming(&self, set: &PageSet, member: usize, into: &mut [u8]) {
        set.encode(self.owner(member), into);
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
        index(g, record, g.position(place.stripe), place.column)
    }

    /// What is known of a block.
    pub(crate) fn tuple(&self, place: Place) -> Tuple {
        self.tuples.borrow()[self.index(place)]
    }

    /// What is known of `count` blocks in rows that follow each other.
    pub(crate) fn tuples(&self, first: Place, count: usize) -> SmallVec<[Tuple; 16]> {
        let (from, step) = (self.index(first), row_tuples(&self.geometry));
        let tuples = self.tuples.borrow();
        (0..count).map(|i| tuples[from + i * step]).collect()
    }

    /// Sets a tuple. The pages of all that hold it want to be written, which
    /// [`Engine::commit`] does.
    pub(crate) fn set(&self, place: Place, tuple: Tuple) {
        let index = self.index(place);
        let tuple = if self.guarded { tuple } else { tuple.without_guard() };
        let before = std::mem::replace(&mut self.tuples.borrow_mut()[index], tuple);
        let counts = |tuple: Tuple| usize::from(tuple.state != State::Written);
        self.not_written.set(self.not_written.get() + counts(tuple) - counts(before));
        self.geometry.tuple_holders(place.stripe, place.column).for_each(|m| self.want(m));
    }

    fn want(&self, member: usize) {
        let wanted = &self.commits[member].wanted;
        wanted.set(wanted.get() + 1);
    }

    /// The tuple that a row's P would have, by those of its data; `None` where
    /// no block of the row is written: then there is no parity. Without guards
    /// nothing tells whether parity still has a block in it that was lost: then
    /// P and Q are lost too, until that is written.
    pub(crate) fn parity_tuple(&self, stripe: u64, row: u32) -> Option<Tuple> {
        let columns = self.geometry.columns();
        let first = self.index(Place { stripe, row, column: 0 });
        let tuples = &self.tuples.borrow()[first..first + columns];
        let is = |state| tuples.iter().any(|t| t.state == state);
        is(State::Written).then(|| match self.guarded {
            true => {
                let guards = tuples.iter().map(Tuple::parity_guard);
                Tuple::written(stableio_onepass::guard_of_xor(guards), 0)
            }
            false if is(State::Lost) => Tuple::lost(0),
            false => Tuple::written(0, 0).without_guard(),
        })
    }

    /// Whether any block of a row is written.
    pub(crate) fn is_written(&self, stripe: u64, row: u32) -> bool {
        let first = self.index(Place { stripe, row, column: 0 });
        let tuples = &self.tuples.borrow()[first..first + self.geometry.columns()];
        tuples.iter().any(|t| t.state == State::Written)
    }

    fn is_clean(&self) -> bool {
        self.commits.iter().all(|c| !c.busy.get() && c.done.get() >= c.wanted.get())
    }

    /// Whether all tuples are the same as those of another reading.
    pub(crate) fn agrees(&self, other: &PageSet) -> bool {
        *self.tuples.borrow() == *other.tuples.borrow()
    }

    /// Writes the bytes of a member's copy of the page.
    fn encode(&self, owner: Owner, into: &mut [u8]) {
        self.sequence.set(self.sequence.get() + 1);
        let tuples = self.tuples.borrow();
        let own = self.slots[owner.role].iter().map(|slot| &tuples[usize::from(*slot)]);
        encode_page(self.page, self.sequence.get(), owner, own, into);
    }
}

/// Tuples of the rows at one height of a group.
fn row_tuples(g: &Geometry) -> usize {
    g.group() as usize * g.width()
}

fn index(g: &Geometry, record: usize, position: usize, column: usize) -> usize {
    record * row_tuples(g) + position * g.width() + column
}

/// Where the tuple of a block that a member has lies in its copy of the page.
fn index_in_copy(g: &Geometry, record: usize, place: Place, member: usize) -> usize {
    let position = g.position(place.stripe);
    let column = match g.role(position as u64, member) {
        Role::Data(_) => 0,
        Role::P | Role::Q => place.column,
    };
    record * g.record_tuples() + g.record_range(member, position).start + column
}

fn slots(g: &Geometry, member: usize) -> Vec<u16> {
    let mut slots = Vec::with_capacity(g.page_rows() * g.record_tuples());
    for record in 0..g.page_rows() {
        for position in 0..g.group() as usize {
            let slot = |column| index(g, record, position, column) as u16;
            match g.role(position as u64, member) {
                Role::Data(column) => slots.push(slot(column)),
                Role::P | Role::Q => slots.extend((0..g.width()).map(slot)),
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
    guarded: bool,
    sequence: u64,
    /// By tuple: the newest copy, and 1 + the sequence of its sector; 0 where
    /// there is none, 1 in a sector that was never written.
    found: Vec<(u64, Tuple)>,
    /// What each member said, in its order.
    said: Vec<(usize, Vec<Tuple>)>,
    /// Members with a damaged sector.
    damaged: Vec<usize>,
}

impl Merge {
    fn new(geometry: Geometry, page: u64, pages: &Pages) -> Self {
        let lost = Tuple { state: State::Lost, ..Tuple::UNWRITTEN };
        let found = vec![(0, lost); geometry.page_rows() * row_tuples(&geometry)];
        let (slots, guarded) = (pages.slots.clone(), pages.guarded);
        let (said, damaged) = (Vec::new(), Vec::new());
        Self { geometry, page, slots, guarded, sequence: 0, found, said, damaged }
    }

    /// What a member has; nothing if it could not be read.
    fn add(&mut self, member: usize, bytes: Option<&[u8]>, owner: Owner) {
        let Some(bytes) = bytes else {
            self.damaged.push(member);
            return;
        };
        let slots = &self.slots[member];
        let width = self.geometry.width();
        let q = (width > self.geometry.columns()).then(|| width - 1);
        let mut said = Vec::with_capacity(slots.len());
        for (range, sector) in parse_page(bytes, self.page, owner) {
            let slots = &slots[range.start.min(slots.len())..range.end.min(slots.len())];
            let (age, tuples) = match sector {
                Sector::Bad => {
                    if self.damaged.last() != Some(&member) {
                        self.damaged.push(member);
                    }
                    said.extend(slots.iter().map(|slot| self.found[usize::from(*slot)].1));
                    continue;
                }
                Sector::Blank => (1, None),
                Sector::Good(sequence, tuples) => {
                    self.sequence = self.sequence.max(sequence);
                    (sequence.saturating_add(1), Some(tuples))
                }
            };
            for (i, slot) in slots.iter().map(|slot| usize::from(*slot)).enumerate() {
                let tuple = tuples.as_ref().map_or(Tuple::UNWRITTEN, |tuples| tuples[i]);
                said.push(tuple);
                // Q is never lost: nobody knew it, as none of its members was
                // there. Whoever knows it again counts.
                let unknown = tuple.state == State::Lost && q == Some(slot % width);
                let age = if unknown { 0 } else { age };
                let found = &mut self.found[slot];
                if found.0 < age {
                    *found = (age, tuple);
                }
            }
        }
        self.said.push((member, said));
    }

    /// The set, and the members whose copy says something else, or nothing.
    fn finish(self) -> (PageSet, Vec<usize>) {
        let mut to_mend = self.damaged;
        for (member, said) in &self.said {
            let mut pairs = said.iter().zip(&self.slots[*member]);
            if pairs.any(|(tuple, slot)| *tuple != self.found[usize::from(*slot)].1) {
                to_mend.push(*member);
            }
        }
        to_mend.sort_unstable();
        to_mend.dedup();
        let mut tuples: Vec<Tuple> = self.found.into_iter().map(|(_, tuple)| tuple).collect();
        if self.geometry.width() > self.geometry.columns() {
            // Of a row without a written block nobody has to know Q.
            for row in tuples.chunks_exact_mut(self.geometry.width()) {
                let (q, data) = row.split_last_mut().expect("a row has tuples");
                if q.state == State::Lost && data.iter().all(|t| t.state == State::Unwritten) {
                    *q = Tuple::UNWRITTEN;
                }
            }
        }
        let commits = (0..self.geometry.members).map(|_| Commit::default()).collect();
        let not_written = tuples.iter().filter(|tuple| tuple.state != State::Written).count();
        let set = PageSet {
            page: self.page,
            geometry: self.geometry,
            tuples: RefCell::new(tuples),
            not_written: Cell::new(not_written),
            slots: self.slots,
            guarded: self.guarded,
            commits,
            sequence: Cell::new(self.sequence),
            settled: Condition::default(),
            used: Cell::new(true),
        };
        (set, to_mend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Level;

    #[test]
    fn a_tuple_lies_in_a_copy_where_the_set_has_it() {
        for (level, members) in
            [(Level::Single, 1), (Level::Raid1, 3), (Level::Raid5, 4), (Level::Raid6, 6)]
        {
            let g = Geometry::new(level, members, 16384, 64 << 20).unwrap();
            let slots: Vec<_> = (0..members).map(|member| slots(&g, member)).collect();
            for block in 0..g.size() / BLOCK as u64 {
                let place = g.place(block);
                let (_, record) = g.page_of(place.stripe, place.row);
                for member in g.tuple_holders(place.stripe, place.column) {
                    let slot = slots[member][index_in_copy(&g, record, place, member)];
                    let in_set = index(&g, record, g.position(place.stripe), place.column);
                    assert_eq!(usize::from(slot), in_set, "{level:?} {place:?} on {member}");
                }
            }
        }
    }
}
