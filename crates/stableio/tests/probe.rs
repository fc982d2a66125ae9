//! `stableio probe`: what it prints, for people and for programs, and its exit codes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;
use stableio_testkit::{Ended, Mounted, Scratch, run_stableio, run_tool, skip, stableio_bin};

const MIB: u64 = 1 << 20;

fn probe<S: AsRef<OsStr>>(arguments: &[S]) -> io::Result<Ended> {
    let scratch = Scratch::new()?;
    let all = [OsStr::new("probe")].into_iter().chain(arguments.iter().map(AsRef::as_ref));
    run_stableio(&scratch, all)
}

fn json<S: AsRef<OsStr>>(arguments: &[S]) -> io::Result<(Option<i32>, Vec<Value>)> {
    let mut all: Vec<&OsStr> = vec![OsStr::new("--json")];
    all.extend(arguments.iter().map(AsRef::as_ref));
    let ended = probe(&all)?;
    let reports = serde_json::from_str(&ended.stdout)
        .map_err(|error| io::Error::other(format!("{error}: {ended:?}")))?;
    Ok((ended.status.code(), reports))
}

#[test]
fn xfs_on_zram_is_at_risk_and_says_why() -> io::Result<()> {
    let Some(mounted) = Mounted::xfs_on_zram(400 * MIB)? else { return Ok(()) };
    let image = mounted.path().join("disk.img");
    File::create_new(&image)?.set_len(MIB)?;
    let (code, reports) = json(&[&image])?;
    if reports[0]["verdict"] == "safe" {
        assert_eq!(code, Some(0));
        skip("this kernel copies there");
        return Ok(());
    }
    assert_eq!((code, &reports[0]["verdict"]), (Some(1), &"at_risk".into()));
    assert_eq!(reports[0]["samples_writes_twice"], "yes");
    assert_eq!(reports[0]["write_radius"], "issuer");
    assert_eq!(reports[0]["shows"], "silently");
    assert_eq!(reports[0]["direct_write"], "straight_through");
    let ended = probe(&[&image])?;
    for text in
        ["AT RISK", "zram", "stable_writes", "straight through", "own data, silent", "what to do: "]
    {
        assert!(ended.stdout.contains(text), "{text}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains('\x1b') && ended.stderr.is_empty(), "{ended:?}");
    // One that is at risk outweighs one that is safe, whatever their order.
    let safe = Scratch::new()?;
    for paths in [[safe.dir(), image.as_path()], [image.as_path(), safe.dir()]] {
        assert_eq!(probe(&paths)?.status.code(), Some(1));
    }
    // A line of the table has all of one file system.
    let all = probe(&["--all"])?;
    let line = all.stdout.lines().find(|line| line.contains(&*mounted.path().to_string_lossy()));
    assert!(line.is_some_and(|line| line.contains("AT RISK") && line.contains("stable_writes")));
    assert_eq!(all.status.code(), Some(1));
    Ok(())
}

#[test]
fn a_directory_in_memory_is_safe() -> io::Result<()> {
    let scratch = Scratch::new()?;
    if !scratch.is_in_memory() {
        skip("there is no directory in memory");
        return Ok(());
    }
    let (code, reports) = json(&[scratch.dir()])?;
    assert_eq!((code, &reports[0]["verdict"]), (Some(0), &"safe".into()));
    assert_eq!(reports[0]["file_system"]["kind"], "tmpfs");
    assert!(reports[0]["direct_write"]["not_direct"]["why"].is_string());
    Ok(())
}

#[test]
fn every_mounted_file_system_is_told_once() -> io::Result<()> {
    let (code, reports) = json(&["--all"])?;
    assert!(matches!(code, Some(0 | 1 | 3)), "{code:?}");
    let mut paths: Vec<_> = reports.iter().map(|report| report["path"].to_string()).collect();
    let count = paths.len();
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), count);
    assert!(paths.contains(&"\"/\"".to_owned()), "{paths:?}");
    Ok(())
}

#[test]
fn a_path_that_is_not_there_is_one_line_and_code_2() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let missing = scratch.path("missing");
    for (paths, told) in [(vec![missing.as_path()], 0), (vec![scratch.dir(), &missing], 1)] {
        let ended = probe(&paths)?;
        assert_eq!(ended.status.code(), Some(2));
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains("missing: No such file"), "{}", ended.stderr);
        assert_eq!(ended.stdout.matches("direct writes: ").count(), told);
    }
    let ended = probe(&["/dev/null"])?;
    assert_eq!(ended.status.code(), Some(2));
    assert_eq!(probe::<&str>(&[])?.status.code(), Some(2), "neither a path nor --all");
    Ok(())
}

/// Without root: what the kernel says to all is enough for most; where it is not, the exit code
/// says so, and the report what root would see.
#[test]
fn it_works_without_root_and_says_what_root_would_see() -> io::Result<()> {
    let Some(mounted) = Mounted::on_loop("btrfs", 400 * MIB)? else { return Ok(()) };
    let image = mounted.path().join("private.img");
    File::create_new(&image)?.set_len(MIB)?;
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600))?;
    run_tool("chmod".as_ref(), ["a+rx".as_ref(), mounted.path().parent().unwrap().as_os_str()])?;
    // Where everybody may execute it.
    let scratch = Scratch::new()?;
    run_tool("chmod".as_ref(), ["a+rx".as_ref(), scratch.dir().as_os_str()])?;
    let command = scratch.path("stableio");
    fs::copy(stableio_bin()?, &command)?;
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755))?;
    let nobody = |arguments: &[&OsStr]| {
        let mut command = Command::new(&command);
        command.arg("probe").args(arguments).uid(65534).gid(65534).current_dir("/");
        command.output()
    };
    let output = nobody(&[image.as_os_str()])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let root_sees = text.contains("root would see: its attributes");
    match output.status.code() {
        Some(3) => assert!(root_sees, "{text}"),
        // From 7.3 on it is safe with checksums and without.
        code => assert_eq!((code, root_sees), (Some(0), false), "{text}"),
    }
    let output = nobody(&["--all".as_ref()])?;
    assert!(matches!(output.status.code(), Some(0 | 1 | 3)), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    Ok(())
}
