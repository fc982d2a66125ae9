//! A shorter way from `io_uring_enter` instructions to this library than the net's signal.
//!
//! A signal and its return take as long as a whole small I/O. Programs and liburing have this in
//! their code (the number is that of `io_uring_enter`):
//!
//! ```text
//!   b8 aa 01 00 00    mov    $0x1aa,%eax     <- becomes: jmp to a stub nearby
//!   89 ea             mov    %ebp,%edx       (or nothing, or another of the kind)
//!   0f 05             syscall
//! ```
//!
//! When the net catches such a place for the first time, the first instruction, and nothing else,
//! becomes a jump of the same five bytes. Whoever goes to one of the others meets them as they were,
//! and the net.
//!
//! - **JUMP-1** Only one whole instruction is replaced, and in one store inside of a cache line:
//!   a thread that comes by executes the old one or the new one, and both are right.
//! - **JUMP-2** The interrupted code gets back what a system call leaves alone: all registers but
//!   rax, rcx and r11, the flags, vectors, and the 128 bytes below its stack.
//! - **JUMP-3** Where anything is unusual, everything stays as it is.

use core::arch::{asm, naked_asm, x86_64};
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::take;
use crate::gate::{call, syscall};
use crate::process;
use crate::site::Caller;

/// Places that are looked at; later ones go by the net.
const PLACES: usize = 64;
const PAGE: usize = 4096;
/// How far a jump reaches, less what the stub and the search for room may take.
const REACH: usize = 1 << 30;
/// `mov $SYS_io_uring_enter, %eax`.
const MOV: [u8; 5] = [0xb8, 0xaa, 0x01, 0x00, 0x00];
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Addresses behind instructions that the net has caught.
static SEEN: [AtomicUsize; PLACES] = [const { AtomicUsize::new(0) }; PLACES];

/// The net has caught an `io_uring_enter` before this address: has the next one come by a jump, if
/// that can be. For the net's handler.
pub(super) fn look_at(behind: usize) {
    for seen in &SEEN {
        match seen.compare_exchange(0, behind, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                replace(behind);
                return;
            }
            Err(there) if there == behind => return,
            Err(_) => {}
        }
    }
}

/// Replaces the instruction. `None`: there is none that can be.
#[cold]
fn replace(behind: usize) -> Option<()> {
    if !can_save_vectors() {
        return None;
    }
    let mut code = [0; 16];
    // SAFETY: code of the program that has just been executed up to `behind`; what lies before it
    // in its page, or in the page before, is read by the kernel, which refuses what is not there.
    unsafe { read_code(behind - code.len(), &mut code)? };
    let middle = middle(&code)?;
    let at = behind - SYSCALL.len() - middle.len() - MOV.len();
    let stub = make_stub(at, middle, behind)?;
    let distance = i32::try_from(stub as i64 - (at + MOV.len()) as i64).ok()?;
    let mut jump = [0xe9, 0, 0, 0, 0];
    jump[1..].copy_from_slice(&distance.to_le_bytes());
    write_code(at, jump)
}

/// What stands between the two instructions, if it is what it may be.
fn middle(code: &[u8; 16]) -> Option<&[u8]> {
    let (before, instruction) = code.split_at(code.len() - SYSCALL.len());
    if instruction != SYSCALL {
        return None;
    }
    [0, 2, 3].into_iter().find_map(|len| {
        let (before, middle) = before.split_at(before.len() - len);
        let (before, mov) = before.split_at(before.len() - MOV.len());
        // A byte 4x before it may be a prefix, which makes it another instruction.
        let whole = mov == MOV && before.last().is_some_and(|byte| byte & 0xf0 != 0x40);
        (whole && moves_registers(middle)).then_some(middle)
    })
}

