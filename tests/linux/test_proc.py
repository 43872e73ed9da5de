"""What /proc tells of a process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import proc
from tests.support.target import Target, compile_c


def test_a_mapping_is_found_and_its_nameless_file_opened() -> None:
    with Target() as target:
        (mapping,) = [one for one in proc.maps(target.pid) if one.start == target.start]
        assert (mapping.end - mapping.start, mapping.offset, mapping.shared) == (target.size, 0, True)
        assert mapping.path == "/memfd:target (deleted)"
        fd = proc.open_mapping(target.pid, mapping)
        assert os.pread(fd, 1, 7 * 4096) == b"\7"
        assert os.fstat(fd).st_ino == mapping.inode
        os.close(fd)


def test_a_mapping_that_is_gone() -> None:
    gone = proc.Mapping(0x1000, 0x2000, "rw-s", 0, "00:00", 0, "")
    with pytest.raises(KernelError, match="map_files/1000-2000") as caught:
        proc.open_mapping(os.getpid(), gone)
    assert caught.value.errno == errno.ENOENT


def test_anonymous_and_private_mappings_are_told_apart() -> None:
    for kind, shared in (("anon", False), ("private", False), ("memfd", True)):
        with Target(kind) as target:
            (mapping,) = [one for one in proc.maps(target.pid) if one.start <= target.start < one.end]
            assert mapping.shared == shared


def test_smaps_of_one_mapping() -> None:
    with Target() as target:
        fields = proc.smaps(target.pid, target.start)
        assert fields["Size"] == f"{target.size // 1024} kB"
        assert {"rd", "wr", "sh"} <= set(fields["VmFlags"].split())
        with pytest.raises(KeyError, match="begins at 0x1000"):
            proc.smaps(target.pid, 0x1000)


def test_threads_come_and_go() -> None:
    with Target(threads=3) as target:
        assert [thread.tid for thread in proc.threads(target.pid)] == [target.pid]
        target.ask("g")
        threads = proc.threads(target.pid)
        assert (len(threads), {thread.name for thread in threads}) == (4, {"target"})
        target.ask("s")


def test_a_name_with_parentheses_does_not_confuse_the_numbers(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    shutil.copy(compile_c("target.c"), program)
    with Target(program=program) as target:
        assert proc.threads(target.pid)[0].name == program.name
        assert proc.parent(target.pid) == os.getpid()
        ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert 0 <= ticks - proc.start_time(target.pid) < 60 * os.sysconf("SC_CLK_TCK")


def test_a_later_process_starts_later() -> None:
    with Target() as first, Target() as second:
        assert 0 < proc.start_time(first.pid) <= proc.start_time(second.pid)


def test_command_line_and_descriptors() -> None:
    with Target(mebibytes=8, threads=2) as target:
        assert proc.command_line(target.pid) == [str(compile_c("target.c")), "memfd", "8", "2"]
        assert proc.descriptors(target.pid)[3] == "/memfd:target (deleted)"


def test_a_stopped_process_is_waited_for() -> None:
    with Target(threads=3) as target:
        target.ask("g")
        os.kill(target.pid, signal.SIGSTOP)
        proc.wait_stopped(target.pid)
        os.kill(target.pid, signal.SIGCONT)
        with pytest.raises(TimeoutError, match="did not stop"):
            proc.wait_stopped(target.pid, timeout=0.01)


def test_a_process_that_is_not_there() -> None:
    for ask in (proc.maps, proc.threads, proc.start_time, proc.command_line, proc.descriptors, proc.parent):
        with pytest.raises(KernelError):
            ask(2**22 + 1)


def test_meminfo_is_in_bytes() -> None:
    told = proc.meminfo()
    assert told["MemTotal"] == os.sysconf("SC_PHYS_PAGES") * 4096
    assert 0 < told["MemAvailable"] <= told["MemTotal"]


def test_who_waits_for_a_processor_is_counted() -> None:
    pin, processors = os.sched_setaffinity, os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        one = {min(processors)}
        pin(rival.pid, one)
        pin(0, one)
        before = proc.queued_ns()
        assert before >= 0
        deadline = time.monotonic() + 30
        while proc.queued_ns() == before:
            assert time.monotonic() < deadline
    finally:
        pin(0, processors)
        rival.kill()
        rival.wait()
