//! `kill -9` while several clients write, ten times on the same array.
//!
//! Two writers, each on a queue of the vhost-user-blk export, stamp what they write so that every
//! block says which of its versions it is. fio loads the array beside them, over NBD. After each
//! kill:
//!
//! - KILL-1: what was flushed is there. A block is one of its versions, whole, no older than the
//!   last that a flush covered and no newer than the last that was submitted; and once it was
//!   read, that version is the oldest that it may be.
//! - KILL-2: nothing is lost: every block of the array can be read, which verifies its guard.
//! - KILL-3: guards and parity fit: with any one member taken away the array reads the same.
//!
//! - KILL-4: with a member missing before the kill, a block of a row that was being written may be
//!   lost (docs/format.md says when): then it reads as an error, is counted, and is never anything
//!   but one of its versions.
//!
//! The twin takes recovery away, by telling the members that they were shut down, and the same
//! checks must find something.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use stableio_array::Superblock;
use stableio_testkit::vhost::{self, Guest, Queue, Segment, SharedMemory};
use stableio_testkit::{
    Child, Raid5, Random, Scratch, first_difference, quick, require_tools, status,
};

const BLOCK: usize = 4096;
const WORDS: usize = BLOCK / 8;
const MIB: usize = 1 << 20;

/// The writers' part of the array; fio has another.
const STAMPED_BYTES: usize = 32 * MIB;

/// The writers' parts alternate, in units that no chunk or stripe is a multiple of: at their
/// borders both write to the same rows.
const UNIT: usize = 65;

/// The longest write, in blocks.
const LONGEST: usize = 64;

/// Writes in flight per writer.
const DEPTH: usize = 16;

/// A flush follows so many writes.
const FLUSH_EVERY: u32 = 24;

#[test]
fn ten_kills_lose_nothing_that_was_flushed() -> io::Result<()> {
    let Some(mut trial) = Trial::new(1)? else { return Ok(()) };
    let mut rows_recovered = 0;
    for kill in 0..if quick() { 3 } else { 10 } {
        trial.load_and_kill(kill)?;
        let found = trial.check()?;
        assert_eq!(found.damage, [""; 0], "after kill {kill}");
        rows_recovered += found.rows_recovered;
    }
    assert!(rows_recovered > 0, "no kill met a write under way: nothing was tested");
    Ok(())
}

/// KILL-4. A block that was lost may be written again.
#[test]
fn kills_without_a_member_never_give_other_data() -> io::Result<()> {
    let Some(mut trial) = Trial::new(3)? else { return Ok(()) };
    fs::remove_file(trial.array.members.remove(1))?;
    let mut rows_recovered = 0;
    for kill in 0..if quick() { 2 } else { 5 } {
        trial.load_and_kill(kill)?;
        let server = trial.array.serve()?;
        let now = status(&trial.array.scratch)?;
        rows_recovered += number(&now, "rows_recovered");
        let disk = trial.read_blocks()?;
        let lost = disk.iter().filter(|block| block.is_none()).count() as u64;
        // Those of fio's part are among the lost, but not among those that were read here.
        assert!(lost <= number(&now, "blocks_lost_in_crash") + trial.lost, "kill {kill}: {now:#}");
        trial.lost = lost;
        for writer in &mut trial.writers {
            assert_eq!(writer.check(&disk), [""; 0], "after kill {kill}");
        }
        assert!(server.terminate()?.status.success());
    }
    assert!(rows_recovered > 0, "no kill met a write under way: nothing was tested");
    Ok(())
}

/// The twin: without recovery the same kills leave rows that do not fit.
#[test]
fn without_recovery_kills_are_seen_to_damage() -> io::Result<()> {
    const PATIENCE: u64 = 30;
    let Some(mut trial) = Trial::new(2)? else { return Ok(()) };
    for kill in 0..PATIENCE {
        trial.load_and_kill(kill)?;
        trial.say_that_it_was_shut_down()?;
        let found = trial.check()?;
        assert_eq!(found.rows_recovered, 0, "recovery was to be taken away");
        if !found.damage.is_empty() {
            eprintln!("kill {kill}: {}", found.damage.join("\n"));
            return Ok(());
        }
    }
    panic!("{PATIENCE} kills without recovery did no damage: the checks see nothing");
}

