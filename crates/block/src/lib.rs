//! Requests, the devices that take them, and the workers that run both.
//!
//! A front end makes a [`Request`] and gives it to a [`Stack`], which checks
//! it, reserves its memory, stabilizes foreign memory where the devices below
//! sample it more than once, and submits it to a [`Device`]. The [`Ticket`]
//! that comes back is only a receiver. [`path`] is the list of all stops.

pub mod dev;
mod device;
mod error;
pub mod exec;
mod issuer;
mod limits;
pub mod path;
mod request;
pub mod ring;
pub mod sync;
mod worker;

pub use device::Device;
pub use error::{Error, Kind, OpName};
pub use exec::{Handle, Ticket};
pub use issuer::Issuer;
pub use limits::{Cache, Limits, Radius};
pub use path::{Stack, Stage};
pub use request::{Body, Extent, Into, Op, Reply, Request};
pub use worker::Worker;

/// What a request settles with.
pub type Outcome = Result<Reply, Error>;
