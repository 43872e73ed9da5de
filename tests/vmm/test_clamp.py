"""The hold on a guest's memory: made, taken again, handed over, and undone without a trace."""

from __future__ import annotations

import mmap
import os
import select
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import proc, ptrace
from outboard.linux.hand import Hand
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

FEATURES = Features.MISSING_SHMEM | Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
MODE = Mode.MISSING | Mode.WP
_SYS_MMAP, _MAP_FIXED = 9, 0x10


@pytest.fixture
def target() -> Iterator[Target]:
    require("root")
    with Target(mebibytes=1) as made:
        yield made


@pytest.fixture
def guest(target: Target) -> Iterator[Guest]:
    with guest_of(target) as made:
        yield made


def inside(guest: Guest) -> int:
    return sum("userfaultfd" in link for link in proc.descriptors(guest.pid).values())


def test_it_is_made_and_leaves_nothing(target: Target, guest: Guest) -> None:
    clamp = Clamp.inject(guest, FEATURES, MODE)
    assert inside(guest) == 1
    clamp.uffd.write_protect(target.start, 4096)
    target.say("w 0 5")
    assert target.waits()
    clamp.release()
    assert target.answer() == "written"
    assert inside(guest) == 0
    clamp.release()


def test_what_is_not_to_outlive_us_is_open_here_alone(target: Target, guest: Guest) -> None:
    clamp = Clamp.inject(guest, FEATURES, MODE, outlives_us=False)
    assert inside(guest) == 0
    clamp.uffd.write_protect(target.start, 4096)
    target.say("w 0 5")
    assert target.waits()
    # As the kernel does for a process that dies.
    clamp.close()
    assert target.answer() == "written"


def test_what_was_left_is_taken_again(guest: Guest) -> None:
    Clamp.inject(guest, FEATURES, MODE).close()
    again = Clamp.take_again(guest, MODE)
    assert again is not None
    assert inside(guest) == 1
    again.release()
    assert inside(guest) == 0
    assert Clamp.take_again(guest, MODE) is None


def test_the_hand_of_who_had_it_finishes_first(target: Target, guest: Guest) -> None:
    child = os.fork()
    if child == 0:
        clamp = Clamp.inject(guest, FEATURES | Features.EVENT_UNMAP, MODE)
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        rows = [[_SYS_MMAP, target.at(page), 4096, mmap.PROT_READ, kind, -1, 0] for page in range(1, 201)]
        threading.Thread(target=Hand(guest.pid).batch, args=(np.array(rows, dtype=np.int64),), daemon=True).start()
        # Each mapping waits until somebody has read that the one before it is gone.
        select.select([clamp.uffd.fileno()], [], [])
        os._exit(0)
    os.waitpid(child, 0)
    again = Clamp.take_again(guest, MODE)
    assert again is not None
    assert "outboard-hand" not in [thread.name for thread in proc.threads(target.pid)]
    again.uffd.write_protect(target.start, target.size)
    again.release()


def test_a_userfaultfd_that_holds_nothing_is_somebody_elses(guest: Guest) -> None:
    ours, theirs = ptrace.inject_userfaultfd(guest.pid)
    with Userfaultfd(ours) as uffd:
        uffd.api(FEATURES)
        assert Clamp.take_again(guest, MODE) is None
        clamp = Clamp.inject(guest, FEATURES, MODE)
        clamp.close()
        again = Clamp.take_again(guest, MODE)
        assert again is not None
        again.release()
    assert inside(guest) == 1
    ptrace.close_in_target(guest.pid, theirs)


def test_anothers_hold_is_refused_and_stays(target: Target, guest: Guest) -> None:
    other = Clamp.inject(guest, FEATURES, MODE)
    with pytest.raises(RefusedError, match="another userfaultfd") as caught:
        Clamp.inject(guest, FEATURES, MODE)
    assert caught.value.reason == "uffd-taken"
    assert inside(guest) == 1
    other.uffd.write_protect(target.start, 4096)
    target.say("w 0 5")
    assert target.waits()
    other.release()
    assert target.answer() == "written"


def test_what_the_kernel_does_not_have_leaves_nothing(guest: Guest) -> None:
    with pytest.raises(KernelError, match="UFFDIO_API"):
        Clamp.inject(guest, Features(1 << 63), MODE)
    assert inside(guest) == 0


def test_what_was_handed_over_is_unregistered_and_left_to_its_owner(target: Target, guest: Guest) -> None:
    made = Clamp.inject(guest, FEATURES, MODE)
    clamp = Clamp.handed_over(guest, made.uffd, MODE)
    clamp.release()
    assert inside(guest) == 1
    assert target.ask("r 3") == "3"
