//! After an array was not shut down: the rows that were being written.
//!
//! RECOVER-1: no guard is computed from the medium. A block is valid if the
//! log has its new content; or if it matches a version that the log names, or
//! its tuple where the log names none; or if its reconstruction does.
//! Otherwise it is lost, and says so.
//!
//! RECOVER-2: afterwards every row that the log names has one version of each
//! block, tuples that match, and parity of just these.
//!
//! RECOVER-3: content in the log counts from the last write of a row
//! backwards, as long as each has all of it: an older one must not undo a
//! newer one that is on the medium.
//!
//! RECOVER-4: a version older than one that was flushed does not count: a
//! member that has only that has lied about a flush.
//!
//! RECOVER-5: without checksums the log has the content of every write
//! (WRITE-4), and that is what a block is that the log names; the medium tells
//! only of blocks and of parity that no write in the log has changed.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;
use stableio_block::{Kind, sync::join};
use stableio_mem::{BLOCK, PoolBuf};
use stableio_onepass::gf;

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::{Health, Often};
use crate::log::{Found, Left, P_COLUMN};
use crate::pages::PageSet;
use crate::repair::{block_mut, copy_block, guard_of, xor_block};
use crate::tuple::{State, Tuple};
use crate::twin::{Protection, lacks};

/// Rows that are recovered side by side.
const ROWS_AT_ONCE: usize = 8;

/// What one write did to a row.
struct Entry {
    sequence: u64,
    records: Vec<Found>,
}

/// A row in the hands of recovery.
struct Row {
    stripe: u64,
    row: u32,
    set: Rc<PageSet>,
    entries: Vec<Entry>,
    columns: Vec<Column>,
    /// Whether the buffer has the P and the Q that the log had.
    logged_parity: [bool; 2],
    /// The data blocks by column, P, Q, and three to work with.
    buf: PoolBuf,
}

/// A data block of a row.
struct Column {
    /// What it may be, oldest first; the first is what it was before.
    versions: Vec<Tuple>,
    /// Whether the log names it.
    logged: bool,
    /// Some member gave it, whatever it was.
    was_read: bool,
    /// What it is; its content is in the row's buffer.
    known: Option<Tuple>,
}

