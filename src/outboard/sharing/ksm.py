"""The kernel's own merging as another back end: for memory that is anonymous, which no overlay can be laid over.

A process says with madvise(2) which of its memory may be merged; here a call that it is made to make says so from
outside. From then on ksmd compares its pages with those of every process that has said so: there are no domains, no
limit to what guests are merged with whom, and nobody looks at reads. So it is for memory of one owner only.

The kernel merges while its own switch (/sys/kernel/mm/ksm/run) is on, which is the host's and left as it is found.
"""

from __future__ import annotations

from outboard.errors import RefusedError
from outboard.linux import ksm, ptrace
from outboard.linux.ksm import KsmStatistics
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest

_SYS_MADVISE = 28


class Merging:
    """Lets the kernel merge the anonymous memory of ``guest``; a context manager, which un-merges at its end.

    :raise RefusedError: ``no-ksm``; ``shared-memory``: KSM merges anonymous memory only.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest) -> None:
        if not ksm.present():
            raise RefusedError("no-ksm", "this kernel has no KSM (CONFIG_KSM)")
        if any(region.has_file for region in guest.regions):
            raise RefusedError(
                "shared-memory",
                f"{guest.name}: its memory is in a file, and the kernel merges anonymous memory only; "
                "outboard sharing start shares such memory",
            )
        self._guest = guest

    def _advise(self, what: str, advice: int) -> None:
        with ptrace.Stopped(self._guest.pid, self._guest.emulator_thread()) as target:
            for region in self._guest.regions:
                target.syscall(f"madvise({what})", _SYS_MADVISE, region.hva, region.pages * PAGE_SIZE, advice)

    def __enter__(self) -> Merging:
        self._advise("MERGEABLE", ksm.MADV_MERGEABLE)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._advise("UNMERGEABLE", ksm.MADV_UNMERGEABLE)

    def statistics(self) -> KsmStatistics:
        """A frozen snapshot."""
        return ksm.statistics(self._guest.pid)
