//! Arrays: one engine over members, with a guard for every block.
//!
//! | file | decides |
//! |---|---|
//! | `geometry` | where everything lies |
//! | `superblock`, `tuple` | bytes of the format (`docs/format.md`) |
//! | `create`, `assemble` | which members make an array |
//! | `member` | a role's devices, and what is under way on them |
//! | `roles` | the state of every role, in every superblock |
//! | `pages` | tuples in memory and on their way to members |
//! | `log` | what was being written |
//! | `token` | who may change a row |
//! | `bands`, `parity`, `write` | how a write covers rows, and what it then does |
//! | `read`, `repair` | verified reads, and mending |
//! | `recover` | after a crash |
//! | `tend` | long work: begun, paused, stopped |
//! | `fill`, `scrub`, `window` | filling a member, looking through everything |
//! | `engine` | all of them together, and the array's life |

pub mod array;
pub mod assemble;
mod bands;
mod compare;
pub mod create;
mod engine;
mod fill;
pub mod geometry;
pub mod health;
mod join;
pub mod log;
mod member;
mod pages;
mod parity;
mod read;
mod recover;
mod repair;
mod roles;
mod scrub;
pub mod superblock;
mod tend;
mod token;
pub mod tuple;
pub mod twin;
mod window;
mod write;

pub use array::{Array, ArrayDevice, Attached, OpenError};
pub use assemble::{AssembleError, Assembly, Probe, assemble, probe};
pub use create::{CreateError, CreateOptions, create, prepare_replacement};
pub use geometry::{Geometry, Level};
pub use health::Health;
pub use superblock::{RoleEntry, RoleState, Superblock};
pub use tend::TendError;
