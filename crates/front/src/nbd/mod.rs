//! The NBD front end: exports for network clients.
//!
//! [`negotiate`] is the handshake and [`proto`] the transmission phase of the
//! protocol, both sans I/O: they turn bytes into types and types into bytes.
//! The [`server`] moves the bytes:
//!
//! ```text
//!            ┌─ inbox ─▶ session ─▶ Stack::submit ─┐
//!   client ◀─┤   requests, payload                 │ one small task per piece
//!            └─ link ◀── answer ◀──────────────────┘
//!                replies, data
//! ```

mod answer;
mod connection;
pub mod export;
mod inbox;
mod link;
pub mod negotiate;
pub mod proto;
pub mod server;
mod session;
mod stream;

pub use export::{BadExport, BlockSizes, ExportInfo};
pub use server::{Export, NbdServer, Options};
