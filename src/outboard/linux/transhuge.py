"""Large pages for ordinary shared memory, Documentation/admin-guide/mm/transhuge.rst."""

from __future__ import annotations

import re
from pathlib import Path

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def shmem_enabled() -> str:
    """When shared memory without a mount of its own gets large pages: ``never``, ``advise`` (where the process asks),
    ``within_size``, ``always``, ``deny`` or ``force``; ``never`` too where the kernel knows none."""
    try:
        chosen = re.search(r"\[(\w+)\]", SHMEM_ENABLED.read_text())
    except OSError:
        return "never"
    return "never" if chosen is None else chosen[1]
