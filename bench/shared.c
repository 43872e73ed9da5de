/* Preloaded: memory that an allocator maps for itself is shared instead, so that it has a file. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    if ((flags & MAP_PRIVATE) && (flags & MAP_ANONYMOUS) && (protection & PROT_WRITE) && !(flags & MAP_STACK))
        flags = (flags & ~MAP_PRIVATE) | MAP_SHARED;
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));
