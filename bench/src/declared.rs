//! What our way to sum declared memory is worth, beside a loop that somebody would write by hand
//! for the same work: without the array, whose own costs are the same in both.

use std::cell::RefCell;
use std::hint::black_box;

use crc_fast::CrcAlgorithm;
use stableio_mem::{
    BLOCK, ForeignBuf, Grant, Pass, Pool, PromisedBuf, RowShape, Segment, Sums, doors,
};
use stableio_testkit::vhost::SharedMemory;

use crate::Plan;
use crate::compare::{Case, Row, Side, Unit, compare_in};
use crate::onepass::{ROUNDS, sample};

const PEER: &str = "a loop over crc-fast and XOR";
const CHUNK: usize = 64 << 10;
const COLUMNS: usize = 2;

/// A row: its name, the bytes of a write, whether its rows have parity.
const TRIES: [(&str, usize, bool); 4] = [
    ("declared-single-4k", 4 << 10, false),
    ("declared-single-64k", 64 << 10, false),
    ("declared-single-1m", 1 << 20, false),
    ("declared-raid5-1m", 1 << 20, true),
];

pub(crate) fn run(plan: &Plan, family: &'static str) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, bytes, parity) in TRIES.into_iter().filter(|(name, ..)| plan.wants(name)) {
        let case = Case { family, name, unit: Unit::GbPerS, target: Some(0.95) };
        let work = RefCell::new(Work::new(bytes, parity)?);
        let mut ours: Side<bool> = plan.ours(|| Ok(true))?;
        let mut peer = plan.peer(false);
        rows.push(compare_in(ROUNDS, case, &mut ours, &mut peer, PEER, |ours| {
            let mut work = work.borrow_mut();
            Ok(sample(plan, bytes, || match *ours {
                true => drop(black_box(work.ours())),
                false => work.by_hand(),
            }))
        }));
    }
    Ok(rows)
}

/// Memory that is summed, and what that gives.
struct Work {
    data: PromisedBuf,
    pass: Pass,
    pool: std::sync::Arc<Pool>,
    /// The same bytes, for the loop.
    bytes: Vec<u8>,
    guards: Vec<u64>,
    p: Vec<u8>,
    p_guards: Vec<u64>,
}

impl Work {
    fn new(len: usize, parity: bool) -> anyhow::Result<Self> {
        let memory = SharedMemory::new(len)?;
        memory.fill(0..len, 0x5ab1_e105_5ab1_e105);
        let addr = memory.words().as_ptr() as usize;
        // SAFETY: the mapping is as long, and kept; it was never the allocator's, and no reference
        // to it is used.
        let foreign = unsafe { ForeignBuf::new([Segment { addr, len }], memory) };
        let shape =
            RowShape { chunk_blocks: (CHUNK / BLOCK) as u32, columns: COLUMNS as u32, parities: 1 };
        let parity_len = if parity { len / COLUMNS } else { 0 };
        Ok(Self {
            data: doors::promise(foreign, Grant::by_administrator()),
            pass: Pass { guards: true, rows: parity.then_some(shape), streams: false },
            pool: Pool::new(len.max(1 << 20))?,
            bytes: 0x5ab1_e105_5ab1_e105_u64.to_le_bytes().repeat(len / 8),
            guards: vec![0; len / BLOCK],
            p: vec![0; parity_len],
            p_guards: vec![0; parity_len / BLOCK],
        })
    }

    fn ours(&self) -> Sums {
        let parity = self.pass.parity_bytes(0, self.data.len());
        let memory = self.pool.try_reserve(parity).expect("smaller than the pool");
        let mut memory = memory.expect("nobody else has any");
        self.data.sums(0, self.pass, &mut memory).expect("the memory is there")
    }

    fn by_hand(&mut self) {
        let guard = |block: &[u8]| crc_fast::checksum(CrcAlgorithm::Crc64Nvme, block);
        for (block, to) in black_box(&self.bytes).chunks(BLOCK).zip(&mut self.guards) {
            *to = guard(block);
        }
        for (stripe, p) in self.bytes.chunks(COLUMNS * CHUNK).zip(self.p.chunks_mut(CHUNK)) {
            let (first, second) = stripe.split_at(CHUNK);
            for (p, (a, b)) in p.iter_mut().zip(first.iter().zip(second)) {
                *p = a ^ b;
            }
        }
        for (block, to) in self.p.chunks(BLOCK).zip(&mut self.p_guards) {
            *to = guard(block);
        }
        black_box((&self.guards, &self.p_guards));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_compute_the_same() {
        for (name, bytes, parity) in TRIES {
            let mut work = Work::new(bytes, parity).unwrap();
            let sums = work.ours();
            work.by_hand();
            assert_eq!(sums.guards.to_vec(), work.guards, "{name}");
            assert_eq!(sums.parity.map_or(Vec::new(), |p| p.to_vec()), work.p, "{name}");
            assert_eq!(sums.parity_guards, work.p_guards, "{name}");
        }
    }
}
