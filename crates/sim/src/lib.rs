//! A seeded world around the production code.
//!
//! Array, stack, executor and pool are the ones that serve users. What is
//! simulated is everything that they touch: the members, the program that
//! passes memory, the order in which tasks run, and the end of the process.
//!
//! | file | simulates or decides |
//! |---|---|
//! | `random` | every choice, from one seed |
//! | `image` | the bytes of a member |
//! | `member` | a device that takes its payload late and in pieces, and fails |
//! | `program` | a program that changes the memory of requests under way |
//! | `write` | what a write may leave behind |
//! | `world` | one array with its program; steps, crashes, reopening |
//! | `check` | whether images fit the rules below |
//! | `play` | a mix of everything, for `sim SEED` |
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
//! SIM-4: a crash keeps every member write that settled; of those under way
//! each block is in or not, by seed. It is the end of a process, not of power.
//!
//! What must hold of the images where no write is under way:
//!
//! CHECK-1: every written block has the guard that its tuple says.
//!
//! CHECK-2: the parity of a row is the XOR of its written blocks.
//!
//! CHECK-3: the tuples beside the parity are those beside the data.
//!
//! CHECK-4: every aligned 8-byte word of the program's memory that lies whole
//! in a segment of a write is, as stored, one that the program stored there
//! between submission and settlement.
//!
//! CHECK-5: what no write covered is what it was.

pub mod check;
pub mod image;
pub mod member;
pub mod play;

pub mod program;
pub mod random;
pub mod world;
pub mod write;

pub use check::{Checker, Finding};
pub use image::Image;
pub use member::SimMember;
pub use program::{Buffer, Program, Source};
pub use random::Random;
pub use world::{Shape, World, alone};
pub use write::{Content, Write};

/// How many of something a test should try: `few` where `STABLEIO_QUICK=1`.
pub fn thorough<T>(many: T, few: T) -> T {
    if std::env::var_os("STABLEIO_QUICK").is_some_and(|v| v == "1") { few } else { many }
}
