//! The project's claim, made by the command itself: a program that changes its buffers in flight
//! damages nothing; and its twin, in which the same memory is declared stable, damages plenty.

use std::io;
use std::time::Duration;

use serde_json::Value;
use stableio_testkit::{
    Child, Scratch, nbd_uri, qemu_io, quick, require_tools, run_stableio, run_tool, stableio,
    status,
};

/// Runs `stableio torture` to its end; gives its exit code and report.
fn torture(options: &[&str]) -> io::Result<(Option<i32>, Value)> {
    let scratch = Scratch::new()?;
    let writes = if quick() { "20000" } else { "200000" };
    let mut command = stableio(&scratch)?;
    command.args(["torture", "--json", "--writes", writes]).args(options);
    let ended = Child::spawn(command, &scratch)?.wait_within(Duration::from_secs(400))?;
    let report = serde_json::from_str(&ended.stdout).map_err(|error| {
        io::Error::other(format!("{error}: {}\n{}{}", ended.status, ended.stdout, ended.stderr))
    })?;
    let number = |key: &str| number(&report, key);
    assert!(number("raced") >= writes.parse().expect("a number"), "{report:#}");
    assert!(number("writes") >= number("raced"), "{report:#}");
    Ok((ended.status.code(), report))
}

#[test]
fn buffers_that_change_in_flight_damage_nothing() -> io::Result<()> {
    let (code, report) = torture(&[])?;
    let kinds = ["damaged", "failed", "bad_guards", "bad_rows", "strange_words"];
    for damage in kinds.into_iter().chain(["mended", "neighbours_changed", "neighbours_exposed"]) {
        assert_eq!(number(&report, damage), 0, "{damage}: {report:#}");
    }
    assert_eq!(code, Some(0));
    Ok(())
}

#[test]
fn the_same_buffers_declared_stable_are_seen_to_damage() -> io::Result<()> {
    let (code, report) = torture(&["--unprotected"])?;
    let (damaged, raced) = (number(&report, "damaged"), number(&report, "raced"));
    assert!(damaged * 100 >= raced, "less than 1 %: {report:#}");
    assert!(number(&report, "bad_rows") > 0, "parity fits after all: {report:#}");
    assert_eq!(code, Some(1));
    Ok(())
}

/// `demo` proves both at once, and then serves an array that keeps what is written to it.
#[test]
fn the_demo_proves_and_then_serves() -> io::Result<()> {
    if !require_tools(&["nbdinfo", "qemu-io"]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let dir = scratch.path("demo");
    let proof = run_stableio(&scratch, ["demo", "--proof-only", "--seconds", "2"])?;
    assert!(proof.status.success(), "{proof:?}");
    for (start, pattern) in [(true, 0), (false, 7)] {
        let mut command = stableio(&scratch)?;
        command.args(["demo", "--seconds", "2", "--dir"]).arg(&dir);
        let mut demo = Child::spawn(command, &scratch)?;
        demo.wait_for_line("Ctrl-C or SIGTERM ends it")?;
        assert_eq!(demo.stdout().contains("made the array"), start, "{}", demo.stdout());
        let uri = nbd_uri("demo", &dir.join("nbd.sock"));
        assert!(demo.stdout().contains(&format!("nbdinfo '{uri}'")), "{}", demo.stdout());
        run_tool("nbdinfo".as_ref(), [&uri])?;
        qemu_io(&uri, &[&format!("read -P {pattern} 1M 1M"), "write -P 7 1M 1M", "flush"])?;
        assert_eq!(status(&scratch)?["state"], "optimal");
        let ended = demo.terminate()?;
        assert!(ended.status.success(), "{ended:?}");
    }
    Ok(())
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} is not a number: {report:#}"))
}
