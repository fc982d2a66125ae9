/*
 * Odd but legal uses of direct I/O, each with what came of it.
 *
 *   corners FILE [CASE...]
 *
 * Prints a line for each call: the case, what it returned, the error. The same program on the same
 * file system prints the same lines whether it runs under `stableio run` or not: that is the test.
 * What is written is read back through the page cache, and is part of the lines.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef RWF_ATOMIC
#define RWF_ATOMIC 0x40 /* linux/fs.h, since 6.11 */
#endif

enum { BLOCK = 4096 };

static const char *path;
static char *self;

static void say(const char *what, long result)
{
    int error = result < 0 ? errno : 0;
    printf("%s: %ld %s\n", what, result, error ? strerrorname_np(error) : "-");
    fflush(stdout);
}

static void *memory(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("corners: mmap");
        exit(1);
    }
    return at;
}

static int open_direct(void)
{
    int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0600);
    if (fd < 0) {
        perror(path);
        exit(1);
    }
    return fd;
}

/* The first byte of a block as the page cache has it; -1: not there. */
static int byte_at(long block)
{
    unsigned char byte = 0;
    int fd = open(path, O_RDONLY);
    long got = pread(fd, &byte, 1, block * BLOCK);
    close(fd);
    return got == 1 ? byte : -1;
}

static void say_block(const char *what, long result, long block)
{
    say(what, result);
    printf("%s holds %d\n", what, byte_at(block));
}

/* The instruction itself, which no name stands in front of. */
static __attribute__((noinline)) long inlined(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

/* ---- every way to write and read ---- */

static void ways(void)
{
    int fd = open_direct();
    char *buf = memory(2 * BLOCK);
    struct iovec two[2] = {{buf, BLOCK}, {buf + BLOCK, BLOCK}};
    memset(buf, 1, 2 * BLOCK);
    say_block("write", write(fd, buf, BLOCK), 0);
    memset(buf, 2, 2 * BLOCK);
    say_block("write again", write(fd, buf, BLOCK), 1);
    say("where", lseek(fd, 0, SEEK_CUR));
    memset(buf, 3, 2 * BLOCK);
    say_block("pwrite", pwrite(fd, buf, BLOCK, 2 * BLOCK), 2);
    memset(buf, 4, 2 * BLOCK);
    lseek(fd, 4 * BLOCK, SEEK_SET);
    say_block("writev", writev(fd, two, 2), 5);
    say_block("pwritev", pwritev(fd, two, 2, 6 * BLOCK), 7);
    say_block("pwritev2", pwritev2(fd, two, 2, 8 * BLOCK, RWF_DSYNC), 9);
    say_block("pwritev2 here", pwritev2(fd, two, 1, -1, 0), 6);
    say_block("syscall", syscall(SYS_pwrite64, fd, buf, BLOCK, 10L * BLOCK), 10);
    say_block("inlined", inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 11 * BLOCK), 11);
    two[1].iov_base = buf;
    say_block("one buffer twice", pwritev(fd, two, 2, 12 * BLOCK), 13);

    memset(buf, 0, 2 * BLOCK);
    lseek(fd, 0, SEEK_SET);
    say("read", read(fd, buf, BLOCK));
    printf("read got %d\n", buf[0]);
    say("pread", pread(fd, buf, BLOCK, 2 * BLOCK));
    printf("pread got %d\n", buf[0]);
    two[1].iov_base = buf + BLOCK;
    say("preadv", preadv(fd, two, 2, 4 * BLOCK));
    printf("preadv got %d %d\n", buf[0], buf[BLOCK]);
    say("inlined read", inlined(SYS_pread64, fd, (long)buf, BLOCK, 2 * BLOCK));
    printf("inlined read got %d\n", buf[0]);
    say("read at the end", pread(fd, buf, BLOCK, 1L << 40));
    say("long", pwrite(fd, memory(20 << 20), 20 << 20, 0));
    say("zero", pwrite(fd, buf, 0, 0));
    say("atomic", pwritev2(fd, two, 1, 0, RWF_ATOMIC));
    say("atomic, odd length", pwritev2(fd, two, 1, 512, RWF_ATOMIC));
    close(fd);
}

/* ---- every way to a descriptor ---- */

static void send_and_receive(int fd)
{
    int pair[2], got = -1;
    char byte = 0, control[CMSG_SPACE(sizeof got)] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    say("sendmsg", sendmsg(pair[0], &message, 0));
    /* A number that was plain before. */
    int plain = open("/dev/null", O_WRONLY);
    say("plain write", write(plain, "x", 1));
    close(plain);
    say("recvmsg", recvmsg(pair[1], &message, 0));
    memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof got);
    char *buf = memory(BLOCK);
    memset(buf, 21, BLOCK);
    say_block("received", pwrite(got, buf, BLOCK, 0), 0);
    close(got);
    close(pair[0]);
    close(pair[1]);
}

