/*
 * racer: a program that changes its buffers while it writes from them, and knows when.
 *
 * It writes a file through one of many interfaces (--engine). Meanwhile a thread or a
 * process (--mutator) changes the buffers of writes in flight. For each write the
 * program logs (--log) whether its buffer
 *
 *     changed   certainly in flight,
 *     is clean  certainly did not change at all, or
 *     maybe     changed, but so near to the submission or the completion that
 *               nobody can say on which side.
 *
 * It can read the file back (--verify) and count blocks that hold what it never wrote.
 * So it judges both who looks for such changes and who makes them harmless.
 *
 * When a change is certainly in flight
 * ------------------------------------
 * A change has a time before its first store and one after its last store was visible.
 * Both must lie
 *
 *   - in the middle of the call that submits this write and no other: not in the first
 *     or last part of its time (--margin), and only if nobody preempted the thread
 *     meanwhile; there the kernel is at work on it; or
 *   - (asynchronous engines) between the return of that call and the last time at which
 *     the program saw that the write was not done.
 *
 * Whoever takes a copy as the call begins, and compares as the write is done, sees it:
 * a word never gets a value that it had before, except in mode revert.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SPAN_MAX (256ULL << 20)
#define EVERYWHERE (~0ULL)	/* a period that no file reaches */
#define SETTLE_US 200000

static const char USAGE[] =
	"Usage: racer [options] FILE\n"
	"\n"
	"Writes FILE while the buffers change, and says which writes that hit.\n"
	"\n"
	"  --engine NAME     sync (default), vsync, syscall, inline, posixaio, libaio,\n"
	"                    liburing, uring (no library, inlined system calls)\n"
	"  --mode MODE       race (default)\n"
	"                    clean: buffers change only just before and after a write\n"
	"                    twice: each write is a vector of twice the same buffer\n"
	"                    overlap: writes in flight overlap in the file and, with an\n"
	"                    asynchronous engine, each buffer is in two of them\n"
	"                    revert: each change is undone at once\n"
	"                    abandon: threads submit and end; nobody reaps\n"
	"  --mutator WHO     thread (default), process or none changes the buffers\n"
	"  --block BYTES     of a buffer, 4096 (default) to 1048576\n"
	"  --count N         writes (1000)\n"
	"  --span BYTES      region of the file (the count's blocks, at most 256 MiB)\n"
	"  --depth D         writes in flight per thread, asynchronous engines (8)\n"
	"  --batch N         writes per submission, asynchronous engines (1)\n"
	"  --threads T       that submit (1)\n"
	"  --direct, --buffered\n"
	"                    with O_DIRECT (default) or through the page cache\n"
	"  --fixed           io_uring: registered buffers and file\n"
	"  --wait            wait for completions in the kernel, instead of looking for them\n"
	"  --rest US         pause after a look that found nothing, or a synchronous write\n"
	"  --margin PERCENT  of a submitting call at both ends that is uncertain (20)\n"
	"  --log FILE        one line per write\n"
	"  --verify[=buffered]\n"
	"                    read all back (with O_DIRECT) and count bad blocks of 4 KiB\n"
	"  --check VERSION   write nothing, only verify what a run with the same options\n"
	"                    left, whose summary says this last_version\n"
	"  --help            this text\n"
	"\n"
	"Prints a summary in JSON. Sizes may end in K, M or G.\n";

static const char *const MODE_NAMES[MODES + 1] = {
	[RACE] = "race",       [CLEAN_MODE] = "clean", [TWICE] = "twice",
	[OVERLAP] = "overlap", [REVERT] = "revert",    [ABANDON] = "abandon",
};

static const char *const MUTATOR_NAMES[] = {
	[MUTATOR_NONE] = "none", [MUTATOR_THREAD] = "thread",
	[MUTATOR_PROCESS] = "process", NULL,
};

static const struct engine *const ENGINES[] = {
	&SYNC, &VSYNC, &SYSCALL, &INLINE, &URING,
#ifndef NO_LIBS
	&POSIXAIO, &LIBAIO, &LIBURING,
#endif
	NULL,
};

