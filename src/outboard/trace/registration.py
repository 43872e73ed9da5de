"""A userfaultfd of a trace's own, injected into a guest and registered over all of its memory."""

from __future__ import annotations

from outboard.errors import KernelError
from outboard.linux import pidfd, ptrace
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest


class Registration:
    """The memory of ``guest``, watched by ``uffd`` in one mode.

    :raise KernelError: injection or registration failed; EBUSY when another userfaultfd holds the memory.
    """

    def __init__(self, guest: Guest, features: Features, mode: Mode) -> None:
        self._guest = guest
        self._registered: list[tuple[int, int]] = []
        ours, self._theirs = ptrace.inject_userfaultfd(guest.pid, guest.emulator_thread())
        self.uffd = Userfaultfd(ours)
        try:
            self.uffd.api(features)
            for region in guest.regions:
                self.uffd.register(region.hva, region.pages * PAGE_SIZE, mode)
                self._registered.append((region.hva, region.pages * PAGE_SIZE))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unregister, which wakes whoever waits, and close the userfaultfd here and inside the VMM. Idempotent."""
        if self.uffd.fileno() < 0:
            return
        try:
            for start, length in self._registered:
                self.uffd.unregister(start, length)
            ptrace.close_in_target(self._guest.pid, self._theirs, self._guest.emulator_thread())
        except KernelError:
            # A VMM that has ended needs no tidying; one that lives keeps the error.
            if pidfd.alive(self._guest.pid):
                raise
        finally:
            self.uffd.close()
