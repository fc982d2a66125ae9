//! One front end's connection: the device as it has set it up.
//!
//! The `vhost` crate reads the messages and calls [`Session`], on the control
//! thread. Whatever it refuses ends the connection.
//!
//! SESSION-1: what a running queue uses does not change. To change it, the
//! queue is stopped, which waits for its requests, and started anew where it
//! was.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};
use virtio_queue::{Queue, QueueT};

use super::Device;
use super::chain::Broken;
use super::config::{ConfigSpace, Features, PROTOCOL};
use super::memory::{GuestMap, MAX_REGIONS, Region};
use super::queue::{Bell, Running, Setup};

/// What `vhost` passes back for regions under postcopy, which is not offered.
type RegionBases = Option<Vec<u64>>;

/// A connection's state.
pub(super) struct Session {
    device: Arc<Device>,
    line: Arc<Line>,
    features: Features,
    map: Arc<GuestMap>,
    vrings: Vec<Vring>,
}

/// The connection, to hang up from elsewhere.
pub(super) struct Line(UnixStream);

impl Line {
    pub(super) fn new(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self(stream.try_clone()?))
    }

    /// Ends the connection: the control thread's next read says so.
    pub(super) fn hang_up(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// A queue as the front end has described it so far (vhost-user, "Ring
/// states").
#[derive(Default)]
struct Vring {
    size: u16,
    rings: Option<Rings>,
    /// Index of the next chain to look at.
    next: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Arc<Bell>,
    error: Arc<Bell>,
    enabled: bool,
    running: Option<Running>,
}

/// Where the rings are, in the front end's addresses.
#[derive(Clone, Copy)]
struct Rings {
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Session {
    pub(super) fn new(device: Arc<Device>, line: Arc<Line>) -> Self {
        let vrings = (0..device.queues).map(|_| Vring::default()).collect();
        Self { device, line, features: Features::NONE, map: Arc::default(), vrings }
    }

    /// The queue that a message is about.
    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// The same, for what must not change while it runs.
    fn resting(&mut self, index: u32) -> Result<&mut Vring> {
        match self.vring(index)? {
            vring if vring.running.is_some() => Err(Error::InvalidOperation("the ring is started")),
            vring => Ok(vring),
        }
    }

    /// Stops what runs, changes something, starts what can run (SESSION-1).
    fn change(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.vrings.iter_mut().for_each(Vring::stop);
        change(self)?;
        (0..self.vrings.len()).try_for_each(|index| self.start(index))
    }

    /// Starts a queue, if it is described, has a kick descriptor and is enabled.
    fn start(&mut self, index: usize) -> Result<()> {
        let vring = &self.vrings[index];
        let (Some(rings), Some(kick), true) = (vring.rings, &vring.kick, vring.enabled) else {
            return Ok(());
        };
        let setup = Setup {
            ring: self.place(vring, rings)?,
            map: self.map.clone(),
            kick: kick.clone(),
            call: vring.call.clone(),
            terms: self.features.terms(self.device.read_only),
            id: self.device.id,
            stack: self.device.stacks[index].clone(),
            broken: self.on_broken(index, vring.error.clone()),
        };
        self.vrings[index].running = Some(Running::start(setup));
        Ok(())
    }

    /// The rings at their places in the guest's memory, each in one region:
    /// so all of a ring is there, and aligned, if a part of it is.
    fn place(&self, vring: &Vring, rings: Rings) -> Result<Queue> {
        let mut queue = Queue::new(self.device.queue_size).expect("checked by `Device::new`");
        let find = |user, len| {
            let at = self.map.guest_address(user).filter(|at| self.map.locate(*at, len).is_some());
            at.ok_or(Error::InvalidParam)
        };
        let bad = |_| Error::InvalidParam;
        // Bytes of the rings: VIRTIO 1.2, section 2.7.
        let size = usize::from(vring.size);
        queue.try_set_size(vring.size).map_err(bad)?;
        queue.try_set_desc_table_address(find(rings.descriptors, 16 * size)?).map_err(bad)?;
        queue.try_set_avail_ring_address(find(rings.available, 6 + 2 * size)?).map_err(bad)?;
        queue.try_set_used_ring_address(find(rings.used, 6 + 8 * size)?).map_err(bad)?;
        queue.set_next_avail(vring.next);
        // The front end does not say how far the used ring is; the ring does.
        let used = queue.used_idx(self.map.regions(), Ordering::Acquire).map_err(bad)?;
        queue.set_next_used(used.0);
        queue.set_event_idx(self.features.event_idx());
        queue.set_ready(true);
        Ok(queue)
    }

    /// What a queue does that can not go on.
    fn on_broken(&self, index: usize, error: Arc<Bell>) -> Box<dyn FnOnce(Broken) + Send> {
        let (line, log) = (self.line.clone(), self.device.log.clone());
        Box::new(move |reason| {
            log(&format!("vhost-user-blk: queue {index} is stopped: {reason}"));
            error.ring();
            if reason == Broken::Vanished {
                line.hang_up();
            }
        })
    }

    fn map_region(spec: &VhostUserMemoryRegion, file: File) -> Result<Region> {
        Region::map(spec, file).map_err(Error::ReqHandlerError)
    }
}

impl Vring {
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            self.next = running.stop().unwrap_or(self.next);
        }
    }
}

