//! What `tools/extract.py` takes out of members that a world left behind: it
//! must be what the array reads as once it is open.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use stableio_mem::BLOCK;

use crate::check::probe;
use crate::image::block_of;
use crate::model::Version;
use crate::shape::Shape;
use crate::world::Remains;

/// What the tool gave.
pub struct Extracted {
    bytes: Vec<u8>,
    lost: BTreeSet<u64>,
}

/// A directory that is gone with its owner.
struct Scratch(PathBuf);

/// The tool.
///
/// # Errors
///
/// Why it can not be run here.
pub fn tool() -> Result<PathBuf, String> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/extract.py");
    let python = Command::new("python3").arg("--version").output();
    match (tool.canonicalize(), python) {
        (Err(error), _) => Err(format!("{}: {error}", tool.display())),
        (_, Err(error)) => Err(format!("python3: {error}")),
        (Ok(tool), Ok(_)) => Ok(tool),
    }
}

/// Runs the tool on copies of all members that are there.
///
/// # Errors
///
/// What went wrong, or what the tool said.
pub fn extract(remains: &Remains, shape: &Shape) -> Result<Extracted, String> {
    let tool = tool()?;
    let scratch = Scratch::new().map_err(|e| e.to_string())?;
    let mut command = Command::new("python3");
    command.arg(tool);
    for (name, _, medium) in remains.named() {
        let image = medium.live();
        if probe(image, Path::new(&name), shape.member_size).is_none() {
            continue;
        }
        let path = scratch.0.join(name);
        let copy = || {
            let file = File::create(&path)?;
            file.set_len(shape.member_size)?;
            image.written().try_for_each(|n| file.write_all_at(image.block(n), n * BLOCK as u64))
        };
        copy().map_err(|e: io::Error| format!("{}: {e}", path.display()))?;
        command.arg(path);
    }
    let output = scratch.0.join("image");
    let done = command.arg("--ignore-lost").arg("-o").arg(&output).output();
    let done = done.map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        return Err(format!("{}: {}", done.status, said.trim()));
    }
    let lost = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once("lost: block ")?;
        rest.split(',').next()?.parse().ok()
    });
    let lost = lost.collect();
    let bytes = std::fs::read(&output).map_err(|e| e.to_string())?;
    Ok(Extracted { bytes, lost })
}

impl Extracted {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// A block; `None` is lost.
    ///
    /// # Panics
    ///
    /// When there is none with this number.
    pub fn version(&self, block: u64) -> Version {
        let at = block as usize * BLOCK;
        let bytes = || block_of(&self.bytes[at..at + BLOCK]);
        (!self.lost.contains(&block)).then(bytes)
    }
}

impl Scratch {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("stableio-sim-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
