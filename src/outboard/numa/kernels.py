"""What the guest's kernel has and uses, where it tells what its pages are to it: that goes before all others.

Page tables are read at every miss of the TLB, by the processor itself, whoever runs. The kernel's text, data and slabs
serve whoever runs too, as far as they are touched at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outboard.vmm.enlighten import PageClass


def urgent(classes: NDArray[np.uint8], heat: NDArray[np.float64], per: int) -> NDArray[np.bool_]:
    """The units that go first.

    :param classes: of each page. :param heat: of each unit of ``per`` pages.
    """
    firsts = np.arange(0, classes.size, per)
    tables = np.logical_or.reduceat(classes == PageClass.PAGE_TABLES, firsts)
    kernels = np.logical_or.reduceat((classes == PageClass.KERNEL) | (classes == PageClass.SLAB), firsts)
    found: NDArray[np.bool_] = tables | (kernels & (heat > 0))
    return found
