//! The io_uring interface, as `linux/io_uring.h` of Linux 6.18 has it: what this library needs.

/// `struct io_uring_sqe` (the first 64 bytes of it, where a ring has larger ones).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Sqe {
    pub(super) opcode: u8,
    pub(super) flags: u8,
    pub(super) ioprio: u16,
    pub(super) fd: i32,
    pub(super) off: u64,
    pub(super) addr: u64,
    pub(super) len: u32,
    /// `rw_flags`, `open_flags`, `nop_flags` … by operation.
    pub(super) op_flags: u32,
    pub(super) user_data: u64,
    pub(super) buf_index: u16,
    pub(super) personality: u16,
    /// `file_index`, or `splice_fd_in`.
    pub(super) file_index: u32,
    pub(super) addr3: u64,
    pub(super) pad: u64,
}

/// Words of an [`Sqe`].
pub(super) const SQE_WORDS: usize = size_of::<Sqe>() / 8;

impl Sqe {
    pub(super) const ZERO: Sqe = Sqe::of_words([0; SQE_WORDS]);

    pub(super) const fn of_words(words: [u64; SQE_WORDS]) -> Sqe {
        // SAFETY: of one size, and all bytes of an Sqe are numbers.
        unsafe { core::mem::transmute(words) }
    }

    pub(super) const fn words(self) -> [u64; SQE_WORDS] {
        // SAFETY: of one size, and an Sqe has no padding.
        unsafe { core::mem::transmute(self) }
    }

    /// An operation that does nothing, completes with `result`, and fails its chain if that is
    /// negative (Linux 6.10). It keeps what belongs to the ring's order.
    pub(super) fn with_result(self, result: i32) -> Sqe {
        Sqe {
            opcode: OP_NOP,
            flags: self.flags & (IO_DRAIN | IO_LINK | IO_HARDLINK | CQE_SKIP_SUCCESS),
            len: result as u32,
            op_flags: NOP_INJECT_RESULT,
            user_data: self.user_data,
            ..Sqe::ZERO
        }
    }
}

/// `struct io_uring_cqe` without what large ones have behind it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Cqe {
    pub(super) user_data: u64,
    pub(super) res: i32,
    pub(super) flags: u32,
}

/// `struct io_sqring_offsets` and `struct io_cqring_offsets`, which differ in their middle.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SqOffsets {
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) ring_mask: u32,
    pub(super) ring_entries: u32,
    pub(super) flags: u32,
    pub(super) dropped: u32,
    pub(super) array: u32,
    pub(super) resv1: u32,
    pub(super) user_addr: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CqOffsets {
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) ring_mask: u32,
    pub(super) ring_entries: u32,
    pub(super) overflow: u32,
    pub(super) cqes: u32,
    pub(super) flags: u32,
    pub(super) resv1: u32,
    pub(super) user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Params {
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
    pub(super) flags: u32,
    pub(super) sq_thread_cpu: u32,
    pub(super) sq_thread_idle: u32,
    pub(super) features: u32,
    pub(super) wq_fd: u32,
    pub(super) resv: [u32; 3],
    pub(super) sq_off: SqOffsets,
    pub(super) cq_off: CqOffsets,
}

impl Params {
    pub(super) const ZERO: Params =
        // SAFETY: all its bytes are numbers.
        unsafe { core::mem::transmute([0u8; size_of::<Params>()]) };
}

/// `struct io_uring_rsrc_register`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RsrcRegister {
    pub(super) nr: u32,
    pub(super) flags: u32,
    pub(super) resv2: u64,
    pub(super) data: u64,
    pub(super) tags: u64,
}

/// `struct io_uring_rsrc_update2`; `struct io_uring_rsrc_update` (and `…_files_update`) is its
/// first 16 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RsrcUpdate {
    pub(super) offset: u32,
    pub(super) resv: u32,
    pub(super) data: u64,
    pub(super) tags: u64,
    pub(super) nr: u32,
    pub(super) resv2: u32,
}

pub(super) const OFF_SQ_RING: usize = 0;
pub(super) const OFF_CQ_RING: usize = 0x800_0000;
pub(super) const OFF_SQES: usize = 0x1000_0000;

// IORING_SETUP_*.
pub(super) const SETUP_IOPOLL: u32 = 1 << 0;
pub(super) const SETUP_SQPOLL: u32 = 1 << 1;
pub(super) const SETUP_CQSIZE: u32 = 1 << 3;
pub(super) const SETUP_SUBMIT_ALL: u32 = 1 << 7;
pub(super) const SETUP_SQE128: u32 = 1 << 10;
pub(super) const SETUP_CQE32: u32 = 1 << 11;
pub(super) const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
pub(super) const SETUP_NO_MMAP: u32 = 1 << 14;
pub(super) const SETUP_REGISTERED_FD_ONLY: u32 = 1 << 15;
pub(super) const SETUP_NO_SQARRAY: u32 = 1 << 16;
pub(super) const SETUP_CQE_MIXED: u32 = 1 << 18;
/// All that this version knows.
pub(super) const SETUP_KNOWN: u32 = (1 << 19) - 1;

