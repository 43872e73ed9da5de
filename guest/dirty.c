/*
 * dirty - the test guest's job: writes pages at a given rate and can prove that no write was lost.
 *
 *   dirty serve             serve port 7000, any number of connections, one command a line, one answer a line
 *   dirty COMMAND [ARG...]  send one command to the server in this guest and print its answer
 *
 *   start MIB RATE  fill MIB MiB with random pages, then write RATE random pages a second; answers "ok PAGES"
 *                   when the pages are filled; replaces what was running
 *   stop            stop writing; the pages stay and can be verified; answers "ok"
 *   verify          check every page: "ok PAGES", or "bad COUNT first=PAGE WHY"
 *   stats           "writes=N gap_ms=X.X": writes done since the server began, and the longest gap between two
 *                   20 ms ticks of CLOCK_MONOTONIC since the last reset
 *   reset           forget the longest gap; answers "ok"
 *   churn MIB       fill MIB MiB with random bytes and free them, so that free pages are not zero; "ok"
 *   anything else   "error WHY"
 *
 * A page holds its number, a counter, random words and a checksum over all of it. A write counts in the page and, apart
 * from it, in a table in another allocation: when a page or a page of the table comes back older than it was, the two
 * differ from then on, since neither is ever computed from the other.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 7000
#define WORDS 512
#define NUMBER 0
#define COUNTER 1
#define PAYLOAD 2
#define CHECKSUM (WORDS - 1)
#define WORDS_PER_WRITE 8
#define MIB_PAGES 256
/* What the checksum of nothing is: a page of zeros is not right. */
#define SEED 0x6f7574626f617264u
#define STEP_NS 1000000L
#define TICK_NS 20000000L
/* A writer that was held up makes good at most this many steps: a stall is not followed by a burst. */
#define STEPS_MADE_GOOD 20

typedef uint64_t page_t[WORDS];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static page_t *pages;
static uint64_t *table;
static uint64_t page_count, rate, run_writes, all_writes;
static bool writing;
static _Atomic uint64_t longest_gap_ns;
static _Atomic bool gap_reset;

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
	struct timespec t = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

static uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

/* The weight of a word in the checksum: odd, and another for each place, so that words that changed places show. */
static uint64_t weight(unsigned place)
{
	return 2 * (uint64_t)place + 1;
}

static uint64_t checksum(const uint64_t *page)
{
	uint64_t sum = SEED;
	for (unsigned i = 0; i < CHECKSUM; i++)
		sum += page[i] * weight(i);
	return sum;
}

static void fill_page(uint64_t *page, uint64_t number, uint64_t *random)
{
	uint64_t state = *random, sum = SEED + number * weight(NUMBER);
	page[NUMBER] = number;
	page[COUNTER] = 0;
	/* The checksum on the way: a second pass over 256 MiB costs a guest under TCG a second. */
	for (unsigned i = PAYLOAD; i < CHECKSUM; i++) {
		page[i] = next_random(&state);
		sum += page[i] * weight(i);
	}
	page[CHECKSUM] = sum;
	*random = state;
}

/* The checksum follows the change: a page that was wrong before stays wrong. */
static void write_page(uint64_t number, uint64_t *random)
{
	uint64_t *page = pages[number];
	uint64_t change = weight(COUNTER);
	uint64_t places = next_random(random);
	page[COUNTER]++;
	for (unsigned n = 0; n < WORDS_PER_WRITE; n++, places >>= 6) {
		/* One of 63 or 64 places in each eighth of the page: a page of which a part is old shows. */
		unsigned place = n * 64 + (places & 63);
		if (place < PAYLOAD || place == CHECKSUM)
			continue;
		uint64_t value = next_random(random);
		change += (value - page[place]) * weight(place);
		page[place] = value;
	}
	page[CHECKSUM] += change;
	table[number]++;
}

