//! What of a world is looked at: its members by the rules, its blocks by the
//! model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stableio_array::TendError;
use stableio_block::{Error, Kind};
use stableio_mem::BLOCK;

use super::World;
use crate::check::{Checker, Finding};
use crate::extract::Extracted;
use crate::image::block_of;
use crate::member::SimMember;
use crate::model::{Crash, Version};
use crate::write::Write;

/// Blocks that are looked at by one read.
const LOOK: u64 = 16;

impl World {
    /// What the members hold now, for the checker; without those that broke
    /// down or were dropped.
    ///
    /// # Panics
    ///
    /// When tuples can not be written to their pages.
    pub fn checker(&mut self) -> Checker {
        let written = self.array.device().checkpoint();
        match self.finish_tending(written) {
            // A closed array has written them.
            Ok(()) | Err(TendError::Array(Kind::Stopped)) => {}
            Err(error) => panic!("tuples were not written: {error}"),
        }
        self.note_replaced();
        let image = |(role, member): (usize, &Option<Arc<SimMember>>)| {
            member.as_ref().filter(|_| self.in_sync(role)).map(|m| m.live())
        };
        let images = self.members.iter().enumerate().map(image).collect();
        Checker::new(self.array.superblock(), images)
    }

    /// After a write settled with nothing else under way in its rows: its
    /// rows fit, its content is what may be; the model learns that.
    pub fn absorb(&mut self, write: &Write) -> Vec<Finding> {
        let checker = self.checker();
        let mut findings = checker.rows_of(write.blocks());
        for block in write.blocks() {
            let Some(found) = checker.content(block) else { continue };
            if let Err(why) = write.explains(block, &found, &self.model.block(block)[..]) {
                findings.push(Finding::Content { block, why });
            }
            self.model.settle(block, Some(Arc::new(found)), write.fua);
        }
        if let Err(why) = write.explains_whole(&self.model) {
            findings.push(Finding::Content { block: write.blocks().start, why });
        }
        findings
    }

    /// After a write settled: its content, as it reads, is what may be; the
    /// model learns that. One that failed may have been done in part.
    pub fn learn(&mut self, write: &Write, failed: bool) -> Vec<Finding> {
        if write.is_known() && !failed {
            self.model.apply(write);
            return Vec::new();
        }
        let mut findings = Vec::new();
        for (block, found) in self.look_at(&write.blocks().collect()) {
            let old = self.model.version(block);
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    findings.push(Finding::Content { block, why: error.to_string() });
                    continue;
                }
            };
            let fits = match failed && found == old {
                true => Ok(()),
                false => write.explains_version(block, &found, &old),
            };
            findings.extend(fits.err().map(|why| Finding::Content { block, why }));
            if found != old {
                self.model.settle(block, found, write.fua && !failed);
            } else if write.fua && !failed {
                self.model.settle(block, old, true);
            }
        }
        if let Err(why) = write.explains_whole(&self.model)
            && !failed
        {
            findings.push(Finding::Content { block: write.blocks().start, why });
        }
        findings
    }

    /// Reads blocks; a lost one is `None`.
    fn look_at(&mut self, blocks: &BTreeSet<u64>) -> BTreeMap<u64, Result<Version, Error>> {
        let mut found = BTreeMap::new();
        let mut left = blocks.iter().copied().peekable();
        while let Some(first) = left.next() {
            let mut end = first + 1;
            while end < first + LOOK && left.next_if_eq(&end).is_some() {
                end += 1;
            }
            if let Ok(bytes) = self.read(first * BLOCK as u64, (end - first) as usize * BLOCK) {
                let versions = bytes.chunks_exact(BLOCK).map(|bytes| Ok(Some(block_of(bytes))));
                found.extend((first..end).zip(versions));
                continue;
            }
            for block in first..end {
                let version = match self.read(block * BLOCK as u64, BLOCK) {
                    Ok(bytes) => Ok(Some(block_of(&bytes))),
                    Err(error) if error.kind == Kind::Lost => Ok(None),
                    Err(error) => Err(error),
                };
                found.insert(block, version);
            }
        }
        found
    }

    /// Everything reads as the model says; any read error is allowed of the
    /// blocks in `lost`.
    pub fn read_all(&mut self, lost: &BTreeSet<u64>) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (block, found) in self.look_at(&(0..self.size() / BLOCK as u64).collect()) {
            let why = match found {
                Ok(found) if found == self.model.version(block) => continue,
                Ok(None) | Err(_) if lost.contains(&block) => continue,
                Ok(None) => Error { kind: Kind::Lost, ..self.error_at(block) }.to_string(),
                Ok(Some(_)) if self.model.is_lost(block) => "is lost no more".to_owned(),
                Ok(Some(_)) => "reads as something else".to_owned(),
                Err(error) => error.to_string(),
            };
            findings.push(Finding::Content { block, why });
        }
        findings
    }

    /// Everything reads as what was taken out of the members before.
    pub fn compare(&mut self, extracted: &Extracted) -> Vec<Finding> {
        let blocks = self.size() / BLOCK as u64;
        if extracted.len() as u64 != self.size() {
            let (len, size) = (extracted.len(), self.size());
            return vec![Finding::Other(format!("extract: {len} bytes of an array of {size}"))];
        }
        let found = self.look_at(&(0..blocks).collect());
        let differ = found.into_iter().filter_map(|(block, found)| {
            let taken = extracted.version(block);
            let why = match found {
                Err(error) => error.to_string(),
                Ok(found) if found == taken => return None,
                Ok(found) => {
                    let what = |version: &Version| if version.is_some() { "there" } else { "lost" };
                    format!("extract: it is {}, on the array {}", what(&taken), what(&found))
                }
            };
            Some(Finding::Content { block, why })
        });
        differ.collect()
    }

    fn error_at(&self, block: u64) -> Error {
        let (op, device) = (stableio_block::OpName::Read, "sim".into());
        Error { kind: Kind::Lost, op, device, at: block * BLOCK as u64, len: BLOCK as u64 }
    }

    /// Nothing is under way and nothing of it is left.
    pub fn leftovers(&mut self) -> Vec<Finding> {
        self.quiet();
        let used = self.pool.used();
        // No member of such a world is wrong without saying so.
        let differed = self.health().blocks_differed.load(Ordering::Relaxed);
        [
            (used > 0).then(|| format!("POOL-1: {used} bytes are held by nobody")),
            (differed > 0).then(|| format!("COMPARE-1: {differed} blocks differed in a scrub")),
        ]
        .into_iter()
        .flatten()
        .map(Finding::Other)
        .collect()
    }

    /// After a crash, and once the array is open again: what may have more
    /// than one version is looked at; the model learns which it is. Gives the
    /// blocks that are lost, too.
    pub fn absorb_crash(&mut self, crash: &Crash) -> (Vec<Finding>, Vec<u64>) {
        let (mut findings, mut lost) = (Vec::new(), Vec::new());
        for (block, found) in self.look_at(&self.model.at_risk(crash)) {
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    findings.push(Finding::Content { block, why: error.to_string() });
                    continue;
                }
            };
            if let Err(why) = self.model.explains(crash, block, &found) {
                findings.push(Finding::Content { block, why });
            }
            lost.extend(found.is_none().then_some(block));
            self.model.learn(crash, block, found);
        }
        (findings, lost)
    }
}
