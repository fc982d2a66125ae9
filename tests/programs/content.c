/*
 * The content of buffers and file.
 *
 * It consists of aligned 8-byte words. A word has a place (its byte offset in the
 * file, modulo the period) and is either quiet or live:
 *
 *     quiet    the same bytes for ever
 *     live     bits 0 to 31: a version; bits 32 to 63: a hash of place and version
 *
 * Versions are given out once, so a word never gets a value back that it had. And
 * any word read back tells whether the program ever stored it there: the hash must
 * be that of its place and version, and the version must have been given out.
 *
 * Words that are changed together share their version: a compressor that reads a page
 * while it changes finds repetitions (and only half the words are live, for it must
 * find enough of them to keep its result). What it then stores, if it reads a byte
 * twice, is a version with another version's hash.
 */
#define _GNU_SOURCE
#include "racer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define QUIET 0x2020202020202020ULL
#define CHUNK (1 << 20)

bool word_is_live(uint64_t position)
{
	return position / 8 % 8 < 4;
}

uint64_t word_value(const struct content *content, uint64_t position, uint32_t version)
{
	uint64_t place = position % content->period;
	uint64_t hash;

	if (!word_is_live(place))
		return QUIET;
	hash = place * 0x9e3779b97f4a7c15ULL + version * 0xd1b54a32d192ed03ULL;
	hash = (hash ^ (hash >> 32)) * 0xbf58476d1ce4e5b9ULL;
	return (hash & 0xffffffff00000000ULL) | version;
}

static bool was_stored(const struct content *content, uint64_t position, uint64_t word)
{
	uint32_t version = (uint32_t)word;

	if (!word_is_live(position % content->period))
		return word == QUIET;
	return version <= atomic_load(content->last) &&
	       word == word_value(content, position, version);
}

static void fill_version(const struct content *content, uint64_t *words, size_t bytes,
			 uint64_t position, uint32_t version)
{
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = word_value(content, position + 8 * i, version);
}

void fill(const struct content *content, uint64_t *words, size_t bytes, uint64_t position)
{
	fill_version(content, words, bytes, position, atomic_fetch_add(content->last, 1) + 1);
}

static uint64_t *chunk_new(void)
{
	void *chunk = aligned_alloc(SECTOR, CHUNK);

	if (!chunk)
		die("no memory");
	return chunk;
}

static size_t chunk_at(uint64_t offset, uint64_t span)
{
	return span - offset < CHUNK ? span - offset : CHUNK;
}

void prepare_file(const struct content *content, const char *path, uint64_t span)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	uint64_t *chunk = chunk_new();

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	for (uint64_t at = 0; at < span; at += CHUNK) {
		size_t length = chunk_at(at, span);

		fill_version(content, chunk, length, at, 0);
		errno = ENOSPC; /* what a short write would mean */
		if (pwrite(fd, chunk, length, at) != (ssize_t)length)
			die("%s: %s", path, strerror(errno));
	}
	if (fsync(fd))
		die("%s: %s", path, strerror(errno));
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	close(fd);
	free(chunk);
}

static bool is_damaged(const struct content *content, const uint64_t *words, uint64_t position)
{
	for (size_t i = 0; i < SECTOR / 8; i++)
		if (!was_stored(content, position + 8 * i, words[i]))
			return true;
	return false;
}

struct damage verify_file(const struct content *content, const char *path, uint64_t span,
			  bool direct)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
	uint64_t *chunk = chunk_new();
	struct damage damage = {0};

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	for (uint64_t at = 0; at < span; at += CHUNK) {
		size_t length = chunk_at(at, span);
		bool whole = pread(fd, chunk, length, at) == (ssize_t)length;

		/* A chunk that can not be read whole is read sector by sector. */
		for (size_t i = 0; i < length; i += SECTOR) {
			uint64_t *words = chunk + i / 8;

			if (!whole && pread(fd, words, SECTOR, at + i) != SECTOR) {
				damage.read_errors++;
				damage.bad_blocks++;
			} else if (is_damaged(content, words, at + i)) {
				damage.bad_blocks++;
			}
		}
	}
	close(fd);
	free(chunk);
	return damage;
}
