/*
 * The log: a line of column names, then one line per write, separated by tabs.
 *
 *     index            of the write; lines are in this order
 *     thread, tid      who submitted it: number from 0; as the kernel knows it
 *     function         that submitted it
 *     offset, length   in the file, bytes
 *     buffer           address
 *     before_submit, after_submit, pending, before_reap, reaped
 *                      CLOCK_MONOTONIC, ns; pending: the last time at which it was
 *                      seen to be unfinished (0: never); reaped is 0 if it never was
 *     certain, margin  number of changes in flight; of others that may have been
 *     first, last      first and last byte of the buffer that they changed, or -1
 *     reverted         1: whoever changed it put the old bytes back at once
 *     verdict          clean | maybe | changed | failed | abandoned
 *     result           bytes, or -errno
 *
 * `changed` means that the buffer certainly differed in flight from what it was at
 * submission, and (unless reverted) still did when the write was done. `clean` means
 * that it certainly did not change at all. `maybe` is all between.
 */
#include "racer.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

const char *const VERDICT_NAMES[VERDICTS] = {
	[CLEAN] = "clean",   [MAYBE] = "maybe",		[CHANGED] = "changed",
	[FAILED] = "failed", [ABANDONED] = "abandoned",
};

static void write_line(FILE *log, const char *function, const struct record *record)
{
	const struct judgement *judgement = &record->judgement;

	fprintf(log, "%" PRIu32 "\t%" PRIu32 "\t%d\t%s\t%" PRIu64 "\t%" PRIu64 "\t%p",
		record->index, record->thread, (int)record->tid, function, record->offset,
		record->length, record->buffer);
	fprintf(log, "\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64,
		record->before_submit, record->after_submit, record->pending,
		record->before_reap, record->reaped);
	fprintf(log, "\t%" PRIu32 "\t%" PRIu32 "\t%" PRId64 "\t%" PRId64 "\t%d\t%s\t%" PRId64 "\n",
		judgement->certain, judgement->margin, judgement->first, judgement->last,
		record->reverted, VERDICT_NAMES[record->verdict], record->result);
}

void write_log(const char *path, const char *function, const struct record *records,
	       size_t count)
{
	FILE *log = fopen(path, "we");

	if (!log)
		die("%s: %s", path, strerror(errno));
	fputs("index\tthread\ttid\tfunction\toffset\tlength\tbuffer\tbefore_submit\t"
	      "after_submit\tpending\tbefore_reap\treaped\tcertain\tmargin\tfirst\tlast\t"
	      "reverted\tverdict\tresult\n", log);
	for (size_t i = 0; i < count; i++)
		write_line(log, function, &records[i]);
	if (ferror(log) | fclose(log))
		die("%s: %s", path, strerror(errno));
}
