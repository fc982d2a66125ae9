//! stableio-testkit
