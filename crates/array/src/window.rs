//! Rows of all members that long work looks at together: as they follow each
//! other on a member, whatever stripe they are of.

use std::collections::VecDeque;
use std::ops::Range;

use smallvec::SmallVec;
use stableio_block::Kind;
use stableio_mem::{BLOCK, PoolBuf, Reservation};

use crate::engine::Engine;
use crate::member::Sent;
use crate::repair::BENCH;

/// Rows of a window.
pub(crate) const ROWS: u64 = 64;
/// Windows that memory is for: one is looked at, the others are on their way,
/// so that no device waits.
const AHEAD: usize = 5;
/// Windows that are on their way to a member that is being filled, and the
/// one that is made meanwhile.
const OUT: usize = 2;

/// What some members have in some rows.
pub(crate) struct Window {
    /// Row numbers.
    pub(crate) rows: Range<u64>,
    /// By member, its blocks.
    buf: PoolBuf,
    /// By member, whether it gave them.
    pub(crate) came: SmallVec<[bool; 16]>,
    /// By member and row, once they are asked for.
    guards: Vec<u64>,
    sent: Vec<(usize, Sent)>,
}

impl Window {
    /// Computes the guards of all that came.
    pub(crate) fn sum(&mut self) {
        self.guards.resize(self.came.len() * ROWS as usize, 0);
        let len = (self.rows.end - self.rows.start) as usize * BLOCK;
        for member in (0..self.came.len()).filter(|member| self.came[*member]) {
            let first = member * ROWS as usize;
            let mut guards = &mut self.guards[first..];
            for piece in self.buf.range_mut(first * BLOCK..first * BLOCK + len) {
                let (of_piece, rest) = guards.split_at_mut(piece.len() / BLOCK);
                stableio_onepass::guards_of(piece, of_piece);
                guards = rest;
            }
        }
    }

    /// The guard of a member's block of a row, which came; for which
    /// [`sum`](Self::sum) was called.
    pub(crate) fn guard(&self, member: usize, row: u64) -> u64 {
        self.guards[self.index(member, row)]
    }

    /// A member's block of a row, if it came.
    pub(crate) fn block(&self, member: usize, row: u64) -> Option<&[u8]> {
        let at = self.index(member, row) * BLOCK;
        self.came[member].then(|| self.buf.contiguous(at, BLOCK))
    }

    fn index(&self, member: usize, row: u64) -> usize {
        member * ROWS as usize + (row - self.rows.start) as usize
    }
}

/// Windows that are read one after the other, some ahead.
pub(crate) struct Ahead {
    rows: std::vec::IntoIter<Range<u64>>,
    members: Vec<usize>,
    begun: VecDeque<Window>,
}

impl Ahead {
    /// These windows, of these members.
    pub(crate) fn new(windows: Vec<Range<u64>>, members: Vec<usize>) -> Self {
        Self { rows: windows.into_iter(), members, begun: VecDeque::new() }
    }
}

/// Memory of a piece of long work.
pub(crate) struct Work {
    windows: Vec<PoolBuf>,
    outs: Vec<PoolBuf>,
    bench: Option<PoolBuf>,
    block: Option<PoolBuf>,
    memory: Reservation,
    members: usize,
}

impl Work {
    /// Bytes for windows, what is written of them, and mending.
    pub(crate) fn bytes(members: usize) -> usize {
        (AHEAD * members + OUT) * ROWS as usize * BLOCK + BLOCK + BENCH
    }

    pub(crate) fn new(memory: Reservation, members: usize) -> Self {
        Self { windows: vec![], outs: vec![], bench: None, block: None, memory, members }
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
        self.outs.pop().unwrap_or_else(|| self.memory.take(ROWS as usize * BLOCK))
    }

    pub(crate) fn give_out(&mut self, out: PoolBuf) {
        self.outs.push(out);
    }
}

impl Engine {
    /// The windows of some rows in which any block is written.
    pub(crate) async fn windows(&self, rows: Range<u64>) -> Result<Vec<Range<u64>>, Kind> {
        let mut windows = Vec::new();
        for first in rows.clone().step_by(ROWS as usize) {
            let window = first..(first + ROWS).min(rows.end);
            for (stripe, mut rows) in self.geometry.row_runs(window.clone()) {
                let set = self.page(stripe, rows.start).await?;
                if rows.any(|row| set.is_written(stripe, row)) {
                    windows.push(window);
                    break;
                }
            }
        }
        Ok(windows)
    }

    /// Begins to read as many windows as there is memory for.
    pub(crate) fn begin_windows(&self, ahead: &mut Ahead, work: &mut Work) {
        while ahead.begun.len() < AHEAD
            && let Some(rows) = ahead.rows.next()
        {
            ahead.begun.push_back(self.begin_window(rows, &ahead.members, work));
        }
    }

    /// The next window, as it came. Those behind it come while it is looked
    /// at.
    pub(crate) async fn next_window(&self, ahead: &mut Ahead, work: &mut Work) -> Option<Window> {
        self.begin_windows(ahead, work);
        let mut window = ahead.begun.pop_front()?;
        self.finish_window(&mut window).await;
        Some(window)
    }

    /// Begins to read a window from some members.
    fn begin_window(&self, rows: Range<u64>, members: &[usize], work: &mut Work) -> Window {
        let came = smallvec::smallvec![false; self.members.len()];
        let mut window = Window { rows, buf: work.window(), came, guards: vec![], sent: vec![] };
        let (stripe, row) = self.geometry.row_at(window.rows.start);
        let at = self.geometry.member_offset(stripe, row);
        let len = (window.rows.end - window.rows.start) as usize * BLOCK;
        for &member in members.iter().filter(|m| self.holds(**m, stripe)) {
            let from = window.index(member, window.rows.start) * BLOCK;
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
