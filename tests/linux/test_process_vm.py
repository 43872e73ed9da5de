"""Reading another process's memory maps it there."""

from __future__ import annotations

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux.pagemap import Pagemap
from outboard.linux.process_vm import touch
from tests.support.requirements import require
from tests.support.target import Target


def test_what_was_dropped_is_mapped_again_and_what_cannot_be_read_is_passed_over() -> None:
    require("root")
    with Target(mebibytes=8) as target:
        assert target.ask("d 0 2048") == "0"
        pages = np.arange(0, 2048, dtype=np.int64)
        addresses = target.start + pages * 4096
        addresses[5] = 8
        with Pagemap(target.pid) as pagemap:
            assert not (pagemap.entries(target.start, 2048) >> np.uint64(63)).any()
            assert touch(target.pid, addresses) == 2047
            present = (pagemap.entries(target.start, 2048) >> np.uint64(63)).astype(bool)
        assert present[6:].all()
        assert touch(target.pid, addresses[:0]) == 0
        assert target.ask("t").split()[1] == str(2047 * 1024)
    with pytest.raises(KernelError, match="process_vm_readv"):
        touch(2**22 + 1, addresses)
