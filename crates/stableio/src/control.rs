//! The control socket of a server: one question and one answer a connection,
//! each a line of JSON.
//!
//! ```text
//! {"ask":"status"}                                   a report
//! {"ask":"events","after":7}                         events after number 7
//! {"ask":"replace","old":…,"new":…,"force":false}    begins to fill `new`
//! {"ask":"remove","member":…}
//! {"ask":"scrub"} {"ask":"stop-scrub"} {"ask":"pause"} {"ask":"resume"}
//!
//! {"done":…} or {"error":"one line"}
//! ```
//!
//! CTL-1: only the server's own user and root are answered; who does not ask
//! soon, or asks too much, is not.
//!
//! CTL-2: one change at a time: what was checked for it still holds when it is
//! made.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use stableio_array::superblock::Id;
use stableio_array::{TendError, prepare_replacement};
use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::{Kind, Ticket};
use stableio_front::socket::{Listener, UnixOptions};

use crate::report::{Report, Served, ServedArray};

/// Bytes of a question: two paths, and what belongs to them.
const LONGEST: usize = 32 << 10;
/// Bytes of an answer.
const LONGEST_ANSWER: u64 = 4 << 20;
/// For a question to come, and for an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(2);
/// For an answer to come: a large member is cleared before it is filled.
const ANSWER_PATIENCE: Duration = Duration::from_secs(600);
/// Questions that are answered at once.
const AT_ONCE: usize = 16;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Ask {
    Status,
    Events {
        /// The last one that is known already.
        after: u64,
    },
    Replace {
        old: Named,
        /// Absolute.
        new: PathBuf,
        force: bool,
    },
    Remove {
        member: Named,
    },
    Scrub,
    StopScrub,
    Pause,
    Resume,
}

/// A member, as a person names it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Named {
    /// As `status` shows it, or its role.
    given: String,
    /// Where that is for who gave it.
    absolute: PathBuf,
}

impl Named {
    pub(crate) fn of(given: &str) -> Result<Self> {
        let absolute = std::path::absolute(given).with_context(|| format!("'{given}'"))?;
        Ok(Self { given: given.to_owned(), absolute })
    }
}

/// An answer.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer<T> {
    Done(T),
    Error(String),
}

/// An event, as it is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct EventReport {
    pub(crate) number: u64,
    /// Seconds since 1970.
    pub(crate) time: f64,
    pub(crate) text: String,
}

/// What a change that was begun is known by.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Begun {
    pub(crate) role: Option<usize>,
    /// The number of the last event before it.
    pub(crate) after: u64,
}

/// Answers until it is dropped.
pub(crate) struct Server {
    socket: Arc<Listener>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens in the user's private directory.
    pub(crate) fn start(served: Arc<Served>) -> Result<Self> {
        let dir = directory()?;
        let first = dir.join(format!("{}.sock", served.name));
        let socket = match Listener::unix(&first, &UnixOptions::default()) {
            Ok(socket) => socket,
            // Another array of the same name is served too.
            Err(_) => {
                let second = dir.join(format!("{}.{}.sock", served.name, std::process::id()));
                Listener::unix(&second, &UnixOptions::default())?
            }
        };
        let socket = Arc::new(socket);
        let listener = UnixListener::from(socket.as_fd().try_clone_to_owned()?);
        listener.set_nonblocking(false)?;
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&listener, &served))?;
        Ok(Self { socket, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket.shut();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Each question has its own thread, so that nobody waits for who is slow.
fn serve(listener: &UnixListener, served: &Served) {
    let (changes, open) = (Mutex::new(()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            if open.load(Relaxed) >= AT_ONCE || !is_ours(&stream) {
                continue;
            }
            open.fetch_add(1, Relaxed);
            let (changes, open) = (&changes, &open);
            scope.spawn(move || {
                // Who asked is gone, or never asked: nobody to tell.
                let _ = answer(stream, served, changes);
                open.fetch_sub(1, Relaxed);
            });
        }
    });
}

/// CTL-1. The socket's mode keeps others out; this says so again, by who they
/// are.
fn is_ours(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid();
    let peer = rustix::net::sockopt::socket_peercred(stream);
    peer.is_ok_and(|p| p.uid == own || p.uid.is_root())
}

fn answer(mut stream: UnixStream, served: &Served, changes: &Mutex<()>) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = read_line(&mut stream)?;
    let done = match serde_json::from_slice(&line) {
        Ok(ask) => served.obey(ask, changes),
        Err(error) => Err(anyhow!("not a question: {error}")),
    };
    let answer = match done {
        Ok(done) => Answer::Done(done),
        Err(error) => Answer::Error(format!("{error:#}")),
    };
    let mut bytes = serde_json::to_vec(&answer)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)
}

