/*
 * Slots, and the thread or process that changes open ones as fast as it can.
 *
 * A change is a run of live words that get a new version. The mutator notes of each
 * change a time before its first store and a time after its last one was visible to
 * all CPUs. Whoever wrote from the buffer asks later (slot_judge) how the changes lie
 * to what it knows of its write.
 *
 * The lock of a slot is held during a change, so a closed slot is a quiet one, and
 * the list of its changes is whole. A full list stops the changes: none is forgotten.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define SPINS_BEFORE_YIELD 2000
#define LONGEST_RUN (1 << 14)	/* words; less in small buffers */

/* What both sides see, in memory that a forked mutator shares. */
struct shared {
	_Atomic uint32_t running, stop;
	_Atomic uint32_t newest;	/* slot that was opened last */
	_Atomic uint32_t last_version;
	struct slot slots[];
};

struct mutator {
	enum mutator_kind kind;
	unsigned slot_count;
	bool reverting;
	struct iovec memory;
	struct shared *shared;
	const struct content *content;
	uint64_t *saved;	/* old words of a change that will be reverted */
	bool pinned;		/* to these CPUs, which are its own */
	cpu_set_t cpus;
	pthread_t thread;
	pid_t process;
};

static void relax(unsigned *spins)
{
	if (++*spins % SPINS_BEFORE_YIELD == 0)
		sched_yield();
	else
		__builtin_ia32_pause();
}

static void lock(struct slot *slot)
{
	unsigned spins = 0;

	while (atomic_exchange(&slot->lock, 1))
		relax(&spins);
}

static void unlock(struct slot *slot)
{
	atomic_store(&slot->lock, 0);
}

/* ---- making one ---- */

static void *map(size_t bytes, int flags, int fd)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (memory == MAP_FAILED)
		die("no memory: %s", strerror(errno));
	return memory;
}

static void *map_buffers(enum mutator_kind kind, size_t bytes)
{
	void *memory;
	int fd;

	if (kind != MUTATOR_PROCESS) {
		memory = map(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1);
	} else {
		fd = memfd_create("racer", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, (off_t)bytes))
			die("memfd: %s", strerror(errno));
		memory = map(bytes, MAP_SHARED | MAP_POPULATE, fd);
		close(fd);
	}
	return memory;
}

struct mutator *mutator_new(enum mutator_kind kind, unsigned slots, size_t bytes,
			    bool reverting)
{
	struct mutator *mutator = allocate(1, sizeof(*mutator));
	size_t shared = sizeof(struct shared) + slots * sizeof(struct slot);
	char *memory;

	memory = map_buffers(kind, slots * bytes);
	mutator->kind = kind;
	mutator->slot_count = slots;
	mutator->reverting = reverting;
	mutator->memory = (struct iovec){ memory, slots * bytes };
	mutator->shared = map(shared, MAP_SHARED | MAP_ANONYMOUS, -1);
	mutator->saved = allocate(LONGEST_RUN, sizeof(uint64_t));
	for (unsigned i = 0; i < slots; i++) {
		mutator->shared->slots[i].words = (uint64_t *)(memory + i * bytes);
		mutator->shared->slots[i].bytes = bytes;
	}
	return mutator;
}

struct slot *mutator_slot(struct mutator *mutator, unsigned index)
{
	return &mutator->shared->slots[index];
}

struct iovec mutator_memory(const struct mutator *mutator)
{
	return mutator->memory;
}

_Atomic uint32_t *mutator_last_version(struct mutator *mutator)
{
	return &mutator->shared->last_version;
}

/* ---- changes ---- */

static uint32_t random_below(uint32_t end)
{
	static _Thread_local uint64_t state = 1;

	state = state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(state >> 33) % end;
}

/* A run of words; at least as long as the pattern of live and quiet ones. */
static void choose_run(const struct slot *slot, struct change *change)
{
	uint32_t words = (uint32_t)(slot->bytes / 8);
	uint32_t most = words / 8 < LONGEST_RUN ? words / 8 : LONGEST_RUN;
	uint32_t length = 8 + random_below(most - 7);

	change->first = random_below(words - length + 1);
	change->last = change->first + length - 1;
	while (!word_is_live(slot->position + 8 * change->first))
		change->first++;
	while (!word_is_live(slot->position + 8 * change->last))
		change->last--;
}

/* Each word by one store of 8 bytes: no reader ever sees a part of it. */
static void store(struct slot *slot, uint32_t index, uint64_t word)
{
	((volatile uint64_t *)slot->words)[index] = word;
}

/* The caller holds the lock, and there is room for one more. */
static void make_change(struct mutator *mutator, struct slot *slot)
{
	const struct content *content = mutator->content;
	uint32_t count = atomic_load(&slot->count);
	struct change *change = &slot->changes[count];
	uint32_t version = atomic_fetch_add(content->last, 1) + 1;

	choose_run(slot, change);
	if (mutator->reverting)
		memcpy(mutator->saved, slot->words + change->first,
		       8 * (change->last - change->first + 1));
	change->start = now();
	for (uint32_t i = change->first; i <= change->last; i++)
		store(slot, i, word_value(content, slot->position + 8 * i, version));
	if (mutator->reverting)
		for (uint32_t i = change->first; i <= change->last; i++)
			store(slot, i, mutator->saved[i - change->first]);
	change->end = now();
	atomic_store(&slot->count, count + 1);
}

