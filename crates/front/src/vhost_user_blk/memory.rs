//! A guest's memory, as its front end shares it: regions of files, mapped
//! here, each at an address of the guest's and one of the front end's.
//!
//! GUEST-1: a map never changes. The control thread makes a new one when the
//! front end adds or removes a region; requests hold the map that they were
//! parsed with, and with it the mappings.
//!
//! GUEST-2: every mapping is watched while it exists. The front end may
//! truncate the file behind it at any moment; the rings, which are read by
//! plain loads, then read as zeros and [`GuestMap::is_broken`] says so.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use stableio_mem::{KeepAlive, Segment, fixup};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
    guest_memory,
};

/// Regions that a front end may have at once (`GET_MAX_MEM_SLOTS`).
pub(super) const MAX_REGIONS: usize = 32;

/// The regions of a guest's memory, sorted, none overlapping another.
#[derive(Default)]
pub(super) struct GuestMap {
    regions: Regions,
}

/// What `virtio-queue` reads rings from.
pub(super) type Regions = GuestRegionCollection<Region>;

/// A mapped region.
pub(super) struct Region {
    /// Before the mapping: the watch ends before what it watches does.
    watch: fixup::Region,
    mapping: MmapRegion,
    /// Where in the mapping the region begins.
    lead: usize,
    len: usize,
    /// Its address in the guest.
    guest: GuestAddress,
    /// Its address in the front end, which names rings by it.
    user: u64,
}

impl GuestMap {
    /// The map with one more region.
    pub(super) fn with(&self, region: Region) -> io::Result<Self> {
        if self.regions.num_regions() >= MAX_REGIONS {
            return Err(io::Error::other("more memory regions than were offered"));
        }
        let regions = self.regions.insert_region(Arc::new(region)).map_err(io::Error::other)?;
        Ok(Self { regions })
    }

    /// The map without the region that `spec` names.
    pub(super) fn without(&self, spec: &VhostUserMemoryRegion) -> io::Result<Self> {
        let (guest, len) = (GuestAddress(spec.guest_phys_addr), spec.memory_size);
        let (regions, _) = self.regions.remove_region(guest, len).map_err(io::Error::other)?;
        Ok(Self { regions })
    }

    /// The memory, for the rings.
    pub(super) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Where `len` bytes of the guest's are in this process. `None` unless
    /// they lie in one region.
    pub(super) fn locate(&self, guest: GuestAddress, len: usize) -> Option<Segment> {
        let region = self.regions.find_region(guest)?;
        let offset = (guest.0 - region.guest.0) as usize;
        let addr = region.mapping.as_ptr() as usize + region.lead + offset;
        (len <= region.len - offset).then_some(Segment { addr, len })
    }

    /// The guest's address of a byte that the front end names by its own.
    pub(super) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            (offset < region.len as u64).then(|| GuestAddress(region.guest.0 + offset))
        })
    }

    /// Whether a part of the memory has vanished. What was read from it
    /// before this says no was really there.
    pub(super) fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.watch.faulted())
    }

    /// What keeps the mappings.
    pub(super) fn keep_alive(self: &Arc<Self>) -> KeepAlive {
        self.clone()
    }
}

impl Region {
    /// Maps the region of `file` that `spec` describes (vhost-user, "Memory
    /// region description").
    ///
    /// # Errors
    ///
    /// The system's; a region that is empty or runs over the end of an
    /// address space.
    pub(super) fn map(spec: &VhostUserMemoryRegion, file: File) -> io::Result<Self> {
        let unit = mapping_unit(&file)?;
        let start = spec.mmap_offset / unit * unit;
        let lead = spec.mmap_offset - start;
        let size = lead
            .checked_add(spec.memory_size)
            .and_then(|size| size.checked_next_multiple_of(unit))
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| io::Error::other("a memory region runs over the end of its file"))?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, start), size).map_err(io::Error::other)?;
        Self::of(mapping, lead as usize, spec)
    }

    /// A region that begins `lead` bytes into a mapping of this process.
    pub(super) fn of(
        mapping: MmapRegion,
        lead: usize,
        spec: &VhostUserMemoryRegion,
    ) -> io::Result<Self> {
        let (guest, user, len) = (spec.guest_phys_addr, spec.user_addr, spec.memory_size);
        let ends = [guest.checked_add(len), user.checked_add(len)];
        if len == 0 || ends.contains(&None) || lead as u64 + len > mapping.size() as u64 {
            return Err(io::Error::other("a memory region runs over the end of its address space"));
        }
        let watch = fixup::register(mapping.as_ptr() as usize, mapping.size())
            .ok_or_else(|| io::Error::other("too many memory regions in this process"))?;
        Ok(Self { watch, mapping, lead, len: len as usize, guest: GuestAddress(guest), user })
    }
}

