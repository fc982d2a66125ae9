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
    torture_writes(if quick() { "20000" } else { "200000" }, options)
}

/// The same with so many raced writes.
fn torture_writes(writes: &str, options: &[&str]) -> io::Result<(Option<i32>, Value)> {
    let scratch = Scratch::new()?;
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
    nothing_happened(&report);
    assert_eq!(code, Some(0));
    Ok(())
}

/// No damage, no false error, nothing mended, no member charged; of reads into memory that
/// changes neither, and there were some.
fn nothing_happened(report: &Value) {
    let kinds = ["damaged", "failed", "reads_failed", "bad_guards", "bad_rows", "strange_words"];
    for damage in
        kinds.into_iter().chain(["charged", "mended", "neighbours_changed", "neighbours_exposed"])
    {
        assert_eq!(number(report, damage), 0, "{damage}: {report:#}");
    }
    let (reads, raced) = (number(report, "reads"), number(report, "reads_raced"));
    assert!(reads > 1000 && raced * 100 >= reads, "the reads show nothing: {report:#}");
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

/// Every level, and with faults that one of its members has.
#[test]
fn no_level_is_damaged_and_faults_of_a_member_are_made_up_for() -> io::Result<()> {
    const FAULTS: &str = "flip:1/3000,latent:1/3000,read-error:1/5000";
    for level in ["single", "raid1", "raid6"] {
        let (code, report) = torture(&["--level", level])?;
        assert_eq!(code, Some(0), "{level}: {report:#}");
        nothing_happened(&report);
    }
    for level in ["raid1", "raid5", "raid6"] {
        // A repair and a charge are right here, but nothing else is.
        let (code, report) = torture_writes("30000", &["--level", level, "--faults", FAULTS])?;
        assert_eq!(code, Some(0), "{level}: {report:#}");
        let hit = report["faults_hit"].as_str().expect("faults were asked for");
        assert!(!hit.starts_with("error 0, latent 0, flip 0"), "{level}: {report:#}");
    }
    Ok(())
}

#[test]
fn faults_are_refused_where_nobody_makes_up_for_them() -> io::Result<()> {
    let scratch = Scratch::new()?;
    for (level, faults, says) in
        [("single", "flip:1/100", "choose a --level"), ("raid5", "rot", "is no fault")]
    {
        let args = ["torture", "--level", level, "--faults", faults];
        let ended = run_stableio(&scratch, args)?;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(ended.stderr.contains(says), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    }
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
        assert_eq!(status(&scratch)?["state"], "healthy");
        let ended = demo.terminate()?;
        assert!(ended.status.success(), "{ended:?}");
    }
    Ok(())
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} is not a number: {report:#}"))
}
