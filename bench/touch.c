// A process that times its own page faults. touch MIB [KIND]: maps shared memory (thp: asks for large pages; hugetlb: of
// 2 MiB pages), fills each page with its number plus one, prints "ready", then obeys lines on standard input, each
// answered by one line:
//   s, r    touch every page in order, or in a shuffled one; "SUM NS P50 P99": the sum of the pages' first words, how
//           long it took in all, and the median and 99th percentile of one touch
//   m       read random words of all of it, each address depending on the word before; "SUM NS 0 0", of eight million
#define _GNU_SOURCE
#include <linux/memfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000ull + at.tv_nsec;
}

static int compare(const void *one, const void *other) {
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return a < b ? -1 : a > b;
}

int main(int count, char **arguments) {
    if (count < 2) return 2;
    size_t pages = strtoul(arguments[1], NULL, 10) << 8;
    const char *kind = count > 2 ? arguments[2] : "";
    int fd = memfd_create("touch", strcmp(kind, "hugetlb") ? 0 : MFD_HUGETLB | MFD_HUGE_2MB);
    if (fd < 0 || ftruncate(fd, pages * 4096)) return 3;
    volatile uint8_t *region = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (region == MAP_FAILED || (!strcmp(kind, "thp") && madvise((void *)region, pages * 4096, MADV_HUGEPAGE))) return 4;
    uint32_t *took = calloc(pages, sizeof *took), *order = calloc(pages, sizeof *order);
    for (size_t page = 0; page < pages; page++) {
        *(volatile uint64_t *)(region + page * 4096) = page + 1;
        order[page] = page;
    }
    printf("ready\n");
    fflush(stdout);
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t state = 88172645463325252ull, sum = 0;
        if (line[0] == 'm') {
            uint64_t start = now();
            for (int read = 0; read < 8000000; read++) {
                state ^= state << 13; state ^= state >> 7; state ^= state << 17;
                sum += *(volatile uint64_t *)(region + (state + (sum & 1)) % (pages * 512) * 8);
            }
            printf("%lu %lu 0 0\n", (unsigned long)sum, (unsigned long)(now() - start));
            fflush(stdout);
            continue;
        }
        for (size_t page = pages - 1; line[0] == 'r' && page > 0; page--) {
            state ^= state << 13; state ^= state >> 7; state ^= state << 17;
            size_t other = state % (page + 1);
            uint32_t swapped = order[page];
            order[page] = order[other];
            order[other] = swapped;
        }
        uint64_t began = now(), last = began;
        for (size_t index = 0; index < pages; index++) {
            sum += *(volatile uint64_t *)(region + order[index] * 4096ull);
            uint64_t at = now();
            took[index] = at - last;
            last = at;
        }
        qsort(took, pages, sizeof *took, compare);
        printf("%lu %lu %u %u\n", (unsigned long)sum, (unsigned long)(last - began), took[pages / 2],
               took[pages * 99 / 100]);
        fflush(stdout);
    }
    return 0;
}
