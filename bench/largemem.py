"""Large pages for a bench, and the machine afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outboard.linux import transhuge

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextmanager
def large_pages(huge: int = 0) -> Iterator[None]:
    """Large pages for shared memory that asks for them, and ``huge`` more huge pages."""
    setting, pool = transhuge.shmem_enabled(), int(_POOL.read_text())
    transhuge.SHMEM_ENABLED.write_text("advise")
    _POOL.write_text(str(pool + huge))
    try:
        yield
    finally:
        transhuge.SHMEM_ENABLED.write_text(setting)
        _POOL.write_text(str(pool))
