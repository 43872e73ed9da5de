"""A VMM hands over the userfaultfd of its guest's memory: what is said, whatever the dialect. Without I/O.

The dialects are :mod:`outboard.vmm.cloud_hypervisor` and :mod:`outboard.vmm.firecracker`. Whatever is said is checked
for itself there, and against what the kernel knows in :mod:`outboard.vmm.claims`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import msgspec

from outboard.errors import PeerError
from outboard.linux.userfaultfd import Features, Mode

MAX_BODY = 64 << 10
"""Bytes of JSON: a VMM has a handful of regions, of some 130 bytes each."""
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 57)]
"""An address or a size: user space with five-level page tables ends at 1 << 56."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claim:
    """A piece of guest memory as the VMM tells of it, in bytes.

    Firecracker tells no guest-physical address: ``gpa`` is then the offset. ``offset`` is in the file behind the
    memory, or (Firecracker) in the snapshot that it comes from. ``page_size`` is 0 where it was not told.
    """

    gpa: int
    hva: int
    size: int
    offset: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Handoff:
    """The userfaultfd is ours: registered over ``claims`` in ``mode``, with at least ``features``.

    ``pid`` is what the VMM says it is, None where it does not say.
    """

    pid: int | None
    mode: Mode
    features: Features
    claims: tuple[Claim, ...]


class Conversation(ABC):
    """What one VMM says on one connection.

    Take :meth:`wanted` bytes at most from the socket, no more, and give them with the number of descriptors that came
    beside them to :meth:`receive`. So a descriptor is always counted with the message that it came with.

    :ivar who: the VMM, as a message should name it; :ivar answered: whether each message wants a byte back.
    :ivar over: the VMM has closed the connection.
    """

    who: ClassVar[str]
    answered: ClassVar[bool]

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._descriptors = 0
        self._handed = False
        self._broken: PeerError | None = None
        self.over = False

    @property
    def partial(self) -> bool:
        """Whether a message has begun that has not ended."""
        return bool(self._bytes or self._descriptors)

    @abstractmethod
    def wanted(self) -> int:
        """How many bytes to take next, at most: none of them belongs to a later message."""

    def receive(self, data: bytes, descriptors: int) -> Handoff | Claim | None:
        """Take what came; the message that it ends, if it does: the handoff first, then memory that was added.

        :raise PeerError: what came is not what the VMM may say here; every later call says so again.
        """
        if self._broken is not None:
            raise self._broken
        try:
            self._descriptors += descriptors
            if self._descriptors > (not self._handed):
                due = "none" if self._handed else "one"
                raise PeerError(f"{self.who} sent {self._descriptors} descriptors with a message that has {due}")
            self._bytes += data
            message = self._message()
        except PeerError as error:
            self._broken = error
            raise
        if message is None:
            return None
        self._bytes.clear()
        self._descriptors = 0
        self._handed = True
        return message

    def ended(self) -> None:
        """The VMM has closed the connection.

        :raise PeerError: in the middle of a message, or before it handed anything over.
        """
        self.over = True
        if self.partial:
            raise PeerError(f"{self.who} closed the connection after {len(self._bytes)} bytes of a message")
        if not self._handed:
            raise PeerError(f"{self.who} closed the connection without a word")

    @abstractmethod
    def _message(self) -> Handoff | Claim | None:
        """The message that the bytes so far make, if it is complete."""

    def _one_descriptor(self) -> None:
        if self._descriptors != 1:
            raise PeerError(f"{self.who} sent its handoff without the userfaultfd")


def decode(body: bytes, kind: type[T], who: str) -> T:
    """Read JSON; unknown fields are passed over.

    :raise PeerError: it is none, or not of that kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"{who} sent a message that is none of its own: {error}") from error


def checked(claim: Claim, unit: int) -> Claim:
    """The claim itself, in pages of ``unit`` bytes.

    :raise PeerError: it is none of whole pages.
    """
    if not claim.size or any(value % unit for value in (claim.gpa, claim.hva, claim.size, claim.offset)):
        raise PeerError(
            f"the VMM tells of {claim.size} bytes of memory at {claim.hva:#x} (guest-physical {claim.gpa:#x}, offset "
            f"{claim.offset:#x}), which are no whole pages of {unit} bytes"
        )
    return claim
