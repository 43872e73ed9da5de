// A process that works and writes to memory, and knows when it was held up.
// stalls KIND MIB RATE [WRITER]: maps MIB MiB (memfd; thp: a memfd that asks for large pages; hugetlb: of 2 MiB pages),
// fills them, and then computes, writing to RATE random pages a second in between (0: to none). With WRITER another thread
// writes all the time. Prints "ready TID TID", of the one that computes and of the one that writes, and answers lines:
//   b  begin a measurement; "ok"
//   e  end it: "STEPS SECONDS LONGEST_NS WORST MEDIAN": steps of computation done, the longest time between two steps, and
//      the least and the median number of steps in ten milliseconds
#define _GNU_SOURCE
#include <linux/memfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WINDOW_NS 10000000ull
#define WINDOWS 30000

static volatile uint8_t *region;
static uint64_t pages, pause_ns;
static volatile int measuring;
static uint64_t steps, began, ended, longest, windows[WINDOWS];

static uint64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ull + at.tv_nsec;
}

static volatile pid_t worker_tid, writer_tid;

static void *write_always(void *unused) {
    uint64_t state = 1442695040888963407ull;
    writer_tid = gettid();
    for (;;) {
        state ^= state << 13; state ^= state >> 7; state ^= state << 17;
        *(volatile uint64_t *)(region + state % pages * 4096) += 1;
    }
    return unused;
}

static void *work(void *unused) {
    worker_tid = gettid();
    uint64_t state = 88172645463325252ull, last = now(), next = last;
    int before = 0;
    for (;; ) {
        for (int round = 0; round < 100; round++) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; }
        uint64_t at = now();
        if (measuring && !before) { began = last = next = at; steps = longest = 0; memset(windows, 0, sizeof windows); }
        if (measuring) {
            if (at - last > longest) longest = at - last;
            uint64_t window = (at - began) / WINDOW_NS;
            if (window < WINDOWS) windows[window]++;
            steps++;
            ended = at;
        }
        before = measuring;
        last = at;
        while (pause_ns && next <= at) {
            uint64_t page = state % pages;
            state ^= state << 13; state ^= state >> 7; state ^= state << 17;
            *(volatile uint64_t *)(region + page * 4096) += 1;
            next += pause_ns;
            if (next + 100000000ull < at) next = at;
        }
    }
    return unused;
}

static int compare(const void *one, const void *other) {
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return a < b ? -1 : a > b;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    size_t bytes = strtoul(arguments[2], NULL, 10) << 20;
    pages = bytes / 4096;
    uint64_t rate = strtoul(arguments[3], NULL, 10);
    pause_ns = rate ? 1000000000ull / rate : 0;
    int fd = memfd_create("stalls", strcmp(arguments[1], "hugetlb") ? 0 : MFD_HUGETLB | MFD_HUGE_2MB);
    if (fd < 0 || ftruncate(fd, bytes)) return 3;
    region = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (region == MAP_FAILED) return 4;
    if (!strcmp(arguments[1], "thp") && madvise((void *)region, bytes, MADV_HUGEPAGE)) return 5;
    for (size_t page = 0; page < pages; page++) *(volatile uint64_t *)(region + page * 4096) = page + 1;
    pthread_t worker, writer;
    pthread_create(&worker, NULL, work, NULL);
    if (count > 4) pthread_create(&writer, NULL, write_always, NULL);
    while (!worker_tid || (count > 4 && !writer_tid)) usleep(1000);
    printf("ready %d %d\n", worker_tid, writer_tid);
    fflush(stdout);
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        if (line[0] == 'b') {
            measuring = 1;
            printf("ok\n");
        } else {
            measuring = 0;
            usleep(20000);
            uint64_t whole = (ended - began) / WINDOW_NS;
            if (whole > WINDOWS) whole = WINDOWS;
            qsort(windows, whole, sizeof *windows, compare);
            printf("%lu %.6f %lu %lu %lu\n", (unsigned long)steps, (ended - began) / 1e9, (unsigned long)longest,
                   whole ? (unsigned long)windows[0] : 0, whole ? (unsigned long)windows[whole / 2] : 0);
        }
        fflush(stdout);
    }
    return 0;
}
