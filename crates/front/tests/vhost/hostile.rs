//! What a guest or a front end can do to us, and what it gets.

use rustix::fs::ftruncate;
use stableio_front::vhost_user_blk::fuzz_chain;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

use crate::raw::{
    DATA, Descriptor, HEADER, INDIRECT, NEXT, REGION, RawGuest, STATUS, USER, WRITE, region, rings,
};
use crate::server::{Server, Slow};

const OK: Option<u8> = Some(0);
const IOERR: Option<u8> = Some(1);
const UNSUPP: Option<u8> = Some(2);

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn started(server: &Server) -> RawGuest {
    let mut guest = RawGuest::connect(&server.socket);
    guest.start();
    guest
}

#[test]
fn requests_that_are_wrong_fail_alone() {
    let (head, tail): (Descriptor, Descriptor) = ((HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0));
    let into = |addr, len| (addr, len, WRITE | NEXT, 2);
    let from = |addr, len| (addr, len, NEXT, 2);
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    /// What, type, sector, chain, and the status that it gets.
    type Case<'a> = (&'a str, u32, u64, &'a [Descriptor], Option<u8>);
    let cases: &[Case<'_>] = &[
        ("good read", IN, 0, &[head, into(DATA, 512), tail], OK),
        ("good write", OUT, 0, &[head, from(DATA, 512), tail], OK),
        ("in no region", IN, 0, &[head, into(2 * REGION, 512), tail], IOERR),
        ("across two", IN, 0, &[head, into(REGION - 256, 512), tail], IOERR),
        ("runs over", IN, 0, &[head, into(u64::MAX - 100, 512), tail], IOERR),
        ("the longest", IN, 0, &[head, into(DATA, u32::MAX - 100), tail], IOERR),
        ("no data to read", IN, 0, &[head, tail], IOERR),
        ("no data to write", OUT, 0, &[head, tail], IOERR),
        ("a write to writable", OUT, 0, &[head, into(DATA, 512), tail], IOERR),
        ("a read from readable", IN, 0, &[head, from(DATA, 512), tail], IOERR),
        ("half a sector", IN, 0, &[head, into(DATA, 256), tail], IOERR),
        ("zero-length data", IN, 0, &[head, into(DATA, 0), tail], IOERR),
        ("beyond the end", IN, 2048, &[head, into(DATA, 512), tail], IOERR),
        ("a sector too far", IN, u64::MAX, &[head, into(DATA, 512), tail], IOERR),
        ("half a header", IN, 0, &[(HEADER, 8, NEXT, 1), into(DATA, 512), tail], IOERR),
        ("no header", FLUSH, 0, &[tail], IOERR),
        ("unknown", 99, 0, &[head, tail], UNSUPP),
        ("flush", FLUSH, 0, &[head, (0, 0, NEXT, 2), tail], OK),
        ("a short id", GET_ID, 0, &[head, into(DATA, 4), tail], OK),
        ("ranges that are not whole", DISCARD, 0, &[head, from(DATA, 24), tail], IOERR),
        ("no ranges", DISCARD, 0, &[head, from(DATA, 0), tail], IOERR),
        ("too many ranges", WRITE_ZEROES, 0, &[head, from(DATA, 17 * 16), tail], IOERR),
        ("a header in no region", IN, 0, &[(0x8000, 48, INDIRECT, 0)], IOERR),
    ];
    guest.table(0x8000, &[(3 * REGION, 16, NEXT, 1), into(DATA, 512), tail]);
    for (what, kind, sector, chain, expected) in cases {
        guest.header(*kind, *sector);
        assert_eq!(guest.ask(chain), *expected, "{what}");
        assert!(guest.is_served(), "after '{what}'");
    }
}

