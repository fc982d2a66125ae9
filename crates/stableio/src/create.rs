//! `stableio create`.

use std::process::ExitCode;

use anyhow::Result;
use stableio_array::{CreateOptions, create};
use stableio_mem::Bytes;

use crate::{CreateArgs, Switch};

pub(crate) fn run(args: CreateArgs) -> Result<ExitCode> {
    // The only one there is; the argument is parsed so that scripts may name it.
    let crate::ChecksumArg::Crc64Nvme = args.checksum;
    let options = CreateOptions {
        name: args.name,
        level: args.level.into(),
        chunk: args.chunk.0,
        member_size: args.member_size.map(|size| size.0),
        members: args.members,
        force: args.force,
        log: args.log == Switch::On,
        atomic_unit: args.atomic_unit.map(|unit| unit.0 as u32),
    };
    let superblock = create(&options)?;
    let g = superblock.geometry;
    println!(
        "created '{}': {}, {} members of {}, chunk {}, {} to use",
        superblock.name,
        g.level.name(),
        g.members,
        Bytes(g.member_size),
        Bytes(g.chunk_bytes()),
        Bytes(g.size()),
    );
    if superblock.atomic_unit < 4096 {
        println!(
            "atomic unit: 512 bytes: the content of every write goes through the log \
             (--atomic-unit 4KiB if power failure does not tear 4 KiB on any member)"
        );
    }
    if !superblock.log {
        println!(
            "log off: a block in flight at a crash may be lost, and the parity of its row old"
        );
    }
    let members: Vec<_> = options.members.iter().map(|m| m.display().to_string()).collect();
    println!(
        "serve it:  stableio serve {} --export nbd,path={}.sock",
        members.join(" "),
        superblock.name
    );
    Ok(ExitCode::SUCCESS)
}
