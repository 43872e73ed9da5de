"""/proc/PID/pagemap and its ioctl PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst, <linux/fs.h>.

PAGEMAP_SCAN (Linux 6.7) walks page tables and reports ranges by category; with PM_SCAN_WP_MATCHING it write-protects
in the same walk what it reports. Linux 6.18 leaves ``walk_end`` stale when a call fills more than 512 ranges, so a scan
goes on from the end of the last range that it got, and is over when a call returned fewer than it had room for.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from enum import IntFlag
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux.libc import Request, close, io_request, layout, u64

_ROOM = 16384
_PAGE = 4096


class Category(IntFlag):
    """PAGE_IS_*."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1

SOFT_DIRTY_ENTRY = 1 << 55
"""A bit of a classic entry: written since clear_refs was told 4."""
WRITE_PROTECTED_ENTRY = 1 << 57
"""A bit of a classic entry: write-protected by a userfaultfd."""
PRESENT_ENTRY = -1 << 63
"""The sign of a classic entry: mapped."""


@layout(96)
class pm_scan_arg(ctypes.Structure):
    size: u64
    flags: u64
    start: u64
    end: u64
    walk_end: u64
    vec: u64
    vec_len: u64
    max_pages: u64
    category_inverted: u64
    category_mask: u64
    category_anyof_mask: u64
    return_mask: u64


PAGEMAP_SCAN = Request("PAGEMAP_SCAN", io_request(3, ord("f"), 16, ctypes.sizeof(pm_scan_arg)), pm_scan_arg)

_NONE = Category(0)


class Pagemap:
    """The page tables of process ``pid``, as the kernel tells of them.

    :raise KernelError: there is no such process, or reading its tables is not permitted.

    Synchronization: one thread; a scan's ranges are gathered in a vector of the object's own.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"open of /proc/{pid}/pagemap", error.errno or 0) from error
        self._vector: NDArray[np.uint64] = np.empty((_ROOM, 3), dtype=np.uint64)

    def fileno(self) -> int:
        """The descriptor, for compiled loops that read entries."""
        return self._fd

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def scan(
        self,
        start: int,
        end: int,
        *,
        required: Category = _NONE,
        any_of: Category = _NONE,
        inverted: Category = _NONE,
        report: Category = _NONE,
        protect: bool = False,
        check_async: bool = False,
    ) -> NDArray[np.uint64]:
        """Find the pages of ``[start, end)`` (byte addresses) that have the wanted categories.

        :param required: all of these; :param any_of: at least one of these; :param inverted: those of them that count
            when they are absent; :param report: those to tell of; ranges that differ in them are apart.
        :param protect: write-protect what is found, in the same walk.
        :param check_async: fail where that would make a writer wait, for want of WP_ASYNC.
        :return: shape (n, 3): start, end, categories.
        :raise KernelError: EPERM with ``check_async``; ESRCH.
        """
        argument = pm_scan_arg(
            size=ctypes.sizeof(pm_scan_arg),
            flags=PM_SCAN_WP_MATCHING * protect | PM_SCAN_CHECK_WPASYNC * check_async,
            start=start,
            end=end,
            vec=self._vector.ctypes.data,
            vec_len=_ROOM,
            category_inverted=inverted,
            category_mask=required,
            category_anyof_mask=any_of,
            return_mask=report,
        )
        found: list[NDArray[np.uint64]] = []
        while argument.start < end:
            count = PAGEMAP_SCAN(self._fd, argument)
            found.append(self._vector[:count].copy())
            if count < _ROOM:
                break
            argument.start = int(self._vector[count - 1, 1])
        return np.concatenate(found) if found else np.empty((0, 3), dtype=np.uint64)

    def entries(self, start: int, pages: int) -> NDArray[np.uint64]:
        """The classic entries, 8 bytes a page, of ``pages`` pages from byte address ``start`` on.

        :raise KernelError: ESRCH: the process has ended, or there is no such address.
        """
        raw = bytearray(8 * pages)
        done = 0
        while done < len(raw):
            operation = f"read of pagemap entries at {start + done // 8 * _PAGE:#x}"
            try:
                step = os.preadv(self._fd, [memoryview(raw)[done:]], start // _PAGE * 8 + done)
            except OSError as error:
                raise KernelError(operation, error.errno or 0) from error
            if step == 0:
                raise KernelError(operation, errno.ESRCH)
            done += step
        return np.frombuffer(raw, dtype=np.uint64)


def has_pagemap_scan() -> bool:
    """Whether this kernel has PAGEMAP_SCAN, asked of our own first page."""
    with Pagemap(os.getpid()) as own:
        try:
            own.scan(0, _PAGE, required=Category.PRESENT, report=Category.PRESENT)
        except KernelError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return False
    return True


def clear_soft_dirty(pid: int) -> None:
    """Forget which pages of process ``pid`` were written, and note it again from now on.

    A kernel without soft-dirty pages may accept that and note nothing: ask :func:`has_soft_dirty` before.

    :raise KernelError: ENOENT: there is no such process; EACCES.
    """
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("4")
    except OSError as error:
        raise KernelError(f"write of 4 to /proc/{pid}/clear_refs", error.errno or 0) from error


def has_soft_dirty() -> bool:
    """Whether this kernel notes soft-dirty pages (CONFIG_MEM_SOFT_DIRTY): a fresh page that we write must show."""
    with mmap.mmap(-1, _PAGE) as page, Pagemap(os.getpid()) as own:
        page[0] = 1
        view = ctypes.c_char.from_buffer(page)
        entry = int(own.entries(ctypes.addressof(view), 1)[0])
        del view
    return bool(entry & SOFT_DIRTY_ENTRY)
