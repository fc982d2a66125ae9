//! The devices that everything stands on.

mod file;
mod null;
mod ram;

pub(crate) use file::has_handed_over;
pub use file::{FileDevice, OpenOptions, lock, size};
pub use null::NullDevice;
pub use ram::RamDevice;
