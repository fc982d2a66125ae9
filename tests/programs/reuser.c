/*
 * Writes from a buffer, and before the write is complete hands the buffer to a second I/O.
 *
 *   reuser FILE read|write|elsewhere TIMES
 *
 * The second one reads into the same buffer, which is a fault of the program; writes from it, which
 * is none; or reads into another. What is read is what was there: nothing changes by it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libaio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BYTES = 65536 };

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: reuser FILE read|write|elsewhere TIMES\n");
        return 2;
    }
    int fd = open(argv[1], O_RDWR | O_CREAT | O_DIRECT, 0600);
    io_context_t context = NULL;
    void *buffer, *other;
    if (fd < 0 || io_setup(8, &context) != 0 || posix_memalign(&buffer, 4096, BYTES) != 0 ||
        posix_memalign(&other, 4096, BYTES) != 0) {
        perror(argv[1]);
        return 1;
    }
    memset(buffer, 0x5a, BYTES);
    /* So that the read finds what the buffer holds. */
    if (pwrite(fd, buffer, BYTES, 0) != BYTES) {
        perror(argv[1]);
        return 1;
    }
    for (long i = atol(argv[3]); i > 0; i--) {
        struct iocb first, second, *both[] = {&first, &second};
        struct io_event events[2];
        io_prep_pwrite(&first, fd, buffer, BYTES, BYTES);
        if (strcmp(argv[2], "write") == 0)
            io_prep_pwrite(&second, fd, buffer, BYTES, 0);
        else
            io_prep_pread(&second, fd, strcmp(argv[2], "read") == 0 ? buffer : other, BYTES, 0);
        if (io_submit(context, 2, both) != 2 || io_getevents(context, 2, 2, events, NULL) != 2) {
            fprintf(stderr, "reuser: not submitted or not completed\n");
            return 1;
        }
    }
    return 0;
}
