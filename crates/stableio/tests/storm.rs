//! Everything at once: two kinds of clients at work on one array, members that rot, go and are
//! replaced, a scrub, and a server that is killed again and again in the middle of it.
//!
//! Two stampers, each on a queue of the vhost-user-blk export, write and read blocks that say
//! which of their versions they are. fio verifies its own writes over NBD, and loads another part
//! beside them. Rows where bytes are turned over are at rest then (docs/format.md promises no
//! more), the rest of the array is not; at any time no more members are damaged or missing than
//! the redundancy absorbs. After each kill:
//!
//! - STORM-1: what was acknowledged is there: the stampers' blocks are the last version that was
//!   acknowledged, or a later one, whole; fio verifies what it had finished.
//! - STORM-2: nothing is lost, and no block was ever read that is not right.
//! - STORM-3: a rebuild that the kill cut short goes on.
//! - STORM-4: `tools/extract.py`, which shares nothing with the server, finds the same bytes on
//!   the members: as a kill left them, and after a clean end.
//!
//! In the twin one member too many is damaged, and the same checks must find it; but still none
//! of them is given other data.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use stableio_testkit::vhost::{Guest, Owes, Stamper};
use stableio_testkit::{
    Child, Ended, Export, Random, Scratch, Serve, copy_sparse, create, fio, first_difference,
    quick, require_tools, run_stableio, run_tool, stableio_bin, status,
};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// The stampers' part of the array. A quarter of it is at rest, another one in each round.
const STAMPED_BYTES: usize = 8 * MIB;
/// Stampers, each on a queue.
const STAMPERS: usize = 2;
/// Where fio verifies, in bytes.
const VERIFIED: Range<u64> = 10 << 20..13 << 20;
/// The members whose bytes are turned over. The second of them is removed and replaced, too.
const ROTTEN: [usize; 2] = [1, GONE];
const GONE: usize = 2;

/// What goes on when the server is killed, beside the clients and the rot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Nothing.
    Rot,
    /// A scrub has begun.
    Scrub,
    /// A member was removed.
    Remove,
    /// It is served again and catches up.
    TakeBack,
    /// Another is filled in the place of one that is removed.
    ReplaceMissing,
    /// Another is filled in the place of one that is still there.
    Replace,
    /// What was filled before the last kill is filled further.
    GoOn,
    /// The rebuild is over, and a scrub has looked at everything.
    Whole,
}

use Then::*;

const TWENTY: [Then; 20] = [
    Rot,
    Scrub,
    Replace,
    GoOn,
    Whole,
    Remove,
    TakeBack,
    Remove,
    ReplaceMissing,
    GoOn,
    Scrub,
    Whole,
    Remove,
    ReplaceMissing,
    GoOn,
    GoOn,
    Whole,
    Replace,
    Scrub,
    Rot,
];
const TEN: [Then; 10] =
    [Rot, Replace, GoOn, Scrub, Remove, TakeBack, Remove, ReplaceMissing, GoOn, Scrub];
const A_FEW: [Then; 4] = [Scrub, Remove, ReplaceMissing, GoOn];

#[test]
fn a_raid6_of_five_loses_nothing() -> io::Result<()> {
    let Some(storm) = Storm::new("raid6", 5, "9MiB", 1)? else { return Ok(()) };
    storm.run(if quick() { &A_FEW } else { &TWENTY })
}

#[test]
fn a_raid1_of_three_loses_nothing() -> io::Result<()> {
    let Some(storm) = Storm::new("raid1", 3, "24MiB", 2)? else { return Ok(()) };
    storm.run(if quick() { &A_FEW } else { &TEN })
}

