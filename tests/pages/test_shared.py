"""Claims: of two processes that want the same flags, each flag goes to exactly one."""

import os

import numpy as np

from outboard.pages.shared import claim, claim_one, shared_array


def test_each_flag_is_claimed_once() -> None:
    flags = shared_array(1 << 20, np.uint8)
    theirs = shared_array(1 << 20, np.uint8)
    child = os.fork()
    if child == 0:
        for first in range(0, 1 << 20, 64):
            theirs[first : first + 64] = claim(flags, first, 64)
        os._exit(0)
    ours = np.concatenate([claim(flags, first, 64) for first in range(0, 1 << 20, 64)])
    os.waitpid(child, 0)
    assert np.all(ours ^ theirs.astype(np.bool_))
    assert not claim(flags, 5, 3).any()


def test_one_flag_at_a_time_against_many() -> None:
    flags = shared_array(1 << 16, np.uint8)
    theirs = shared_array(1 << 16, np.uint8)
    child = os.fork()
    if child == 0:
        for first in range(0, 1 << 16, 64):
            theirs[first : first + 64] = claim(flags, first, 64)
        os._exit(0)
    ours = np.array([claim_one(flags, index) for index in range(1 << 16)])
    os.waitpid(child, 0)
    assert np.all(ours ^ theirs.astype(np.bool_))
    assert not claim_one(flags, 5)
