//! stableio-onepass
