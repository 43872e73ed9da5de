"""Any process as a guest: its shared memory is what can be managed.

Memory counts as shared when it is mapped MAP_SHARED and writable from tmpfs: memfd_create(2), shm_open(3), files in
/dev/shm, and anonymous shared mappings, which the kernel keeps in such a file too; or from hugetlbfs. Pages are
numbered over the mappings by address. Memory of the process's own (its heap, its stacks) has no file to read it by, and
is left out.

Source: proc(5), statfs(2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from outboard.errors import KernelError, NotFoundError, RefusedError
from outboard.linux import proc, statfs
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest, Region

_LEAST = 1 << 20
"""Bytes of a mapping of anonymous memory that is worth the kernel's looking at it."""


def attach_process(pid: int, name: str | None = None) -> Guest:
    """Attach to process ``pid``; its memory is its shared mappings from tmpfs and hugetlbfs.

    :param name: what to call it; the program's own name when not given.
    :raise NotFoundError: there is no such process.
    :raise RefusedError: ``no-shared-memory``: it has none; ``mapped-twice``: a page of it is mapped at two addresses;
        ``no-privilege``.
    """
    try:
        name = name or os.path.basename(proc.command_line(pid)[0]) or f"process-{pid}"  # noqa: PTH119  # any string
        regions = tuple(_regions(name, pid))
        if not regions:
            raise RefusedError(
                "no-shared-memory",
                f"{name} (process {pid}) has no writable shared memory (memfd, /dev/shm, MAP_SHARED|MAP_ANONYMOUS): "
                "what it alone maps cannot be read and moved from outside",
            )
        return Guest(name, pid, regions)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            raise NotFoundError(f"there is no process {pid}") from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise RefusedError(
                "no-privilege",
                f"process {pid}: {error}; managing a process's memory takes CAP_SYS_PTRACE and CAP_SYS_ADMIN (or "
                "CAP_CHECKPOINT_RESTORE): run as root",
            ) from error
        raise


def attach_anonymous(pid: int) -> Guest:
    """Attach to process ``pid`` by its anonymous memory, that only the kernel can share: mappings of 1 MiB and more.

    :raise NotFoundError: there is no such process.
    :raise RefusedError: ``no-anonymous-memory``: it has none.
    """
    try:
        name = os.path.basename(proc.command_line(pid)[0]) or f"process-{pid}"  # noqa: PTH119  # any string
        regions, first = list[Region](), 0
        for one in proc.maps(pid):
            kind = one.path in ("", "[heap]") or one.path.startswith("[anon")
            if kind and not one.shared and "w" in one.permissions and one.end - one.start >= _LEAST:
                pages = (one.end - one.start) // PAGE_SIZE
                regions.append(Region(first, pages, one.start, one.start, 0, PAGE_SIZE, one.path, one))
                first += pages
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            raise NotFoundError(f"there is no process {pid}") from error
        raise
    if not regions:
        raise RefusedError("no-anonymous-memory", f"{name} (process {pid}) has no writable anonymous memory to merge")
    return Guest(name, pid, tuple(regions))


def _regions(name: str, pid: int) -> Iterator[Region]:
    first = 0
    seen: list[tuple[tuple[str, int], int, int]] = []
    for mapping in proc.maps(pid):
        if not (mapping.shared and "w" in mapping.permissions):
            continue
        fd = proc.open_mapping(pid, mapping, os.O_RDONLY)
        try:
            kind = statfs.of(fd)
            # The tail of a mapping that is longer than its file cannot be touched by anybody.
            size = min(mapping.end - mapping.start, max(0, os.fstat(fd).st_size - mapping.offset))
        finally:
            os.close(fd)
        pages = size // PAGE_SIZE
        if kind.type not in (statfs.TMPFS_MAGIC, statfs.HUGETLBFS_MAGIC) or not pages:
            continue
        unit = kind.block if kind.type == statfs.HUGETLBFS_MAGIC else PAGE_SIZE
        low, high = mapping.offset, mapping.offset + size
        for file, begin, end in seen:
            if file == (mapping.device, mapping.inode) and begin < high and low < end:
                raise RefusedError(
                    "mapped-twice",
                    f"{name} (process {pid}) maps bytes of {mapping.path} at two addresses; an access by the one would "
                    "not be seen at the other",
                )
        seen.append(((mapping.device, mapping.inode), low, high))
        yield Region(first, pages, mapping.start, mapping.start, mapping.offset, unit, mapping.path, mapping)
        first += pages
