//! A constant load on a vhost-user-blk socket, for profiling the server:
//! `guest_load SOCKET read|write BYTES DEPTH SECONDS AREA_BYTES`.

use std::path::Path;
use std::time::Duration;

use stableio_testkit::vhost::{Guest, Op, Order, Workload};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, op, block, depth, seconds, area] = &args[..] else {
        eprintln!("guest_load SOCKET read|write BYTES DEPTH SECONDS AREA_BYTES");
        std::process::exit(2);
    };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let block = number(block) as usize;
    let workload = Workload {
        op: if op == "read" { Op::Read } else { Op::Write },
        order: if block > 65536 { Order::Sequential } else { Order::Random },
        block,
        depth: number(depth) as usize,
        area: number(area),
        runtime: Duration::from_secs(number(seconds)),
    };
    let mut guest = Guest::connect(Path::new(socket), 1, 64 << 20)?;
    let done = guest.run(&workload)?;
    println!(
        "{:.0} ops/s, {:.0} MiB/s",
        done.ops_per_s(),
        done.bytes as f64 / done.elapsed.as_secs_f64() / 1048576.0
    );
    Ok(())
}
