/*
 * The guest of the vhost-user-blk tests: PID 1 of a Linux that has nothing
 * else. It works on /dev/vda with O_DIRECT, says on the serial console what it
 * did, ends with `GUEST OK` or `GUEST FAIL reason`, and powers off.
 * run.sh starts it; build.sh packs it.
 *
 * The pattern
 * -----------
 * The disk is seen as 8-byte little-endian words. The word at byte offset
 * `off` (a multiple of 8, counted from the start of the disk) under `seed` is
 *
 *     word(seed, off) = splitmix64(off ^ (seed << 48))
 *
 *     splitmix64(x): x += 0x9e3779b97f4a7c15
 *                    x  = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
 *                    x  = (x ^ (x >> 27)) * 0x94d049bb133111eb
 *                    x ^ (x >> 31)
 *
 * (64-bit, wrapping), so a word tells its place as well as its seed.
 *
 * What lies where (needs 64 MiB)
 * ------------------------------
 *      offset  what
 *      0       untouched (a boot sector may live here)
 *      1 MiB   seed 1: single writes of 512 B to 1 MiB, table `SIZES`
 *      8 MiB   seed 2: one pwritev of many segments of odd sizes
 *     10 MiB   seed 3: one page named by four segments of one pwritev
 *     12 MiB   seed 4: 4 MiB, two threads on two CPUs, 4 KiB blocks interleaved
 *     16 MiB   seed 5: 2 MiB, the middle discarded
 *     20 MiB   seed 6: 2 MiB, parts of it zeroed
 *     24 MiB   seed 8: 4 MiB, raced writes inside, table `RACES`
 *     48 MiB   seed 7: 1 MiB written by the host before the boot; compared
 *              when the kernel command line has `guest.prefilled`, else unused
 *
 * The host need not know the table. After the self test the guest prints, for
 * every range it leaves behind, one of
 *
 *     EXPECT pattern off=O len=L seed=S as=A   word at O+i is word(S, A+i)
 *     EXPECT zero off=O len=L                  zeros
 *     EXPECT discarded off=O len=L seed=S      each word zero or word(S, own offset)
 *     EXPECT race off=O len=L first=F count=N  each word is word(s, own offset)
 *                                              for some F <= s < F+N
 *
 * The ranges are disjoint; everything was flushed. Numbers are decimal.
 * Other lines: DISK (what the guest sees), READ (FNV-1a 64 of places it read
 * before it wrote), STEP (progress, milliseconds since boot), RACE (in how many
 * of the rounds the buffer changed while the write was in flight, and how many
 * stored blocks were a mixture; if it never changed at all the test failed, for
 * then nothing was tested).
 *
 * On a read-only disk the guest prints DISK and READ lines, compares the
 * prefilled range if told to, sees that it can not write, and is done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define KIB 1024ULL
#define MIB (1024 * KIB)
#define DISK "/dev/vda"
#define RACE_FIRST 100
#define RACE_SEEDS 4

static int fd = -1;        /* the disk, O_DIRECT */
static uint64_t size, lbs; /* of the disk; of its logical block */

/* ---- the end ---- */

