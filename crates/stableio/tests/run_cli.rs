//! `stableio run` and `stableio detect` from outside: what a shell sees of them, the net below
//! programs that do not load the library, and what is left when all is over.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use stableio_testkit::{Child, Ended, Scratch, Signal, require_tool, run_stableio, skip, stableio};

/// Makes the calls that its arguments name, and prints how each ended.
const CALLS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static char low[4096];
int main(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *call = argv[i], *path = argv[i + 1];
        struct open_how how = {.flags = O_RDWR | O_CREAT, .mode = 0600};
        char params[120] = {0};
        int fds[2];
        long result = -1;
        if (!strcmp(call, "open")) {
            result = open(path, O_RDWR | O_CREAT | O_DIRECT, 0600);
        } else if (!strcmp(call, "absent")) {
            result = open(path, O_RDWR | O_DIRECT);
        } else if (!strcmp(call, "plain")) {
            result = open(path, O_RDWR | O_CREAT, 0600);
        } else if (!strcmp(call, "relative")) {
            if (chdir(path) == 0) result = open("relative", O_RDWR | O_CREAT | O_DIRECT, 0600);
        } else if (!strcmp(call, "setfl")) {
            result = fcntl(open(path, O_RDWR | O_CREAT, 0600), F_SETFL, O_DIRECT);
        } else if (!strcmp(call, "pipe")) {
            if (pipe(fds) == 0) result = fcntl(fds[1], F_SETFL, O_DIRECT);
        } else if (!strcmp(call, "openat2")) {
            how.flags |= O_DIRECT;
            result = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
        } else if (!strcmp(call, "openat2_plain")) {
            result = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
        } else if (!strcmp(call, "openat2_fault")) {
            result = syscall(SYS_openat2, AT_FDCWD, path, (void *)8, sizeof how);
        } else if (!strcmp(call, "fault")) {
            result = open((char *)8, O_RDWR | O_DIRECT);
        } else if (!strcmp(call, "ring")) {
            result = syscall(SYS_io_uring_setup, 4, params);
        } else if (!strcmp(call, "open_32")) {
            /* The 32-bit table, with a path where 32 bits reach. */
            strncpy(low, path, sizeof low - 1);
            __asm__ volatile("int $0x80"
                             : "=a"(result)
                             : "a"(5L), "b"(low), "c"((long)(O_RDWR | O_CREAT | O_DIRECT)), "d"(0600L)
                             : "memory", "r8", "r9", "r10", "r11");
            if (result < 0) { errno = -result; result = -1; }
        } else if (!strcmp(call, "exec")) {
            char *none[] = {NULL};
            result = execve(path, argv + i + 1, none);
        }
        printf("%s=%s\n", call, result < 0 ? strerrorname_np(errno) : "ok");
    }
    fflush(stdout);
}
"#;

/// [`CALLS`] as a program without a dynamic linker.
fn static_program(scratch: &Scratch) -> io::Result<Option<String>> {
    let Some(gcc) = require_tool("gcc") else { return Ok(None) };
    let (source, program) = (scratch.path("calls.c"), scratch.path("calls"));
    fs::write(&source, CALLS)?;
    let output =
        Command::new(gcc).args(["-static", "-no-pie", "-o"]).arg(&program).arg(&source).output()?;
    if !output.status.success() {
        skip("gcc can not link statically here");
        return Ok(None);
    }
    Ok(Some(program.display().to_string()))
}

fn run(scratch: &Scratch, args: &[&str]) -> io::Result<Ended> {
    run_stableio(scratch, [&["run"], args].concat())
}

/// The only line of standard error.
fn line(ended: &Ended) -> &str {
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one line, please: {ended:?}");
    assert!(lines[0].starts_with("stableio: "), "{ended:?}");
    lines[0]
}

/// Waits until it is so, for ten seconds.
fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose parent is this one.
fn children_of(pid: u32) -> Vec<u32> {
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may contain anything; what follows its bracket does not.
        stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let all = fs::read_dir("/proc").expect("Linux").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|candidate| parent(*candidate) == Some(pid)).collect()
}