/// An array and what its writers know of it.
struct Trial {
    array: Raid5,
    writers: Vec<Writer>,
    random: Random,
    /// Blocks of the writers' part that are lost.
    lost: u64,
}

/// What a check after a kill found.
struct Found {
    /// One line for each thing that is not as it must be.
    damage: Vec<String>,
    rows_recovered: u64,
}

impl Trial {
    fn new(seed: u64) -> io::Result<Option<Trial>> {
        if !require_tools(&["fio", "nbdcopy"]) {
            return Ok(None);
        }
        let array = Raid5::create(Scratch::new()?, "48MiB")?;
        let writers = (0..2).map(|owner| Writer::new(owner, seed)).collect();
        Ok(Some(Trial { array, writers, random: Random::new(seed), lost: 0 }))
    }

    /// Serves the array, lets everybody write, and kills the server in the middle of it.
    fn load_and_kill(&mut self, kill: u64) -> io::Result<()> {
        let server = self.array.serve()?;
        let fio = Child::spawn(fio_writes(&self.array, kill), &self.array.scratch)?;
        while status(&self.array.scratch)?["writes"].as_u64() == Some(0) {
            thread::sleep(Duration::from_millis(5));
        }
        let mut guest = Guest::connect(self.array.vhost.socket(), 2, 2 * DEPTH * LONGEST * BLOCK)?;
        let memory = guest.memory().clone();
        let killed = AtomicBool::new(false);
        let a_while = Duration::from_micros(20_000 + self.random.below(300_000));
        thread::scope(|scope| {
            let queues = guest.queues().iter_mut();
            let running: Vec<_> = queues
                .zip(&mut self.writers)
                .map(|(queue, writer)| scope.spawn(|| writer.run(queue, &memory, &killed)))
                .collect();
            thread::sleep(a_while);
            let ended = server.kill9();
            killed.store(true, Ordering::Release);
            assert!(ended?.was_killed(), "the server ended before it was killed");
            running.into_iter().try_for_each(|writer| writer.join().expect("writers do not panic"))
        })?;
        // It lost its server, and says so in its own words.
        fio.wait().map(drop)
    }

    /// KILL-1 to KILL-3, on the array as the kill left it. Afterwards it is shut down.
    fn check(&mut self) -> io::Result<Found> {
        let mut damage = Vec::new();
        let server = self.array.serve()?;
        let whole = match self.array.read_all("whole.img") {
            Ok(whole) => whole,
            Err(error) => {
                let rows_recovered = 0;
                return Ok(Found { damage: vec![format!("unreadable: {error}")], rows_recovered });
            }
        };
        let disk = fs::read(&whole)?;
        let blocks: Vec<_> = disk.chunks(BLOCK).map(Some).collect();
        for writer in &mut self.writers {
            damage.extend(writer.check(&blocks));
        }
        let now = status(&self.array.scratch)?;
        for counter in ["blocks_mended", "tuples_mended", "lost_reads", "blocks_lost_in_crash"] {
            if now[counter] != 0 {
                damage.push(format!("{counter}: {}, {}", now[counter], now["events"]));
            }
        }
        if now["state"] != "optimal" {
            damage.push(format!("the array is {}", now["state"]));
        }
        assert!(server.terminate()?.status.success());

        for role in 0..self.array.members.len() {
            let rest = self.array.copy_without(role)?;
            let server = rest.serve()?;
            match rest.read_all("whole.img") {
                Err(error) => damage.push(format!("unreadable without member {role}: {error}")),
                Ok(degraded) => {
                    let len = disk.len() as u64;
                    if let Some(at) = first_difference(&whole, &degraded, len)? {
                        damage.push(format!("without member {role} byte {at} is another"));
                    }
                }
            }
            assert!(server.terminate()?.status.success());
        }
        fs::remove_file(whole)?;
        Ok(Found { damage, rows_recovered: number(&now, "rows_recovered") })
    }

    /// The writers' part, block by block where a longer read fails; none for a block that is an
    /// error.
    fn read_blocks(&self) -> io::Result<Vec<Option<Vec<u8>>>> {
        let mut guest = Guest::connect(self.array.vhost.socket(), 1, MIB)?;
        let mut blocks = Vec::new();
        for piece in (0..STAMPED_BYTES).step_by(MIB) {
            match guest.read(piece as u64, MIB) {
                Ok(bytes) => blocks.extend(bytes.chunks(BLOCK).map(|block| Some(block.to_vec()))),
                Err(_) => {
                    let places = (piece..piece + MIB).step_by(BLOCK);
                    blocks.extend(places.map(|at| guest.read(at as u64, BLOCK).ok()));
                }
            }
        }
        Ok(blocks)
    }