static void power_off(void)
{
	fflush(stdout);
	tcdrain(1); /* the console is a UART: the last line may still be queued */
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

__attribute__((format(printf, 1, 2), noreturn))
static void fail(const char *why, ...)
{
	/* Two threads may fail at once; one of them says why. */
	static int failed;
	va_list args;

	if (__atomic_exchange_n(&failed, 1, __ATOMIC_SEQ_CST))
		for (;;)
			pause();
	printf("GUEST FAIL ");
	va_start(args, why);
	vprintf(why, args);
	va_end(args);
	printf("\n");
	power_off();
	__builtin_unreachable();
}

static void step(const char *what)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	printf("STEP %lld %s\n", (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000, what);
}

/* ---- the pattern ---- */

static uint64_t word(uint64_t seed, uint64_t off)
{
	uint64_t x = off ^ (seed << 48);

	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static void fill(void *buf, uint64_t seed, uint64_t off, uint64_t len)
{
	uint64_t *words = buf;

	for (uint64_t i = 0; i < len / 8; i++)
		words[i] = word(seed, off + 8 * i);
}

static void compare(const char *what, const void *buf, uint64_t seed, uint64_t as, uint64_t off,
		    uint64_t len)
{
	const uint64_t *words = buf;

	for (uint64_t i = 0; i < len / 8; i++)
		if (words[i] != word(seed, as + 8 * i))
			fail("%s: offset %llu holds %016llx, not %016llx (range %llu+%llu, seed %llu)",
			     what, (unsigned long long)(off + 8 * i), (unsigned long long)words[i],
			     (unsigned long long)word(seed, as + 8 * i), (unsigned long long)off,
			     (unsigned long long)len, (unsigned long long)seed);
}

/* ---- I/O that does all or fails ---- */

static void *memory(uint64_t len)
{
	void *buf;

	if (posix_memalign(&buf, 4096, len))
		fail("no memory for %llu bytes", (unsigned long long)len);
	memset(buf, 0, len);
	return buf;
}

static void put(const char *what, const void *buf, uint64_t off, uint64_t len)
{
	ssize_t done = pwrite(fd, buf, len, off);

	if (done != (ssize_t)len)
		fail("%s: write %llu+%llu: %zd %s", what, (unsigned long long)off,
		     (unsigned long long)len, done, done < 0 ? strerror(errno) : "short");
}

static void get(const char *what, void *buf, uint64_t off, uint64_t len)
{
	/* Stale contents must not pass for what was read. */
	memset(buf, 0xee, len);
	ssize_t done = pread(fd, buf, len, off);

	if (done != (ssize_t)len)
		fail("%s: read %llu+%llu: %zd %s", what, (unsigned long long)off,
		     (unsigned long long)len, done, done < 0 ? strerror(errno) : "short");
}

static void flush(const char *what)
{
	if (fsync(fd))
		fail("%s: flush: %s", what, strerror(errno));
}

static void put_pattern(const char *what, uint64_t seed, uint64_t off, uint64_t len)
{
	void *buf = memory(len);

	fill(buf, seed, off, len);
	put(what, buf, off, len);
	free(buf);
}

static void check_pattern(const char *what, uint64_t seed, uint64_t off, uint64_t len)
{
	void *buf = memory(len);

	get(what, buf, off, len);
	compare(what, buf, seed, off, off, len);
	free(buf);
}

static void check_zero(const char *what, uint64_t off, uint64_t len)
{
	uint64_t *buf = memory(len);

	get(what, buf, off, len);
	for (uint64_t i = 0; i < len / 8; i++)
		if (buf[i])
			fail("%s: offset %llu holds %016llx, not zero", what,
			     (unsigned long long)(off + 8 * i), (unsigned long long)buf[i]);
	free(buf);
}

/* ---- what the host is told ---- */

static char *expected;
static size_t expected_len;
static FILE *expect;

static void expect_pattern(uint64_t off, uint64_t len, uint64_t seed, uint64_t as)
{
	if (len)
		fprintf(expect, "EXPECT pattern off=%llu len=%llu seed=%llu as=%llu\n",
			(unsigned long long)off, (unsigned long long)len,
			(unsigned long long)seed, (unsigned long long)as);
}

/* ---- the system ---- */

static void load_modules(void)
{
	char path[64];

	/* build.sh names them in the order in which they can be loaded. */
	for (int i = 0;; i++) {
		snprintf(path, sizeof path, "/modules/%02d.ko", i);
		int module = open(path, O_RDONLY | O_CLOEXEC);
		if (module < 0)
			return;
		if (syscall(SYS_finit_module, module, "", 0) && errno != EEXIST)
			fail("module %d: %s", i, strerror(errno));
		close(module);
	}
}

static void start(void)
{
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	if (mount("dev", "/dev", "devtmpfs", 0, NULL) || mount("proc", "/proc", "proc", 0, NULL) ||
	    mount("sys", "/sys", "sysfs", 0, NULL))
		power_off();
	/* The archive holds no device nodes, so PID 1 began without a console. */
	int console = open("/dev/console", O_RDWR);
	dup2(console, 0);
	dup2(console, 1);
	dup2(console, 2);
	setvbuf(stdout, NULL, _IOLBF, 0);
	step("kernel up");
	load_modules();
	/* Disks are found while the module loads, or a little later. */
	for (int wait = 0; access(DISK, F_OK); wait++) {
		if (wait == 1000)
			fail("no %s after ten seconds", DISK);
		usleep(10 * 1000);
	}
}

static int told(const char *option)
{
	char line[4096] = "";
	int file = open("/proc/cmdline", O_RDONLY);

	if (file < 0 || read(file, line, sizeof line - 1) < 0)
		fail("/proc/cmdline: %s", strerror(errno));
	close(file);
	return strstr(line, option) != NULL;
}

static const char *attribute(const char *name)
{
	static char value[256];
	char path[128];

	snprintf(path, sizeof path, "/sys/block/vda/%s", name);
	memset(value, 0, sizeof value);
	int file = open(path, O_RDONLY);
	if (file < 0)
		return "none";
	/* Some fail to be read (a device without a serial number): empty. */
	if (read(file, value, sizeof value - 1) < 0)
		value[0] = 0;
	close(file);
	value[strcspn(value, "\n")] = 0;
	return value;
}

static void describe(void)
{
	static const char *const names[] = {
		"ro", "serial", "queue/logical_block_size", "queue/physical_block_size",
		"queue/minimum_io_size", "queue/optimal_io_size", "queue/max_segments",
		"queue/max_sectors_kb", "queue/discard_max_bytes", "queue/discard_granularity",
		"queue/write_zeroes_max_bytes", "queue/write_cache", "queue/fua",
	};
	unsigned queues = 0;
	char path[64];

	printf("DISK size=%llu\n", (unsigned long long)size);
	for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
		const char *base = strrchr(names[i], '/');
		printf("DISK %s=%s\n", base ? base + 1 : names[i], attribute(names[i]));
	}
	do
		snprintf(path, sizeof path, "/sys/block/vda/mq/%u", queues);
	while (!access(path, F_OK) && ++queues);
	printf("DISK queues=%u\n", queues);
}

/* A device that calls itself write-through gets no flush from the kernel, and
 * fsync would test nothing. Where it lets the driver choose (CONFIG_WCE), choose
 * write-back. */
static void write_back(void)
{
	int file = open("/sys/block/vda/cache_type", O_WRONLY | O_CLOEXEC);

	if (strcmp(attribute("queue/write_cache"), "write back") == 0 || file < 0)
		return;
	int done = write(file, "write back", 10) == 10;
	close(file);
	printf("DISK write_cache_chosen=%s\n", done ? attribute("queue/write_cache") : "refused");
}

/* ---- the tests ---- */

static void test_reads(void)
{
	const struct { uint64_t off, len; } places[] = {
		{ 0, lbs }, { lbs, lbs }, { 4096, 4096 }, { MIB - lbs, 2 * lbs }, { 0, MIB },
		{ size - lbs, lbs },
	};
	unsigned char *buf = memory(MIB);

	step("reads");
	for (unsigned i = 0; i < sizeof places / sizeof *places; i++) {
		uint64_t hash = 0xcbf29ce484222325ULL;
		get("read", buf, places[i].off, places[i].len);
		for (uint64_t k = 0; k < places[i].len; k++)
			hash = (hash ^ buf[k]) * 0x100000001b3ULL;
		printf("READ off=%llu len=%llu fnv1a=%016llx\n", (unsigned long long)places[i].off,
		       (unsigned long long)places[i].len, (unsigned long long)hash);
	}
	/* Past the end nothing may be there, and the queue must survive it. */
	if (pread(fd, buf, lbs, size) != 0)
		fail("read past the end of the disk did not end");
	free(buf);
	if (told("guest.prefilled")) {
		check_pattern("prefilled", 7, 48 * MIB, MIB);
		expect_pattern(48 * MIB, MIB, 7, 48 * MIB);
	}
}

/* Offsets from 1 MiB. Sizes the logical block does not divide are left out. */
static const struct { uint64_t off, len; } SIZES[] = {
	{ 0, 512 }, { 512, 512 }, { 3584, 512 }, /* same 4 KiB block, which keeps a hole */
	{ 4096, 4096 }, { 8192, 1024 }, { 12288 + 512, 4096 }, { 20480, 8192 },
	{ 32768, 4096 + 512 }, { 65536, 65536 }, { 131072 + 3584, 65536 + 1024 },
	{ 262144, 524288 - 512 }, { MIB, MIB }, { 2 * MIB + 512, MIB }, { 4 * MIB - 4096, 131072 },
};

static void test_sizes(void)
{
	step("sizes");
	for (int pass = 0; pass < 2; pass++) {
		for (unsigned i = 0; i < sizeof SIZES / sizeof *SIZES; i++) {
			uint64_t off = MIB + SIZES[i].off, len = SIZES[i].len;
			if (off % lbs || len % lbs)
				continue;
			if (pass == 0) {
				put_pattern("sizes", 1, off, len);
				continue;
			}
			check_pattern("sizes", 1, off, len);
			expect_pattern(off, len, 1, off);
		}
		flush("sizes");
	}
}

static void test_vectors(void)
{
	enum { SEGMENTS = 48 };
	struct iovec out[SEGMENTS], in[SEGMENTS];
	uint64_t off = 8 * MIB, len = 0;

	step("vectors");
	for (int i = 0; i < SEGMENTS; i++) {
		uint64_t part = lbs * (1 + (i * 7) % 11);
		/* Each segment in memory of its own, shifted inside its page. */
		char *from = memory(part + 4096), *to = memory(part + 4096);
		from += lbs * (i % 4) % 4096;
		to += lbs * ((i + 1) % 4) % 4096;
		fill(from, 2, off + len, part);
		out[i] = (struct iovec){ from, part };
		in[i] = (struct iovec){ to, part };
		len += part;
	}
	if (pwritev(fd, out, SEGMENTS, off) != (ssize_t)len)
		fail("pwritev of %llu bytes: %s", (unsigned long long)len, strerror(errno));
	if (preadv(fd, in, SEGMENTS, off) != (ssize_t)len)
		fail("preadv of %llu bytes: %s", (unsigned long long)len, strerror(errno));
	uint64_t at = off;
	for (int i = 0; i < SEGMENTS; at += in[i++].iov_len)
		compare("vectors", in[i].iov_base, 2, at, at, in[i].iov_len);
	expect_pattern(off, len, 2, off);
}

static void test_alias(void)
{
	uint64_t off = 10 * MIB;
	char *page = memory(4096), *back = memory(4 * 4096);
	struct iovec same[4];

	step("alias");
	fill(page, 3, off, 4096);
	for (int i = 0; i < 4; i++)
		same[i] = (struct iovec){ page, 4096 };
	if (pwritev(fd, same, 4, off) != 4 * 4096)
		fail("pwritev of one page four times: %s", strerror(errno));
	get("alias", back, off, 4 * 4096);
	for (int i = 0; i < 4; i++) {
		compare("alias", back + i * 4096, 3, off, off + i * 4096, 4096);
		expect_pattern(off + i * 4096, 4096, 3, off);
	}
	free(page);
	free(back);
}

/* Each CPU submits to its own queue. Neighbouring blocks go through
 * different ones, so a parity row sees both. */
static void *parallel_half(void *which)
{
	uintptr_t cpu = (uintptr_t)which;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set); /* with one CPU it stays where it is */
	for (uint64_t block = cpu; block < 1024; block += 2) {
		put_pattern("parallel", 4, 12 * MIB + block * 4096, 4096);
		if (block % 256 == cpu)
			flush("parallel");
	}
	return NULL;
}

