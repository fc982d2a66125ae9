//! `stableio create`.

use std::process::ExitCode;

use anyhow::Result;
use stableio_array::{CreateOptions, create};
use stableio_mem::Bytes;

use crate::{ChecksumsArg, CreateArgs, Switch};

pub(crate) fn run(args: CreateArgs) -> Result<ExitCode> {
    let options = CreateOptions {
        name: args.name,
        level: args.level.into(),
        chunk: args.chunk.0,
        member_size: args.member_size.map(|size| size.0),
        members: args.members,
        force: args.force,
        log: args.log == Switch::On,
        checksums: args.checksums == ChecksumsArg::On,
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
    match (superblock.log, superblock.checksums) {
        (true, true) => {}
        (false, true) => println!(
            "log off: a block in flight at a crash may be lost, and the parity of its row old"
        ),
        (true, false) => println!(
            "checksums off: what a member reads back wrong, without an error, is not noticed and \
             may spread; the content of every write goes through the log"
        ),
        (false, false) => println!(
            "checksums and log off: what the member reads back wrong, without an error, is not \
             noticed, and a block in flight at a crash may hold anything"
        ),
    }
    let members: Vec<_> = options.members.iter().map(|m| m.display().to_string()).collect();
    println!(
        "serve it:  stableio serve {} --export nbd,path={}.sock",
        members.join(" "),
        superblock.name
    );
    Ok(ExitCode::SUCCESS)
}
