/*
 * io_uring with nothing between this file and the kernel: every call is an inlined
 * instruction, completions are read from the ring's memory.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define RING_BITS (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP)

struct uring {
	int ring_fd, file_fd;
	bool fixed;
	unsigned depth;
	char *rings;		/* both, and the indices */
	size_t rings_bytes, sqes_bytes;
	struct io_uring_params params;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	unsigned *sq_tail, *sq_array, sq_mask;
	unsigned *cq_head, *cq_tail, cq_mask;
};

static long call(long result, const char *what)
{
	if (result < 0)
		die("%s: %s", what, strerror((int)-result));
	return result;
}

static void *map_ring(struct uring *uring, size_t bytes, uint64_t offset)
{
	long address = raw_syscall(SYS_mmap, 0, (long)bytes, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_POPULATE, uring->ring_fd, (long)offset);

	return (void *)call(address, "mmap of the ring");
}

static void map_rings(struct uring *uring)
{
	const struct io_uring_params *params = &uring->params;
	size_t sq_bytes = params->sq_off.array + params->sq_entries * sizeof(unsigned);
	size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);

	uring->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
	uring->sqes_bytes = params->sq_entries * sizeof(struct io_uring_sqe);
	uring->rings = map_ring(uring, uring->rings_bytes, IORING_OFF_SQ_RING);
	uring->sqes = map_ring(uring, uring->sqes_bytes, IORING_OFF_SQES);
	uring->sq_tail = (unsigned *)(uring->rings + params->sq_off.tail);
	uring->sq_array = (unsigned *)(uring->rings + params->sq_off.array);
	uring->sq_mask = *(unsigned *)(uring->rings + params->sq_off.ring_mask);
	uring->cq_head = (unsigned *)(uring->rings + params->cq_off.head);
	uring->cq_tail = (unsigned *)(uring->rings + params->cq_off.tail);
	uring->cq_mask = *(unsigned *)(uring->rings + params->cq_off.ring_mask);
	uring->cqes = (struct io_uring_cqe *)(uring->rings + params->cq_off.cqes);
}

static void register_fixed(struct uring *uring, const struct target *target)
{
	call(raw_syscall(SYS_io_uring_register, uring->ring_fd, IORING_REGISTER_BUFFERS,
			 (long)&target->memory, 1, 0, 0), "registering the buffers");
	call(raw_syscall(SYS_io_uring_register, uring->ring_fd, IORING_REGISTER_FILES,
			 (long)&target->fd, 1, 0, 0), "registering the file");
}

static void *open_uring(const struct target *target)
{
	struct uring *uring = allocate(1, sizeof(*uring));

	uring->file_fd = target->fd;
	uring->fixed = target->fixed;
	uring->depth = target->depth;
	uring->ring_fd = (int)call(raw_syscall(SYS_io_uring_setup, target->depth,
					       (long)&uring->params, 0, 0, 0, 0),
				   "io_uring_setup");
	if ((uring->params.features & RING_BITS) != RING_BITS)
		die("io_uring of this kernel is too old");
	map_rings(uring);
	if (target->fixed)
		register_fixed(uring, target);
	return uring;
}

static void prepare(const struct uring *uring, struct io_uring_sqe *sqe,
		    struct request *request)
{
	const struct iovec *first = request->segments;

	memset(sqe, 0, sizeof(*sqe));
	sqe->fd = uring->file_fd;
	sqe->off = request->offset;
	sqe->user_data = (uintptr_t)request;
	if (request->segment_count > 1) {
		sqe->opcode = IORING_OP_WRITEV;
		sqe->addr = (uintptr_t)first;
		sqe->len = request->segment_count;
	} else {
		sqe->opcode = uring->fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
		sqe->addr = (uintptr_t)first->iov_base;
		sqe->len = (unsigned)first->iov_len;
	}
	if (uring->fixed) {
		sqe->flags = IOSQE_FIXED_FILE;
		sqe->fd = 0; /* of the registered files; buf_index is 0, too */
	}
}

__attribute__((noinline))
static void submit_uring(void *context, struct request **requests, unsigned count)
{
	struct uring *uring = context;
	unsigned tail = *uring->sq_tail;
	long result;

	for (unsigned i = 0; i < count; i++, tail++) {
		unsigned index = tail & uring->sq_mask;

		prepare(uring, &uring->sqes[index], requests[i]);
		uring->sq_array[index] = index;
		requests[i]->in_flight = true;
	}
	__atomic_store_n(uring->sq_tail, tail, __ATOMIC_RELEASE);
	while (count > 0) {
		result = raw_syscall(SYS_io_uring_enter, uring->ring_fd, count, 0, 0, 0, 0);
		if (result == -EINTR || result == -EAGAIN || result == -EBUSY)
			continue;
		count -= (unsigned)call(result, "io_uring_enter");
	}
}

static unsigned reap_uring(void *context, struct request **done, bool wait)
{
	struct uring *uring = context;
	unsigned count = 0, head = *uring->cq_head, tail;

	tail = __atomic_load_n(uring->cq_tail, __ATOMIC_ACQUIRE);
	while (wait && head == tail) {
		long result = raw_syscall(SYS_io_uring_enter, uring->ring_fd, 0, 1,
					  IORING_ENTER_GETEVENTS, 0, 0);

		if (result != -EINTR)
			call(result, "io_uring_enter");
		tail = __atomic_load_n(uring->cq_tail, __ATOMIC_ACQUIRE);
	}
	for (; head != tail && count < uring->depth; head++) {
		const struct io_uring_cqe *cqe = &uring->cqes[head & uring->cq_mask];
		struct request *request = (struct request *)(uintptr_t)cqe->user_data;

		request->result = cqe->res;
		request->in_flight = false;
		done[count++] = request;
	}
	__atomic_store_n(uring->cq_head, head, __ATOMIC_RELEASE);
	return count;
}

static void close_uring(void *context)
{
	struct uring *uring = context;

	raw_syscall(SYS_munmap, (long)uring->sqes, (long)uring->sqes_bytes, 0, 0, 0, 0);
	raw_syscall(SYS_munmap, (long)uring->rings, (long)uring->rings_bytes, 0, 0, 0, 0);
	raw_syscall(SYS_close, uring->ring_fd, 0, 0, 0, 0, 0);
	free(uring);
}

const struct engine URING = {
	.name = "uring", .function = "submit_uring",
	.async = true, .vectors = true, .fixed = true,
	.open = open_uring, .submit = submit_uring, .reap = reap_uring, .close = close_uring,
};
