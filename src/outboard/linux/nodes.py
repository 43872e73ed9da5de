"""sysfs: nodes, processors and caches, as Documentation/ABI/stable/sysfs-devices-node and sysfs-devices-system-cpu say.

What a kernel or a hypervisor leaves out is left out here too: no caches, no distances.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from outboard.errors import KernelError

SYSTEM = Path("/sys/devices/system")
_MOST = 1 << 16
"""More processors than any kernel has: a larger number in a list is damage."""


class NodeFacts(NamedTuple):
    """A node; ``memory`` and ``free`` in bytes; ``distances`` to the nodes that are online, in their order."""

    number: int
    processors: tuple[int, ...]
    memory: int
    free: int
    distances: tuple[int, ...]


class CacheFacts(NamedTuple):
    """A cache, its size in bytes and the processors that share it; ``kind`` is Data, Instruction or Unified."""

    level: int
    kind: str
    size: int
    processors: tuple[int, ...]


class ProcessorFacts(NamedTuple):
    """A processor that is online; ``siblings`` are the threads of its core, itself among them."""

    number: int
    package: int
    siblings: tuple[int, ...]
    caches: tuple[CacheFacts, ...]


def numbers(text: str) -> tuple[int, ...]:
    """A list as the kernel prints it, ``0-2,8``.

    :raise ValueError: it is none.
    """
    found: list[int] = []
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < _MOST:
            raise ValueError(f"{part!r} is no range of processors or nodes")
        found += range(low, high + 1)
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise KernelError(f"read of {path}", error.errno or 0) from error


def _optional(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip() or otherwise
    except OSError:
        return otherwise


def _meminfo(text: str, name: str) -> int:
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[2] == name + ":":
            return int(words[3]) << 10
    return 0


def nodes(system: Path = SYSTEM) -> list[NodeFacts]:
    """The nodes that are online; a kernel without NUMA has none.

    :raise KernelError: sysfs could not be read.
    """
    root = system / "node"
    if not (root / "online").exists():
        return []
    found = []
    for number in numbers(_read(root / "online")):
        node = root / f"node{number}"
        meminfo = _read(node / "meminfo")
        distances = tuple(int(word) for word in _optional(node / "distance", "").split())
        processors = numbers(_read(node / "cpulist"))
        facts = NodeFacts(number, processors, _meminfo(meminfo, "MemTotal"), _meminfo(meminfo, "MemFree"), distances)
        found.append(facts)
    return found


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def _caches(processor: Path) -> tuple[CacheFacts, ...]:
    found = []
    for index in sorted((processor / "cache").glob("index[0-9]*")):
        level, size = _optional(index / "level", ""), _optional(index / "size", "")
        if not (level and size):
            continue
        shared = numbers(_optional(index / "shared_cpu_list", processor.name.removeprefix("cpu")))
        found.append(CacheFacts(int(level), _optional(index / "type", "Unified"), _size(size), shared))
    return tuple(found)


def processors(system: Path = SYSTEM) -> list[ProcessorFacts]:
    """The processors that are online.

    :raise KernelError: sysfs could not be read.
    """
    found = []
    for number in numbers(_read(system / "cpu" / "online")):
        cpu = system / "cpu" / f"cpu{number}"
        siblings = numbers(_optional(cpu / "topology" / "thread_siblings_list", str(number)))
        package = int(_optional(cpu / "topology" / "physical_package_id", "0"))
        found.append(ProcessorFacts(number, max(0, package), siblings, _caches(cpu)))
    return found
