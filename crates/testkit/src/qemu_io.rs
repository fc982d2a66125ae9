//! `qemu-io`, which does to an export just what it is told.

use std::io;
use std::path::Path;

use crate::run_tool;

/// Runs commands such as `write -P 0x5a 4096 512` or `read -P 0x5a 4096 512` on an export or an
/// image, one after the other, and returns what they printed.
///
/// A command that fails is an error, and so is a read that finds another pattern.
pub fn qemu_io(at: &str, commands: &[&str]) -> io::Result<String> {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    run_tool(Path::new("qemu-io"), ["-f", "raw", at].into_iter().chain(commands))
}
