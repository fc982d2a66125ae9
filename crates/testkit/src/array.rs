//! An array with its members, its exports and what is done to all of them in a test.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::{Export, Scratch, Serve, create, run_tool, stableio_bin};

/// A raid5 array of three members and the addresses at which it is served.
#[derive(Debug)]
pub struct Raid5 {
    /// Where it all lives.
    pub scratch: Scratch,
    /// Its members, by role.
    pub members: Vec<PathBuf>,
    /// Over NBD.
    pub nbd: Export,
    /// As a vhost-user-blk device of two queues.
    pub vhost: Export,
}

impl Raid5 {
    /// Makes the array; its members are as large as `member_size` says, and empty.
    pub fn create(scratch: Scratch, member_size: &str) -> io::Result<Raid5> {
        let members: Vec<_> = (0..3).map(|role| scratch.path(&format!("member-{role}"))).collect();
        create("disk", &["--member-size", member_size], &members)?;
        Ok(Self::of(scratch, members))
    }

    /// The array of these members, which may be two of three.
    pub fn of(scratch: Scratch, members: Vec<PathBuf>) -> Raid5 {
        let nbd = Export::nbd("disk", &scratch.path("nbd.sock"));
        let vhost = Export::vhost_user_blk("disk", &scratch.path("vhost.sock"));
        Raid5 { scratch, members, nbd, vhost: vhost.with("queues", "2") }
    }

    /// Serves it over both protocols.
    pub fn serve(&self) -> io::Result<Serve> {
        Serve::array(&self.scratch, &self.members, &[self.nbd.clone(), self.vhost.clone()])
    }

    /// A copy of its member files, but the one of the role `without`, in a place of its own.
    pub fn copy_without(&self, without: usize) -> io::Result<Raid5> {
        let scratch = Scratch::new()?;
        let mut members = self.members.clone();
        members.remove(without);
        for member in &mut members {
            let copy = scratch.path(&member.file_name().unwrap_or_default().display().to_string());
            copy_sparse(member, &copy)?;
            *member = copy;
        }
        Ok(Self::of(scratch, members))
    }

    /// The whole export in a file, by `nbdcopy`.
    pub fn read_all(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.scratch.path(name);
        run_tool(Path::new("nbdcopy"), [Path::new(&self.nbd.uri()), &path])?;
        Ok(path)
    }

    /// What `stableio examine --json` says of a member.
    pub fn examine(&self, role: usize) -> io::Result<serde_json::Value> {
        let member = &self.members[role];
        let args = [Path::new("examine"), Path::new("--json"), member];
        Ok(serde_json::from_str(&run_tool(&stableio_bin()?, args)?)?)
    }
}

/// Copies a file and keeps its holes.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    run_tool(Path::new("cp"), [Path::new("--sparse=always"), from, to]).map(drop)
}

/// The first place where two files differ in their first `len` bytes, which both must have.
pub fn first_difference(a: &Path, b: &Path, len: u64) -> io::Result<Option<u64>> {
    const PIECE: u64 = 1 << 20;
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let (mut of_a, mut of_b) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let mut at = 0;
    while at < len {
        let now = PIECE.min(len - at) as usize;
        a.read_exact(&mut of_a[..now])?;
        b.read_exact(&mut of_b[..now])?;
        if of_a[..now] != of_b[..now] {
            let same = of_a.iter().zip(&of_b).take_while(|(a, b)| a == b).count();
            return Ok(Some(at + same as u64));
        }
        at += now as u64;
    }
    Ok(None)
}

/// Bytes that a file takes on its file system.
pub fn bytes_taken(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    // st_blocks is in units of 512 bytes whatever the file system's block is, stat(3type).
    Ok(fs::metadata(path)?.blocks() * 512)
}
