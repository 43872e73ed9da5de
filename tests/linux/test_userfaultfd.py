"""userfaultfd on the live kernel, in another process's memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
from collections.abc import Iterator

import pytest

from outboard.errors import KernelError
from outboard.linux import fallocate, pidfd, proc, ptrace
from outboard.linux.userfaultfd import Fault, FaultFlag, Features, Mode, Userfaultfd, available_features
from tests.support.requirements import require
from tests.support.target import Target

SHMEM = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.MISSING_SHMEM | Features.MINOR_SHMEM


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as running:
        yield running


def injected(target: Target, features: Features) -> Userfaultfd:
    uffd = Userfaultfd(ptrace.inject_userfaultfd(target.pid)[0])
    uffd.api(features)
    return uffd


def file_of(target: Target) -> int:
    mapping = next(one for one in proc.maps(target.pid) if one.start == target.start)
    return proc.open_mapping(target.pid, mapping)


def next_fault(uffd: Userfaultfd) -> Fault:
    assert select.select([uffd], [], [], 5)[0], "no fault came"
    (fault,) = uffd.read()
    assert isinstance(fault, Fault)
    return fault


def page_of(byte: int) -> tuple[mmap.mmap, int]:
    page = mmap.mmap(-1, 4096)
    page.write(bytes([byte]) * 4096)
    view = ctypes.c_char.from_buffer(page)
    return page, ctypes.addressof(view)


def test_a_missing_page_is_copied_once_and_the_second_copy_is_told_so(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 3 * 4096, 4096)
        os.close(fd)
        target.say("r 3")
        fault = next_fault(uffd)
        assert (fault.address, fault.flags) == (target.at(3), FaultFlag(0))
        page, source = page_of(7)
        assert uffd.copy(target.at(3), source, 4096) == 4096
        assert target.answer() == str(int.from_bytes(page[:8], "little"))
        assert uffd.copy(target.at(3), source, 4096) == -errno.EEXIST


def test_a_copy_of_a_run_stops_at_what_is_present(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 0, 2 * 4096)
        os.close(fd)
        run = mmap.mmap(-1, 4 * 4096)
        view = ctypes.c_char.from_buffer(run)
        assert uffd.copy(target.at(0), ctypes.addressof(view), 4 * 4096) == 2 * 4096
        assert uffd.copy(target.at(2), ctypes.addressof(view), 4096) == -errno.EEXIST
        del view


def test_zeropage_answers_a_missing_page(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 5 * 4096, 4096)
        os.close(fd)
        target.say("r 5")
        next_fault(uffd)
        assert uffd.zeropage(target.at(5), 4096) == 4096
        assert target.answer() == "0"


def test_continue_maps_what_the_file_holds(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING | Mode.MINOR)
        fd = file_of(target)
        fallocate.punch(fd, 6 * 4096, 4096)
        os.pwrite(fd, (77).to_bytes(8, "little") + bytes(4088), 6 * 4096)
        os.close(fd)
        target.say("r 6")
        assert next_fault(uffd).flags & FaultFlag.MINOR
        assert uffd.continue_(target.at(6), 4096) == 4096
        assert target.answer() == "77"
        assert uffd.continue_(target.at(6), 4096) == -errno.EEXIST


def test_a_protected_page_holds_its_writer(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.WP)
        uffd.write_protect(target.at(4), 4096)
        assert target.ask("r 4") == "4"
        target.say("w 4 99")
        assert next_fault(uffd).flags & FaultFlag.WP
        uffd.write_protect(target.at(4), 4096, protect=False)
        assert target.answer() == "written"
        assert target.ask("r 4") == "99"


def test_poison_is_a_memory_error(target: Target) -> None:
    require("poison")
    with injected(target, SHMEM | Features.POISON) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 0, 4096)
        os.close(fd)
        assert uffd.poison(target.at(0), 4096) == 4096
        process = pidfd.open(target.pid)
        target.say("r 0")
        assert pidfd.wait(process, 5), "the read of a poisoned page went on"
        pidfd.close(process)


def test_move_takes_an_anonymous_page_along() -> None:
    if Features.MOVE not in available_features():
        pytest.skip("move: the kernel has no UFFDIO_MOVE (Linux 6.8)")
    area = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(view)
    area[4096] = 42
    with Userfaultfd.open() as uffd:
        uffd.api(Features.MOVE)
        uffd.register(address, 4096, Mode.MISSING)
        assert uffd.move(address, address + 4096, 4096) == 4096
        assert area[0] == 42
    del view


def test_rwp_is_probed() -> None:
    require("rwp")
    with Userfaultfd.open() as uffd:
        assert Features.RWP in uffd.api(Features.RWP)


def test_a_second_registration_is_refused_as_busy(target: Target) -> None:
    with injected(target, SHMEM) as first, injected(target, SHMEM) as second:
        first.register(target.start, target.size, Mode.MISSING)
        with pytest.raises(KernelError, match="UFFDIO_REGISTER") as caught:
            second.register(target.start, target.size, Mode.MISSING)
        assert caught.value.errno == errno.EBUSY


def test_anonymous_memory_takes_no_minor_faults() -> None:
    with Target("anon") as target, injected(target, SHMEM) as uffd:
        with pytest.raises(KernelError) as caught:
            uffd.register(target.start, target.size, Mode.MINOR)
        assert caught.value.errno == errno.EINVAL


def test_unregistering_wakes_who_waits(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 0, 4096)
        os.close(fd)
        target.say("r 0")
        next_fault(uffd)
        uffd.unregister(target.start, target.size)
        assert target.answer() == "0"


def test_a_successor_serves_after_we_are_gone(target: Target) -> None:
    ours, theirs = ptrace.inject_userfaultfd(target.pid)
    with Userfaultfd(ours) as first:
        first.api(SHMEM)
        first.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 9 * 4096, 4096)
        os.close(fd)
    target.say("r 9")
    process = pidfd.open(target.pid)
    with Userfaultfd(pidfd.getfd(process, theirs)) as successor:
        next_fault(successor)
        _, source = page_of(1)
        assert successor.copy(target.at(9), source, 4096) == 4096
        assert target.answer() == str(int.from_bytes(b"\1" * 8, "little"))
    pidfd.close(process)


def test_nothing_waits_is_an_empty_read(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        assert uffd.read() == []
        assert uffd.read_into(bytearray(320)) == 0


def test_a_dead_process_is_esrch(target: Target) -> None:
    uffd = injected(target, SHMEM)
    uffd.register(target.start, target.size, Mode.MISSING)
    target.__exit__(None, None, None)
    _, source = page_of(1)
    with uffd, pytest.raises(KernelError) as caught:
        uffd.copy(target.at(0), source, 4096)
    assert caught.value.errno == errno.ESRCH
