"""A thread of ours in another process makes the system calls that it is told, and leaves nothing."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import proc
from outboard.linux.hand import MOST, Hand, await_none
from tests.support.requirements import require
from tests.support.target import Target

_GETPID = 39


def rooms(target: Target) -> list[str]:
    return [one.path for one in proc.maps(target.pid) if one.path.startswith("/memfd:outboard-hand")]


def test_calls_are_made_in_order_and_nothing_is_left() -> None:
    require("root")
    with Target() as target:
        before = proc.descriptors(target.pid)
        hand = Hand(target.pid)
        try:
            assert hand.call("getpid", _GETPID) == target.pid
            many = np.tile(np.array([[_GETPID, 0, 0, 0, 0, 0, 0]], dtype=np.int64), (MOST + 7, 1))
            many[3, 0] = 10**6
            results = hand.batch(many)
            assert (results[[0, -1]] == target.pid).all()
            assert results[3] == -errno.ENOSYS
            assert hand.batch(many[:0]).size == 0
            with pytest.raises(KernelError, match="close of nothing"):
                hand.call("close of nothing", 3, 999)
            with open("/dev/null", "rb") as file:
                number = hand.give(file.fileno())
            assert proc.descriptors(target.pid)[number] == "/dev/null"
            # Nobody is stopped, and whoever runs there goes on.
            assert target.ask("r 7") == "7"
        finally:
            hand.close()
        hand.close()
        assert proc.descriptors(target.pid) == before
        assert rooms(target) == []
        assert [thread.name for thread in proc.threads(target.pid)] == ["target"]
        with pytest.raises(ValueError, match="is closed"):
            hand.call("getpid", _GETPID)


def test_it_ends_with_its_owner_and_a_successor_clears_up() -> None:
    require("root")
    with Target() as target:
        before = proc.descriptors(target.pid)
        child = os.fork()
        if child == 0:
            with open("/dev/null", "rb") as file:
                Hand(target.pid).give(file.fileno())
            os._exit(0)
        os.waitpid(child, 0)
        await_none(target.pid, lambda: None)
        assert proc.descriptors(target.pid) == before
        assert len(rooms(target)) == 1
        hand = Hand(target.pid)
        assert len(rooms(target)) == 1
        assert hand.call("getpid", _GETPID) == target.pid
        hand.close()
        assert rooms(target) == []


def test_a_process_that_has_ended_is_said_to_have() -> None:
    require("root")
    with Target() as target:
        hand = Hand(target.pid)
        target.say("q")
        target.ended()
        with pytest.raises(KernelError) as caught:
            hand.call("getpid", _GETPID)
        assert caught.value.errno == errno.ESRCH
        hand.close()


def test_a_living_one_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    require("root")
    monkeypatch.setattr("outboard.linux.hand._END_S", 0.01)
    with Target() as target:
        hand = Hand(target.pid)
        looked = []
        with pytest.raises(KernelError, match="another hand"):
            await_none(target.pid, lambda: looked.append(1))
        assert looked
        monkeypatch.undo()
        hand.close()