#[test]
fn a_shell_sees_what_the_program_would_have_shown() -> io::Result<()> {
    let scratch = Scratch::new()?;
    for policy in ["auto", "bounce", "uncached", "refuse", "off"] {
        let run = |script: &str| run(&scratch, &["--policy", policy, "--", "sh", "-c", script]);
        let ended = run("echo out; echo err >&2; exit 7")?;
        assert_eq!(ended.status.code(), Some(7), "{ended:?}");
        assert_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"));
        let ended = run("ulimit -c 0; kill -SEGV $$")?;
        assert_eq!(ended.status.signal(), Some(11), "{ended:?}");
        assert_eq!(ended.stdout + &ended.stderr, "");
    }
    // Also without the two dashes; the program's own options are its own.
    assert_eq!(run(&scratch, &["sh", "-c", "exit 3"])?.status.code(), Some(3));
    Ok(())
}

#[test]
fn what_can_not_be_executed_is_said_in_a_line_with_a_shells_code() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let script = |name: &str, text: &str, mode: u32| -> io::Result<String> {
        let path = scratch.path(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path.display().to_string())
    };
    let plain = script("plain", "", 0o644)?;
    let lame = script("lame", "#!/absent/interpreter\n", 0o755)?;
    let cases = [
        ("absent-command", 127, "not found"),
        ("/absent/command", 127, "not found"),
        ("/", 126, "is a directory"),
        (&plain, 126, "permission denied"),
        (&lame, 126, "interpreter"),
    ];
    for (command, code, says) in cases {
        for start in [&["run", "--policy=off"][..], &["run"], &["detect"]] {
            let ended = run_stableio(&scratch, [start, &["--", command]].concat())?;
            assert_eq!(ended.status.code(), Some(code), "{ended:?}");
            assert!(line(&ended).contains(command) && line(&ended).contains(says), "{ended:?}");
            assert_eq!(ended.stdout, "");
        }
    }
    // A script without a first line is the shell's.
    let shell = script("shell", "exit 5\n", 0o755)?;
    assert_eq!(run(&scratch, &["--", &shell])?.status.code(), Some(5));
    for misused in [&["run"][..], &["run", "--policy=both", "true"], &["detect"]] {
        let ended = run_stableio(&scratch, misused)?;
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    }
    let ended = run_stableio(&scratch, ["run", "--policy=both", "true"])?;
    assert!(ended.stderr.contains("auto, bounce, uncached, refuse, off"), "{ended:?}");
    Ok(())
}

#[test]
fn a_wrong_command_line_is_said_before_anything_runs() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let cases: [(&[&str], i32, &str); 5] = [
        (&["run"], 2, "COMMAND"),
        (&["detect"], 2, "COMMAND"),
        (&["run", "--policy", "some", "--", "true"], 2, "bounce"),
        (&["run", "--pool", "1MiB", "--", "true"], 1, "64 MiB"),
        (&["detect", "--error-exitcode", "256", "--", "true"], 2, "256"),
    ];
    for (args, code, says) in cases {
        let ended = run_stableio(&scratch, args)?;
        assert_eq!(ended.status.code(), Some(code), "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(says), "{args:?}: {ended:?}");
        assert_eq!(ended.stdout, "", "{args:?}");
    }
    Ok(())
}

#[test]
fn the_program_gets_the_library_before_what_the_user_preloads() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut command = stableio(&scratch)?;
    command.env("LD_PRELOAD", "libm.so.6").args(["run", "--", "sh", "-c"]);
    command.arg("echo \"$LD_PRELOAD $STABLEIO_SESSION\"; stat -c %a \"$STABLEIO_SESSION\"");
    let ended = Child::spawn(command, &scratch)?.wait()?;
    let (environment, mode) = ended.stdout.trim_end().split_once('\n').expect("two lines");
    let (preload, session) = environment.split_once(' ').expect("two words");
    assert_eq!(preload, format!("{session}/libstableio_preload.so:libm.so.6"));
    assert_eq!(mode, "700");
    assert!(!Path::new(session).exists(), "removed before the launcher ends");
    assert_eq!(ended.stderr, "");
    Ok(())
}

