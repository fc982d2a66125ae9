/*
 * Engines that have written when they return, each through another door of the kernel.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *open_fd(const struct target *target)
{
	return (void *)(intptr_t)target->fd;
}

static int fd_of(void *context)
{
	return (int)(intptr_t)context;
}

static void close_fd(void *context)
{
	(void)context; /* the file is not ours */
}

__attribute__((noinline))
static void submit_sync(void *context, struct request **requests, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct request *request = requests[i];
		ssize_t result;

		if (request->segment_count == 1)
			result = pwrite(fd_of(context), request->segments[0].iov_base,
					request->length, (off_t)request->offset);
		else
			result = pwritev(fd_of(context), request->segments,
					 (int)request->segment_count, (off_t)request->offset);
		request->result = result < 0 ? -errno : result;
	}
}

__attribute__((noinline))
static void submit_vsync(void *context, struct request **requests, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct request *request = requests[i];
		ssize_t result = pwritev2(fd_of(context), request->segments,
					  (int)request->segment_count, (off_t)request->offset, 0);

		request->result = result < 0 ? -errno : result;
	}
}

__attribute__((noinline))
static void submit_syscall(void *context, struct request **requests, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct request *request = requests[i];
		long result;

		if (request->segment_count == 1)
			result = syscall(SYS_pwrite64, fd_of(context),
					 request->segments[0].iov_base, request->length,
					 request->offset);
		else
			result = syscall(SYS_pwritev, fd_of(context), request->segments,
					 (long)request->segment_count, request->offset, 0L);
		request->result = result < 0 ? -errno : result;
	}
}

__attribute__((noinline))
static void submit_inline(void *context, struct request **requests, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct request *request = requests[i];

		if (request->segment_count == 1)
			request->result = raw_syscall(SYS_pwrite64, fd_of(context),
						      (long)request->segments[0].iov_base,
						      (long)request->length,
						      (long)request->offset, 0, 0);
		else
			request->result = raw_syscall(SYS_pwritev, fd_of(context),
						      (long)request->segments,
						      request->segment_count,
						      (long)request->offset, 0, 0);
	}
}

#define SYNC_ENGINE(NAME)                                                                    \
	{                                                                                    \
		.name = #NAME, .function = "submit_" #NAME, .vectors = true,                 \
		.open = open_fd, .submit = submit_##NAME, .close = close_fd,                 \
	}

const struct engine SYNC = SYNC_ENGINE(sync);
const struct engine VSYNC = SYNC_ENGINE(vsync);
const struct engine SYSCALL = SYNC_ENGINE(syscall);
const struct engine INLINE = SYNC_ENGINE(inline);
