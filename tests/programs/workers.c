/*
 * The threads that write. Each has its own slots, requests and engine context.
 *
 *     slot     quiet -> filled -> open (races) -> its writes are reaped -> closed
 *     request  prepared -> submitted -> looked for, until it is done -> judged
 *
 * In mode clean a slot is open in between, and closed while a write is in flight.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OVERLAP_SPAN_BLOCKS 4

struct worker {
	unsigned number;
	uint64_t prepared, finished, count;	/* its writes */
	uint64_t random;
	unsigned slot_count;
	struct slot **slots;
	struct request *requests;	/* requests_per_slot() for each slot */
	struct request **batch, **done;	/* room for the depth */
	struct target target;
	void *context;			/* of the engine */
	struct mutator *mutator;
	struct record *records;
	struct sights sights;
	pthread_t thread;
};

static _Atomic uint32_t in_flight, most_in_flight;

/* ---- numbers that follow from the options ---- */

static unsigned depth(void)
{
	return options.engine->async ? (unsigned)options.depth : 1;
}

static unsigned requests_per_slot(void)
{
	return options.mode == OVERLAP && options.engine->async ? 2 : 1;
}

static unsigned slots_per_worker(void)
{
	return depth() / requests_per_slot();
}

unsigned slots_needed(void)
{
	return slots_per_worker() * (unsigned)options.threads;
}

uint64_t bytes_per_write(void)
{
	return options.mode == TWICE ? 2 * options.block : options.block;
}

/* ---- small things ---- */

/* How often this thread lost its CPU against its will. */
static long preemptions(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_nivcsw;
}

static void rest(void)
{
	if (options.rest_us)
		usleep((useconds_t)options.rest_us);
	else if (options.engine->async)
		sched_yield();
}

static void enter_flight(void)
{
	uint32_t mine = atomic_fetch_add(&in_flight, 1) + 1;
	uint32_t most = atomic_load(&most_in_flight);

	while (mine > most && !atomic_compare_exchange_weak(&most_in_flight, &most, mine))
		;
}

static uint64_t turn_of(const struct worker *worker)
{
	return worker->prepared * options.threads + worker->number;
}

/* ---- preparing ---- */

/* Side by side through the span; in mode overlap anywhere in a few blocks. */
static uint64_t choose_offset(struct worker *worker)
{
	uint64_t end = options.span;

	if (options.mode != OVERLAP)
		return turn_of(worker) % (end / bytes_per_write()) * bytes_per_write();
	if (end > OVERLAP_SPAN_BLOCKS * options.block)
		end = OVERLAP_SPAN_BLOCKS * options.block;
	worker->random = worker->random * 6364136223846793005ULL + 1442695040888963407ULL;
	return (worker->random >> 33) % ((end - options.block) / SECTOR + 1) * SECTOR;
}

/* New content for a new place; after it the buffer races, or (clean) is at rest. */
static void prepare_slot(struct worker *worker, struct slot *slot)
{
	slot_close(slot);
	slot->position = choose_offset(worker);
	fill(&content, slot->words, options.block, slot->position);
	slot_open(worker->mutator, slot);
	if (options.mode == CLEAN_MODE) {
		slot_await_change(worker->mutator, slot);
		slot_close(slot);
	}
}

/* The first write from a buffer goes where the buffer belongs, a second one anywhere. */
static void prepare_request(struct worker *worker, struct request *request, struct slot *slot)
{
	struct record *record = &worker->records[turn_of(worker)];

	request->slot = slot;
	request->offset = slot->unfinished++ == 0 ? slot->position : choose_offset(worker);
	request->length = bytes_per_write();
	request->segments[0] = (struct iovec){ slot->words, options.block };
	request->segments[1] = request->segments[0];
	request->segment_count = options.mode == TWICE ? 2 : 1;
	request->record = record;
	*record = (struct record){
		.index = (uint32_t)turn_of(worker),
		.thread = worker->number,
		.tid = (pid_t)syscall(SYS_gettid),
		.verdict = ABANDONED,
		.offset = request->offset,
		.length = request->length,
		.buffer = slot->words,
		.judgement = { .first = -1, .last = -1 },
	};
	worker->prepared++;
}