/// The twin: one member too many is damaged, in the same rows.
#[test]
fn one_member_too_many_is_seen_but_gives_no_other_data() -> io::Result<()> {
    let Some(mut storm) = Storm::new("raid6", 5, "9MiB", 3)? else { return Ok(()) };
    let server = storm.load_and_kill(storm.serve()?, Rot)?;
    assert_eq!(storm.check()?, [""; 0]);
    assert!(server.terminate()?.status.success());
    let rows = storm.stripes(&storm.at_rest(0));
    for role in [0, 1, 2] {
        let chunk = storm.layout.chunk;
        for at in rows.clone().flat_map(|s| (s * chunk..(s + 1) * chunk).step_by(BLOCK)) {
            // Each in its own way: the same change to data and to their parity is another matter.
            storm.flip(role, storm.layout.data_at + at + 99, 1 << role)?;
        }
    }
    let server = storm.serve()?;
    let damage = storm.check()?;
    let is_told = |line: &String| line.contains("is an error") || line.starts_with("status: ");
    assert!(damage.iter().any(|line| line.contains("is an error")), "no check saw it");
    assert!(damage.iter().any(|line| line.starts_with("status: lost_reads")), "it is not counted");
    let other: Vec<_> = damage.iter().filter(|line| !is_told(line)).collect();
    assert!(other.is_empty(), "other data: {other:?}");
    let said = storm.stableio(&["scrub", "disk", "--wait"])?.stdout;
    assert!(!said.contains(" 0 blocks can not be read"), "{said}");
    assert!(server.terminate()?.status.success());
    let (code, said) = extract(&storm.files(), &storm.scratch.path("extracted.img"))?;
    assert_eq!(code, Some(2), "{said}");
    Ok(())
}

/// An array, those who use it, and what was done to it.
struct Storm {
    scratch: Scratch,
    level: &'static str,
    layout: Layout,
    /// Its members by role; none for one that was removed.
    members: Vec<Option<PathBuf>>,
    /// The one that was removed, as long as it may come back.
    removed: Option<PathBuf>,
    /// The one that is being filled.
    filling: Option<PathBuf>,
    nbd: Export,
    vhost: Export,
    stampers: Vec<Stamper>,
    random: Random,
    /// What fio has written and verified, and what it was told for that.
    verified: Option<u64>,
    rounds: u64,
    /// New members made.
    made: u32,
    /// Rebuilds and scrubs that a kill cut short.
    rebuilds_cut: u32,
    scrubs_cut: u32,
}

/// Where things lie on every member, in bytes.
struct Layout {
    guards_at: u64,
    data_at: u64,
    chunk: u64,
    /// Data of a stripe.
    stripe: u64,
}

impl Storm {
    fn new(
        level: &'static str,
        count: usize,
        member_size: &str,
        seed: u64,
    ) -> io::Result<Option<Storm>> {
        if !require_tools(&["fio", "nbdcopy", "python3"]) {
            return Ok(None);
        }
        let scratch = Scratch::new()?;
        let members: Vec<_> = (0..count).map(|i| scratch.path(&format!("member-{i}"))).collect();
        create("disk", &["--level", level, "--member-size", member_size], &members)?;
        let args = [Path::new("examine"), Path::new("--json"), &members[0]];
        let layout: Value = serde_json::from_str(&run_tool(&stableio_bin()?, args)?)?;
        let chunk = number(&layout, "chunk_bytes");
        let columns = if level == "raid6" { count as u64 - 2 } else { 1 };
        let layout = Layout {
            guards_at: number(&layout, "guards_at"),
            data_at: number(&layout, "data_at"),
            chunk,
            stripe: chunk * columns,
        };
        let nbd = Export::nbd("disk", &scratch.path("nbd.sock"));
        let vhost = Export::vhost_user_blk("disk", &scratch.path("vhost.sock")).with("queues", "2");
        let stamper = |i| Stamper::new(i, STAMPERS, STAMPED_BYTES, seed).with_reads();
        Ok(Some(Storm {
            scratch,
            level,
            layout,
            members: members.into_iter().map(Some).collect(),
            removed: None,
            filling: None,
            nbd,
            vhost,
            stampers: (0..STAMPERS).map(stamper).collect(),
            random: Random::new(seed),
            verified: None,
            rounds: 0,
            made: 0,
            rebuilds_cut: 0,
            scrubs_cut: 0,
        }))
    }

    /// A round for each of these, and then the end.
    fn run(mut self, rounds: &[Then]) -> io::Result<()> {
        let mut server = self.serve()?;
        for (kill, then) in rounds.iter().enumerate() {
            server = self.load_and_kill(server, *then)?;
            let damage = self.check()?;
            assert_eq!(damage, [""; 0], "after kill {kill}, {then:?}");
        }
        self.finish(server)?;
        let Storm { level, rebuilds_cut, scrubs_cut, .. } = self;
        let kills = rounds.len();
        eprintln!("{level}: {kills} kills, {rebuilds_cut} in a rebuild, {scrubs_cut} in a scrub");
        assert!(rebuilds_cut > 0, "no kill met a rebuild");
        assert!(scrubs_cut > 0, "no kill met a scrub");
        Ok(())
    }