static void *write_pages(void *unused)
{
	uint64_t random = now_ns() | 1, began = 0, paid = 0, last_rate = 0;
	(void)unused;
	for (;;) {
		sleep_until(now_ns() + STEP_NS);
		pthread_mutex_lock(&lock);
		if (!writing || rate != last_rate) {
			last_rate = writing ? rate : 0;
			began = now_ns();
			paid = 0;
		} else {
			uint64_t due = (uint64_t)((double)(now_ns() - began) * 1e-9 * (double)rate);
			uint64_t most = rate * STEPS_MADE_GOOD / 1000 + 1;
			uint64_t burst = due - paid < most ? due - paid : most;
			paid = due;
			for (uint64_t n = 0; n < burst; n++)
				write_page((next_random(&random) >> 11) % page_count, &random);
			run_writes += burst;
			all_writes += burst;
		}
		pthread_mutex_unlock(&lock);
	}
	return NULL;
}

static void *tick(void *unused)
{
	/* So that the gap is the machine's and not the scheduler's. */
	struct sched_param first = { .sched_priority = 1 };
	uint64_t last = now_ns(), due = last;
	(void)unused;
	pthread_setschedparam(pthread_self(), SCHED_FIFO, &first);
	for (;;) {
		due += TICK_NS;
		sleep_until(due);
		uint64_t now = now_ns();
		if (gap_reset) {
			gap_reset = false;
			longest_gap_ns = 0;
		}
		if (now - last > longest_gap_ns)
			longest_gap_ns = now - last;
		last = now;
		if (now > due)
			due += (now - due) / TICK_NS * TICK_NS;
	}
	return NULL;
}

/* Takes the working set away and puts another in its place, or none; the writer sees either. */
static void replace(page_t *fresh, uint64_t *counters, uint64_t count, uint64_t wanted)
{
	pthread_mutex_lock(&lock);
	page_t *old = pages;
	uint64_t *old_table = table, old_count = page_count;
	pages = fresh;
	table = counters;
	page_count = count;
	run_writes = 0;
	rate = wanted;
	writing = count > 0;
	pthread_mutex_unlock(&lock);
	if (old)
		munmap(old, old_count * sizeof *old);
	free(old_table);
}

static void start(uint64_t mib, uint64_t wanted, char *answer, size_t size)
{
	uint64_t random = now_ns() | 1, count = mib * MIB_PAGES;
	replace(NULL, NULL, 0, 0);
	page_t *fresh = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *counters = calloc(count, sizeof *counters);
	if (fresh == MAP_FAILED || !counters) {
		snprintf(answer, size, "error no memory for %lu MiB", mib);
		if (fresh != MAP_FAILED)
			munmap(fresh, mib << 20);
		free(counters);
		return;
	}
	for (uint64_t n = 0; n < count; n++)
		fill_page(fresh[n], n, &random);
	replace(fresh, counters, count, wanted);
	snprintf(answer, size, "ok %lu", count);
}

static const char *whats_wrong(uint64_t number)
{
	const uint64_t *page = pages[number];
	if (page[CHECKSUM] != checksum(page))
		return "checksum";
	if (page[NUMBER] != number)
		return "number";
	if (page[COUNTER] != table[number])
		return "counter";
	return NULL;
}

static void verify(char *answer, size_t size)
{
	uint64_t bad = 0, first = 0, checked = 0, sum = 0;
	const char *why = NULL;
	for (;;) {
		/* A few pages at a time: the writer goes on in between. */
		pthread_mutex_lock(&lock);
		for (unsigned n = 0; n < 16 && checked < page_count; n++, checked++) {
			const char *wrong = whats_wrong(checked);
			if (wrong && !bad++) {
				first = checked;
				why = wrong;
			}
		}
		if (checked >= page_count)
			break;
		pthread_mutex_unlock(&lock);
		sched_yield();
	}
	for (uint64_t n = 0; n < page_count; n++)
		sum += table[n];
	if (sum != run_writes && !bad++)
		why = "table";
	pthread_mutex_unlock(&lock);
	if (bad)
		snprintf(answer, size, "bad %lu first=%lu %s", bad, first, why);
	else
		snprintf(answer, size, "ok %lu", checked);
}

