//! Calls a kernel so many times, for `tools/instructions.py`, which counts the instructions of a
//! call: `counted WORK CALLS`, on the tier that `STABLEIO_ONEPASS` names.

use onepass::{
    BLOCK, Column, Format, Member, Missing, Parities, Parity, Pass, RowParity, Segment, Survivor,
    gf, reconstruct, row, verify,
};
use stableio_onepass as onepass;

/// Data columns of a row.
const COLUMNS: usize = 4;
/// Blocks of a chunk.
const CHUNK: usize = 16;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, work, calls] = &args[..] else { panic!("counted WORK CALLS") };
    let calls: usize = calls.parse().expect("a number of calls");
    let mut memory = Memory::new();
    let work = match &work[..] {
        "copy-4k" => Memory::copy_block,
        "copy-4k-odd" => Memory::copy_odd_block,
        "verify-64k" => Memory::verify_chunk,
        "update-pq-4k" => Memory::update_block,
        "row-4+1-64k" => |memory: &mut Memory| memory.row(1),
        "row-4+2-64k" => |memory: &mut Memory| memory.row(2),
        "reconstruct-two-4k" => Memory::reconstruct_two,
        _ => panic!("no such work: {work}"),
    };
    (0..calls).for_each(|_| work(&mut memory));
}

/// Blocks that begin on pages: the data of a row, its copy, P and Q, and some guards.
struct Memory {
    data: Vec<Page>,
    copy: Vec<Page>,
    parities: [Vec<Page>; 2],
    guards: Vec<u64>,
    parity_guards: [Vec<u64>; 2],
}

#[derive(Clone, Copy)]
#[repr(align(4096))]
struct Page([u8; BLOCK]);

fn bytes(pages: &[Page]) -> &[u8] {
    // SAFETY: pages are bytes, one after the other.
    unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), pages.len() * BLOCK) }
}

impl Memory {
    fn new() -> Memory {
        let data = (0..COLUMNS * CHUNK).map(|i| Page([i as u8; BLOCK])).collect();
        let chunk = || vec![Page([0; BLOCK]); CHUNK];
        Memory {
            data,
            copy: vec![Page([0; BLOCK]); COLUMNS * CHUNK],
            parities: [chunk(), chunk()],
            guards: vec![0; COLUMNS * CHUNK],
            parity_guards: [vec![0; CHUNK], vec![0; CHUNK]],
        }
    }

    fn copy_from(&mut self, offset: usize) {
        let from =
            Segment { addr: self.data.as_ptr().cast::<u8>().wrapping_add(offset), len: BLOCK };
        let pass = Pass::copy(Format::NATIVE, self.copy.as_mut_ptr().cast());
        // SAFETY: both have a block there; nothing overlaps.
        unsafe { pass.foreign(&[from], &mut self.guards[..1]) }.expect("memory is there");
    }

    fn copy_block(&mut self) {
        self.copy_from(0);
    }

    fn copy_odd_block(&mut self) {
        self.copy_from(3);
    }

    fn verify_chunk(&mut self) {
        verify(Format::NATIVE, bytes(&self.data[..CHUNK]), &self.guards[..CHUNK], |_| {});
    }

    fn update_block(&mut self) {
        let [p, q] = &mut self.parities;
        let [p, q] = [p, q].map(|parity| Parity::Xor(parity.as_mut_ptr().cast()));
        let parities = Parities { p, q, coefficient: gf::exp(3) };
        let old = Some(self.copy.as_ptr().cast());
        let pass = Pass { parities, old, ..Pass::guards(Format::NATIVE) };
        // SAFETY: all have a block; nothing overlaps.
        unsafe { pass.stable(bytes(&self.data[..1]), &mut self.guards[..1]) };
    }

    fn row(&mut self, parities: usize) {
        let sources: [_; COLUMNS] = std::array::from_fn(|k| {
            [Segment { addr: self.data[k * CHUNK..].as_ptr().cast(), len: CHUNK * BLOCK }]
        });
        let places = self.copy.chunks_mut(CHUNK).zip(self.guards.chunks_mut(CHUNK));
        let mut columns: Vec<_> = sources
            .iter()
            .zip(places)
            .map(|(source, (copy, guards))| {
                Column::foreign(source, copy.as_mut_ptr().cast(), guards)
            })
            .collect();
        let both = self.parities.iter_mut().zip(&mut self.parity_guards);
        let mut both = both
            .take(parities)
            .map(|(parity, guards)| RowParity { to: parity.as_mut_ptr().cast(), guards });
        let (p, q) = (both.next(), both.next());
        // SAFETY: all have a chunk; nothing overlaps.
        unsafe { row(Format::NATIVE, &mut columns, p, q) }.expect("memory is there");
    }

    fn reconstruct_two(&mut self) {
        let block = |k: usize| bytes(&self.data[k..k + 1]);
        let survivors = [Member::Data(2), Member::Data(3), Member::P, Member::Q];
        let survivors = survivors.map(|member| {
            let bytes = match member {
                Member::Data(k) => block(k),
                Member::P => block(4),
                Member::Q => block(5),
            };
            Survivor { member, bytes, expected: None }
        });
        let [x, y] = &mut self.parities;
        let mut missing = [(0, x), (1, y)].map(|(column, place)| Missing {
            member: Member::Data(column),
            bytes: &mut place[0].0[..],
            expected: None,
        });
        reconstruct(Format::NATIVE, &survivors, &mut missing).expect("nothing is compared");
    }
}