static bool try_change(struct mutator *mutator, struct slot *slot)
{
	bool may;

	if (!atomic_load(&slot->open) || atomic_load(&slot->count) == CHANGES_KEPT)
		return false;
	lock(slot);
	may = atomic_load(&slot->open) && atomic_load(&slot->count) < CHANGES_KEPT;
	if (may)
		make_change(mutator, slot);
	unlock(slot);
	return may;
}

/* Every other change is for the slot opened last: where a submission does all the
 * work, its write is the one that is really in flight. */
static void *mutate(void *argument)
{
	struct mutator *mutator = argument;
	struct shared *shared = mutator->shared;
	unsigned spins = 0, next = 0;
	bool changed;

	if (mutator->pinned)
		sched_setaffinity(0, sizeof(mutator->cpus), &mutator->cpus);
	atomic_store(&shared->running, 1);
	while (!atomic_load(&shared->stop)) {
		changed = try_change(mutator, &shared->slots[atomic_load(&shared->newest)]);
		changed |= try_change(mutator, &shared->slots[next++ % mutator->slot_count]);
		if (!changed)
			relax(&spins);
	}
	return NULL;
}

/* ---- its life ---- */

/* Gives the mutator a CPU, and this thread and those that it will start the others, if
 * there are enough: on the same CPU one of them would only run while the other rests. */
static void share_cpus(struct mutator *mutator, unsigned threads)
{
	cpu_set_t others;
	int cpu = CPU_SETSIZE - 1;

	if (sched_getaffinity(0, sizeof(others), &others) || CPU_COUNT(&others) <= (int)threads)
		return;
	while (!CPU_ISSET(cpu, &others))
		cpu--;
	CPU_CLR(cpu, &others);
	CPU_ZERO(&mutator->cpus);
	CPU_SET(cpu, &mutator->cpus);
	mutator->pinned = true;
	sched_setaffinity(0, sizeof(others), &others);
}

void mutator_start(struct mutator *mutator, const struct content *content, unsigned threads)
{
	pid_t parent = getpid();
	unsigned spins = 0;

	mutator->content = content;
	if (mutator->kind == MUTATOR_NONE)
		return;
	share_cpus(mutator, threads);
	if (mutator->kind == MUTATOR_THREAD) {
		if (pthread_create(&mutator->thread, NULL, mutate, mutator))
			die("no thread for the mutator");
	} else {
		mutator->process = fork();
		if (mutator->process < 0)
			die("fork: %s", strerror(errno));
		if (mutator->process == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() == parent)
				mutate(mutator);
			_exit(0);
		}
	}
	while (!atomic_load(&mutator->shared->running))
		relax(&spins);
}

void mutator_stop(struct mutator *mutator)
{
	atomic_store(&mutator->shared->stop, 1);
	if (mutator->kind == MUTATOR_THREAD)
		pthread_join(mutator->thread, NULL);
	else if (mutator->kind == MUTATOR_PROCESS)
		waitpid(mutator->process, NULL, 0);
}

/* ---- slots ---- */

void slot_open(struct mutator *mutator, struct slot *slot)
{
	lock(slot);
	atomic_store(&slot->count, 0);
	atomic_store(&slot->open, 1);
	unlock(slot);
	atomic_store(&mutator->shared->newest, (uint32_t)(slot - mutator->shared->slots));
}

void slot_close(struct slot *slot)
{
	atomic_store(&slot->open, 0); /* first: a busy mutator would take the lock again */
	lock(slot);
	unlock(slot);
}

void slot_await_change(struct mutator *mutator, struct slot *slot)
{
	unsigned spins = 0;

	if (mutator->kind == MUTATOR_NONE)
		try_change(mutator, slot);
	while (atomic_load(&slot->count) == 0)
		relax(&spins);
}

static bool lies_in(const struct change *change, struct interval interval)
{
	return change->start > interval.start && change->end < interval.end;
}

static void extend(struct judgement *judgement, const struct change *change)
{
	int64_t first = 8 * (int64_t)change->first, last = 8 * (int64_t)change->last + 7;

	if (judgement->first < 0 || first < judgement->first)
		judgement->first = first;
	if (last > judgement->last)
		judgement->last = last;
}

struct judgement slot_judge(struct slot *slot, struct interval whole,
			    const struct interval certain[2])
{
	struct judgement sure = { .first = -1, .last = -1 }, unsure = sure;

	lock(slot);
	for (uint32_t i = 0; i < atomic_load(&slot->count); i++) {
		const struct change *change = &slot->changes[i];

		if (change->end < whole.start || change->start > whole.end)
			continue;
		if (lies_in(change, certain[0]) || lies_in(change, certain[1])) {
			sure.certain++;
			extend(&sure, change);
		} else {
			unsure.margin++;
			extend(&unsure, change);
		}
	}
	unlock(slot);
	if (sure.certain == 0)
		return unsure;
	sure.margin = unsure.margin;
	return sure;
}
