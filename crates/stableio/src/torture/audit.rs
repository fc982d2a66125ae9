//! The members' files, looked at without the array's engine: it shares with
//! it where things lie and how a tuple is written, and nothing else. Guards
//! and parity are made anew from the data, by the plain functions for stable
//! memory.
//!
//! The array is at rest or closed meanwhile, and has brought all its tuples to
//! the members.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::Context;
use stableio_array::geometry::{Geometry, PAGE_TUPLES, Role};
use stableio_array::probe;
use stableio_array::superblock::Superblock;
use stableio_array::tuple::{Owner, Sector, State, Tuple, parse_page};
use stableio_mem::BLOCK;
use stableio_onepass::gf;

/// What does not fit together.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Blocks, by number on the array, that do not have the guard that every
    /// copy of their tuple says, or have none any more.
    pub(super) bad_blocks: BTreeSet<u64>,
    /// Rows, by [`Geometry::row_number`], whose data does not make their
    /// parity.
    pub(super) bad_rows: BTreeSet<u64>,
    /// Good blocks in rows with something bad: with their member they would
    /// be lost, or come back as something else.
    pub(super) exposed: BTreeSet<u64>,
}

/// A member: its file, and the pages of its guard region.
struct Member {
    file: File,
    role: usize,
    /// By page; `None` for a tuple in a damaged sector.
    pages: Vec<Vec<Option<Tuple>>>,
}

/// All members by role; `None` for one that nobody looks at.
struct All {
    geometry: Geometry,
    members: Vec<Option<Member>>,
}

/// Looks at all of an array, but at the member of the role `without`.
pub(super) fn audit(members: &[PathBuf], without: Option<usize>) -> anyhow::Result<Findings> {
    let mut opened: Vec<Option<Member>> = Vec::new();
    opened.resize_with(members.len(), || None);
    let mut geometry = None;
    for (role, path) in members.iter().enumerate() {
        if Some(role) == without {
            continue;
        }
        let superblock = probe(path)?.superblock;
        geometry = Some(superblock.geometry);
        let member = Member::open(path, &superblock)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let role = member.role;
        opened[role] = Some(member);
    }
    let geometry = geometry.context("an array has members")?;
    let all = All { geometry, members: opened };
    let mut chunks: Vec<Vec<u8>> = vec![vec![0; geometry.chunk_bytes() as usize]; members.len()];
    let mut findings = Findings::default();
    for stripe in 0..geometry.stripes {
        for (member, chunk) in all.members.iter().zip(&mut chunks) {
            if let Some(member) = member {
                member.file.read_exact_at(chunk, geometry.member_offset(stripe, 0))?;
            }
        }
        for row in 0..geometry.chunk_blocks {
            let at = row as usize * BLOCK;
            let blocks: Vec<&[u8]> = chunks.iter().map(|chunk| &chunk[at..at + BLOCK]).collect();
            all.look_at_row(stripe, row, &blocks, &mut findings);
        }
    }
    Ok(findings)
}

impl All {
    /// One row; `blocks` are its blocks by member.
    fn look_at_row(&self, stripe: u64, row: u32, blocks: &[&[u8]], findings: &mut Findings) {
        let g = &self.geometry;
        let per = g.row_shape().stripe_blocks();
        let (mut p, mut q) = ([0; BLOCK], [0; BLOCK]);
        let (mut good, mut bad, mut complete) = (Vec::new(), false, true);
        for column in 0..g.columns() {
            let block = stripe * per + column as u64 * u64::from(g.chunk_blocks) + u64::from(row);
            let tuple = self.tuple(stripe, row, column);
            if tuple.is_some_and(|tuple| tuple.state == State::Unwritten) {
                continue;
            }
            let fits = |member: usize| {
                tuple.is_some_and(|tuple| {
                    tuple.matches(stableio_onepass::guard(blocks[member]))
                        && tuple.reference == block as u32
                })
            };
            let mut holders = g.holders(stripe, column).filter(|m| self.members[*m].is_some());
            // Whose member nobody looks at may be anything.
            let Some(first) = holders.next() else {
                complete = false;
                continue;
            };
            if fits(first) && holders.all(fits) {
                good.push(block);
            } else {
                bad = true;
                findings.bad_blocks.insert(block);
            }
            // A lost block counts as zeros in parity.
            if tuple.is_none_or(|tuple| tuple.state == State::Written) {
                stableio_onepass::xor_into(&mut p, blocks[first]);
                gf::mul_xor_into(&mut q, blocks[first], gf::exp(column));
            }
        }
        let written = bad || !good.is_empty();
        let sums = [(g.parity_member(stripe), p), (g.q_member(stripe), q)];
        for (is_q, (member, sum)) in sums.into_iter().enumerate() {
            let Some(member) = member.filter(|m| complete && self.members[*m].is_some()) else {
                continue;
            };
            // Q has a guard of its own; that of P follows from those of data.
            let guarded = is_q == 0
                || self
                    .tuple(stripe, row, g.columns())
                    .is_some_and(|tuple| tuple.matches(stableio_onepass::guard(blocks[member])));
            if written && (sum[..] != *blocks[member] || !guarded) {
                bad = true;
                findings.bad_rows.insert(g.row_number(stripe, row));
            }
        }
        if bad {
            findings.exposed.extend(good);
        }
    }

    /// What the members say of a column's block, if they all say the same.
    fn tuple(&self, stripe: u64, row: u32, column: usize) -> Option<Tuple> {
        let holders = self.geometry.tuple_holders(stripe, column);
        let mut copies = holders.filter_map(|m| self.members[m].as_ref());
        let first = copies.next()?.tuple(&self.geometry, stripe, row, column)?;
        copies
            .all(|member| member.tuple(&self.geometry, stripe, row, column) == Some(first))
            .then_some(first)
    }
}

impl Member {
    fn open(path: &PathBuf, superblock: &Superblock) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let geometry = &superblock.geometry;
        let owner = Owner { array: superblock.array, role: superblock.role };
        let mut bytes = vec![0; geometry.pages() as usize * BLOCK];
        file.read_exact_at(&mut bytes, geometry.page_at(0))?;
        let parse = |(page, number): (&[u8], u64)| {
            let mut tuples = vec![None; PAGE_TUPLES];
            for (range, sector) in parse_page(page, number, owner) {
                match sector {
                    Sector::Blank => tuples[range].fill(Some(Tuple::UNWRITTEN)),
                    Sector::Good(_, found) => {
                        tuples[range].iter_mut().zip(found).for_each(|(t, new)| *t = Some(new));
                    }
                    Sector::Bad => {}
                }
            }
            tuples
        };
        let pages = bytes.chunks_exact(BLOCK).zip(0..).map(parse).collect();
        Ok(Self { file, role: superblock.role, pages })
    }

    /// What this member says of a block of its own, or of one that it has the
    /// parity of; `None` if the sector is damaged.
    fn tuple(&self, geometry: &Geometry, stripe: u64, row: u32, column: usize) -> Option<Tuple> {
        let (page, record) = geometry.page_of(stripe, row);
        let first = geometry.record_range(self.role, geometry.position(stripe)).start;
        let offset = match geometry.role(stripe, self.role) {
            Role::Data(_) => 0,
            Role::P | Role::Q => column,
        };
        self.pages[page as usize][record * geometry.record_tuples() + first + offset]
    }
}
