"""What we carry of the kernel's headers, against the headers that are installed here."""

from __future__ import annotations

import ctypes
import subprocess
from enum import IntFlag

from outboard.linux import (
    fallocate,
    fiemap,
    memfd,
    pagemap,
    pidfd,
    prctl,
    process_madvise,
    ptrace,
    reflink,
    statfs,
    tcp,
    tun,
    userfaultfd,
)
from outboard.linux.fiemap import ExtentFlag
from outboard.linux.libc import Request
from outboard.linux.pagemap import Category
from outboard.linux.process_madvise import Advice
from outboard.linux.userfaultfd import EventKind, FaultFlag, Features, Ioctls, Mode
from tests.support.target import compile_c

SAME = {
    "uffdio_zeropage": "uffdio_continue",
    "uffdio_poison": "uffdio_continue",
    "uffdio_move": "uffdio_copy",
    "uffdio_rwprotect": "uffdio_writeprotect",
    "tcp_info": "tcp_info_head",
    "statfs": "struct_statfs",
}
"""Structs of one layout that we have under one name."""

FIELDS = {
    "range.start": "start",
    "range.len": "len",
    "zeropage": "mapped",
    "updated": "mapped",
    "move": "copy",
    "arg.pagefault.flags": "flags",
    "arg.pagefault.address": "address",
    "arg.pagefault.feat.ptid": "ptid",
    "arg.remap.from": "flags",
    "arg.remap.to": "address",
    "arg.remap.len": "ptid",
    "arg.remove.start": "flags",
    "arg.remove.end": "address",
    "arg.fork.ufd": "flags",
}

MODULES = (
    fallocate,
    fiemap,
    memfd,
    pagemap,
    pidfd,
    prctl,
    process_madvise,
    ptrace,
    reflink,
    statfs,
    tcp,
    tun,
    userfaultfd,
)

PREFIXES: dict[str, type[IntFlag] | type[EventKind] | type[Advice]] = {
    "UFFD_FEATURE_": Features,
    "UFFD_EVENT_": EventKind,
    "UFFD_PAGEFAULT_FLAG_": FaultFlag,
    "UFFDIO_REGISTER_MODE_": Mode,
    "PAGE_IS_": Category,
    "MADV_": Advice,
    "FIEMAP_EXTENT_": ExtentFlag,
}

OTHER_NAMES = {
    "UFFDIO_COPY_MODE_DONTWAKE": userfaultfd.DONTWAKE,
    "UFFDIO_COPY_MODE_WP": userfaultfd.COPY_WP,
    "MFD_HUGETLB": memfd.HugePages.MIB_2 & memfd.HugePages.GIB_1 & ~(63 << 26),
    "MFD_HUGE_2MB": memfd.HugePages.MIB_2 & 63 << 26,
    "MFD_HUGE_1GB": memfd.HugePages.GIB_1 & 63 << 26,
}


def headers() -> list[list[str]]:
    told = subprocess.run([compile_c("layouts.c")], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in told.splitlines()]


def struct(name: str) -> type[ctypes.Structure]:
    ours = SAME.get(name, name)
    found = next(getattr(module, ours) for module in MODULES if hasattr(module, ours))
    assert isinstance(found, type)
    assert issubclass(found, ctypes.Structure)
    return found


def value(name: str) -> int:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if name.startswith("_UFFDIO_"):
        return Ioctls[name.removeprefix("_UFFDIO_")].bit_length() - 1
    for prefix, names in PREFIXES.items():
        if name.startswith(prefix):
            return int(names[name.removeprefix(prefix)])
    found = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    return found.number if isinstance(found, Request) else int(found)


def test_structs_measure_what_the_headers_say() -> None:
    for kind, name, *words in headers():
        if kind == "size":
            assert ctypes.sizeof(struct(name)) == int(words[0]), name


def test_fields_lie_where_the_headers_say() -> None:
    for kind, name, *words in headers():
        if kind == "offset":
            field, offset = words
            assert getattr(struct(name), FIELDS.get(field, field)).offset == int(offset), f"{name}.{field}"


def test_numbers_are_those_of_the_headers() -> None:
    checked = 0
    for kind, name, *words in headers():
        if kind == "value":
            assert value(name) == int(words[0]), name
            checked += 1
    assert checked > 80
