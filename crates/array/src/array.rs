//! An array as a device.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::path::Traffic;
use stableio_block::{
    Cache, Device, Error, Handle, Kind, Limits, Op, OpName, Outcome, Radius, Request, Ticket,
};
use stableio_mem::{BLOCK, Pass};

use crate::assemble::{AssembleError, Assembly};
use crate::engine::{Engine, Parts};
use crate::geometry::Geometry;
use crate::health::Health;
use crate::superblock::Superblock;

thread_local! {
    /// The engines of the worker that runs on this thread.
    static ENGINES: RefCell<Vec<(u64, Rc<Engine>)>> = const { RefCell::new(Vec::new()) };
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Largest amount of memory that one request may need; shapes that would need
/// more get smaller requests.
const REQUEST_BUDGET: usize = 8 << 20;

/// An open array, owned by one worker.
pub struct Array {
    device: Arc<ArrayDevice>,
    health: Arc<Health>,
    traffic: Arc<Traffic>,
    superblock: Superblock,
    notes: Vec<String>,
}

/// The array as something that takes requests, from any thread.
pub struct ArrayDevice {
    key: u64,
    name: Arc<str>,
    limits: Limits,
    worker: Handle,
}

/// Why an array could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The members do not fit together.
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    /// A member, or the array over them, failed.
    #[error(transparent)]
    Device(#[from] Error),
    /// No memory.
    #[error("out of memory: {0}")]
    Memory(#[from] std::io::Error),
}

/// Memory that an array may use beside the requests' pool.
#[derive(Debug, Clone, Copy)]
pub struct ArrayOptions {
    /// Bytes for cached tuples.
    pub page_cache: usize,
}

impl Default for ArrayOptions {
    fn default() -> Self {
        Self { page_cache: 32 << 20 }
    }
}

impl Array {
    /// Opens the members of an assembly on files and devices of the host,
    /// recovers if it was not shut down, and marks it in use.
    ///
    /// Blocks this thread, which must not be a worker's.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; a member that is locked by somebody is
    /// [`AssembleError::InUse`].
    pub fn open(
        assembly: &Assembly,
        options: ArrayOptions,
        worker: &Handle,
    ) -> Result<Self, OpenError> {
        let mut devices: Vec<Option<Arc<dyn Device>>> = Vec::new();
        let mut notes = assembly.notes.clone();
        for path in &assembly.members {
            devices.push(match path {
                None => None,
                Some(path) => {
                    let device = open_member(path, worker)?;
                    notes.extend(device.notes().iter().cloned());
                    Some(Arc::new(device))
                }
            });
        }
        let names = assembly.members.iter().enumerate().map(|(role, path)| match path {
            Some(path) => path.display().to_string(),
            None => format!("(role {role}: missing)"),
        });
        let mut array = Self::over(assembly, devices, names.collect(), options, worker)?;
        array.notes = notes;
        Ok(array)
    }

    /// Opens an array over devices of the caller's, by role: for tests, and
    /// for members that are no files.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn over(
        assembly: &Assembly,
        devices: Vec<Option<Arc<dyn Device>>>,
        names: Vec<String>,
        options: ArrayOptions,
        worker: &Handle,
    ) -> Result<Self, OpenError> {
        let open = Self::begin(assembly, devices, names, options, worker);
        open.1.wait()?;
        Ok(open.0)
    }

    /// The same without waiting: the ticket says when it can be used.
    pub fn begin(
        assembly: &Assembly,
        devices: Vec<Option<Arc<dyn Device>>>,
        names: Vec<String>,
        options: ArrayOptions,
        worker: &Handle,
    ) -> (Self, Ticket<Result<(), Error>>) {
        let mut superblock = assembly.superblock.clone();
        let crashed = assembly.crashed.then_some(superblock.epoch);
        superblock.epoch += 1;
        let health = Arc::new(Health::new(names));
        let traffic = Arc::new(Traffic::default());
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        let name: Arc<str> = superblock.name.as_str().into();
        let limits = limits(&superblock.geometry, &devices);
        let parts = Parts {
            superblock: superblock.clone(),
            devices,
            health: health.clone(),
            traffic: traffic.clone(),
            page_cache: options.page_cache,
        };
        let device =
            Arc::new(ArrayDevice { key, name: name.clone(), limits, worker: worker.clone() });
        let opened = worker.spawn(move || async move {
            let fail = |kind| Error { kind, op: OpName::Open, device: name.clone(), at: 0, len: 0 };
            let engine = Engine::new(parts)
                .map_err(|e| fail(Kind::System(e.raw_os_error().unwrap_or(libc::ENOMEM))))?;
            let engine = Rc::new(engine);
            if let Some(epoch) = crashed {
                engine.recover(epoch).await.map_err(fail)?;
                let rows = engine.rows_recovered();
                engine.health.event(format!(
                    "was not shut down: {rows} rows that were being written were checked"
                ));
            }
            engine.mark(true).await.map_err(fail)?;
            ENGINES.with(|engines| engines.borrow_mut().push((key, engine)));
            Ok(())
        });
        (Self { device, health, traffic, superblock, notes: Vec::new() }, opened)
    }

    /// The array as a device, for a stack.
    pub fn device(&self) -> &Arc<ArrayDevice> {
        &self.device
    }

    /// Its counters and events.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Its requests' stages and counts, to be shared with stacks over it.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Its superblock as it was opened.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// What a person must know about how it was opened.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Flushes and marks it as settled. Requests that come later fail.
    ///
    /// The caller has let its requests settle.
    ///
    /// # Errors
    ///
    /// When members can not be flushed: then it counts as not shut down.
    pub fn close(self) -> Result<(), Error> {
        self.device.begin_close().wait()
    }
}

impl ArrayDevice {
    /// Begins to close; see [`Array::close`].
    pub fn begin_close(&self) -> Ticket<Result<(), Error>> {
        let (key, name) = (self.key, self.name.clone());
        self.worker.spawn(move || async move {
            let fail =
                |kind| Error { kind, op: OpName::Flush, device: name.clone(), at: 0, len: 0 };
            let engine = ENGINES.with(|engines| {
                let mut engines = engines.borrow_mut();
                let index = engines.iter().position(|(k, _)| *k == key);
                index.map(|i| engines.swap_remove(i).1)
            });
            let engine = engine.ok_or_else(|| fail(Kind::Stopped))?;
            engine.flush().await.map_err(fail)?;
            engine.mark(false).await.map_err(fail)
        })
    }
}

impl Device for ArrayDevice {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let (key, name) = (self.key, self.name.clone());
        let (op, at, len) = request.op.range();
        let fail = move |kind| Error { kind, op, device: name, at, len };
        // Two tasks instead of one that is large enough for both.
        match request {
            Request { op: Op::Read { at, into }, memory } => {
                self.worker.spawn(move || async move {
                    let Some(engine) = engine(key) else { return Err(fail(Kind::Stopped)) };
                    let done = match engine.check_redundancy() {
                        Ok(()) => engine.read(at, into, memory).await,
                        Err(kind) => Err(kind),
                    };
                    done.map_err(fail)
                })
            }
            request => self.worker.spawn(move || async move {
                let Some(engine) = engine(key) else { return Err(fail(Kind::Stopped)) };
                engine.run(request).await.map_err(fail)
            }),
        }
    }
}

