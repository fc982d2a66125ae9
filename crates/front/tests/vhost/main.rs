//! Guests, good and hostile, against the vhost-user-blk back end.

mod good;
mod hostile;
mod raw;
mod server;
