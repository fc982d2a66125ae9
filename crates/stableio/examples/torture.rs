//! Temporary.
#![allow(dead_code, unreachable_pub, missing_docs)]
#[path = "../src/table.rs"]
mod table;
#[path = "../src/torture/mod.rs"]
mod torture;
use std::time::Duration;
use torture::*;
fn main() -> anyhow::Result<()> {
    let mut reports = vec![];
    let mut o = TortureOptions::default();
    let mut args = std::env::args().skip(1);
    let mut json = false;
    while let Some(a) = args.next() {
        match a.as_str() {
            "single" => {
                o.level = stableio_array::Level::Single;
            }
            "members" => o.members = Some(args.next().unwrap().parse()?),
            "unprotected" => o.unprotected = true,
            "writes" => o.until = Until::Raced(args.next().unwrap().parse()?),
            "seconds" => {
                o.until = Until::Elapsed(Duration::from_secs(args.next().unwrap().parse()?))
            }
            "dir" => o.dir = Some(args.next().unwrap().into()),
            "json" => json = true,
            _ => panic!(),
        }
    }
    reports.push(run(&o, &mut |p| p.show())?);
    Progress::clear();
    print(&reports, json)?;
    let _ = reports[0].exit_code();
    Ok(())
}
