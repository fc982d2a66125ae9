//! Where in the program an I/O is submitted (`detect`).
//!
//! Walking a stack takes microseconds, too long for each I/O. So this process remembers places by
//! the return address of the call and the depth of the stack there, and walks only what it does not
//! remember. Two ways to one call at the same depth count as one place: its innermost function is
//! right, the outer ones are those of the first.
//!
//! In the session a place is known by its frames as they lie in their files, so that the processes
//! of one program share it.

use core::ffi::{CStr, c_void};
use core::sync::atomic::{AtomicU64, Ordering};

use stableio_session::{Engine, FRAMES, SITES, Sites};

use crate::gate::syscall;
use crate::session;

/// The call into this library.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// Where it returns to.
    pub(crate) address: usize,
    /// The stack pointer at the call.
    pub(crate) stack: usize,
}

impl Caller {
    /// Nobody who submits anything.
    pub(crate) const NOBODY: Caller = Caller { address: 0, stack: 0 };
}

/// A place of the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Site(pub(crate) u32);

impl Site {
    /// None in particular: what found no room.
    pub(crate) const NONE: Site = Site(0);

    /// The place of a call.
    pub(crate) fn of(caller: Caller, engine: Engine) -> Site {
        // Of the stack pointer, what is the same in each thread that runs the same code.
        let depth = (caller.stack & 0xffff) as u64;
        let key = mix((caller.address as u64).rotate_left(17) ^ depth << 8 ^ engine as u64);
        let remembered = &REMEMBERED[key as usize % REMEMBERED.len()];
        let known = remembered.load(Ordering::Relaxed);
        if known >> SITE_BITS == key >> SITE_BITS {
            return Site(known as u32 & SITE_MASK);
        }
        let site = Site::walk(caller, engine);
        remembered.store(key >> SITE_BITS << SITE_BITS | u64::from(site.0), Ordering::Relaxed);
        site
    }

    #[cold]
    fn walk(caller: Caller, engine: Engine) -> Site {
        let Some(session) = session::get() else { return Site::NONE };
        let stack = Stack::of(caller, &session.sites);
        let key = stack.key(engine);
        match enter(&session.sites, key, &stack, engine) {
            Some(site) => site,
            None => {
                session.totals.lost.fetch_add(1, Ordering::Relaxed);
                Site::NONE
            }
        }
    }
}

/// Bits of a number of a site, in a word that remembers one.
const SITE_BITS: u32 = SITES.trailing_zeros();
const SITE_MASK: u32 = SITES as u32 - 1;

/// By a call's key: its upper bits, and below them the site.
static REMEMBERED: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

/// The slot of a place, taken for it if it has none. `None`: there is no room.
fn enter(sites: &Sites, key: u64, stack: &Stack, engine: Engine) -> Option<Site> {
    let first = (key >> 40) as usize;
    for slot in (0..SITES).map(|step| (first + step) % SITES).filter(|slot| *slot != 0) {
        let site = &sites.sites[slot];
        match site.key.compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                site.engine.store(engine as u32, Ordering::Relaxed);
                for (to, (module, offset)) in site.frames.iter().zip(stack.frames()) {
                    to.module.store(*module, Ordering::Relaxed);
                    to.offset.store(*offset, Ordering::Relaxed);
                }
                site.depth.store(stack.depth as u32, Ordering::Release);
            }
            Err(there) if there == key => {}
            Err(_) => continue,
        }
        return Some(Site(slot as u32));
    }
    None
}

/// Spreads a number over all bits (SplitMix64); never 0.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) | 1
}

type Context = c_void;

unsafe extern "C" {
    // Of libgcc_s, which the standard library needs anyway (Itanium C++ ABI: Exception Handling,
    // section 1.6).
    fn _Unwind_Backtrace(
        visit: extern "C" fn(*mut Context, *mut c_void) -> i32,
        arg: *mut c_void,
    ) -> i32;
    fn _Unwind_GetIP(context: *mut Context) -> usize;
}

