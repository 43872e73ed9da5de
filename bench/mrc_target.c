// A process whose page accesses are known. mrc_target FILE PAGES WORK: maps PAGES pages of shared memory, and touches
// them in the order that FILE gives (32-bit page numbers, over and over), each touch followed by WORK steps of a small
// computation over the page; every other touch writes. There is no sleep in it. Prints "ready ADDRESS", then obeys
// lines on standard input: each line is answered by "AT TIME CPU", the number of touches begun so far, CLOCK_MONOTONIC
// and this thread's processor time in nanoseconds, while the touching goes on.
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int file = open(arguments[1], O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status)) return 3;
    size_t length = status.st_size / 4, pages = strtoul(arguments[2], NULL, 10);
    int work = atoi(arguments[3]);
    const int32_t *sequence = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    int memory = memfd_create("mrc-target", 0);
    if (sequence == MAP_FAILED || memory < 0 || ftruncate(memory, pages * 4096)) return 4;
    volatile uint64_t *region = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (region == MAP_FAILED) return 5;
    for (size_t page = 0; page < pages; page++) region[page * 512] = page;
    printf("ready %p\n", (void *)region);
    fflush(stdout);
    uint64_t touches = 0, sum = 0;
    struct pollfd asked = {.fd = 0, .events = POLLIN};
    for (size_t at = 0;; at = at + 1 == length ? 0 : at + 1, touches++) {
        volatile uint64_t *page = region + (size_t)sequence[at] * 512;
        if (touches & 1) page[0] = sum;
        for (int step = 0; step < work; step++) sum = (sum + page[(step * 8) & 511]) * 0x9E3779B97F4A7C15ull;
        if ((touches & 1023) == 0 && poll(&asked, 1, 0)) {
            char line[16];
            if (!fgets(line, sizeof line, stdin)) return 0;
            printf("%lu %ld %ld\n", touches, now(CLOCK_MONOTONIC), now(CLOCK_THREAD_CPUTIME_ID));
            fflush(stdout);
        }
    }
}
