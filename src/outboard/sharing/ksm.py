"""The kernel's own merging as another back end: for memory that is anonymous, which no overlay can be laid over.

A process says with madvise(2) which of its memory may be merged; here a call that it is made to make says so from
outside. From then on ksmd compares its pages with those of every process that has said so: there are no domains, no
limit to what guests are merged with whom, and nobody looks at reads. So it is for memory of one owner only.

The kernel merges while its own switch (/sys/kernel/mm/ksm/run) is on, which is the host's and left as it is found.

Source: madvise(2), Linux Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from outboard.errors import KernelError, RefusedError
from outboard.linux import ksm, proc, ptrace
from outboard.linux.ksm import KsmStatistics
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest

_SYS_MADVISE = 28
_MERGEABLE = "mg"
"""In smaps' VmFlags: the process has said that the mapping may be merged."""

Spans = list[tuple[int, int]]
"""Addresses: of the first byte, and of the byte behind the last."""


def check(guest: Guest) -> None:
    """See whether the kernel could merge the memory of ``guest``.

    :raise RefusedError: ``no-ksm``; ``shared-memory``: KSM merges anonymous memory only.
    """
    if not ksm.present():
        raise RefusedError("no-ksm", "this kernel has no KSM (CONFIG_KSM)")
    if any(region.has_file for region in guest.regions):
        raise RefusedError(
            "shared-memory",
            f"{guest.name}: its memory is in a file, and the kernel merges anonymous memory only; "
            "outboard sharing start shares such memory",
        )


def unsaid(guest: Guest) -> Spans:
    """The memory of ``guest`` of which nobody has said yet that it may be merged."""
    whole = [(region.hva, region.hva + region.pages * PAGE_SIZE) for region in guest.regions]
    return _mapped(guest.pid, whole, said=False)


def let_merge(pid: int, thread: int, spans: Spans) -> None:
    """Have the process say by ``thread`` that ``spans`` may be merged.

    :raise KernelError: it has ended, or the kernel refused.
    """
    _advise(pid, thread, spans, "MERGEABLE", ksm.MADV_MERGEABLE)


def take_back(pid: int, thread: int, spans: Spans) -> None:
    """Have the process say that ``spans`` are not to be merged: what was gets memory of its own again.

    :raise KernelError: it has ended, or there is no memory.
    """
    _advise(pid, thread, _mapped(pid, spans, said=True), "UNMERGEABLE", ksm.MADV_UNMERGEABLE)


def _mapped(pid: int, spans: Iterable[tuple[int, int]], *, said: bool) -> Spans:
    """What of ``spans`` is mapped, and mergeable or not; the process may have unmapped some since."""
    maps = [one for one in proc.maps(pid) if not one.shared]
    found: Spans = []
    for low, high in spans:
        for one in maps:
            piece = (max(low, one.start), min(high, one.end))
            if piece[0] < piece[1] and said == (_MERGEABLE in proc.smaps(pid, one.start).get("VmFlags", "").split()):
                found.append(piece)
    return found


def _advise(pid: int, thread: int, spans: Spans, what: str, advice: int) -> None:
    if not spans:
        return
    with ptrace.Stopped(pid, thread) as target:
        for low, high in spans:
            target.syscall(f"madvise({what})", _SYS_MADVISE, low, high - low, advice)


class Merging:
    """Lets the kernel merge the anonymous memory of ``guest``; a context manager, which un-merges at its end.

    :raise RefusedError: ``no-ksm``; ``shared-memory``: KSM merges anonymous memory only.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest) -> None:
        check(guest)
        self._guest = guest
        self._spans: Spans = []

    def __enter__(self) -> Merging:
        self._spans = unsaid(self._guest)
        let_merge(self._guest.pid, self._guest.emulator_thread(), self._spans)
        return self

    def __exit__(self, *_exc: object) -> None:
        take_back(self._guest.pid, self._guest.emulator_thread(), self._spans)

    def statistics(self) -> KsmStatistics:
        """A frozen snapshot."""
        return ksm.statistics(self._guest.pid)


def merged(pids: Sequence[int]) -> tuple[dict[int, KsmStatistics], dict[int, str]]:
    """What the kernel has merged of each process, and of whom it does not tell, and why."""
    told, failures = dict[int, KsmStatistics](), dict[int, str]()
    for pid in pids:
        try:
            told[pid] = ksm.statistics(pid)
        except KernelError as error:
            failures[pid] = str(error)
    return told, failures
