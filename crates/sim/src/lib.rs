//! A seeded world around the production code.
//!
//! Array, stack, executor and pool are the ones that serve users. What is
//! simulated is everything that they touch: the members, the program that
//! passes memory, the order in which tasks run, and the end of the process.
//!
//! | file | simulates or decides |
//! |---|---|
//! | `random` | every choice, from one seed |
//! | `image` | bytes, most of them never written |
//! | `medium` | what a member holds, and what a loss of power leaves of it |
//! | `member` | a device that takes its payload late and in pieces, and fails |
//! | `program` | a program that changes the memory of requests under way |
//! | `write` | what a write may leave behind |
//! | `shape` | levels, members and sizes of a world |
//! | `world` | one array with its program; steps, crashes, reopening |
//! | `model` | what the array may read as |
//! | `check` | whether images fit the rules below |
//! | `extract` | what the format's second reader makes of it |
//! | `play`, `drama` | a mix of everything, for `sim SEED` |
//! | `coverage` | what happened in it |
//! | `protection` | what can be taken away, to see that it is missed |
//! | `fleet` | many worlds on many threads |
//!
//! The world:
//!
//! SIM-1: a seed replays: the same steps, the same images.
//!
//! SIM-2: a member takes the payload of a write piece by piece, over many
//! steps, the last piece just before it completes; a read delivers likewise.
//!
//! SIM-3: between any two polls of tasks, and so between any two pieces, the
//! program stores new words into the memory of every request under way.
//!
//! SIM-4: the death of the process keeps every member write that settled; of
//! those under way each block is in or not, by seed. What was in a member's
//! cache stays there.
//!
//! SIM-5: a loss of power leaves of every block that was written since the
//! last flush, or was under way, any version since; or two of them, torn at
//! the atomic unit (MED-3).
//!
//! SIM-6: members that stall, fail, die, rot or are missing are never more
//! than the redundancy absorbs; one that is being filled may fail as well.
//!
//! What must hold of the images where no write is under way:
//!
//! CHECK-1: every written block has the guard that its tuple says.
//!
//! CHECK-2: the parity of a row, P and Q, is that of its written blocks.
//!
//! CHECK-3: the tuples beside the parity are those beside the data.
//!
//! CHECK-4: every aligned 8-byte word of the program's memory that lies whole
//! in a segment of a write is, as stored, one that the program stored there
//! between submission and settlement.
//!
//! CHECK-5: what no write covered is what it was.
//!
//! What the array must read as, after whatever happened, are MODEL-1 to
//! MODEL-5.

pub mod check;
pub mod coverage;
mod drama;
pub mod extract;
pub mod fleet;
pub mod image;
pub mod medium;
pub mod member;
pub mod model;
pub mod play;
pub mod program;
pub mod protection;
pub mod random;
pub mod shape;
pub mod world;
pub mod write;

pub use check::{Checker, Finding};
pub use coverage::{Coverage, Event};
pub use image::Image;
pub use medium::Medium;
pub use member::SimMember;
pub use model::{Crash, Model, Pending};
pub use program::{Buffer, Program, Source};
pub use protection::Protection;
pub use random::Random;
pub use shape::{LEVELS, Shape};
pub use world::{Remains, Stop, World, alone};
pub use write::{Content, Write};

/// How many of something a test should try: `few` where `STABLEIO_QUICK=1`.
pub fn thorough<T>(many: T, few: T) -> T {
    if std::env::var_os("STABLEIO_QUICK").is_some_and(|v| v == "1") { few } else { many }
}