/// Whether this is nothing, or a move or xor between two registers that leaves eax alone.
fn moves_registers(code: &[u8]) -> bool {
    let (opcode, operands) = match *code {
        [] => return true,
        [opcode, operands] | [0x40..=0x4f, opcode, operands] => (opcode, operands),
        _ => return false,
    };
    let target = match opcode {
        0x89 | 0x31 => operands & 7,
        0x8b | 0x33 => (operands >> 3) & 7,
        _ => return false,
    };
    // 0 is eax, or r8 with a prefix; 4 is the stack pointer, or r12.
    operands >= 0xc0 && target != 0 && target != 4
}

/// Copies code by way of the kernel, so that what is not there is no fault.
///
/// # Safety
///
/// None but that it names memory of this process.
unsafe fn read_code(at: usize, into: &mut [u8; 16]) -> Option<()> {
    let ours = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let theirs = libc::iovec { iov_base: at as *mut _, iov_len: into.len() };
    let pid = std::process::id();
    // SAFETY: writes what `ours` describes.
    let got = unsafe {
        let (ours, theirs) = (&raw const ours, &raw const theirs);
        syscall!(libc::SYS_process_vm_readv, pid, ours, 1, theirs, 1, 0)
    };
    (got == into.len() as isize).then_some(())
}

/// Makes the code that a jump at `at` leads to: what stood there before the system call, then
/// [`enter`], with the way back on the stack.
fn make_stub(at: usize, middle: &[u8], behind: usize) -> Option<usize> {
    let page = page_near(at)?;
    let mut stub = [0xcc; 64];
    let head = middle.len() + 17;
    stub[..middle.len()].copy_from_slice(middle);
    // lea -128(%rsp),%rsp; push the first word of the data; jmp to the second.
    stub[middle.len()..head].copy_from_slice(&[
        0x48, 0x8d, 0x64, 0x24, 0x80, 0xff, 0x35, 0, 0, 0, 0, 0xff, 0x25, 0, 0, 0, 0,
    ]);
    const DATA: usize = 32;
    stub[middle.len() + 7] = (DATA - (middle.len() + 11)) as u8;
    stub[middle.len() + 13] = (DATA + 8 - head) as u8;
    let entry: unsafe extern "C" fn() = enter;
    stub[DATA..DATA + 8].copy_from_slice(&behind.to_ne_bytes());
    stub[DATA + 8..DATA + 16].copy_from_slice(&(entry as usize).to_ne_bytes());
    // SAFETY: a fresh page of ours.
    unsafe {
        ptr::copy_nonoverlapping(stub.as_ptr(), page as *mut u8, stub.len());
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        if syscall!(libc::SYS_mprotect, page, PAGE, prot) != 0 {
            syscall!(libc::SYS_munmap, page, PAGE);
            return None;
        }
    }
    Some(page)
}

/// A new page in reach of a jump.
fn page_near(at: usize) -> Option<usize> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let first = at & !(PAGE - 1);
    // Below the object's start and above its end there usually is room.
    let steps = (0..REACH).step_by(2 << 20).skip(1);
    let mut places =
        steps.flat_map(|step| [first.checked_sub(step), first.checked_add(step)]).flatten();
    places.find(|wanted| {
        // SAFETY: a new mapping where there is none.
        let got = unsafe { syscall!(libc::SYS_mmap, *wanted, PAGE, prot, flags, -1isize, 0) };
        let there = got == *wanted as isize;
        if got > 0 && !there {
            // A kernel that does not know the flag (before Linux 4.17).
            // SAFETY: what was just mapped.
            unsafe { syscall!(libc::SYS_munmap, got, PAGE) };
        }
        there
    })
}