static void test_parallel(void)
{
	pthread_t threads[2];

	step("parallel");
	for (uintptr_t i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, parallel_half, (void *)i))
			fail("no thread");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	flush("parallel");
	check_pattern("parallel", 4, 12 * MIB, 4 * MIB);
	expect_pattern(12 * MIB, 4 * MIB, 4, 12 * MIB);
}

static void test_discard(void)
{
	uint64_t off = 16 * MIB, len = 2 * MIB;
	uint64_t range[2] = { off + 256 * KIB, MIB };

	step("discard");
	put_pattern("discard", 5, off, len);
	if (strtoull(attribute("queue/discard_max_bytes"), NULL, 10) == 0) {
		printf("DISK discard=unsupported\n");
		check_pattern("discard", 5, off, len);
		expect_pattern(off, len, 5, off);
		return;
	}
	if (ioctl(fd, BLKDISCARD, range))
		fail("discard %llu+%llu: %s", (unsigned long long)range[0],
		     (unsigned long long)range[1], strerror(errno));
	uint64_t *buf = memory(MIB), zeros = 0;
	get("discard", buf, range[0], range[1]);
	for (uint64_t i = 0; i < MIB / 8; i++)
		if (buf[i] == 0)
			zeros++;
		else if (buf[i] != word(5, range[0] + 8 * i))
			fail("discard: offset %llu holds %016llx, neither zero nor what was written",
			     (unsigned long long)(range[0] + 8 * i), (unsigned long long)buf[i]);
	free(buf);
	printf("DISK discard=%s\n", zeros == MIB / 8 ? "zeros" : zeros ? "mixed" : "kept");
	check_pattern("before discard", 5, off, range[0] - off);
	check_pattern("after discard", 5, range[0] + range[1], off + len - range[0] - range[1]);
	expect_pattern(off, range[0] - off, 5, off);
	fprintf(expect, "EXPECT discarded off=%llu len=%llu seed=5\n",
		(unsigned long long)range[0], (unsigned long long)range[1]);
	expect_pattern(range[0] + range[1], off + len - range[0] - range[1], 5,
		       range[0] + range[1]);
}

