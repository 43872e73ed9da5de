// A process whose memory the tests work on. target KIND MIB THREADS: maps a region (memfd, anon, private; hugetlb, a memfd
// of 2 MiB pages; thp, a memfd that asks for large pages), fills each
// page with its number, prints "ready ADDRESS BYTES", then obeys lines on standard input:
//   r PAGE        print the first word of PAGE
//   w PAGE VALUE  write the first word of PAGE
//   i PAGE VALUE  add VALUE to the first word of PAGE, and print it
//   t             read every page and print "touched SUM FAULTS"
//   g             start THREADS writers, each counting in a slot of its own in random pages
//   p MICROS      have writers rest so long between two writes
//   s             stop them and print "bad N of OPS": slots that differ from the thread's own count
//   n             start a thread that writes 1, 2, 3 and so on, each to the second word of a page of its own
//   e             stop it and print the last number
//   k             print how many SIGUSR1 have come, and the value that the last one carried
//   d PAGE COUNT  MADV_DONTNEED of COUNT pages
//   b             block all signals in this thread
//   u             become nobody, without capabilities
//   f             have a seccomp filter trap getppid
//   c             fork a child that reads every page, and print "child SUM"
//   m             move the region elsewhere, and print where it is
//   x             execute this program again, which prints "ready" again
//   q             end
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/memfd.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile uint8_t *region;
static size_t pages;
static volatile int stopping, rest;
static volatile sig_atomic_t signals;

struct writer { pthread_t thread; int number; uint64_t operations, bad; };

static volatile sig_atomic_t value_sent;

static void on_signal(int number, siginfo_t *info, void *context) {
    (void)number; (void)context;
    signals++;
    value_sent = info->si_value.sival_int;
}

static int trap_getppid(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static void *write_randomly(void *argument) {
    struct writer *self = argument;
    uint32_t *expected = calloc(pages, sizeof *expected);
    uint64_t state = 88172645463325252ull + 7919 * self->number;
    while (!stopping) {
        state ^= state << 13; state ^= state >> 7; state ^= state << 17;
        size_t page = state % pages;
        volatile uint32_t *slot = (volatile uint32_t *)(region + page * 4096 + 64 * (self->number + 1));
        *slot += 1;
        expected[page]++;
        self->operations++;
        if (rest) usleep(rest);
    }
    for (size_t page = 0; page < pages; page++)
        if (*(volatile uint32_t *)(region + page * 4096 + 64 * (self->number + 1)) != expected[page]) self->bad++;
    free(expected);
    return NULL;
}

static volatile uint64_t sequence;

static void *write_in_order(void *argument) {
    (void)argument;
    while (!stopping) {
        uint64_t next = sequence + 1;
        *(volatile uint64_t *)(region + next * 7919 % pages * 4096 + 8) = next;
        sequence = next;
    }
    return NULL;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    size_t bytes = strtoul(arguments[2], NULL, 10) << 20;
    int threads = atoi(arguments[3]);
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (strcmp(arguments[1], "anon")) {
        fd = memfd_create("target", strcmp(arguments[1], "hugetlb") ? 0 : MFD_HUGETLB | MFD_HUGE_2MB);
        if (fd < 0 || ftruncate(fd, bytes)) return 3;
        flags = strcmp(arguments[1], "private") ? MAP_SHARED : MAP_PRIVATE;
    }
    region = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (region == MAP_FAILED) return 4;
    if (!strcmp(arguments[1], "thp") && madvise((void *)region, bytes, MADV_HUGEPAGE)) return 5;
    pages = bytes / 4096;
    for (size_t page = 0; page < pages; page++) *(volatile uint64_t *)(region + page * 4096) = page;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    printf("ready %p %zu\n", (void *)region, bytes);
    fflush(stdout);
    struct writer writers[16] = {0};
    char line[64];
    unsigned long page, value;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "r %lu", &page) == 1) {
            printf("%lu\n", *(volatile uint64_t *)(region + page * 4096));
        } else if (sscanf(line, "w %lu %lu", &page, &value) == 2) {
            *(volatile uint64_t *)(region + page * 4096) = value;
            printf("written\n");
        } else if (sscanf(line, "i %lu %lu", &page, &value) == 2) {
            printf("%lu\n", *(volatile uint64_t *)(region + page * 4096) += value);
        } else if (line[0] == 't') {
            struct rusage before, after;
            getrusage(RUSAGE_SELF, &before);
            uint64_t sum = 0;
            for (page = 0; page < pages; page++) sum += *(volatile uint64_t *)(region + page * 4096);
            getrusage(RUSAGE_SELF, &after);
            printf("touched %lu %ld\n", sum, after.ru_minflt - before.ru_minflt);
        } else if (line[0] == 'g') {
            stopping = 0;
            for (int number = 0; number < threads; number++) {
                writers[number] = (struct writer){.number = number};
                pthread_create(&writers[number].thread, NULL, write_randomly, &writers[number]);
            }
            printf("going\n");
        } else if (sscanf(line, "p %lu", &value) == 1) {
            rest = value;
            printf("resting\n");
        } else if (line[0] == 's') {
            stopping = 1;
            uint64_t operations = 0, bad = 0;
            for (int number = 0; number < threads; number++) {
                pthread_join(writers[number].thread, NULL);
                operations += writers[number].operations;
                bad += writers[number].bad;
            }
            printf("bad %lu of %lu\n", bad, operations);
        } else if (line[0] == 'n') {
            stopping = 0;
            pthread_create(&writers[0].thread, NULL, write_in_order, NULL);
            printf("going\n");
        } else if (line[0] == 'e') {
            stopping = 1;
            pthread_join(writers[0].thread, NULL);
            printf("%lu\n", sequence);
        } else if (line[0] == 'k') {
            printf("%d %d\n", (int)signals, (int)value_sent);
        } else if (sscanf(line, "d %lu %lu", &page, &value) == 2) {
            printf("%d\n", madvise((void *)(region + page * 4096), value * 4096, MADV_DONTNEED));
        } else if (line[0] == 'b') {
            sigset_t all;
            sigfillset(&all);
            printf("%d\n", sigprocmask(SIG_SETMASK, &all, NULL));
        } else if (line[0] == 'u') {
            printf("%d\n", setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534));
        } else if (line[0] == 'f') {
            printf("%d\n", trap_getppid());
        } else if (line[0] == 'c') {
            int ends[2];
            uint64_t sum = 0;
            if (pipe(ends)) return 6;
            pid_t child = fork();
            if (child == 0) {
                for (page = 0; page < pages; page++) sum += *(volatile uint64_t *)(region + page * 4096);
                _exit(write(ends[1], &sum, sizeof sum) != sizeof sum);
            }
            if (read(ends[0], &sum, sizeof sum) != sizeof sum) return 7;
            waitpid(child, NULL, 0);
            close(ends[0]);
            close(ends[1]);
            printf("child %lu\n", sum);
        } else if (line[0] == 'm') {
            void *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            region = mremap((void *)region, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, room);
            printf("%p\n", (void *)region);
        } else if (line[0] == 'x') {
            execv("/proc/self/exe", arguments);
            return 5;
        } else if (line[0] == 'q') {
            return 0;
        }
        fflush(stdout);
    }
    return 0;
}
