//! The kernel's structures of asynchronous I/O (linux/aio_abi.h, fs/aio.c).

/// `struct iocb` of linux/aio_abi.h: what is asked for.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Iocb {
    /// Comes back in the event.
    pub(super) data: u64,
    /// Set by the kernel when it takes the iocb, always to [`KIOCB_KEY`]; asked for by `io_cancel`.
    pub(super) key: u32,
    /// `RWF_…`.
    pub(super) rw_flags: i32,
    pub(super) opcode: u16,
    pub(super) reqprio: i16,
    pub(super) fildes: u32,
    /// The buffer, or the vector.
    pub(super) buf: u64,
    /// Bytes of the buffer, or entries of the vector.
    pub(super) nbytes: u64,
    pub(super) offset: i64,
    pub(super) reserved2: u64,
    /// `IOCB_FLAG_…`.
    pub(super) flags: u32,
    /// An eventfd, with [`IOCB_FLAG_RESFD`].
    pub(super) resfd: u32,
}

/// Offset of [`Iocb::key`].
pub(super) const KEY_AT: usize = core::mem::offset_of!(Iocb, key);

/// `IOCB_CMD_…` of linux/aio_abi.h: the transfers.
pub(super) const IOCB_CMD_PREAD: u16 = 0;
pub(super) const IOCB_CMD_PWRITE: u16 = 1;
pub(super) const IOCB_CMD_PREADV: u16 = 7;
pub(super) const IOCB_CMD_PWRITEV: u16 = 8;

/// `IOCB_FLAG_RESFD` of linux/aio_abi.h: an eventfd is told of the completion.
pub(super) const IOCB_FLAG_RESFD: u32 = 1 << 0;

/// `KIOCB_KEY` of fs/aio.c.
pub(super) const KIOCB_KEY: u32 = 0;

/// `struct io_event` of linux/aio_abi.h: what became of it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) data: u64,
    /// Address of the program's iocb.
    pub(super) obj: u64,
    pub(super) res: i64,
    pub(super) res2: i64,
}

/// `struct aio_ring` of fs/aio.c, the head of the memory at a context's address. It is no official
/// interface, but programs (QEMU, fio, libaio itself) have read and written it for twenty years.
/// Events follow, `header_length` bytes from the start.
#[repr(C)]
pub(super) struct Ring {
    pub(super) id: core::sync::atomic::AtomicU32,
    /// Events that there is room for, and one: a full ring is not an empty one.
    pub(super) nr: core::sync::atomic::AtomicU32,
    /// Where the consumer reads next: below `nr`.
    pub(super) head: core::sync::atomic::AtomicU32,
    /// Where the next event comes: below `nr`.
    pub(super) tail: core::sync::atomic::AtomicU32,
    pub(super) magic: core::sync::atomic::AtomicU32,
    pub(super) compat_features: core::sync::atomic::AtomicU32,
    pub(super) incompat_features: core::sync::atomic::AtomicU32,
    pub(super) header_length: core::sync::atomic::AtomicU32,
}

/// `AIO_RING_MAGIC`, `AIO_RING_COMPAT_FEATURES` and `AIO_RING_INCOMPAT_FEATURES` of fs/aio.c.
pub(super) const AIO_RING_MAGIC: u32 = 0xa10a_10a1;
pub(super) const AIO_RING_COMPAT_FEATURES: u32 = 1;
pub(super) const AIO_RING_INCOMPAT_FEATURES: u32 = 0;

/// `struct __aio_sigset` of fs/aio.c, for `io_pgetevents`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct SigSet {
    /// Address of the mask; 0: none.
    pub(super) mask: usize,
    /// Its bytes: 8.
    pub(super) size: usize,
}
