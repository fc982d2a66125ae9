//! Asking the launcher, and saying something through it.
//!
//! A connection for each request, so that no descriptor of ours lies among the program's. Only
//! plain system calls and the stack: this runs in signal handlers.

use core::mem::{size_of, zeroed};

use stableio_session::{Answer, Question, Remark, Request};

use crate::gate::syscall;
use crate::session;

/// What to do with the file behind `fd`; `None` if nobody answers.
pub(crate) fn about(fd: i32) -> Option<Answer> {
    exchange(Question::File, b"", Some(fd))
}

/// Has a line printed by the launcher, the first time that there is this to say in the session;
/// counts it each time.
pub(crate) fn say(remark: Remark, parts: &[&[u8]]) {
    let Some(session) = session::get() else { return };
    if !session.remark(remark) {
        return;
    }
    let mut line = [0; 480];
    let mut len = 0;
    for part in parts {
        let take = part.len().min(line.len() - len);
        line[len..len + take].copy_from_slice(&part[..take]);
        len += take;
    }
    if exchange(Question::Say, &line[..len], None).is_none() {
        // Nobody is there to say it: better among the program's own errors than nowhere.
        let head = b"stableio: ";
        // SAFETY: writes bytes that are there.
        unsafe {
            syscall!(libc::SYS_write, 2, head.as_ptr(), head.len());
            syscall!(libc::SYS_write, 2, line.as_ptr(), len);
            syscall!(libc::SYS_write, 2, b"\n".as_ptr(), 1);
        }
    }
}

/// The name of this program, for a line to say.
pub(crate) fn program(into: &mut [u8; 16]) -> &[u8] {
    const PR_GET_NAME: usize = 16;
    // SAFETY: the kernel writes at most 16 bytes there.
    unsafe { syscall!(libc::SYS_prctl, PR_GET_NAME, into.as_mut_ptr()) };
    let len = into.iter().position(|b| *b == 0).unwrap_or(into.len());
    &into[..len]
}

fn exchange(question: Question, text: &[u8], fd: Option<i32>) -> Option<Answer> {
    let flags = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: a system call without memory.
    let socket = unsafe { syscall!(libc::SYS_socket, libc::AF_UNIX, flags, 0) };
    if socket < 0 {
        return None;
    }
    let answer = talk(socket, question, text, fd);
    // SAFETY: the socket is ours.
    unsafe { syscall!(libc::SYS_close, socket) };
    answer
}

fn talk(socket: isize, question: Question, text: &[u8], fd: Option<i32>) -> Option<Answer> {
    let address = session::ask_address()?;
    // SAFETY: a valid address of its size.
    let connected = unsafe {
        syscall!(libc::SYS_connect, socket, &raw const *address, size_of::<libc::sockaddr_un>())
    };
    if connected < 0 {
        return None;
    }
    // SAFETY: plain numbers, for which zeros are valid.
    let mut request: Request = unsafe { zeroed() };
    request.question = question as u32;
    request.pid = crate::process::id();
    request.text.set(text);
    send(socket, &request, fd)?;
    let mut answer = Answer { slot: 0, bits: 0 };
    // SAFETY: the answer is plain numbers, and of this size.
    let got = unsafe {
        retry(|| {
            syscall!(libc::SYS_recvfrom, socket, &raw mut answer, size_of::<Answer>(), 0, 0, 0)
        })
    };
    (got == size_of::<Answer>() as isize).then_some(answer)
}

fn send(socket: isize, request: &Request, fd: Option<i32>) -> Option<()> {
    /// Room for a control message with one descriptor, aligned as `cmsghdr` is.
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fd: i32,
        _pad: i32,
    }
    let mut iov = libc::iovec {
        iov_base: (&raw const *request).cast_mut().cast(),
        iov_len: size_of::<Request>(),
    };
    // SAFETY: plain data, for which zeros are valid.
    let (mut message, mut control): (libc::msghdr, Control) = unsafe { (zeroed(), zeroed()) };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        // CMSG_LEN of one descriptor: the header, which is a multiple of the alignment, and four.
        control.header.cmsg_len = size_of::<libc::cmsghdr>() + size_of::<i32>();
        control.header.cmsg_level = libc::SOL_SOCKET;
        control.header.cmsg_type = libc::SCM_RIGHTS;
        control.fd = fd;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
    }
    // SAFETY: the message points to what is on this stack.
    let sent = unsafe {
        retry(|| syscall!(libc::SYS_sendmsg, socket, &raw const message, libc::MSG_NOSIGNAL))
    };
    (sent == size_of::<Request>() as isize).then_some(())
}

/// Repeats what a signal interrupted.
fn retry(mut attempt: impl FnMut() -> isize) -> isize {
    loop {
        let result = attempt();
        if result != -(libc::EINTR as isize) {
            return result;
        }
    }
}
