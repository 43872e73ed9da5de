"""What page flags mean: against a plain reading of the rules, and for a QEMU whose guest's agent is a fake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.vmm import kpageflags
from outboard.vmm.attach import attach
from outboard.vmm.enlighten import Flag, PageClass, chunks, classes_of, classify, spread_heads
from outboard.vmm.guest import Guest
from outboard.vmm.guest_agent import GuestAgent
from tests.support.fake_agent import FakeAgent
from tests.support.machine import Machine
from tests.support.requirements import require

MIB = 256
HEAD, TAIL, BUDDY = Flag.COMPOUND_HEAD, Flag.COMPOUND_TAIL, Flag.BUDDY


def bits(*flags: Flag) -> int:
    return sum(1 << flag for flag in set(flags))


def array(values: list[int]) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((Flag.PGTABLE,), PageClass.PAGE_TABLES),
        ((Flag.RESERVED,), PageClass.KERNEL),
        ((Flag.SLAB, HEAD), PageClass.SLAB),
        ((Flag.LRU, Flag.ACTIVE, Flag.ANON), PageClass.ACTIVE_ANON),
        ((Flag.LRU, Flag.REFERENCED, Flag.ANON), PageClass.ACTIVE_ANON),
        ((Flag.HUGE, Flag.MMAP, HEAD), PageClass.ACTIVE_ANON),
        ((Flag.HUGE, HEAD), PageClass.OTHER),
        ((Flag.LRU, Flag.ACTIVE), PageClass.ACTIVE_FILE),
        ((Flag.LRU, Flag.ANON), PageClass.INACTIVE),
        ((Flag.LRU,), PageClass.INACTIVE),
        ((Flag.ACTIVE,), PageClass.OTHER),
        ((), PageClass.OTHER),
        ((BUDDY,), PageClass.FREE),
        # What contradicts itself is live.
        ((BUDDY, Flag.LRU), PageClass.INACTIVE),
        ((BUDDY, Flag.SLAB), PageClass.SLAB),
        ((BUDDY, Flag.PGTABLE), PageClass.PAGE_TABLES),
    ],
)
def test_classes(flags: tuple[Flag, ...], expected: PageClass) -> None:
    assert classify(array([bits(*flags)])).tolist() == [expected]


def test_flags_of_a_compound_page_count_for_its_tails() -> None:
    head = bits(HEAD, Flag.LRU, Flag.ACTIVE, Flag.ANON)
    flags = array([bits(BUDDY), head, bits(TAIL), bits(TAIL), 0, bits(HEAD, Flag.SLAB), bits(TAIL), bits(Flag.LRU)])
    anon, slab = PageClass.ACTIVE_ANON, PageClass.SLAB
    expected = [PageClass.FREE, anon, anon, anon, PageClass.OTHER, slab, slab, PageClass.INACTIVE]
    assert classify(spread_heads(flags)).tolist() == expected


@given(
    st.lists(
        st.sets(st.sampled_from([HEAD, TAIL, BUDDY, Flag.LRU, Flag.ACTIVE, Flag.ANON, Flag.SLAB])),
        min_size=1,
        max_size=60,
    ),
    st.integers(0, 59),
)
def test_spreading_is_what_a_walk_would_do_wherever_it_is_cut(pages: list[set[Flag]], cut: int) -> None:
    flags = array([bits(*page) for page in pages])
    expected, head = [], 0
    for value in flags.tolist():
        head = value if value >> HEAD & 1 else head
        expected.append(value | head if value >> TAIL & 1 else value)
    assert spread_heads(flags).tolist() == expected
    before, after = flags[:cut], flags[cut:]
    heads = [value for value in before.tolist() if value >> HEAD & 1]
    parts = [spread_heads(before).tolist(), spread_heads(after, heads[-1] if heads else 0).tolist()]
    assert parts[0] + parts[1] == expected


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """3 GiB with the hole below 4 GiB."""
    require("qemu", "root")
    with Machine(3072) as vm, attach(qmp=vm.qmp) as attached:
        yield attached


def told(guest: Guest, path: Path, flags: NDArray[np.uint64]) -> NDArray[np.uint8]:
    classes = np.full(guest.pages, 255, dtype=np.uint8)
    with FakeAgent(path, {kpageflags.PATH: flags.tobytes()}), GuestAgent(path, 10) as agent:
        for first, part in chunks(guest, agent, deadline=time.monotonic() + 10):
            classes[first : first + part.size] = part
    return classes


def test_frames_become_pages_across_the_hole(guest: Guest, tmp_path: Path) -> None:
    flags = np.zeros(5120 * MIB, dtype=np.uint64)
    flags[: 2048 * MIB] = bits(BUDDY)
    flags[2048 * MIB : 4096 * MIB] = bits(Flag.SLAB)
    flags[4096 * MIB :] = bits(Flag.PGTABLE)
    classes = told(guest, tmp_path / "agent", flags)
    expected = np.full(3072 * MIB, PageClass.PAGE_TABLES)
    expected[: 2048 * MIB] = PageClass.FREE
    expected[0xA0:0x100] = PageClass.OTHER
    assert np.array_equal(classes, expected)


def test_nothing_is_said_of_what_the_guest_does_not_list(guest: Guest, tmp_path: Path) -> None:
    flags = np.full(5120 * MIB - 32, bits(BUDDY), dtype=np.uint64)
    classes = told(guest, tmp_path / "agent", flags)
    assert np.all(classes[-32:] == 255)
    assert np.all(classes[0x100:-32] == PageClass.FREE)
    with FakeAgent(tmp_path / "other", {kpageflags.PATH: flags.tobytes()}):
        classes = classes_of(guest, tmp_path / "other", 10)
    assert np.all(classes[-32:] == PageClass.OTHER)
    assert np.all(classes[0x100:-32] == PageClass.FREE)


def test_a_guest_that_lies_of_memory_it_has_not_hurts_nobody(guest: Guest, tmp_path: Path) -> None:
    classes = told(guest, tmp_path / "agent", np.full(20000 * MIB, bits(BUDDY), dtype=np.uint64))
    assert classes.size == guest.pages
    assert np.all(classes[0xA0:0x100] == PageClass.OTHER)


def test_a_guest_that_says_nothing(guest: Guest, tmp_path: Path) -> None:
    with (
        FakeAgent(tmp_path / "empty", {kpageflags.PATH: b""}),
        GuestAgent(tmp_path / "empty", 5) as agent,
        pytest.raises(PeerError, match="tells nothing of its pages: its /proc/kpageflags is empty"),
    ):
        list(chunks(guest, agent, deadline=time.monotonic() + 5))
    with (
        FakeAgent(tmp_path / "none", {}, disabled=frozenset({"guest-exec", "guest-file-open"})),
        GuestAgent(tmp_path / "none", 5) as agent,
        pytest.raises(PeerError, match="has been disabled for this instance"),
    ):
        list(chunks(guest, agent, deadline=time.monotonic() + 5))
