/*
 * Asynchronous engines of libraries: POSIX AIO (of the C library: threads that write),
 * libaio (system calls with names that can be hooked), liburing (inlines most of itself).
 */
#define _GNU_SOURCE
#include "racer.h"

#include <aio.h>
#include <errno.h>
#include <libaio.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>

static bool try_again(long result)
{
	return result == -EINTR || result == -EAGAIN || result == -EBUSY;
}

/* ---- POSIX AIO ---- */

struct posixaio {
	int fd;
	unsigned depth;
	struct aiocb *blocks;		/* one per id */
	struct request **requests;	/* those in flight, or NULL */
};

static void *open_posixaio(const struct target *target)
{
	struct posixaio *posixaio = allocate(1, sizeof(*posixaio));

	posixaio->fd = target->fd;
	posixaio->depth = target->depth;
	posixaio->blocks = allocate(target->depth, sizeof(struct aiocb));
	posixaio->requests = allocate(target->depth, sizeof(struct request *));
	return posixaio;
}

static struct aiocb *control_block(struct posixaio *posixaio, struct request *request)
{
	struct aiocb *block = &posixaio->blocks[request->id];

	memset(block, 0, sizeof(*block));
	block->aio_fildes = posixaio->fd;
	block->aio_buf = request->segments[0].iov_base;
	block->aio_nbytes = request->length;
	block->aio_offset = (off_t)request->offset;
	block->aio_lio_opcode = LIO_WRITE;
	block->aio_sigevent.sigev_notify = SIGEV_NONE;
	posixaio->requests[request->id] = request;
	request->in_flight = true;
	return block;
}

static void refuse(struct posixaio *posixaio, struct request *request, int error)
{
	posixaio->requests[request->id] = NULL;
	request->in_flight = false;
	request->result = -error;
}

/* One at a time, or as a list. */
__attribute__((noinline))
static void submit_posixaio(void *context, struct request **requests, unsigned count)
{
	struct posixaio *posixaio = context;
	struct aiocb *list[count];

	for (unsigned i = 0; i < count; i++)
		list[i] = control_block(posixaio, requests[i]);
	if (count == 1) {
		if (aio_write(list[0]))
			refuse(posixaio, requests[0], errno);
	} else if (lio_listio(LIO_NOWAIT, list, (int)count, NULL) && errno != EIO) {
		/* With EIO each of them says itself what became of it. */
		for (unsigned i = 0; i < count; i++)
			refuse(posixaio, requests[i], errno);
	}
}

static void suspend(struct posixaio *posixaio)
{
	const struct aiocb *list[posixaio->depth];

	for (unsigned i = 0; i < posixaio->depth; i++)
		list[i] = posixaio->requests[i] ? &posixaio->blocks[i] : NULL;
	while (aio_suspend(list, (int)posixaio->depth, NULL) && errno == EINTR)
		;
}

static unsigned reap_posixaio(void *context, struct request **done, bool wait)
{
	struct posixaio *posixaio = context;
	unsigned count = 0;

	if (wait)
		suspend(posixaio);
	for (unsigned i = 0; i < posixaio->depth; i++) {
		struct request *request = posixaio->requests[i];
		int error;

		if (!request)
			continue;
		error = aio_error(&posixaio->blocks[i]);
		if (error == EINPROGRESS)
			continue;
		request->result = aio_return(&posixaio->blocks[i]);
		if (error)
			request->result = -error;
		request->in_flight = false;
		posixaio->requests[i] = NULL;
		done[count++] = request;
	}
	return count;
}

/* The library writes into the blocks of what was abandoned: those are left to it. */
static void close_posixaio(void *context)
{
	struct posixaio *posixaio = context;
	bool abandoned = false;

	for (unsigned i = 0; i < posixaio->depth; i++)
		abandoned |= posixaio->requests[i] != NULL;
	if (!abandoned)
		free(posixaio->blocks);
	free(posixaio->requests);
	free(posixaio);
}

const struct engine POSIXAIO = {
	.name = "posixaio", .function = "submit_posixaio", .async = true,
	.open = open_posixaio, .submit = submit_posixaio, .reap = reap_posixaio,
	.close = close_posixaio,
};

/* ---- libaio ---- */

struct libaio {
	int fd;
	unsigned depth;
	io_context_t kernel;
	struct iocb *blocks;	/* one per id */
	struct io_event *events;
};

static void *open_libaio(const struct target *target)
{
	struct libaio *libaio = allocate(1, sizeof(*libaio));
	int result;

	libaio->fd = target->fd;
	libaio->depth = target->depth;
	libaio->blocks = allocate(target->depth, sizeof(struct iocb));
	libaio->events = allocate(target->depth, sizeof(struct io_event));
	result = io_setup((int)target->depth, &libaio->kernel);
	if (result < 0)
		die("io_setup: %s", strerror(-result));
	return libaio;
}

static struct iocb *io_block(struct libaio *libaio, struct request *request)
{
	struct iocb *block = &libaio->blocks[request->id];

