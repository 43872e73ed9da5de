// A process that reads and writes pages in a known order and knows what each must hold. zipf FILE PAGES KIND: maps PAGES pages of
// memory (shared; private), fills them, and touches them in the order that FILE gives (32-bit page numbers, over and over): each touch
// checks 64 words of the page and counts in another. Prints "ready ADDRESS", then obeys lines on standard input while the touching
// goes on:
//   g  begin to look for gaps; "ok"
//   e  "TOUCHES GAP_NS": touches so far, and the longest time that 16 touches took since "g"
//   v  check every word of every page; "WRONG": how many words, these and those met while touching, were not as they must be
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

#define WORDS 512

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static uint64_t content(size_t page, size_t word) { return (page * WORDS + word) * 0x9E3779B97F4A7C15ull; }

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int file = open(arguments[1], O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status)) return 3;
    size_t length = status.st_size / 4, pages = strtoul(arguments[2], NULL, 10);
    const int32_t *sequence = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    int memory = memfd_create("zipf", 0);
    if (sequence == MAP_FAILED || memory < 0 || ftruncate(memory, pages * 4096)) return 4;
    int flags = arguments[3][0] == 's' ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    volatile uint64_t *region = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, flags, flags == MAP_SHARED ? memory : -1, 0);
    uint32_t *counts = calloc(pages, sizeof *counts);
    if (region == MAP_FAILED || !counts) return 5;
    for (size_t page = 0; page < pages; page++)
        for (size_t word = 1; word < WORDS; word++) region[page * WORDS + word] = content(page, word);
    printf("ready %lu\n", (unsigned long)region);
    fflush(stdout);
    uint64_t touches = 0, wrong = 0;
    int64_t last = now(), longest = 0;
    struct pollfd asked = {.fd = 0, .events = POLLIN};
    for (size_t at = 0;; at = at + 1 == length ? 0 : at + 1, touches++) {
        size_t number = sequence[at], first = 1 + touches % (WORDS - 64);
        volatile uint64_t *page = region + number * WORDS;
        for (size_t word = first; word < first + 64; word++) wrong += page[word] != content(number, word);
        page[0]++;
        counts[number]++;
        if (touches & 15) continue;
        int64_t here = now();
        if (here - last > longest) longest = here - last;
        last = here;
        if ((touches & 4095) || !poll(&asked, 1, 0)) continue;
        char line[16];
        if (!fgets(line, sizeof line, stdin)) return 0;
        if (line[0] == 'e') {
            printf("%lu %ld\n", touches, longest);
        } else if (line[0] == 'v') {
            for (size_t each = 0; each < pages; each++) {
                wrong += region[each * WORDS] != counts[each];
                for (size_t one = 1; one < WORDS; one++) wrong += region[each * WORDS + one] != content(each, one);
            }
            printf("%lu\n", wrong);
        } else {
            printf("ok\n");
        }
        fflush(stdout);
        last = now();
        if (line[0] == 'g') longest = 0;
    }
}
