"""What the two engines of a migration say to each other, beside pages, requests and QEMU's device state.

Each is a MESSAGE frame holding JSON with a ``type``; an unknown type or field ends the migration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from outboard.errors import PeerError, error_of


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """The base of all."""


class Hello(Message, frozen=True, tag="hello"):
    """First on each stream: which migration, which of its streams, and the one-time token that lets it in."""

    migration: str
    role: str
    token: str


class Welcome(Message, frozen=True, tag="welcome"):
    """On the control stream: all streams have been let in, and the destination is ready for pages."""


class Barrier(Message, frozen=True, tag="barrier"):
    """On the bulk stream: all that was sent before has been handed to the kernel. Answered on the control stream."""

    number: int


class BarrierPassed(Message, frozen=True, tag="barrier-passed"):
    """All before the barrier has been placed."""

    number: int


class Final(Message, frozen=True, tag="final"):
    """The source's memory will not change any more: its guest is paused.

    What was sent of it and has changed since is on the bulk stream ahead of this barrier. Once that has passed, device
    state may be loaded and pages asked for.
    """

    barrier: int


class Settled(Message, frozen=True, tag="settled"):
    """The destination's answer to Final: the barrier has passed, and what was to be forgotten is. Only from then on may
    such pages be sent again."""


class Forget(Message, frozen=True, tag="forget"):
    """The set of pages to forget has been sent (as PAGESET frames): they changed after they were sent."""


class Live(Message, frozen=True, tag="live"):
    """The set of live pages has been sent (as PAGESET frames): all others read as zeros."""


class Large(Message, frozen=True, tag="large"):
    """The set of pages that large entries map at the source has been sent (as PAGESET frames).

    ``early``: none will be forgotten, so they may be rebuilt before the guest runs.
    """

    early: bool


class Images(Message, frozen=True, tag="images"):
    """The source asks which of the VM's disk images both hosts have: for each, how the destination's looks.

    ``nonce``, 32 hexadecimal digits, says where to look; see :mod:`outboard.stores.images.sampling`.
    """

    nonce: str


class ImagesSeen(Message, frozen=True, tag="images-seen"):
    """The answer: of each image in the order of their numbers, a digest of what was seen there, empty for none."""

    digests: Annotated[list[str], msgspec.Meta(max_length=1024)]


class Resolve(Message, frozen=True, tag="resolve"):
    """On the bulk stream: ask for the pages that were sent as blocks and could not be read, as REQUEST frames, and then
    answer."""


class Resolved(Message, frozen=True, tag="resolved"):
    """The answer, on the same stream: all others are there, which took ``read_ns`` to read since the last one."""

    read_ns: Annotated[int, msgspec.Meta(ge=0)]


class AllSent(Message, frozen=True, tag="all-sent"):
    """On the bulk stream: every live page has been sent on this stream or the urgent one."""


class Digests(Message, frozen=True, tag="digests"):
    """The destination is asked for (source), or has sent as raw bytes (destination), a digest of each live page."""


class Loaded(Message, frozen=True, tag="loaded"):
    """QEMU at the destination has taken the device state and waits, stopped."""


class Commit(Message, frozen=True, tag="commit"):
    """The source gives the VM away and will not run it again."""


class Recover(Message, frozen=True, tag="recover"):
    """To the destination's agent: the streams of a migration that was committed broke off; open new ones."""

    migration: str


class Refused(Message, frozen=True, tag="refused"):
    """Its agent's answer: the commit never arrived, and nobody here will ever take it. The VM is the source's."""


class Have(Message, frozen=True, tag="have"):
    """On the new control stream: the set of pages that are here has been sent (as PAGESET frames)."""


class Resumed(Message, frozen=True, tag="resumed"):
    """The VM runs at the destination."""


class Arrived(Message, frozen=True, tag="arrived"):
    """No page is missing at the destination; with it the faults that it took to get there.

    ``loading_faults`` (before the resume) and ``device_faults`` (after it) are those of the remote ones that no vCPU
    raised: QEMU's own threads waited, and with them their devices; ``device_fault_pages`` has the pages of the first.
    """

    remote_faults: int
    zero_faults: int
    minor_faults: int
    raced_faults: int
    fault_p50_us: float | None
    fault_p99_us: float | None
    mapped_before_resume: int
    loading_faults: int = 0
    device_faults: int = 0
    device_fault_pages: Annotated[list[int], msgspec.Meta(max_length=32)] = []


