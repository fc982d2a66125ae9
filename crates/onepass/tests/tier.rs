//! The environment can ask for a tier by name; otherwise the best one is used.

use std::process::Command;

use stableio_onepass::{available_tiers, tier};

#[test]
fn the_environment_chooses() {
    const EXPECTED: &str = "STABLEIO_ONEPASS_EXPECTED_TIER";
    if let Ok(expected) = std::env::var(EXPECTED) {
        assert_eq!(format!("{:?}", tier()), expected);
        return;
    }
    let best = *available_tiers().last().expect("Portable is always there");
    let mut asked: Vec<_> = available_tiers().iter().map(|tier| (tier.name(), *tier)).collect();
    asked.push(("", best));
    for kind in ["avx2", "avx512"] {
        let best = available_tiers().iter().rfind(|tier| tier.name().starts_with(kind));
        asked.extend(best.map(|tier| (kind, *tier)));
    }
    let runs = |asked: &str, expected: &str| {
        // The choice is made once per process, so each takes a process of its own.
        Command::new(std::env::current_exe().expect("this test"))
            .env("STABLEIO_ONEPASS", asked)
            .env(EXPECTED, expected)
            .output()
            .expect("this test can be started")
            .status
            .success()
    };
    for (asked, expected) in asked {
        assert!(runs(asked, &format!("{expected:?}")), "{asked:?} does not give {expected:?}");
    }
    assert!(!runs("avx3", &format!("{best:?}")), "what does not exist is refused");
}