#[test]
fn off_is_the_program_itself() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut command = stableio(&scratch)?;
    command.args(["run", "--policy=off", "sh", "-c", "echo $$ ${LD_PRELOAD:-none}"]);
    let child = Child::spawn(command, &scratch)?;
    let pid = child.pid();
    assert_eq!(child.wait()?.stdout, format!("{pid} none\n"));
    Ok(())
}

/// A program that says how it was asked to end.
const TRAPS: &str = "trap 'exit 41' TERM; trap 'exit 42' HUP; trap 'exit 43' USR1; \
                     trap 'exit 44' INT; echo ready; while :; do sleep 0.05; done";

#[test]
fn signals_are_passed_on_but_for_those_of_the_keyboard() -> io::Result<()> {
    let scratch = Scratch::new()?;
    for (signal, code) in [(Signal::TERM, 41), (Signal::HUP, 42), (Signal::USR1, 43)] {
        let mut command = stableio(&scratch)?;
        command.args(["run", "--", "sh", "-c", TRAPS]);
        let mut child = Child::spawn(command, &scratch)?;
        child.wait_for_line("ready")?;
        // The keyboard's go to the whole process group: the program has its own.
        child.signal(Signal::INT)?;
        child.signal(Signal::QUIT)?;
        thread::sleep(Duration::from_millis(20));
        child.signal(signal)?;
        let ended = child.wait()?;
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
    }
    Ok(())
}

#[test]
fn what_outlives_the_command_is_supervised_and_leaves_nothing_behind() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let gate = scratch.path("gate");
    // It waits for the file; its standard error is a file of its own.
    let log = scratch.path("log");
    let script = format!(
        "(while [ ! -e '{gate}' ]; do sleep 0.02; done; echo late) >'{log}' 2>&1 & \
         echo $STABLEIO_SESSION; exit 6",
        gate = gate.display(),
        log = log.display()
    );
    let began = Instant::now();
    let ended = run(&scratch, &["-v", "--", "sh", "-c", &script])?;
    assert!(began.elapsed() < Duration::from_secs(5), "the command had ended");
    assert_eq!(ended.status.code(), Some(6), "{ended:?}");
    assert!(ended.stderr.contains("some still run"), "{ended:?}");
    let session = PathBuf::from(ended.stdout.trim());
    assert!(session.join("ask").exists(), "who is left may ask");
    fs::write(&gate, "")?;
    soon("the directory goes with the last process", || !session.exists());
    assert_eq!(fs::read_to_string(&log)?, "late\n");
    Ok(())
}

#[test]
fn a_killed_session_is_cleaned_up_by_the_next() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mut command = stableio(&scratch)?;
    command.args(["run", "--", "sh", "-c", "echo $STABLEIO_SESSION; exec sleep 100"]);
    let mut child = Child::spawn(command, &scratch)?;
    let session = PathBuf::from(child.wait_for_line("stableio-run-")?);
    let [supervisor] = children_of(child.pid())[..] else { panic!("one child") };
    let [program] = children_of(supervisor)[..] else { panic!("one child") };
    // The launcher alone: the program goes on, and so does its session.
    child.kill9()?;
    assert_eq!(run(&scratch, &["--", "true"])?.status.code(), Some(0));
    assert!(session.join("ask").exists());
    // All of it.
    for pid in [supervisor, program] {
        let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process");
        rustix::process::kill_process(pid, Signal::KILL)?;
    }
    soon("the supervisor is gone", || !Path::new(&format!("/proc/{supervisor}/exe")).exists());
    assert!(session.exists(), "nobody was left to remove it");
    assert_eq!(run(&scratch, &["--", "true"])?.status.code(), Some(0));
    assert!(!session.exists());
    Ok(())
}

