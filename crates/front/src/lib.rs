//! stableio-front

pub mod nbd;
pub mod socket;
pub mod vhost_user_blk;
