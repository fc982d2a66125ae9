//! The oracle: what each block of the array may read as.
//!
//! MODEL-1: a block reads as its newest version; that holds over the death of
//! the process too.
//!
//! MODEL-2: what a flush covered that began after the version was there, or
//! what a write with FUA left, is durable: no older version comes back.
//!
//! MODEL-3: after a loss of power a block reads as its durable version or as
//! one since; from then on, that is its durable version. A write that was
//! under way leaves one version more: itself over the newest.
//!
//! MODEL-4: a block that was written since the last flush, or was being
//! written, may be lost if a member was lost in the same crash, or failed since
//! the write began. No other may.
//!
//! MODEL-5: a lost block stays lost until it is written wholly.

use std::collections::{BTreeMap, BTreeSet};

use stableio_mem::BLOCK;

use crate::image::{Block, block_of, blocks_of, zeros};
use crate::write::Write;

/// A version of a block; `None` is lost.
pub type Version = Option<Block>;

/// What an array should read as.
#[derive(Clone, Default)]
pub struct Model {
    /// Blocks that are not there were never written, and are zeros.
    durable: BTreeMap<u64, Version>,
    /// Versions since, oldest first, with when they were there.
    since: BTreeMap<u64, Vec<(u64, Version)>>,
    now: u64,
}

/// A crash, or several without a successful opening between them.
#[derive(Default)]
pub struct Crash {
    /// Whether power was lost in one of them.
    pub power: bool,
    /// Whether a member was lost in one of them.
    pub member_lost: bool,
    /// Blocks that were at risk already when a member failed before.
    pub exposed: BTreeSet<u64>,
    /// Writes that were under way, or had settled unseen.
    pub pending: Vec<Pending>,
}

/// A write that a crash met.
pub struct Pending {
    /// What was written.
    pub write: Write,
    /// Whether it had succeeded.
    pub settled: bool,
}

impl Model {
    /// The newest version of a block.
    pub fn version(&self, block: u64) -> Version {
        let newest = self.since.get(&block).and_then(|since| since.last()).map(|(_, v)| v);
        newest.or_else(|| self.durable.get(&block)).cloned().unwrap_or_else(|| Some(zeros()))
    }

    /// The same; zeros where it is lost.
    pub fn block(&self, block: u64) -> Block {
        self.version(block).unwrap_or_else(zeros)
    }

    /// Whether a block reads as an error.
    pub fn is_lost(&self, block: u64) -> bool {
        self.version(block).is_none()
    }

    /// Reads bytes; zeros where they are lost.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        for (number, range, done) in blocks_of(at, into.len()) {
            into[done..done + range.len()].copy_from_slice(&self.block(number)[range]);
        }
    }

    /// A block has a new version.
    pub fn settle(&mut self, block: u64, version: Version, durable: bool) {
        if durable {
            self.since.remove(&block);
            self.durable.insert(block, version);
        } else {
            self.now += 1;
            self.since.entry(block).or_default().push((self.now, version));
        }
    }

    /// The same, of bytes.
    ///
    /// # Panics
    ///
    /// When they are not one block.
    pub fn set_block(&mut self, block: u64, bytes: &[u8]) {
        self.settle(block, Some(block_of(bytes)), false);
    }

    /// A write of known bytes settled.
    pub fn apply(&mut self, write: &Write) {
        for block in write.blocks() {
            let mut bytes = *self.block(block);
            write.apply_to(block, &mut bytes);
            self.settle(block, Some(block_of(&bytes)), write.fua);
        }
    }

    /// A flush begins now: what it covers.
    pub fn begin_flush(&self) -> u64 {
        self.now
    }

    /// A flush that covers this succeeded.
    pub fn finish_flush(&mut self, covers: u64) {
        let durable = &mut self.durable;
        self.since.retain(|block, since| {
            let settled = since.iter().take_while(|(when, _)| *when <= covers).count();
            if let Some((_, version)) = since.drain(..settled).next_back() {
                durable.insert(*block, version);
            }
            !since.is_empty()
        });
    }

    /// Blocks that no flush has covered yet.
    pub fn unflushed(&self) -> impl Iterator<Item = u64> + '_ {
        self.since.keys().copied()
    }

    /// Blocks of which a crash may have left several versions.
    pub fn at_risk(&self, crash: &Crash) -> BTreeSet<u64> {
        let mut blocks: BTreeSet<u64> =
            crash.pending.iter().flat_map(|pending| pending.write.blocks()).collect();
        if crash.power {
            blocks.extend(self.since.keys());
        }
        blocks
    }

    /// Whether a block may be `found` after a crash (MODEL-1 to MODEL-5).
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn explains(&self, crash: &Crash, block: u64, found: &Version) -> Result<(), String> {
        let current = self.version(block);
        let pending = crash.pending.iter().find(|p| p.write.blocks().contains(&block));
        let since = self.since.get(&block).filter(|_| crash.power);
        let at_risk = pending.is_some() || since.is_some();
        let may_be_lost = crash.member_lost || crash.exposed.contains(&block);
        if found.is_none() && may_be_lost && at_risk {
            return Ok(());
        }
        let why = match pending {
            None => None,
            // Over a lost block only a whole one goes.
            Some(p) if current.is_none() && !p.write.covers(block) => None,
            Some(p) => match p.write.explains_version(block, found, &current) {
                Ok(()) => return Ok(()),
                // What was acknowledged is there, if it was durable or the
                // members lived on.
                Err(why) if p.settled && (!crash.power || p.write.fua) => {
                    return Err(format!("the write was acknowledged: {why}"));
                }
                Err(why) => Some(why),
            },
        };
        let durable = self.durable.get(&block).cloned().unwrap_or_else(|| Some(zeros()));
        let fits = match since {
            None => *found == current,
            Some(since) => *found == durable || since.iter().any(|(_, version)| version == found),
        };
        if fits {
            return Ok(());
        }
        let versions = since.map_or(1, |since| since.len() + 1);
        let what = match found {
            None => "it is lost, and no member was".to_owned(),
            Some(found) if found.iter().all(|byte| *byte == 0) => "it is zeros".to_owned(),
            Some(found) => format!("it is none of {versions} versions: {}", parts(found, &current)),
        };
        let why = why.map_or(String::new(), |why| format!("; as the write under way: {why}"));
        Err(format!("{what}{why}"))
    }

    /// A block was found so, after a crash (MODEL-3).
    pub fn learn(&mut self, crash: &Crash, block: u64, found: Version) {
        if crash.power || self.version(block) != found {
            self.settle(block, found, crash.power);
        }
    }
}

