"""Firecracker's handoff (docs/snapshotting/handling-page-faults-on-snapshot-resume.md). Without I/O.

A microVM that is resumed from a snapshot sends a JSON array of its regions with the userfaultfd beside it, without a
length, in one go; nothing more is said, in either direction. The socket stays open for as long as it lives. The memory
is anonymous. Offsets are in the snapshot's memory file, where the regions follow one another.
"""

from __future__ import annotations

import msgspec

from outboard.errors import PeerError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pages import PAGE_SIZE
from outboard.vmm.handoff import MAX_BODY, Bytes, Claim, Conversation, Handoff, checked, decode

_PAGE_SIZES = (PAGE_SIZE, 2 << 20)


class _SnapshotRegion(msgspec.Struct, frozen=True):
    """``page_size`` is there from version 1.12 on; ``page_size_kib``, in bytes all the same, from 1.7 on."""

    base_host_virt_addr: Bytes
    size: Bytes
    offset: Bytes
    page_size: Bytes = 0
    page_size_kib: Bytes = 0

    def claim(self) -> Claim:
        page_size = self.page_size or self.page_size_kib or PAGE_SIZE
        if page_size not in _PAGE_SIZES:
            raise PeerError(f"Firecracker names a page size of {page_size} bytes; 4 KiB and 2 MiB are known here")
        return checked(Claim(self.offset, self.base_host_virt_addr, self.size, self.offset, page_size), page_size)


class Firecracker(Conversation):
    """A conversation with Firecracker, which says one thing only.

    It registers for missing pages, and for the events of a balloon that gives memory back.
    """

    who = "Firecracker"
    answered = False

    def wanted(self) -> int:
        """See :meth:`Conversation.wanted`."""
        return MAX_BODY + 1 - len(self._bytes)

    def _message(self) -> Handoff | None:
        if self._handed:
            raise PeerError(f"{self.who} sent {len(self._bytes)} bytes after its handoff, where nothing may follow")
        if len(self._bytes) > MAX_BODY:
            raise PeerError(f"{self.who} sent more than {MAX_BODY} bytes, the most that a handoff may have")
        if not self._bytes.startswith(b"["):
            raise PeerError(f"{self.who} sent {bytes(self._bytes[:40])!r} where a JSON array of its regions is due")
        # The array ends where a bracket does; a stream socket may have cut it before.
        if not self._bytes.rstrip().endswith(b"]"):
            return None
        told = decode(bytes(self._bytes), list[_SnapshotRegion], self.who)
        if not told:
            raise PeerError(f"{self.who} sent an empty array of regions")
        self._one_descriptor()
        return Handoff(None, Mode.MISSING, Features.EVENT_REMOVE, tuple(region.claim() for region in told))
