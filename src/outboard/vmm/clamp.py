"""The hold on a guest's memory: a userfaultfd, open here and, where pages are absent, inside the guest's process too.

The descriptor inside outlives us: while it is open, whoever touches an absent page waits; were the last one closed,
absent pages would read as zeros. A successor takes the same userfaultfd by pidfd_getfd(2), and needs no record of its
number: of those it finds inside, the kernel lets only the one that holds the memory register it again.

A trace takes no page away, and is better forgotten when we die, however suddenly: its userfaultfd stays open here
alone, and the kernel closes it and wakes whoever waits.

Source: userfaultfd(2), pidfd_getfd(2).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable

from outboard.errors import KernelError, RefusedError
from outboard.linux import pidfd, proc, ptrace
from outboard.linux.hand import await_none
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest, Region

_VM_FLAGS = {"um": Mode.MISSING, "uw": Mode.WP, "ui": Mode.MINOR}
"""As smaps spells them."""


class Clamp:
    """A userfaultfd that is registered over all of ``guest``'s memory; made by :meth:`inject`,
    :meth:`take_again` or :meth:`handed_over`.

    :ivar mode: what it is registered for.

    Synchronization: as :class:`~outboard.linux.userfaultfd.Userfaultfd`.
    """

    def __init__(self, guest: Guest, uffd: Userfaultfd, mode: Mode, inside: int | None) -> None:
        self.guest = guest
        self.uffd = uffd
        self.mode = mode
        self._inside = inside
        # Only what is ours is undone: older kernels let anybody unregister anybody's memory.
        self._ours: list[Region] = []

    @classmethod
    def inject(cls, guest: Guest, features: Features, mode: Mode, *, outlives_us: bool = True) -> Clamp:
        """Make a userfaultfd inside the process.

        :param outlives_us: leave a descriptor inside, which holds the memory until another clamp takes it again.

        :raise RefusedError: ``uffd-taken``: another userfaultfd holds the memory.
        :raise KernelError: injection or registration failed; the process holds no descriptor of ours then.
        """
        ours, inside = ptrace.inject_userfaultfd(guest.pid, guest.emulator_thread())
        clamp = cls(guest, Userfaultfd(ours), mode, inside)
        try:
            if not outlives_us:
                clamp._close_inside()
            clamp.uffd.api(features)
            clamp._register()
        except KernelError as error:
            clamp.release()
            if error.errno == errno.EBUSY:
                raise RefusedError(
                    "uffd-taken",
                    f"{guest.name}: its memory is registered with another userfaultfd (QEMU's post-copy or background "
                    "snapshot, or another manager); let that end first",
                ) from error
            raise
        return clamp

    @classmethod
    def take_again(cls, guest: Guest, mode: Mode) -> Clamp | None:
        """Take what an earlier clamp of ours left inside the process and holds the memory, if there is one.

        Whoever made it must be gone: two would take each other's faults.

        :param mode: what it was registered for: write-protection or minor faults among that.
        :raise KernelError: the process has ended; EBUSY: the hand of whoever had it does not end.
        """
        for number, link in proc.descriptors(guest.pid).items():
            if "[userfaultfd]" not in link:
                continue
            uffd = Userfaultfd(_duplicate(guest.pid, number))
            clamp = cls(guest, uffd, mode, number)
            with contextlib.ExitStack() as undo:
                undo.callback(uffd.close)
                if not _works(clamp._see_that_it_is_held):
                    continue
                # The hand of whoever had it finishes its order, and waits for its events to be read: until then the
                # kernel lets nobody protect anything. What it maps nobody else registers.
                await_none(guest.pid, uffd.read)
                if not _works(clamp._register):
                    continue
                undo.pop_all()
            return clamp
        return None

    @classmethod
    def handed_over(cls, guest: Guest, uffd: Userfaultfd, mode: Mode) -> Clamp:
        """Hold a guest by the userfaultfd that its VMM has made, registered for ``mode`` and handed over.

        The VMM keeps a descriptor of its own, and closes that itself.
        """
        clamp = cls(guest, uffd, mode, None)
        clamp._ours += guest.regions
        return clamp

    def _see_that_it_is_held(self) -> None:
        """By anybody: registering it again tells whether by us. What is asked for changes nothing.

        :raise KernelError: ENOENT: nobody has the memory, so a userfaultfd that lies about is somebody else's affair.
        """
        start, size = self.guest.regions[0].hva, self.guest.regions[0].page_size
        if self.mode & Mode.WP:
            while True:
                try:
                    self.uffd.write_protect(start, size, protect=False)
                    return
                except KernelError as error:
                    if error.errno != errno.EAGAIN:
                        raise
                # Whoever had it died while the address space changed, which goes on when that is read; the faults
                # among what is read are asked again when the successor has woken everybody.
                self.uffd.read()
        try:
            self.uffd.continue_(start, size)
        except KernelError as error:
            # EFAULT: the page is absent, in memory that somebody holds.
            if error.errno != errno.EFAULT:
                raise

    def _register(self) -> None:
        for region in self.guest.regions:
            self.uffd.register(region.hva, region.pages * PAGE_SIZE, self.mode)
            self._ours.append(region)

    def _close_inside(self) -> None:
        if self._inside is not None:
            ptrace.close_in_target(self.guest.pid, self._inside, self.guest.emulator_thread())
            self._inside = None

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
            for region in self._ours:
                with contextlib.suppress(KernelError):
                    self.uffd.unregister(region.hva, region.pages * PAGE_SIZE)
            self._close_inside()
        except KernelError:
            if pidfd.alive(self.guest.pid):
                raise
        finally:
            self.uffd.close()


def registrations(pid: int, regions: Iterable[Region]) -> list[Mode]:
    """What each mapping of ``regions`` is registered for, with whosever userfaultfd.

    smaps walks the page tables, 9 ms a GiB.

    :raise KernelError: the process has ended.
    """
    found = []
    for start in {region.mapping.start for region in regions}:
        flags = proc.smaps(pid, start).get("VmFlags", "").split()
        found.append(Mode(sum(mode for flag, mode in _VM_FLAGS.items() if flag in flags)))
    return found


def _works(step: Callable[[], None]) -> bool:
    """Whether a userfaultfd is the one that holds the memory, by something that only that one can do.

    :raise KernelError: the process has ended.
    """
    try:
        step()
    except KernelError as error:
        if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
            raise
        return False
    return True


def _duplicate(pid: int, number: int) -> int:
    process = pidfd.open(pid)
    try:
        return pidfd.getfd(process, number)
    finally:
        pidfd.close(process)
