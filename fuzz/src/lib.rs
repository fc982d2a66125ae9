//! Hostile bytes at every border: what the fuzz targets and their replay
//! (`cargo test` here) feed.
//!
//! ```text
//! cargo fuzz run -s none --features fuzzer superblock
//! ```

use stableio_array::superblock::{Id, Superblock};
use stableio_array::tuple::{Owner, ParsedPage, encode_page, parse_page};
use stableio_mem::BLOCK;

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

/// A page of tuples, likewise.
pub fn tuple_page(data: &[u8]) {
    let mut page = [0; BLOCK];
    let len = data.len().min(BLOCK);
    page[..len].copy_from_slice(&data[..len]);
    let owner = Owner { array: Id([7; 16]), role: 1 };
    let _ = parse_page(&page, 3, owner, 254);
    page[8..16].copy_from_slice(&3u64.to_le_bytes());
    page[24..28].copy_from_slice(&[7; 4]);
    page[28..30].copy_from_slice(&1u16.to_le_bytes());
    let crc = stableio_onepass::guard(&page[8..]);
    page[..8].copy_from_slice(&crc.to_le_bytes());
    if let ParsedPage::Good(sequence, tuples) = parse_page(&page, 3, owner, 254) {
        let mut again = vec![0; BLOCK];
        encode_page(3, sequence, owner, &tuples, &mut again);
        assert_eq!(parse_page(&again, 3, owner, 254), ParsedPage::Good(sequence, tuples));
    }
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

/// All targets by name.
pub const TARGETS: [(&str, fn(&[u8])); 5] = [
    ("superblock", superblock),
    ("tuple_page", tuple_page),
    ("nbd_negotiation", nbd_negotiation),
    ("nbd_request", nbd_request),
    ("vhost_chain", vhost_chain),
];