pub(super) const FEAT_SINGLE_MMAP: u32 = 1 << 0;

// IORING_ENTER_*.
pub(super) const ENTER_GETEVENTS: u32 = 1 << 0;
pub(super) const ENTER_EXT_ARG: u32 = 1 << 3;
pub(super) const ENTER_REGISTERED_RING: u32 = 1 << 4;

// IOSQE_*.
pub(super) const FIXED_FILE: u8 = 1 << 0;
pub(super) const IO_DRAIN: u8 = 1 << 1;
pub(super) const IO_LINK: u8 = 1 << 2;
pub(super) const IO_HARDLINK: u8 = 1 << 3;
pub(super) const ASYNC: u8 = 1 << 4;
pub(super) const BUFFER_SELECT: u8 = 1 << 5;
pub(super) const CQE_SKIP_SUCCESS: u8 = 1 << 6;

// IORING_CQE_F_*.
pub(super) const CQE_F_MORE: u32 = 1 << 1;
/// Fills the end of the ring (only with `SETUP_CQE_MIXED`).
pub(super) const CQE_F_SKIP: u32 = 1 << 5;
/// A large one among small ones (only with `SETUP_CQE_MIXED`).
pub(super) const CQE_F_32: u32 = 1 << 15;

// IORING_OP_*.
pub(super) const OP_NOP: u8 = 0;
pub(super) const OP_READV: u8 = 1;
pub(super) const OP_WRITEV: u8 = 2;
pub(super) const OP_FSYNC: u8 = 3;
pub(super) const OP_READ_FIXED: u8 = 4;
pub(super) const OP_WRITE_FIXED: u8 = 5;
pub(super) const OP_POLL_REMOVE: u8 = 7;
pub(super) const OP_SYNC_FILE_RANGE: u8 = 8;
pub(super) const OP_TIMEOUT: u8 = 11;
pub(super) const OP_LINK_TIMEOUT: u8 = 15;
pub(super) const OP_FALLOCATE: u8 = 17;
pub(super) const OP_OPENAT: u8 = 18;
pub(super) const OP_CLOSE: u8 = 19;
pub(super) const OP_FILES_UPDATE: u8 = 20;
pub(super) const OP_READ: u8 = 22;
pub(super) const OP_WRITE: u8 = 23;
pub(super) const OP_FADVISE: u8 = 24;
pub(super) const OP_OPENAT2: u8 = 28;
pub(super) const OP_SPLICE: u8 = 30;
pub(super) const OP_MSG_RING: u8 = 40;
pub(super) const OP_READ_MULTISHOT: u8 = 49;
pub(super) const OP_READV_FIXED: u8 = 60;
pub(super) const OP_WRITEV_FIXED: u8 = 61;
/// The last that this version knows: `IORING_OP_PIPE`.
pub(super) const OP_LAST_KNOWN: u8 = 62;

/// `IORING_POLL_UPDATE_USER_DATA`.
pub(super) const POLL_UPDATE_USER_DATA: u32 = 1 << 2;
/// `IORING_MSG_SEND_FD`: what `addr` of an `OP_MSG_RING` asks for, instead of a completion.
pub(super) const MSG_SEND_FD: u64 = 1;
/// `IORING_NOP_INJECT_RESULT`.
pub(super) const NOP_INJECT_RESULT: u32 = 1 << 0;
/// `IORING_FILE_INDEX_ALLOC`: the kernel picks the place.
pub(super) const FILE_INDEX_ALLOC: u32 = u32::MAX;

// IORING_REGISTER_* and IORING_UNREGISTER_*.
pub(super) const REGISTER_FILES: u32 = 2;
pub(super) const UNREGISTER_FILES: u32 = 3;
pub(super) const REGISTER_EVENTFD: u32 = 4;
pub(super) const REGISTER_FILES_UPDATE: u32 = 6;
pub(super) const REGISTER_EVENTFD_ASYNC: u32 = 7;
pub(super) const REGISTER_RESTRICTIONS: u32 = 11;
pub(super) const REGISTER_FILES2: u32 = 13;
pub(super) const REGISTER_FILES_UPDATE2: u32 = 14;
pub(super) const REGISTER_RING_FDS: u32 = 20;
pub(super) const UNREGISTER_RING_FDS: u32 = 21;
pub(super) const REGISTER_SEND_MSG_RING: u32 = 31;
pub(super) const REGISTER_RESIZE_RINGS: u32 = 33;
/// In the operation: the descriptor is an index of registered rings.
pub(super) const REGISTER_USE_REGISTERED_RING: u32 = 1 << 31;

/// `IORING_RSRC_REGISTER_SPARSE`.
pub(super) const RSRC_REGISTER_SPARSE: u32 = 1 << 0;
/// `IORING_REGISTER_FILES_SKIP`: this entry of an update stays as it is.
pub(super) const FILES_SKIP: i32 = -2;
/// Rings that a thread can register (`IO_RINGFD_REG_MAX` of io_uring/tctx.h).
pub(super) const RING_FDS: usize = 16;
