//! The command under test.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::{Child, Ended, Scratch, run_tool};

/// The path of the `stableio` binary.
///
/// `STABLEIO_BIN` if it is set; else the one beside the running test in `target/<profile>`,
/// which is built if it is not there. It is not built again if it is: a test of the `stableio`
/// package has a fresh one anyway, and others decide themselves ([`build_stableio`]).
pub fn stableio_bin() -> io::Result<PathBuf> {
    if let Some(path) = env::var_os("STABLEIO_BIN") {
        return Ok(path.into());
    }
    let path = profile_dir()?.join("stableio");
    if path.is_file() { Ok(path) } else { build_stableio() }
}

/// Builds the `stableio` binary in the profile of the running program and returns its path.
pub fn build_stableio() -> io::Result<PathBuf> {
    let profile_dir = profile_dir()?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "-p", "stableio"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile_dir.ends_with("release") {
        cargo.arg("--release");
    }
    if let Some(target_dir) = profile_dir.parent() {
        cargo.arg("--target-dir").arg(target_dir);
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(io::Error::other(format!("{cargo:?}: {status}")));
    }
    Ok(profile_dir.join("stableio"))
}

/// The command without arguments, living in the scratch directory: that is where its servers
/// answer `status`, so that tests which run side by side do not see each other's.
pub fn stableio(scratch: &Scratch) -> io::Result<Command> {
    let mut command = Command::new(stableio_bin()?);
    command.env("XDG_RUNTIME_DIR", scratch.dir());
    Ok(command)
}

/// Runs `stableio ARG…` to its end, whatever that is.
pub fn run_stableio<I, S>(scratch: &Scratch, args: I) -> io::Result<Ended>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = stableio(scratch)?;
    command.args(args);
    Child::spawn(command, scratch)?.wait()
}

/// What the only running server of this scratch directory answers to `stableio status --json`.
pub fn status(scratch: &Scratch) -> io::Result<Value> {
    let ended = run_stableio(scratch, ["status", "--json"])?;
    let mut servers: Vec<Value> = serde_json::from_str(&ended.stdout)?;
    match (servers.pop(), servers.is_empty()) {
        (Some(server), true) => Ok(server),
        _ => Err(io::Error::other(format!("not one server answers: {ended:?}"))),
    }
}

/// Makes an array: `stableio create NAME OPTION… MEMBER…`.
pub fn create(name: &str, options: &[&str], members: &[PathBuf]) -> io::Result<()> {
    let options = options.iter().map(Path::new);
    let members = members.iter().map(PathBuf::as_path);
    let args = [Path::new("create"), Path::new(name)].into_iter().chain(options).chain(members);
    run_tool(&stableio_bin()?, args).map(drop)
}

/// The address of an NBD export on a Unix socket, as `nbdinfo`, `qemu-img` and fio take it.
pub fn nbd_uri(name: &str, socket: &Path) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

/// One `--export` of `stableio serve`.
#[derive(Clone, Debug)]
pub struct Export {
    kind: &'static str,
    name: String,
    socket: PathBuf,
    options: String,
}

impl Export {
    /// The volume `name` over NBD.
    pub fn nbd(name: &str, socket: &Path) -> Export {
        Self::new("nbd", name, socket)
    }

    /// The volume `name` as a vhost-user-blk device.
    pub fn vhost_user_blk(name: &str, socket: &Path) -> Export {
        Self::new("vhost-user-blk", name, socket)
    }

    /// The same with one more `key=value`, as in `.with("queues", "2")`.
    pub fn with(mut self, key: &str, value: &str) -> Export {
        self.options.push_str(&format!(",{key}={value}"));
        self
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its NBD address.
    pub fn uri(&self) -> String {
        nbd_uri(&self.name, &self.socket)
    }

    fn new(kind: &'static str, name: &str, socket: &Path) -> Export {
        let (name, socket) = (name.to_owned(), socket.to_path_buf());
        Export { kind, name, socket, options: String::new() }
    }

    /// What stands after `--export`.
    pub fn argument(&self) -> String {
        let Export { kind, name, socket, options } = self;
        format!("{kind},name={name},path={}{options}", socket.display())
    }
}

/// A running `stableio serve`.
#[derive(Debug)]
pub struct Serve {
    child: Child,
}

impl Serve {
    /// Serves the array of these members, and returns when it does.
    pub fn array(scratch: &Scratch, members: &[PathBuf], exports: &[Export]) -> io::Result<Serve> {
        Self::array_with(scratch, &[], members, exports)
    }

    /// The same with more options, as in `&["--pool", "32MiB"]`.
    pub fn array_with(
        scratch: &Scratch,
        options: &[&str],
        members: &[PathBuf],
        exports: &[Export],
    ) -> io::Result<Serve> {
        let mut command = stableio(scratch)?;
        command.arg("serve").args(options).args(members);
        Self::start(scratch, command, exports)
    }

    /// Serves an existing image as it is, and returns when it does.
    pub fn raw(scratch: &Scratch, image: &Path, exports: &[Export]) -> io::Result<Serve> {
        let mut command = stableio(scratch)?;
        command.arg("serve").arg("--raw").arg(image);
        Self::start(scratch, command, exports)
    }

    /// The process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Ends it in good order; see [`Child::terminate`].
    pub fn terminate(self) -> io::Result<Ended> {
        self.child.terminate()
    }

    /// Crashes it; see [`Child::kill9`].
    pub fn kill9(self) -> io::Result<Ended> {
        self.child.kill9()
    }

    fn start(scratch: &Scratch, mut command: Command, exports: &[Export]) -> io::Result<Serve> {
        for export in exports {
            command.arg("--export").arg(export.argument());
        }
        let mut child = Child::spawn(command, scratch)?;
        // Its sockets exist before its array is open; this line comes when both are there.
        child.wait_for_line("Ctrl-C or SIGTERM ends it")?;
        Ok(Serve { child })
    }
}

/// `target/<profile>`, of the running test (`target/<profile>/deps/…`) or binary.
fn profile_dir() -> io::Result<PathBuf> {
    let running = env::current_exe()?;
    let dir = running.parent().filter(|dir| !dir.ends_with("deps"));
    let dir = dir.or_else(|| running.parent()?.parent());
    dir.map(Path::to_path_buf).ok_or_else(|| io::Error::other("the running program has no folder"))
}