static void test_zero(void)
{
	uint64_t off = 20 * MIB, at = off;
	uint64_t ranges[][2] = {
		{ off + 4096, lbs }, { off + 64 * KIB, 256 * KIB }, { off + MIB + lbs, 128 * KIB + lbs },
	};

	step("zero");
	put_pattern("zero", 6, off, 2 * MIB);
	for (int i = 0; i < 3; i++)
		if (ioctl(fd, BLKZEROOUT, ranges[i]))
			fail("zero %llu+%llu: %s", (unsigned long long)ranges[i][0],
			     (unsigned long long)ranges[i][1], strerror(errno));
	for (int i = 0; i < 3; i++) {
		check_pattern("before zero", 6, at, ranges[i][0] - at);
		expect_pattern(at, ranges[i][0] - at, 6, at);
		check_zero("zero", ranges[i][0], ranges[i][1]);
		fprintf(expect, "EXPECT zero off=%llu len=%llu\n",
			(unsigned long long)ranges[i][0], (unsigned long long)ranges[i][1]);
		at = ranges[i][0] + ranges[i][1];
	}
	check_pattern("after zero", 6, at, off + 2 * MIB - at);
	expect_pattern(at, off + 2 * MIB - at, 6, at);
}

/* ---- raced writes ---- */

