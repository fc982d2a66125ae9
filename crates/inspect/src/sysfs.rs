//! Reading `/sys`: small files, links between directories.

use std::fs;
use std::path::{Path, PathBuf};

use crate::DeviceNumber;

/// The most that an attribute is long: a page.
const ATTRIBUTE_BYTES: usize = 4096;

/// A directory of sysfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dir(PathBuf);

impl Dir {
    /// `None` if it is not there. Links are followed, so that parents are the
    /// true ones.
    pub(crate) fn open(path: &Path) -> Option<Dir> {
        let path = path.canonicalize().ok()?;
        path.is_dir().then_some(Dir(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Its last component, with sysfs' `!` turned back into `/`.
    pub(crate) fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().replace('!', "/")
    }

    pub(crate) fn dir(&self, name: &str) -> Option<Dir> {
        Dir::open(&self.0.join(name))
    }

    pub(crate) fn parent(&self) -> Option<Dir> {
        self.0.parent().map(|path| Dir(path.into()))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    /// An attribute, without the newline at its end.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        let mut bytes = fs::read(self.0.join(name)).ok()?;
        bytes.truncate(ATTRIBUTE_BYTES);
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.text(name)?.parse().ok()
    }

    /// A switch; other numbers than 0 and 1 do not parse.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        match self.text(name)?.as_str() {
            "0" | "N" => Some(false),
            "1" | "Y" => Some(true),
            _ => None,
        }
    }

    /// The chosen one of `writethrough [writeback] none`; a word alone is it.
    pub(crate) fn choice(&self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        let word = inside.map_or(text.as_str(), |(word, _)| word);
        (!word.is_empty() && !word.contains([' ', '[', ']'])).then(|| word.to_owned())
    }

    /// The directories in a directory, in the order of their names.
    pub(crate) fn dirs(&self, name: &str) -> Vec<Dir> {
        let Ok(entries) = fs::read_dir(self.0.join(name)) else { return Vec::new() };
        let mut dirs: Vec<Dir> =
            entries.flatten().filter_map(|entry| Dir::open(&entry.path())).collect();
        dirs.sort_by(|a, b| a.0.cmp(&b.0));
        dirs
    }

    pub(crate) fn device_number(&self) -> Option<DeviceNumber> {
        DeviceNumber::parse(self.text("dev")?.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn garbage_in_attributes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("x"), &bytes).unwrap();
            let dir = Dir::open(dir.path()).unwrap();
            let _ = (dir.text("x"), dir.number::<u32>("x"), dir.flag("x"), dir.choice("x"));
        }
    }

    #[test]
    fn the_chosen_word() {
        let dir = tempfile::tempdir().unwrap();
        let chosen = |text: &str| {
            std::fs::write(dir.path().join("x"), text).unwrap();
            Dir::open(dir.path()).unwrap().choice("x")
        };
        assert_eq!(chosen("writethrough [writeback] none\n").as_deref(), Some("writeback"));
        assert_eq!(chosen("raid1\n").as_deref(), Some("raid1"));
        assert_eq!(chosen("a b"), None);
        assert_eq!(chosen("[]"), None);
        assert_eq!(chosen("]["), None);
    }
}
