//! Arrays: one engine over members, with a guard for every block.
//!
//! | file | decides |
//! |---|---|
//! | `geometry` | where everything lies |
//! | `superblock`, `tuple` | bytes of the format (`docs/format.md`) |
//! | `create`, `assemble` | which members make an array |
//! | `pages` | tuples in memory and on their way to members |
//! | `log` | what was being written |
//! | `token` | who may change a row |
//! | `bands`, `write` | how a write covers rows, and what it then does |
//! | `read`, `repair` | verified reads, and mending |
//! | `recover` | after a crash |
//! | `engine` | members, and what their failing means |

pub mod array;
pub mod assemble;
mod bands;
pub mod create;
mod engine;
pub mod geometry;
pub mod health;
mod log;
mod pages;
mod read;
mod recover;
mod repair;
pub mod superblock;
mod token;
pub mod tuple;
mod write;

pub use array::{Array, ArrayDevice, OpenError};
pub use assemble::{AssembleError, Assembly, Probe, assemble, probe};
pub use create::{CreateError, CreateOptions, create};
pub use geometry::{Geometry, Level};
pub use health::Health;
pub use superblock::{RoleState, Superblock};
