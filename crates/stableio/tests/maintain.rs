//! Members that fail while an array is served: they are removed, replaced and looked through, and
//! the server says how it is.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use stableio_testkit::{
    Child, Ended, Export, Raid5, Scratch, Serve, create, qemu_io, require_tools, run_stableio,
    stableio, status,
};

const MIB: u64 = 1 << 20;

/// Different patterns over some MiB, parts of blocks too.
const WRITES: [&str; 4] =
    ["write -P 17 0 6M", "write -P 18 2M 64k", "write -P 19 3000k 1536", "write -P 20 9M 4k"];
const READS: [&str; 5] = [
    "read -P 17 0 2M",
    "read -P 18 2M 64k",
    "read -P 19 3000k 1536",
    "read -P 0 8M 1M",
    "read -P 20 9M 4k",
];

/// A small raid5, served.
fn served() -> io::Result<(Raid5, Serve)> {
    let array = Raid5::create(Scratch::new()?, "16MiB")?;
    let server = array.serve()?;
    Ok((array, server))
}

fn run(array: &Raid5, args: &[&str]) -> io::Result<Ended> {
    run_stableio(&array.scratch, args)
}

/// Runs a command that must succeed; gives what it says.
fn done(array: &Raid5, args: &[&str]) -> io::Result<String> {
    let ended = run(array, args)?;
    assert!(ended.status.success(), "{args:?}: {ended:?}");
    Ok(ended.stdout)
}

