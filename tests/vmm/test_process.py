"""A process's shared memory as a guest's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from outboard.errors import NotFoundError, RefusedError
from outboard.vmm.process import attach_process
from tests.support.machine import huge_pages
from tests.support.requirements import require
from tests.support.target import Target


def test_a_process_is_its_shared_memory() -> None:
    require("root")
    with Target("memfd", 8) as target, attach_process(target.pid) as guest:
        assert guest.name == "target"
        assert [(region.first, region.pages, region.hva) for region in guest.regions] == [
            (0, target.pages, target.start)
        ]
        assert guest.vcpus == ()
        target.ask("w 5 77")
        content = memoryview(bytearray(4096))
        guest.memory.read_into(5, content)
        assert int.from_bytes(content[:4], sys.byteorder) == 77


def test_huge_pages_are_shared_memory_too() -> None:
    with huge_pages(4), Target("hugetlb", 8) as target, attach_process(target.pid) as guest:
        assert [(region.hva, region.pages, region.page_size) for region in guest.regions] == [
            (target.start, target.pages, 2 << 20)
        ]


def test_a_process_with_memory_of_its_own_only() -> None:
    require("root")
    with Target("anon", 8) as target, pytest.raises(RefusedError, match="no writable shared memory") as caught:
        attach_process(target.pid, "web")
    assert caught.value.reason == "no-shared-memory"


def test_anonymous_shared_memory_counts_and_the_same_bytes_twice_do_not() -> None:
    require("root")
    program = (
        "import mmap, os, sys\n"
        "fd = os.memfd_create('m'); os.truncate(fd, 1 << 20)\n"
        "one = mmap.mmap(-1, 1 << 16)\n"
        "kept = [mmap.mmap(fd, 1 << 19), mmap.mmap(fd, 1 << 19, offset=int(sys.argv[1]))]\n"
        "print(flush=True); sys.stdin.read()"
    )
    for offset in (1 << 19, 1 << 18):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(offset)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            try:
                if offset == 1 << 19:
                    with attach_process(process.pid) as guest:
                        assert sorted(region.pages for region in guest.regions) == [16, 128, 128]
                        assert guest.pages == 272
                else:
                    with pytest.raises(RefusedError, match="at two addresses") as caught:
                        attach_process(process.pid)
                    assert caught.value.reason == "mapped-twice"
            finally:
                process.stdin.close()


def test_no_process_at_all() -> None:
    with pytest.raises(NotFoundError, match="there is no process 4194303"):
        attach_process(4194303)
