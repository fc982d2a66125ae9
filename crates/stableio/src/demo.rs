//! `stableio torture` and `stableio demo`: the claim, shown.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use stableio_array::{CreateOptions, Level, create};

use crate::torture::{self, Progress, TortureOptions, Until};
use crate::{DemoArgs, TortureArgs, members, serve};

/// Size of the demo's members; sparse, so they take what is written.
const MEMBER_SIZE: u64 = 1 << 30;

pub(crate) fn torture(args: TortureArgs) -> Result<ExitCode> {
    let until = match args.writes {
        Some(writes) => Until::Raced(writes),
        None => Until::Elapsed(Duration::from_secs(args.seconds)),
    };
    let options = TortureOptions {
        level: args.level.into(),
        members: args.members,
        until,
        unprotected: args.unprotected,
        faults: args.faults,
        seed: args.seed,
        dir: args.dir,
        ..TortureOptions::default()
    };
    let report = torture::run(&options, &mut |progress| progress.show())?;
    Progress::clear();
    let code = report.exit_code();
    torture::print(&[report], args.json)?;
    Ok(ExitCode::from(code))
}

pub(crate) fn run(args: DemoArgs) -> Result<ExitCode> {
    println!(
        "The same program, twice: threads change its buffers while they are being written to a RAID5\n\
         with checksums, through the library and through vhost-user-blk. Then everything is checked.\n"
    );
    let half = TortureOptions {
        until: Until::Elapsed(Duration::from_secs(args.seconds.div_ceil(2))),
        ..TortureOptions::default()
    };
    let mut reports = Vec::new();
    for unprotected in [false, true] {
        let options = TortureOptions { unprotected, ..half.clone() };
        reports.push(torture::run(&options, &mut |progress| progress.show())?);
        Progress::clear();
    }
    let (protected, lie) = (reports[0].exit_code(), reports[1].exit_code());
    torture::print(&reports, false)?;
    println!();
    // The proof needs both: no damage, and damage where the protection is off.
    let code = match (protected, lie) {
        (0, 1) => ExitCode::SUCCESS,
        (0, _) | (4, _) => ExitCode::from(4),
        _ => ExitCode::FAILURE,
    };
    if args.proof_only || protected == 1 {
        return Ok(code);
    }
    serve_demo(&args.dir)
}

/// A small array in `dir`, made at the first time, and served.
fn serve_demo(dir: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    if members::look(dir)?.members.is_empty() {
        let members: Vec<PathBuf> = (0..3).map(|i| dir.join(format!("m{i}.img"))).collect();
        create(&CreateOptions {
            name: "demo".to_owned(),
            level: Level::Raid5,
            chunk: 64 << 10,
            member_size: Some(MEMBER_SIZE),
            members,
            force: false,
            log: true,
            checksums: true,
            atomic_unit: None,
        })?;
        println!("made the array 'demo' in {}", dir.display());
    }
    let (nbd, vhost) = (dir.join("nbd.sock"), dir.join("vhost.sock"));
    let exports = vec![
        format!("nbd,path={}", nbd.display()).parse()?,
        format!("vhost-user-blk,path={},queues=2", vhost.display()).parse()?,
    ];
    let socket = std::path::absolute(&nbd).unwrap_or(nbd);
    println!("try, in another terminal:");
    println!("  nbdinfo 'nbd+unix:///demo?socket={}'", socket.display());
    println!(
        "  qemu-io -f raw 'nbd+unix:///demo?socket={}' -c 'write -P 7 0 1M' -c 'read -P 7 0 1M'",
        socket.display()
    );
    println!("  stableio status demo");
    serve::run(serve::demo_args(vec![dir.into()], exports))
}