/// Runs a command that must refuse in one line that contains `says`.
fn refused(array: &Raid5, args: &[&str], says: &str) -> io::Result<()> {
    let ended = run(array, args)?;
    assert_eq!(ended.status.code(), Some(1), "{args:?}: {ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "one line, please: {args:?}: {ended:?}");
    assert!(ended.stderr.starts_with("stableio: "), "{args:?}: {ended:?}");
    assert!(ended.stderr.contains(says), "does not say {says:?}: {args:?}: {ended:?}");
    assert_eq!(ended.stdout, "", "{args:?}");
    Ok(())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths here are text")
}

#[test]
fn a_replaced_member_makes_up_for_another() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let (mut array, server) = served()?;
    qemu_io(&array.nbd.uri(), &WRITES)?;
    let new = array.scratch.path("new");
    let old = text(&array.members[1]).to_owned();
    let said = done(&array, &["replace", "disk", &old, text(&new), "--wait"])?;
    assert!(said.contains("in sync"), "{said}");
    let now = status(&array.scratch)?;
    assert_eq!(now["members"][1]["name"], text(&new), "{now:#}");
    assert_eq!(now["state"], "healthy", "{now:#}");

    // By its number; then only what the new one has is left of it.
    done(&array, &["remove", "disk", "0"])?;
    assert_eq!(status(&array.scratch)?["state"], "degraded");
    qemu_io(&array.nbd.uri(), &READS)?;
    qemu_io(&array.nbd.uri(), &["write -P 21 1M 64k", "read -P 21 1M 64k", "flush"])?;
    let told = done(&array, &["events", "disk"])?;
    assert!(told.lines().count() >= 2 && told.contains("removed"), "{told}");
    assert!(told.lines().all(|line| line.as_bytes()[19] == b'Z'), "times: {told}");
    assert!(server.terminate()?.status.success());

    array.members = vec![new, array.members[2].clone()];
    let server = array.serve()?;
    qemu_io(&array.nbd.uri(), &["read -P 21 1M 64k", READS[1], READS[2], READS[3], READS[4]])?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

#[test]
fn a_scrub_finds_and_mends_rot() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let (array, server) = served()?;
    qemu_io(&array.nbd.uri(), &WRITES)?;
    assert!(server.terminate()?.status.success());
    flip_bytes(&array, 2, 5)?;

    let server = array.serve()?;
    let said = done(&array, &["scrub", "disk", "--wait"])?;
    assert!(said.contains("0 blocks can not be read"), "{said}");
    let now = status(&array.scratch)?;
    assert!(now["blocks_mended"].as_u64() >= Some(5), "{now:#}");
    for (role, member) in now["members"].as_array().expect("members").iter().enumerate() {
        let charged = member["mismatches"].as_u64() > Some(0);
        assert_eq!(charged, role == 2, "{now:#}");
    }
    assert_eq!(now["scrub"], Value::Null, "{now:#}");
    let said = done(&array, &["scrub", "disk", "--wait"])?;
    assert!(said.contains("0 blocks and 0 tuples mended"), "{said}");
    qemu_io(&array.nbd.uri(), &READS)?;
    done(&array, &["pause", "disk"])?;
    done(&array, &["resume", "disk"])?;
    refused(&array, &["scrub", "disk", "--stop"], "no scrub is under way")?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// Turns bytes over in the data of a member, that of each in another block.
/// What an array without checksums is and costs is said when it is made, and by every command that
/// shows it; a scrub tells what it finds.
#[test]
fn an_array_without_checksums_says_so() -> io::Result<()> {
    let scratch = Scratch::new()?;
    let members: Vec<_> = (0..3).map(|role| scratch.path(&format!("m{role}"))).collect();
    let made = ["create", "disk", "--checksums", "off", "--member-size", "16MiB"];
    let made: Vec<&str> = made.into_iter().chain(members.iter().map(|m| text(m))).collect();
    let array = Raid5::of(scratch, members.clone());
    let said = done(&array, &made)?;
    assert!(said.contains("checksums off: what a member reads back wrong"), "{said}");
    assert_eq!(array.examine(0)?["checksums"], false);
    let said = done(&array, &["examine", text(&members[1])])?;
    assert!(said.contains("off: what a member reads back wrong is not noticed"), "{said}");

    // Nothing would find out that the promise is broken.
    let vhost = array.vhost.clone().with("buffers", "stable").argument();
    let serve = ["serve", text(&members[0]), text(&members[1]), text(&members[2]), "--export"];
    refused(&array, &[&serve[..], &[&vhost]].concat(), "buffers=stable")?;

    let server = array.serve()?;
    let now = status(&array.scratch)?;
    assert_eq!(now["checksums"], false, "{now:#}");
    let said = done(&array, &["status"])?;
    assert!(said.contains("checksums off: what a member reads back wrong"), "{said}");
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    qemu_io(&array.nbd.uri(), &WRITES)?;
    qemu_io(&array.nbd.uri(), &READS)?;
    assert!(server.kill9()?.status.code().is_none());
    let server = array.serve()?;
    qemu_io(&array.nbd.uri(), &READS)?;
    assert!(server.terminate()?.status.success());

    flip_bytes(&array, 2, 5)?;
    let server = array.serve()?;
    let said = done(&array, &["scrub", "disk", "--wait"])?;
    assert!(said.contains("5 copies or parities differed"), "{said}");
    let now = status(&array.scratch)?;
    assert_eq!(now["blocks_differed"], 5, "{now:#}");
    assert_eq!(now["blocks_mended"], 0, "{now:#}");
    assert!(server.terminate()?.status.success());
    Ok(())
}

fn flip_bytes(array: &Raid5, role: usize, count: u64) -> io::Result<()> {
    let data = array.examine(role)?["data_at"].as_u64().expect("data_at");
    let file = File::options().read(true).write(true).open(&array.members[role])?;
    for at in (0..count).map(|i| data + i * 12_288 + 77) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 0x40], at)?;
    }
    Ok(())
}