static void churn(uint64_t mib, char *answer, size_t size)
{
	uint64_t random = now_ns() | 1, words = (mib << 20) / sizeof(uint64_t);
	uint64_t *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		snprintf(answer, size, "error no memory for %lu MiB", mib);
		return;
	}
	for (uint64_t n = 0; n < words; n++)
		memory[n] = next_random(&random);
	munmap(memory, mib << 20);
	snprintf(answer, size, "ok");
}

static void obey(const char *line, char *answer, size_t size)
{
	uint64_t mib, wanted;
	char rest;
	if (sscanf(line, "start %lu %lu %c", &mib, &wanted, &rest) == 2 && mib > 0 && mib < 1u << 20 && wanted < 1u << 30) {
		start(mib, wanted, answer, size);
	} else if (sscanf(line, "churn %lu %c", &mib, &rest) == 1 && mib > 0 && mib < 1u << 20) {
		churn(mib, answer, size);
	} else if (!strcmp(line, "verify")) {
		verify(answer, size);
	} else if (!strcmp(line, "stop")) {
		pthread_mutex_lock(&lock);
		writing = false;
		pthread_mutex_unlock(&lock);
		snprintf(answer, size, "ok");
	} else if (!strcmp(line, "reset")) {
		gap_reset = true;
		snprintf(answer, size, "ok");
	} else if (!strcmp(line, "stats")) {
		pthread_mutex_lock(&lock);
		uint64_t writes = all_writes;
		pthread_mutex_unlock(&lock);
		double gap = gap_reset ? 0.0 : (double)longest_gap_ns / 1e6;
		snprintf(answer, size, "writes=%lu gap_ms=%.1f", writes, gap);
	} else {
		snprintf(answer, size, "error not a command: %.60s", line);
	}
}

static void *converse(void *argument)
{
	int peer = (int)(intptr_t)argument;
	FILE *in = fdopen(peer, "r");
	char line[256], answer[256];
	while (in && fgets(line, sizeof line, in)) {
		line[strcspn(line, "\r\n")] = '\0';
		obey(line, answer, sizeof answer - 1);
		strcat(answer, "\n");
		if (send(peer, answer, strlen(answer), MSG_NOSIGNAL) < 0)
			break;
	}
	if (in)
		fclose(in);
	return NULL;
}

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(1);
}

static void begin(void *(*work)(void *), void *argument)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, work, argument) || pthread_detach(thread))
		die("pthread_create");
}

static int serve(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one))
		die("socket");
	if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 16))
		die("port 7000");
	begin(write_pages, NULL);
	begin(tick, NULL);
	for (;;) {
		int peer = accept(listener, NULL, NULL);
		if (peer >= 0)
			begin(converse, (void *)(intptr_t)peer);
		else if (errno != EINTR && errno != ECONNABORTED)
			die("accept");
	}
}

static int ask(int count, char **words)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	char answer[256];
	int server = socket(AF_INET, SOCK_STREAM, 0);
	here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (server < 0 || connect(server, (struct sockaddr *)&here, sizeof here))
		die("connect to port 7000");
	for (int n = 0; n < count; n++)
		dprintf(server, n + 1 < count ? "%s " : "%s\n", words[n]);
	FILE *in = fdopen(server, "r");
	if (!in || !fgets(answer, sizeof answer, in))
		die("answer");
	fputs(answer, stdout);
	return strncmp(answer, "error", 5) && strncmp(answer, "bad", 3) ? 0 : 1;
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "usage: dirty serve | dirty COMMAND [ARG...]\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	return argc == 2 && !strcmp(argv[1], "serve") ? serve() : ask(argc - 1, argv + 1);
}
