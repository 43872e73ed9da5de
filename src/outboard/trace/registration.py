"""A userfaultfd of a trace's own, injected into a guest and registered over all of its memory.

It stays open here alone, unlike a pager's: a trace takes no page away, so if we die, however suddenly, the kernel may
close it, wake whoever waits, and let the guest go on as though there had been none.
"""

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
        ours, theirs = ptrace.inject_userfaultfd(guest.pid, guest.emulator_thread())
        self.uffd = Userfaultfd(ours)
        try:
            ptrace.close_in_target(guest.pid, theirs, guest.emulator_thread())
            self.uffd.api(features)
            for region in guest.regions:
                self.uffd.register(region.hva, region.pages * PAGE_SIZE, mode)
                self._registered.append((region.hva, region.pages * PAGE_SIZE))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unregister, which wakes whoever waits, and close the userfaultfd. Idempotent."""
        if self.uffd.fileno() < 0:
            return
        try:
            for start, length in self._registered:
                self.uffd.unregister(start, length)
        except KernelError:
            # A VMM that has ended needs no tidying; one that lives keeps the error.
            if pidfd.alive(self._guest.pid):
                raise
        finally:
            self.uffd.close()
