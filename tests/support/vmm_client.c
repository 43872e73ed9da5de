// What a VMM does that hands its userfaultfd over, for the tests. vmm_client KIND MIB THREADS: maps a region (memfd,
// anon, huge, hugememfd), leaves it untouched, prints "ready ADDRESS BYTES", then obeys lines on standard input:
//   u MODE FEATURES  make a userfaultfd, agree on the features ("-": do not), register all regions
//   m MIB            map one more region of the same kind, registered if there is a userfaultfd; print its address
//   c PATH           connect to a unix socket
//   s FDS HEX        send these bytes in one sendmsg, FDS beside them: u the userfaultfd, n /dev/null, - none
//   a MS             wait for the answer of one byte: "answer N", "none" or "closed"
//   x                close the socket
//   r PAGE           print the first word of PAGE; pages go on from region to region
//   w PAGE VALUE     write the first word of PAGE
//   g                start THREADS threads that read all pages between them
//   j                wait for them, print "touched SUM"
//   d PAGE COUNT     MADV_DONTNEED of COUNT pages, as a balloon does
//   q                end
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST = 8, DESCRIPTORS = 32 };

static struct { uint8_t *start; size_t bytes; } regions[MOST];
static int region_count, uffd = -1, connection = -1, threads;
static uint64_t mode;
static const char *kind;

static uint8_t *at(size_t page) {
    for (int index = 0; index < region_count; index++) {
        if (page < regions[index].bytes / 4096) return regions[index].start + page * 4096;
        page -= regions[index].bytes / 4096;
    }
    exit(9);
}

static int watch(int index) {
    struct uffdio_register range = {.range = {(uintptr_t)regions[index].start, regions[index].bytes}, .mode = mode};
    return ioctl(uffd, UFFDIO_REGISTER, &range) ? errno : 0;
}

static int map(size_t bytes) {
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    size_t unit = strncmp(kind, "huge", 4) ? 4096 : 2 << 20;
    if (!strcmp(kind, "huge")) flags |= MAP_HUGETLB;
    if (strstr(kind, "memfd")) {
        fd = memfd_create("guest", MFD_CLOEXEC | (unit > 4096 ? MFD_HUGETLB : 0));
        if (fd < 0 || ftruncate(fd, bytes)) return -1;
        flags = MAP_SHARED;
    }
    // A gap on either side, so that the kernel joins no two of them.
    uint8_t *room = mmap(NULL, bytes + 3 * unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    room += unit - (uintptr_t)room % unit;
    uint8_t *start = mmap(room, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    if (start == MAP_FAILED) return -1;
    regions[region_count].start = start;
    regions[region_count++].bytes = bytes;
    return uffd < 0 ? 0 : watch(region_count - 1);
}

static int make_uffd(const char *features) {
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) return errno;
    if (*features == '-') return 0;
    struct uffdio_api api = {.api = UFFD_API, .features = strtoull(features, NULL, 0)};
    if (ioctl(uffd, UFFDIO_API, &api)) return errno;
    for (int index = 0; index < region_count; index++)
        if (watch(index)) return errno;
    return 0;
}

static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return connect(connection, (struct sockaddr *)&address, sizeof address) ? errno : 0;
}

static ssize_t send_bytes(const char *letters, const char *hex) {
    size_t length = strlen(hex) / 2;
    uint8_t *bytes = malloc(length + 1);
    for (size_t index = 0; index < length; index++) sscanf(hex + 2 * index, "%2hhx", &bytes[index]);
    int fds[DESCRIPTORS], count = 0, null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (; *letters && count < DESCRIPTORS; letters++)
        if (*letters != '-') fds[count++] = *letters == 'u' ? uffd : null;
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof fds)]; } control = {0};
    struct iovec piece = {bytes, length};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    if (count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof *fds);
        control.head = (struct cmsghdr){CMSG_LEN(count * sizeof *fds), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.head), fds, count * sizeof *fds);
    }
    ssize_t sent = sendmsg(connection, &message, MSG_NOSIGNAL);
    close(null);
    free(bytes);
    return sent;
}

static void await_answer(int milliseconds) {
    struct pollfd wait = {connection, POLLIN, 0};
    unsigned char answer;
    if (!poll(&wait, 1, milliseconds)) printf("none\n");
    else if (read(connection, &answer, 1) == 1) printf("answer %d\n", answer);
    else printf("closed\n");
}

struct reader { pthread_t thread; size_t number, pages; uint64_t sum; };

static void *read_pages(void *argument) {
    struct reader *self = argument;
    for (size_t page = self->number; page < self->pages; page += threads) self->sum += *(volatile uint64_t *)at(page);
    return NULL;
}

static struct reader readers[16];

static void start_readers(void) {
    size_t pages = 0;
    for (int index = 0; index < region_count; index++) pages += regions[index].bytes / 4096;
    for (int number = 0; number < threads; number++) {
        readers[number] = (struct reader){.number = number, .pages = pages};
        pthread_create(&readers[number].thread, NULL, read_pages, &readers[number]);
    }
}

static uint64_t join_readers(void) {
    uint64_t sum = 0;
    for (int number = 0; number < threads; number++) {
        pthread_join(readers[number].thread, NULL);
        sum += readers[number].sum;
    }
    return sum;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    kind = arguments[1];
    threads = atoi(arguments[3]);
    if (map(strtoul(arguments[2], NULL, 10) << 20)) return 3;
    printf("ready %p %zu\n", (void *)regions[0].start, regions[0].bytes);
    fflush(stdout);
    char *line = NULL;
    size_t room = 0;
    for (ssize_t length; (length = getline(&line, &room, stdin)) > 0;) {
        if (line[length - 1] == '\n') line[length - 1] = 0;
        char *word = strchr(line, ' '), *rest = word ? strchr(++word, ' ') : NULL;
        if (rest) *rest++ = 0;
        switch (line[0]) {
        case 'u':
            mode = strtoull(word, NULL, 0);
            printf("%d\n", make_uffd(rest));
            break;
        case 'm': {
            int failed = map(strtoul(word, NULL, 10) << 20);
            printf("%d %p\n", failed, (void *)regions[region_count - 1].start);
            break;
        }
        case 'c': printf("%d\n", connect_to(word)); break;
        case 's': printf("%zd\n", send_bytes(word, rest ? rest : "")); break;
        case 'a': await_answer(atoi(word)); break;
        case 'x': printf("%d\n", close(connection)); break;
        case 'r': printf("%lu\n", *(volatile uint64_t *)at(strtoul(word, NULL, 10))); break;
        case 'w':
            *(volatile uint64_t *)at(strtoul(word, NULL, 10)) = strtoul(rest, NULL, 10);
            printf("written\n");
            break;
        case 'g': start_readers(); printf("going\n"); break;
        case 'j': printf("touched %lu\n", join_readers()); break;
        case 'd': {
            size_t bytes = strtoul(rest, NULL, 10) * 4096;
            printf("%d\n", madvise(at(strtoul(word, NULL, 10)), bytes, MADV_DONTNEED));
            break;
        }
        case 'q': return 0;
        }
        fflush(stdout);
    }
    return 0;
}
