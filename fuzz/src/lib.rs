//! Hostile bytes at every border: what the fuzz targets and their replay
//! (`cargo test` here) feed.
//!
//! ```text
//! cargo fuzz run -s none --features fuzzer superblock
//! ```

use std::path::PathBuf;

use stableio_array::geometry::{Geometry, Level};
use stableio_array::log::RecordBlock;
use stableio_array::superblock::{Id, Next, RoleEntry, RoleState, Superblock};
use stableio_array::tuple::{Owner, Sector, Tuple, encode_page, parse_page};
use stableio_array::{Probe, assemble};
use stableio_mem::BLOCK;
use stableio_onepass::{
    Format, Guard, Interval, Kernels, Parities, Parity, Pass, Segment, available_tiers, gf,
    verify_foreign_with,
};

/// A superblock, and the same bytes under a checksum that is right: the
/// second gets behind the checksum.
pub fn superblock(data: &[u8]) {
    let mut block = [0; BLOCK];
    let len = data.len().min(BLOCK);
    block[..len].copy_from_slice(&data[..len]);
    let _ = Superblock::parse(&block);
    block[..8].copy_from_slice(b"stableio");
    let crc = stableio_onepass::guard(&block[..BLOCK - 8]);
    block[BLOCK - 8..].copy_from_slice(&crc.to_le_bytes());
    if let Ok(parsed) = Superblock::parse(&block) {
        let again = Superblock::parse(&parsed.encode());
        assert_eq!(again.as_ref(), Ok(&parsed), "what was parsed is written and parsed again");
        let g = parsed.geometry;
        assert!(g.data_at() + g.stripes * g.chunk_bytes() <= g.second_superblock_at());
    }
}

/// Members whose superblocks each went their own way: what assembles has as
/// many members as it needs, each in its place and only there.
pub fn assembly(data: &[u8]) {
    let Some((&[shape, trust], mut changes)) = data.split_first_chunk::<2>() else {
        return;
    };
    let mut members = probes(shape);
    while let Some((&[member, what, a, b], rest)) = changes.split_first_chunk::<4>() {
        let count = members.len();
        change(&mut members[usize::from(member) % count].superblock, what, a, b);
        changes = rest;
    }
    // Of what came out only what a superblock can say.
    members.retain_mut(|probe| match Superblock::parse(&probe.superblock.encode()) {
        Ok(parsed) => {
            probe.superblock = parsed;
            true
        }
        Err(_) => false,
    });
    let trusted = members.get(usize::from(trust)).map(|probe| probe.path.clone());
    for trust in [None, trusted.as_deref()] {
        let Ok(assembly) = assemble(&members, trust) else { continue };
        let g = assembly.superblock.geometry;
        assert_eq!(assembly.members.len(), g.members);
        assert!(assembly.members.iter().flatten().count() + g.redundancy() >= g.members);
        for (role, path) in assembly.members.iter().enumerate() {
            let Some(path) = path else { continue };
            let probe = members.iter().find(|probe| probe.path == *path).expect("one of those");
            assert_eq!(probe.superblock.role, role);
            assert_eq!(probe.superblock.array, assembly.superblock.array);
            assert_eq!(probe.superblock.member, assembly.superblock.roles[role].id);
            assert_eq!(assembly.superblock.roles[role].state, RoleState::InSync);
            assert_ne!(assembly.incoming[role].as_ref(), Some(path));
        }
    }
}

/// A whole array's members.
fn probes(shape: u8) -> Vec<Probe> {
    let level = Level::ALL[usize::from(shape) % 4];
    let members = *level.members().start() + usize::from(shape / 4 % 4);
    let members = members.min(*level.members().end());
    let geometry = Geometry::new(level, members, 8192, 2 << 20).expect("a possible shape");
    let roles: Vec<_> = (1..=members).map(|i| RoleEntry::in_sync(id(i as u8))).collect();
    let probe = |role: usize| Probe {
        path: PathBuf::from(format!("m{role}")),
        superblock: Superblock {
            array: id(99),
            name: "a".into(),
            member: roles[role].id,
            role,
            generation: 5,
            epoch: 2,
            in_use: false,
            log: true,
            checksums: true,
            created: 0,
            geometry,
            atomic_unit: 4096,
            log_from: 1,
            scrub: None,
            histories: vec![7],
            roles: roles.clone(),
        },
        bad_copies: vec![],
    };
    (0..members).map(probe).collect()
}

