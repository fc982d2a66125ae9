//! What the device offers: feature bits and the configuration space.

use std::mem::{offset_of, size_of};

use stableio_block::Limits;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES, virtio_blk_config,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

/// Bytes of a sector, the unit of everything in virtio-blk (VIRTIO 1.2,
/// section 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Data segments of a request that the driver may use (`seg_max`).
const MAX_SEGMENTS: u32 = 126;

/// Ranges of one discard or write-zeroes request.
pub(super) const MAX_RANGES: usize = 16;

/// Sectors of one such range: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Bytes of what GET_ID returns, padded with zeros.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Bytes of the configuration space that a front end may ask for. QEMU asks
/// for those of its own version; all behind ours read as zero.
const CONFIG_BYTES: usize = 256;

/// The protocol features that are offered. `REPLY_ACK` is the `vhost`
/// crate's business.
pub(super) const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// A set of feature bits (VIRTIO 1.2, sections 5.2.3 and 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Features(u64);

impl Features {
    /// What is acknowledged before anything is.
    pub(super) const NONE: Features = Features(0);

    /// What a device offers.
    pub(super) fn offered(read_only: bool) -> Self {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let more: &[u32] = match read_only {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        let bits = always.iter().chain(more).fold(0, |bits, bit| bits | 1 << bit);
        Self(bits | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    /// The bits.
    pub(super) fn bits(self) -> u64 {
        self.0
    }

    /// What a front end acknowledged, if all of it was offered.
    pub(super) fn accept(self, acked: u64) -> Option<Self> {
        (acked & !self.0 == 0).then_some(Self(acked))
    }

    fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    /// Whether rings begin disabled, to be enabled by `SET_VRING_ENABLE`.
    pub(super) fn protocol(self) -> bool {
        self.0 & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Whether ring notifications are suppressed by index.
    pub(super) fn event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    /// What requests are allowed and mean.
    pub(super) fn terms(self, read_only: bool) -> Terms {
        Terms {
            read_only,
            write_through: !self.has(VIRTIO_BLK_F_FLUSH),
            discard: self.has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: self.has(VIRTIO_BLK_F_WRITE_ZEROES),
        }
    }
}

/// What was agreed on with the driver about its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Nothing may be changed.
    pub(super) read_only: bool,
    /// The driver knows no flush: what has settled must be durable (VIRTIO
    /// 1.2, section 5.2.5.2).
    pub(super) write_through: bool,
    /// Discard was negotiated.
    pub(super) discard: bool,
    /// Write zeroes was negotiated.
    pub(super) write_zeroes: bool,
}

/// The configuration space (VIRTIO 1.2, section 5.2.4): `struct
/// virtio_blk_config`, little endian, then zeros.
#[derive(Clone)]
pub(super) struct ConfigSpace([u8; CONFIG_BYTES]);

impl ConfigSpace {
    /// That of a device with these limits.
    pub(super) fn of(limits: &Limits, queues: u16) -> Self {
        let blocks = (limits.physical / limits.logical).max(1);
        let mut space = Self([0; CONFIG_BYTES]);
        macro_rules! put {
            ($($field:ident: $value:expr,)*) => {$({
                // Checks that the value has the width of the field.
                let _ = || virtio_blk_config { $field: $value, ..Default::default() };
                space.put(offset_of!(virtio_blk_config, $field), &$value.to_le_bytes());
            })*};
        }
        put! {
            capacity: (limits.size / SECTOR),
            seg_max: MAX_SEGMENTS,
            blk_size: limits.logical,
            physical_block_exp: (blocks.ilog2() as u8),
            min_io_size: (blocks as u16),
            num_queues: queues,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_discard_seg: (MAX_RANGES as u32),
            discard_sector_alignment: ((limits.physical / SECTOR as u32).max(1)),
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_seg: (MAX_RANGES as u32),
            write_zeroes_may_unmap: 1u8,
        }
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        const { assert!(size_of::<virtio_blk_config>() <= CONFIG_BYTES) };
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The bytes `offset..offset + size`, if they are there.
    pub(super) fn range(&self, offset: u32, size: u32) -> Option<&[u8]> {
        let start = offset as usize;
        self.0.get(start..start.checked_add(size as usize)?)
    }
}
