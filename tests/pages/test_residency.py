"""Residency is shared with the processes forked after it was made."""

import os

from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where


def test_a_forked_process_writes_what_we_read() -> None:
    residency = Residency(16, arriving=True)
    assert residency.count(Where.PEER) == 16
    child = os.fork()
    if child == 0:
        residency.where[3:5] = Where.RESIDENT
        os._exit(0)
    os.waitpid(child, 0)
    assert residency.pages_at(Where.RESIDENT).runs().tolist() == [[3, 2]]
    assert residency.pages_at(Where.PEER) == ~residency.pages_at(Where.RESIDENT)
    assert isinstance(residency.pages_at(Where.ZERO), PageSet)
