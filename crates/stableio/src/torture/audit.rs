//! The members' files, looked at without the array's engine: it shares with
//! it where things lie and how a tuple is written, and nothing else. Guards
//! and parity are made anew from the data, by the plain functions for stable
//! memory.
//!
//! The array is at rest or closed meanwhile.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::Context;
use stableio_array::geometry::{Geometry, Role};
use stableio_array::probe;
use stableio_array::superblock::Superblock;
use stableio_array::tuple::{Owner, ParsedPage, State, Tuple, parse_page};
use stableio_mem::BLOCK;

/// What does not fit together.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Blocks, by number on the array, that do not have the guard that either
    /// copy of their tuple says, or have none any more.
    pub(super) bad_blocks: BTreeSet<u64>,
    /// Rows, by [`Geometry::row_number`], whose data does not XOR to their
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
    pages: Vec<ParsedPage>,
}

/// Looks at all of an array.
pub(super) fn audit(members: &[PathBuf]) -> anyhow::Result<Findings> {
    let mut opened = Vec::with_capacity(members.len());
    let mut geometry = None;
    for path in members {
        let superblock = probe(path)?.superblock;
        geometry = Some(superblock.geometry);
        let member = Member::open(path, &superblock);
        opened.push(member.with_context(|| format!("cannot read {}", path.display()))?);
    }
    opened.sort_by_key(|member| member.role);
    let geometry = geometry.context("an array has members")?;
    let mut chunks: Vec<Vec<u8>> = vec![vec![0; geometry.chunk_bytes() as usize]; opened.len()];
    let mut findings = Findings::default();
    for stripe in 0..geometry.stripes {
        for (member, chunk) in opened.iter().zip(&mut chunks) {
            member.file.read_exact_at(chunk, geometry.member_offset(stripe, 0))?;
        }
        for row in 0..geometry.chunk_blocks {
            let at = row as usize * BLOCK;
            let blocks: Vec<&[u8]> = chunks.iter().map(|chunk| &chunk[at..at + BLOCK]).collect();
            look_at_row(&geometry, &opened, stripe, row, &blocks, &mut findings);
        }
    }
    Ok(findings)
}

/// One row; `blocks` are its blocks by member.
fn look_at_row(
    geometry: &Geometry,
    members: &[Member],
    stripe: u64,
    row: u32,
    blocks: &[&[u8]],
    findings: &mut Findings,
) {
    let per = geometry.row_shape().stripe_blocks();
    let parity_member = geometry.parity_member(stripe);
    let mut sum = [0; BLOCK];
    let (mut good, mut bad) = (Vec::new(), false);
    for column in 0..geometry.columns() {
        let member = geometry.data_member(stripe, column);
        let block =
            stripe * per + column as u64 * u64::from(geometry.chunk_blocks) + u64::from(row);
        let own = members[member].tuple(geometry, stripe, row, column);
        let copy = parity_member.map(|m| members[m].tuple(geometry, stripe, row, column));
        let tuple = own.filter(|tuple| copy.is_none_or(|copy| copy == Some(*tuple)));
        match tuple {
            Some(Tuple { state: State::Unwritten, .. }) => continue,
            Some(tuple)
                if tuple.matches(stableio_onepass::guard(blocks[member]))
                    && tuple.reference == block as u32 =>
            {
                good.push(block);
            }
            _ => {
                bad = true;
                findings.bad_blocks.insert(block);
            }
        }
        // A lost block counts as zeros in parity.
        if tuple.is_none_or(|tuple| tuple.state == State::Written) {
            stableio_onepass::xor_into(&mut sum, blocks[member]);
        }
    }
    let Some(parity) = parity_member else { return };
    if (bad || !good.is_empty()) && sum[..] != *blocks[parity] {
        bad = true;
        findings.bad_rows.insert(geometry.row_number(stripe, row));
    }
    if bad {
        findings.exposed.extend(good);
    }
}

impl Member {
    fn open(path: &PathBuf, superblock: &Superblock) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let geometry = &superblock.geometry;
        let owner = Owner { array: superblock.array, role: superblock.role };
        let count = geometry.page_rows() * geometry.record_tuples();
        let mut bytes = vec![0; geometry.pages() as usize * BLOCK];
        file.read_exact_at(&mut bytes, geometry.page_at(0))?;
        let pages = bytes.chunks_exact(BLOCK).zip(0..);
        let pages = pages.map(|(page, number)| parse_page(page, number, owner, count)).collect();
        Ok(Self { file, role: superblock.role, pages })
    }

    /// What this member says of a block of its own, or of one that it has the
    /// parity of; `None` if the page is damaged.
    fn tuple(&self, geometry: &Geometry, stripe: u64, row: u32, column: usize) -> Option<Tuple> {
        let (page, record) = geometry.page_of(stripe, row);
        let position = (stripe % geometry.members as u64) as usize;
        let first = geometry.record_range(self.role, position).start;
        let offset = match geometry.role(stripe, self.role) {
            Role::Data(_) => 0,
            Role::Parity => column,
        };
        match &self.pages[page as usize] {
            ParsedPage::Blank => Some(Tuple::UNWRITTEN),
            ParsedPage::Good(_, tuples) => {
                tuples.get(record * geometry.record_tuples() + first + offset).copied()
            }
            ParsedPage::Bad => None,
        }
    }
}
