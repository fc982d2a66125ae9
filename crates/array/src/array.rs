//! An array as a device.

use std::cell::RefCell;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stableio_block::dev::{FileDevice, OpenOptions};
use stableio_block::path::Traffic;
use stableio_block::{
    Body, Cache, Device, Error, Handle, Into, Issuer, Kind, Limits, Op, OpName, Outcome, Radius,
    Request, Ticket,
};
use stableio_block::{exec, ring};
use stableio_mem::{BLOCK, Pass, Reservation};

use crate::assemble::{AssembleError, Assembly};
use crate::engine::{Engine, Parts};
use crate::health::Health;
use crate::log::with_records;
use crate::superblock::{Id, Superblock};
use crate::tend::TendError;

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
    checksums: bool,
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
    /// Seconds without an answer after which a member is left out; `None`
    /// waits for ever.
    pub patience: Option<u64>,
    /// The number of this opening; a random one unless a simulation replays.
    pub history: Option<u64>,
}

impl Default for ArrayOptions {
    fn default() -> Self {
        Self { page_cache: 32 << 20, patience: None, history: None }
    }
}

/// What a role of an array is made of when it is opened.
pub struct Attached {
    /// How its member is called.
    pub name: String,
    /// Its member; `None` is missing.
    pub device: Option<Arc<dyn Device>>,
    /// A member that is being filled to take its place, or the role's own one
    /// that was left out and comes back.
    pub incoming: Option<(String, Arc<dyn Device>)>,
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
        let mut notes = assembly.notes.clone();
        let mut open = |path: &Path| {
            let device = open_member(path, worker)?;
            notes.extend(device.notes().iter().cloned());
            Ok::<Arc<dyn Device>, OpenError>(Arc::new(device))
        };
        let mut attached = Vec::new();
        for (role, (path, next)) in assembly.members.iter().zip(&assembly.incoming).enumerate() {
            let name = match path {
                Some(path) => path.display().to_string(),
                None => format!("(role {role}: missing)"),
            };
            let device = path.as_ref().map(|path| open(path)).transpose()?;
            let incoming = match next {
                Some(path) => Some((path.display().to_string(), open(path)?)),
                None => None,
            };
            attached.push(Attached { name, device, incoming });
        }
        let mut array = Self::over(assembly, attached, options, worker)?;
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
        attached: Vec<Attached>,
        options: ArrayOptions,
        worker: &Handle,
    ) -> Result<Self, OpenError> {
        let open = Self::begin(assembly, attached, options, worker);
        open.1.wait()?;
        Ok(open.0)
    }

    /// The same without waiting: the ticket says when it can be used.
    pub fn begin(
        assembly: &Assembly,
        attached: Vec<Attached>,
        options: ArrayOptions,
        worker: &Handle,
    ) -> (Self, Ticket<Result<(), Error>>) {
        let superblock = assembly.superblock.clone();
        let health = Arc::new(Health::new(attached.iter().map(|role| role.name.clone())));
        let traffic = Arc::new(Traffic::default());
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        let name: Arc<str> = superblock.name.as_str().into();
        let limits = limits(&superblock, &attached);
        let mut devices = Vec::new();
        let mut incoming = Vec::new();
        for role in attached {
            devices.push(role.device);
            incoming.push(role.incoming);
        }
        let parts = Parts {
            superblock: superblock.clone(),
            devices,
            health: health.clone(),
            traffic: traffic.clone(),
            page_cache: options.page_cache,
        };
        let (checksums, worker_of) = (superblock.checksums, worker.clone());
        let device = ArrayDevice { key, name: name.clone(), limits, checksums, worker: worker_of };
        let device = Arc::new(device);
        let crashed = assembly.crashed;
        let opened = worker.spawn(move || async move {
            let fail = |kind| Error { kind, op: OpName::Open, device: name.clone(), at: 0, len: 0 };
            let engine = Engine::new(parts)
                .map_err(|e| fail(Kind::System(e.raw_os_error().unwrap_or(libc::ENOMEM))))?;
            let history = options.history.unwrap_or_else(random_number);
            engine.open(crashed, history, incoming).await.map_err(fail)?;
            if let Some(patience) = options.patience {
                watch(Rc::downgrade(&engine), patience);
            }
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
            let engine = take_engine(key);
            let engine = engine.ok_or_else(|| fail(Kind::Stopped))?;
            engine.close().await.map_err(fail)
        })
    }

    /// Begins to fill `device`, which takes the place of a role's member and
    /// is known by the new `id` from then on. The ticket says whether it was
    /// begun; [`Health::rebuild`] how far it is.
    pub fn begin_replace(
        &self,
        role: usize,
        id: Id,
        device: Arc<dyn Device>,
        name: String,
    ) -> Ticket<Result<(), TendError>> {
        let (wants, gives) = (device.limits().memory_align, self.limits.memory_align);
        self.on_engine(move |engine| async move {
            if wants > gives {
                return Err(TendError::Alignment { wants, gives });
            }
            engine.begin_replace(role, id, device, name).await
        })
    }

    /// Leaves a role's member out from now on.
    pub fn begin_remove(&self, role: usize) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move { engine.remove(role).await })
    }

    /// Begins to look through everything, from where an earlier scrub was
    /// stopped. The ticket says whether it was begun.
    pub fn begin_scrub(&self) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move { engine.begin_scrub().await })
    }

    /// Pauses rebuild and scrub, or lets them go on.
    pub fn pause(&self, paused: bool) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move {
            engine.pause_tending(paused);
            Ok(())
        })
    }

    /// Stops a scrub; the next one goes on from there.
    pub fn stop_scrub(&self) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move { engine.stop_scrub().await })
    }

    /// Leaves out a member that does not answer, as the watchdog does.
    pub fn give_up(&self, role: usize) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move {
            engine.give_up(role);
            Ok(engine.settle_members().await?)
        })
    }

    /// Writes all tuples to their pages and empties the log.
    pub fn checkpoint(&self) -> Ticket<Result<(), TendError>> {
        self.on_engine(move |engine| async move { Ok(engine.checkpoint().await?) })
    }

    fn on_engine<F, Fut>(&self, run: F) -> Ticket<Result<(), TendError>>
    where
        F: FnOnce(Rc<Engine>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), TendError>> + 'static,
    {
        let key = self.key;
        self.worker.spawn(move || async move {
            let engine = engine(key).ok_or(TendError::Array(Kind::Stopped))?;
            run(engine).await
        })
    }
}

