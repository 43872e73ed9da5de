"""userfaultfd on the live kernel, in another process's memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import threading
from collections.abc import Iterator

import pytest

from outboard.errors import KernelError
from outboard.linux import fallocate, pidfd, proc, ptrace
from outboard.linux.userfaultfd import (
    COPY_WP,
    DONTWAKE,
    Event,
    EventKind,
    Fault,
    FaultFlag,
    Features,
    Mode,
    Userfaultfd,
)
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
    require("move")
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


def test_a_page_protected_from_reads_holds_its_reader(target: Target) -> None:
    require("rwp")
    with injected(target, SHMEM | Features.RWP) as uffd:
        uffd.register(target.start, target.size, Mode.RWP)
        uffd.rwprotect(target.at(4), 4096)
        target.say("r 4")
        assert next_fault(uffd).flags & FaultFlag.RWP
        uffd.rwprotect(target.at(4), 4096, protect=False)
        assert target.answer() == "4"


def test_notification_of_protected_reads_can_be_switched(target: Target) -> None:
    require("rwp")
    with injected(target, SHMEM | Features.RWP) as uffd:
        uffd.register(target.start, target.size, Mode.RWP)
        uffd.rwprotect(target.at(4), 4096)
        uffd.set_mode(Features.RWP_ASYNC)
        assert target.ask("r 4") == "4"


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


def test_while_the_address_space_changes_the_answer_is_try_again(target: Target) -> None:
    with injected(target, SHMEM | Features.EVENT_REMOVE) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING | Mode.MINOR)
        target.say("d 2 3")
        assert select.select([uffd], [], [], 5)[0], "no event came"
        page, source = page_of(1)
        assert uffd.copy(target.at(8), source, 4096) == -errno.EAGAIN
        assert uffd.zeropage(target.at(8), 4096) == -errno.EAGAIN
        assert uffd.continue_(target.at(8), 4096) == -errno.EAGAIN
        assert uffd.read() == [Event(EventKind.REMOVE, target.at(2), target.at(5), 0)]
        assert target.answer() == "0"
        assert uffd.copy(target.at(8), source, 4096) == -errno.EEXIST
        assert uffd.continue_(target.at(2), 3 * 4096) == 3 * 4096
        page.close()


def test_what_is_not_mapped_there_is_told(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        _, source = page_of(1)
        assert uffd.copy(target.start - (1 << 30), source, 4096) == -errno.ENOENT
        with pytest.raises(KernelError, match="UFFDIO_COPY of 5 bytes") as caught:
            uffd.copy(target.at(0), source, 5)
        assert caught.value.errno == errno.EINVAL


def test_dontwake_leaves_the_thread_asleep_until_it_is_woken(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 3 * 4096, 4096)
        os.close(fd)
        target.say("r 3")
        next_fault(uffd)
        assert uffd.zeropage(target.at(3), 4096, DONTWAKE) == 4096
        # Still asleep: a fault that was read stays its thread's last word until a wake.
        assert target.waits()
        uffd.wake(target.at(3), 4096)
        assert target.answer() == "0"


def test_a_page_may_be_placed_write_protected(target: Target) -> None:
    with injected(target, SHMEM) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING | Mode.WP)
        fd = file_of(target)
        fallocate.punch(fd, 3 * 4096, 4096)
        os.close(fd)
        _, source = page_of(1)
        assert uffd.copy(target.at(3), source, 4096, COPY_WP) == 4096
        target.say("w 3 9")
        assert next_fault(uffd).flags == FaultFlag.WRITE | FaultFlag.WP
        uffd.write_protect(target.at(3), 4096, protect=False, dont_wake=True)
        assert target.waits()
        uffd.wake(target.at(3), 4096)
        assert target.answer() == "written"


def test_the_thread_is_told_when_asked_for(target: Target) -> None:
    with injected(target, SHMEM | Features.THREAD_ID) as uffd:
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 0, 4096)
        os.close(fd)
        target.say("w 0 1")
        assert next_fault(uffd) == Fault(FaultFlag.WRITE, target.at(0), target.pid)
        assert uffd.zeropage(target.at(0), 4096) == 4096
        assert target.answer() == "written"


def test_a_feature_that_no_kernel_has_is_refused() -> None:
    with Userfaultfd.open() as uffd:
        with pytest.raises(KernelError, match="UFFDIO_API") as caught:
            uffd.api(Features(1 << 63))
        assert caught.value.errno == errno.EINVAL


def test_close_is_idempotent_and_final() -> None:
    uffd = Userfaultfd.open()
    uffd.close()
    uffd.close()
    # Its number may be somebody else's by now.
    assert uffd.fileno() == -1
    with pytest.raises(KernelError) as caught:
        uffd.wake(0, 4096)
    assert caught.value.errno == errno.EBADF


def test_threads_that_hold_the_interpreter_are_not_stopped_by_a_call(target: Target) -> None:
    """A copy from memory that faults itself would hang the process if it held the GIL."""
    area = mmap.mmap(-1, 4096)
    view = ctypes.c_char.from_buffer(area)
    source = ctypes.addressof(view)
    with Userfaultfd.open() as own, injected(target, SHMEM) as uffd:
        own.api(Features(0))
        own.register(source, 4096, Mode.MISSING)
        uffd.register(target.start, target.size, Mode.MISSING)
        fd = file_of(target)
        fallocate.punch(fd, 0, 4096)
        os.close(fd)
        answers: list[int] = []
        worker = threading.Thread(target=lambda: answers.append(uffd.copy(target.at(0), source, 4096)))
        worker.start()
        assert next_fault(own).address == source
        assert own.zeropage(source, 4096) == 4096
        worker.join(5)
        assert answers == [4096]
    del view


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


def test_the_features_that_somebody_else_agreed_on() -> None:
    with Userfaultfd.open() as own:
        assert own.enabled() == Features(0)
        own.api(Features.EVENT_REMOVE | Features.MISSING_SHMEM)
        with Userfaultfd(os.dup(own.fileno())) as other:
            assert other.enabled() == Features.EVENT_REMOVE | Features.MISSING_SHMEM
    with Userfaultfd(os.open("/dev/null", os.O_RDONLY)) as other, pytest.raises(KernelError, match="fdinfo"):
        other.enabled()
    with pytest.raises(KernelError, match="fdinfo"):
        other.enabled()