/* Fills worker->batch from slots that are at rest. */
static unsigned prepare_batch(struct worker *worker)
{
	unsigned count = 0, share = requests_per_slot();

	for (unsigned i = 0; i < worker->slot_count && count < options.batch; i++) {
		struct slot *slot = worker->slots[i];

		if (slot->unfinished > 0)
			continue;
		if (worker->prepared < worker->count)
			prepare_slot(worker, slot);
		for (unsigned j = 0; j < share && worker->prepared < worker->count; j++) {
			worker->batch[count] = &worker->requests[i * share + j];
			prepare_request(worker, worker->batch[count++], slot);
		}
	}
	return count;
}

/* ---- finishing ---- */

/* The part of the submitting call in which the kernel is certainly at work. */
static struct interval middle(const struct request *request)
{
	const struct record *record = request->record;
	uint64_t margin = (record->after_submit - record->before_submit) * options.margin / 100;

	if (!request->alone)
		return (struct interval){ 0, 0 };
	return (struct interval){ record->before_submit + margin, record->after_submit - margin };
}

static void judge(const struct request *request)
{
	struct record *record = request->record;
	const struct interval whole = { record->before_submit, record->reaped };
	const struct interval certain[2] = {
		middle(request),
		{ record->after_submit, record->pending },
	};
	struct judgement judgement = slot_judge(request->slot, whole, certain);

	record->judgement = judgement;
	record->reverted = options.mode == REVERT && judgement.certain + judgement.margin > 0;
	if (record->result < 0)
		record->verdict = FAILED;
	else if (judgement.certain > 0)
		record->verdict = CHANGED;
	else
		record->verdict = judgement.margin > 0 ? MAYBE : CLEAN;
}

static void finish(struct worker *worker, struct request *request, uint64_t before_reap,
		   uint64_t reaped)
{
	struct record *record = request->record;

	atomic_fetch_sub(&in_flight, 1);
	record->before_reap = before_reap;
	record->reaped = reaped;
	record->result = request->result;
	if (--request->slot->unfinished == 0)
		slot_close(request->slot);
	judge(request);
	worker->finished++;
	if (options.mode == CLEAN_MODE) { /* at rest, and changed at once */
		slot_open(worker->mutator, request->slot);
		if (options.mutator == MUTATOR_NONE)
			slot_await_change(worker->mutator, request->slot);
	}
}

/* ---- submitting and reaping ---- */

static void submit(struct worker *worker, struct request **requests, unsigned count)
{
	long before = preemptions();
	uint64_t begin, end;
	bool alone;

	for (unsigned i = 0; i < count; i++)
		enter_flight();
	begin = now();
	options.engine->submit(worker->context, requests, count);
	end = now();
	alone = count == 1 && preemptions() == before;
	for (unsigned i = 0; i < count; i++) {
		requests[i]->record->before_submit = begin;
		requests[i]->record->after_submit = end;
		requests[i]->alone = alone;
		if (!requests[i]->in_flight)
			finish(worker, requests[i], end, end);
	}
}

/* Returns how many: none if all slots are in use. */
static unsigned submit_batch(struct worker *worker)
{
	unsigned count = prepare_batch(worker);

	if (options.batch > 1 && count > 0)
		submit(worker, worker->batch, count);
	else /* in mode overlap there are two, nevertheless */
		for (unsigned i = 0; i < count; i++)
			submit(worker, &worker->batch[i], 1);
	return count;
}

/* What this look does not find was not done when it began. */
static unsigned look(struct worker *worker, bool wait)
{
	uint64_t before = now(), after, unfinished = 0;
	unsigned count = options.engine->reap(worker->context, worker->done, wait);

	after = now();
	for (unsigned i = 0; i < worker->target.depth; i++)
		if (worker->requests[i].in_flight) {
			worker->requests[i].record->pending = before;
			unfinished++;
		}
	worker->sights.looks++;
	worker->sights.unfinished += unfinished;
	if (unfinished > worker->sights.most_unfinished)
		worker->sights.most_unfinished = unfinished;
	for (unsigned i = 0; i < count; i++)
		finish(worker, worker->done[i], before, after);
	return count;
}