impl Drop for Session {
    /// Waits for every request: the guest's memory goes with the session.
    fn drop(&mut self) {
        self.vrings.iter_mut().for_each(Vring::stop);
    }
}

/// In the order of the vhost-user specification, "Front-end message types".
impl VhostUserBackendReqHandlerMut for Session {
    fn get_features(&mut self) -> Result<u64> {
        Ok(Features::offered(self.device.read_only).bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = Features::offered(self.device.read_only);
        let features = offered.accept(features).ok_or(Error::FeatureMismatch)?;
        if features == self.features {
            return Ok(());
        }
        self.change(|session| {
            session.features = features;
            for vring in &mut session.vrings {
                vring.enabled = !features.protocol();
            }
            Ok(())
        })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !PROTOCOL.bits() == 0 { Ok(()) } else { Err(Error::FeatureMismatch) }
    }

    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn set_mem_table(
        &mut self,
        specs: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<RegionBases> {
        let regions = specs.iter().zip(files).map(|(spec, file)| Self::map_region(spec, file));
        let map = regions
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .try_fold(GuestMap::default(), |map, region| {
                map.with(region).map_err(Error::ReqHandlerError)
            })?;
        self.change(|session| {
            session.map = Arc::new(map);
            Ok(())
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = self.device.queue_size;
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= max);
        self.resting(index)?.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        self.resting(index)?.rings = Some(Rings { descriptors, available, used });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.resting(index)?.next = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    /// Stops the ring, too.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.next)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        vring.stop();
        // A ring without one would have to be polled all the time.
        let fd = fd.ok_or(Error::InvalidOperation("a ring needs a kick descriptor"))?;
        vring.kick = Some(Arc::new(fd.into()));
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = &self.vring(index.into())?.call;
        call.set(fd.map(OwnedFd::from)).map_err(Error::ReqHandlerError)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let error = &self.vring(index.into())?.error;
        error.set(fd.map(OwnedFd::from)).map_err(Error::ReqHandlerError)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.enabled == enable {
            return Ok(());
        }
        vring.stop();
        vring.enabled = enable;
        self.start(index as usize)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let limits = self.device.stacks[0].limits();
        let space = ConfigSpace::of(limits, self.device.queues);
        space.range(offset, size).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    /// Nothing in it is the driver's to write: that is ignored, as by real
    /// devices.
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        spec: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        let map = self.map.with(Self::map_region(spec, file)?).map_err(Error::ReqHandlerError)?;
        self.change(|session| {
            session.map = Arc::new(map);
            Ok(())
        })?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, spec: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change(|session| {
            session.map = Arc::new(session.map.without(spec).map_err(Error::ReqHandlerError)?);
            Ok(())
        })
    }

    fn reset_device(&mut self) -> Result<()> {
        for vring in &mut self.vrings {
            vring.stop();
            *vring = Vring::default();
        }
        Ok(())
    }

    // What is not offered.

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(UNOFFERED)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(UNOFFERED)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(UNOFFERED)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(UNOFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(UNOFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(UNOFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(UNOFFERED)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(UNOFFERED)
    }
}

const UNOFFERED: Error = Error::InvalidOperation("the feature is not offered");
