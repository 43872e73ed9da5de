"""Threads are bound and put back as they were; what a placement means for them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import NotFoundError, OutboardError
from outboard.linux import proc
from outboard.numa.living import bindings, price, vcpus_of, working_set
from outboard.numa.policies import Memory
from outboard.numa.residents import Resident, bind, load_of_others, put_back, read_kept, residents
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target
from tests.support.topologies import recorded


def test_threads_are_bound_and_put_back(tmp_path: Path) -> None:
    require("root")
    with Target(mebibytes=1, threads=2) as target, guest_of(target) as guest:
        target.ask("g")
        threads = residents(guest, 0.05)
        assert [one.role for one in threads] == ["vcpu"] * 3
        assert all(0 <= one.busy <= 1.5 and one.processor >= 0 for one in threads)
        before = {one.tid: os.sched_getaffinity(one.tid) for one in threads}
        only = {min(os.sched_getaffinity(0))}
        bind(guest, dict.fromkeys(before, only), tmp_path / "a" / "kept.json")
        assert all(os.sched_getaffinity(tid) == only for tid in before)
        bind(guest, dict.fromkeys(before, only), tmp_path / "a" / "kept.json")
        assert put_back(guest, tmp_path / "a" / "kept.json") == 3
        assert {tid: os.sched_getaffinity(tid) for tid in before} == before
        with pytest.raises(NotFoundError, match="were not placed"):
            put_back(guest, tmp_path / "a" / "kept.json")
        target.ask("s")


def test_what_was_kept_of_another_process_is_nobodys(tmp_path: Path) -> None:
    require("root")
    kept = tmp_path / "kept.json"
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        bind(guest, {guest.pid: os.sched_getaffinity(guest.pid)}, kept)
        assert read_kept(guest, kept) is not None
        kept.write_bytes(kept.read_bytes().replace(str(proc.start_time(guest.pid)).encode(), b"12"))
        assert read_kept(guest, kept) is None
        kept.write_text("nothing of ours")
        assert read_kept(guest, kept) is None


def test_nothing_is_bound_where_what_was_cannot_be_kept(tmp_path: Path) -> None:
    require("root")
    (tmp_path / "file").write_text("")
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        before = os.sched_getaffinity(guest.pid)
        with pytest.raises(OutboardError, match="cannot keep in"):
            bind(guest, {guest.pid: {min(before)}}, tmp_path / "file" / "kept.json")
        assert os.sched_getaffinity(guest.pid) == before
    with pytest.raises(OutboardError):
        residents(guest, 0.0)


def test_a_busy_process_is_seen_unless_it_is_ours() -> None:
    with Target(mebibytes=1, threads=1) as target:
        target.ask("g")
        seen = sum(load_of_others(set(), looks=9, apart=0.02).running.values())
        assert seen >= 1
        target.ask("s")


def test_emulator_and_io_go_where_most_of_the_work_is() -> None:
    topology = recorded("two")
    first, second = (node.processors for node in topology.nodes)
    threads = [
        Resident(10, "emulator", -1, first[0], 0.0),
        Resident(11, "vcpu", 0, first[0], 0.1),
        Resident(12, "vcpu", 1, first[0], 0.9),
        Resident(13, "io", -1, first[0], 0.0),
    ]
    wanted = bindings(topology, threads, [first[1], second[0]])
    assert wanted == {10: second, 11: first, 12: second, 13: second}
    vcpus = vcpus_of("web", threads, [4096, 8192])
    assert [(one.number, one.working_set, one.rate) for one in vcpus] == [
        (0, [2048, 4096], 0.1),
        (1, [2048, 4096], 0.9),
    ]


def test_the_working_set_is_what_nearly_all_accesses_go_to() -> None:
    heat = np.array([100.0, 50, 1, 0, 0, 40])
    memory = Memory(heat, heat, np.array([0, 1, 1, 1, -1, -1], dtype=np.int16))
    assert working_set(memory, recorded("two"), 4096) == [4096, 4096]
    assert working_set(memory._replace(heat=heat * 0), recorded("two"), 4096) == [0, 0]
    assert price(memory, 1 << 20, [0]) == pytest.approx(2 * (1 << 20) / 2e9)
    assert price(memory, 1 << 20, [0, 1]) == 0