/// Replaces the five bytes at an address, in one store (JUMP-1).
fn write_code(at: usize, bytes: [u8; 5]) -> Option<()> {
    const LINE: usize = 64;
    // A window of eight bytes with the five in it, inside of a cache line: x86 stores that at once.
    let window = if at % LINE <= LINE - 8 { at } else { at - 3 };
    if window / LINE != (window + 7) / LINE || window > at {
        return None;
    }
    let (first, len) = (window & !(PAGE - 1), PAGE);
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: the window lies in one cache line, so in one page, of code that has been executed. It
    // stays executable throughout. Nobody but us changes code.
    unsafe {
        if syscall!(libc::SYS_mprotect, first, len, prot | libc::PROT_WRITE) != 0 {
            return None;
        }
        let mut now = (window as *const [u8; 8]).read_volatile();
        now[at - window..at - window + 5].copy_from_slice(&bytes);
        let word = u64::from_ne_bytes(now);
        asm!("mov qword ptr [{at}], {word}", at = in(reg) window, word = in(reg) word);
        syscall!(libc::SYS_mprotect, first, len, prot);
    }
    Some(())
}

/// Bytes of an XSAVE area in its compacted form, for what [`VECTORS`] names: the legacy region,
/// the header, and 256, 64, 512 and 1024 bytes (Intel SDM, volume 1, chapter 13).
const AREA: usize = 576 + 256 + 64 + 512 + 1024 + 64;
/// SSE, AVX, opmask, the upper halves, the upper registers: what compiled Rust may use.
const VECTORS: u32 = 0b1110_0110;

/// Whether the processor has XSAVEC, which [`enter`] uses.
fn can_save_vectors() -> bool {
    let (features, extended) = (x86_64::__cpuid(1), x86_64::__cpuid_count(0xd, 1));
    const OSXSAVE: u32 = 1 << 27;
    const XSAVEC: u32 = 1 << 1;
    features.ecx & OSXSAVE != 0 && extended.eax & XSAVEC != 0
}

/// Where stubs lead to. On the stack: where to go on, and 128 bytes above it, which are the
/// interrupted code's own (System V ABI, AMD64: the red zone).
///
/// It tells unwinders where its caller is, as `detect` wants to know (`site.rs`).
#[unsafe(naked)]
unsafe extern "C" fn enter() {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_def_cfa rsp, 136",
        ".cfi_offset rip, -136",
        "push rbp",
        ".cfi_def_cfa rsp, 144",
        ".cfi_offset rbp, -144",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "pushfq",
        // The arguments become an array.
        "push r9",
        "push r8",
        "push r10",
        "push rdx",
        "push rsi",
        "push rdi",
        "mov rdi, rsp",
        "mov rsi, [rbp + 8]",
        "lea r8, [rbp + 144]",
        "sub rsp, {area}",
        "and rsp, -64",
        // The header of the area must be zero where XSAVEC does not write.
        "xor eax, eax",
        "mov [rsp + 512], rax",
        "mov [rsp + 520], rax",
        "mov [rsp + 528], rax",
        "mov [rsp + 536], rax",
        "mov [rsp + 544], rax",
        "mov [rsp + 552], rax",
        "mov [rsp + 560], rax",
        "mov [rsp + 568], rax",
        "mov eax, {vectors}",
        "xor edx, edx",
        "xsavec [rsp]",
        "mov rdx, r8",
        "cld",
        "call {inner}",
        "mov rcx, rax",
        "mov eax, {vectors}",
        "xor edx, edx",
        "xrstor [rsp]",
        "mov rax, rcx",
        "lea rsp, [rbp - 56]",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop r10",
        "pop r8",
        "pop r9",
        "popfq",
        "pop rbp",
        ".cfi_def_cfa rsp, 136",
        "ret 128",
        ".cfi_endproc",
        area = const AREA,
        vectors = const VECTORS,
        inner = sym entered,
    )
}

unsafe extern "C" fn entered(args: *const [usize; 6], behind: usize, stack: usize) -> isize {
    process::arm_thread();
    let caller = Caller { address: behind, stack };
    // SAFETY: the program's own call, its arguments where `enter` put them.
    unsafe {
        let number = libc::SYS_io_uring_enter;
        take(number, &*args, caller).unwrap_or_else(|| call(number, *args))
    }
}
