//! stableio-sim
