//! The net: a seccomp filter under all processes of a session.
//!
//! It catches, in processes that do not have the library (static, set-uid, environment cleared,
//! 32 bits), the calls by which a program comes to direct I/O or to a ring, and hands them to the
//! supervisor. The library's own calls pass: they carry the session's cookie in the sixth argument,
//! which none of them has. A program that reads the cookie can pass as well; the net is there
//! against accidents, and the rights that it would need are the program's own anyway.
//!
//! - **NET-1** Every call that can make a descriptor direct, or a ring, without the cookie is
//!   reported, in every system call table that the processor has (64 bits, x32, 32 bits).
//! - **NET-2** A call that is not in the list costs nothing: its way through the filter reads its
//!   number and the table's only, so the kernel computes the outcome once (its "constant action"
//!   cache) and never runs the filter for it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, sock_filter,
};

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` of linux/audit.h.
pub(crate) const ARCH_64: u32 = 0xc000_003e;
pub(crate) const ARCH_32: u32 = 0x4000_0003;
/// Marks the calls of the x32 table, whose numbers are here the same as those of 64 bits.
pub(crate) const X32: u32 = 0x4000_0000;

/// A call that the net knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// open(path, flags, mode).
    Open,
    /// openat(dir, path, flags, mode).
    OpenAt,
    /// openat2(dir, path, how, size): the flags lie in memory, where no filter looks.
    OpenAt2,
    /// open_by_handle_at(mount, handle, flags).
    OpenByHandle,
    /// fcntl(fd, command, argument).
    Fcntl,
    /// io_uring_setup(entries, params).
    Ring,
}

/// Numbers of arch/x86/entry/syscalls/syscall_64.tbl.
const CALLS_64: [(u32, Call); 6] = [
    (2, Call::Open),
    (257, Call::OpenAt),
    (72, Call::Fcntl),
    (437, Call::OpenAt2),
    (304, Call::OpenByHandle),
    (425, Call::Ring),
];

/// Numbers of arch/x86/entry/syscalls/syscall_32.tbl; both of `fcntl` and `fcntl64`.
const CALLS_32: [(u32, Call); 7] = [
    (5, Call::Open),
    (295, Call::OpenAt),
    (55, Call::Fcntl),
    (221, Call::Fcntl),
    (437, Call::OpenAt2),
    (342, Call::OpenByHandle),
    (425, Call::Ring),
];

impl Call {
    /// The call that has this number in this table.
    pub(crate) fn of(arch: u32, number: u32) -> Option<Call> {
        let in_table = |table: &[(u32, Call)], number| {
            table.iter().find(|(there, _)| *there == number).map(|(_, call)| *call)
        };
        match arch {
            ARCH_64 => in_table(&CALLS_64, number & !X32),
            ARCH_32 => in_table(&CALLS_32, number),
            _ => None,
        }
    }

    fn label(self) -> Label {
        match self {
            Call::Open => Label::Open,
            Call::OpenAt | Call::OpenByHandle => Label::OpenAt,
            Call::Fcntl => Label::Fcntl,
            Call::OpenAt2 | Call::Ring => Label::Cookie,
        }
    }
}

/// Places in the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    /// The instruction after this one.
    Next,
    Calls64,
    Calls32,
    Open,
    OpenAt,
    Fcntl,
    Cookie,
    CookieHigh,
    Allow,
    Report,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Here(Label),
    Load(usize),
    And(u32),
    IfEqual(u32, Label, Label),
    IfAnyBit(u32, Label, Label),
    Return(u32),
}

/// Where the low and the high half of an argument lie in `seccomp_data`.
const fn low(argument: usize) -> usize {
    std::mem::offset_of!(libc::seccomp_data, args) + 8 * argument
}

const fn high(argument: usize) -> usize {
    low(argument) + 4
}

const NR: usize = std::mem::offset_of!(libc::seccomp_data, nr);
const ARCH: usize = std::mem::offset_of!(libc::seccomp_data, arch);
const DIRECT: u32 = libc::O_DIRECT as u32;

/// The filter of a session with this cookie.
pub(crate) fn filter(cookie: u64) -> Vec<sock_filter> {
    use Label::*;
    use Step::*;
    let mut steps = vec![
        Load(ARCH),
        IfEqual(ARCH_64, Calls64, Next),
        IfEqual(ARCH_32, Calls32, Allow),
        Here(Calls64),
        Load(NR),
        And(!X32),
    ];
    steps.extend(CALLS_64.map(|(number, call)| IfEqual(number, call.label(), Next)));
    steps.extend([Return(SECCOMP_RET_ALLOW), Here(Calls32), Load(NR)]);
    steps.extend(CALLS_32.map(|(number, call)| IfEqual(number, call.label(), Next)));
    // Jumps go forward only, so the two ends stand last.
    steps.extend([
        Return(SECCOMP_RET_ALLOW),
        Here(Open),
        Load(low(1)),
        IfAnyBit(DIRECT, Cookie, Allow),
        Here(OpenAt),
        Load(low(2)),
        IfAnyBit(DIRECT, Cookie, Allow),
        Here(Fcntl),
        Load(low(1)),
        IfEqual(libc::F_SETFL as u32, Next, Allow),
        Load(low(2)),
        IfAnyBit(DIRECT, Cookie, Allow),
        Here(Cookie),
        Load(low(5)),
        IfEqual(cookie as u32, CookieHigh, Report),
        Here(CookieHigh),
        Load(high(5)),
        IfEqual((cookie >> 32) as u32, Allow, Report),
        Here(Allow),
        Return(SECCOMP_RET_ALLOW),
        Here(Report),
        Return(SECCOMP_RET_USER_NOTIF),
    ]);
    assemble(&steps)
}

fn assemble(steps: &[Step]) -> Vec<sock_filter> {
    let place = |wanted: Label| {
        let before = steps.iter().take_while(|s| !matches!(s, Step::Here(l) if *l == wanted));
        before.filter(|step| !matches!(step, Step::Here(_))).count()
    };
    let mut filter = Vec::new();
    for step in steps {
        let distance = |to: Label| match to {
            Label::Next => 0,
            _ => u8::try_from(place(to) - filter.len() - 1).expect("a filter of few steps"),
        };
        let (code, k, jt, jf) = match *step {
            Step::Here(_) => continue,
            Step::Load(at) => (BPF_LD | BPF_W | BPF_ABS, at as u32, 0, 0),
            Step::And(bits) => (BPF_ALU | BPF_AND | BPF_K, bits, 0, 0),
            Step::IfEqual(k, yes, no) => {
                (BPF_JMP | BPF_JEQ | BPF_K, k, distance(yes), distance(no))
            }
            Step::IfAnyBit(k, yes, no) => {
                (BPF_JMP | BPF_JSET | BPF_K, k, distance(yes), distance(no))
            }
            Step::Return(action) => (BPF_RET | BPF_K, action, 0, 0),
        };
        filter.push(sock_filter { code: code as u16, jt, jf, k });
    }
    filter
}

/// Spreads the net under the calling thread and all that descends from it; gives the descriptor
/// that reports. Makes system calls only, for use between fork and exec.
///
/// Without CAP_SYS_ADMIN the kernel asks that the descendants give up gaining rights by exec
/// (`no_new_privs`), so set-uid programs start without theirs.
pub(crate) fn spread(filter: &[sock_filter]) -> Result<OwnedFd, i32> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // With the first, a signal does not make a call fail that the supervisor is about to answer;
    // kernels before 5.19 do not know it.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    let killable = flags | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let mut result = install(killable, &program);
    if matches!(result, Err(libc::EACCES)) {
        // SAFETY: changes a flag of this process.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        result = install(killable, &program);
    }
    if matches!(result, Err(libc::EINVAL)) {
        result = install(flags, &program);
    }
    result
}

fn install(flags: libc::c_ulong, program: &libc::sock_fprog) -> Result<OwnedFd, i32> {
    // SAFETY: `program` names instructions that live as long as the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, program) };
    if fd < 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u64 = 0x8123_4567_89ab_cdef;

    /// Runs the filter as the kernel does.
    fn run(filter: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let op = filter[at];
            let jump = |yes| usize::from(if yes { op.jt } else { op.jf });
            at += 1;
            match u32::from(op.code) {
                c if c == BPF_LD | BPF_W | BPF_ABS => {
                    let from = op.k as usize;
                    a = u32::from_le_bytes(data[from..from + 4].try_into().expect("four bytes"));
                }
                c if c == BPF_ALU | BPF_AND | BPF_K => a &= op.k,
                c if c == BPF_JMP | BPF_JEQ | BPF_K => at += jump(a == op.k),
                c if c == BPF_JMP | BPF_JSET | BPF_K => at += jump(a & op.k != 0),
                c if c == BPF_RET | BPF_K => return op.k,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    const SETFL: u64 = libc::F_SETFL as u64;
    const D: u64 = libc::O_DIRECT as u64;

    /// Arguments of each call with and without what is looked for.
    fn samples(call: Call) -> Vec<([u64; 6], bool)> {
        match call {
            Call::Open => vec![([9, D | 1, 0, 0, 0, 0], true), ([D, 1, D, 0, 0, 0], false)],
            Call::OpenAt | Call::OpenByHandle => {
                vec![([9, 9, D | 2, 0, 0, 0], true), ([D, D, 1, D, 0, 0], false)]
            }
            Call::Fcntl => vec![
                ([3, SETFL, D, 0, 0, 0], true),
                ([3, SETFL, 1, 0, 0, 0], false),
                ([3, libc::F_SETFD as u64, D, 0, 0, 0], false),
            ],
            Call::OpenAt2 | Call::Ring => vec![([0; 6], true)],
        }
    }

    #[test]
    fn calls_that_matter_are_reported_unless_they_carry_the_cookie() {
        let filter = filter(COOKIE);
        let tables =
            [(ARCH_64, 0, &CALLS_64[..]), (ARCH_64, X32, &CALLS_64), (ARCH_32, 0, &CALLS_32)];
        for (arch, mark, table) in tables {
            for (number, call) in table {
                assert_eq!(Call::of(arch, number | mark), Some(*call));
                for (mut args, reported) in samples(*call) {
                    let want = if reported { SECCOMP_RET_USER_NOTIF } else { SECCOMP_RET_ALLOW };
                    let what = format!("{call:?} {args:x?}");
                    assert_eq!(run(&filter, arch, number | mark, args), want, "{what}");
                    for wrong in [COOKIE as u32 as u64, COOKIE ^ 1, COOKIE ^ 1 << 40] {
                        args[5] = wrong;
                        assert_eq!(run(&filter, arch, number | mark, args), want, "{what}");
                    }
                    args[5] = COOKIE;
                    assert_eq!(
                        run(&filter, arch, number | mark, args),
                        SECCOMP_RET_ALLOW,
                        "{what}"
                    );
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn numbers_are_those_of_the_c_library() {
        for (number, call) in [
            (libc::SYS_open, Call::Open),
            (libc::SYS_openat, Call::OpenAt),
            (libc::SYS_fcntl, Call::Fcntl),
            (libc::SYS_openat2, Call::OpenAt2),
            (libc::SYS_open_by_handle_at, Call::OpenByHandle),
            (libc::SYS_io_uring_setup, Call::Ring),
        ] {
            assert_eq!(Call::of(ARCH_64, number as u32), Some(call));
        }
    }

    #[test]
    fn all_other_calls_pass_whatever_their_arguments() {
        let filter = filter(COOKIE);
        for arch in [ARCH_64, ARCH_32, 0xc000_00b7] {
            for number in (0..600).filter(|number| Call::of(arch, *number).is_none()) {
                assert_eq!(run(&filter, arch, number, [u64::MAX; 6]), SECCOMP_RET_ALLOW);
            }
        }
    }

    #[test]
    fn calls_that_pass_are_decided_by_table_and_number_alone() {
        // NET-2: up to the first return on their way nothing but these two is loaded.
        let filter = filter(COOKIE);
        let first_argument = filter
            .iter()
            .position(|op| u32::from(op.code) & 7 == BPF_LD && op.k as usize >= low(0))
            .expect("arguments are looked at");
        let returns =
            filter[..first_argument].iter().filter(|op| u32::from(op.code) & 7 == BPF_RET);
        assert_eq!(returns.count(), 2, "one for each table, before any argument");
    }
}