const GO_ON: i32 = 0;
const STOP: i32 = 4;

/// Frames from the call outwards: number of the module, and address in its file.
struct Stack<'a> {
    /// Frames before this return address are ours.
    from: usize,
    begun: bool,
    sites: &'a Sites,
    frames: [(u32, u64); FRAMES],
    depth: usize,
}

impl Stack<'_> {
    fn of(caller: Caller, sites: &Sites) -> Stack<'_> {
        extern "C" fn visit(context: *mut Context, stack: *mut c_void) -> i32 {
            // SAFETY: what `of` passed, and the unwinder's own context.
            let (stack, address) = unsafe { (&mut *stack.cast::<Stack>(), _Unwind_GetIP(context)) };
            stack.begun |= address == stack.from;
            if stack.begun && address != 0 {
                stack.push(address);
            }
            if stack.depth < FRAMES { GO_ON } else { STOP }
        }
        let frames = [(0, 0); FRAMES];
        let mut stack = Stack { from: caller.address, begun: false, sites, frames, depth: 0 };
        // SAFETY: `visit` has the signature, and `stack` outlives the call.
        unsafe { _Unwind_Backtrace(visit, (&raw mut stack).cast()) };
        if stack.depth == 0 {
            // Code without unwind tables: the caller itself is known.
            stack.push(caller.address);
        }
        stack
    }

    fn push(&mut self, address: usize) {
        let (module, base) = module_of(address, self.sites);
        self.frames[self.depth] = (module, (address - base) as u64);
        self.depth += 1;
    }

    fn frames(&self) -> &[(u32, u64)] {
        &self.frames[..self.depth]
    }

    fn key(&self, engine: Engine) -> u64 {
        self.frames().iter().fold(engine as u64, |key, (module, offset)| {
            mix(key ^ offset.rotate_left(16) ^ u64::from(*module))
        })
    }
}

/// Number plus one of the module that holds the address, and where it is loaded.
fn module_of(address: usize, sites: &Sites) -> (u32, usize) {
    // SAFETY: plain data, for which zeros are valid; dladdr fills it.
    let (found, info) = unsafe {
        let mut info: libc::Dl_info = core::mem::zeroed();
        (libc::dladdr(address as *const c_void, &raw mut info) != 0, info)
    };
    if !found || info.dli_fname.is_null() {
        return (0, 0);
    }
    let base = info.dli_fbase as usize;
    let mut exe = [0; 512];
    // SAFETY: dladdr gives a C string that lives as long as the module.
    let mut path = unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes();
    // Of the program itself it is what the program was called by, which need not be a path.
    if is_program(base)
        && let Some(real) = program_path(&mut exe)
    {
        path = real;
    }
    let key = path.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    }) | 1;
    for (index, module) in sites.modules.iter().enumerate() {
        match module.key.compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => module.path.set(path),
            Err(there) if there == key => {}
            Err(_) => continue,
        }
        return (index as u32 + 1, base);
    }
    (0, 0)
}

/// Whether the program itself, and no library, is loaded there.
fn is_program(base: usize) -> bool {
    // SAFETY: a lookup of our own; dladdr fills plain data.
    unsafe {
        let mut info: libc::Dl_info = core::mem::zeroed();
        let entry = libc::getauxval(libc::AT_ENTRY) as *const c_void;
        libc::dladdr(entry, &raw mut info) != 0 && info.dli_fbase as usize == base
    }
}

/// Where the program lies.
fn program_path(into: &mut [u8; 512]) -> Option<&[u8]> {
    let (exe, room) = (c"/proc/self/exe", into.len());
    // SAFETY: a C string, and room for so many bytes.
    let len = unsafe { syscall!(libc::SYS_readlink, exe.as_ptr(), into.as_mut_ptr(), room) };
    into.get(..usize::try_from(len).ok()?)
}