#[test]
fn a_request_is_its_bytes_not_its_descriptors() {
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    // The header in three pieces, the last of them together with the data.
    guest.header(OUT, 3);
    guest.memory.write_slice(&[0xAB; 512], GuestAddress(HEADER + 16)).unwrap();
    guest.memory.write_obj(0xffu8, GuestAddress(DATA)).unwrap();
    guest.table(
        0,
        &[
            (HEADER, 1, NEXT, 1),
            (HEADER + 1, 9, NEXT, 2),
            (HEADER + 10, 6 + 512, NEXT, 3),
            (DATA, 1, WRITE, 0),
        ],
    );
    guest.offer(0);
    guest.answer().unwrap();
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 0);
    // Data and status in one descriptor, in an indirect table.
    guest.header(IN, 3);
    guest.table(0x8000, &[(HEADER, 16, NEXT, 1), (DATA, 513, WRITE, 0)]);
    guest.memory.write_obj(0xffu8, GuestAddress(DATA + 512)).unwrap();
    guest.table(0, &[(0x8000, 32, INDIRECT, 0)]);
    guest.offer(0);
    guest.answer().unwrap();
    let mut read = [0; 513];
    guest.memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
    assert!(read[..512] == [0xAB; 512] && read[512] == 0);
}

#[test]
fn several_ranges_are_zeroed_by_one_request() {
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    guest.memory.write_slice(&[1; 4096], GuestAddress(DATA)).unwrap();
    guest.header(OUT, 0);
    let chain = [(HEADER, 16, NEXT, 1), (DATA, 4096, NEXT, 2), (STATUS, 1, WRITE, 0)];
    assert_eq!(guest.ask(&chain), OK);
    for (at, sector, flags) in [(0, 1u64, 0u32), (16, 5, 1)] {
        guest.memory.write_obj(sector, GuestAddress(DATA + at)).unwrap();
        guest.memory.write_obj(1u32, GuestAddress(DATA + at + 8)).unwrap();
        guest.memory.write_obj(flags, GuestAddress(DATA + at + 12)).unwrap();
    }
    guest.header(WRITE_ZEROES, 0);
    let list = [(HEADER, 16, NEXT, 1), (DATA, 32, NEXT, 2), (STATUS, 1, WRITE, 0)];
    assert_eq!(guest.ask(&list), OK);
    guest.header(DISCARD, 0);
    assert_eq!(guest.ask(&list), UNSUPP, "a discard knows no flag");
    guest.header(IN, 0);
    let read = [(HEADER, 16, NEXT, 1), (DATA, 4096, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    assert_eq!(guest.ask(&read), OK);
    let mut bytes = [0; 4096];
    guest.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        assert!(bytes.iter().all(|b| *b == u8::from(![1, 5].contains(&sector))), "{sector}");
    }
}

#[test]
fn chains_without_an_answer_break_their_queue_only() {
    let cases: &[(&str, &[Descriptor], u16)] = &[
        ("no end", &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 0)], 0),
        ("no end", &[(HEADER, 16, NEXT, 77)], 0),
        ("no end", &[], 99),
        ("no end", &[(0x8000, 17, INDIRECT, 0)], 0),
        ("no end", &[(0x8000, 0, INDIRECT, 0)], 0),
        ("no end", &[(0x8000, 0x10_0000, INDIRECT, 0)], 0),
        ("no end", &[(9 * REGION, 32, INDIRECT, 0)], 0),
        ("no end", &[(0x9000, 16, INDIRECT, 0)], 0),
        ("no status", &[(HEADER, 16, 0, 0)], 0),
        ("no status", &[(HEADER, 16, NEXT, 1), (5 * REGION, 1, WRITE, 0)], 0),
        ("no status", &[(HEADER, 16, NEXT, 1), (u64::MAX, 2, WRITE, 0)], 0),
    ];
    for (what, chain, head) in cases {
        let server = Server::ram(1 << 20);
        let mut guest = started(&server);
        guest.header(IN, 0);
        // A table in a table, for the case that has one.
        guest.table(0x9000, &[(0x8000, 16, INDIRECT, 0)]);
        guest.table(0, chain);
        guest.offer(*head);
        assert!(server.logs(what), "{what}: {chain:?}");
        assert_eq!(guest.answer(), None, "{what}");
        // The connection lives, and the ring can be stopped; then the next.
        assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
        drop(guest);
        assert!(started(&server).is_served());
    }
}