#[test]
fn a_static_program_is_refused_what_can_not_be_protected() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let dir = scratch.dir().display().to_string();
    let file = |name: &str| format!("{dir}/{name}");
    let calls = [
        ("open", file("a"), "EINVAL"),
        ("relative", dir.clone(), "EINVAL"),
        ("setfl", file("b"), "EINVAL"),
        ("openat2", file("c"), "EINVAL"),
        ("ring", "-".to_owned(), "EPERM"),
        // These never needed protection.
        ("plain", file("d"), "ok"),
        ("openat2_plain", file("e"), "ok"),
        ("pipe", "-".to_owned(), "ok"),
        // These fail as they would.
        ("absent", file("absent"), "ENOENT"),
        ("absent", file("absent/er"), "ENOENT"),
        ("absent", file("d/er"), "ENOTDIR"),
        ("openat2_fault", "-".to_owned(), "EFAULT"),
        ("fault", "-".to_owned(), "EFAULT"),
    ];
    let args: Vec<_> = calls.iter().flat_map(|(call, path, _)| [*call, path]).collect();
    let start = |options: &[&str]| run(&scratch, &[options, &["--", &program], &args].concat());
    let want = |refused: bool| -> String {
        let each = calls.iter().map(|(call, _, outcome)| match *outcome {
            "EINVAL" | "EPERM" if !refused => format!("{call}=ok\n"),
            outcome => format!("{call}={outcome}\n"),
        });
        each.collect()
    };

    let ended = start(&["--policy=bounce"])?;
    assert_eq!(ended.stdout, want(true));
    // Once for files, and once for rings.
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{ended:?}");
    let says = format!("is statically linked: its direct I/O to {}", file("a"));
    assert!(lines[0].contains(&says) && lines[0].contains("refused"), "{ended:?}");
    assert!(lines[1].contains("its io_uring"), "{ended:?}");
    // One that was to be made was not.
    for absent in ["a", "relative", "c"] {
        assert!(!scratch.path(absent).exists(), "{absent}");
    }

    let ended = start(&["--policy=bounce", "--best-effort"])?;
    assert_eq!(ended.stdout, want(false));
    assert!(line(&ended).contains("calls of statically linked programs (5)"), "{ended:?}");

    let ended = start(&["--policy=off"])?;
    assert_eq!((ended.stdout, &*ended.stderr), (want(false), ""));
    Ok(())
}

#[test]
fn the_32_bit_calls_are_in_the_net_too() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let file = scratch.path("f").display().to_string();
    let start = |policy: &str| run(&scratch, &[policy, "--", &program, "open_32", &file]);
    if start("--policy=off")?.stdout != "open_32=ok\n" {
        skip("this kernel has no 32-bit calls");
        return Ok(());
    }
    let ended = start("--policy=bounce")?;
    assert_eq!(ended.stdout, "open_32=EINVAL\n", "{ended:?}");
    assert!(line(&ended).contains("refused"), "{ended:?}");
    Ok(())
}

#[test]
fn auto_refuses_a_static_program_where_the_storage_samples_twice_only() -> io::Result<()> {
    let Some(zram) = stableio_testkit::Mounted::xfs_on_zram(400 << 20)? else { return Ok(()) };
    let scratch = Scratch::new()?;
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let path = |dir: &Path| dir.join("f").display().to_string();
    let (twice, once) = (path(zram.path()), path(scratch.dir()));
    for (policy, says) in [("auto", "is statically linked"), ("refuse", "zram")] {
        let option = format!("--policy={policy}");
        let ended = run(&scratch, &[&option, "--", &program, "open", &twice, "open", &once])?;
        assert_eq!(ended.stdout, "open=EINVAL\nopen=ok\n", "{ended:?}");
        assert!(line(&ended).contains(says) && line(&ended).contains("refused"), "{ended:?}");
    }
    let ended = run(&scratch, &["--best-effort", "-v", "--", &program, "open", &twice])?;
    assert_eq!(ended.stdout, "open=ok\n", "{ended:?}");
    assert!(ended.stderr.contains("statically linked programs (1)"), "{ended:?}");
    Ok(())
}