fn id(byte: u8) -> Id {
    Id([byte; 16])
}

/// One thing that a superblock may say otherwise.
fn change(superblock: &mut Superblock, what: u8, a: u8, b: u8) {
    let count = superblock.roles.len();
    let entry = &mut superblock.roles[usize::from(a) % count];
    match what % 12 {
        0 => superblock.array = id(a),
        1 => superblock.member = id(a % 20),
        2 => superblock.role = usize::from(a) % 20,
        3 => superblock.generation = if a == 255 { u64::MAX } else { u64::from(a) },
        4 => superblock.epoch = if a == 255 { u64::MAX } else { u64::from(a) },
        5 => superblock.in_use = a % 2 == 1,
        6 => entry.state = if b % 2 == 1 { RoleState::Missing } else { RoleState::InSync },
        7 => entry.id = id(b % 20),
        8 => entry.next = Some(Next { id: id(b % 20), zones: u64::from(b) }),
        9 => entry.since = u64::from(b),
        10 => superblock.geometry.member_size = u64::from(a) << (b % 64),
        _ => superblock.geometry.stripes = u64::from(a) << (b % 64),
    }
}

/// A block of the log, and the same bytes under a checksum that is right.
pub fn log_block(data: &[u8]) {
    let mut block = [0; BLOCK];
    let len = data.len().min(BLOCK);
    block[..len].copy_from_slice(&data[..len]);
    for (level, members) in [(Level::Single, 1), (Level::Raid1, 2), (Level::Raid6, 4)] {
        let g = Geometry::new(level, members, 8192, 2 << 20).expect("a possible shape");
        let _ = RecordBlock::parse(&block, &g);
        let mut right = block;
        let crc = stableio_onepass::guard(&right[8..]);
        right[..8].copy_from_slice(&crc.to_le_bytes());
        let _ = RecordBlock::parse(&right, &g);
        right[..8].copy_from_slice(&(!crc).to_le_bytes());
        assert_eq!(RecordBlock::parse(&right, &g), None);
    }
}

/// A page of tuples, and the same bytes where every sector is one of this
/// place under a checksum that is right.
pub fn tuple_page(data: &[u8]) {
    let mut page = [0; BLOCK];
    let len = data.len().min(BLOCK);
    page[..len].copy_from_slice(&data[..len]);
    let owner = Owner { array: id(7), role: 1 };
    parse_page(&page, 3, owner).for_each(drop);
    for (number, sector) in (24u64..).zip(page.chunks_exact_mut(512)) {
        sector[8..16].copy_from_slice(&number.to_le_bytes());
        sector[24..28].copy_from_slice(&[7; 4]);
        sector[28] = 1;
        let crc = stableio_onepass::guard(&sector[8..]);
        sector[..8].copy_from_slice(&crc.to_le_bytes());
    }
    for (range, sector) in parse_page(&page, 3, owner) {
        let Sector::Good(sequence, tuples) = sector else { continue };
        let mut all = vec![Tuple::UNWRITTEN; 240];
        all[range.clone()].copy_from_slice(&tuples);
        let mut again = vec![0; BLOCK];
        encode_page(3, sequence, owner, &all, &mut again);
        let (_, second) = parse_page(&again, 3, owner).find(|(r, _)| *r == range).expect("there");
        assert_eq!(second, Sector::Good(sequence, tuples));
    }
    let other = Owner { role: 2, ..owner };
    assert!(parse_page(&page, 3, other).all(|(_, sector)| sector == Sector::Bad));
}

/// A client's handshake.
pub fn nbd_negotiation(data: &[u8]) {
    stableio_front::nbd::negotiate::fuzz_negotiation(data);
}

/// A client's request header.
pub fn nbd_request(data: &[u8]) {
    stableio_front::nbd::proto::fuzz_request(data);
}