/* Whole batches only; the batch is not larger than the depth. */
static bool room_for_batch(const struct worker *worker)
{
	return worker->target.depth - (worker->prepared - worker->finished) >= options.batch;
}

static void write_all(struct worker *worker)
{
	worker->context = options.engine->open(&worker->target);
	while (worker->finished < worker->count) {
		while (room_for_batch(worker) && submit_batch(worker) > 0 && options.engine->async)
			;
		if (worker->prepared == worker->finished || look(worker, options.wait) == 0)
			rest();
	}
	options.engine->close(worker->context);
}

/* ---- mode abandon ---- */

static void *submit_and_end(void *argument)
{
	struct worker *worker = argument;

	while (submit_batch(worker) > 0)
		;
	return NULL;
}

/* Round by round a thread submits and ends; then its context is closed as it is. */
static void abandon_all(struct worker *worker)
{
	pthread_t thread;

	while (worker->prepared < worker->count) {
		worker->context = options.engine->open(&worker->target);
		if (pthread_create(&thread, NULL, submit_and_end, worker))
			die("no thread");
		pthread_join(thread, NULL);
		options.engine->close(worker->context);
		for (unsigned i = 0; i < worker->slot_count; i++) {
			slot_close(worker->slots[i]);
			atomic_fetch_sub(&in_flight, worker->slots[i]->unfinished);
			worker->slots[i]->unfinished = 0;
		}
		for (unsigned i = 0; i < worker->target.depth; i++)
			worker->requests[i].in_flight = false;
	}
}

/* ---- all of them ---- */

static void *work(void *argument)
{
	if (options.mode == ABANDON)
		abandon_all(argument);
	else
		write_all(argument);
	return NULL;
}

static void set_up(struct worker *worker, unsigned number, struct mutator *mutator, int fd,
		   struct record *records)
{
	*worker = (struct worker){
		.number = number,
		.count = options.count / options.threads +
			 (number < options.count % options.threads),
		.random = number,
		.slot_count = slots_per_worker(),
		.slots = allocate(slots_per_worker(), sizeof(struct slot *)),
		.requests = allocate(depth(), sizeof(struct request)),
		.batch = allocate(depth() + 1, sizeof(struct request *)),
		.done = allocate(depth(), sizeof(struct request *)),
		.target = { fd, depth(), options.fixed, mutator_memory(mutator) },
		.mutator = mutator,
		.records = records,
	};
	for (unsigned i = 0; i < worker->slot_count; i++) {
		worker->slots[i] = mutator_slot(mutator, number * worker->slot_count + i);
		for (unsigned j = 0; j < requests_per_slot(); j++) {
			unsigned id = i * requests_per_slot() + j;

			worker->requests[id].id = id;
		}
	}
}

static void tear_down(struct worker *worker)
{
	free(worker->slots);
	free(worker->requests);
	free(worker->batch);
	free(worker->done);
}

struct sights run_workers(struct mutator *mutator, int fd, struct record *records)
{
	struct worker *workers = allocate(options.threads, sizeof(struct worker));
	struct sights all = {0};

	for (unsigned i = 0; i < options.threads; i++) {
		set_up(&workers[i], i, mutator, fd, records);
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			die("no thread");
	}
	for (unsigned i = 0; i < options.threads; i++) {
		const struct sights *sights = &workers[i].sights;

		pthread_join(workers[i].thread, NULL);
		all.looks += sights->looks;
		all.unfinished += sights->unfinished;
		if (sights->most_unfinished > all.most_unfinished)
			all.most_unfinished = sights->most_unfinished;
		tear_down(&workers[i]);
	}
	free(workers);
	all.most_in_flight = atomic_load(&most_in_flight);
	return all;
}