#[test]
fn indices_that_jump_break_the_queue() {
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    guest.publish(1000);
    assert!(server.logs("the rings are damaged"));
    drop(guest);
    assert!(started(&server).is_served());
}

#[test]
fn one_chain_again_and_again_is_bounded() {
    let (server, slow) = Slow::server();
    let mut guest = started(&server);
    guest.header(IN, 0);
    guest.table(0, &[(HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)]);
    // The ring has 16 entries; all of them name the same chain, and each is
    // used again as soon as the device has taken it.
    let taken = |count| {
        while slow.begun() < count {
            std::thread::yield_now();
        }
    };
    (0..16).for_each(|_| guest.offer(0));
    taken(16);
    for count in 17..64 {
        guest.offer(0);
        assert_eq!(guest.answer(), OK);
        taken(count);
    }
    assert_eq!(slow.most(), 16);
}

#[test]
fn memory_is_not_taken_from_requests_under_way() {
    let (server, slow) = Slow::server();
    let mut guest = started(&server);
    let second = region((&guest.files[1], REGION));
    let read = [(HEADER, 16, NEXT, 1), (REGION, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    guest.header(IN, 0);
    guest.table(0, &read);
    let ways: [fn(&mut RawGuest, _); 3] = [
        |guest, _| assert!(guest.frontend.get_vring_base(0).is_ok()),
        |guest, second| guest.frontend.remove_mem_region(&second).unwrap(),
        |guest, _| guest.frontend.set_vring_enable(0, false).unwrap(),
    ];
    for way in ways {
        let before = slow.begun();
        guest.offer(0);
        while slow.begun() == before {
            std::thread::yield_now();
        }
        assert_eq!(slow.now(), 1);
        way(&mut guest, second);
        assert_eq!(slow.now(), 0, "still under way");
        assert_eq!(guest.answer(), OK);
        drop(guest);
        guest = started(&server);
        guest.header(IN, 0);
        guest.table(0, &read);
    }
}

#[test]
fn rings_that_can_not_be_end_the_connection() {
    type Step = fn(&mut RawGuest) -> bool;
    let steps: &[(&str, Step)] = &[
        ("three entries", |g| g.frontend.set_vring_num(0, 3).is_err()),
        ("no entries", |g| g.frontend.set_vring_num(0, 0).is_err()),
        ("too many entries", |g| g.frontend.set_vring_num(0, 512).is_err()),
        ("a queue too many", |g| g.frontend.set_vring_num(2, 16).is_err()),
        ("rings outside memory", |g| {
            g.share();
            g.frontend.set_vring_num(0, 16).unwrap();
            g.frontend.set_vring_addr(0, &rings(0x1234_0000)).unwrap();
            g.frontend.set_vring_kick(0, &g.kick).unwrap();
            g.frontend.set_vring_enable(0, true).is_err()
        }),
        ("rings at the very end", |g| {
            g.share();
            g.frontend.set_vring_num(0, 16).unwrap();
            g.frontend.set_vring_addr(0, &rings(USER + 2 * REGION - 0x1000)).unwrap();
            g.frontend.set_vring_kick(0, &g.kick).unwrap();
            g.frontend.set_vring_enable(0, true).is_err()
        }),
        ("misaligned rings", |g| g.frontend.set_vring_addr(0, &rings(USER + 1)).is_err()),
        ("a running ring's size", |g| {
            g.start();
            g.frontend.set_vring_num(0, 32).is_err()
        }),
    ];
    let server = Server::ram(1 << 20);
    for (what, step) in steps {
        let mut guest = RawGuest::connect(&server.socket);
        assert!(step(&mut guest), "{what}");
        drop(guest);
        assert!(started(&server).is_served(), "after '{what}'");
    }
}

#[test]
fn a_kick_means_nothing_to_a_queue_that_is_not_there() {
    let server = Server::ram(1 << 20);
    let mut guest = RawGuest::connect(&server.socket);
    guest.share();
    guest.frontend.set_vring_kick(1, &guest.kick).unwrap();
    guest.frontend.set_vring_enable(1, true).unwrap();
    guest.kick.write(1).unwrap();
    guest.start();
    assert!(guest.is_served());
}

#[test]
fn rings_stop_and_go_on_where_they_were() {
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    for round in 1..=10u16 {
        assert!(guest.is_served());
        let base = guest.frontend.get_vring_base(0).unwrap() as u16;
        assert_eq!(base, round);
        guest.frontend.set_vring_base(0, base).unwrap();
        guest.frontend.set_vring_kick(0, &guest.kick).unwrap();
    }
}

#[test]
fn memory_comes_and_goes_while_a_queue_runs() {
    let server = Server::ram(1 << 20);
    let mut guest = started(&server);
    let read = [(HEADER, 16, NEXT, 1), (REGION, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
    for _ in 0..10 {
        guest.header(IN, 0);
        assert_eq!(guest.ask(&read), OK);
        let second = region((&guest.files[1], REGION));
        guest.frontend.remove_mem_region(&second).unwrap();
        guest.header(IN, 0);
        assert_eq!(guest.ask(&read), IOERR, "the region is gone");
        assert!(guest.is_served());
        guest.frontend.add_mem_region(&second).unwrap();
    }
    guest.share();
    guest.header(IN, 0);
    assert_eq!(guest.ask(&read), OK, "a new table with the same regions");
}

#[test]
fn vanished_data_fails_its_request() {
    for server in [Server::ram(1 << 20), Server::file(1 << 20)] {
        let mut guest = started(&server);
        ftruncate(&guest.files[1], 0).unwrap();
        guest.header(OUT, 0);
        let chain = [(HEADER, 16, NEXT, 1), (REGION, 4096, NEXT, 2), (STATUS, 1, WRITE, 0)];
        assert_eq!(guest.ask(&chain), IOERR);
        guest.header(IN, 0);
        let chain = [(HEADER, 16, NEXT, 1), (REGION, 4096, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
        assert_eq!(guest.ask(&chain), IOERR);
        assert!(guest.is_served(), "the rings are still there");
    }
}

#[test]
fn vanished_rings_end_the_connection_only() {
    let server = Server::ram(1 << 20);
    let guest = started(&server);
    ftruncate(&guest.files[0], 0).unwrap();
    guest.kick.write(1).unwrap();
    assert!(server.logs("guest memory has vanished"));
    drop(guest);
    assert!(started(&server).is_served());
}

#[test]
fn half_a_message_holds_nobody_up_for_ever() {
    use std::io::Write;
    let server = Server::ram(1 << 20);
    let mut half = std::os::unix::net::UnixStream::connect(&server.socket).unwrap();
    half.write_all(&[1, 0, 0]).unwrap();
    drop(half);
    assert!(started(&server).is_served());
    let mut half = std::os::unix::net::UnixStream::connect(&server.socket).unwrap();
    half.write_all(&[1, 0, 0]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    // It is still there, and is not waited for.
    drop(server);
}

proptest::proptest! {
    #[test]
    fn bytes_are_no_chain_to_trip_over(data: Vec<u8>, words: Vec<u16>) {
        fuzz_chain(&data);
        // Denser: small numbers where the rings are.
        let mut dense = vec![data.first().copied().unwrap_or(6), 0];
        dense.extend(words.iter().flat_map(|w| (w % 64).to_le_bytes()));
        dense.resize(2 + 0x400, 1);
        dense.extend([0, 0, 16, 0, 0, 0, 1, 0, 2, 0, 3, 0]);
        fuzz_chain(&dense);
    }
}
