//! Rows of all members that long work looks at together: as they follow each
//! other on a member, whatever stripe they are of.

use std::ops::Range;

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf, Reservation};

use crate::engine::Engine;
use crate::member::Sent;
use crate::repair::{BENCH, guard_of};

/// Rows of a window.
pub(crate) const ROWS: u64 = 64;

/// What some members have in some rows.
pub(crate) struct Window {
    /// Row numbers.
    pub(crate) rows: Range<u64>,
    /// By member, its blocks.
    pub(crate) buf: PoolBuf,
    /// By member, whether it gave them.
    pub(crate) came: SmallVec<[bool; 16]>,
    sent: Vec<(usize, Sent)>,
}

impl Window {
    /// The guard of a member's block of a row.
    pub(crate) fn guard(&mut self, member: usize, row: u64) -> u64 {
        let at = self.at(member, row);
        guard_of(&mut self.buf, at)
    }

    /// Where a member's block of a row is.
    pub(crate) fn at(&self, member: usize, row: u64) -> usize {
        (member * ROWS as usize + (row - self.rows.start) as usize) * BLOCK
    }
}

/// Windows that are read one after the other, one ahead.
pub(crate) struct Ahead {
    rows: std::vec::IntoIter<Range<u64>>,
    members: Vec<usize>,
    begun: Option<Window>,
}

impl Ahead {
    /// These windows, of these members.
    pub(crate) fn new(windows: Vec<Range<u64>>, members: Vec<usize>) -> Self {
        Self { rows: windows.into_iter(), members, begun: None }
    }
}

/// Memory of a piece of long work.
pub(crate) struct Work {
    windows: Vec<PoolBuf>,
    bench: Option<PoolBuf>,
    block: Option<PoolBuf>,
    out: Option<PoolBuf>,
    memory: Reservation,
    members: usize,
}

impl Work {
    /// Bytes for two windows, one beside them, and mending.
    pub(crate) fn bytes(members: usize) -> usize {
        (2 * members + 1) * ROWS as usize * BLOCK + BLOCK + BENCH
    }

    pub(crate) fn new(memory: Reservation, members: usize) -> Self {
        Self { windows: Vec::new(), bench: None, block: None, out: None, memory, members }
    }

    fn window(&mut self) -> PoolBuf {
        let len = self.members * ROWS as usize * BLOCK;
        self.windows.pop().unwrap_or_else(|| self.memory.take(len))
    }

    /// Takes a window's memory back, for the next.
    pub(crate) fn done_with(&mut self, window: Window) {
        self.windows.push(window.buf);
    }

    /// Where blocks are mended.
    pub(crate) fn bench(&mut self) -> &mut PoolBuf {
        self.bench.get_or_insert_with(|| self.memory.take(BENCH))
    }

    /// A block, to be given back.
    pub(crate) fn block(&mut self) -> PoolBuf {
        self.block.take().unwrap_or_else(|| self.memory.take(BLOCK))
    }

    pub(crate) fn give_block(&mut self, block: PoolBuf) {
        self.block = Some(block);
    }

    /// As many blocks as a window has rows, to be given back.
    pub(crate) fn out(&mut self) -> PoolBuf {
        self.out.take().unwrap_or_else(|| self.memory.take(ROWS as usize * BLOCK))
    }

    pub(crate) fn give_out(&mut self, out: PoolBuf) {
        self.out = Some(out);
    }
}

impl Engine {
    /// The windows of some rows in which any block is written.
    pub(crate) async fn windows(&self, rows: Range<u64>) -> Result<Vec<Range<u64>>, Kind> {
        let mut windows = Vec::new();
        for first in rows.clone().step_by(ROWS as usize) {
            let window = first..(first + ROWS).min(rows.end);
            for number in window.clone() {
                let (stripe, row) = self.geometry.row_at(number);
                if self.page(stripe, row).await?.parity_guard(stripe, row).is_some() {
                    windows.push(window);
                    break;
                }
            }
        }
        Ok(windows)
    }

    /// The next window, as it came; the one behind it is begun, so that it
    /// comes while this one is looked at.
    pub(crate) async fn next_window(&self, ahead: &mut Ahead, work: &mut Work) -> Option<Window> {
        let begun = ahead.begun.take().or_else(|| self.begin_next(ahead, work));
        ahead.begun = self.begin_next(ahead, work);
        let mut window = begun?;
        self.finish_window(&mut window).await;
        Some(window)
    }

    fn begin_next(&self, ahead: &mut Ahead, work: &mut Work) -> Option<Window> {
        ahead.rows.next().map(|rows| self.begin_window(rows, &ahead.members, work))
    }

    /// Begins to read a window from some members.
    fn begin_window(&self, rows: Range<u64>, members: &[usize], work: &mut Work) -> Window {
        let came = smallvec::smallvec![false; self.members.len()];
        let mut window = Window { rows, buf: work.window(), came, sent: Vec::new() };
        let (stripe, row) = self.geometry.row_at(window.rows.start);
        let at = self.geometry.member_offset(stripe, row);
        let len = (window.rows.end - window.rows.start) as usize * BLOCK;
        for &member in members.iter().filter(|m| self.holds(**m, stripe)) {
            let from = window.at(member, window.rows.start);
            let list = window.buf.target(from..from + len);
            window.sent.push((member, self.read_member(member, at, list)));
        }
        window
    }

    /// Waits for a window.
    async fn finish_window(&self, window: &mut Window) {
        let mut given_up = false;
        for (member, sent) in std::mem::take(&mut window.sent) {
            match self.arrived(sent).await {
                Ok(_) => window.came[member] = true,
                Err(error) => {
                    given_up |= error.kind == Kind::Stalled;
                    self.note_read_error(member, &error);
                }
            }
        }
        if given_up {
            // What the device may still write to is not looked at (MEMBER-1).
            window.buf = self.instead(window.buf.len());
            window.came.iter_mut().for_each(|came| *came = false);
        }
    }
}
