//! What a driver relies on.

use std::sync::Arc;
use std::time::Duration;

use stableio_block::dev::RamDevice;
use stableio_testkit::Random;
use stableio_testkit::vhost::{Command, Guest, Op, Order, Segment, Workload};

use crate::server::{MIB, Server};

#[test]
fn it_tells_what_it_is() {
    let server = Server::ram(64 << 20);
    let mut guest = server.guest(1);
    assert!(server.export.is_connected());
    assert_eq!(guest.get_id().unwrap(), "a serial number long");
    let config = guest.config().unwrap();
    assert_eq!(config.capacity.to_native(), (64 << 20) / 512);
    assert_eq!(config.blk_size.to_native(), 512);
    assert_eq!(config.seg_max.to_native(), 126);
    assert_eq!(config.num_queues.to_native(), 2);
}

#[test]
fn a_byte_array_agrees() {
    const SECTORS: u64 = 2048;
    for server in [Server::ram(SECTORS * 512), Server::file(SECTORS * 512)] {
        let mut guest = server.guest(2);
        let mut oracle = vec![0u8; SECTORS as usize * 512];
        let mut random = Random::new(7);
        for round in 0..2000u64 {
            let sector = random.below(SECTORS);
            let count = 1 + random.below(64.min(SECTORS - sector));
            let (at, len) = (sector * 512, (count * 512) as usize);
            let area = at as usize..at as usize + len;
            match random.below(8) {
                0..3 => assert!(guest.read(at, len).unwrap() == oracle[area], "round {round}"),
                3..6 => {
                    let bytes: Vec<u8> = (0..len).map(|i| (i as u64 + round * 7) as u8).collect();
                    guest.write(at, &bytes).unwrap();
                    oracle[area].copy_from_slice(&bytes);
                }
                6 => {
                    guest.write_zeroes(at, len as u64, round % 2 == 0).unwrap();
                    oracle[area].fill(0);
                }
                _ => guest.flush().unwrap(),
            }
        }
        assert!(guest.read(0, oracle.len()).unwrap() == oracle);
        // Discarded bytes are zeros or as before: these devices zero them.
        guest.discard(4096, 8192).unwrap();
        oracle[4096..12288].fill(0);
        assert!(guest.read(0, oracle.len()).unwrap() == oracle);
    }
}

#[test]
fn a_request_may_be_cut_anyhow() {
    let server = Server::file(64 << 20);
    let mut guest = server.guest(1);
    let bytes: Vec<u8> = (0..64 << 10).map(|i: usize| (i % 253) as u8).collect();
    guest.memory().store(0, &bytes);
    // Unaligned segments in a strange order: the kernel does not take them
    // for direct I/O, the stack cuts and copies.
    let pieces = [(0, 1000), (1000, 24), (1024, 7168), (8192, 57344)];
    let segments: Vec<Segment> = pieces.iter().map(|&(at, len)| Segment { at, len }).collect();
    let queue = &mut guest.queues()[0];
    queue.submit(1, Command::Write(1536, &segments)).unwrap();
    queue.wait().unwrap().result().unwrap();
    let target: Vec<Segment> =
        pieces.iter().map(|&(at, len)| Segment { at: at + MIB + 8, len }).collect();
    queue.submit(2, Command::Read(1536, &target)).unwrap();
    queue.wait().unwrap().result().unwrap();
    assert!(guest.memory().load(MIB + 8..MIB + 8 + bytes.len()) == bytes);
}

#[test]
fn two_queues_work_at_once() {
    let server = Server::file(64 << 20);
    let mut guest = server.guest(2);
    for (op, block, depth) in [(Op::Write, 4096, 32), (Op::Read, 4096, 32), (Op::Read, 64 << 10, 8)]
    {
        let runtime = Duration::from_millis(200);
        let load = Workload { op, order: Order::Random, block, depth, area: 32 << 20, runtime };
        assert!(guest.run(&load).unwrap().operations > 100);
    }
}

#[test]
fn errors_are_the_requests_own() {
    let server = Server::ram(1 << 20);
    let mut guest = server.guest(1);
    assert!(guest.read((1 << 20) - 512, 1024).is_err(), "beyond the end");
    assert!(guest.write_zeroes(1 << 20, 512, false).is_err());
    assert!(guest.write(u64::MAX / 512 * 512, &[0; 512]).is_err());
    guest.write(0, &[1; 512]).unwrap();
    assert_eq!(guest.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let server = Server::new(true, |worker, _| {
        Arc::new(RamDevice::new(1 << 20, worker.handle().clone()).unwrap())
    });
    let mut guest = server.guest(1);
    assert!(guest.write(0, &[1; 512]).is_err());
    assert!(guest.discard(0, 4096).is_err());
    assert_eq!(guest.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn guests_come_and_go() {
    let server = Server::ram(1 << 20);
    for round in 0..20u8 {
        let mut guest = server.guest(2);
        if round > 0 {
            assert_eq!(guest.read(0, 512).unwrap(), [round; 512]);
        }
        guest.write(0, &[round + 1; 512]).unwrap();
        // It leaves with requests under way.
        for tag in 0..32 {
            let whole = [Segment { at: 0, len: MIB }];
            guest.queues()[0].submit(tag, Command::Read(0, &whole)).unwrap();
        }
        guest.queues()[0].kick().unwrap();
    }
}

#[test]
fn a_second_guest_waits_for_its_turn() {
    let server = Server::ram(1 << 20);
    let first = server.guest(1);
    let socket = server.socket.clone();
    let second = std::thread::spawn(move || {
        Guest::connect(&socket, 1, MIB).unwrap().write(0, &[9; 512]).unwrap();
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!second.is_finished());
    drop(first);
    second.join().unwrap();
}

#[test]
fn stopping_does_not_wait_for_the_guest() {
    let server = Server::ram(64 << 20);
    let mut guest = server.guest(1);
    let load = std::thread::spawn(move || {
        let queue = &mut guest.queues()[0];
        for tag in 0.. {
            let segments = [Segment { at: 0, len: 4096 }];
            queue.submit(tag, Command::Read(0, &segments)).unwrap();
            if queue.wait_within(Duration::from_millis(200)).is_err() {
                return tag;
            }
        }
        unreachable!()
    });
    std::thread::sleep(Duration::from_millis(100));
    drop(server);
    assert!(load.join().unwrap() > 0);
}
