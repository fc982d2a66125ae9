//! The launcher of `stableio run` and `stableio detect`: starts a program, and all that descends
//! from it, in a session whose direct I/O is protected or watched.
//!
//! | process | file | does |
//! |---|---|---|
//! | launcher | `launch.rs`, `signals.rs` | prepares the session (`dir.rs`, `shared.rs`), passes signals on, ends as the command ends |
//! | supervisor | `supervise.rs` | the command's parent; answers the library (`answers.rs`, `files.rs`) and the net (`refuse.rs`, `caller.rs`) until the last process has ended |
//! | command | `start.rs` | spreads the net (`net.rs`) below itself and becomes the program |
//!
//! What a session did is read by `summary.rs`, with names for addresses from `symbols.rs`, and drawn
//! by `chart.rs`.
//!
//! In the program works the preload library (`preload/`), which this crate carries in itself. Both
//! share `stableio_session`.

mod answers;
mod caller;
mod chart;
mod dir;
mod error;
mod files;
mod launch;
mod link;
mod net;
mod policy;
mod program;
mod refuse;
mod shared;
mod signals;
mod start;
mod summary;
mod supervise;
mod symbols;
mod verdict;
mod voice;

pub use chart::chart;
pub use error::{Error, Result};
pub use launch::{Launch, Outcome, replace};
pub use policy::Policy;
pub use signals::End;
pub use summary::{
    Detected, FileUse, FindingUse, RemarkCount, SiteUse, Timeline, Totals, detected, files,
    remarks, totals,
};
pub use symbols::Place;
