//! After an array was not shut down: the rows that were being written.
//!
//! RECOVER-1: no guard is computed from the medium. A block is valid if it
//! matches its tuple or a guard that the log has for it; otherwise its
//! reconstruction is, if that does; otherwise it is lost, and says so.
//!
//! RECOVER-2: afterwards every row that the log names has one version of each
//! block, tuples that match, and parity of just these.

use std::collections::BTreeMap;

use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf};

use crate::engine::Engine;
use crate::geometry::Place;
use crate::health::Health;
use crate::log::Record;
use crate::repair::{block_mut, guard_of};
use crate::tuple::{State, Tuple};

use std::sync::atomic::Ordering;

/// What may be on a block of a row.
type Versions = Vec<Tuple>;

/// A column's block, as it was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Matches this tuple, and counts in parity as it is in the row buffer.
    Valid(Tuple),
    /// Was read and matches no version.
    Mismatch,
    /// Its member is missing or did not give it.
    Absent,
}

impl Found {
    fn is_unknown(self) -> bool {
        !matches!(self, Found::Valid(_))
    }
}

impl Engine {
    /// Brings every row that the log of `epoch` names to one valid state.
    pub(crate) async fn recover(&self, epoch: u64) -> Result<(), Kind> {
        let mut rows: BTreeMap<(u64, u32), Vec<Record>> = BTreeMap::new();
        for record in self.read_log(epoch).await? {
            rows.entry((record.place.stripe, record.place.row)).or_default().push(record);
        }
        let columns = self.geometry.columns();
        let mut buf = self.repair.reserve((columns + 1) * BLOCK).await?.take((columns + 1) * BLOCK);
        for ((stripe, row), records) in rows {
            self.recover_row(stripe, row, &records, &mut buf).await?;
            Health::add(&self.health.rows_recovered);
        }
        self.settle_members().await?;
        self.flush().await
    }

    async fn recover_row(
        &self,
        stripe: u64,
        row: u32,
        records: &[Record],
        buf: &mut PoolBuf,
    ) -> Result<(), Kind> {
        let set = self.page(stripe, row).await?;
        let place = |column| Place { stripe, row, column };
        // By column: the page's tuple, its other copy if that differs, and of
        // the last record new and old. Earlier records had settled.
        let versions: Vec<Versions> = (0..self.geometry.columns())
            .map(|column| {
                let on_page = [Some(set.tuple(place(column))), set.disputed(place(column))];
                let last = records.iter().rev().find(|r| r.place.column == column);
                on_page
                    .into_iter()
                    .flatten()
                    .chain(last.into_iter().flat_map(|r| [r.new, r.old]))
                    .collect()
            })
            .collect();
        let mut found = Vec::new();
        for (column, versions) in versions.iter().enumerate() {
            found.push(self.find(place(column), versions, buf).await);
        }
        // Parity first: it may know what was acknowledged. Then what may be
        // taken as unwritten; that may leave one for parity again.
        self.rebuild_one(stripe, row, &versions, &mut found, buf).await;
        for (column, versions) in versions.iter().enumerate() {
            let on_page = [Some(set.tuple(place(column))), set.disputed(place(column))];
            let never_acknowledged = on_page.iter().flatten().all(|t| t.state == State::Unwritten);
            if let Some(tuple) = as_unwritten(found[column], versions, never_acknowledged) {
                buf.zero(column * BLOCK..(column + 1) * BLOCK);
                found[column] = Found::Valid(tuple);
            }
        }
        self.rebuild_one(stripe, row, &versions, &mut found, buf).await;
        let mut pages = Vec::new();
        for (column, found) in found.iter().enumerate() {
            let tuple = match found {
                Found::Valid(tuple) => *tuple,
                Found::Mismatch | Found::Absent => {
                    Health::add(&self.health.blocks_lost);
                    let block = self.block_number(place(column));
                    self.health.event(format!(
                        "block {block} was lost in the crash: it reads as an error"
                    ));
                    buf.zero(column * BLOCK..(column + 1) * BLOCK);
                    Tuple::lost(block)
                }
            };
            if set.tuple(place(column)) != tuple
                || set.disputed(place(column)).is_some()
                || records_column(records, column)
            {
                pages.extend(set.set(place(column), tuple));
            }
        }
        self.write_parity(stripe, row, buf).await;
        pages.sort_unstable();
        pages.dedup();
        for member in pages.into_iter().filter(|m| self.alive(*m)) {
            if let Err(error) = self.commit(&set, member).await {
                self.drop_member(member, &error);
            }
        }
        Ok(())
    }

