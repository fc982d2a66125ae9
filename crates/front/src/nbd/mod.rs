//! The NBD front end: exports for network clients.
//!
//! [`negotiate`] is the handshake and [`proto`] the transmission phase of the
//! protocol, both sans I/O: they turn bytes into types and types into bytes.
//! The server moves the bytes.

pub mod negotiate;
pub mod proto;
