"""The hold on a guest's memory: a userfaultfd that is open both here and inside the guest's process.

The descriptor inside outlives us: while it is open, whoever touches an absent page waits; were the last one closed,
absent pages would read as zeros. A successor takes the same userfaultfd by pidfd_getfd(2), and needs no record of its
number: of those it finds inside, the kernel lets only the one that holds the memory register it again.

Source: userfaultfd(2), pidfd_getfd(2).
"""

from __future__ import annotations

import contextlib
import errno

from outboard.errors import KernelError, RefusedError
from outboard.linux import pidfd, proc, ptrace
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest


class Clamp:
    """A userfaultfd registered over all of ``guest``'s memory for ``mode``.

    One that an earlier clamp of ours left inside the process is taken again; else one is injected.

    :raise RefusedError: ``uffd-taken``: another manager's userfaultfd holds the memory.
    :raise KernelError: injection or registration failed; the process holds no descriptor of ours then.

    Synchronization: as :class:`~outboard.linux.userfaultfd.Userfaultfd`.
    """

    def __init__(self, guest: Guest, features: Features, mode: Mode) -> None:
        self.guest = guest
        for number in self._left_inside():
            uffd = Userfaultfd(self._duplicate(number))
            try:
                # ENOENT: nobody has the memory, so a userfaultfd that lies about is somebody else's affair.
                uffd.write_protect(guest.regions[0].hva, PAGE_SIZE, protect=False)
                self._register(uffd, mode)
            except KernelError as error:
                uffd.close()
                if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
                    raise
                continue
            self.uffd, self._theirs, self.taken_again = uffd, number, True
            return
        ours, self._theirs = ptrace.inject_userfaultfd(guest.pid, guest.emulator_thread())
        self.uffd, self.taken_again = Userfaultfd(ours), False
        try:
            self.uffd.api(features)
            self._register(self.uffd, mode)
        except KernelError as error:
            self.release()
            if error.errno == errno.EBUSY:
                raise RefusedError(
                    "uffd-taken",
                    f"{guest.name}: its memory is registered with another userfaultfd (QEMU's post-copy or background "
                    "snapshot, or another manager); let that end first",
                ) from error
            raise

    def _left_inside(self) -> list[int]:
        return [number for number, link in proc.descriptors(self.guest.pid).items() if "[userfaultfd]" in link]

    def _duplicate(self, number: int) -> int:
        process = pidfd.open(self.guest.pid)
        try:
            return pidfd.getfd(process, number)
        finally:
            pidfd.close(process)

    def _register(self, uffd: Userfaultfd, mode: Mode) -> None:
        for region in self.guest.regions:
            uffd.register(region.hva, region.pages * PAGE_SIZE, mode)

    def close(self) -> None:
        """Let go here only: whoever touches an absent page waits for a successor. Idempotent."""
        self.uffd.close()

    def release(self) -> None:
        """Give the memory back whole: unregister it, and close the userfaultfd here and inside the process. Idempotent.

        What is still absent reads as zeros from now on.
        """
        if self.uffd.fileno() < 0:
            return
        try:
            for region in self.guest.regions:
                with contextlib.suppress(KernelError):
                    self.uffd.unregister(region.hva, region.pages * PAGE_SIZE)
            ptrace.close_in_target(self.guest.pid, self._theirs)
        except KernelError:
            if pidfd.alive(self.guest.pid):
                raise
        finally:
            self.uffd.close()
