//! Whether images fit the rules, by the format alone.
//!
//! The checker shares with the array only what the format defines: geometry,
//! superblocks, tuples, the checksum. How the array got there it does not
//! know.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use stableio_array::tuple::{Owner, Sector, State, Tuple, parse_page};
use stableio_array::{Geometry, Probe, Superblock, geometry::Place};
use stableio_mem::BLOCK;
use stableio_onepass::{self as onepass, gf};

use crate::image::Image;

const BLOCK64: u64 = BLOCK as u64;

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// CHECK-1: a block without the guard that its tuple says.
    Guard {
        /// The block.
        block: u64,
    },
    /// CHECK-2: parity that is not the XOR of its row.
    Parity {
        /// Stripe.
        stripe: u64,
        /// Row in it.
        row: u32,
    },
    /// CHECK-3: two tuples of one block, or one of another block.
    Tuples {
        /// The block.
        block: u64,
    },
    /// A page of tuples that is none.
    Page {
        /// The page.
        page: u64,
        /// Whose.
        member: usize,
    },
    /// CHECK-4 or CHECK-5: content that nobody wrote.
    Content {
        /// The block.
        block: u64,
        /// What is wrong.
        why: String,
    },
    /// Anything else that must not be.
    Other(String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Guard { block } => {
                write!(f, "CHECK-1: block {block} does not match its guard")
            }
            Finding::Parity { stripe, row } => {
                write!(f, "CHECK-2: row {row} of stripe {stripe}: the parity is not of its blocks")
            }
            Finding::Tuples { block } => write!(f, "CHECK-3: block {block}: its tuples differ"),
            Finding::Page { page, member } => {
                write!(f, "page {page} of tuples on member {member} is damaged")
            }
            Finding::Content { block, why } => write!(f, "CHECK-4/5: block {block}: {why}"),
            Finding::Other(what) => f.write_str(what),
        }
    }
}

/// Looks at the images of an array's members.
pub struct Checker {
    geometry: Geometry,
    superblock: Superblock,
    images: Vec<Option<Image>>,
    /// By page and member, as they were parsed.
    pages: RefCell<HashMap<(u64, usize), Page>>,
    /// Whether everything was looked through before.
    scrubbed: bool,
}

/// The tuples of a page; `None` where it is damaged.
type Page = Rc<Option<Vec<Tuple>>>;

impl Checker {
    /// Of these images by role; `None` is a member that is not there.
    pub fn new(superblock: &Superblock, images: Vec<Option<Image>>) -> Self {
        let superblock = superblock.clone();
        let (geometry, pages) = (superblock.geometry, RefCell::default());
        Self { geometry, superblock, images, pages, scrubbed: false }
    }

    /// The same after everything was looked through, and mended.
    pub fn after_scrub(self) -> Self {
        Self { scrubbed: true, ..self }
    }

    /// Looks at every row.
    pub fn all(&self) -> Vec<Finding> {
        let g = &self.geometry;
        let rows = (0..g.stripes).flat_map(|s| (0..g.chunk_blocks).map(move |r| (s, r)));
        rows.flat_map(|(stripe, row)| self.row(stripe, row)).collect()
    }

    /// Looks at the rows of some blocks.
    pub fn rows_of(&self, blocks: std::ops::Range<u64>) -> Vec<Finding> {
        let places = blocks.map(|b| self.geometry.place(b));
        let mut rows: Vec<_> = places.map(|p| (p.stripe, p.row)).collect();
        rows.sort_unstable();
        rows.dedup();
        rows.into_iter().flat_map(|(stripe, row)| self.row(stripe, row)).collect()
    }

