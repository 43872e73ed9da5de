"""A cpio archive in the format "newc", as the kernel unpacks it into its first root file system.

The same entries give the same bytes: no times, no inode numbers of the host, everything root's.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a directory or a symbolic link (``data`` is what it points to); ``mode`` as in stat(2)."""

    mode: int
    data: bytes = b""


def directory() -> Entry:
    """A directory, 0755."""
    return Entry(stat.S_IFDIR | 0o755)


def file(data: bytes, executable: bool = False) -> Entry:
    """A regular file, 0644 or 0755."""
    return Entry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def link(target: str) -> Entry:
    """A symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def _record(number: int, name: str, entry: Entry) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + b"\0" * (-len(head) % 4) + entry.data + b"\0" * (-len(entry.data) % 4)


def pack(entries: Mapping[str, Entry]) -> bytes:
    """The archive of ``entries``, by their paths without a leading slash; directories that are implied are made."""
    complete = dict(entries)
    for path in entries:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            complete.setdefault("/".join(parts[:depth]), directory())
    records = [_record(number, path, complete[path]) for number, path in enumerate(sorted(complete), start=1)]
    return b"".join([*records, _record(0, "TRAILER!!!", Entry(0))])
