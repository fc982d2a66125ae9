//! The shadows of POSIX AIO, found by the address of the program's control block.
//!
//! A hash table whose keys are claimed and given up by one compare-and-swap or store each. A key
//! lies within [`WINDOW`] places of where its hash says, so that nothing has to be moved and a
//! search that finds nothing ends soon. Who has found a shadow may find it used for something else
//! a moment later; so what is found has a round, and nothing is done to a shadow of another round.

use core::cell::UnsafeCell;
use core::ffi::c_int;
use core::mem::{MaybeUninit, offset_of};
use core::sync::atomic::{AtomicI32, AtomicIsize, AtomicU32, AtomicUsize, Ordering};

use libc::aiocb;
use stableio_onepass as onepass;

use crate::files::File;
use crate::gate::real;
use crate::io::{Dir, Io};
use crate::signals;

/// Places; a power of two. Twice as many as there can be I/Os.
const PLACES: usize = 2 * crate::io::MOST;
/// How many places a key may lie in.
const WINDOW: usize = 64;

/// Addresses of the program's control blocks; 0: free.
static KEYS: [AtomicUsize; PLACES] = [const { AtomicUsize::new(0) }; PLACES];
static SHADOWS: [Shadow; PLACES] = [const { Shadow::NEW }; PLACES];
/// How many keys there are.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// The part of `struct aiocb` (aio.h of glibc) in which the C library keeps what became of it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outcome {
    error: c_int,
    _pad: c_int,
    result: isize,
}

/// Where that part lies: it ends where the offset begins.
const OUTCOME_AT: usize = offset_of!(aiocb, aio_offset) - size_of::<Outcome>();

/// A control block of ours, for one of the program's.
struct Shadow {
    /// The round, and in the lowest two bits one of the states below.
    word: AtomicU32,
    /// What the program is told when it is [`DONE`].
    error: AtomicI32,
    result: AtomicIsize,
    /// The C library's until it says that it is complete.
    block: UnsafeCell<MaybeUninit<aiocb>>,
    kind: UnsafeCell<MaybeUninit<Kind>>,
}

/// Free, or claimed and being filled.
const NOTHING: u32 = 0;
const IN_FLIGHT: u32 = 1;
/// The C library is done with it, and somebody ends it.
const ENDING: u32 = 2;
const DONE: u32 = 3;
const STATE: u32 = 3;
const ROUND: u32 = 4;

// SAFETY: the C library alone touches `block` while it is in flight; before, who claimed the key,
// and after, who won `ENDING`, alone touch both cells. The rest is atomic.
unsafe impl Sync for Shadow {}

impl Shadow {
    #[expect(clippy::declare_interior_mutable_const, reason = "only to fill the table")]
    const NEW: Shadow = Shadow {
        word: AtomicU32::new(NOTHING),
        error: AtomicI32::new(0),
        result: AtomicIsize::new(0),
        // Zeros, so that the table takes no room in the file.
        block: UnsafeCell::new(MaybeUninit::zeroed()),
        kind: UnsafeCell::new(MaybeUninit::zeroed()),
    };
}

/// What is to be done when it completes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// The I/O is to be ended.
    Ours(Io),
    /// It is to be counted.
    Direct(File, Dir),
    /// It goes through the page cache, and has to be brought out of it.
    Uncached(File, Dir),
}

/// A shadow that was found, in its round.
#[derive(Clone, Copy)]
pub(super) struct Found {
    place: usize,
    round: u32,
}

fn window(key: usize) -> impl Iterator<Item = usize> {
    // Control blocks lie in arrays of structures: multiplied, all bits of the address count.
    let first = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (0..WINDOW).map(move |step| (first as usize + step) % PLACES)
}

/// Whether there are any shadows.
pub(super) fn is_used() -> bool {
    COUNT.load(Ordering::Acquire) != 0
}

/// The shadow of the control block at this address.
pub(super) fn find(key: usize) -> Option<Found> {
    if key == 0 || !is_used() {
        return None;
    }
    window(key).find_map(|place| found(place, key))
}

/// The shadow in this place, if it has this key, and did when the round was read.
fn found(place: usize, key: usize) -> Option<Found> {
    let has_key = || KEYS[place].load(Ordering::Acquire) == key;
    if !has_key() {
        return None;
    }
    let round = SHADOWS[place].word.load(Ordering::Acquire) & !STATE;
    has_key().then_some(Found { place, round })
}

