//! A test that can not run says so, where the harness hides it from nobody.

use std::env;
use std::fs;
use std::io;
use std::process::Command;

use stableio_testkit::{Scratch, require_tool, tool};

#[test]
fn a_skip_is_printed_and_logged() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let log = scratch.path("skips");
    // Passing tests are silent in the harness, unless they write past it.
    let run = || {
        Command::new(env::current_exe()?)
            .args(["--exact", "needs_what_is_not_there", "--ignored"])
            .env("STABLEIO_SKIP_LOG", &log)
            .output()
    };
    let line = "SKIP needs_what_is_not_there: no-such-program is not installed\n";
    let first = run()?;
    assert!(first.status.success());
    assert_eq!(String::from_utf8_lossy(&first.stderr), line);
    run()?;
    assert_eq!(fs::read_to_string(&log)?, [line, line].concat());
    Ok(())
}

#[test]
#[ignore = "the other test runs it"]
fn needs_what_is_not_there() {
    assert_eq!(require_tool("no-such-program"), None);
}

#[test]
fn a_tool_is_found_by_its_name() {
    let path = tool("sh").expect("there is a shell");
    assert!(path.is_absolute() && path.ends_with("sh"));
}