/// Which 512-byte units of a block are not as they were.
fn parts(found: &Block, current: &Version) -> String {
    let Some(current) = current else { return "it was lost before".to_owned() };
    let units = found.chunks_exact(512).zip(current.chunks_exact(512));
    let differ = units.map(|(found, current)| if found == current { '=' } else { '#' });
    format!("against the newest, by 512 bytes, {}", differ.collect::<String>())
}

const _: () = assert!(BLOCK.is_multiple_of(512));

#[cfg(test)]
mod tests {
    use super::*;

    fn version(byte: u8) -> Version {
        Some(block_of(&[byte; BLOCK]))
    }

    /// Which of the versions 0 to 4, and lost, may be found of block 7.
    fn possible(model: &Model, crash: &Crash) -> Vec<&'static str> {
        let names = ["0", "1", "2", "3", "4"];
        let fits = |found: &Version| model.explains(crash, 7, found).is_ok();
        let bytes = names.iter().enumerate().filter(|(i, _)| fits(&version(*i as u8)));
        let bytes = bytes.map(|(_, name)| *name);
        bytes.chain(fits(&None).then_some("lost")).collect()
    }

    fn power() -> Crash {
        Crash { power: true, ..Crash::default() }
    }

    /// A write of version 4 to the first half of block 7 only, or to all.
    fn pending(bytes: usize, settled: bool, fua: bool) -> Vec<Pending> {
        let write = Write { fua, ..Write::ours(7 * BLOCK as u64, vec![4; bytes]) };
        vec![Pending { write, settled }]
    }

    /// MODEL-1 to MODEL-3.
    #[test]
    fn a_loss_of_power_brings_back_what_was_not_flushed_and_no_more() {
        let mut model = Model::default();
        model.settle(7, version(1), false);
        let covers = model.begin_flush();
        model.settle(7, version(2), false);
        assert_eq!(possible(&model, &Crash::default()), ["2"]);
        assert_eq!(possible(&model, &power()), ["0", "1", "2"]);
        model.finish_flush(covers);
        assert_eq!(possible(&model, &power()), ["1", "2"]);
        model.settle(7, version(3), true);
        assert_eq!(possible(&model, &power()), ["3"]);
    }

    /// MODEL-3: what was under way.
    #[test]
    fn a_write_under_way_is_in_or_not() {
        let mut model = Model::default();
        model.settle(7, version(1), true);
        model.settle(7, version(2), false);
        let died = |settled| Crash { pending: pending(BLOCK, settled, false), ..Crash::default() };
        assert_eq!(possible(&model, &died(false)), ["2", "4"]);
        assert_eq!(possible(&model, &died(true)), ["4"]);
        let fell = |settled, fua| Crash { pending: pending(BLOCK, settled, fua), ..power() };
        assert_eq!(possible(&model, &fell(true, false)), ["1", "2", "4"]);
        assert_eq!(possible(&model, &fell(true, true)), ["4"]);
        // Half a block over the newest, over nothing else.
        let half = Crash { pending: pending(BLOCK / 2, false, false), ..power() };
        assert_eq!(possible(&model, &half), ["1", "2"]);
        let mixed = |old: u8| Some(block_of(&[[4; BLOCK / 2], [old; BLOCK / 2]].concat()));
        assert!(model.explains(&half, 7, &mixed(2)).is_ok());
        assert!(model.explains(&half, 7, &mixed(1)).is_err());
    }

    /// MODEL-4, MODEL-5.
    #[test]
    fn a_block_is_lost_only_with_a_member_and_stays_so() {
        let lost = |power, member_lost| Crash { power, member_lost, ..Crash::default() };
        let mut model = Model::default();
        model.settle(7, version(1), false);
        assert_eq!(possible(&model, &lost(true, true)), ["0", "1", "lost"]);
        assert_eq!(possible(&model, &lost(false, true)), ["1"]);
        model.finish_flush(model.begin_flush());
        assert_eq!(possible(&model, &lost(true, true)), ["1"]);
        model.settle(7, None, true);
        assert_eq!(possible(&model, &lost(true, false)), ["lost"]);
        let half = Crash { pending: pending(BLOCK / 2, false, false), ..Crash::default() };
        assert_eq!(possible(&model, &half), ["lost"]);
        let whole = Crash { pending: pending(BLOCK, false, false), ..Crash::default() };
        assert_eq!(possible(&model, &whole), ["4", "lost"]);
    }
}