	if (request->segment_count > 1)
		io_prep_pwritev(block, libaio->fd, request->segments,
				(int)request->segment_count, (long long)request->offset);
	else
		io_prep_pwrite(block, libaio->fd, request->segments[0].iov_base,
			       request->length, (long long)request->offset);
	block->data = request;
	request->in_flight = true;
	return block;
}

__attribute__((noinline))
static void submit_libaio(void *context, struct request **requests, unsigned count)
{
	struct libaio *libaio = context;
	struct iocb *list[count];
	unsigned taken = 0;

	for (unsigned i = 0; i < count; i++)
		list[i] = io_block(libaio, requests[i]);
	while (taken < count) {
		int result = io_submit(libaio->kernel, count - taken, list + taken);

		if (result > 0) {
			taken += (unsigned)result;
		} else if (!try_again(result)) {
			/* The error is that of the first one. */
			requests[taken]->in_flight = false;
			requests[taken]->result = result;
			taken++;
		}
	}
}

static unsigned reap_libaio(void *context, struct request **done, bool wait)
{
	struct libaio *libaio = context;
	struct timespec no_time = {0};
	int count;

	do {
		count = io_getevents(libaio->kernel, wait, libaio->depth, libaio->events,
				     wait ? NULL : &no_time);
	} while (count == -EINTR);
	if (count < 0)
		die("io_getevents: %s", strerror(-count));
	for (int i = 0; i < count; i++) {
		done[i] = libaio->events[i].data;
		done[i]->result = (ssize_t)libaio->events[i].res;
		done[i]->in_flight = false;
	}
	return (unsigned)count;
}

static void close_libaio(void *context)
{
	struct libaio *libaio = context;

	io_destroy(libaio->kernel);
	free(libaio->events);
	free(libaio->blocks);
	free(libaio);
}

const struct engine LIBAIO = {
	.name = "libaio", .function = "submit_libaio", .async = true, .vectors = true,
	.open = open_libaio, .submit = submit_libaio, .reap = reap_libaio,
	.close = close_libaio,
};

/* ---- liburing ---- */

struct liburing {
	int fd;
	unsigned depth;
	bool fixed;
	struct io_uring ring;
};

static void *open_liburing(const struct target *target)
{
	struct liburing *liburing = allocate(1, sizeof(*liburing));
	int result = io_uring_queue_init(target->depth, &liburing->ring, 0);

	liburing->fd = target->fd;
	liburing->depth = target->depth;
	liburing->fixed = target->fixed;
	if (result == 0 && target->fixed)
		result = io_uring_register_buffers(&liburing->ring, &target->memory, 1);
	if (result == 0 && target->fixed)
		result = io_uring_register_files(&liburing->ring, &target->fd, 1);
	if (result < 0)
		die("io_uring: %s", strerror(-result));
	return liburing;
}

static void prepare(struct liburing *liburing, struct request *request)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&liburing->ring);
	const struct iovec *first = request->segments;
	int fd = liburing->fixed ? 0 : liburing->fd;

	if (!sqe)
		die("io_uring: the submission queue is full");
	if (request->segment_count > 1)
		io_uring_prep_writev(sqe, fd, first, request->segment_count, request->offset);
	else if (liburing->fixed)
		io_uring_prep_write_fixed(sqe, fd, first->iov_base, (unsigned)first->iov_len,
					  request->offset, 0);
	else
		io_uring_prep_write(sqe, fd, first->iov_base, (unsigned)first->iov_len,
				    request->offset);
	if (liburing->fixed)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, request);
	request->in_flight = true;
}

__attribute__((noinline))
static void submit_liburing(void *context, struct request **requests, unsigned count)
{
	struct liburing *liburing = context;
	unsigned taken = 0;

	for (unsigned i = 0; i < count; i++)
		prepare(liburing, requests[i]);
	while (taken < count) {
		int result = io_uring_submit(&liburing->ring);

		if (result >= 0)
			taken += (unsigned)result;
		else if (!try_again(result))
			die("io_uring_submit: %s", strerror(-result));
	}
}

static unsigned reap_liburing(void *context, struct request **done, bool wait)
{
	struct liburing *liburing = context;
	struct io_uring_cqe *cqe;
	unsigned count = 0;
	int result;

	while (count < liburing->depth) {
		do {
			result = wait && count == 0 ? io_uring_wait_cqe(&liburing->ring, &cqe)
						    : io_uring_peek_cqe(&liburing->ring, &cqe);
		} while (result == -EINTR);
		if (result == -EAGAIN)
			break;
		if (result < 0)
			die("io_uring: %s", strerror(-result));
		done[count] = io_uring_cqe_get_data(cqe);
		done[count]->result = cqe->res;
		done[count++]->in_flight = false;
		io_uring_cqe_seen(&liburing->ring, cqe);
	}
	return count;
}

static void close_liburing(void *context)
{
	struct liburing *liburing = context;

	io_uring_queue_exit(&liburing->ring);
	free(liburing);
}

const struct engine LIBURING = {
	.name = "liburing", .function = "submit_liburing",
	.async = true, .vectors = true, .fixed = true,
	.open = open_liburing, .submit = submit_liburing, .reap = reap_liburing,
	.close = close_liburing,
};
