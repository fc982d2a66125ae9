//! How a world ends, and what is left of it for the next one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use stableio_array::{AssembleError, Assembly, assemble};
use stableio_mem::BLOCK;

use super::World;
use crate::check::probe;
use crate::coverage::{Coverage, Event};
use crate::image::Image;
use crate::medium::Medium;
use crate::member::Wreck;
use crate::model::Model;
use crate::random::Random;
use crate::shape::{Region, Shape, region};

/// What is left when a world ends.
#[derive(Clone)]
pub struct Remains {
    /// By role, what members hold; `None` is missing.
    pub media: Vec<Option<Medium>>,
    /// By role, another medium: one that was being filled to take the place,
    /// or one whose place was taken.
    pub others: Vec<Option<Medium>>,
    /// What the array should read as.
    pub model: Model,
    /// Every later choice.
    pub random: Random,
    /// What happened so far.
    pub coverage: Coverage,
}

/// How a world ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The process dies (SIM-4).
    Death,
    /// Power is lost (SIM-5).
    Power,
}

impl Remains {
    /// Members of a new array.
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let images = shape.create(&mut random);
        Self {
            media: images.into_iter().map(|image| Some(Medium::new(image))).collect(),
            others: vec![None; shape.members],
            model: Model::default(),
            random,
            coverage: Coverage::default(),
        }
    }

    /// What a read of the members sees.
    pub fn images(&self) -> Vec<Option<Image>> {
        self.media.iter().map(|m| m.as_ref().map(|m| m.live().clone())).collect()
    }

    /// All media that are there, with their names.
    pub fn named(&self) -> impl Iterator<Item = (String, usize, &Medium)> {
        let slots = [&self.media, &self.others].into_iter().enumerate();
        slots.flat_map(|(slot, media)| {
            let media = media.iter().enumerate();
            media.filter_map(move |(role, m)| Some((name(slot, role), role, m.as_ref()?)))
        })
    }

    /// What the array makes of the members, by role; `trust` is the role to
    /// believe.
    ///
    /// # Errors
    ///
    /// Why they do not assemble.
    pub fn assemble(&self, shape: &Shape, trust: Option<usize>) -> Result<Assembly, AssembleError> {
        let probes = self.named().filter_map(|(name, _, medium)| {
            probe(medium.live(), Path::new(&name), shape.member_size)
        });
        let trust = trust.map(|role| name(0, role));
        assemble(&probes.collect::<Vec<_>>(), trust.as_deref().map(Path::new))
    }

    /// Of a role's two media the one that the array believes is its member's
    /// from now on.
    pub fn sort(&mut self, assembly: &Assembly) {
        for (role, member) in assembly.members.iter().enumerate() {
            if member.as_deref() == Some(Path::new(&name(1, role))) {
                std::mem::swap(&mut self.media[role], &mut self.others[role]);
            }
        }
    }
}

/// The name of a medium; slot 1 is that of the others.
pub(super) fn name(slot: usize, role: usize) -> String {
    format!("{}{role}", ["m", "r"][slot])
}

impl World {
    /// The world ends; gives what is left of it.
    pub fn stop(mut self, stop: Stop) -> Remains {
        self.note_replaced();
        self.tell(|| format!("{stop:?}"));
        self.note_stop(stop);
        let g = self.array.superblock().geometry;
        let atomic = self.shape.atomic as usize;
        let (mut media, mut others) = (Vec::new(), Vec::new());
        for (role, left) in std::mem::take(&mut self.left_out).into_iter().enumerate() {
            let other = self.incoming[role].take().or(self.replaced[role].take());
            let slots = [self.members[role].take(), other].into_iter().zip(left);
            let mut left = slots.map(|(member, left)| match (member, left) {
                (None, Some(mut medium)) if stop == Stop::Power => {
                    medium.lose_power(BTreeMap::new(), atomic, &mut self.random);
                    Some(medium)
                }
                (None, left) => left,
                (Some(member), _) => {
                    let wreck = match stop {
                        Stop::Death => member.crash(),
                        Stop::Power => member.lose_power(),
                    };
                    self.coverage.note_wreck(&wreck, |at| region(&g, at));
                    Some(wreck.medium)
                }
            });
            media.push(left.next().flatten());
            others.push(left.next().flatten());
        }
        let Self { model, random, coverage, executor, .. } = self;
        drop(executor);
        Remains { media, others, model, random, coverage }
    }

    fn note_stop(&mut self, stop: Stop) {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let health = self.array.health();
        let coverage = &mut self.coverage;
        let rebuilding = self.incoming.iter().flatten().any(|member| !member.is_broken());
        coverage.add(Event::CrashesInRebuild, u64::from(rebuilding));
        let scrubbing = self.scrubbing && health.scrub.how_far().is_some();
        coverage.add(Event::CrashesInScrubs, u64::from(scrubbing));
        coverage.add(Event::PrivateRereads, read(&health.benign_mismatches));
        coverage.add(Event::BlocksMended, read(&health.blocks_mended));
        coverage.add(Event::StripesJoined, read(&health.stripes_joined));
        coverage.add(Event::RowsRecovered, read(&health.rows_recovered));
        coverage.add(Event::LostBlocks, read(&health.blocks_lost));
        coverage.note(match stop {
            Stop::Death => Event::ProcessDeaths,
            Stop::Power => Event::PowerFailures,
        });
    }

    /// The process dies and the array is opened again.
    ///
    /// # Errors
    ///
    /// When it does not open.
    pub fn crash_and_open(self) -> Result<Self, String> {
        let shape = self.shape.clone();
        Self::open(&shape, self.stop(Stop::Death), None)
    }
}

impl Coverage {
    fn note_wreck(&mut self, wreck: &Wreck, region: impl Fn(u64) -> Region) {
        for range in &wreck.under_way {
            self.note(match region(range.start) {
                Region::Superblock => Event::CrashesInSuperblockWrites,
                Region::Log => Event::CrashesInLogWrites,
                Region::Guards => Event::CrashesInGuardWrites,
                Region::Data => Event::CrashesInDataWrites,
            });
        }
        for number in &wreck.torn {
            match region(number * BLOCK as u64) {
                Region::Superblock => {}
                Region::Log => self.note(Event::TornLogBlocks),
                Region::Guards => self.note(Event::TornGuardBlocks),
                Region::Data => self.note(Event::TornDataBlocks),
            }
        }
    }
}