struct options options = {
	.engine = &SYNC, .mutator = MUTATOR_THREAD, .block = SECTOR, .count = 1000,
	.depth = 8, .batch = 1, .threads = 1, .margin = 20,
};

struct content content;

/* ---- what all files use ---- */

noreturn void die(const char *format, ...)
{
	va_list args;
	char line[512];

	va_start(args, format);
	vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	fprintf(stderr, "racer: %s\n", line);
	_exit(1); /* at once, of any thread: others may be in the middle of a write */
}

uint64_t now(void)
{
	struct timespec time;

	atomic_thread_fence(memory_order_seq_cst);
	clock_gettime(CLOCK_MONOTONIC, &time);
	atomic_thread_fence(memory_order_seq_cst);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

void *allocate(size_t count, size_t bytes)
{
	void *memory = calloc(count, bytes);

	if (!memory)
		die("no memory");
	return memory;
}

/* ---- options ---- */

static noreturn void misuse(const char *format, ...)
	__attribute__((format(printf, 1, 2)));

static noreturn void misuse(const char *format, ...)
{
	va_list args;

	fputs("racer: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputs(" (see --help)\n", stderr);
	exit(2);
}

static uint64_t parse_number(const char *option, const char *text)
{
	static const char units[] = "KMG";
	char *end, *unit;
	uint64_t number;

	errno = 0;
	number = strtoull(text, &end, 10);
	unit = *end ? strchr(units, *end) : NULL;
	if (unit) {
		number <<= 10 * (unit - units + 1);
		end++;
	}
	if (end == text || *end || errno || *text == '-')
		misuse("--%s: %s is no number", option, text);
	return number;
}

static unsigned parse_name(const char *option, const char *text, const char *const *names)
{
	for (unsigned i = 0; names[i]; i++)
		if (!strcmp(text, names[i]))
			return i;
	misuse("--%s: there is no %s", option, text);
}

static const struct engine *parse_engine(const char *text)
{
	for (unsigned i = 0; ENGINES[i]; i++)
		if (!strcmp(text, ENGINES[i]->name))
			return ENGINES[i];
	misuse("--engine: there is no %s", text);
}

enum option_key {
	ENGINE = 1, MODE, MUTATOR, BLOCK, COUNT, SPAN, DEPTH, BATCH, THREADS, DIRECT, BUFFERED,
	FIXED, WAIT, REST, MARGIN, LOG, VERIFY, CHECK, HELP,
};

static const struct option OPTIONS[] = {
	{ "engine", required_argument, NULL, ENGINE },
	{ "mode", required_argument, NULL, MODE },
	{ "mutator", required_argument, NULL, MUTATOR },
	{ "block", required_argument, NULL, BLOCK },
	{ "count", required_argument, NULL, COUNT },
	{ "span", required_argument, NULL, SPAN },
	{ "depth", required_argument, NULL, DEPTH },
	{ "batch", required_argument, NULL, BATCH },
	{ "threads", required_argument, NULL, THREADS },
	{ "direct", no_argument, NULL, DIRECT },
	{ "buffered", no_argument, NULL, BUFFERED },
	{ "fixed", no_argument, NULL, FIXED },
	{ "wait", no_argument, NULL, WAIT },
	{ "rest", required_argument, NULL, REST },
	{ "margin", required_argument, NULL, MARGIN },
	{ "log", required_argument, NULL, LOG },
	{ "verify", optional_argument, NULL, VERIFY },
	{ "check", required_argument, NULL, CHECK },
	{ "help", no_argument, NULL, HELP },
	{ 0 },
};

static void set_verify(const char *how)
{
	if (how && strcmp(how, "direct") && strcmp(how, "buffered"))
		misuse("--verify: there is no %s", how);
	options.verify = true;
	options.verify_buffered = how && !strcmp(how, "buffered");
}

static void set_switch(int key, const char *unknown)
{
	switch (key) {
	case DIRECT: options.buffered = false; break;
	case BUFFERED: options.buffered = true; break;
	case FIXED: options.fixed = true; break;
	case WAIT: options.wait = true; break;
	case HELP: fputs(USAGE, stdout); exit(0);
	default: misuse("what is %s?", unknown);
	}
}

static void set_option(int key, const char *name, const char *text, const char *unknown)
{
	switch (key) {
	case ENGINE: options.engine = parse_engine(text); break;
	case MODE: options.mode = parse_name(name, text, MODE_NAMES); break;
	case MUTATOR: options.mutator = parse_name(name, text, MUTATOR_NAMES); break;
	case BLOCK: options.block = parse_number(name, text); break;
	case COUNT: options.count = parse_number(name, text); break;
	case SPAN: options.span = parse_number(name, text); break;
	case DEPTH: options.depth = parse_number(name, text); break;
	case BATCH: options.batch = parse_number(name, text); break;
	case THREADS: options.threads = parse_number(name, text); break;
	case REST: options.rest_us = parse_number(name, text); break;
	case MARGIN: options.margin = parse_number(name, text); break;
	case LOG: options.log = text; break;
	case VERIFY: set_verify(text); break;
	case CHECK:
		options.last_version = parse_number(name, text);
		options.check = options.verify = true;
		break;
	default: set_switch(key, unknown);
	}
}

static void require(bool condition, const char *what)
{
	if (!condition)
		misuse("%s", what);
}

static void check_options(void)
{
	const struct engine *engine = options.engine;
	uint64_t depth = engine->async ? options.depth : 1;

	require(options.block >= SECTOR && options.block <= 1 << 20 && options.block % SECTOR == 0,
		"--block: 4096 to 1048576, a multiple of 4096");
	require(options.count <= 100000000, "--count: at most 100000000");
	require(options.depth >= 1 && options.depth <= 1024, "--depth: 1 to 1024");
	require(options.threads >= 1 && options.threads <= 256, "--threads: 1 to 256");
	require(options.batch >= 1 && options.batch <= depth, "--batch: 1 to the depth");
	require(options.margin < 50, "--margin: 0 to 49");
	require(options.span >= bytes_per_write() && options.span % SECTOR == 0,
		"--span: at least one write, a multiple of 4096");
	require(!options.fixed || engine->fixed, "--fixed needs an io_uring engine");
	require(!options.fixed || options.mode != TWICE, "--fixed excludes vectors");
	require(options.mode != TWICE || engine->vectors, "this engine has no vectors");
	require(options.mode != ABANDON || engine->async, "abandon needs an asynchronous engine");
	require(options.mode != OVERLAP || engine->async || options.threads > 1,
		"overlap needs an asynchronous engine or --threads");
	require(options.mode != OVERLAP || !engine->async || depth % 2 == 0,
		"overlap needs an even --depth");
}

static void parse_options(int argc, char **argv)
{
	int key, index = 0;

	opterr = 0;
	while ((key = getopt_long(argc, argv, "", OPTIONS, &index)) != -1)
		set_option(key, OPTIONS[index].name, optarg, argv[optind - 1]);
	require(optind == argc - 1, "one FILE is needed");
	options.file = argv[optind];
	if (options.span == 0) {
		options.span = options.count * bytes_per_write();
		if (options.span > DEFAULT_SPAN_MAX)
			options.span = DEFAULT_SPAN_MAX;
		if (options.span < bytes_per_write())
			options.span = bytes_per_write();
	}
	check_options();
}

/* ---- the run ---- */

/* Where one buffer is written to several places its words know only their place in a
 * sector; and what was abandoned may be written after its buffer was filled anew. */
static uint64_t period(void)
{
	bool many_places = options.mode == TWICE || options.mode == OVERLAP ||
			   options.mode == ABANDON;

	return many_places ? SECTOR : EVERYWHERE;
}

static int open_file(void)
{
	int flags = O_RDWR | O_CLOEXEC | (options.buffered ? 0 : O_DIRECT);
	int fd = open(options.file, flags);

	if (fd < 0)
		die("%s: %s", options.file, strerror(errno));
	return fd;
}

static double race(struct mutator *mutator, struct record *records, struct sights *sights)
{
	uint64_t begin;
	int fd;

	prepare_file(&content, options.file, options.span);
	/* It is forked here, before there are threads, rings and an open file. */
	mutator_start(mutator, &content, (unsigned)options.threads);
	fd = open_file();
	begin = now();
	*sights = run_workers(mutator, fd, records);
	begin = now() - begin;
	mutator_stop(mutator);
	if (options.mode == ABANDON)
		usleep(SETTLE_US); /* some of it may still be on its way */
	fsync(fd);
	close(fd);
	return (double)begin / 1e9;
}

/* ---- the summary ---- */

struct tally {
	uint64_t verdicts[VERDICTS], reverted, short_writes;
	int64_t first_error;
};

static struct tally count_records(const struct record *records)
{
	struct tally tally = {0};

	for (uint64_t i = 0; i < options.count; i++) {
		const struct record *record = &records[i];

		tally.verdicts[record->verdict]++;
		tally.reverted += record->reverted;
		if (record->verdict == FAILED && tally.first_error == 0)
			tally.first_error = -record->result;
		else if (record->verdict < FAILED && record->result != (int64_t)record->length)
			tally.short_writes++;
	}
	return tally;
}

static void print_writes(const struct tally *tally, const struct sights *sights)
{
	printf(", \"writes\": %" PRIu64, options.count);
	for (int i = 0; i < VERDICTS; i++)
		printf(", \"%s\": %" PRIu64, i == FAILED ? "errors" : VERDICT_NAMES[i],
		       tally->verdicts[i]);
	printf(", \"reverted\": %" PRIu64 ", \"short\": %" PRIu64 ", \"first_error\": ",
	       tally->reverted, tally->short_writes);
	if (tally->first_error)
		printf("\"%s\"", strerrorname_np((int)tally->first_error));
	else
		printf("null");
	printf(", \"max_in_flight\": %" PRIu64 ", \"max_pending\": %" PRIu64
	       ", \"mean_pending\": %.2f",
	       sights->most_in_flight, sights->most_unfinished,
	       sights->looks ? (double)sights->unfinished / (double)sights->looks : 0);
}

static void print_damage(void)
{
	struct damage damage;

	if (!options.verify) {
		printf(", \"bad_blocks\": null, \"read_errors\": null");
		return;
	}
	damage = verify_file(&content, options.file, options.span, !options.verify_buffered);
	printf(", \"bad_blocks\": %" PRIu64 ", \"read_errors\": %" PRIu64, damage.bad_blocks,
	       damage.read_errors);
}

static void print_name(void)
{
	printf("{\"engine\": \"%s\", \"function\": \"%s\", \"mode\": \"%s\", \"mutator\": \"%s\"",
	       options.engine->name, options.engine->function, MODE_NAMES[options.mode],
	       MUTATOR_NAMES[options.mutator]);
	printf(", \"block\": %" PRIu64 ", \"depth\": %" PRIu64 ", \"threads\": %" PRIu64,
	       options.block, options.engine->async ? options.depth : 1, options.threads);
}

/* Only what a run left is verified; the versions that it gave out are those up to its last. */
static void check(void)
{
	_Atomic uint32_t last = (uint32_t)options.last_version;

	content.last = &last;
	print_name();
	print_damage();
	printf("}\n");
}

int main(int argc, char **argv)
{
	struct mutator *mutator;
	struct record *records;
	struct sights sights;
	struct tally tally;
	double seconds;

	parse_options(argc, argv);
	content.period = period();
	if (options.check) {
		check();
		return 0;
	}
	mutator = mutator_new(options.mutator, slots_needed(), options.block,
			      options.mode == REVERT);
	content.last = mutator_last_version(mutator);
	records = allocate(options.count + 1, sizeof(*records));
	seconds = race(mutator, records, &sights);
	tally = count_records(records);
	if (options.log)
		write_log(options.log, options.engine->function, records, options.count);
	print_name();
	print_writes(&tally, &sights);
	print_damage();
	printf(", \"last_version\": %" PRIu32 ", \"seconds\": %.3f}\n",
	       atomic_load(content.last), seconds);
	return 0;
}