impl Engine {
    /// Brings every row that the log names to one valid state.
    pub(crate) async fn recover(&self, left: &Left) -> Result<(), Kind> {
        let mut rows: BTreeMap<(u64, u32), Vec<Entry>> = BTreeMap::new();
        for batch in &left.batches {
            for record in &batch.records {
                let entries = rows.entry((record.place.stripe, record.place.row)).or_default();
                if entries.last().is_none_or(|entry| entry.sequence != batch.first) {
                    entries.push(Entry { sequence: batch.first, records: Vec::new() });
                }
                let entry = entries.last_mut().expect("just made");
                entry.records.push(*record);
            }
        }
        let len = (self.geometry.columns() + 5) * BLOCK;
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let some =
                rows.by_ref().take(ROWS_AT_ONCE).map(|((stripe, row), entries)| async move {
                    let buf = self.repair.reserve(len).await?.take(len);
                    self.recover_row(stripe, row, entries, left.durable, buf).await?;
                    Health::add(&self.health.rows_recovered);
                    Ok::<(), Kind>(())
                });
            join(some).await.into_iter().collect::<Result<(), Kind>>()?;
        }
        self.write_pages(usize::MAX).await;
        self.flush().await
    }

    async fn recover_row(
        &self,
        stripe: u64,
        row: u32,
        entries: Vec<Entry>,
        durable: u64,
        buf: PoolBuf,
    ) -> Result<(), Kind> {
        let set = self.page(stripe, row).await?;
        let columns = (0..self.geometry.columns())
            .map(|column| {
                Column::of(&entries, column, durable, set.tuple(Place { stripe, row, column }))
            })
            .collect();
        let mut row = Row { stripe, row, set, entries, columns, logged_parity: [false; 2], buf };
        self.replay(&mut row).await;
        for column in 0..row.columns.len() {
            if row.columns[column].known.is_none() {
                self.find(&mut row, column).await;
            }
        }
        self.rebuild_unknown(&mut row).await;
        // What is not known may be what it was before its first write. That
        // may leave one for parity again.
        for column in 0..row.columns.len() {
            if row.columns[column].may_be_unwritten() {
                row.zero(column, Tuple::UNWRITTEN);
            }
        }
        self.rebuild_unknown(&mut row).await;
        self.decide(&mut row).await;
        self.settle_members().await
    }

    /// Takes what the log has of the row's content (RECOVER-3).
    async fn replay(&self, row: &mut Row) {
        let last = row.last_write();
        for i in (0..row.entries.len()).rev() {
            let records: Vec<Found> = row.entries[i].records.clone();
            let mut got: SmallVec<[(usize, Tuple); 8]> = SmallVec::new();
            for record in records.iter().filter(|r| r.place.column < row.columns.len()) {
                let column = record.place.column;
                if row.columns[column].known.is_some() {
                    continue;
                }
                match record.new.state {
                    State::Written => {
                        let at = column * BLOCK;
                        if self.read_payload(record, &mut row.buf, at).await != Some(true) {
                            if lacks(Protection::ContentBackwards) {
                                continue;
                            }
                            return;
                        }
                    }
                    State::Unwritten | State::Lost => {
                        row.buf.zero(column * BLOCK..(column + 1) * BLOCK)
                    }
                }
                got.push((column, record.new));
            }
            // Only whole: a part of one write and the medium's state of
            // another do not make a row.
            got.into_iter().for_each(|(column, tuple)| row.columns[column].known = Some(tuple));
            if Some(i) == last {
                for record in records.iter().filter(|r| r.place.column >= row.columns.len()) {
                    let which = usize::from(record.place.column != P_COLUMN);
                    let at = row.parity_at(which);
                    row.logged_parity[which] =
                        self.read_payload(record, &mut row.buf, at).await == Some(true);
                }
            }
        }
    }

    /// Reads a column's copies and takes the newest version that one has.
    async fn find(&self, row: &mut Row, column: usize) {
        let g = &self.geometry;
        let newest = *row.columns[column].versions.last().expect("at least what it was before");
        if newest.state != State::Written {
            row.zero(column, newest);
            return;
        }
        let offset = g.member_offset(row.stripe, row.row);
        let mut best: Option<usize> = None;
        for member in g.holders(row.stripe, column).filter(|m| self.holds(*m, row.stripe)) {
            let to = row.work_at(0);
            if !self.read_block(member, offset, &mut row.buf, to).await {
                continue;
            }
            let guard = guard_of(&mut row.buf, to);
            let found = &mut row.columns[column];
            found.was_read = true;
            if lacks(Protection::LoggedGuards) {
                found.versions.push(Tuple { guard, ..newest });
            }
            let version = found.versions.iter().rposition(|tuple| tuple.matches(guard));
            if version > best {
                best = version;
                copy_block(&mut row.buf, to, column * BLOCK);
            }
        }
        row.columns[column].known = best.map(|i| row.columns[column].versions[i]);
    }

    /// Where parity may know what the members do not: what comes out counts
    /// only if it is one of the versions.
    async fn rebuild_unknown(&self, row: &mut Row) {
        let g = &self.geometry;
        let unknown: Vec<usize> =
            (0..row.columns.len()).filter(|c| row.columns[*c].known.is_none()).collect();
        if unknown.is_empty() || unknown.len() > g.level.parities() {
            return;
        }
        let offset = g.member_offset(row.stripe, row.row);
        let members = [g.parity_member(row.stripe), g.q_member(row.stripe)];
        let mut came = [false; 2];
        for which in 0..2 {
            let to = row.work_at(which);
            if row.logged_parity[which] {
                let from = row.parity_at(which);
                copy_block(&mut row.buf, from, to);
                came[which] = true;
            } else if let Some(member) = members[which].filter(|m| self.holds(*m, row.stripe))
                && (self.checksums || row.parity_arrived(which))
            {
                came[which] = self.read_block(member, offset, &mut row.buf, to).await;
            }
        }
        let (p, q) = (row.work_at(0), row.work_at(1));
        for column in 0..row.columns.len() {
            if row.columns[column].known.is_some() {
                row.add_column(column, p, q);
            }
        }
        match (&unknown[..], came) {
            (&[column], _) => {
                for which in (0..2).filter(|which| came[*which]) {
                    let at = row.work_at(which);
                    if which == 1 {
                        gf::reconstruct_from_q(block_mut(&mut row.buf, at), column);
                    }
                    if row.accept(column, at) {
                        return;
                    }
                }
            }
            (&[x, y], [true, true]) => {
                let mut sums = [0, 1].map(|which| {
                    let at = row.work_at(which);
                    <[u8; BLOCK]>::try_from(&*block_mut(&mut row.buf, at)).expect("a block")
                });
                let [p, q] = &mut sums;
                gf::reconstruct_two(p, q, x, y);
                let (at_x, at_y) = (row.work_at(0), row.work_at(1));
                row.buf.copy_from(at_x, p);
                row.buf.copy_from(at_y, q);
                // Both or none: one that fits by itself would be chance.
                if row.fits(x, at_x).is_some() && row.fits(y, at_y).is_some() {
                    row.accept(x, at_x);
                    row.accept(y, at_y);
                }
            }
            _ => {}
        }
    }

    /// Writes what was found to the members, with parity of just that.
    async fn decide(&self, row: &mut Row) {
        let g = &self.geometry;
        let (stripe, number) = (row.stripe, row.row);
        let place = |column| Place { stripe, row: number, column };
        for column in 0..row.columns.len() {
            if row.columns[column].known.is_none() {
                Health::add(&self.health.blocks_lost);
                let block = self.block_number(place(column));
                self.health.often(Often::Lost, || {
                    format!("block {block} was lost in the crash: it reads as an error until it is written")
                });
                row.buf.zero(column * BLOCK..(column + 1) * BLOCK);
                row.columns[column].known = Some(Tuple::lost(block));
            }
        }
        let offset = g.member_offset(row.stripe, row.row);
        let mut sent = Vec::new();
        let mut any = false;
        for column in 0..row.columns.len() {
            let tuple = row.columns[column].known.expect("decided above");
            if tuple.state != State::Written {
                continue;
            }
            any = true;
            let list = row.buf.target(column * BLOCK..(column + 1) * BLOCK);
            for member in g.holders(row.stripe, column).filter(|m| self.holds(*m, row.stripe)) {
                sent.push(self.write_member(member, offset, list.duplicate()));
            }
        }
        let (p, q) = (row.parity_at(0), row.parity_at(1));
        row.buf.zero(p..q + BLOCK);
        for column in 0..row.columns.len() {
            row.add_column(column, p, q);
        }
        let members = [(g.parity_member(row.stripe), p), (g.q_member(row.stripe), q)];
        for (member, at) in members {
            if let Some(member) = member.filter(|m| any && self.holds(*m, row.stripe)) {
                sent.push(self.write_member(member, offset, row.buf.target(at..at + BLOCK)));
            }
        }
        for sent in sent {
            self.settled(sent).await;
        }
        for column in 0..row.columns.len() {
            row.set.set(place(column), row.columns[column].known.expect("decided above"));
        }
        if g.width() > g.columns() {
            let held = g.q_member(row.stripe).is_some_and(|m| self.holds(m, row.stripe));
            let place = place(g.columns());
            let guard = guard_of(&mut row.buf, q);
            let tuple = Tuple::written(guard, self.block_number(place));
            row.set.set(place, if any && held { tuple } else { Tuple::UNWRITTEN });
        }
    }

    /// Rows that recovery looked at.
    pub(crate) fn rows_recovered(&self) -> u64 {
        self.health.rows_recovered.load(Ordering::Relaxed)
    }
}