    /// Looks at one row: CHECK-1 to CHECK-3.
    pub fn row(&self, stripe: u64, row: u32) -> Vec<Finding> {
        let g = &self.geometry;
        let mut findings = Vec::new();
        let mut sums = [[0; BLOCK]; 2];
        let (mut any, mut whole) = (false, true);
        let mut q = None;
        for column in 0..g.width() {
            let place = Place { stripe, row, column };
            let block = block_number(g, place);
            let said: Vec<Tuple> = g
                .tuple_holders(stripe, column)
                .filter_map(|member| self.tuple_at(place, member, &mut findings))
                .collect();
            if said.iter().any(|tuple| *tuple != said[0]) {
                findings.push(Finding::Tuples { block });
                continue;
            }
            let Some(tuple) = said.first().copied() else { continue };
            if column == g.columns() {
                q = Some(tuple);
                continue;
            }
            // Parity then counts only where guards say what is in it.
            whole &= tuple.state != State::Lost || self.superblock.checksums;
            if tuple.state != State::Written {
                continue;
            }
            any = true;
            if tuple.reference != block as u32 {
                findings.push(Finding::Tuples { block });
            }
            let copies: Vec<&[u8; BLOCK]> =
                g.holders(stripe, column).filter_map(|m| self.data(place, m)).collect();
            let fits = |data: &&[u8; BLOCK]| tuple.fits(|| onepass::guard(&data[..]));
            if !copies.iter().all(|data| fits(data) && *data == copies[0]) {
                findings.push(Finding::Guard { block });
            }
            let Some(data) = copies.first() else {
                whole = false;
                continue;
            };
            onepass::xor_into(&mut sums[0], &data[..]);
            gf::mul_xor_into(&mut sums[1], &data[..], gf::exp(column));
        }
        let parities = [g.parity_member(stripe), g.q_member(stripe)];
        let place = Place { stripe, row, column: g.columns() };
        for (member, sum) in parities.into_iter().zip(&sums) {
            let stored = member.and_then(|member| self.data(place, member));
            if any && whole && stored.is_some_and(|stored| stored != sum) {
                findings.push(Finding::Parity { stripe, row });
            }
        }
        let has_q = parities[1].is_some_and(|member| self.images[member].is_some());
        // Where none of those that have the tuple of Q could be read, once, it
        // is forgotten until a scrub.
        let forgotten = |tuple: &Tuple| !self.scrubbed && tuple.state == State::Lost;
        let q = q.filter(|tuple| any && whole && has_q && !forgotten(tuple));
        if q.is_some_and(|tuple| !tuple.matches(onepass::guard(&sums[1]))) {
            findings.push(Finding::Tuples { block: block_number(g, place) });
        }
        findings
    }

    /// What a block reads as: `None` where it is lost or its member missing.
    pub fn content(&self, block: u64) -> Option<[u8; BLOCK]> {
        let place = self.geometry.place(block);
        let mut holders = self.geometry.holders(place.stripe, place.column);
        let member = holders.find(|member| self.images[*member].is_some())?;
        match self.tuple_at(place, member, &mut Vec::new())?.state {
            State::Unwritten => Some([0; BLOCK]),
            State::Written => self.data(place, member).copied(),
            State::Lost => None,
        }
    }

    fn data(&self, place: Place, member: usize) -> Option<&[u8; BLOCK]> {
        let g = &self.geometry;
        let image = self.images[member].as_ref()?;
        Some(image.block(g.member_offset(place.stripe, place.row) / BLOCK64))
    }

    /// The tuple of a block as a member has it, beside data or parity.
    fn tuple_at(&self, place: Place, member: usize, findings: &mut Vec<Finding>) -> Option<Tuple> {
        let g = &self.geometry;
        let (page, record) = g.page_of(place.stripe, place.row);
        let tuples = self.page(page, member)?;
        let Some(tuples) = &*tuples else {
            findings.push(Finding::Page { page, member });
            return None;
        };
        let range = g.record_range(member, g.position(place.stripe));
        let within = range.start + if range.len() > 1 { place.column } else { 0 };
        Some(tuples[record * g.record_tuples() + within])
    }

    fn page(&self, page: u64, member: usize) -> Option<Page> {
        let g = &self.geometry;
        let image = self.images[member].as_ref()?;
        let parse = || {
            let owner = Owner { array: self.superblock.array, role: member };
            let bytes = image.block(g.page_at(page) / BLOCK64);
            let mut tuples = Vec::new();
            for (range, sector) in parse_page(bytes, page, owner) {
                match sector {
                    Sector::Blank => tuples.extend(range.map(|_| Tuple::UNWRITTEN)),
                    Sector::Good(_, good) => tuples.extend(good),
                    Sector::Bad => return Rc::new(None),
                }
            }
            Rc::new(Some(tuples))
        };
        Some(self.pages.borrow_mut().entry((page, member)).or_insert_with(parse).clone())
    }
}

/// The number of a block on the array.
pub(crate) fn block_number(g: &Geometry, place: Place) -> u64 {
    place.stripe * g.row_shape().stripe_blocks()
        + place.column as u64 * u64::from(g.chunk_blocks)
        + u64::from(place.row)
}

/// What the superblock copies of an image say; `None` without a good one.
pub fn probe(image: &Image, path: &Path, size: u64) -> Option<Probe> {
    let copies = [0, size / BLOCK64 - 1].map(|number| Superblock::parse(image.block(number)));
    let newest = copies.into_iter().flatten().max_by_key(|copy| copy.generation)?;
    Some(Probe { path: path.into(), superblock: newest, bad_copies: Vec::new() })
}
