"""Cloud Hypervisor's handoff, as of its pull request 8657. Without I/O.

Each message is a length, u32 little endian, and as many bytes of JSON. The first is ``handoff`` and has the userfaultfd
beside it (SCM_RIGHTS); ``add_region`` follows whenever memory has been added, with no descriptor. Each is answered by
one byte, of any value, within 2 s; without it the VMM drops the connection, and what it added stays added.

There is no version but 0. Fields may be added within a version, so unknown ones are passed over. An unknown type cannot
be: to answer it would say that it was acted upon, not to answer it leaves the VMM waiting. It ends the connection. The
VMM takes that for a manager that is gone, goes on, and can hand everything over anew.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from outboard.errors import PeerError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pages import PAGE_SIZE
from outboard.vmm.handoff import MAX_BODY, Bytes, Claim, Conversation, Handoff, checked, decode

VERSION = 0
HEAD = struct.Struct("<I")
_TOKENS = {
    "MISSING": (Mode.MISSING, Features(0)),
    "WP": (Mode.WP, Features(0)),
    "WP_UNPOPULATED": (Mode(0), Features.WP_UNPOPULATED),
    "WP_ASYNC": (Mode(0), Features.WP_ASYNC),
}


class _Head(msgspec.Struct, frozen=True):
    type: str
    version: int = VERSION


class _Region(msgspec.Struct, frozen=True):
    guest_phys_addr: Bytes
    host_virt_addr: Bytes
    size: Bytes
    backing_file_offset: Bytes = 0

    def claim(self) -> Claim:
        return checked(
            Claim(self.guest_phys_addr, self.host_virt_addr, self.size, self.backing_file_offset, 0), PAGE_SIZE
        )


class _Handoff(msgspec.Struct, frozen=True):
    vmm_pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    mode: str
    regions: Annotated[list[_Region], msgspec.Meta(min_length=1)]


class _AddRegion(msgspec.Struct, frozen=True):
    region: _Region


class CloudHypervisor(Conversation):
    """A conversation with Cloud Hypervisor."""

    who = "Cloud Hypervisor"
    answered = True

    def wanted(self) -> int:
        """See :meth:`Conversation.wanted`."""
        if len(self._bytes) < HEAD.size:
            return HEAD.size - len(self._bytes)
        return HEAD.size + self._length() - len(self._bytes)

    def _length(self) -> int:
        (length,) = HEAD.unpack_from(self._bytes)
        return int(length)

    def _message(self) -> Handoff | Claim | None:
        if len(self._bytes) < HEAD.size:
            return None
        if not 0 < self._length() <= MAX_BODY:
            raise PeerError(f"{self.who} announced a message of {self._length()} bytes; 1 to {MAX_BODY} may be")
        if self.wanted():
            return None
        body = bytes(self._bytes[HEAD.size :])
        head = decode(body, _Head, self.who)
        if head.type == "add_region" and self._handed:
            return decode(body, _AddRegion, self.who).region.claim()
        if head.type != "handoff" or self._handed:
            due = "only add_region" if self._handed else "a handoff"
            raise PeerError(f"{self.who} sent a message of type {head.type!r:.40} where {due} is known")
        if head.version != VERSION:
            raise PeerError(f"{self.who} hands over by version {head.version} of its protocol; {VERSION} is known here")
        self._one_descriptor()
        told = decode(body, _Handoff, self.who)
        mode, features = _mode_of(told.mode)
        return Handoff(told.vmm_pid, mode, features, tuple(region.claim() for region in told.regions))


def _mode_of(words: str) -> tuple[Mode, Features]:
    """What ``MISSING|WP|WP_ASYNC`` says: what the memory is registered for, and which features that takes."""
    mode, features = Mode(0), Features(0)
    for word in words.split("|"):
        if word.strip() not in _TOKENS:
            raise PeerError(f"Cloud Hypervisor registered its memory in a mode {word!r:.40} that is not known here")
        more, also = _TOKENS[word.strip()]
        mode, features = mode | more, features | also
    if not mode or (features and Mode.WP not in mode):
        raise PeerError(f"Cloud Hypervisor registered its memory in no mode that there is: {words!r:.80}")
    return mode, features
