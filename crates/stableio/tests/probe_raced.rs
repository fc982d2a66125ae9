//! `serve --raw` takes from the inspector what to do with a guest's memory: where the storage
//! reads it twice, it is copied once; elsewhere it goes down as it is.
//!
//! Shown on XFS over zram, which compresses while the guest writes: nothing that the guest did
//! not store is read back, and the twin in which it declares its buffers stable is full of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use stableio_testkit::vhost::{Command, Guest, Segment, SharedMemory};
use stableio_testkit::{Export, Mounted, Scratch, Serve, quick, run_stableio, skip, status};

const MIB: usize = 1 << 20;
/// Writes in flight.
const DEPTH: usize = 8;
/// Of each length.
const LENGTHS: [usize; 2] = [4096, 65536];
/// Of writing and reading back, at most.
const ROUNDS: usize = 60;
/// What every word that the program stores is a multiple of, so that each byte of it changes.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a race came to.
#[derive(Debug, Default)]
struct Outcome {
    writes: usize,
    /// Whose memory changed between submission and completion.
    raced: usize,
    /// Which read back with an error, or with a word that the program never stored there.
    bad: usize,
    /// Which the server copied.
    copied: u64,
}

/// The n-th content of a buffer, and back.
fn word(n: u64) -> u64 {
    n.wrapping_mul(ODD)
}

fn number(word: u64) -> u64 {
    // Newton's iteration for the inverse: each step doubles the bits that are right.
    let inverse = (0..6).fold(ODD, |x, _| x.wrapping_mul(2u64.wrapping_sub(ODD.wrapping_mul(x))));
    word.wrapping_mul(inverse)
}

/// A program that stores one word after the other all over its buffers, all the time.
struct Program {
    memory: Arc<SharedMemory>,
    /// The content that each buffer has in places.
    counts: [AtomicU64; DEPTH],
    over: AtomicBool,
}

impl Program {
    fn buffer(slot: usize, len: usize) -> Range<usize> {
        slot * LENGTHS[1]..slot * LENGTHS[1] + len
    }

    fn run(&self, len: usize) {
        while !self.over.load(Ordering::Relaxed) {
            for (slot, count) in self.counts.iter().enumerate() {
                let n = count.fetch_add(1, Ordering::Relaxed) + 1;
                self.memory.fill(Self::buffer(slot, len), word(n));
            }
        }
    }

    /// Whether this word was ever stored in the buffer.
    fn stored(&self, slot: usize, bytes: [u8; 8]) -> bool {
        number(u64::from_ne_bytes(bytes)) <= self.counts[slot].load(Ordering::Relaxed)
    }
}

/// Races writes of `len` bytes against the program, at offsets of their own, and reads them back.
fn race(guest: &mut Guest, len: usize, count: usize, outcome: &mut Outcome) -> io::Result<()> {
    let program = Arc::new(Program {
        memory: guest.memory().clone(),
        counts: Default::default(),
        over: AtomicBool::new(false),
    });
    let changing = {
        let program = program.clone();
        (0..DEPTH).for_each(|slot| program.memory.fill(Program::buffer(slot, len), word(0)));
        thread::spawn(move || program.run(len))
    };
    let written = write(guest, &program, len, count, outcome);
    program.over.store(true, Ordering::Relaxed);
    changing.join().expect("it does not panic");
    for (place, slot) in written?.into_iter().enumerate() {
        // Read through the memory beyond the buffers.
        let at = DEPTH * LENGTHS[1];
        let queue = &mut guest.queues()[0];
        queue.submit(0, Command::Read((place * len) as u64, &[Segment { at, len }]))?;
        let fine = queue.wait()?.result().is_ok() && {
            let bytes = program.memory.load(at..at + len);
            bytes.as_chunks().0.iter().all(|word| program.stored(slot, *word))
        };
        outcome.bad += usize::from(!fine);
    }
    Ok(())
}

/// Keeps [`DEPTH`] writes in flight; says from which buffer each place was written.
fn write(
    guest: &mut Guest,
    program: &Program,
    len: usize,
    count: usize,
    outcome: &mut Outcome,
) -> io::Result<Vec<usize>> {
    let queue = &mut guest.queues()[0];
    let mut slots = vec![0; count];
    let mut begun = [0; DEPTH];
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut next = 0;
    while next < count || free.len() < DEPTH {
        while next < count
            && let Some(slot) = free.pop()
        {
            begun[slot] = program.counts[slot].load(Ordering::Relaxed);
            let at = Program::buffer(slot, len).start;
            let offset = (next * len) as u64;
            queue.submit(slot as u64, Command::Write(offset, &[Segment { at, len }]))?;
            queue.kick()?;
            slots[next] = slot;
            next += 1;
        }
        let completion = queue.wait()?;
        completion.result()?;
        let slot = completion.tag as usize;
        outcome.writes += 1;
        outcome.raced += usize::from(program.counts[slot].load(Ordering::Relaxed) != begun[slot]);
        free.push(slot);
    }
    Ok(slots)
}

