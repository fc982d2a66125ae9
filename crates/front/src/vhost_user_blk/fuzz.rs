//! Hostile rings, without a front end: for fuzzing and for tests.

use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, MmapRegion};

use super::chain::Chain;
use super::config::Features;
use super::memory::{GuestMap, Region};

/// Bytes of each of the two regions, which touch; behind them is nothing.
const REGION: u64 = 0x4000;
/// The rings lie at the begin of the memory, where the input goes.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

/// Parses the chains of a queue that `data` describes, and ends, and never
/// panics:
///
/// ```text
/// byte 0: bits 0-2 log2 of the ring's entries, 3 no features, 4 read-only
/// byte 1: where the available ring was left
/// then the guest's memory from address zero on
/// ```
pub fn fuzz_chain(data: &[u8]) {
    let Some((&[settings, next], memory)) = data.split_first_chunk::<2>() else { return };
    let map = Arc::new(guest_map());
    let memory = &memory[..memory.len().min(2 * REGION as usize)];
    map.regions().write_slice(memory, GuestAddress(0)).expect("the two regions touch");

    let mut queue = Queue::new(64).expect("a power of two");
    queue.set_size(1 << (settings & 7).min(6));
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_next_avail(next.into());
    queue.set_ready(true);
    assert!(queue.is_valid(map.regions()));
    let features = if settings & 8 == 0 { Features::offered(false) } else { Features::NONE };
    let terms = features.terms(settings & 16 != 0);

    let Ok(chains) = queue.iter(map.regions()) else { return };
    for chain in chains {
        let Ok(chain) = Chain::parse(chain, &map, terms) else { return };
        assert!(map.locate(chain.status, 1).is_some());
    }
}

fn guest_map() -> GuestMap {
    [0, REGION].into_iter().fold(GuestMap::default(), |map, at| {
        let mapping = MmapRegion::new(REGION as usize).expect("a small mapping");
        let spec = VhostUserMemoryRegion::new(at, REGION, at, 0);
        let region = Region::of(mapping, 0, &spec).expect("a good region");
        map.with(region).expect("it does not overlap")
    })
}