/// A line, in time and of bounded length.
fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut line, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || line.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(Some(left))?;
        let len = stream.read(&mut piece)?;
        let end = piece[..len].iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&piece[..end.unwrap_or(len)]);
        if len == 0 || end.is_some() {
            return Ok(line);
        }
    }
}

impl Served {
    fn obey(&self, ask: Ask, changes: &Mutex<()>) -> Result<serde_json::Value> {
        let array = || self.array.as_ref().context("an image as it is has no members");
        // CTL-2.
        let alone = || changes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let begun = |array: &ServedArray, role| -> Result<serde_json::Value> {
            Ok(serde_json::to_value(Begun { role, after: array.health.last_event() })?)
        };
        match ask {
            Ask::Status => Ok(serde_json::to_value(self.report())?),
            Ask::Events { after } => Ok(serde_json::to_value(array()?.events(after))?),
            Ask::Replace { old, new, force } => {
                let (array, _alone) = (array()?, alone());
                let done = begun(array, Some(array.role(&old)?))?;
                array.replace(array.role(&old)?, &new, force)?;
                Ok(done)
            }
            Ask::Remove { member } => {
                let (array, _alone) = (array()?, alone());
                let role = array.role(&member)?;
                if !array.health.members[role].in_sync.load(Relaxed) {
                    bail!("{} is missing already", array.health.members[role].name());
                }
                let done = begun(array, Some(role))?;
                settled(array.device.begin_remove(role))?;
                Ok(done)
            }
            Ask::Scrub => {
                let (array, _alone) = (array()?, alone());
                array.check_idle()?;
                let done = begun(array, None)?;
                settled(array.device.begin_scrub())?;
                Ok(done)
            }
            Ask::StopScrub => {
                let (array, _alone) = (array()?, alone());
                if array.health.scrub.how_far().is_none() {
                    bail!("no scrub is under way");
                }
                settled(array.device.stop_scrub())?;
                begun(array, None)
            }
            Ask::Pause | Ask::Resume => {
                let array = array()?;
                settled(array.device.pause(matches!(ask, Ask::Pause)))?;
                begun(array, None)
            }
        }
    }
}

impl ServedArray {
    fn events(&self, after: u64) -> Vec<EventReport> {
        let events = self.health.events_after(after).into_iter();
        events
            .map(|event| EventReport {
                number: event.number,
                time: event.time.duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()),
                text: event.text,
            })
            .collect()
    }

    /// The role of a member.
    fn role(&self, named: &Named) -> Result<usize> {
        let members = &self.health.members;
        let names: Vec<String> = members.iter().map(|member| member.name()).collect();
        let found = names.iter().position(|name| *name == named.given).or_else(|| {
            let absolute = |name: &String| std::path::absolute(name).ok();
            names.iter().position(|name| absolute(name).as_ref() == Some(&named.absolute))
        });
        let found = found
            .or_else(|| names.iter().position(|name| is_same(Path::new(name), &named.absolute)))
            .or_else(|| named.given.parse().ok().filter(|role| *role < names.len()));
        found.with_context(|| {
            format!("the array has no member '{}'; it has {}", named.given, names.join(", "))
        })
    }

    /// What the array says too, in terms of commands.
    fn check_idle(&self) -> Result<()> {
        if self.health.rebuild.how_far().is_some() {
            bail!("a rebuild is under way: wait for it");
        }
        if self.health.scrub.how_far().is_some() {
            bail!("a scrub is under way: wait for it, or end it with `stableio scrub --stop`");
        }
        Ok(())
    }

    fn replace(&self, role: usize, new: &Path, force: bool) -> Result<()> {
        // Before anything is overwritten.
        self.check_idle()?;
        for (role, member) in self.health.members.iter().enumerate() {
            let in_sync = member.in_sync.load(Relaxed);
            let names = [Some(member.name()).filter(|_| in_sync), member.next()];
            if names.iter().flatten().any(|name| is_same(Path::new(name), new)) {
                bail!("{}: is a member of this array already, role {role}", new.display());
            }
        }
        if !force && let Ok(found) = stableio_array::probe(new) {
            let whose = match found.superblock.array == self.superblock.array {
                true => "this array".to_owned(),
                false => format!("array '{}'", found.superblock.name),
            };
            bail!("{}: is a member of {whose}; --force overwrites it", new.display());
        }
        let geometry = &self.superblock.geometry;
        prepare_replacement(new, geometry, force)?;
        let device = FileDevice::open(new, &OpenOptions::default(), self.worker.clone())?;
        let name = new.display().to_string();
        settled(self.device.begin_replace(role, Id::random(), Arc::new(device), name))
    }
}

