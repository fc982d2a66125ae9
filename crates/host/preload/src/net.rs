//! The net: system calls that come by no name.
//!
//! Programs that have the system call instruction in their own code (liburing, libaio, language
//! runtimes, assembly) pass by all hooks. *Syscall user dispatch* (Linux 5.11,
//! Documentation/admin-guide/syscall-user-dispatch.rst) makes the kernel raise SIGSYS for each such
//! instruction outside of one range of code, which is the C library's here. The handler does the
//! call in our way if it concerns us; else it has it replayed at the gate, in the interrupted
//! context itself, so that blocking, restarting and interrupting are as ever.
//!
//! - **SUD-1** It holds per thread, and ends at fork and exec: `process.rs` arms each thread and
//!   child, each process arms itself when it loads this library.
//! - **SUD-2** SIGSYS is never blocked: the kernel would kill the thread (`signals.rs`).
//! - **SUD-3** The handler takes no lock, allocates nothing, and leaves `errno` alone.

use core::arch::naked_asm;
use core::cell::Cell;
use core::ffi::{c_int, c_void};
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use stableio_session::Remark;

use crate::ask;
use crate::calls;
use crate::gate::{self, syscall};
use crate::process;
use crate::session;
use crate::signals;
use crate::site::Caller;
use crate::uring;

const PR_SET_SYSCALL_USER_DISPATCH: usize = 59;
const PR_SYS_DISPATCH_ON: usize = 1;
const PR_SYS_DISPATCH_OFF: usize = 0;
/// `si_code` of a SIGSYS by syscall user dispatch (asm-generic/siginfo.h).
const SYS_USER_DISPATCH: c_int = 2;
/// What the selector says for ever: catch what comes from outside of the range.
static BLOCK: u8 = 1;

thread_local! {
    /// The signal mask of the code that this thread's handler interrupted.
    static INTERRUPTED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// In the handler: the signal mask of the code that was interrupted. A call that waits is to wait
/// with that, because the handler blocks all signals.
pub(crate) fn interrupted_mask() -> Option<u64> {
    INTERRUPTED.get()
}

/// The C library's code.
static START: AtomicUsize = AtomicUsize::new(0);
static LEN: AtomicUsize = AtomicUsize::new(0);

/// Makes the net ready: [`arm`] works from now on. `code` is the C library's, with the gate in it.
pub(crate) fn ready(code: Range<usize>) {
    signals::install(libc::SIGSYS, on_sigsys);
    LEN.store(code.len(), Ordering::Relaxed);
    START.store(code.start, Ordering::Release);
}

/// Spreads the net under this thread. False if the kernel has no such thing.
pub(crate) fn arm() -> bool {
    let (start, len) = (START.load(Ordering::Acquire), LEN.load(Ordering::Relaxed));
    if start == 0 {
        return false;
    }
    // SAFETY: the selector is static; the handler is installed.
    let result = unsafe {
        syscall!(
            libc::SYS_prctl,
            PR_SET_SYSCALL_USER_DISPATCH,
            PR_SYS_DISPATCH_ON,
            start,
            len,
            &raw const BLOCK
        )
    };
    result == 0
}

/// Takes the net away from this thread.
fn disarm() {
    // SAFETY: a system call without memory.
    unsafe {
        syscall!(libc::SYS_prctl, PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0, 0, 0)
    };
}

/// The handler. The interrupted code stands behind its instruction, with the number in `rax`.
extern "C" fn on_sigsys(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes both for the handler's duration.
    let (code, context) = unsafe { ((*info).si_code, &mut *context.cast::<libc::ucontext_t>()) };
    if code != SYS_USER_DISPATCH {
        // Of the program's own seccomp filter.
        // SAFETY: the arguments of this handler.
        unsafe { signals::to_program(signal, info, core::ptr::from_mut(context).cast()) };
        return;
    }
    // SAFETY: the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    caught(context);
    // SAFETY: as above.
    unsafe { *errno = before };
}

fn caught(context: &mut libc::ucontext_t) {
    let registers = &mut context.uc_mcontext.gregs;
    let get = |register: c_int| registers[register as usize] as usize;
    let number = get(libc::REG_RAX) as i64;
    let args = [
        get(libc::REG_RDI),
        get(libc::REG_RSI),
        get(libc::REG_RDX),
        get(libc::REG_R10),
        get(libc::REG_R8),
        get(libc::REG_R9),
    ];
    let caller = Caller { address: get(libc::REG_RIP), stack: get(libc::REG_RSP) };
    let result = match number {
        libc::SYS_rt_sigreturn => return replay_in_place(registers),
        libc::SYS_rt_sigprocmask => {
            // SAFETY: the interrupted context, whose mask the kernel loads when we return.
            Some(unsafe { signals::change_mask(&args, &mut context.uc_sigmask) })
        }
        libc::SYS_fork | libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3 => {
            clone(number, &args, registers)
        }
        libc::SYS_io_uring_enter => {
            // SAFETY: the program's own call, as it stood in its registers.
            match unsafe { uring::enter(&args, caller, uring::Way::Net) } {
                uring::Next::Done(result) => Some(result),
                uring::Next::Kernel => None,
                uring::Next::Wait { args, result } => return replay_for(registers, &args, result),
            }
        }
        _ => {
            let mask = signals::first_word(&context.uc_sigmask);
            let outer = INTERRUPTED.replace(Some(mask));
            // SAFETY: the program's own call, as it stood in its registers.
            let result = unsafe { calls::take(number, &args, caller) };
            INTERRUPTED.set(outer);
            result
        }
    };
    let registers = &mut context.uc_mcontext.gregs;
    match result {
        Some(result) => registers[libc::REG_RAX as usize] = result as i64,
        None => replay(registers),
    }
}

type Registers = [libc::greg_t; 23];

/// Has the call done at the gate, in the interrupted context, which then goes on where it was.
///
/// The kernel leaves no register to keep the way back in, so it lies on the stack, below the 128
/// bytes that the code may be using there (System V ABI, AMD64: the red zone).
fn replay(registers: &mut Registers) {
    let Some(gate) = gate::syscall_ret() else { return };
    const RED_ZONE: i64 = 128;
    let stack = registers[libc::REG_RSP as usize] - RED_ZONE - 16;
    let way_back: unsafe extern "C" fn() = back;
    // SAFETY: the interrupted code's stack, below what it uses. Where there is none left, this
    // faults, as a call there would have.
    unsafe {
        (stack as *mut usize).write(way_back as usize);
        (stack as *mut i64).add(1).write(registers[libc::REG_RIP as usize]);
    }
    registers[libc::REG_RSP as usize] = stack;
    registers[libc::REG_RIP as usize] = gate as i64;
}

/// Where the gate returns to: pops the way back, and the red zone.
#[unsafe(naked)]
unsafe extern "C" fn back() {
    naked_asm!("ret 128")
}

/// Has another call done at the gate, in the interrupted context, for which it is as if its own
/// call had this result.
fn replay_for(registers: &mut Registers, args: &[usize; 6], result: isize) {
    let Some(gate) = gate::syscall_ret() else { return };
    const RED_ZONE: i64 = 128;
    // The kernel leaves the registers of arguments alone, so their owner may rely on that.
    let kept = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8];
    let stack = registers[libc::REG_RSP as usize] - RED_ZONE - 64;
    let way_back: unsafe extern "C" fn() = back_with_result;
    // SAFETY: as in `replay`.
    unsafe {
        let words = stack as *mut usize;
        words.write(way_back as usize);
        words.add(1).write(result as usize);
        for (i, register) in kept.iter().enumerate() {
            words.add(2 + i).write(registers[*register as usize] as usize);
        }
        words.add(7).write(registers[libc::REG_RIP as usize] as usize);
    }
    for (register, arg) in kept.iter().zip(args) {
        registers[*register as usize] = *arg as i64;
    }
    registers[libc::REG_RSP as usize] = stack;
    registers[libc::REG_RIP as usize] = gate as i64;
}

