//! The devices that everything stands on, and those that stand over them to
//! make them fail and wait.

mod delay;
pub mod fault;
mod file;
mod null;
mod ram;

pub use delay::{DelayDevice, Delays};
pub use fault::{FaultDevice, Faults};
pub(crate) use file::has_handed_over;
pub use file::{FileDevice, OpenOptions, atomic_unit, lock, size};
pub use null::NullDevice;
pub use ram::RamDevice;
