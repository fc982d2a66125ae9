//! stableio-block
