//! What to serve as: the `--export` argument, parsed at the border.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use stableio_front::socket::UnixOptions;

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port, loopback only.
    Tcp(SocketAddr),
}

/// The protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Protocol {
    Nbd,
    VhostUserBlk {
        queues: u16,
        /// Whether the guest's memory is declared stable.
        stable: bool,
    },
}

/// One `--export`.
#[derive(Debug, Clone)]
pub(crate) struct ExportSpec {
    pub(crate) protocol: Protocol,
    pub(crate) name: Option<String>,
    pub(crate) address: Address,
    pub(crate) access: UnixOptions,
    pub(crate) read_only: bool,
}

/// Why an `--export` is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadExport(String);

impl fmt::Display for BadExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadExport {}

fn bad<T>(text: impl Into<String>) -> Result<T, BadExport> {
    Err(BadExport(text.into()))
}

impl FromStr for ExportSpec {
    type Err = BadExport;

    fn from_str(text: &str) -> Result<Self, BadExport> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let mut protocol = match kind {
            "nbd" => Protocol::Nbd,
            "vhost-user-blk" => Protocol::VhostUserBlk { queues: 1, stable: false },
            other => return bad(format!("'{other}' is no export type: nbd or vhost-user-blk")),
        };
        let (mut name, mut address, mut access, mut read_only) =
            (None, None, UnixOptions::default(), false);
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match (key, &mut protocol) {
                ("name", _) => name = Some(check_name(value)?),
                ("path", _) if !value.is_empty() => set(&mut address, Address::Unix(value.into()))?,
                ("tcp", Protocol::Nbd) => set(&mut address, tcp(value)?)?,
                ("mode", _) => access.mode = mode(value)?,
                ("group", _) => access.group = Some(group(value)?),
                ("readonly", _) => read_only = flag(value)?,
                ("queues", Protocol::VhostUserBlk { queues, .. }) => *queues = count(value)?,
                ("buffers", Protocol::VhostUserBlk { stable, .. }) => *stable = buffers(value)?,
                _ => return bad(format!("{kind}: '{part}' is not known here")),
            }
        }
        let Some(address) = address else {
            return bad(format!(
                "{kind}: where? add path=SOCKET{}",
                if kind == "nbd" { " or tcp=127.0.0.1:10809" } else { "" }
            ));
        };
        Ok(Self { protocol, name, address, access, read_only })
    }
}

fn set(address: &mut Option<Address>, new: Address) -> Result<(), BadExport> {
    match address.replace(new) {
        None => Ok(()),
        Some(_) => bad("one address an export: path= or tcp=, once"),
    }
}

fn check_name(value: &str) -> Result<String, BadExport> {
    match stableio_array::superblock::check_name(value) {
        Ok(()) => Ok(value.to_owned()),
        Err(why) => bad(format!("name '{value}': {why}")),
    }
}

fn tcp(value: &str) -> Result<Address, BadExport> {
    match value.parse::<SocketAddr>() {
        Ok(address) => Ok(Address::Tcp(address)),
        Err(_) => bad(format!(
            "tcp '{value}': write an address and a port, as 127.0.0.1:10809 or [::1]:10809"
        )),
    }
}

fn mode(value: &str) -> Result<u32, BadExport> {
    match u32::from_str_radix(value, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => bad(format!("mode '{value}': write an octal number up to 0777, as 0660")),
    }
}

/// A group by number or by its name in `/etc/group`.
fn group(value: &str) -> Result<u32, BadExport> {
    if let Ok(number) = value.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(value))
            .then(|| fields.nth(1).and_then(|id| id.parse().ok()))
            .flatten()
    });
    found.map_or_else(|| bad(format!("group '{value}' does not exist")), Ok)
}

fn flag(value: &str) -> Result<bool, BadExport> {
    match value {
        "" | "on" => Ok(true),
        "off" => Ok(false),
        other => bad(format!("readonly={other}: on or off")),
    }
}

fn count(value: &str) -> Result<u16, BadExport> {
    match value.parse() {
        Ok(count @ 1..=64) => Ok(count),
        _ => bad(format!("queues '{value}': 1 to 64")),
    }
}

fn buffers(value: &str) -> Result<bool, BadExport> {
    match value {
        "unstable" => Ok(false),
        "stable" => Ok(true),
        other => bad(format!(
            "buffers={other}: unstable (the default) or stable (you vouch for the guest)"
        )),
    }
}

/// The lines that a user pastes to connect.
pub(crate) fn hints(spec: &ExportSpec, name: &str) -> Vec<String> {
    match (&spec.protocol, &spec.address) {
        (Protocol::Nbd, Address::Unix(path)) => vec![format!("nbd+unix:///{name}?socket={}", escape(path))],
        (Protocol::Nbd, Address::Tcp(address)) => vec![format!("nbd://{address}/{name}")],
        (Protocol::VhostUserBlk { queues, .. }, Address::Unix(path)) => vec![
            "-object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem -m 1G".to_owned(),
            format!(
                "-chardev socket,id={name},path={} -device vhost-user-blk-pci,chardev={name},num-queues={queues}",
                absolute(path).display()
            ),
        ],
        (Protocol::VhostUserBlk { .. }, Address::Tcp(_)) => unreachable!("parsed for NBD only"),
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// A path inside a URI's query: everything unusual in percent.
fn escape(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.~".contains(&b);
    let one = |b: &u8| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02X}") };
    absolute(path).as_os_str().as_bytes().iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_parsed() {
        let spec: ExportSpec =
            "nbd,name=vms,path=/run/x/nbd.sock,mode=0660,group=0".parse().unwrap();
        assert_eq!(spec.name.as_deref(), Some("vms"));
        assert_eq!(spec.access, UnixOptions { mode: 0o660, group: Some(0) });
        assert_eq!(hints(&spec, "vms"), ["nbd+unix:///vms?socket=/run/x/nbd.sock"]);
        let spec: ExportSpec =
            "vhost-user-blk,path=/x,queues=2,buffers=stable,readonly".parse().unwrap();
        assert_eq!(spec.protocol, Protocol::VhostUserBlk { queues: 2, stable: true });
        assert!(spec.read_only);
    }

    #[test]
    fn wrong_exports_are_refused_in_one_line() {
        for text in [
            "",
            "iscsi,path=x",
            "nbd",
            "nbd,path=",
            "nbd,path=a,path=b",
            "nbd,path=a,queues=2",
            "nbd,path=a,mode=9",
            "nbd,path=a,group=no-such-group",
            "nbd,tcp=localhost",
            "vhost-user-blk,tcp=127.0.0.1:1",
            "vhost-user-blk,path=a,queues=0",
            "vhost-user-blk,path=a,buffers=maybe",
            "nbd,path=a,name=../x",
        ] {
            let error = text.parse::<ExportSpec>().expect_err(text);
            assert!(!error.0.contains('\n') && error.0.len() > 10, "{text}: {error}");
        }
    }
}