/// A shadow for the control block at this address, which has none; `None` if there is no room.
pub(super) fn claim(key: usize) -> Option<Found> {
    let free = || {
        window(key).find(|place| {
            let key_of = &KEYS[*place];
            key_of.load(Ordering::Relaxed) == 0
                && key_of.compare_exchange(0, key, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    };
    let place = free().or_else(|| {
        // Programs need not ask what became of their requests. So many that nobody asks about for
        // so long nobody will ask about any more.
        for place in window(key) {
            let old = found(place, KEYS[place].load(Ordering::Acquire));
            if let Some(old) = old.filter(|old| old.is_complete()) {
                old.leave(DONE);
            }
        }
        free()
    })?;
    COUNT.fetch_add(1, Ordering::AcqRel);
    Some(Found { place, round: SHADOWS[place].word.load(Ordering::Acquire) & !STATE })
}

/// Ends all that are complete.
pub(super) fn look_at_all() {
    if is_used() {
        for (place, key) in KEYS.iter().enumerate() {
            let key = key.load(Ordering::Acquire);
            if key != 0
                && let Some(found) = found(place, key)
            {
                found.is_complete();
            }
        }
    }
}

/// The shadow of which this is the block.
pub(super) fn of_block(block: *mut aiocb) -> Option<Found> {
    let at = (block as usize).checked_sub(SHADOWS.as_ptr() as usize)?;
    let place = at / size_of::<Shadow>();
    found(place, KEYS.get(place)?.load(Ordering::Acquire))
}

/// A forked child has none of its parent's I/Os under way.
pub(crate) fn after_fork() {
    if COUNT.swap(0, Ordering::Relaxed) == 0 {
        return;
    }
    for (key, shadow) in KEYS.iter().zip(&SHADOWS) {
        key.store(0, Ordering::Relaxed);
        shadow.word.store(NOTHING, Ordering::Relaxed);
    }
}

impl Found {
    fn shadow(self) -> &'static Shadow {
        &SHADOWS[self.place]
    }

    /// Goes from one state to another; false if it is not in the first, or of another round.
    fn goes(self, from: u32, to: u32) -> bool {
        let (from, to) = (self.round | from, self.round | to);
        let word = &self.shadow().word;
        word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether it is in this state, in this round.
    fn is(self, state: u32) -> bool {
        self.shadow().word.load(Ordering::Acquire) == self.round | state
    }

    /// Writes down what it stands for. By who claimed it.
    pub(super) fn fill(self, block: aiocb, kind: Kind) {
        let shadow = self.shadow();
        let ongoing = Outcome { error: libc::EINPROGRESS, _pad: 0, result: 0 };
        // SAFETY: nobody else touches the cells of a shadow that is claimed. Some late-comer of the
        // round before may have the C library read the error in it, and is not believed.
        unsafe {
            (*shadow.block.get()).write(block);
            self.block().byte_add(OUTCOME_AT).cast::<Outcome>().write(ongoing);
            (*shadow.kind.get()).write(kind);
        }
        self.goes(NOTHING, IN_FLIGHT);
    }

    /// What the C library is to be given.
    pub(super) fn block(self) -> *mut aiocb {
        self.shadow().block.get().cast()
    }

    /// Whether it is complete, and ended. If it is complete it is ended, by us or by somebody else.
    pub(super) fn is_complete(self) -> bool {
        if self.is(IN_FLIGHT) {
            // SAFETY: static memory, in which the C library reads one number.
            let error = unsafe { real!(c"aio_error64" as fn(*const aiocb) -> c_int)(self.block()) };
            if error != libc::EINPROGRESS {
                self.end(error);
            }
        }
        self.is(DONE)
    }

    /// Ends it (PAIO-2), unless somebody else does. Not to be interrupted (PAIO-3).
    fn end(self, error: c_int) {
        signals::undisturbed(|| {
            if !self.goes(IN_FLIGHT, ENDING) {
                return;
            }
            let shadow = self.shadow();
            // SAFETY: complete, and nobody but who won touches the cells; the C library only reads
            // the result in its part.
            let (result, kind, block) = unsafe {
                let result = real!(c"aio_return64" as fn(*mut aiocb) -> isize)(self.block());
                (result, (*shadow.kind.get()).assume_init(), &*self.block())
            };
            let result = if error != 0 { -(error as isize) } else { result };
            let result = super::end(kind, block, result);
            let (error, result) = if result < 0 { (-result as c_int, -1) } else { (0, result) };
            shadow.error.store(error, Ordering::Relaxed);
            shadow.result.store(result, Ordering::Relaxed);
            self.goes(ENDING, DONE);
        });
    }

    /// If it is complete, moves what became of it to the program's control block, where the C
    /// library finds it, and frees the shadow. False if it is not complete.
    pub(super) fn tell(self, block: *const aiocb) -> bool {
        if !self.is_complete() {
            return false;
        }
        let shadow = self.shadow();
        let outcome = Outcome {
            error: shadow.error.load(Ordering::Relaxed),
            _pad: 0,
            result: shadow.result.load(Ordering::Relaxed),
        };
        // Two that ask at once both write the same.
        if self.is(DONE) {
            let to = block.wrapping_byte_add(OUTCOME_AT).cast_mut().cast();
            // SAFETY: the program's memory is foreign, and may be inaccessible, which is its own
            // loss; ours holds as much.
            let _ =
                unsafe { onepass::copy_out((&raw const outcome).cast(), to, size_of::<Outcome>()) };
            self.leave(DONE);
        }
        true
    }

    /// Frees it: the C library has not taken it.
    pub(super) fn not_taken(self) {
        if self.goes(IN_FLIGHT, ENDING) {
            // SAFETY: filled, and nobody but who won touches the cell.
            if let Kind::Ours(io) = unsafe { (*self.shadow().kind.get()).assume_init() } {
                io.cancel();
            }
            self.leave(ENDING);
        }
    }

    /// Frees it: it was never filled.
    pub(super) fn not_filled(self) {
        self.leave(NOTHING);
    }

    fn leave(self, from: u32) {
        let word = &self.shadow().word;
        let next = self.round.wrapping_add(ROUND) | NOTHING;
        let (now, ordering) = (self.round | from, Ordering::AcqRel);
        if word.compare_exchange(now, next, ordering, Ordering::Relaxed).is_ok() {
            COUNT.fetch_sub(1, Ordering::AcqRel);
            KEYS[self.place].store(0, Ordering::Release);
        }
    }
}
