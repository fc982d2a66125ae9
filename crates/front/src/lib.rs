//! stableio-front

pub mod nbd;