/// A guest's memory and rings.
pub fn vhost_chain(data: &[u8]) {
    stableio_front::vhost_user_blk::fuzz_chain(data);
}

/// How foreign memory is cut in segments: what a pass makes of them is what their bytes make, and
/// verification finds the one interval that is not right. The first bytes say how, each two of the
/// rest cut a segment.
pub fn segments(data: &[u8]) {
    let Some((&[format, modes, coefficient, offset, bad, tier], cuts)) = data.split_first_chunk()
    else {
        return;
    };
    let format = Format {
        guard: Guard::ALL[usize::from(format) % 3],
        interval: Interval::ALL[usize::from(format / 3) % 2],
    };
    let tiers = available_tiers();
    let kernels = Kernels::of(tiers[usize::from(tier) % tiers.len()]).expect("available");

    // Segments of up to 8 KiB at any distance from each other, in one memory.
    let (cuts, _) = cuts.as_chunks::<2>();
    let cuts = &cuts[..cuts.len().min(16)];
    let lens = cuts.iter().map(|cut| usize::from(u16::from_le_bytes(*cut)) % 8192);
    let gap = |i: usize| usize::from(offset.wrapping_mul(i as u8 + 1)) % 64;
    let memory: Vec<u8> = (0..16 * 8300).map(|i: usize| (i * 31 + (i >> 8)) as u8).collect();
    let (mut at, mut segments, mut whole) = (0, Vec::new(), Vec::new());
    for (i, len) in lens.enumerate() {
        at += gap(i);
        segments.push(Segment { addr: memory[at..].as_ptr(), len });
        whole.extend_from_slice(&memory[at..at + len]);
        at += len;
    }
    let len = whole.len();
    let expected: Vec<u64> =
        whole.chunks(format.interval.bytes()).map(|bytes| format.guard.of(bytes)).collect();

    let old: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
    let (mut copy, mut p, mut q) = (vec![0; len], vec![0x55; len], vec![0xaa; len]);
    let is_delta = modes & 1 != 0;
    let mode = |bits: u8, to: &mut [u8]| match bits % 3 {
        0 => Parity::None,
        1 => Parity::Set(to.as_mut_ptr()),
        _ => Parity::Xor(to.as_mut_ptr()),
    };
    let (p_mode, q_mode) = (modes >> 2 & 3, modes >> 4 & 3);
    let pass = Pass {
        format,
        copy: (modes & 2 != 0).then_some(copy.as_mut_ptr()),
        streams: modes & 64 != 0,
        old: is_delta.then_some(old.as_ptr()),
        parities: Parities { p: mode(p_mode, &mut p), q: mode(q_mode, &mut q), coefficient },
    };
    let mut guards = vec![0; expected.len()];
    // SAFETY: the segments lie in `memory`; all else is as long as they are, and nobody else's.
    unsafe { pass.foreign_with(kernels, &segments, &mut guards) }.expect("memory is there");
    assert_eq!(guards, expected);
    assert!(pass.copy.is_none() || copy == whole);
    for i in 0..len {
        let change = whole[i] ^ if is_delta { old[i] } else { 0 };
        let taken_up = |mode: u8, before: u8, change: u8| {
            [before, change, before ^ change][usize::from(mode % 3)]
        };
        assert_eq!(p[i], taken_up(p_mode, 0x55, change));
        assert_eq!(q[i], taken_up(q_mode, 0xaa, gf::mul(coefficient, change)));
    }

    let bad = (!guards.is_empty()).then(|| usize::from(bad) % guards.len());
    if let Some(bad) = bad {
        guards[bad] ^= 1;
    }
    let mut found = Vec::new();
    // SAFETY: the segments lie in `memory`.
    unsafe { verify_foreign_with(kernels, format, &segments, &guards, |at| found.push(at)) }
        .expect("memory is there");
    assert_eq!(found, Vec::from_iter(bad));
}

/// What is fed.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("superblock", superblock),
    ("assembly", assembly),
    ("log_block", log_block),
    ("tuple_page", tuple_page),
    ("nbd_negotiation", nbd_negotiation),
    ("nbd_request", nbd_request),
    ("vhost_chain", vhost_chain),
    ("segments", segments),
];
