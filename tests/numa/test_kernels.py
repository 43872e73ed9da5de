"""Which units go before all others."""

from __future__ import annotations

import numpy as np

from outboard.numa.kernels import urgent
from outboard.vmm.enlighten import PageClass

CLASSES = np.array(
    [PageClass.OTHER, PageClass.PAGE_TABLES, PageClass.KERNEL, PageClass.SLAB, PageClass.ACTIVE_ANON, PageClass.SLAB],
    dtype=np.uint8,
)


def test_page_tables_go_first_and_of_the_kernel_what_is_touched() -> None:
    assert urgent(CLASSES, np.array([9.0, 0, 1, 0, 9, 1]), 1).tolist() == [False, True, True, False, False, True]


def test_a_large_page_goes_first_for_any_of_its_pages() -> None:
    assert urgent(CLASSES, np.array([0.0, 1]), 4).tolist() == [True, True]
    assert urgent(CLASSES, np.array([0.0, 0]), 4).tolist() == [True, False]