/// The engine of an array of this worker's, while it is open.
fn engine(key: u64) -> Option<Rc<Engine>> {
    ENGINES.with(|e| e.borrow().iter().find(|(k, _)| *k == key).map(|(_, e)| e.clone()))
}

fn open_member(path: &Path, worker: &Handle) -> Result<FileDevice, OpenError> {
    FileDevice::open(path, &OpenOptions::default(), worker.clone()).map_err(|error| {
        match error.kind {
            Kind::System(libc::EBUSY) => AssembleError::InUse(path.into()).into(),
            _ => OpenError::Device(error),
        }
    })
}

/// The limits of an array of a shape over these members.
fn limits(geometry: &Geometry, members: &[Option<Arc<dyn Device>>]) -> Limits {
    let memory_align = members.iter().flatten().map(|m| m.limits().memory_align).max().unwrap_or(1);
    let redundant = geometry.level.redundancy() > 0;
    let pass = Pass { guards: true, rows: redundant.then(|| geometry.row_shape()) };
    let radius = if redundant { Radius::Everyone } else { Radius::Issuer };
    let mut limits = Limits {
        size: geometry.size(),
        logical: 512,
        physical: BLOCK as u32,
        memory_align,
        max_transfer: 1 << 20,
        atomic: 512,
        cache: Cache::Volatile,
        write_radius: radius,
        read_radius: Radius::Issuer,
        pass,
    };
    // A request that covers no row wholly is the one that needs most.
    while limits.scratch_bytes(512, limits.max_transfer as usize) > REQUEST_BUDGET
        && limits.max_transfer > 64 << 10
    {
        limits.max_transfer /= 2;
    }
    limits
}