#[test]
fn what_can_not_be_is_refused_in_a_line() -> io::Result<()> {
    let (array, server) = served()?;
    let member = text(&array.members[0]).to_owned();
    let path = |name: &str| array.scratch.path(name);
    let new = path("new");
    let new = text(&new);
    refused(&array, &["replace", "disc", &member, new], "'disc' is not served")?;
    refused(&array, &["replace", "disk", "nobody", new], "no member 'nobody'")?;
    refused(&array, &["replace", "disk", "3", new], "no member '3'")?;
    let own = text(&array.members[1]).to_owned();
    refused(&array, &["replace", "disk", &member, &own], "is a member of this array already")?;
    refused(&array, &["replace", "disk", &member, &own, "--force"], "already, role 1")?;
    let small = array.scratch.sparse("small", MIB)?;
    refused(&array, &["replace", "disk", &member, text(&small)], "a member of this array needs")?;
    let full = path("full");
    fs::write(&full, vec![7; 16 << 20])?;
    refused(&array, &["replace", "disk", &member, text(&full)], "--force overwrites it")?;
    refused(&array, &["replace", "disk", &member, "/dev/null"], "neither a regular file")?;
    let nowhere = path("no/where");
    refused(&array, &["replace", "disk", &member, text(&nowhere)], "No such file")?;

    let others: Vec<PathBuf> = (0..3).map(|i| path(&format!("other-{i}"))).collect();
    create("other", &["--member-size", "16MiB"], &others)?;
    refused(&array, &["replace", "disk", &member, text(&others[0])], "a member of array 'other'")?;
    let export = Export::nbd("other", &path("other.sock"));
    let other = Serve::array(&array.scratch, &others, &[export])?;
    let force = ["replace", "disk", &member, text(&others[0]), "--force"];
    refused(&array, &force, "in use by another process")?;
    assert!(other.terminate()?.status.success());

    refused(&array, &["remove", "disk", "7"], "no member '7'")?;
    done(&array, &["remove", "disk", &member])?;
    refused(&array, &["remove", "disk", &member], "is missing already")?;
    refused(&array, &["remove", "disk", "1"], "can not do without another member")?;
    assert_eq!(status(&array.scratch)?["state"], "degraded");
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// A scrub and a rebuild exclude each other, and themselves; what is under way goes on.
#[test]
fn long_work_is_done_one_at_a_time() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let (array, server) = served()?;
    qemu_io(&array.nbd.uri(), &WRITES)?;
    let (new, another) = (array.scratch.path("new"), array.scratch.path("another"));
    let (new, another) = (text(&new), text(&another));
    done(&array, &["pause", "disk"])?;
    done(&array, &["scrub", "disk"])?;
    refused(&array, &["scrub", "disk"], "a scrub is under way")?;
    refused(&array, &["replace", "disk", "1", new], "a scrub is under way")?;
    assert!(!Path::new(new).exists(), "a replacement was made for nothing");
    done(&array, &["scrub", "disk", "--stop"])?;

    done(&array, &["pause", "disk"])?;
    done(&array, &["replace", "disk", "1", new])?;
    done(&array, &["pause", "disk"])?;
    if !status(&array.scratch)?["rebuild"].is_null() {
        refused(&array, &["scrub", "disk"], "a rebuild is under way")?;
        refused(&array, &["replace", "disk", "0", another], "a rebuild is under way")?;
    }
    done(&array, &["resume", "disk"])?;
    let begun = Instant::now();
    while status(&array.scratch)?["members"][1]["name"] != new {
        assert!(begun.elapsed() < Duration::from_secs(30), "the rebuild does not end");
    }
    assert_eq!(status(&array.scratch)?["state"], "healthy");
    done(&array, &["scrub", "disk", "--wait"])?;
    qemu_io(&array.nbd.uri(), &READS)?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

#[test]
fn the_code_of_status_says_how_it_is() -> io::Result<()> {
    if !require_tools(&["qemu-io"]) {
        return Ok(());
    }
    let (mut array, server) = served()?;
    qemu_io(&array.nbd.uri(), &WRITES)?;
    let look = |array: &Raid5, code: i32, word: &str| -> io::Result<()> {
        let ended = run(array, &["status", "disk"])?;
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        assert!(ended.stdout.starts_with(&format!("disk: {word}, raid5, ")), "{ended:?}");
        Ok(())
    };
    look(&array, 0, "HEALTHY")?;
    done(&array, &["remove", "disk", "1"])?;
    look(&array, 10, "DEGRADED")?;
    assert!(server.terminate()?.status.success());
    // What nothing is left to mend from.
    flip_bytes(&array, 2, 1)?;
    array.members.remove(1);
    let server = array.serve()?;
    look(&array, 10, "DEGRADED")?;
    assert!(qemu_io(&array.nbd.uri(), &["read 0 6M"]).is_err(), "a lost block was read");
    look(&array, 11, "DAMAGED")?;
    assert!(server.terminate()?.status.success());
    Ok(())
}

/// Who does not ask, or asks nonsense, holds nobody up.
#[test]
fn the_control_socket_is_patient_with_nobody() -> io::Result<()> {
    let (array, server) = served()?;
    let socket = array.scratch.dir().join("stableio/disk.sock");
    let silent: Vec<_> = (0..4).map(|_| UnixStream::connect(&socket)).collect::<Result<_, _>>()?;
    let begun = Instant::now();
    for nonsense in ["", "{}", "{\"ask\":\"events\",\"more\":1}", "{\"ask\":\"fly\"}", "\0\u{1}["] {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(nonsense.as_bytes())?;
        stream.write_all(b"\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert!(answer.starts_with("{\"error\":"), "{nonsense}: {answer}");
    }
    let mut endless = UnixStream::connect(&socket)?;
    endless.set_write_timeout(Some(Duration::from_secs(10)))?;
    let piece = vec![b'x'; 8192];
    assert!((0..100).any(|_| endless.write_all(&piece).is_err()), "it takes everything");
    assert_eq!(status(&array.scratch)?["state"], "healthy");
    assert!(begun.elapsed() < Duration::from_secs(10), "somebody was held up");
    drop(silent);
    assert!(server.terminate()?.status.success());
    Ok(())
}

#[test]
fn metrics_are_told() -> io::Result<()> {
    let array = Raid5::create(Scratch::new()?, "16MiB")?;
    let file = array.scratch.path("stableio.prom");
    let spec = format!("textfile={}", file.display());
    let exports = [array.nbd.clone()];
    let options = ["--metrics", spec.as_str()];
    let server = Serve::array_with(&array.scratch, &options, &array.members, &exports)?;
    let told = fs::read_to_string(&file)?;
    check_metrics(&told);
    assert!(server.terminate()?.status.success());

    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let spec = format!("tcp=127.0.0.1:{port}");
    let options = ["--metrics", spec.as_str(), "--reads", "eager"];
    let server = Serve::array_with(&array.scratch, &options, &array.members, &exports)?;
    let get = |path: &str| -> io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = get("/metrics")?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("headers end");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    check_metrics(body);
    assert!(get("/")?.starts_with("HTTP/1.1 404"));
    assert!(server.terminate()?.status.success());

    let mut command = stableio(&array.scratch)?;
    command.args(["serve", "--metrics", "tcp=0.0.0.0:9100", "--export"]);
    command.arg(array.nbd.argument()).args(&array.members);
    let ended = Child::spawn(command, &array.scratch)?.wait()?;
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    assert!(ended.stderr.contains("not a loopback address"), "{ended:?}");
    Ok(())
}

/// Every value has a name that was explained, and is a number.
fn check_metrics(text: &str) {
    let mut explained = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.split(' ');
            if words.next() == Some("TYPE") {
                explained.push(words.next().expect("a name").to_owned());
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').expect("a value");
        let name = name.split('{').next().expect("a name");
        assert!(name.starts_with("stableio_"), "{line}");
        assert_eq!(explained.last().map(String::as_str), Some(name), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    for line in [
        "stableio_state{array=\"disk\",state=\"healthy\"} 1",
        "stableio_blocks_mended_total{array=\"disk\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    assert!(text.contains("stableio_member_in_sync{array=\"disk\",role=\"2\",member=\""), "{text}");
}
