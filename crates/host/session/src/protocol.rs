//! What a process asks its launcher, over the socket `ask`.
//!
//! One connection, one [`Request`], one [`Answer`], then both ends close: a process keeps no
//! descriptor that the program might close or find. With [`Question::File`] comes the file itself
//! (`SCM_RIGHTS`).

use crate::Text;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Question {
    /// What to do with the file whose descriptor comes along.
    File = 1,
    /// Please print [`Request::text`], a line without its end, on the launcher's standard error.
    Say = 2,
}

/// A request, as it goes over the socket.
#[repr(C)]
pub struct Request {
    /// [`Question`] as a number.
    pub question: u32,
    /// Who asks.
    pub pid: u32,
    /// What to print.
    pub text: Text<480>,
}

/// What is done with a file's direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Effect {
    /// Nothing; `detect` watches it.
    Untouched = 1,
    /// Writes go from private memory.
    Bounce = 2,
    /// The file is opened without O_DIRECT, and not kept in the page cache.
    Uncached = 3,
    /// The opening fails with EINVAL.
    Refuse = 4,
}

/// The answer to [`Question::File`], and what the kernel would call "done" to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Answer {
    /// The file's slot in the session; 0 if there was no room.
    pub slot: u32,
    /// The rest, as [`Answer::to_bits`] has it.
    pub bits: u32,
}

impl Answer {
    /// An answer about the file in `slot`. `private_reads`: reads are verified below while they
    /// lie in the reader's memory, so they go to private memory first.
    pub fn new(slot: u32, effect: Effect, private_reads: bool) -> Answer {
        Answer { slot, bits: Answer::to_bits(effect, private_reads) }
    }

    /// Effect and `private_reads` in one number, never 0.
    pub fn to_bits(effect: Effect, private_reads: bool) -> u32 {
        effect as u32 | (u32::from(private_reads) << 8)
    }

    /// What is done with the file; `None` if the bits are no answer.
    pub fn effect(self) -> Option<Effect> {
        match self.bits & 0xff {
            1 => Some(Effect::Untouched),
            2 => Some(Effect::Bounce),
            3 => Some(Effect::Uncached),
            4 => Some(Effect::Refuse),
            _ => None,
        }
    }

    /// Whether reads go to private memory first.
    pub fn private_reads(self) -> bool {
        self.bits & 0x100 != 0
    }
}

/// What a session has to say about what it can not do. Each kind is said once a session, and
/// counted each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Remark {
    /// A static binary opened a file for direct I/O, or made a ring.
    Static = 0,
    /// So did a program that does not have the library for another reason (set-uid, cleared
    /// environment, other architecture).
    NoLibrary = 1,
    /// A ring whose kernel thread submits without a system call (SQPOLL).
    SqPoll = 2,
    /// A ring with flags or an operation that this version does not know.
    Ring = 3,
    /// A thread or process made by a raw clone, in which the net does not hold.
    RawClone = 4,
    /// splice, sendfile or copy_file_range into a file that needs private memory.
    Splice = 5,
    /// The kernel lacks what the net is made of.
    NoNet = 6,
    /// No memory for a copy within the session's limit.
    NoMemory = 7,
    /// A file could not be classified: the launcher does not answer.
    NoAnswer = 8,
    /// An atomic write under `uncached`.
    Atomic = 9,
    /// Anything else that was refused.
    Other = 10,
}

impl Remark {
    /// How many kinds there are.
    pub const COUNT: usize = 11;
    /// All of them, in the order of their numbers.
    pub const ALL: [Remark; Remark::COUNT] = [
        Remark::Static,
        Remark::NoLibrary,
        Remark::SqPoll,
        Remark::Ring,
        Remark::RawClone,
        Remark::Splice,
        Remark::NoNet,
        Remark::NoMemory,
        Remark::NoAnswer,
        Remark::Atomic,
        Remark::Other,
    ];
}