/// Serves an image in a directory to a racing guest.
fn serve_and_race(
    scratch: &Scratch,
    image: &std::path::Path,
    options: &[(&str, &str)],
) -> io::Result<Outcome> {
    let export = Export::vhost_user_blk("disk", &scratch.path("disk.sock"));
    let export = options.iter().fold(export, |export, (key, value)| export.with(key, value));
    let server = Serve::raw(scratch, image, std::slice::from_ref(&export))?;
    let mut outcome = Outcome::default();
    let mut guest = Guest::connect(export.socket(), 1, MIB)?;
    let is_protected = options.is_empty();
    let enough = if quick() { 500 } else { 4000 };
    // How many are raced is the scheduler's choice; on a busy machine it takes a few rounds.
    for _ in 0..ROUNDS {
        for (len, count) in LENGTHS.into_iter().zip([2000, 250]) {
            race(&mut guest, len, count, &mut outcome)?;
        }
        // A twin that has shown nothing yet goes on.
        if outcome.raced >= enough && (is_protected || outcome.bad > 0) {
            break;
        }
    }
    drop(guest);
    let counted = status(scratch)?;
    outcome.copied = counted["writes_stabilized"].as_u64().expect("a number");
    let ended = server.terminate()?;
    assert!(ended.status.success(), "{ended:?}");
    // It said at the start what it would do.
    let said = if outcome.copied > 0 { "copied once" } else { "as it is" };
    assert!(!is_protected || ended.stderr.contains(said), "{}", ended.stderr);
    assert!(outcome.raced >= enough, "too few raced to show anything: {outcome:?}");
    Ok(outcome)
}

fn image_on(mounted: &Mounted) -> io::Result<std::path::PathBuf> {
    let path = mounted.path().join("disk.img");
    std::fs::File::create_new(&path)?.set_len(64 * MIB as u64)?;
    Ok(path)
}

/// Whether the storage itself protects here: then there is nothing that a twin could show.
fn kernel_protects(scratch: &Scratch, image: &std::path::Path) -> io::Result<bool> {
    Ok(run_stableio(scratch, ["probe".as_ref(), image.as_os_str()])?.status.success())
}

#[test]
fn on_xfs_over_zram_a_raced_image_has_nothing_bad() -> io::Result<()> {
    let Some(mounted) = Mounted::xfs_on_zram(512 * MIB as u64)? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let image = image_on(&mounted)?;
    let copies = !kernel_protects(&scratch, &image)?;
    let outcome = serve_and_race(&scratch, &image, &[])?;
    assert_eq!(outcome.bad, 0, "{outcome:?}");
    assert_eq!(outcome.copied == outcome.writes as u64, copies, "{outcome:?}");
    Ok(())
}

/// The twin: without the copy the same race stores garbage.
#[test]
fn on_xfs_over_zram_buffers_declared_stable_are_seen_to_go_bad() -> io::Result<()> {
    let Some(mounted) = Mounted::xfs_on_zram(512 * MIB as u64)? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let image = image_on(&mounted)?;
    if kernel_protects(&scratch, &image)? {
        skip("this kernel copies there");
        return Ok(());
    }
    let outcome = serve_and_race(&scratch, &image, &[("buffers", "stable")])?;
    assert_eq!(outcome.copied, 0);
    assert!(outcome.bad > 0, "{outcome:?}");
    Ok(())
}

/// Where the storage looks once, nothing is copied, and a race does no harm.
#[test]
fn what_is_read_once_is_not_copied() -> io::Result<()> {
    let memory = Scratch::new()?;
    let disk = Mounted::on_loop("ext4", 256 * MIB as u64)?;
    let images = [
        memory.is_in_memory().then(|| memory.sparse("disk.img", 64 * MIB as u64)).transpose()?,
        disk.as_ref().map(image_on).transpose()?,
    ];
    for image in images.into_iter().flatten() {
        let scratch = Scratch::new()?;
        let outcome = serve_and_race(&scratch, &image, &[])?;
        assert_eq!((outcome.bad, outcome.copied), (0, 0), "{}: {outcome:?}", image.display());
    }
    Ok(())
}
