"""Processes by descriptor."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from outboard.errors import KernelError
from outboard.linux import pidfd
from tests.support.target import Target


def test_a_process_is_alive_until_it_has_ended() -> None:
    with Target() as target:
        process = pidfd.open(target.pid)
        assert pidfd.alive(target.pid)
        assert not pidfd.wait(process, 0)
        assert pidfd.send_signal(process, signal.SIGKILL)
        assert pidfd.wait(process, 5)
        assert not pidfd.alive(target.pid), "a zombie does not run"
        target.ended()
        assert not pidfd.send_signal(process, signal.SIGKILL)
        assert not pidfd.alive(target.pid)
        pidfd.close(process)
        pidfd.close(process)


def test_a_descriptor_can_be_taken_over() -> None:
    with Target() as target:
        process = pidfd.open(target.pid)
        theirs = pidfd.getfd(process, 3)
        assert os.fstat(theirs).st_size == target.size
        os.close(theirs)
        with pytest.raises(KernelError, match="pidfd_getfd of descriptor 999") as caught:
            pidfd.getfd(process, 999)
        assert caught.value.errno == errno.EBADF
        pidfd.close(process)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(KernelError) as caught:
        pidfd.open(2**22 + 1)
    assert caught.value.errno in (errno.ESRCH, errno.EINVAL)


def test_waiting_works_with_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        process = pidfd.open(os.getpid())
        high = os.dup2(process, 1500)
        assert not pidfd.wait(high, 0)
        os.close(high)
        pidfd.close(process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
