//! stableio-mem
