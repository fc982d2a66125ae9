//! The call that can be left from a signal handler.
//!
//! This is `setjmp` turned inside out, so that no Rust function returns twice: [`enter`] saves what
//! its caller expects to be preserved on the stack and calls the body. [`resume`] points the
//! interrupted context back into `enter`, which pops what it saved and returns 1 instead of 0.
//! Returning from the handler restores the signal mask.

use std::ffi::c_void;
use std::mem::offset_of;

use crate::Segment;

/// One call of [`enter`]: its foreign ranges, and where to continue when one faults.
#[repr(C)]
pub(super) struct Record {
    /// Stack pointer of `enter` while the body runs, or 0 when it does not.
    sp: usize,
    /// Where `enter` continues after a fault.
    pc: usize,
    /// The foreign ranges, and how many there are.
    ranges: *const Segment,
    count: usize,
    /// The faulting address, once there is one.
    pub(super) fault: usize,
}

impl Record {
    /// The record of a call, not yet entered, over foreign ranges, which outlive it.
    pub(super) fn of(ranges: &[Segment]) -> Record {
        Record { sp: 0, pc: 0, ranges: ranges.as_ptr(), count: ranges.len(), fault: 0 }
    }

    /// If the body runs and `addr` is in one of its foreign ranges, taken by whole pages of `page`
    /// bytes: the address, brought into the range. Of a hardware memory error the kernel reports
    /// no more than the page.
    ///
    /// # Safety
    ///
    /// The ranges are still there.
    pub(super) unsafe fn covers(&self, addr: usize, page: usize) -> Option<usize> {
        if self.sp == 0 {
            return None;
        }
        // SAFETY: the caller's promise; `of` was given these.
        let ranges = unsafe { std::slice::from_raw_parts(self.ranges, self.count) };
        // Ranges may share a page; the one that has the address itself comes first.
        let has = |range: &&Segment| addr.wrapping_sub(range.addr.addr()) < range.len;
        let shares_page = |range: &&Segment| {
            let (start, end) = (range.addr.addr(), range.addr.addr().saturating_add(range.len));
            let first = start & !(page - 1);
            let behind = end.checked_next_multiple_of(page).unwrap_or(usize::MAX);
            start < end && (first..behind).contains(&addr)
        };
        let range = ranges.iter().find(has).or_else(|| ranges.iter().find(shares_page))?;
        let start = range.addr.addr();
        Some(addr.clamp(start, start.saturating_add(range.len) - 1))
    }
}

/// Calls `body(arg)` and returns 0, or 1 if [`resume`] left it.
///
/// # Safety
///
/// `record` is valid until the return, `body` accepts `arg`, does not unwind, and may be abandoned
/// at every access to the foreign ranges: frames between here and there are plain old frames, with
/// no destructors.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub(super) unsafe extern "C" fn enter(
    record: *mut Record,
    body: unsafe extern "C" fn(*mut c_void),
    arg: *mut c_void,
) -> usize {
    // System V ABI, AMD64: rbx, rbp, r12 to r15 and rsp are the caller's. The return address and
    // seven pushes leave rsp a multiple of 16, as the call needs it.
    std::arch::naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "lea rax, [rip + 2f]",
        "mov [rdi + {pc}], rax",
        "mov [rdi + {sp}], rsp",
        "mov rdi, rdx",
        "call rsi",
        "xor eax, eax",
        "2:",
        "pop rdi",
        "mov qword ptr [rdi + {sp}], 0",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        sp = const offset_of!(Record, sp),
        pc = const offset_of!(Record, pc),
    )
}

/// Makes the interrupted `context` continue in [`enter`], which then returns 1.
///
/// # Safety
///
/// `context` is that of code which the `enter` of `record` has called, directly or not.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn resume(record: &Record, context: *mut libc::ucontext_t) {
    const DIRECTION: i64 = 1 << 10;
    // SAFETY: the kernel has written the context and loads it when the handler returns.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    registers[libc::REG_RSP as usize] = record.sp as i64;
    registers[libc::REG_RIP as usize] = record.pc as i64;
    registers[libc::REG_RAX as usize] = 1;
    // The ABI promises the direction flag clear on return from a function.
    registers[libc::REG_EFL as usize] &= !DIRECTION;
}

/// Calls `body(arg)` and returns 0, or 1 if [`resume`] left it.
///
/// # Safety
///
/// `record` is valid until the return, `body` accepts `arg`, does not unwind, and may be abandoned
/// at every access to the foreign ranges: frames between here and there are plain old frames, with
/// no destructors.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub(super) unsafe extern "C" fn enter(
    record: *mut Record,
    body: unsafe extern "C" fn(*mut c_void),
    arg: *mut c_void,
) -> usize {
    // AAPCS64: x19 to x30, sp and the low halves of v8 to v15 are the caller's.
    std::arch::naked_asm!(
        "stp x29, x30, [sp, #-176]!",
        "mov x29, sp",
        "stp x19, x20, [sp, #16]",
        "stp x21, x22, [sp, #32]",
        "stp x23, x24, [sp, #48]",
        "stp x25, x26, [sp, #64]",
        "stp x27, x28, [sp, #80]",
        "stp d8, d9, [sp, #96]",
        "stp d10, d11, [sp, #112]",
        "stp d12, d13, [sp, #128]",
        "stp d14, d15, [sp, #144]",
        "str x0, [sp, #160]",
        "adr x9, 2f",
        "str x9, [x0, #{pc}]",
        "mov x9, sp",
        "str x9, [x0, #{sp}]",
        "mov x0, x2",
        "blr x1",
        "mov x0, #0",
        "2:",
        "ldr x9, [sp, #160]",
        "str xzr, [x9, #{sp}]",
        "ldp d14, d15, [sp, #144]",
        "ldp d12, d13, [sp, #128]",
        "ldp d10, d11, [sp, #112]",
        "ldp d8, d9, [sp, #96]",
        "ldp x27, x28, [sp, #80]",
        "ldp x25, x26, [sp, #64]",
        "ldp x23, x24, [sp, #48]",
        "ldp x21, x22, [sp, #32]",
        "ldp x19, x20, [sp, #16]",
        "ldp x29, x30, [sp], #176",
        "ret",
        sp = const offset_of!(Record, sp),
        pc = const offset_of!(Record, pc),
    )
}

/// Makes the interrupted `context` continue in [`enter`], which then returns 1.
///
/// # Safety
///
/// `context` is that of code which the `enter` of `record` has called, directly or not.
#[cfg(target_arch = "aarch64")]
pub(super) unsafe fn resume(record: &Record, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel has written the context and loads it when the handler returns.
    let registers = unsafe { &mut (*context).uc_mcontext };
    registers.sp = record.sp as u64;
    registers.pc = record.pc as u64;
    registers.regs[0] = 1;
}