/// Waits until the array has said whether it does something.
pub(crate) fn settled(ticket: Ticket<Result<(), TendError>>) -> Result<()> {
    Ok(ticket.wait_opt().unwrap_or(Err(TendError::Array(Kind::Stopped)))?)
}

/// Whether two paths are one file or device.
fn is_same(a: &Path, b: &Path) -> bool {
    let of = |path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    a == b || of(a).is_some_and(|a| Some(a) == of(b))
}

/// The user's directory for control sockets, made if it is not there.
fn directory() -> Result<PathBuf> {
    let uid = rustix::process::geteuid();
    let dir = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_dir() => PathBuf::from(dir).join("stableio"),
        _ if uid.is_root() => PathBuf::from("/run/stableio"),
        _ => PathBuf::from(format!("/tmp/stableio-{}", uid.as_raw())),
    };
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(dir.display().to_string()),
    }
    let meta = std::fs::symlink_metadata(&dir).with_context(|| dir.display().to_string())?;
    if !meta.is_dir() || meta.uid() != uid.as_raw() || meta.permissions().mode() & 0o077 != 0 {
        bail!(
            "{}: must be a directory of yours that nobody else may enter (mode 0700)",
            dir.display()
        );
    }
    Ok(dir)
}

/// A server that answers: what it says of itself, and where it is asked.
pub(crate) struct Found {
    pub(crate) report: Report,
    socket: PathBuf,
}

/// All servers of this user, by name.
pub(crate) fn servers() -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let dir = directory()?;
    for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let socket = entry?.path();
        if socket.extension().is_some_and(|e| e == "sock") {
            // One that nobody answers is left over from a crash.
            if let Ok(report) = ask(&socket, &Ask::Status) {
                found.push(Found { report, socket });
            }
        }
    }
    found.sort_by(|a, b| a.report.name.cmp(&b.report.name));
    Ok(found)
}

/// The one server of this name.
pub(crate) fn server(name: &str) -> Result<Found> {
    let mut found = servers()?;
    found.retain(|server| server.report.name == name);
    match found.len() {
        0 => bail!("'{name}' is not served by you"),
        1 => Ok(found.swap_remove(0)),
        _ => bail!("several arrays are called '{name}': stop all but one"),
    }
}

impl Found {
    /// Asks it.
    pub(crate) fn ask<T: DeserializeOwned>(&self, question: &Ask) -> Result<T> {
        ask(&self.socket, question)
    }
}

fn ask<T: DeserializeOwned>(socket: &Path, question: &Ask) -> Result<T> {
    let mut stream = UnixStream::connect(socket).context("the server is gone")?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(question)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut bytes = Vec::new();
    Read::by_ref(&mut stream).take(LONGEST_ANSWER).read_to_end(&mut bytes)?;
    match serde_json::from_slice(&bytes).context("the server does not answer as it should")? {
        Answer::Done(done) => Ok(done),
        Answer::Error(error) => bail!("{error}"),
    }
}
