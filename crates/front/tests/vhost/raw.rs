//! A guest that writes its rings by hand, and so can write them wrongly.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of each of the two regions, which touch in the guest.
pub(crate) const REGION: u64 = 1 << 20;

/// What the front end adds to a guest's address to get its own.
pub(crate) const USER: u64 = 0x5000_0000_0000;

/// Entries of the ring.
const SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// A request's header.
pub(crate) const HEADER: u64 = 0x3000;
/// Its status byte.
pub(crate) const STATUS: u64 = 0x3100;
/// Its data.
pub(crate) const DATA: u64 = 0x4000;

/// A descriptor: address, length, flags, next.
pub(crate) type Descriptor = (u64, u32, u16, u16);
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A guest with one queue.
pub(crate) struct RawGuest {
    pub(crate) frontend: Frontend,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) files: [File; 2],
    pub(crate) kick: EventFd,
    call: EventFd,
    available: u16,
    used: u16,
}

impl RawGuest {
    /// Connects, with all features and two regions, and starts no queue.
    pub(crate) fn connect(socket: &Path) -> RawGuest {
        let mut frontend = Frontend::connect(socket, 3).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        frontend.set_features(features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        frontend.set_protocol_features(protocol & wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let files = [0, 1].map(|_| {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
            ftruncate(&file, REGION).unwrap();
            file
        });
        let ranges = files.iter().zip([0, REGION]).map(|(file, at)| {
            let file = FileOffset::new(file.try_clone().unwrap(), 0);
            (GuestAddress(at), REGION as usize, Some(file))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        RawGuest { frontend, memory, files, kick, call, available: 0, used: 0 }
    }

    /// Shares the memory.
    pub(crate) fn share(&mut self) {
        let regions: Vec<_> = self.files.iter().zip([0, REGION]).map(region).collect();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    /// Shares the memory and starts the queue.
    pub(crate) fn start(&mut self) {
        self.share();
        self.frontend.set_vring_num(0, SIZE).unwrap();
        self.frontend.set_vring_base(0, 0).unwrap();
        self.frontend.set_vring_addr(0, &rings(USER)).unwrap();
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    /// Writes a request's header.
    pub(crate) fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    /// Writes a table of descriptors.
    pub(crate) fn table(&self, at: u64, descriptors: &[Descriptor]) {
        for (index, (addr, len, flags, next)) in (0u64..).zip(descriptors) {
            let at = |offset| GuestAddress(at + index * 16 + offset);
            self.memory.write_obj(*addr, at(0)).unwrap();
            self.memory.write_obj(*len, at(8)).unwrap();
            self.memory.write_obj(*flags, at(12)).unwrap();
            self.memory.write_obj(*next, at(14)).unwrap();
        }
    }

    /// Makes a chain available that begins at descriptor `head`, and kicks.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.publish(self.available);
    }

    /// Sets the index of the available ring, and kicks.
    pub(crate) fn publish(&mut self, index: u16) {
        let at = GuestAddress(AVAILABLE + 2);
        self.memory.store(index, at, std::sync::atomic::Ordering::SeqCst).unwrap();
        // The index up to which we want to be called: always the next.
        let event = GuestAddress(AVAILABLE + 4 + u64::from(SIZE) * 2);
        self.memory.write_obj(self.used, event).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits for a used chain; its status byte, or none within a while.
    pub(crate) fn answer(&mut self) -> Option<u8> {
        let deadline = Instant::now() + Duration::from_millis(500);
        while Instant::now() < deadline {
            let at = GuestAddress(USED + 2);
            let used: u16 = self.memory.load(at, std::sync::atomic::Ordering::SeqCst).unwrap();
            if used != self.used {
                self.used = self.used.wrapping_add(1);
                return Some(self.memory.read_obj(GuestAddress(STATUS)).unwrap());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Puts descriptors into the table, offers the first, waits.
    pub(crate) fn ask(&mut self, descriptors: &[Descriptor]) -> Option<u8> {
        self.table(DESCRIPTORS, descriptors);
        self.offer(0);
        self.answer()
    }

    /// Whether a plain read of a sector works.
    pub(crate) fn is_served(&mut self) -> bool {
        self.header(0, 0);
        let chain = [(HEADER, 16, NEXT, 1), (DATA, 512, WRITE | NEXT, 2), (STATUS, 1, WRITE, 0)];
        self.ask(&chain) == Some(0)
    }
}

/// A region for the front end's messages.
pub(crate) fn region((file, at): (&File, u64)) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: REGION,
        userspace_addr: USER + at,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// The rings, `base` above their guest addresses.
pub(crate) fn rings(base: u64) -> VringConfigData {
    VringConfigData {
        queue_max_size: 256,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: base + DESCRIPTORS,
        used_ring_addr: base + USED,
        avail_ring_addr: base + AVAILABLE,
        log_addr: None,
    }
}