    /// Clears the mark by which the next server knows that it must recover.
    fn say_that_it_was_shut_down(&self) -> io::Result<()> {
        for member in &self.array.members {
            let file = File::options().read(true).write(true).open(member)?;
            let mut block = [0; BLOCK];
            file.read_exact_at(&mut block, 0)?;
            let mut superblock = Superblock::parse(&block).map_err(io::Error::other)?;
            assert!(superblock.in_use, "a kill leaves the mark");
            superblock.in_use = false;
            for at in [0, superblock.geometry.second_superblock_at()] {
                file.write_all_at(&superblock.encode()[..], at)?;
            }
        }
        Ok(())
    }
}

/// fio, writing at random over two connections until its server is gone.
fn fio_writes(array: &Raid5, seed: u64) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--numjobs=2"]);
    command.args(["--bssplit=512/20:4k/40:12k/20:64k/15:256k/5", "--iodepth=16", "--fsync=32"]);
    command.args(["--offset=36m", "--size=40m", "--time_based", "--runtime=60"]);
    command.arg(format!("--randseed={seed}")).arg(format!("--uri={}", array.nbd.uri()));
    command
}

/// A client that writes, flushes, and remembers what it may rely on.
struct Writer {
    units: Vec<Unit>,
    /// Which of the two it is: its share of the memory.
    index: usize,
    random: Random,
}

/// Blocks in a row that belong to one writer.
struct Unit {
    first: usize,
    blocks: [Versions; UNIT],
}

/// What may be found in a block. Version 0 is that nobody wrote it yet.
#[derive(Clone, Copy, Default)]
struct Versions {
    /// The last that a flush covered.
    flushed: u32,
    /// The last that was submitted.
    submitted: u32,
    /// The last that there ever was, submitted and then undone by a crash or not.
    ever: u32,
    /// Whether a write is in flight: two at once on one block have no order.
    busy: bool,
}

/// A write: a part of a unit.
#[derive(Clone, Copy)]
struct Write {
    unit: usize,
    from: usize,
    len: usize,
}

impl Writer {
    fn new(index: usize, seed: u64) -> Writer {
        let units = (0..STAMPED_BYTES / BLOCK / UNIT).filter(|unit| unit % 2 == index);
        let units =
            units.map(|unit| Unit { first: unit * UNIT, blocks: [Versions::default(); UNIT] });
        Writer { units: units.collect(), index, random: Random::new(seed + index as u64) }
    }