impl Column {
    /// What a column may be, by the writes that the log has (RECOVER-4).
    fn of(entries: &[Entry], column: usize, durable: u64, on_page: Tuple) -> Self {
        let mut versions = Vec::new();
        for entry in entries {
            for record in entry.records.iter().filter(|r| r.place.column == column) {
                // What fits anything is no evidence (RECOVER-5).
                let evidence = record.old.guarded || record.old.state != State::Written;
                if versions.is_empty() && evidence {
                    versions.push(record.old);
                }
                // A discard leaves nothing on the medium that could be lost: it
                // is done, and what lies there is no version any more.
                let is_last = entry.sequence < durable || record.new.state != State::Written;
                if is_last && !lacks(Protection::FlushedVersions) {
                    versions.clear();
                }
                versions.push(record.new);
            }
        }
        let logged = !versions.is_empty();
        if !logged {
            versions.push(on_page);
        }
        Self { versions, logged, was_read: false, known: None }
    }

    /// Whether an unknown block may be what it was before its first write:
    /// one that was read and does not match, if no later version was flushed,
    /// since what settled would be there. One that is absent only if the log
    /// names no more than one write of it: an earlier one may have been
    /// flushed after the later one was logged.
    fn may_be_unwritten(&self) -> bool {
        let unwritten = self.versions.iter().any(|tuple| tuple.state == State::Unwritten);
        self.known.is_none()
            && self.logged
            && unwritten
            && (self.was_read || self.versions.len() == 2)
    }
}

