//! A host made of files: as much of `/proc` and `/sys` as the inspector reads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use stableio_inspect::{Host, Report};
use tempfile::TempDir;

pub(crate) struct Bed {
    dir: TempDir,
    devices: u32,
}

impl Bed {
    pub(crate) fn new() -> Self {
        let bed = Self { dir: TempDir::new().unwrap(), devices: 0 };
        for dir in ["proc/self", "sys/dev/block", "sys/class/block", "sys/devices"] {
            fs::create_dir_all(bed.path(dir)).unwrap();
        }
        bed
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name.trim_start_matches('/'))
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A whole disk that sets the flag or not, with these attributes.
    pub(crate) fn disk(&mut self, name: &str, stable: bool, attributes: &[(&str, &str)]) -> String {
        self.disk_at(&format!("sys/devices/{name}"), stable, attributes)
    }

    /// The same in a directory of sysfs; gives its device number.
    pub(crate) fn disk_at(
        &mut self,
        dir: &str,
        stable: bool,
        attributes: &[(&str, &str)],
    ) -> String {
        let flag = if stable { "1\n" } else { "0\n" };
        self.write(&format!("{dir}/queue/stable_writes"), flag);
        self.write(&format!("{dir}/queue/logical_block_size"), "512\n");
        self.write(&format!("{dir}/queue/dma_alignment"), "3\n");
        self.write(&format!("{dir}/queue/physical_block_size"), "512\n");
        self.write(&format!("{dir}/alignment_offset"), "0\n");
        for (name, text) in attributes {
            self.write(&format!("{dir}/{name}"), &format!("{text}\n"));
        }
        self.number(dir)
    }

    pub(crate) fn partition(&mut self, disk: &str, name: &str) -> String {
        let dir = format!("sys/devices/{disk}/{name}");
        self.write(&format!("{dir}/partition"), "1\n");
        self.write(&format!("{dir}/alignment_offset"), "0\n");
        self.number(&dir)
    }

    /// `upper` stands on `lower`.
    pub(crate) fn slave(&self, upper: &str, lower: &str) {
        let link = self.path(&format!("sys/devices/{upper}/slaves/{lower}"));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(self.path(&format!("sys/class/block/{lower}")), link).unwrap();
    }

    pub(crate) fn link(&self, from: &str, to: &str) {
        let from = self.path(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(self.path(to), from).unwrap();
    }

    pub(crate) fn mount(&self, number: &str, at: &str, kind: &str, source: &str, options: &str) {
        let path = self.path("proc/self/mountinfo");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        let id = 900_000 + text.lines().count();
        text.push_str(&format!("{id} 1 {number} / {at} rw - {kind} {source} rw,{options}\n"));
        fs::write(path, text).unwrap();
    }

    pub(crate) fn host(&self, release: &str) -> Host {
        Host::at(self.dir.path(), release)
    }

    /// Of the only mount.
    pub(crate) fn report(&self, release: &str) -> Report {
        let mut reports = self.host(release).mounted();
        assert_eq!(reports.len(), 1, "{reports:#?}");
        reports.remove(0)
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    fn number(&mut self, dir: &str) -> String {
        self.devices += 1;
        let number = format!("8:{}", self.devices);
        self.write(&format!("{dir}/dev"), &format!("{number}\n"));
        let name = dir.rsplit('/').next().unwrap();
        self.link(&format!("sys/dev/block/{number}"), dir);
        self.link(&format!("sys/class/block/{name}"), dir);
        number
    }
}
