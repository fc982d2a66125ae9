//! `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Of the driver; 0 for a file system without a block device.
    pub major: u32,
    /// Of the device.
    pub minor: u32,
}

impl DeviceNumber {
    /// `8:1`.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = str::from_utf8(text).ok()?;
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Unique in its namespace.
    pub id: u64,
    /// The device number of the whole file system.
    pub device: DeviceNumber,
    /// Which part of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// `ext4`, `fuse.sshfs`.
    pub kind: String,
    /// What is mounted: a device, or whatever the file system calls it.
    pub source: String,
    /// Of this mount and of the file system.
    pub options: Vec<String>,
}

impl Mount {
    /// The value of `name=value`; an option without a value has an empty one.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find_map(|option| match option.split_once('=') {
            Some((key, value)) => (key == name).then_some(value),
            None => (option == name).then_some(""),
        })
    }
}

/// All mounts; lines that are none are left out.
pub fn parse_mountinfo(bytes: &[u8]) -> Vec<Mount> {
    bytes.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 - ext3 /dev/root rw`,
/// with any number of tags before the dash.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let _parent = fields.next()?;
    let device = DeviceNumber::parse(fields.next()?)?;
    let root = path(fields.next()?);
    let mount_point = path(fields.next()?);
    let of_mount = fields.next()?;
    fields.find(|field| *field == b"-")?;
    let kind = text(fields.next()?);
    let source = text(fields.next()?);
    let of_file_system = fields.next().unwrap_or_default();
    let mut options: Vec<String> = Vec::new();
    for option in [of_mount, of_file_system].iter().flat_map(|list| list.split(|b| *b == b',')) {
        // Unescaped after the split: a comma inside a value is escaped.
        let option = text(option);
        if !option.is_empty() && !options.contains(&option) {
            options.push(option);
        }
    }
    Some(Mount { id, device, root, mount_point, kind, source, options })
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Space, tab, newline and backslash stand as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'\\').then(|| octal(tail)).flatten();
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = digits.get(..3)?;
    let value = digits.iter().try_fold(0u32, |value, digit| {
        matches!(digit, b'0'..=b'7').then(|| value * 8 + u32::from(digit - b'0'))
    })?;
    u8::try_from(value).ok()
}

/// The mount that a path lies on, judged by its name alone.
pub(crate) fn by_prefix<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let holds = |mount: &&Mount| path.starts_with(&mount.mount_point);
    // Of those at the same place the last one hides the others.
    mounts.iter().filter(holds).max_by_key(|mount| mount.mount_point.as_os_str().as_bytes().len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_parsed() {
        let text = b"36 35 98:0 /sub /mnt/a\\040b\\134c rw,noatime master:1 propagate_from:2 - ext4 /dev/sd\\011a rw,errors=continue\n\
            37 1 0:39 / / rw - overlay overlay rw,upperdir=/x\\054y,lowerdir=/l\n\
            nonsense\n\
            38 1 0:40 / /half rw - fuse.sshfs\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        let mount = &mounts[0];
        assert_eq!(mount.device, DeviceNumber { major: 98, minor: 0 });
        assert_eq!(mount.mount_point, Path::new("/mnt/a b\\c"));
        assert_eq!((mount.kind.as_str(), mount.source.as_str()), ("ext4", "/dev/sd\ta"));
        assert_eq!(mount.option("errors"), Some("continue"));
        assert_eq!(mount.option("noatime"), Some(""));
        assert_eq!(mount.option("atime"), None);
        assert_eq!(mounts[1].option("upperdir"), Some("/x,y"));
    }

    #[test]
    fn the_longest_and_last_mount_point_holds_a_path() {
        let text = b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /srv rw - xfs b rw\n3 1 8:3 / /srv rw - btrfs c rw\n";
        let mounts = parse_mountinfo(text);
        let kind = |path: &str| by_prefix(&mounts, Path::new(path)).unwrap().kind.clone();
        assert_eq!(kind("/srv/x"), "btrfs");
        assert_eq!(kind("/srvx"), "ext4");
    }

    proptest! {
        #[test]
        fn garbage_is_no_mount_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse_mountinfo(&bytes);
            let _ = DeviceNumber::parse(&bytes);
            let _ = unescape(&bytes);
        }

        #[test]
        fn damaged_lines_never_panic(
            cut in 0usize..80, byte in any::<u8>(), at in 0usize..80,
        ) {
            let mut line = b"36 35 98:0 /sub /mnt/a\\040b rw,noatime master:1 - ext4 /dev/sda rw,a=b".to_vec();
            let at = at % line.len();
            line[at] = byte;
            line.truncate(cut);
            let _ = parse_mountinfo(&line);
        }

        #[test]
        fn escapes_come_back(name in "[ -~\\t\\n]{0,40}") {
            let escaped: Vec<u8> = name.bytes().flat_map(|b| match b {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{b:03o}").into_bytes(),
                b => vec![b],
            }).collect();
            prop_assert_eq!(unescape(&escaped), name.into_bytes());
        }
    }
}
