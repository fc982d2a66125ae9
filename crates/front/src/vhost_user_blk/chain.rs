//! From a descriptor chain to a request.
//!
//! ```text
//!  readable           | writable               by VIRTIO 1.2, section 5.2.6
//!  header 16 | data … | data … | status 1
//!
//!  header:  type le32 | reserved le32 | sector le64
//!  range:   sector le64 | sectors le32 | flags le32   (discard, write zeroes)
//! ```
//!
//! CHAIN-1: nothing is assumed of how a request is cut into descriptors
//! (section 2.7.4): header and data may share one, either may be in several.
//!
//! CHAIN-2: header and ranges are loaded once, by a door; what is decided is
//! decided from that copy. Data is not loaded here at all.
//!
//! CHAIN-3: a chain without an end or without a reachable status byte can not
//! be answered: it breaks its queue. Everything else that is wrong with a
//! request fails that request.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};
use stableio_block::{Body, Into, Op};
use stableio_mem::{ForeignBuf, Segment, doors};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR, Terms};
use super::memory::{GuestMap, Regions};

/// Descriptors of one chain. The kernel takes as many segments in one call
/// (`IOV_MAX`), and the driver was told of far fewer.
const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of a request's header.
const HEADER: usize = 16;

/// Bytes of a range to discard or zero.
const RANGE: usize = 16;

/// How a request ended, as its status byte says (VIRTIO 1.2, section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = VIRTIO_BLK_S_OK as u8,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Why a queue can not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    /// A loop, an index outside the table, a bad or nested indirect table,
    /// more than 4 GiB, or too many descriptors.
    #[error("a descriptor chain has no end")]
    Endless,
    /// Nothing to write the status to.
    #[error("a descriptor chain has no status byte in guest memory")]
    NoStatus,
    /// The rings are not where they should be, or their indices make no sense.
    #[error("the rings are damaged")]
    Rings,
    /// The memory that the rings are in, or a part of the guest's, is gone.
    #[error("guest memory has vanished")]
    Vanished,
    /// The kick descriptor is none.
    #[error("the kick descriptor can not be read")]
    Kick,
}

/// A chain that can be answered.
pub(super) struct Chain {
    /// Where the status byte is.
    pub(super) status: GuestAddress,
    /// Bytes of data that the device may write.
    pub(super) writable: u32,
    /// What it asks for, or why not.
    pub(super) command: Result<Command, Status>,
}

/// What a chain asks for.
#[derive(Debug)]
pub(super) enum Command {
    /// To do all of these; a discard or write-zeroes request has several.
    Ops(SmallVec<[Op; 1]>),
    /// To tell the serial number.
    GetId(ForeignBuf),
}

type Segments = SmallVec<[Segment; 2]>;

impl Chain {
    /// Reads a chain's descriptors, and its header.
    ///
    /// # Errors
    ///
    /// Where it can not be answered (CHAIN-3).
    pub(super) fn parse(
        chain: DescriptorChain<&Regions>,
        map: &Arc<GuestMap>,
        terms: Terms,
    ) -> Result<Self, Broken> {
        let mut parts = Parts::default();
        // The crate's iterator ends in silence at what it does not like; then
        // the last descriptor that it gave, if any, names a next one.
        let mut ended = false;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Broken::Endless);
            }
            ended = !descriptor.has_next();
            parts.add(descriptor, map);
        }
        if !ended {
            return Err(Broken::Endless);
        }
        let status = parts.status.filter(|at| map.locate(*at, 1).is_some());
        let status = status.ok_or(Broken::NoStatus)?;
        let writable = parts.writable.iter().map(|s| s.len).sum::<usize>().saturating_sub(1) as u32;
        let command = match parts.wrong {
            true => Err(Status::IoErr),
            false => parts.command(map, terms),
        };
        Ok(Self { status, writable, command })
    }
}

/// A chain's descriptors, by direction.
#[derive(Default)]
struct Parts {
    readable: Segments,
    writable: Segments,
    /// The last byte of the last writable descriptor.
    status: Option<GuestAddress>,
    /// A range in no region or across two, or readable after writable
    /// (section 2.7.4.2).
    wrong: bool,
}

impl Parts {
    fn add(&mut self, descriptor: Descriptor, map: &GuestMap) {
        let (at, len) = (descriptor.addr(), descriptor.len() as usize);
        if len == 0 {
            return;
        }
        let writable = descriptor.is_write_only();
        if writable {
            self.status = at.0.checked_add(len as u64 - 1).map(GuestAddress);
        }
        match map.locate(at, len) {
            Some(segment) if writable => self.writable.push(segment),
            Some(segment) if self.status.is_none() => self.readable.push(segment),
            _ => self.wrong = true,
        }
    }

