/*
 * Reads a file with O_DIRECT while a thread changes the buffer all the time.
 *
 *   reader FILE READS [BYTES]
 *
 * Storage that verifies what it read in the reader's memory finds what nobody stored, and fails
 * reads of data that is whole. Prints one JSON object: reads, and those that failed or were short.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static volatile unsigned long *buffer;
static size_t bytes = 65536;
static atomic_int stop;

static void *change(void *unused)
{
    (void)unused;
    for (unsigned long value = 1; !atomic_load_explicit(&stop, memory_order_relaxed); value++)
        buffer[value * 509 % (bytes / sizeof value)] = value;
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: reader FILE READS [BYTES]\n");
        return 2;
    }
    long reads = atol(argv[2]), failed = 0, cut = 0;
    if (argc > 3)
        bytes = strtoul(argv[3], NULL, 10);
    int fd = open(argv[1], O_RDONLY | O_DIRECT);
    struct stat stat;
    void *memory;
    pthread_t mutator;
    if (fd < 0 || fstat(fd, &stat) != 0 || posix_memalign(&memory, 4096, bytes) != 0) {
        perror(argv[1]);
        return 1;
    }
    buffer = memory;
    long blocks = stat.st_size / (long)bytes;
    if (blocks == 0 || pthread_create(&mutator, NULL, change, NULL) != 0) {
        fprintf(stderr, "reader: nothing to read, or no thread\n");
        return 1;
    }
    for (long i = 0; i < reads; i++) {
        ssize_t got = pread(fd, memory, bytes, i % blocks * (long)bytes);
        failed += got < 0;
        cut += got >= 0 && (size_t)got < bytes;
    }
    atomic_store(&stop, 1);
    pthread_join(mutator, NULL);
    printf("{\"reads\": %ld, \"failed\": %ld, \"short\": %ld}\n", reads, failed, cut);
    return 0;
}