static void descriptors(void)
{
    char *buf = memory(BLOCK);
    struct open_how how = {.flags = O_RDWR | O_DIRECT};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    memset(buf, 11, BLOCK);
    say_block("openat2", pwrite(fd, buf, BLOCK, 0), 0);
    close(fd);
    fd = openat(AT_FDCWD, path, O_RDWR);
    int before = dup(fd);
    say("plain", pwrite(fd, buf + 1, 512, 0));
    say("plain dup", pwrite(before, buf + 1, 512, 0));
    say("F_SETFL", fcntl(fd, F_SETFL, O_DIRECT));
    say("F_GETFL", fcntl(fd, F_GETFL) & O_DIRECT ? 1 : 0);
    memset(buf, 12, BLOCK);
    say_block("after F_SETFL", pwrite(fd, buf, BLOCK, BLOCK), 1);
    memset(buf, 13, BLOCK);
    say_block("its dup", pwrite(before, buf, BLOCK, BLOCK), 1);
    int copies[] = {dup(fd), dup2(fd, 100), dup3(fd, 101, O_CLOEXEC), fcntl(fd, F_DUPFD, 200)};
    for (int i = 0; i < 4; i++) {
        memset(buf, 14 + i, BLOCK);
        say_block("dup", pwrite(copies[i], buf, BLOCK, BLOCK), 1);
        close(copies[i]);
    }
    send_and_receive(fd);
    say("off again", fcntl(fd, F_SETFL, 0));
    say("not direct any more", pwrite(fd, buf + 1, 100, 0));
    close(fd);
    say("closed", pwrite(fd, buf, BLOCK, 0));
    fd = (int)inlined(SYS_openat, AT_FDCWD, (long)path, O_RDWR | O_DIRECT, 0);
    memset(buf, 18, BLOCK);
    say_block("inlined openat", inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 0), 0);
    say("inlined close", inlined(SYS_close, fd, 0, 0, 0));
    say("no such file", open("/nonexistent/x", O_RDWR | O_DIRECT));
    say("a directory", open("/", O_RDWR | O_DIRECT));
}

/* ---- what must fail, and how ---- */

/* Addresses that the compiler must not see through. */
static void *volatile nowhere, *volatile low = (void *)8;

static void errors(void)
{
    int fd = open_direct();
    char *buf = memory(3 * BLOCK);
    mprotect(buf + BLOCK, BLOCK, PROT_NONE);
    struct iovec bad[3] = {{buf, BLOCK}, {buf + BLOCK, BLOCK}, {buf + 2 * BLOCK, BLOCK}};
    say("null", pwrite(fd, nowhere, BLOCK, 0));
    say("unreadable", pwrite(fd, buf + BLOCK, BLOCK, 0));
    say("bad vector", pwritev(fd, low, 2, 0));
    say("too many", pwritev(fd, memory(2000 * sizeof *bad), 2000, 0));
    say("read to nowhere", pread(fd, buf + BLOCK, BLOCK, 0));
    say("misaligned length", pwrite(fd, buf, 100, 0));
    say("misaligned memory", pwrite(fd, buf + 1, 512, 0));
    say("misaligned offset", pwrite(fd, buf, BLOCK, 1));
    say("negative offset", pwrite(fd, buf, BLOCK, -1));
    say("unknown flag", pwritev2(fd, bad, 1, 0, 0x40000000));
    int readonly = open(path, O_RDONLY | O_DIRECT);
    say("read only", pwrite(readonly, buf, BLOCK, 0));
    say("no descriptor", pwrite(999, buf, BLOCK, 0));
    close(readonly);
    close(fd);
}

/* A vector with a hole fails at once, here; without help a part may have been written. */
static void faults(void)
{
    int fd = open_direct();
    char *buf = memory(3 * BLOCK);
    mprotect(buf + BLOCK, BLOCK, PROT_NONE);
    struct iovec bad[3] = {{buf, BLOCK}, {buf + BLOCK, BLOCK}, {buf + 2 * BLOCK, BLOCK}};
    long failed = 0;
    for (int i = 0; i < 100000; i++)
        failed += pwritev(fd, bad, 3, 0) == -1 && errno == EFAULT;
    printf("faults: %ld\n", failed);
    close(fd);
}

/* ---- signals ---- */

static sigjmp_buf out;

static void jump_out(int signal)
{
    siglongjmp(out, signal);
}

static void count_signal(int signal)
{
    (void)signal;
}

static void signals(void)
{
    int fd = open_direct();
    char *buf = memory(2 * BLOCK);
    mprotect(buf + BLOCK, BLOCK, PROT_NONE);
    struct sigaction action = {.sa_handler = jump_out}, old;
    sigfillset(&action.sa_mask);
    say("sigaction", sigaction(SIGSEGV, &action, NULL));
    for (int i = 0; i < 3; i++) {
        int signal = sigsetjmp(out, 1);
        if (signal == 0) {
            ((volatile char *)buf)[BLOCK] = 1;
            printf("no fault\n");
        } else {
            printf("own fault %d\n", signal);
        }
        say("between faults", pwrite(fd, buf + BLOCK, BLOCK, 0));
    }
    say("asked back", sigaction(SIGSEGV, NULL, &old));
    printf("same handler %d\n", old.sa_handler == jump_out);
    say("raise", sigsetjmp(out, 1) == 0 ? raise(SIGSEGV) : 7);
    signal(SIGSYS, count_signal);
    printf("signal gives back %d\n", signal(SIGSYS, SIG_DFL) == count_signal);
    sigset_t all;
    sigfillset(&all);
    say("block all", sigprocmask(SIG_BLOCK, &all, NULL));
    memset(buf, 31, BLOCK);
    say_block("inlined, all blocked", inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 0), 0);
    say("fault, all blocked", pwrite(fd, buf + BLOCK, BLOCK, 0));
    long mask = -1;
    say("inlined mask", inlined(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, 8));
    memset(buf, 32, BLOCK);
    say_block("inlined again", inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 0), 0);
    sigprocmask(SIG_UNBLOCK, &all, NULL);
    close(fd);
}

