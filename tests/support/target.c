// A process whose memory the tests work on. target KIND MIB THREADS: maps a region (memfd, anon, private), fills each
// page with its number, prints "ready ADDRESS BYTES", then obeys lines on standard input:
//   r PAGE        print the first word of PAGE
//   w PAGE VALUE  write the first word of PAGE
//   t             read every page and print "touched SUM FAULTS"
//   g             start THREADS writers, each counting in a slot of its own in random pages
//   s             stop them and print "bad N of OPS": slots that differ from the thread's own count
//   k             print how many SIGUSR1 have come
//   q             end
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

static volatile uint8_t *region;
static size_t pages;
static volatile int stopping;
static volatile sig_atomic_t signals;

struct writer { pthread_t thread; int number; uint64_t operations, bad; };

static void on_signal(int number) { (void)number; signals++; }

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
    }
    for (size_t page = 0; page < pages; page++)
        if (*(volatile uint32_t *)(region + page * 4096 + 64 * (self->number + 1)) != expected[page]) self->bad++;
    free(expected);
    return NULL;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    size_t bytes = strtoul(arguments[2], NULL, 10) << 20;
    int threads = atoi(arguments[3]);
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (strcmp(arguments[1], "anon")) {
        fd = memfd_create("target", 0);
        if (fd < 0 || ftruncate(fd, bytes)) return 3;
        flags = strcmp(arguments[1], "private") ? MAP_SHARED : MAP_PRIVATE;
    }
    region = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (region == MAP_FAILED) return 4;
    pages = bytes / 4096;
    for (size_t page = 0; page < pages; page++) *(volatile uint64_t *)(region + page * 4096) = page;
    signal(SIGUSR1, on_signal);
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
        } else if (line[0] == 's') {
            stopping = 1;
            uint64_t operations = 0, bad = 0;
            for (int number = 0; number < threads; number++) {
                pthread_join(writers[number].thread, NULL);
                operations += writers[number].operations;
                bad += writers[number].bad;
            }
            printf("bad %lu of %lu\n", bad, operations);
        } else if (line[0] == 'k') {
            printf("%d\n", (int)signals);
        } else if (line[0] == 'q') {
            return 0;
        }
        fflush(stdout);
    }
    return 0;
}
