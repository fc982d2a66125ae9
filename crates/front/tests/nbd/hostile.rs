//! Clients that lie, dawdle or die.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use stableio_front::nbd::Options;

use crate::client::{Ask, Client, READ, WRITE};
use crate::{MIB, Random, Served, ram, wait_until};

/// Whether another client is served as if nothing had happened.
fn others_go_on(served: &Served) {
    let mut client = served.connect(Ask::Structured);
    let data = Random(9).bytes(65536);
    assert_eq!(client.write(0, 16 * MIB, &data).unwrap(), Ok(vec![]));
    assert_eq!(client.read(16 * MIB, 65536).unwrap(), Ok(data));
}

fn impatient() -> Served {
    let options = Options {
        max_connections: 3,
        handshake_timeout: Duration::from_millis(200),
        stall_timeout: Duration::from_millis(200),
        ..Options::default()
    };
    Served::with(options, |worker, _| std::sync::Arc::new(ram(worker)))
}

#[test]
fn a_client_that_dies_in_a_payload_leaves_nothing() {
    let served = Served::file();
    for sent in [0, 1, 512, 4096, MIB as usize - 513, MIB as usize + 4096, 3 * MIB as usize] {
        let mut client = served.connect(Ask::Structured);
        client.begin(WRITE, 0, 512, 4 * MIB as u32).unwrap();
        client.stream.write_all(&vec![0xAA; sent]).unwrap();
        others_go_on(&served);
        drop(client);
        served.wait_until_quiet();
        // Pieces end at multiples of 1 MiB: what was sent of the last one is
        // not there.
        let whole = (512 + sent as u64) / MIB * MIB;
        let mut reader = served.connect(Ask::Simple);
        let rest = reader.read(whole.max(512), MIB as u32).unwrap().unwrap();
        let first = rest.iter().position(|byte| *byte != 0);
        assert_eq!(first, None, "{sent} bytes sent");
        reader.call(crate::WRITE_ZEROES, 0, 0, 8 * MIB as u32).unwrap().unwrap();
    }
    assert!(served.logged("went away"));
}

#[test]
fn garbage_ends_a_connection_and_no_other() {
    let served = Served::ram();
    let mut witness = served.connect(Ask::Simple);
    for seed in 1..50 {
        let mut random = Random(seed);
        let len = random.below(5000) as usize;
        let garbage = random.bytes(len);
        let stream = match seed % 2 {
            0 => UnixStream::connect(&served.path).unwrap(),
            _ => served.connect(Ask::Structured).stream,
        };
        let _ = (&stream).write_all(&garbage);
        assert_eq!(witness.read(0, 512).unwrap(), Ok(vec![0; 512]));
    }
    // In step, but with a payload that nobody wants to read.
    let mut flood = served.connect(Ask::Simple);
    flood.begin(WRITE, 0, 0, 1 << 30).unwrap();
    flood.wait_for_end();
    // Refused, and the stream stays in step.
    let mut client = served.connect(Ask::Structured);
    let (einval, enospc) = (22, 28);
    assert_eq!(client.write(0, 1, &[0; 100_000]).unwrap(), Err(einval));
    assert_eq!(client.write(0, crate::SIZE, &[0; 512]).unwrap(), Err(enospc));
    assert_eq!(client.call(99, 0, 0, 0).unwrap(), Err(einval));
    others_go_on(&served);
    drop((witness, client));
    served.wait_until_quiet();
}

/// Sends reads of 1 MiB until the server takes no more of them.
fn ask_without_reading(client: &mut Client) -> usize {
    client.stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let sent = |_: &u32| client.begin(READ, 0, 0, MIB as u32).is_ok();
    (0..100_000).take_while(sent).count()
}

#[test]
fn a_client_that_never_reads_makes_itself_wait() {
    let served = Served::ram();
    let mut greedy = served.connect(Ask::Structured);
    let asked = ask_without_reading(&mut greedy);
    assert!((8..100_000).contains(&asked), "{asked} requests were taken");
    assert!(served.pool.used() <= 8 << 20, "{} bytes are held", served.pool.used());
    others_go_on(&served);
    // It comes to its senses, and gets what it asked for.
    for _ in 0..32 {
        assert_eq!(greedy.answer().unwrap().1, Ok(vec![0; MIB as usize]));
    }
    drop(greedy);
    served.wait_until_quiet();
}

#[test]
fn who_lets_memory_wait_is_hung_up_on() {
    let served = impatient();
    let mut greedy = served.connect(Ask::Structured);
    ask_without_reading(&mut greedy);
    let mut slow = served.connect(Ask::Structured);
    slow.begin(WRITE, 0, 0, 4096).unwrap();
    slow.wait_for_end();
    greedy.wait_for_end();
    served.wait_until_quiet();
    assert!(served.logged("no progress"));
    // Who holds nothing may be silent as long as it likes.
    let mut idle = served.connect(Ask::Simple);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(idle.read(0, 512).unwrap(), Ok(vec![0; 512]));
}

#[test]
fn a_handshake_ends_and_the_house_is_full_at_some_point() {
    let served = impatient();
    let mut silent = UnixStream::connect(&served.path).unwrap();
    let mut greeting = Vec::new();
    silent.read_to_end(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");

    let guests: Vec<_> = (0..3).map(|_| served.connect(Ask::Simple)).collect();
    assert!(Client::connect(&served.path, Ask::Simple).is_err());
    assert!(served.logged("turned away"));
    drop(guests);
    let server = served.server.as_ref().unwrap();
    wait_until("they are gone", || server.clients() == 0);
    others_go_on(&served);
}