    /// Writes until the server was killed, and then takes what it still had answered.
    fn run(
        &mut self,
        queue: &mut Queue,
        memory: &SharedMemory,
        killed: &AtomicBool,
    ) -> io::Result<()> {
        const FLUSH: u64 = DEPTH as u64;
        let mut slots: [Option<Write>; DEPTH] = [None; DEPTH];
        // Settled writes that no flush covers yet; those that the flush under way will cover.
        let (mut settled, mut covered) = (Vec::new(), None::<Vec<(Write, Vec<u32>)>>);
        let mut since_flush = 0;
        loop {
            if !killed.load(Ordering::Acquire) {
                for (slot, write) in slots.iter_mut().enumerate().filter(|(_, w)| w.is_none()) {
                    *write = self.write(queue, memory, slot)?;
                    since_flush += u32::from(write.is_some());
                }
                if since_flush >= FLUSH_EVERY && covered.is_none() {
                    queue.submit(FLUSH, vhost::Command::Flush)?;
                    covered = Some(std::mem::take(&mut settled));
                    since_flush = 0;
                }
            }
            // Whether it was killed is asked first: no answer comes after that.
            let last = killed.load(Ordering::Acquire);
            let mut answers = VecDeque::new();
            match queue.wait_within(Duration::from_millis(50)) {
                Ok(answer) => answers.push_back(answer),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
            while let Some(answer) = queue.completion()? {
                answers.push_back(answer);
            }
            if last && answers.is_empty() {
                break;
            }
            for answer in answers {
                answer.result()?;
                if answer.tag == FLUSH {
                    let covered = covered.take().expect("one flush at a time");
                    covered.iter().for_each(|(write, versions)| self.flushed(*write, versions));
                } else {
                    let write = slots[answer.tag as usize].take().expect("a write in flight");
                    settled.push((write, self.settled(write)));
                }
            }
        }
        // Whatever is left was in flight.
        self.units.iter_mut().flat_map(|u| &mut u.blocks).for_each(|block| block.busy = false);
        Ok(())
    }

    /// Submits a write of the next version of some blocks; none if those have one in flight.
    fn write(
        &mut self,
        queue: &mut Queue,
        memory: &SharedMemory,
        slot: usize,
    ) -> io::Result<Option<Write>> {
        let unit = self.random.below(self.units.len() as u64) as usize;
        // As many short writes as long ones.
        let longest = 1 << self.random.below(1 + LONGEST.ilog2() as u64);
        let len = 1 + self.random.below(longest) as usize;
        let from = self.random.below((UNIT - len + 1) as u64) as usize;
        let Unit { first, blocks } = &mut self.units[unit];
        let blocks = &mut blocks[from..from + len];
        if blocks.iter().any(|block| block.busy) {
            return Ok(None);
        }
        let at = (self.index * DEPTH + slot) * LONGEST * BLOCK;
        for (i, block) in blocks.iter_mut().enumerate() {
            block.ever += 1;
            (block.submitted, block.busy) = (block.ever, true);
            let bytes = stamp(*first + from + i, block.ever);
            memory.store(at + i * BLOCK, &bytes);
        }
        let offset = ((*first + from) * BLOCK) as u64;
        let segments = [Segment { at, len: len * BLOCK }];
        queue.submit(slot as u64, vhost::Command::Write(offset, &segments))?;
        Ok(Some(Write { unit, from, len }))
    }

    /// A write was acknowledged; gives the versions that the next flush will make durable.
    fn settled(&mut self, write: Write) -> Vec<u32> {
        let blocks = &mut self.units[write.unit].blocks[write.from..][..write.len];
        blocks.iter_mut().for_each(|block| block.busy = false);
        blocks.iter().map(|block| block.submitted).collect()
    }

    fn flushed(&mut self, write: Write, versions: &[u32]) {
        let blocks = &mut self.units[write.unit].blocks[write.from..][..write.len];
        for (block, version) in blocks.iter_mut().zip(versions) {
            block.flushed = block.flushed.max(*version);
        }
    }

    /// KILL-1. What is found counts as flushed from now on; of a block that reads as an error
    /// nothing does.
    fn check<T: AsRef<[u8]>>(&mut self, disk: &[Option<T>]) -> Vec<String> {
        let mut wrong = Vec::new();
        for unit in &mut self.units {
            for (number, block) in (unit.first..).zip(&mut unit.blocks) {
                let Some(bytes) = disk[number].as_ref().map(AsRef::as_ref) else {
                    block.flushed = 0;
                    continue;
                };
                let Versions { flushed, submitted, .. } = *block;
                match version(number, bytes) {
                    None => wrong.push(format!("block {number} is a mixture")),
                    Some(v) if v < flushed => {
                        wrong.push(format!(
                            "block {number}: version {v}, but {flushed} was flushed"
                        ));
                    }
                    Some(v) if v > submitted => {
                        wrong.push(format!("block {number}: version {v} of {submitted}"));
                    }
                    Some(v) => (block.flushed, block.submitted) = (v, v),
                }
            }
        }
        wrong
    }
}

/// A version of a block: the first word names both, and every other follows from it.
fn stamp(block: usize, version: u32) -> Vec<u8> {
    let name = (block as u64) << 32 | u64::from(version);
    let mut random = Random::new(name);
    let words = std::iter::once(name).chain(std::iter::repeat_with(|| random.word()));
    words.take(WORDS).flat_map(u64::to_le_bytes).collect()
}

/// Which version a block is; none if it is not one of its own, whole.
fn version(block: usize, bytes: &[u8]) -> Option<u32> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let name = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let version = name as u32;
    (bytes == stamp(block, version)).then_some(version)
}

fn number(status: &Value, key: &str) -> u64 {
    status[key].as_u64().unwrap_or_else(|| panic!("{key} is not a number: {status:#}"))
}