    /// The request itself. The last writable byte is the status.
    fn command(self, map: &Arc<GuestMap>, terms: Terms) -> Result<Command, Status> {
        let foreign = |segments| {
            // SAFETY: `locate` gave these segments, which therefore lie in
            // mappings that the map keeps until it is dropped (GUEST-1); they
            // were never the allocator's, and no reference to them exists
            // but those that `virtio-queue` makes to atomics, while it reads
            // the rings.
            unsafe { ForeignBuf::new(segments, map.keep_alive()) }
        };
        let mut readable = foreign(self.readable);
        let mut writable = foreign(self.writable);
        let data_len = writable.len() - 1;
        let into = writable.split_to(data_len);
        let header = Header::load(&mut readable)?;
        let changes = matches!(
            header.kind,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
        );
        if changes && (terms.read_only || !into.is_empty()) {
            return Err(Status::IoErr);
        }
        let op = match header.kind {
            VIRTIO_BLK_T_IN => {
                let at = header.at_data(&into, &readable)?;
                Op::Read { at, into: Into::Foreign(into) }
            }
            VIRTIO_BLK_T_OUT => {
                let at = header.at_data(&readable, &into)?;
                let (body, sums) = (Body::Foreign(readable), None);
                Op::Write { at, body, sums, fua: terms.write_through }
            }
            VIRTIO_BLK_T_FLUSH => Op::Flush,
            VIRTIO_BLK_T_GET_ID => return Ok(Command::GetId(into)),
            VIRTIO_BLK_T_DISCARD if terms.discard => {
                return load_ranges(readable, 0, |at, len| Op::Discard { at, len });
            }
            VIRTIO_BLK_T_WRITE_ZEROES if terms.write_zeroes => {
                let fua = terms.write_through;
                let zero = |at, len| Op::WriteZeroes { at, len, fua };
                return load_ranges(readable, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, zero);
            }
            _ => return Err(Status::Unsupported),
        };
        Ok(Command::Ops(smallvec![op]))
    }
}

/// A request's header, loaded.
struct Header {
    kind: u32,
    sector: u64,
}

impl Header {
    /// Takes it off the front of what the device may read.
    fn load(readable: &mut ForeignBuf) -> Result<Self, Status> {
        if readable.len() < HEADER {
            return Err(Status::IoErr);
        }
        let mut bytes = [0; HEADER];
        doors::load(readable.split_to(HEADER), &mut bytes).map_err(|_| Status::IoErr)?;
        let [kind, _, sector_low, sector_high] = words(&bytes);
        Ok(Self { kind, sector: u64::from(sector_high) << 32 | u64::from(sector_low) })
    }

    /// The byte that `data` begins at on the device. There must be data, and
    /// none in the `other` direction.
    fn at_data(&self, data: &ForeignBuf, other: &ForeignBuf) -> Result<u64, Status> {
        let whole = !data.is_empty() && (data.len() as u64).is_multiple_of(SECTOR);
        let at = self.sector.checked_mul(SECTOR).filter(|_| whole && other.is_empty());
        at.ok_or(Status::IoErr)
    }
}

/// Loads the ranges of a discard or write-zeroes request (section 5.2.6.2).
fn load_ranges(
    list: ForeignBuf,
    known_flags: u32,
    op: impl Fn(u64, u64) -> Op,
) -> Result<Command, Status> {
    let len = list.len();
    if len == 0 || !len.is_multiple_of(RANGE) || len > MAX_RANGES * RANGE {
        return Err(Status::IoErr);
    }
    let mut bytes = [0; MAX_RANGES * RANGE];
    doors::load(list, &mut bytes[..len]).map_err(|_| Status::IoErr)?;
    let (ranges, _) = bytes[..len].as_chunks::<RANGE>();
    let ops = ranges.iter().map(|range| {
        let (at, len) = parse_range(range, known_flags)?;
        Ok(op(at, len))
    });
    ops.collect::<Result<_, Status>>().map(Command::Ops)
}

/// Offset and length in bytes.
fn parse_range(range: &[u8; RANGE], known_flags: u32) -> Result<(u64, u64), Status> {
    let [sector_low, sector_high, sectors, flags] = words(range);
    if flags & !known_flags != 0 {
        return Err(Status::Unsupported);
    }
    let at = (u64::from(sector_high) << 32 | u64::from(sector_low)).checked_mul(SECTOR);
    match at {
        Some(at) if sectors <= MAX_RANGE_SECTORS => Ok((at, u64::from(sectors) * SECTOR)),
        _ => Err(Status::IoErr),
    }
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}
