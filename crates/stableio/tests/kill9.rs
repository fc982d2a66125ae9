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

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use stableio_array::Superblock;
use stableio_testkit::vhost::{Guest, Owes, Stamper};
use stableio_testkit::{
    Child, Raid5, Random, Scratch, first_difference, quick, require_tools, status,
};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// The writers' part of the array; fio has another.
const STAMPED_BYTES: usize = 32 * MIB;

/// Writers, each on a queue.
const WRITERS: usize = 2;

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
        assert!(lost <= number(&now, "blocks_lost") + trial.lost, "kill {kill}: {now:#}");
        trial.lost = lost;
        for writer in &mut trial.writers {
            assert_eq!(writer.check(&disk, Owes::Flushed), [""; 0], "after kill {kill}");
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
    writers: Vec<Stamper>,
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
        let writers = (0..WRITERS).map(|i| Stamper::new(i, WRITERS, STAMPED_BYTES, seed)).collect();
        Ok(Some(Trial { array, writers, random: Random::new(seed), lost: 0 }))
    }

    /// Serves the array, lets everybody write, and kills the server in the middle of it.
    fn load_and_kill(&mut self, kill: u64) -> io::Result<()> {
        let server = self.array.serve()?;
        let fio = Child::spawn(fio_writes(&self.array, kill), &self.array.scratch)?;
        while status(&self.array.scratch)?["writes"].as_u64() == Some(0) {
            thread::sleep(Duration::from_millis(5));
        }
        let mut guest =
            Guest::connect(self.array.vhost.socket(), WRITERS, Stamper::memory_bytes(WRITERS))?;
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
            damage.extend(writer.check(&blocks, Owes::Flushed));
        }
        let now = status(&self.array.scratch)?;
        for counter in ["blocks_mended", "tuples_mended", "lost_reads", "blocks_lost"] {
            if now[counter] != 0 {
                damage.push(format!("{counter}: {}, {}", now[counter], now["events"]));
            }
        }
        if now["state"] != "healthy" {
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
        Guest::connect(self.array.vhost.socket(), 1, MIB)?.read_blocks(STAMPED_BYTES)
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

fn number(status: &Value, key: &str) -> u64 {
    status[key].as_u64().unwrap_or_else(|| panic!("{key} is not a number: {status:#}"))
}