impl Row {
    /// The last entry that names data: a later one may name the tuple of Q.
    fn last_write(&self) -> Option<usize> {
        let names_data = |entry: &Entry| {
            entry.records.iter().any(|record| record.place.column < self.columns.len())
        };
        self.entries.iter().rposition(names_data)
    }

    /// Whether P or Q on its member is that of the row, whatever was under way:
    /// no write in the log, which then is about Q, and no block lost.
    fn parity_arrived(&self, which: usize) -> bool {
        let lost = |column: &Column| column.known.is_some_and(|t| t.state == State::Lost);
        which == 0 && self.last_write().is_none() && !self.columns.iter().any(lost)
    }

    fn parity_at(&self, which: usize) -> usize {
        (self.columns.len() + which) * BLOCK
    }

    fn work_at(&self, which: usize) -> usize {
        (self.columns.len() + 2 + which) * BLOCK
    }

    fn zero(&mut self, column: usize, tuple: Tuple) {
        self.buf.zero(column * BLOCK..(column + 1) * BLOCK);
        self.columns[column].known = Some(tuple);
    }

    /// The version that the block at `at` is, for a column.
    fn fits(&mut self, column: usize, at: usize) -> Option<Tuple> {
        let guard = guard_of(&mut self.buf, at);
        self.columns[column].versions.iter().rev().find(|tuple| tuple.matches(guard)).copied()
    }

    /// Takes the block at `at` for a column, if it is one of its versions.
    fn accept(&mut self, column: usize, at: usize) -> bool {
        let Some(tuple) = self.fits(column, at) else { return false };
        copy_block(&mut self.buf, at, column * BLOCK);
        self.columns[column].known = Some(tuple);
        true
    }

    /// Adds a column to the sums of P and Q at two places.
    fn add_column(&mut self, column: usize, p: usize, q: usize) {
        let block: [u8; BLOCK] =
            block_mut(&mut self.buf, column * BLOCK)[..].try_into().expect("a block");
        xor_block(&mut self.buf, column * BLOCK, p);
        gf::mul_xor_into(block_mut(&mut self.buf, q), &block, gf::exp(column));
    }
}
