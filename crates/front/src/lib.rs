//! stableio-front