/* An inlined call that blocks is interrupted as ever. */
static void interrupted(void)
{
    int pipes[2];
    char byte;
    struct sigaction action = {.sa_handler = count_signal};
    sigaction(SIGALRM, &action, NULL);
    if (pipe(pipes) != 0)
        exit(1);
    ualarm(20000, 0);
    say("interrupted", inlined(SYS_read, pipes[0], (long)&byte, 1, 0));
    action.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &action, NULL);
    pid_t child = fork();
    if (child == 0) {
        usleep(100000);
        _exit(write(pipes[1], "x", 1) == 1 ? 0 : 1);
    }
    ualarm(20000, 0);
    say("restarted", inlined(SYS_read, pipes[0], (long)&byte, 1, 0));
    waitpid(child, NULL, 0);
}

/* ---- threads and processes ---- */

static void *write_inlined(void *arg)
{
    int fd = *(int *)arg;
    char *buf = memory(BLOCK);
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    memset(buf, 41, BLOCK);
    return (void *)inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 0);
}

static void threads(void)
{
    int fd = open_direct();
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    for (int i = 0; i < 3; i++) {
        pthread_t thread;
        void *result;
        pthread_create(&thread, &small, write_inlined, &fd);
        pthread_join(thread, &result);
        say_block("thread", (long)result, 0);
    }
    close(fd);
}

static void finish(const char *what, pid_t child)
{
    int status = 0;
    waitpid(child, &status, 0);
    printf("%s: exit %d\n", what, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    printf("%s holds %d\n", what, byte_at(0));
}

static int write_one(int fd, int value)
{
    char *buf = memory(BLOCK);
    memset(buf, value, BLOCK);
    int by_name = pwrite(fd, buf, BLOCK, 0) == BLOCK;
    return by_name && inlined(SYS_pwrite64, fd, (long)buf, BLOCK, 0) == BLOCK ? 0 : 1;
}

static void processes(void)
{
    int fd = open_direct();
    char number[16];
    snprintf(number, sizeof number, "%d", fd);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(write_one(fd, 51));
    finish("fork", child);
    child = (pid_t)inlined(SYS_fork, 0, 0, 0, 0);
    if (child == 0)
        _exit(write_one(fd, 52));
    finish("inlined fork", child);
    child = vfork();
    if (child == 0) {
        execl(self, self, path, "inherit", number, "53", NULL);
        _exit(127);
    }
    finish("vfork and exec", child);
    char *const empty[] = {NULL}, *const args[] = {self, (char *)path, "inherit", number, "54", NULL};
    child = fork();
    if (child == 0) {
        execve(self, args, empty);
        _exit(127);
    }
    finish("exec without environment", child);
    posix_spawn(&child, self, NULL, NULL, args, empty);
    finish("posix_spawn", child);
    close(fd);
}

/* Reads and writes in two processes and a thread at once, while this one forks. */
static volatile int stop;

static void *keep_writing(void *arg)
{
    char *buf = memory(BLOCK);
    long failed = 0;
    while (!stop)
        failed += pwrite(*(int *)arg, buf, BLOCK, BLOCK) != BLOCK;
    return (void *)failed;
}

static void forks(void)
{
    int fd = open_direct(), failed = 0;
    pthread_t thread;
    void *result;
    pthread_create(&thread, NULL, keep_writing, &fd);
    fflush(stdout);
    for (int i = 0; i < 200; i++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(write_one(fd, i));
        waitpid(child, &status, 0);
        failed += status != 0;
    }
    stop = 1;
    pthread_join(thread, &result);
    printf("forks: %d failed, %ld writes failed\n", failed, (long)result);
    close(fd);
}

/* ---- the program ---- */

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"ways", ways},           {"descriptors", descriptors}, {"errors", errors},
    {"faults", faults},       {"signals", signals},         {"interrupted", interrupted},
    {"threads", threads},     {"processes", processes},     {"forks", forks},
};

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: corners FILE [CASE...]\n");
        return 2;
    }
    self = realpath("/proc/self/exe", NULL);
    path = argv[1];
    if (argc == 5 && strcmp(argv[2], "inherit") == 0)
        return write_one(atoi(argv[3]), atoi(argv[4]));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int wanted = argc == 2;
        for (int j = 2; j < argc; j++)
            wanted |= strcmp(argv[j], cases[i].name) == 0;
        if (wanted)
            cases[i].run();
    }
    return 0;
}