    fn serve(&self) -> io::Result<Serve> {
        let exports = [self.nbd.clone(), self.vhost.clone()];
        Serve::array(&self.scratch, &self.files(), &exports)
    }

    /// What it is served with.
    fn files(&self) -> Vec<PathBuf> {
        self.members.iter().chain([&self.filling]).flatten().cloned().collect()
    }

    fn stableio(&self, args: &[&str]) -> io::Result<Ended> {
        let ended = run_stableio(&self.scratch, args)?;
        if !ended.status.success() {
            return Err(io::Error::other(format!("{args:?}: {ended:?}")));
        }
        Ok(ended)
    }

    /// Lets everybody work, members rot, and something else begin; kills the server in the middle
    /// of it, and gives the next one, which has recovered.
    fn load_and_kill(&mut self, mut server: Serve, then: Then) -> io::Result<Serve> {
        if then == TakeBack {
            self.members[GONE] = self.removed.take();
            assert!(server.kill9()?.was_killed());
            server = self.serve()?;
            // A log that does not reach back that far leaves it out.
            let member = &status(&self.scratch)?["members"][GONE];
            if member["in_sync"] != true && member["filling"].is_null() {
                self.removed = self.members[GONE].take();
            }
        }
        self.rounds += 1;
        let load = Child::spawn(self.fio_load(), &self.scratch)?;
        let writes = number(&status(&self.scratch)?, "writes");
        while number(&status(&self.scratch)?, "writes") == writes {
            thread::sleep(Duration::from_millis(5));
        }
        let bytes = Stamper::memory_bytes(STAMPERS);
        let mut guest = Guest::connect(self.vhost.socket(), STAMPERS, bytes)?;
        let memory = guest.memory().clone();
        let killed = AtomicBool::new(false);
        let at_rest = self.at_rest(self.rounds);
        let mut stampers = std::mem::take(&mut self.stampers);
        thread::scope(|scope| {
            let queues = guest.queues().iter_mut();
            let running: Vec<_> = queues
                .zip(&mut stampers)
                .map(|(queue, stamper)| {
                    stamper.avoid(at_rest.start as usize / BLOCK..at_rest.end as usize / BLOCK);
                    scope.spawn(|| stamper.run(queue, &memory, &killed))
                })
                .collect();
            // Whatever comes of it, the stampers end only when they hear that the server did.
            let work = AssertUnwindSafe(|| self.meanwhile(then, &at_rest));
            let worked = panic::catch_unwind(work);
            let ended = server.kill9();
            killed.store(true, Ordering::Release);
            let stamped = running
                .into_iter()
                .try_for_each(|stamper| stamper.join().expect("stampers do not panic"));
            worked.unwrap_or_else(|panic| panic::resume_unwind(panic)).and(stamped)?;
            assert!(ended?.was_killed(), "the server ended before it was killed");
            io::Result::Ok(())
        })?;
        self.stampers = stampers;
        // It lost its server, and says so in its own words.
        load.wait().map(drop)?;
        self.serve_again(then)
    }

    /// What happens while the stampers are at work, up to the kill.
    fn meanwhile(&mut self, then: Then, at_rest: &Range<u64>) -> io::Result<()> {
        self.rot(at_rest)?;
        if then == Whole {
            self.wait_for_rebuild()?;
        }
        let seed = self.rounds;
        self.fio_verified(seed, &[])?;
        self.verified = Some(seed);
        // Of what was acknowledged just now the pages of tuples are not written yet.
        self.rot(&VERIFIED)?;
        match then {
            Rot | GoOn | TakeBack => {}
            Scrub => self.begin_scrub()?,
            Remove if self.members[GONE].is_none() => {}
            Remove => {
                self.wait_for_rebuild()?;
                self.stableio(&["remove", "disk", &GONE.to_string()])?;
                self.removed = self.members[GONE].take();
            }
            Replace | ReplaceMissing => {
                assert_eq!(self.members[GONE].is_none(), then == ReplaceMissing);
                self.removed = None;
                self.made += 1;
                let new = self.scratch.path(&format!("new-{}", self.made));
                let path = new.to_str().expect("paths here are text");
                self.stableio(&["replace", "disk", &GONE.to_string(), path])?;
                self.filling = Some(new);
            }
            Whole => {
                let said = self.stableio(&["scrub", "disk", "--wait"])?.stdout;
                assert!(said.contains(" 0 blocks can not be read"), "{said}");
            }
        }
        thread::sleep(Duration::from_micros(10_000 + self.random.below(150_000)));
        let now = status(&self.scratch)?;
        self.scrubs_cut += u32::from(!now["scrub"].is_null());
        self.rebuilds_cut += u32::from(!now["rebuild"].is_null());
        Ok(())
    }