/// Where the gate returns to then: pops the result and the registers of arguments, the way back,
/// and the red zone. The sixth argument is never another.
#[unsafe(naked)]
unsafe extern "C" fn back_with_result() {
    naked_asm!("pop rax", "pop rdi", "pop rsi", "pop rdx", "pop r10", "pop r8", "ret 128")
}

/// `rt_sigreturn` finds its frame by the stack pointer, and does not come back.
fn replay_in_place(registers: &mut Registers) {
    if let Some(gate) = gate::syscall_ret() {
        registers[libc::REG_RIP as usize] = gate as i64;
    }
}

/// A raw fork has its child armed (SUD-1). A thread that is made so can not be: it would run on a
/// stack where this handler has no frame.
fn clone(number: i64, args: &[usize; 6], registers: &mut Registers) -> Option<isize> {
    let flags = match number {
        libc::SYS_clone => args[0],
        // SAFETY: the first word of `struct clone_args`, which the kernel is about to read too.
        libc::SYS_clone3 => unsafe { *(args[0] as *const usize) },
        // The child of a vfork would run on our frame while we wait: it gets a copy instead.
        _ => 0,
    };
    let copies = flags & libc::CLONE_VM as usize == 0;
    let plain_fork = match number {
        libc::SYS_fork | libc::SYS_vfork => true,
        libc::SYS_clone => copies && args[1] == 0,
        _ => false,
    };
    if plain_fork {
        let number = if number == libc::SYS_vfork { libc::SYS_fork } else { number };
        // SAFETY: the program's own call; the child returns by the same handler, from a copy.
        let child = unsafe { gate::call(number, *args) };
        if child == 0 {
            process::after_fork();
        }
        return Some(child);
    }
    let mut name = [0; 16];
    let program = ask::program(&mut name);
    if !session::best_effort() && !session::detects() {
        ask::say(
            Remark::RawClone,
            &[
                program,
                b": refused: a thread or process by a raw clone, whose system calls could not be \
              covered (--best-effort lets it pass)",
            ],
        );
        return Some(-(libc::EPERM as isize));
    }
    ask::say(Remark::RawClone, &[
        program,
        b": makes a thread or process by a raw clone: what the two do without the C library from \
          now on is not covered",
    ]);
    disarm();
    // The instruction itself, two bytes long, is done again.
    registers[libc::REG_RIP as usize] -= 2;
    Some(number as isize)
}