class Rebuilt(Message, frozen=True, tag="rebuilt"):
    """After ``Arrived``, where the source had large mappings: how many there are now. A report waits for it."""

    large_mappings: int


class Failed(Message, frozen=True, tag="failed"):
    """The sender gives up, and why; ``exit_code`` tells the kind of error, as in :mod:`outboard.errors`."""

    why: str
    exit_code: int = 1


class Prepare(Message, frozen=True, tag="prepare"):
    """To the destination's agent: start a QEMU for this VM and be ready for its migration.

    ``spec`` is the VM's TOML; ``layout`` the source's memory as (first page, pages, guest-physical start), which the
    destination's must equal; ``running`` whether the guest runs, or is paused and shall stay so.
    """

    migration: str
    vm: str
    spec: str
    layout: list[tuple[int, int, int]]
    running: bool
    streams: int = 1
    """For the bulk, at most MAX_STREAMS."""


class Probe(Message, frozen=True, tag="probe"):
    """To the destination's agent: could it take this VM? ``spec`` is its TOML, ``qemu`` the version that runs it."""

    spec: str
    qemu: tuple[int, int] | None


class Hindrance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stable word for what stands in the way, and a sentence."""

    reason: str
    words: str


class Probed(Message, frozen=True, tag="probed"):
    """Its answer: what stands in the way. Raw bytes follow, to be timed."""

    hindrances: Annotated[list[Hindrance], msgspec.Meta(max_length=64)]


class Carried(Message, frozen=True, tag="carried"):
    """How many raw bytes came in how many seconds."""

    octets: int
    seconds: float


class Prepared(Message, frozen=True, tag="prepared"):
    """The agent's answer: where the engine listens, and the token of each stream's role."""

    port: int
    tokens: dict[str, str]


AnyMessage = (
    Hello
    | Prepare
    | Prepared
    | Probe
    | Probed
    | Carried
    | Welcome
    | Barrier
    | BarrierPassed
    | Final
    | Settled
    | Forget
    | Live
    | Large
    | Images
    | ImagesSeen
    | Resolve
    | Resolved
    | AllSent
    | Digests
    | Loaded
    | Commit
    | Recover
    | Refused
    | Have
    | Resumed
    | Arrived
    | Rebuilt
    | Failed
)

T = TypeVar("T")

MAX_STREAMS = 8
"""For the bulk."""
_BULK = ("bulk", *(f"bulk-{number}" for number in range(2, MAX_STREAMS + 1)))


def roles(streams: int) -> tuple[str, ...]:
    """The streams of a migration, ``streams`` of them for the bulk, which come last and in order.

    Only the urgent one must never wait behind another's data.
    """
    return ("control", "urgent", *_BULK[:streams])


def bulk_of(streams: Mapping[str, T]) -> list[T]:
    """Those for the bulk, in order, of a value for each role."""
    return [streams[role] for role in _BULK if role in streams]


FORGET, LIVE, HAVE, LARGE = 1, 2, 3, 4
"""Names of page sets in PAGESET frames."""

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(AnyMessage)

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The payload of a MESSAGE frame."""
    return _encoder.encode(message)


def decode(payload: bytes | memoryview) -> Message:
    """Read a MESSAGE frame's payload.

    :raise PeerError: it is none of the messages above.
    :raise OutboardError: it says that the peer gave up; of the kind that the peer met.
    """
    try:
        message: Message = _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise PeerError(f"the peer sent a message that is none of ours: {error}") from error
    if isinstance(message, Failed):
        raise error_of(message.exit_code, f"the other host gave up: {message.why}")
    return message


def expect(payload: bytes | memoryview, kind: type[M]) -> M:
    """Read a payload that must be a ``kind``.

    :raise PeerError: it is something else.
    """
    message = decode(payload)
    if not isinstance(message, kind):
        raise PeerError(f"the peer sent {type(message).__name__} where {kind.__name__} was due")
    return message
