//! `serve --metrics`: the report as counters for Prometheus, in a file that
//! its node exporter reads, or over HTTP.
//!
//! METRICS-1: a file is replaced as a whole, so that nobody reads half of it.
//!
//! METRICS-2: only loopback addresses listen: nobody is asked who he is.
//!
//! Format: Prometheus text exposition, version 0.0.4.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use stableio_front::socket::Listener;

use crate::report::{Report, Served, State};

/// Between two writes of the file.
const INTERVAL: Duration = Duration::from_secs(15);
/// For a request to come, and for an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a request.
const LONGEST: usize = 8 << 10;

/// `--metrics`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MetricsSpec {
    TextFile(PathBuf),
    /// Loopback (METRICS-2).
    Tcp(SocketAddr),
}

impl FromStr for MetricsSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("textfile", path)) if !path.is_empty() => Ok(Self::TextFile(path.into())),
            Some(("tcp", address)) => match address.parse::<SocketAddr>() {
                Ok(address) if address.ip().to_canonical().is_loopback() => Ok(Self::Tcp(address)),
                Ok(address) => Err(format!("{address}: not a loopback address, as 127.0.0.1")),
                Err(_) => Err(format!("tcp '{address}': write it as 127.0.0.1:9100")),
            },
            _ => Err("textfile=PATH or tcp=127.0.0.1:PORT".to_owned()),
        }
    }
}

/// What is opened before a member is (SERVE-1).
pub(crate) enum Opened {
    TextFile(PathBuf),
    Tcp(Listener),
}

impl Opened {
    pub(crate) fn of(spec: &MetricsSpec) -> Result<Self> {
        match spec {
            MetricsSpec::TextFile(path) => {
                // Now, and not in 15 s, is when a wrong path should be said.
                let aside = aside(path);
                File::create(&aside).with_context(|| aside.display().to_string())?;
                std::fs::remove_file(&aside)?;
                Ok(Self::TextFile(path.clone()))
            }
            MetricsSpec::Tcp(address) => Ok(Self::Tcp(Listener::tcp(*address, false)?)),
        }
    }

    /// Tells until it is dropped.
    pub(crate) fn start(self, served: Arc<Served>) -> Result<Metrics> {
        let builder = std::thread::Builder::new().name("metrics".into());
        match self {
            Self::TextFile(path) => {
                write_file(&path, &served)?;
                let (stop, stopped) = mpsc::channel();
                let thread = builder.spawn(move || {
                    let mut told = false;
                    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(INTERVAL) {
                        let done = write_file(&path, &served);
                        if let (Err(error), false) = (&done, told) {
                            eprintln!("stableio: metrics: {error:#}");
                        }
                        told = done.is_err();
                    }
                })?;
                Ok(Metrics { stop: Some(stop), socket: None, thread: Some(thread) })
            }
            Self::Tcp(socket) => {
                let socket = Arc::new(socket);
                let listener = TcpListener::from(socket.as_fd().try_clone_to_owned()?);
                listener.set_nonblocking(false)?;
                let thread = builder.spawn(move || {
                    for stream in listener.incoming() {
                        let Ok(stream) = stream else { return };
                        // Who asked is gone, or never asked: nobody to tell.
                        let _ = answer(stream, &served);
                    }
                })?;
                Ok(Metrics { stop: None, socket: Some(socket), thread: Some(thread) })
            }
        }
    }
}

/// Tells of the counters until it is dropped.
pub(crate) struct Metrics {
    stop: Option<Sender<()>>,
    socket: Option<Arc<Listener>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(socket) = &self.socket {
            socket.shut();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Beside a file, in its directory: what takes its place by a rename.
fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    name.into()
}

/// METRICS-1.
fn write_file(path: &Path, served: &Served) -> Result<()> {
    let aside = aside(path);
    let write = || -> io::Result<()> {
        std::fs::write(&aside, text(&served.report()))?;
        std::fs::rename(&aside, path)
    };
    write().with_context(|| path.display().to_string())
}

/// One HTTP request: `GET /metrics`.
fn answer(mut stream: TcpStream, served: &Served) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = read_head(&mut stream)?;
    let mut words = request.split_ascii_whitespace();
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics")) => ("200 OK", text(&served.report())),
        (Some("GET"), _) => ("404 Not Found", "only /metrics is here\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET is known\n".to_owned()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// A request up to the empty line after its headers, in time and bounded.
fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let (mut head, mut piece) = (Vec::new(), [0; 1024]);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => break,
            len => head.extend_from_slice(&piece[..len]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// A metric's lines: what it is, and a value for each set of labels.
struct Lines<'a> {
    text: String,
    array: &'a str,
}

impl Lines<'_> {
    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.many(name, kind, help, [(String::new(), value)]);
    }

    fn many(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        values: impl IntoIterator<Item = (String, f64)>,
    ) {
        let _ = writeln!(self.text, "# HELP stableio_{name} {help}\n# TYPE stableio_{name} {kind}");
        for (labels, value) in values {
            let array = label("array", self.array);
            let _ = writeln!(self.text, "stableio_{name}{{{array}{labels}}} {value}");
        }
    }
}