/* Offsets from 24 MiB, ascending. What is between keeps seed 8. */
static const struct { uint64_t off, len; unsigned rounds; } RACES[] = {
	{ 4096 + 512, 512, 40 }, { 8192, 4096, 80 }, { 16384 + 512, 4096, 40 },
	{ 65536, 65536, 30 }, { MIB - 4096, MIB, 8 },
};

static unsigned races_met; /* writes during which the buffer changed */

static struct {
	uint64_t *buf, *versions[RACE_SEEDS];
	uint64_t words;
	unsigned long stores; /* words stored so far */
	int stop;
} racer;

static void *race(void *unused)
{
	(void)unused;
	for (unsigned turn = 0; !__atomic_load_n(&racer.stop, __ATOMIC_ACQUIRE); turn++) {
		const uint64_t *version = racer.versions[turn % RACE_SEEDS];
		for (uint64_t i = 0; i < racer.words; i++) {
			__atomic_store_n(&racer.buf[i], version[i], __ATOMIC_RELAXED);
			__atomic_store_n(&racer.stores, racer.stores + 1, __ATOMIC_RELAXED);
		}
	}
	return NULL;
}

/* How many words are of another version than the first; fails if one is of none. */
static uint64_t mixed(const uint64_t *back, uint64_t off)
{
	uint64_t others = 0;
	int first = -1;

	for (uint64_t i = 0; i < racer.words; i++) {
		int version = 0;
		while (version < RACE_SEEDS && back[i] != racer.versions[version][i])
			version++;
		if (version == RACE_SEEDS)
			fail("race: offset %llu holds %016llx, which nobody stored there",
			     (unsigned long long)(off + 8 * i), (unsigned long long)back[i]);
		if (first < 0)
			first = version;
		others += version != first;
	}
	return others;
}