    /// Reads a column's block into its part of the row buffer and says which
    /// version it is.
    async fn find(&self, place: Place, versions: &[Tuple], buf: &mut PoolBuf) -> Found {
        let at = place.column * BLOCK;
        // `versions` begins with the page's tuple and, where the log names the
        // block, ends with new and old. A discard whose tuple arrived stays
        // done, whatever the medium still holds: it may be acknowledged.
        let newest = versions.iter().rev().nth(1).unwrap_or(&versions[0]);
        if versions[0].state != State::Written && newest.state == versions[0].state {
            buf.zero(at..at + BLOCK);
            return Found::Valid(versions[0]);
        }
        let member = self.geometry.data_member(place.stripe, place.column);
        let offset = self.geometry.member_offset(place.stripe, place.row);
        if !self.alive(member) || !self.read_block(member, offset, buf, at).await {
            return Found::Absent;
        }
        let guard = guard_of(buf, at);
        versions.iter().find(|t| t.matches(guard)).map_or(Found::Mismatch, |t| Found::Valid(*t))
    }

    /// Where just one column is unknown, the parity may know it.
    async fn rebuild_one(
        &self,
        stripe: u64,
        row: u32,
        versions: &[Versions],
        found: &mut [Found],
        buf: &mut PoolBuf,
    ) {
        let unknown: Vec<usize> = (0..found.len()).filter(|c| found[*c].is_unknown()).collect();
        let (&[column], Some(parity)) = (&unknown[..], self.geometry.parity_member(stripe)) else {
            return;
        };
        let at = column * BLOCK;
        let offset = self.geometry.member_offset(stripe, row);
        if !self.alive(parity) || !self.read_block(parity, offset, buf, at).await {
            return;
        }
        for other in (0..found.len()).filter(|c| *c != column) {
            let block: [u8; BLOCK] = block_mut(buf, other * BLOCK)[..].try_into().expect("a block");
            stableio_onepass::xor_into(block_mut(buf, at), &block);
        }
        let guard = guard_of(buf, at);
        let Some(tuple) = versions[column].iter().find(|t| t.matches(guard)) else { return };
        found[column] = Found::Valid(*tuple);
        let member = self.geometry.data_member(stripe, column);
        if self.alive(member)
            && let Err(error) = self.write_member(member, offset, buf.target(at..at + BLOCK)).await
        {
            self.drop_member(member, &error);
        }
    }

    /// Writes the parity of what the row buffer holds.
    async fn write_parity(&self, stripe: u64, row: u32, buf: &mut PoolBuf) {
        let Some(parity) = self.geometry.parity_member(stripe).filter(|m| self.alive(*m)) else {
            return;
        };
        let columns = self.geometry.columns();
        let at = columns * BLOCK;
        buf.zero(at..at + BLOCK);
        for column in 0..columns {
            let block: [u8; BLOCK] =
                block_mut(buf, column * BLOCK)[..].try_into().expect("a block");
            stableio_onepass::xor_into(block_mut(buf, at), &block);
        }
        let offset = self.geometry.member_offset(stripe, row);
        if let Err(error) = self.write_member(parity, offset, buf.target(at..at + BLOCK)).await {
            self.drop_member(parity, &error);
        }
    }

    /// Rows that recovery looked at.
    pub(crate) fn rows_recovered(&self) -> u64 {
        self.health.rows_recovered.load(Ordering::Relaxed)
    }
}

/// Whether an unknown block may be what it was before its first write.
///
/// One that was read and does not match: a settled write would be there, so
/// the one that the log names had not arrived and was never acknowledged. One
/// that is absent: only if no tuple of it was written, as tuples come before
/// the acknowledgement.
fn as_unwritten(found: Found, versions: &[Tuple], never_acknowledged: bool) -> Option<Tuple> {
    let may_be = match found {
        Found::Valid(_) => false,
        Found::Mismatch => true,
        Found::Absent => never_acknowledged,
    };
    versions.iter().copied().find(|t| may_be && t.state == State::Unwritten)
}

fn records_column(records: &[Record], column: usize) -> bool {
    records.iter().any(|r| r.place.column == column)
}
