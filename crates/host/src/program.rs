//! The program that a session starts, and what can be done with programs at all.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::error::{Error, Result};

/// What a program is to a preloaded library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The dynamic linker loads the library into it.
    Loads,
    /// Has no dynamic linker.
    Static,
    /// Has that of another architecture or C library.
    Foreign,
    /// Gets rights from its file, and its dynamic linker then ignores what the user preloads.
    Privileged,
    /// None of these: no ELF file.
    Unknown,
}

impl Kind {
    /// What to say of a program that does not load the library.
    pub(crate) fn why_not(self) -> Option<&'static str> {
        match self {
            Kind::Loads | Kind::Unknown => None,
            Kind::Static => Some("is statically linked"),
            Kind::Foreign => Some("is of another architecture or C library"),
            Kind::Privileged => Some("gets rights from its file (set-uid, capabilities)"),
        }
    }
}

/// Finds the program as `execvp` does.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf> {
    let shown = || name.to_string_lossy().into_owned();
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return match obstacle(&path) {
            None => Ok(path),
            Some(error) if is_absent(&error) => Err(Error::NotFound(shown())),
            Some(error) => Err(Error::NotExecutable(shown(), text(&error))),
        };
    }
    // As the C library has it where PATH is not set.
    let list = env::var_os("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
    let mut refused = None;
    for dir in env::split_paths(&list).filter(|_| !name.is_empty()) {
        let path = dir.join(name);
        match obstacle(&path) {
            None => return Ok(path),
            Some(error) if !is_absent(&error) => refused = refused.or(Some(error)),
            Some(_) => {}
        }
    }
    match refused {
        Some(error) => Err(Error::NotExecutable(shown(), text(&error))),
        None => Err(Error::NotFound(shown())),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Why the file can not be executed.
fn obstacle(path: &Path) -> Option<io::Error> {
    match fs::metadata(path) {
        Err(error) => Some(error),
        Ok(meta) if meta.is_dir() => Some(io::Error::from_raw_os_error(libc::EISDIR)),
        Ok(_) => access(path, Access::EXEC_OK).err().map(io::Error::from),
    }
}

/// The error as shells say it: without its number.
pub(crate) fn text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

/// How often an interpreter may itself be a script; the kernel allows no more.
const SCRIPTS: usize = 4;

/// What the program at `path` is, or the interpreter of the script there.
pub(crate) fn kind(path: &Path) -> Kind {
    let mut path = path.to_path_buf();
    for _ in 0..=SCRIPTS {
        let Ok(file) = File::open(&path) else {
            // One may execute what one may not read; such a file is made so for its rights.
            return if is_privileged(&path) { Kind::Privileged } else { Kind::Unknown };
        };
        match interpreter(&file) {
            Some(next) => path = next,
            None if is_privileged(&path) => return Kind::Privileged,
            None => return elf_kind(&file).unwrap_or(Kind::Unknown),
        }
    }
    Kind::Unknown
}

/// The program that runs a script.
fn interpreter(mut file: &File) -> Option<PathBuf> {
    let mut head = [0; 256];
    let len = file.read(&mut head).ok()?;
    let line = head[..len].strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let mut words = line.split(|byte| *byte == b' ' || *byte == b'\t').filter(|w| !w.is_empty());
    let first = PathBuf::from(OsStr::from_bytes(words.next()?));
    // `#!/usr/bin/env python3`: what matters is what env starts.
    match (first.file_name() == Some(OsStr::new("env")), words.next()) {
        (true, Some(name)) if !name.starts_with(b"-") => find(OsStr::from_bytes(name)).ok(),
        _ => Some(first),
    }
}

/// Whether starting it gives rights that the user does not have.
fn is_privileged(path: &Path) -> bool {
    let Ok(meta) = fs::metadata(path) else { return false };
    let other_user =
        meta.mode() & libc::S_ISUID != 0 && meta.uid() != rustix::process::getuid().as_raw();
    // Without the right to execute it marks mandatory locking, and gives nothing.
    let group_bits = libc::S_ISGID | libc::S_IXGRP;
    let other_group =
        meta.mode() & group_bits == group_bits && meta.gid() != rustix::process::getgid().as_raw();
    // The dynamic linker of root's processes is not affected by capabilities of their files.
    let capable = !rustix::process::getuid().is_root()
        && rustix::fs::getxattr(path, c"security.capability", &mut [0_u8; 64][..]).is_ok();
    other_user || other_group || capable
}

/// What an ELF file is. Fields are those of the System V ABI, chapter 4 and 5.
pub(crate) fn elf_kind(file: &File) -> Option<Kind> {
    const PT_INTERP: u32 = 3;
    const EM_X86_64: u16 = 62;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    let (class, order) = (header[4], header[5]);
    if header[..4] != *b"\x7fELF" {
        return None;
    }
    // 64 bits, little endian; anything else runs, but not with our library.
    if class != 2 || order != 1 || u16_at(&header, 18) != EM_X86_64 {
        return Some(Kind::Foreign);
    }
    let (at, size, count) =
        (u64_at(&header, 32), u16_at(&header, 54) as usize, u16_at(&header, 56) as usize);
    if size != 56 || count > 512 {
        return None;
    }
    let mut table = vec![0; size * count];
    file.read_exact_at(&mut table, at).ok()?;
    let Some(entry) = table.chunks_exact(size).find(|e| u32_at(e, 0) == PT_INTERP) else {
        return Some(Kind::Static);
    };
    let mut name = vec![0; usize::try_from(u64_at(entry, 32)).ok()?.min(4096)];
    file.read_exact_at(&mut name, u64_at(entry, 8)).ok()?;
    let name = name.split(|byte| *byte == 0).next()?;
    // On some systems it lies in a directory of its own; its name is everywhere the same.
    let glibc = name.ends_with(b"/ld-linux-x86-64.so.2");
    Some(if glibc { Kind::Loads } else { Kind::Foreign })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit ELF file of one entry of its table: the interpreter's name, at its end.
    fn elf(machine: u16, interpreter: Option<&str>) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        if let Some(name) = interpreter {
            file[64] = 3;
            file[64 + 8] = 64 + 56;
            file[64 + 32] = name.len() as u8 + 1;
            file.extend(name.as_bytes());
            file.push(0);
        }
        file
    }

    fn kind_of(bytes: &[u8]) -> io::Result<Option<Kind>> {
        use std::io::Write;
        let mut file = tempfile::tempfile()?;
        file.write_all(bytes)?;
        Ok(elf_kind(&file))
    }

    #[test]
    fn kinds_of_programs_are_told_apart() -> io::Result<()> {
        let glibc = elf(62, Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(kind_of(&glibc)?, Some(Kind::Loads));
        assert_eq!(kind_of(&elf(62, Some("/lib/ld-musl-x86_64.so.1")))?, Some(Kind::Foreign));
        assert_eq!(kind_of(&elf(183, Some("/lib/ld-linux-aarch64.so.1")))?, Some(Kind::Foreign));
        assert_eq!(kind_of(&elf(62, None))?, Some(Kind::Static));
        assert_eq!(kind_of(b"#!/bin/sh\n")?, None);
        // Cut anywhere, or with numbers that name no place in it: no answer, and no panic.
        for len in 0..glibc.len() - 1 {
            let _ = kind_of(&glibc[..len])?;
        }
        for byte in 32..glibc.len() {
            let mut wrong = glibc.clone();
            wrong[byte] = 0xff;
            let _ = kind_of(&wrong)?;
        }
        Ok(())
    }

    #[test]
    fn a_script_is_what_its_interpreter_is() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name);
        fs::write(path("static"), elf(62, None))?;
        fs::write(path("script"), format!("#!{}  -x\n", path("static").display()))?;
        fs::write(path("again"), format!("#! {}\n", path("script").display()))?;
        fs::write(path("loop"), format!("#!{}\n", path("loop").display()))?;
        assert_eq!(kind(&path("again")), Kind::Static);
        assert_eq!(kind(&path("loop")), Kind::Unknown);
        assert_eq!(kind(&path("absent")), Kind::Unknown);
        Ok(())
    }
}