/// A label's text, escaped as the format wants it.
fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// All metrics.
fn text(r: &Report) -> String {
    let mut lines = Lines { text: String::new(), array: &r.name };
    let is = |state| f64::from(u8::from(r.state == state));
    let states = [("raw", State::Raw), ("healthy", State::Healthy), ("degraded", State::Degraded)];
    let states = states.into_iter().chain([("damaged", State::Damaged)]);
    lines.many(
        "state",
        "gauge",
        "1 for the state that it is in.",
        states.map(|(name, state)| (format!(",{}", label("state", name)), is(state))),
    );
    lines.one("size_bytes", "gauge", "Bytes that are offered.", r.size_bytes as f64);
    lines.one("uptime_seconds", "gauge", "Since it is served.", r.uptime_seconds as f64);
    let counters = [
        ("reads_total", "Settled reads.", r.reads),
        ("read_bytes_total", "Bytes read.", r.read_bytes),
        ("writes_total", "Settled writes.", r.writes),
        ("written_bytes_total", "Bytes written.", r.written_bytes),
        ("writes_stabilized_total", "Writes copied once.", r.writes_stabilized),
        ("writes_promised_total", "Writes from memory declared stable.", r.writes_promised),
        ("requests_failed_total", "Requests that failed.", r.failed),
    ];
    for (name, help, value) in counters {
        lines.one(name, "counter", help, value as f64);
    }
    lines.one("pool_bytes", "gauge", "Buffer memory.", r.pool_bytes as f64);
    lines.one("pool_used_bytes", "gauge", "Of it, in use.", r.pool_used_bytes as f64);
    let waiting = r.waiting.iter();
    lines.many(
        "requests_waiting",
        "gauge",
        "Requests by the stage in which they wait.",
        waiting.map(|(stage, n)| (format!(",{}", label("stage", stage)), *n as f64)),
    );
    if r.state != State::Raw {
        of_array(r, &mut lines);
    }
    lines.text
}

fn of_array(r: &Report, lines: &mut Lines<'_>) {
    let counters = [
        ("blocks_mended_total", "Blocks brought back and written again.", r.blocks_mended),
        (
            "blocks_differed_total",
            "Copies and parity that a scrub without checksums found to differ.",
            r.blocks_differed,
        ),
        ("tuples_mended_total", "Tuples brought back from a copy.", r.tuples_mended),
        ("lost_reads_total", "Reads of blocks that nothing brings back.", r.lost_reads),
        ("blocks_lost_total", "Blocks lost in a crash or a rebuild.", r.blocks_lost),
        ("rows_recovered_total", "Rows looked at after a crash.", r.rows_recovered),
        ("benign_mismatches_total", "Buffers changed during reads.", r.benign_mismatches),
    ];
    for (name, help, value) in counters {
        lines.one(name, "counter", help, value as f64);
    }
    lines.many(
        "issuer_benign_mismatches_total",
        "counter",
        "The same by export or queue.",
        r.issuers.iter().map(|issuer| {
            (format!(",{}", label("issuer", &issuer.name)), issuer.benign_mismatches as f64)
        }),
    );
    if let Some(log) = &r.log {
        lines.one("log_blocks", "gauge", "Blocks of the log.", log.blocks as f64);
        lines.one("log_used_blocks", "gauge", "Of them, in use.", log.used_blocks as f64);
    }
    let of = |m: &crate::report::MemberReport| {
        format!(",{},{}", label("role", &m.role.to_string()), label("member", &m.name))
    };
    lines.many(
        "member_in_sync",
        "gauge",
        "1 while the member takes part.",
        r.members.iter().map(|m| (of(m), f64::from(u8::from(m.in_sync)))),
    );
    lines.many(
        "member_read_errors_total",
        "counter",
        "Reads that the member failed.",
        r.members.iter().map(|m| (of(m), m.read_errors as f64)),
    );
    lines.many(
        "member_write_errors_total",
        "counter",
        "Writes that the member failed.",
        r.members.iter().map(|m| (of(m), m.write_errors as f64)),
    );
    lines.many(
        "member_bad_blocks_total",
        "counter",
        "Blocks of the member that did not match their guard.",
        r.members.iter().map(|m| (of(m), m.mismatches as f64)),
    );
    for (name, help, progress) in [
        ("rebuild", "Of a member that is filled, while there is one.", &r.rebuild),
        ("scrub", "Of a scrub, while there is one.", &r.scrub),
    ] {
        if let Some(progress) = progress {
            let (done, total) = (progress.done_bytes as f64, progress.total_bytes as f64);
            lines.one(&format!("{name}_done_bytes"), "gauge", help, done);
            lines.one(&format!("{name}_total_bytes"), "gauge", help, total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_and_files() {
        assert_eq!("textfile=/x".parse(), Ok(MetricsSpec::TextFile("/x".into())));
        assert!(matches!("tcp=127.0.0.1:9100".parse(), Ok(MetricsSpec::Tcp(_))));
        for text in ["", "textfile=", "tcp=0.0.0.0:9100", "tcp=localhost:1", "http=x"] {
            assert!(text.parse::<MetricsSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(label("member", "/a\"b\\c\nd"), r#"member="/a\"b\\c\nd""#);
    }
}
