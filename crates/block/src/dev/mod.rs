//! The devices that everything stands on.

mod file;
mod null;
mod ram;

pub use file::{FileDevice, OpenOptions, lock, size};
pub use null::NullDevice;
pub use ram::RamDevice;