    /// A scrub is refused while a rebuild is under way; then there is none.
    fn begin_scrub(&mut self) -> io::Result<()> {
        self.wait_for_rebuild()?;
        self.stableio(&["scrub", "disk"]).map(drop)
    }

    fn wait_for_rebuild(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        while !status(&self.scratch)?["rebuild"].is_null() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the rebuild does not end");
            thread::sleep(Duration::from_millis(20));
        }
        self.settle_members()
    }

    /// The next server. Now and then `extract.py` is given what the last one left.
    fn serve_again(&mut self, then: Then) -> io::Result<Serve> {
        let extracts = matches!((then, quick()), (ReplaceMissing, _) | (Rot, false));
        let copies = if extracts { self.copy_members()? } else { vec![] };
        let server = self.serve()?;
        self.settle_members()?;
        if extracts {
            self.compare(&copies)?;
            copies.iter().try_for_each(fs::remove_file)?;
        }
        Ok(server)
    }

    fn copy_members(&self) -> io::Result<Vec<PathBuf>> {
        let copy = |member: &PathBuf| {
            let copy = member.with_extension("copy");
            copy_sparse(member, &copy).map(|()| copy)
        };
        self.files().iter().map(copy).collect()
    }

    /// STORM-4, and with it that every block can be read.
    fn compare(&self, members: &[PathBuf]) -> io::Result<()> {
        let [served, extracted] = ["served.img", "extracted.img"].map(|n| self.scratch.path(n));
        run_tool(Path::new("nbdcopy"), [Path::new(&self.nbd.uri()), &served])?;
        let (code, said) = extract(members, &extracted)?;
        assert_eq!(code, Some(0), "{said}");
        let len = fs::metadata(&served)?.len();
        let difference = first_difference(&served, &extracted, len)?;
        assert_eq!(difference, None, "extract.py finds other bytes there: {said}");
        fs::remove_file(served)
    }

    /// A member that was filled has taken the place of the one before.
    fn settle_members(&mut self) -> io::Result<()> {
        let now = status(&self.scratch)?;
        let member = &now["members"][GONE];
        let Some(new) = &self.filling else { return Ok(()) };
        if member["in_sync"] == true && member["name"].as_str().map(Path::new) == Some(new) {
            self.members[GONE] = self.filling.take();
        } else {
            // STORM-3.
            let goes_on = member["filling"].as_str().map(Path::new) == Some(new);
            assert!(goes_on, "{} is not filled any more: {now:#}", new.display());
        }
        Ok(())
    }

    /// STORM-1 and STORM-2 while it is served: a line for each thing that is not as it must be.
    fn check(&mut self) -> io::Result<Vec<String>> {
        let mut damage = Vec::new();
        let disk = self.read_blocks()?;
        let errors = disk.iter().enumerate().filter(|(_, block)| block.is_none());
        damage.extend(errors.map(|(number, _)| format!("block {number} is an error")));
        for stamper in &mut self.stampers {
            damage.extend(stamper.check(&disk, Owes::Acknowledged));
        }
        if let Some(seed) = self.verified
            && let Err(error) = self.fio_verified(seed, &[("verify_only", "1")])
        {
            damage.push(format!("fio: {error}"));
        }
        let now = status(&self.scratch)?;
        for counter in ["lost_reads", "blocks_lost"] {
            if now[counter] != 0 {
                damage.push(format!("status: {counter} {}, {}", now[counter], now["events"]));
            }
        }
        Ok(damage)
    }

    /// The stampers' part, block by block where a longer read fails.
    fn read_blocks(&self) -> io::Result<Vec<Option<Vec<u8>>>> {
        Guest::connect(self.vhost.socket(), 1, MIB)?.read_blocks(STAMPED_BYTES)
    }

    /// The rebuild ends, scrubs find everything and then nothing, and all agree on every byte.
    fn finish(&mut self, server: Serve) -> io::Result<()> {
        self.wait_for_rebuild()?;
        let last = self.scratch.path("last");
        let path = last.to_str().expect("paths here are text");
        let said = self.stableio(&["replace", "disk", &GONE.to_string(), path, "--wait"])?.stdout;
        assert!(said.ends_with("is in sync\n"), "{said}");
        self.members[GONE] = Some(last);
        // The first may only go on with one that a kill cut short; the second looks at everything.
        self.stableio(&["scrub", "disk", "--wait"])?;
        self.stableio(&["scrub", "disk", "--wait"])?;
        let said = self.stableio(&["scrub", "disk", "--wait"])?.stdout;
        let nothing = "scrubbed: 0 blocks and 0 tuples mended, 0 blocks can not be read";
        assert_eq!(said.trim_end(), nothing);
        assert_eq!(self.check()?, [""; 0], "at the end");
        let now = status(&self.scratch)?;
        assert_eq!(now["state"], "healthy", "{now:#}");
        assert!(server.terminate()?.status.success());
        let copies = self.copy_members()?;
        let server = self.serve()?;
        self.compare(&copies)?;
        assert!(server.terminate()?.status.success());
        Ok(())
    }

    /// Turns bytes over on the members that rot: in rows that hold this range of the array, where
    /// guards are, and in the log.
    fn rot(&mut self, of_array: &Range<u64>) -> io::Result<()> {
        let stripes = self.stripes(of_array);
        let Layout { guards_at, data_at, chunk, .. } = self.layout;
        let data = data_at + stripes.start * chunk..data_at + stripes.end * chunk;
        for (area, count) in [(data, 12), (guards_at..data_at, 4), (65536..guards_at, 4)] {
            for _ in 0..count {
                let role = ROTTEN[self.random.below(2) as usize];
                let at = area.start + self.random.below(area.end - area.start);
                let bits = 1 + self.random.below(255) as u8;
                self.flip(role, at, bits)?;
            }
        }
        Ok(())
    }

    /// Stripes all of whose rows lie in a range of the array.
    fn stripes(&self, of_array: &Range<u64>) -> Range<u64> {
        of_array.start.div_ceil(self.layout.stripe)..of_array.end / self.layout.stripe
    }

    /// Of a member that is missing there is nothing to turn over.
    fn flip(&self, role: usize, at: u64, bits: u8) -> io::Result<()> {
        let Some(member) = &self.members[role] else { return Ok(()) };
        let file = File::options().read(true).write(true).open(member)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ bits], at)
    }

    /// The quarter of the stampers' part that none of them touches in a round.
    fn at_rest(&self, round: u64) -> Range<u64> {
        let quarter = STAMPED_BYTES as u64 / 4;
        let from = round % 4 * quarter;
        from..from + quarter
    }

    /// A whole round of fio that verifies what it writes, or only verifies what it wrote before.
    fn fio_verified(&self, seed: u64, options: &[(&str, &str)]) -> io::Result<()> {
        let (uri, seed_text) = (self.nbd.uri(), seed.to_string());
        let [offset, size] =
            [VERIFIED.start, VERIFIED.end - VERIFIED.start].map(|bytes| bytes.to_string());
        let common = [
            ("ioengine", "nbd"),
            ("uri", uri.as_str()),
            ("rw", "randwrite"),
            ("bs", ["4k", "12k", "64k"][seed as usize % 3]),
            ("iodepth", "16"),
            ("offset", offset.as_str()),
            ("size", size.as_str()),
            ("randseed", seed_text.as_str()),
            ("verify", "crc32c"),
            ("verify_fatal", "1"),
            ("verify_state_save", "0"),
        ];
        fio(&[&common[..], options].concat()).map(drop)
    }

    /// fio, writing at random over two connections until its server is gone.
    fn fio_load(&self) -> Command {
        let mut command = Command::new("fio");
        command.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--numjobs=2"]);
        command.args(["--bssplit=512/20:4k/40:12k/20:64k/15:256k/5", "--iodepth=8", "--fsync=32"]);
        command.args(["--offset=14m", "--size=6m", "--time_based", "--runtime=60"]);
        command.arg(format!("--randseed={}", self.rounds));
        command.arg(format!("--uri={}", self.nbd.uri()));
        command
    }
}

/// What `tools/extract.py` makes of these members: its exit code and what it says.
fn extract(members: &[PathBuf], image: &Path) -> io::Result<(Option<i32>, String)> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/extract.py");
    let out = Command::new("python3").arg(tool).arg("-o").arg(image).args(members).output()?;
    let said = String::from_utf8_lossy(&[out.stderr, out.stdout].concat()).into_owned();
    Ok((out.status.code(), said))
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} is not a number: {report:#}"))
}