static void race_at(uint64_t off, uint64_t len, unsigned rounds)
{
	unsigned changed = 0, torn = 0;
	uint64_t *back = memory(len);
	pthread_t thread;

	racer.buf = memory(len);
	racer.words = len / 8;
	racer.stop = 0;
	for (int i = 0; i < RACE_SEEDS; i++) {
		racer.versions[i] = memory(len);
		fill(racer.versions[i], RACE_FIRST + i, off, len);
	}
	memcpy(racer.buf, racer.versions[0], len);
	if (pthread_create(&thread, NULL, race, NULL))
		fail("no thread");
	for (unsigned i = 0; i < rounds; i++) {
		unsigned long before = __atomic_load_n(&racer.stores, __ATOMIC_RELAXED);
		put("race", racer.buf, off, len);
		changed += before != __atomic_load_n(&racer.stores, __ATOMIC_RELAXED);
		get("race", back, off, len);
		torn += mixed(back, off) != 0;
	}
	__atomic_store_n(&racer.stop, 1, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	printf("RACE off=%llu len=%llu rounds=%u changed=%u torn=%u\n", (unsigned long long)off,
	       (unsigned long long)len, rounds, changed, torn);
	races_met += changed;
	fprintf(expect, "EXPECT race off=%llu len=%llu first=%d count=%d\n",
		(unsigned long long)off, (unsigned long long)len, RACE_FIRST, RACE_SEEDS);
	for (int i = 0; i < RACE_SEEDS; i++)
		free(racer.versions[i]);
	free(racer.buf);
	free(back);
}

static void test_races(void)
{
	uint64_t start = 24 * MIB, end = start + 4 * MIB, at = start;

	step("races");
	for (uint64_t off = start; off < end; off += MIB)
		put_pattern("neighbours", 8, off, MIB);
	for (unsigned i = 0; i < sizeof RACES / sizeof *RACES; i++) {
		uint64_t off = start + RACES[i].off, len = RACES[i].len;
		if (off % lbs || len % lbs)
			continue;
		race_at(off, len, RACES[i].rounds);
		/* What lies beside a raced block belongs to somebody else. */
		check_pattern("neighbours", 8, at, off - at);
		expect_pattern(at, off - at, 8, at);
		at = off + len;
	}
	check_pattern("neighbours", 8, at, end - at);
	expect_pattern(at, end - at, 8, at);
	/* On a host with one CPU a short write may be over before the racer runs. */
	if (!races_met)
		fail("race: the buffer never changed while a write was in flight");
}

/* Some kernels refuse the open, some let it pass and refuse the write. */
static void test_read_only(void)
{
	void *buf = memory(lbs);
	int again = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);

	step("read only");
	if (again >= 0 && pwrite(again, buf, lbs, 0) >= 0)
		fail("a write to the read-only disk passed");
	free(buf);
}

int main(void)
{
	start();
	expect = open_memstream(&expected, &expected_len);

	int writable = atoi(attribute("ro")) == 0;
	fd = open(DISK, (writable ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		fail("open %s: %s", DISK, strerror(errno));
	int block;
	if (ioctl(fd, BLKGETSIZE64, &size) || ioctl(fd, BLKSSZGET, &block))
		fail("size of %s: %s", DISK, strerror(errno));
	lbs = block;
	describe();
	if (size < 64 * MIB)
		fail("the disk has %llu bytes, the test needs 64 MiB", (unsigned long long)size);

	test_reads();
	if (writable) {
		write_back();
		test_sizes();
		test_vectors();
		test_alias();
		test_parallel();
		test_discard();
		test_zero();
		test_races();
		flush("end");
	} else {
		test_read_only();
	}
	fclose(expect);
	fputs(expected, stdout);
	step("done");
	printf("GUEST OK\n");
	power_off();
}