/// Bytes that offsets and lengths of mappings of `file` are multiples of: its
/// huge page on hugetlbfs, which reports it as the block size.
fn mapping_unit(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blksize().next_power_of_two().max(rustix::param::page_size() as u64))
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.len as u64
    }

    fn start_addr(&self) -> GuestAddress {
        self.guest
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_>> {
        let end = offset.0.checked_add(count as u64);
        if end.is_none_or(|end| end > self.len as u64) {
            return Err(guest_memory::Error::InvalidBackendAddress);
        }
        Ok(self.mapping.get_slice(self.lead + offset.0 as usize, count)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, user: u64, len: u64) -> io::Result<Region> {
        let mapping = MmapRegion::new(8192).unwrap();
        Region::of(mapping, 512, &VhostUserMemoryRegion::new(guest, len, user, 0))
    }

    #[test]
    fn ranges_lie_in_one_region() {
        let map = GuestMap::default().with(region(0x1000, 0x70_1000, 0x1000).unwrap()).unwrap();
        let map = map.with(region(0x2000, 0x90_0000, 0x800).unwrap()).unwrap();
        let len = |at, len| map.locate(GuestAddress(at), len).map(|s| s.len);
        assert_eq!(len(0x1000, 0x1000), Some(0x1000));
        assert_eq!(len(0x1fff, 1), Some(1));
        assert_eq!(len(0x1fff, 2), None, "across two");
        assert_eq!(len(0xfff, 1), None);
        assert_eq!(len(0x27ff, 1), Some(1));
        assert_eq!(len(0x27ff, 2), None);
        assert_eq!(len(u64::MAX, usize::MAX), None);
        assert_eq!(map.guest_address(0x90_07ff), Some(GuestAddress(0x27ff)));
        assert_eq!(map.guest_address(0x90_0800), None);
    }

    #[test]
    fn regions_are_refused_that_can_not_be() {
        assert!(region(0, 0, 0).is_err());
        assert!(region(u64::MAX - 100, 0, 4096).is_err());
        assert!(region(0, u64::MAX - 100, 4096).is_err());
        assert!(region(0, 0, 8192).is_err(), "longer than the mapping");
        let map = GuestMap::default().with(region(0x1000, 0, 0x1000).unwrap()).unwrap();
        assert!(map.with(region(0x1800, 0, 0x1000).unwrap()).is_err(), "overlaps");
        assert!(map.without(&VhostUserMemoryRegion::new(0x1000, 0x800, 0, 0)).is_err());
        assert!(map.without(&VhostUserMemoryRegion::new(0x1000, 0x1000, 0, 0)).is_ok());
    }

    #[test]
    fn a_region_begins_anywhere_in_its_file() {
        use std::io::{Seek, SeekFrom, Write};
        use vm_memory::Bytes;
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(64 << 10).unwrap();
        file.seek(SeekFrom::Start(9001)).unwrap();
        file.write_all(b"here").unwrap();
        let spec = VhostUserMemoryRegion::new(0x1000, 0x2000, 0x70_0000, 9001);
        let map = GuestMap::default().with(Region::map(&spec, file).unwrap()).unwrap();
        let mut bytes = [0; 4];
        map.regions().read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(&bytes, b"here");
        assert!(map.regions().read_slice(&mut bytes, GuestAddress(0x2ffd)).is_err());
    }
}