fn random_number() -> u64 {
    let id = Id::random().0;
    u64::from_le_bytes(id[..8].try_into().expect("8 bytes")) >> 1
}

/// Ticks once a second, and leaves out who does not answer.
fn watch(engine: Weak<Engine>, patience: u64) {
    drop(exec::spawn(async move {
        loop {
            ring::sleep(Duration::from_secs(1)).await;
            let Some(engine) = engine.upgrade() else { return };
            engine.watch(patience);
            // Nobody else may be there to record it.
            let _ = engine.settle_members().await;
        }
    }));
}

impl Device for ArrayDevice {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn submit(&self, request: Request) -> Ticket<Outcome> {
        let key = self.key;
        // On its own worker a read begins at once, and has tasks of its own,
        // which are smaller than one for everything.
        let request = match request {
            Request { op: Op::Read { at, into }, memory, issuer } if self.worker.is_here() => {
                return self.read_here(at, into, memory, issuer);
            }
            other => other,
        };
        let fail = self.failure_of(request.op.range());
        // Nothing would find out that the promise was broken, and the row's
        // other blocks would suffer.
        if !self.checksums && matches!(request.op, Op::Write { body: Body::Promised(_), .. }) {
            return Ticket::ready(Err(fail(Kind::Unsupported)));
        }
        match request {
            Request { op: Op::Read { at, into }, memory, issuer } => {
                self.worker.spawn(move || async move {
                    let Some(engine) = engine(key) else { return Err(fail(Kind::Stopped)) };
                    engine.read(at, into, memory, issuer).await.map_err(fail)
                })
            }
            request => {
                let run = move || async move {
                    let Some(engine) = engine(key) else { return Err(fail(Kind::Stopped)) };
                    engine.run(request).await.map_err(fail)
                };
                match self.worker.is_here() {
                    true => exec::spawn(run()),
                    false => self.worker.spawn(run),
                }
            }
        }
    }
}

