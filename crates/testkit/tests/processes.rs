//! Child processes: what is waited for, and what happens when it does not come.

use std::io;
use std::path::Path;
use std::process::Command;

use stableio_testkit::{Child, Scratch};

fn shell(script: &str, scratch: &Scratch) -> io::Result<Child> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(script);
    Child::spawn(command, scratch)
}

#[test]
fn a_line_is_returned_once_it_is_whole() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut child = shell("printf 'serving '; sleep 0.1; echo vm7; exec sleep 60", &scratch)?;
    assert_eq!(child.wait_for_line("serving")?, "serving vm7");
    let ended = child.terminate()?;
    assert!(ended.was_killed());
    assert_eq!(ended.stdout, "serving vm7\n");
    Ok(())
}

#[test]
fn one_that_ends_early_is_quoted() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut child = shell("echo no such member >&2; exit 3", &scratch)?;
    let error = child.wait_for_socket(Path::new("/nowhere")).expect_err("it is gone");
    let text = error.to_string();
    assert!(text.contains("exit status: 3") && text.contains("no such member"), "{text}");
    Ok(())
}

#[test]
fn a_clean_end_gives_its_status() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut child =
        shell("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done", &scratch)?;
    child.wait_for_line("up")?;
    let ended = child.terminate()?;
    assert!(ended.status.success());
    assert_eq!(ended.stdout, "up\nbye\n");
    Ok(())
}

#[test]
fn a_dropped_one_is_gone() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let child = shell("exec sleep 60", &scratch)?;
    let proc_dir = format!("/proc/{}", child.pid());
    assert!(Path::new(&proc_dir).exists());
    drop(child);
    assert!(!Path::new(&proc_dir).exists());
    Ok(())
}

#[test]
fn scratch_is_removed_with_all_that_is_in_it() -> io::Result<()> {
    for scratch in [Scratch::new()?, Scratch::on_disk()?] {
        let image = scratch.sparse("disk.img", 1 << 20)?;
        assert_eq!(image.metadata()?.len(), 1 << 20);
        let dir = scratch.dir().to_path_buf();
        drop(scratch);
        assert!(!dir.exists());
    }
    Ok(())
}
