//! stableio-array