impl ArrayDevice {
    /// Makes the error of a request that fails.
    fn failure_of(&self, range: (OpName, u64, u64)) -> impl FnOnce(Kind) -> Error + Send + use<> {
        let (device, (op, at, len)) = (self.name.clone(), range);
        move |kind| Error { kind, op, device, at, len }
    }

    /// A read on its array's worker: where the members answer at once, as
    /// files in memory do, and tuples are at hand, one block is there when
    /// this returns.
    fn read_here(
        &self,
        at: u64,
        into: Into,
        memory: Option<Reservation>,
        issuer: Option<Arc<Issuer>>,
    ) -> Ticket<Outcome> {
        let range = (OpName::Read, at, into.len() as u64);
        let Some(engine) = engine(self.key) else {
            return Ticket::ready(Err(self.failure_of(range)(Kind::Stopped)));
        };
        let Some(block) = engine.known_block(at, &into) else {
            let fail = self.failure_of(range);
            return match into.len() {
                BLOCK => exec::spawn_begun(async move {
                    engine.read_one(at, into, memory, issuer).await.map_err(fail)
                }),
                _ => exec::spawn_begun(async move {
                    engine.read(at, into, memory, issuer).await.map_err(fail)
                }),
            };
        };
        let mut read = match engine.begin_block(block, into, memory) {
            Ok(read) => read,
            Err(kind) => return Ticket::ready(Err(self.failure_of(range)(kind))),
        };
        if engine.block_now(&mut read) {
            return Ticket::ready(Ok(read.into_reply()));
        }
        let fail = self.failure_of(range);
        exec::spawn_begun(async move { engine.finish_block(read, issuer).await.map_err(fail) })
    }
}

impl Drop for ArrayDevice {
    /// Nobody can reach the engine any more: it goes, without having been
    /// closed, as if the process had died.
    fn drop(&mut self) {
        let key = self.key;
        // Here where its worker was this thread, if that is gone.
        if take_engine(key).is_none() {
            drop(self.worker.spawn(move || async move { drop(take_engine(key)) }));
        }
    }
}

/// Forgets the engine of an array of this worker's; who has it still has it.
fn take_engine(key: u64) -> Option<Rc<Engine>> {
    let taken = ENGINES.try_with(|engines| {
        let mut engines = engines.borrow_mut();
        let index = engines.iter().position(|(k, _)| *k == key);
        index.map(|i| engines.swap_remove(i).1)
    });
    // Without them the thread is at its end.
    taken.ok().flatten()
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

/// The limits of an array over these members.
fn limits(superblock: &Superblock, attached: &[Attached]) -> Limits {
    let geometry = &superblock.geometry;
    let mut devices = attached
        .iter()
        .flat_map(|role| role.device.iter().chain(role.incoming.iter().map(|(_, device)| device)));
    let memory_align = devices.clone().map(|m| m.limits().memory_align).max().unwrap_or(1);
    let parities = geometry.level.parities();
    let rows = (parities > 0).then(|| geometry.row_shape());
    let streams = devices.all(|member| member.limits().pass.streams);
    let pass = Pass { guards: true, rows, streams };
    let radius = if geometry.redundancy() > 0 { Radius::Everyone } else { Radius::Issuer };
    let mut limits = Limits {
        size: geometry.size(),
        logical: 512,
        physical: BLOCK as u32,
        memory_align,
        max_transfer: 1 << 20,
        // A block is old or new after a crash; without a log it may be lost.
        atomic: if superblock.log { BLOCK as u32 } else { 512 },
        cache: Cache::Volatile,
        write_radius: radius,
        read_radius: Radius::Issuer,
        pass,
    };
    // A request that covers no row wholly is the one that needs most memory;
    // in the log, what it does to one stripe must find room at once (WRITE-5).
    let stripe = geometry.chunk_blocks as usize * (geometry.columns() + parities);
    let too_large = |limits: &Limits| {
        let len = limits.max_transfer as usize;
        let log = with_records(stripe.min((len / BLOCK + 2) * (1 + parities)));
        limits.scratch_bytes(512, len) > REQUEST_BUDGET || log > geometry.log_blocks as usize / 2
    };
    while too_large(&limits) && limits.max_transfer > 16 << 10 {
        limits.max_transfer /= 2;
    }
    limits
}
