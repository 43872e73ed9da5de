"""The machine a session ran on, for the report."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from .document import Machine
from .hosts import run


def machine(accelerator: str) -> Machine:
    """Read the facts from /proc and from QEMU.

    :param accelerator: what the VMs really ran with.
    """
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    kib = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    version = re.search(r"version (\S+)", run("qemu-system-x86_64", "--version"))
    return Machine(
        cpu=model[1] if model else platform.machine(),
        cores=os.cpu_count() or 1,
        memory_gib=int(kib[1]) / 2**20 if kib else 0.0,
        kernel=platform.release(),
        qemu=version[1] if version else "of an unknown version",
        accelerator=accelerator,
    )
