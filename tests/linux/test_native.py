"""System calls from compiled code answer as the kernel does."""

from __future__ import annotations

import errno
import os
import time

import numpy as np

from outboard.linux import memfd, native, pidfd
from outboard.linux.process_madvise import Advice
from tests.support.target import Target


def test_bytes_go_out_and_come_in() -> None:
    fd = memfd.create("native", 8192)
    try:
        out = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096].copy()
        back = np.zeros(4096, dtype=np.uint8)
        assert native.pwrite(fd, out.ctypes.data, 4096, 4096) == 4096
        assert native.pread(fd, back.ctypes.data, 4096, 4096) == 4096
        assert np.array_equal(out, back)
        assert native.fallocate(fd, 3, 4096, 4096) == 0
        assert native.pread(fd, back.ctypes.data, 4096, 4096) == 4096
        assert not back.any()
        assert native.pread(fd, back.ctypes.data, 4096, 8192) == 0
        assert native.posix_fadvise(fd, 0, 4096, native.POSIX_FADV_WILLNEED) == 0
    finally:
        os.close(fd)


def test_a_refusal_is_a_negated_errno() -> None:
    room = np.zeros(64, dtype=np.uint8)
    assert native.read(-1, room.ctypes.data, 64) == -errno.EBADF
    assert native.pread(-1, room.ctypes.data, 64, 0) == -errno.EBADF
    assert native.pwrite(-1, room.ctypes.data, 64, 0) == -errno.EBADF
    assert native.fallocate(-1, 0, 0, 1) == -errno.EBADF
    assert native.posix_fadvise(-1, 0, 1, native.POSIX_FADV_WILLNEED) == -errno.EBADF
    assert native.ioctl(-1, 1, room.ctypes.data) == -errno.EBADF
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        assert native.read(reader, room.ctypes.data, 64) == -errno.EAGAIN
    finally:
        os.close(reader)
        os.close(writer)


def test_poll_waits_and_tells() -> None:
    reader, writer = os.pipe()
    try:
        waiting = np.zeros(1, dtype=[("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
        waiting["fd"], waiting["events"] = reader, 1
        assert native.poll(waiting.ctypes.data, 1, 0) == 0
        os.write(writer, b"x")
        assert native.poll(waiting.ctypes.data, 1, -1) == 1
        assert waiting["revents"][0] == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_the_clock_is_pythons() -> None:
    room = np.zeros(2, dtype=np.int64)
    before = time.monotonic_ns()
    between = native.monotonic_ns(room)
    assert before <= between <= time.monotonic_ns()
    assert between <= native.clock_ns(time.CLOCK_MONOTONIC, room) <= time.monotonic_ns()
    assert native.clock_ns(99, room) == -errno.EINVAL


def test_ppoll_waits_as_long_as_it_is_told() -> None:
    room = np.zeros(2, dtype=np.int64)
    before = native.monotonic_ns(room)
    assert native.ppoll(room.ctypes.data, 0, 2_000_000, room) == 0
    assert native.monotonic_ns(room) - before >= 2_000_000


def test_advice_goes_to_another_process() -> None:
    with Target() as target:
        process = pidfd.open(target.pid)
        vector = np.array([target.start, 4 * 4096], dtype=np.uint64)
        try:
            assert native.process_madvise(process, vector.ctypes.data, 1, Advice.COLD) == 4 * 4096
            assert native.process_madvise(process, vector.ctypes.data, 1, 999) == -errno.EINVAL
        finally:
            pidfd.close(process)
