//! The environment can ask for the portable tier; otherwise the best one is used.

use std::process::Command;

use stableio_onepass::{Tier, available_tiers, tier};

#[test]
fn the_environment_chooses() {
    const EXPECTED: &str = "STABLEIO_ONEPASS_EXPECTED_TIER";
    if let Ok(expected) = std::env::var(EXPECTED) {
        assert_eq!(format!("{:?}", tier()), expected);
        return;
    }
    let best = *available_tiers().last().expect("Portable is always there");
    for (asked, expected) in [("portable", Tier::Portable), ("", best)] {
        // The choice is made once per process, so each takes a process of its own.
        let status = Command::new(std::env::current_exe().expect("this test"))
            .env("STABLEIO_SIMD", asked)
            .env(EXPECTED, format!("{expected:?}"))
            .status()
            .expect("this test can be started");
        assert!(status.success(), "STABLEIO_SIMD={asked:?} does not give {expected:?}");
    }
}
