/*
 * What the files of racer share. racer.c says what the program is and does.
 *
 *     racer.c      options, the run, the summary
 *     workers.c    the threads that write
 *     content.c    which value a word of a buffer may have; the check of what was stored
 *     mutator.c    slots (buffers), who changes them, which changes were in flight
 *     log.c        one line per write
 *     sync.c       engines that write before they return: sync, vsync, syscall, inline
 *     libs.c       engines of libraries: posixaio, libaio, liburing
 *     uring.c      engine uring: io_uring without any library
 */
#ifndef RACER_H
#define RACER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdnoreturn.h>
#include <sys/types.h>
#include <sys/uio.h>

#define SECTOR 4096	/* unit of offsets, of the check, and the smallest block */

/* ---- racer.c ---- */

/* Says what is wrong, on one line, and ends with status 1. */
noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* CLOCK_MONOTONIC in nanoseconds. Orders like a fence: what stands before it is
 * visible to other CPUs by that time, what stands after it happens later. */
uint64_t now(void);

void *allocate(size_t count, size_t bytes);

enum mode { RACE, CLEAN_MODE, TWICE, OVERLAP, REVERT, ABANDON, MODES };
enum mutator_kind { MUTATOR_NONE, MUTATOR_THREAD, MUTATOR_PROCESS };

struct options {
	const struct engine *engine;
	enum mode mode;
	enum mutator_kind mutator;
	uint64_t block, count, depth, batch, threads, span, rest_us, margin;
	uint64_t last_version;	/* with check: of the run that wrote */
	bool check, verify, verify_buffered, buffered, fixed, wait;
	const char *log, *file;
};

extern struct options options;
extern struct content content;

/* ---- content.c ---- */

/* Which words make up the content of a file or buffer; see content.c. */
struct content {
	uint64_t period;	/* words repeat their place after so many bytes */
	_Atomic uint32_t *last;	/* version given out last */
};

uint64_t word_value(const struct content *content, uint64_t position, uint32_t version);
bool word_is_live(uint64_t position);

/* Fills a buffer that will lie at `position` of the file with a new version. */
void fill(const struct content *content, uint64_t *words, size_t bytes, uint64_t position);

/* Writes version 0 everywhere, buffered, so that no write of the race allocates. */
void prepare_file(const struct content *content, const char *path, uint64_t span);

struct damage {
	uint64_t bad_blocks;	/* sectors with a word never stored there, or unreadable */
	uint64_t read_errors;	/* sectors that are unreadable */
};

/* Reads the whole span back, from below the page cache. */
struct damage verify_file(const struct content *content, const char *path, uint64_t span,
			  bool direct);

/* ---- mutator.c ---- */

#define CHANGES_KEPT 4096

/* A change of some words of a buffer: it happened between these two times. */
struct change {
	uint64_t start, end;
	uint32_t first, last;	/* index of the first and the last word that changed */
};

/* A buffer, and what happened to it since it was opened. Shared with the mutator. */
struct slot {
	_Atomic uint32_t lock;	/* guards `open` and the list of changes */
	_Atomic uint32_t open;	/* the mutator may change the buffer */
	_Atomic uint32_t count;	/* changes since it was opened */
	uint64_t *words;
	size_t bytes;
	uint64_t position;	/* the words are those of this place of the file */
	uint32_t unfinished;	/* writes from it that were not reaped; not the mutator's */
	struct change changes[CHANGES_KEPT];
};

struct mutator;

/* Buffers of `bytes` each, in memory that suits the kind; starts nothing. */
struct mutator *mutator_new(enum mutator_kind kind, unsigned slots, size_t bytes,
			    bool reverting);
struct slot *mutator_slot(struct mutator *mutator, unsigned index);
struct iovec mutator_memory(const struct mutator *mutator);
_Atomic uint32_t *mutator_last_version(struct mutator *mutator);

/* For buffers of so many threads. Returns when it is at work. */
void mutator_start(struct mutator *mutator, const struct content *content, unsigned threads);
void mutator_stop(struct mutator *mutator);

/* From here to slot_close() the buffer may change at any time. Forgets old changes. */
void slot_open(struct mutator *mutator, struct slot *slot);
void slot_close(struct slot *slot);
/* Waits until an open buffer has changed; makes the change where nobody else would. */
void slot_await_change(struct mutator *mutator, struct slot *slot);

struct interval {
	uint64_t start, end;	/* empty where end <= start */
};

/* How the changes of a slot lie to the times of one write. */
struct judgement {
	uint32_t certain;	/* changes that lie inside one of the certain intervals */
	uint32_t margin;	/* others that touch the whole */
	int64_t first, last;	/* bytes of the buffer that changed; of the certain changes,
				 * if there are any; -1 if there are none at all */
};

struct judgement slot_judge(struct slot *slot, struct interval whole,
			    const struct interval certain[2]);

/* ---- log.c ---- */

enum verdict { CLEAN, MAYBE, CHANGED, FAILED, ABANDONED, VERDICTS };

extern const char *const VERDICT_NAMES[VERDICTS];

struct record {
	uint32_t index, thread;
	pid_t tid;
	enum verdict verdict;
	bool reverted;
	uint64_t offset, length;
	const void *buffer;
	uint64_t before_submit, after_submit;
	uint64_t pending;	/* last time it was seen unfinished after submission, or 0 */
	uint64_t before_reap, reaped;
	struct judgement judgement;
	int64_t result;		/* bytes, or -errno */
};

void write_log(const char *path, const char *function, const struct record *records,
	       size_t count);

/* ---- workers.c ---- */

/* What the threads saw, together. */
struct sights {
	uint64_t looks;		/* for completions (asynchronous engines) */
	uint64_t unfinished;	/* writes that a look showed unfinished, summed */
	uint64_t most_unfinished;
	uint64_t most_in_flight;	/* submitted and not reaped */
};

unsigned slots_needed(void);
uint64_t bytes_per_write(void);

/* Writes all; `records` has room for the count. */
struct sights run_workers(struct mutator *mutator, int fd, struct record *records);

/* ---- engines ---- */

/* One write. Owned by the engine from submission to reaping. */
struct request {
	struct slot *slot;
	uint64_t offset;
	size_t length;
	struct iovec segments[2];
	unsigned segment_count;	/* more than one: submit as a vector */
	unsigned id;		/* below the depth; no two in flight have the same */
	bool in_flight;		/* submitted and not reaped */
	bool alone;		/* submitted by an undisturbed call of its own */
	ssize_t result;		/* set by the engine: bytes, or -errno */
	struct record *record;
};

struct target {
	int fd;
	unsigned depth;
	bool fixed;		/* io_uring: registered buffers and file */
	struct iovec memory;	/* all buffers */
};

struct engine {
	const char *name;
	const char *function;	/* that submits */
	bool async, vectors, fixed;
	/* A context of the calling thread. */
	void *(*open)(const struct target *target);
	/* Takes requests over (in_flight). One that is refused, or that a synchronous
	 * engine has done, has its result and is not in flight. */
	void (*submit)(void *context, struct request **requests, unsigned count);
	/* Stores at most the depth of finished requests; waits for the first one if told to. */
	unsigned (*reap)(void *context, struct request **done, bool wait);
	void (*close)(void *context);
};

extern const struct engine SYNC, VSYNC, SYSCALL, INLINE, URING;
#ifndef NO_LIBS
extern const struct engine POSIXAIO, LIBAIO, LIBURING;
#endif

#ifndef __x86_64__
#error "the engines inline and uring are written for x86-64"
#endif

/* A system call that no library sees: the instruction stands in the caller. */
__attribute__((always_inline))
static inline long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#endif