#[test]
fn a_program_that_cleared_its_environment_is_in_the_net() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let file = scratch.path("f").display().to_string();
    let dd = ["/bin/dd", "if=/dev/zero", &format!("of={file}"), "oflag=direct", "count=1", "bs=4k"];
    if !Path::new(dd[0]).exists() {
        skip("no /bin/dd");
        return Ok(());
    }
    let start =
        |options: &[&str]| run(&scratch, &[options, &["--", &program, "exec"], &dd].concat());
    let ended = start(&["--policy=bounce"])?;
    assert_ne!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stderr.contains("does not load the library"), "{ended:?}");
    let ended = start(&["--policy=bounce", "--best-effort"])?;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stderr.contains("(1)"), "{ended:?}");
    Ok(())
}

#[test]
fn a_session_in_a_session_is_refused_in_a_line() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let inner = stableio(&scratch)?.get_program().display().to_string();
    let ended = run(&scratch, &["--", &inner, "run", "--", "true"])?;
    assert_eq!(ended.status.code(), Some(1));
    assert!(line(&ended).contains("in a session"), "{ended:?}");
    // It does not know that it is in one, and then the kernel has no second net to give.
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let ended = run(&scratch, &["--", &program, "exec", &inner, "run", "--", "true"])?;
    assert_eq!(ended.status.code(), Some(1));
    assert!(line(&ended).contains("listens"), "{ended:?}");
    let args = ["--", &program, "exec", &inner, "run", "--best-effort", "--", "sh", "-c", "exit 9"];
    let ended = run(&scratch, &args)?;
    assert_eq!(ended.status.code(), Some(9));
    assert!(line(&ended).contains("no net"), "{ended:?}");
    Ok(())
}

#[test]
fn detect_refuses_what_it_can_not_do_before_it_starts() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let mark = scratch.path("ran");
    let script = format!("touch '{}'", mark.display());
    for option in ["--report=/absent/out", "--chart=/absent/out"] {
        let ended = run_stableio(&scratch, ["detect", option, "--", "sh", "-c", &script])?;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(line(&ended).contains("/absent/out"), "{ended:?}");
    }
    assert!(!mark.exists(), "the command did not run");
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let report = scratch.path("report");
    let option = format!("--report={}", report.display());
    let ended = run_stableio(&scratch, ["detect", &option, "--", &program])?;
    assert_eq!(ended.status.code(), Some(126), "{ended:?}");
    assert!(line(&ended).contains("statically linked"), "{ended:?}");
    assert!(!report.exists());
    Ok(())
}

#[test]
fn detect_counts_what_it_could_not_watch() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let Some(program) = static_program(&scratch)? else { return Ok(()) };
    let file = scratch.path("f").display().to_string();
    let report = scratch.path("report.json");
    let chart = scratch.path("chart.svg");
    let options =
        [format!("--report={}", report.display()), format!("--chart={}", chart.display())];
    let script = format!("'{program}' open '{file}'; exit 4");
    let args = ["detect", &options[0], &options[1], "--error-exitcode=9", "sh", "-c", &script];
    let ended = run_stableio(&scratch, args)?;
    assert_eq!(ended.status.code(), Some(4), "nothing was found: {ended:?}");
    assert_eq!(ended.stdout, "open=ok\n");
    assert!(ended.stderr.contains("1 I/O was not watched"), "{ended:?}");
    assert!(ended.stderr.contains("undone"), "{ended:?}");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&report)?)?;
    assert_eq!(json["totals"]["unwatched"], 1, "{json:#}");
    assert_eq!(json["exit"]["code"], 4, "{json:#}");
    assert_eq!(json["remarks"][0]["kind"], "static", "{json:#}");
    assert!(fs::read_to_string(&chart)?.starts_with("<svg"));
    Ok(())
}
