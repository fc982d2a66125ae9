//! Starting the command: what happens between fork and exec.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::ptr;

use libc::{c_char, sock_filter};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{Context, Error, Result};
use crate::link::Message;
use crate::net;
use crate::signals::Inherited;

/// All that exec needs, made before the fork: nothing is allocated after it.
pub(crate) struct Plan {
    path: CString,
    arguments: Vec<CString>,
    /// The same for the shell, which runs what is executable and has no format.
    shell_arguments: Vec<CString>,
    environment: Vec<CString>,
    pub(crate) filter: Vec<sock_filter>,
    /// Whether the command runs also if the net can not be spread.
    pub(crate) net_is_optional: bool,
    pub(crate) inherited: Inherited,
}

const SHELL: &CStr = c"/bin/sh";

impl Plan {
    pub(crate) fn new(
        path: &Path,
        command: &[OsString],
        extra: &[(&str, OsString)],
        filter: Vec<sock_filter>,
        net_is_optional: bool,
        inherited: Inherited,
    ) -> Result<Plan> {
        let path = text(path.as_os_str())?;
        let arguments = command.iter().map(|arg| text(arg)).collect::<Result<Vec<_>>>()?;
        let mut shell_arguments = vec![SHELL.to_owned(), path.clone()];
        shell_arguments.extend(arguments.iter().skip(1).cloned());
        let environment = environment(extra)?;
        Ok(Plan {
            path,
            arguments,
            shell_arguments,
            environment,
            filter,
            net_is_optional,
            inherited,
        })
    }
}

fn text(value: &OsStr) -> Result<CString> {
    CString::new(value.as_bytes()).context(|| format!("{}", value.display()))
}

/// This process' environment with these variables set.
fn environment(extra: &[(&str, OsString)]) -> Result<Vec<CString>> {
    let kept = std::env::vars_os().filter(|(name, _)| extra.iter().all(|(new, _)| name != new));
    let extra = extra.iter().map(|(name, value)| (OsString::from(name), value.clone()));
    kept.chain(extra)
        .map(|(name, value)| {
            let entry = [name.into_vec(), value.into_vec()].join(&b'=');
            text(OsStr::from_bytes(&entry))
        })
        .collect()
}

/// Becomes the command. On the way it sends the net's descriptor over `to_supervisor`, and what
/// went wrong: [`Message::NoNet`], [`Message::NotStarted`]. For a forked process of one thread.
pub(crate) fn become_command(plan: &Plan, to_supervisor: BorrowedFd<'_>) -> ! {
    plan.inherited.restore();
    match net::spread(&plan.filter) {
        Ok(listener) => {
            if send_descriptor(to_supervisor, listener.as_fd()).is_err() {
                leave();
            }
        }
        Err(errno) => {
            let _ = Message::NoNet(errno).send(to_supervisor);
            if !plan.net_is_optional {
                leave();
            }
        }
    }
    let mut errno = execute(&plan.path, &plan.arguments, &plan.environment);
    if errno == libc::ENOEXEC {
        errno = execute(SHELL, &plan.shell_arguments, &plan.environment);
    }
    let _ = Message::NotStarted(errno).send(to_supervisor);
    leave()
}

fn leave() -> ! {
    // SAFETY: ends the process without running what the launcher registered for its own end.
    unsafe { libc::_exit(127) }
}

fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> i32 {
    let [arguments, environment] = [arguments, environment].map(pointers);
    // SAFETY: both lists end with a null pointer, and hold pointers to strings that live.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

// It allocates between fork and exec, as it may: the process that forked had one thread.
fn pointers(list: &[CString]) -> Vec<*const c_char> {
    list.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

/// A byte of company: a message without data can not be told from a closed end.
const MARK: u8 = b'L';

fn send_descriptor(to: BorrowedFd<'_>, descriptor: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(to, &[IoSlice::new(&[MARK])], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// How a start went, as the supervisor hears it.
#[derive(Debug, Default)]
pub(crate) struct Started {
    /// Reports what the net catches.
    pub(crate) listener: Option<OwnedFd>,
    /// What [`become_command`] had to say.
    pub(crate) troubles: Vec<Message>,
}

/// Hears a starting command until it has become the program, or has ended.
pub(crate) fn hear(from_command: OwnedFd) -> io::Result<Started> {
    let mut started = Started::default();
    loop {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [io::IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::io::retry_on_intr(|| {
            recvmsg(&from_command, &mut buffer, &mut ancillary, flags)
        })?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                started.listener = descriptors.last();
            }
        }
        match got.bytes {
            0 => return Ok(started),
            8 => started.troubles.extend(Message::from_bytes(bytes)),
            _ => {}
        }
    }
}

impl Error {
    /// Of an exec that failed.
    pub(crate) fn of_exec(name: &OsStr, errno: i32) -> Error {
        let name = name.to_string_lossy().into_owned();
        let error = io::Error::from_raw_os_error(errno);
        match errno {
            // The program is there, so it is the interpreter that is not.
            libc::ENOENT => Error::NotExecutable(name, "its interpreter is not there".to_owned()),
            _ => Error::NotExecutable(name, crate::program::text(&error)),
        }
    }
}
