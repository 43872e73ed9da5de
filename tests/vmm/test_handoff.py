"""What Cloud Hypervisor and Firecracker say when they hand over, and what is not believed of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outboard.errors import PeerError
from outboard.linux.userfaultfd import Features, Mode
from outboard.vmm.cloud_hypervisor import CloudHypervisor
from outboard.vmm.firecracker import Firecracker
from outboard.vmm.handoff import MAX_BODY, Claim, Conversation, Handoff
from tests.support.vmm_client import framed

GIB = 1 << 30


def region(**changes: Any) -> dict[str, Any]:
    return {
        "guest_phys_addr": 0,
        "host_virt_addr": 0x7F00_0000_0000,
        "size": GIB,
        "backing_file_offset": 0,
    } | changes


def handoff(**changes: Any) -> dict[str, Any]:
    return {
        "type": "handoff",
        "version": 0,
        "vmm_pid": 4711,
        "mode": "MISSING|WP|WP_ASYNC",
        "regions": [region()],
    } | changes


def snapshot_region(**changes: Any) -> dict[str, Any]:
    return {"base_host_virt_addr": 0x7F00_0000_0000, "size": GIB, "offset": 0, "page_size": 4096} | changes


def say(conversation: Conversation, data: bytes, descriptors: int = 0, step: int = 1 << 20) -> Handoff | Claim | None:
    """Give what a socket would: never more than is wanted, descriptors beside the first byte."""
    message = None
    while data:
        assert message is None
        piece = data[: min(step, conversation.wanted())]
        data = data[len(piece) :]
        message = conversation.receive(piece, descriptors)
        descriptors = 0
    return message


def handed(conversation: Conversation) -> Handoff:
    message = say(conversation, framed(handoff()), 1)
    assert isinstance(message, Handoff)
    return message


def test_cloud_hypervisors_handoff() -> None:
    assert handed(CloudHypervisor()) == Handoff(
        4711,
        Mode.MISSING | Mode.WP,
        Features.WP_ASYNC,
        (Claim(0, 0x7F00_0000_0000, GIB, 0, 0),),
    )


@pytest.mark.parametrize("step", [1, 3, 5, 64])
def test_what_a_socket_cuts_is_joined(step: int) -> None:
    conversation = CloudHypervisor()
    assert isinstance(say(conversation, framed(handoff()), 1, step), Handoff)
    assert not conversation.partial
    added = say(conversation, framed({"type": "add_region", "region": region(size=4096)}), 0, step)
    assert added == Claim(0, 0x7F00_0000_0000, 4096, 0, 0)


def test_no_byte_of_a_later_message_is_wanted() -> None:
    conversation = CloudHypervisor()
    data = framed(handoff())
    assert conversation.wanted() == 4
    conversation.receive(data[:4], 1)
    assert conversation.wanted() == len(data) - 4
    conversation.receive(data[4:-1], 0)
    assert conversation.wanted() == 1


def test_fields_that_are_added_within_a_version_are_passed_over() -> None:
    told = handoff(regions=[region(colour="blue")], later={"a": 1})
    del told["version"], told["regions"][0]["backing_file_offset"]
    message = say(CloudHypervisor(), framed(told), 1)
    assert isinstance(message, Handoff)
    assert message.claims[0].offset == 0


@pytest.mark.parametrize(
    ("words", "mode", "features"),
    [
        ("MISSING", Mode.MISSING, Features(0)),
        (" WP | WP_UNPOPULATED", Mode.WP, Features.WP_UNPOPULATED),
        ("WP_ASYNC|WP|MISSING", Mode.MISSING | Mode.WP, Features.WP_ASYNC),
    ],
)
def test_modes(words: str, mode: Mode, features: Features) -> None:
    message = say(CloudHypervisor(), framed(handoff(mode=words)), 1)
    assert isinstance(message, Handoff)
    assert (message.mode, message.features) == (mode, features)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "a message of 0 bytes"),
        (b"{" + b" " * MAX_BODY, f"a message of {MAX_BODY + 1} bytes"),
        (b'{"type": "handoff", ', "none of its own"),
        (b"\xff\xfe", "none of its own"),
        (b"[1]", "none of its own"),
        (b'{"type": ' + b"[" * 20000, "none of its own"),
        ({"version": 0}, "missing required field `type`"),
        ({"type": "goodbye"}, "a message of type 'goodbye' where a handoff is known"),
        ({"type": "add_region", "region": region()}, "a message of type 'add_region' where a handoff is known"),
        (handoff(version=1), "by version 1"),
        (handoff(version=-1), "by version -1"),
        (handoff(vmm_pid=0), "none of its own"),
        (handoff(vmm_pid=1 << 31), "none of its own"),
        (handoff(vmm_pid="4711"), "none of its own"),
        (handoff(regions=[]), "none of its own"),
        (handoff(regions={}), "none of its own"),
        (handoff(regions=[region(size=0)]), "0 bytes of memory"),
        (handoff(regions=[region(size=100)]), "no whole pages"),
        (handoff(regions=[region(size=-4096)]), "none of its own"),
        (handoff(regions=[region(size=1 << 64)]), "none of its own"),
        (handoff(regions=[region(host_virt_addr=0x7F00_0000_0001)]), "no whole pages"),
        (handoff(regions=[region(guest_phys_addr=1)]), "no whole pages"),
        (handoff(regions=[region(backing_file_offset=512)]), "no whole pages"),
        (handoff(regions=[region(size=1.5)]), "none of its own"),
        (handoff(mode=""), "a mode '' that is not known"),
        (handoff(mode="MISSING|MINOR"), "a mode 'MINOR' that is not known"),
        (handoff(mode="MISSING|WP_ASYNC"), "in no mode that there is"),
        (handoff(mode="WP_ASYNC"), "in no mode that there is"),
    ],
)
def test_what_cloud_hypervisor_would_not_say(message: object, words: str) -> None:
    conversation = CloudHypervisor()
    with pytest.raises(PeerError, match=words):
        say(conversation, framed(message), 1)
    with pytest.raises(PeerError, match=words):
        conversation.receive(b"", 0)


@pytest.mark.parametrize(
    ("message", "descriptors", "words"),
    [
        ({"type": "remove_region"}, 0, "a message of type 'remove_region' where only add_region is known"),
        (handoff(), 1, "1 descriptors with a message that has none"),
        (handoff(), 0, "a message of type 'handoff' where only add_region is known"),
        ({"type": "add_region"}, 0, "missing required field `region`"),
        ({"type": "add_region", "region": region()}, 1, "1 descriptors with a message that has none"),
    ],
)
def test_after_the_handoff_only_memory_is_added(message: object, descriptors: int, words: str) -> None:
    conversation = CloudHypervisor()
    handed(conversation)
    with pytest.raises(PeerError, match=words):
        say(conversation, framed(message), descriptors)


def test_one_descriptor_comes_with_the_handoff() -> None:
    with pytest.raises(PeerError, match="without the userfaultfd"):
        say(CloudHypervisor(), framed(handoff()), 0)
    with pytest.raises(PeerError, match="2 descriptors with a message that has one"):
        say(CloudHypervisor(), framed(handoff()), 2)
    late = CloudHypervisor()
    data = framed(handoff())
    late.receive(data[:4], 1)
    with pytest.raises(PeerError, match="2 descriptors with a message that has one"):
        late.receive(data[4:], 1)


def test_the_end_of_a_connection() -> None:
    with pytest.raises(PeerError, match="without a word"):
        CloudHypervisor().ended()
    half = CloudHypervisor()
    half.receive(b"\0\1", 0)
    with pytest.raises(PeerError, match="after 2 bytes of a message"):
        half.ended()
    whole = CloudHypervisor()
    handed(whole)
    whole.ended()
    assert whole.over


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize(
    ("sizes", "page_size"),
    [
        ({"page_size": 4096}, 4096),
        ({"page_size": 2 << 20, "page_size_kib": 2 << 20}, 2 << 20),
        ({"page_size_kib": 4096}, 4096),
        ({}, 4096),
    ],
)
def test_firecrackers_handoff_in_all_its_versions(step: int, sizes: dict[str, int], page_size: int) -> None:
    second = {"base_host_virt_addr": 0x7F80_0000_0000, "size": GIB, "offset": GIB} | sizes
    first = {"base_host_virt_addr": 0x7F00_0000_0000, "size": GIB, "offset": 0} | sizes
    message = say(Firecracker(), json.dumps([first, second]).encode(), 1, step)
    assert message == Handoff(
        None,
        Mode.MISSING,
        Features.EVENT_REMOVE,
        (Claim(0, 0x7F00_0000_0000, GIB, 0, page_size), Claim(GIB, 0x7F80_0000_0000, GIB, GIB, page_size)),
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (framed(handoff()), "where a JSON array of its regions is due"),
        (b"[]", "an empty array"),
        (b"[{]", "none of its own"),
        (b"[" + b" " * MAX_BODY, f"more than {MAX_BODY} bytes"),
        (json.dumps([snapshot_region(page_size=3)]).encode(), "a page size of 3 bytes"),
        (json.dumps([snapshot_region(size=4096, page_size=2 << 20)]).encode(), "no whole pages of 2097152 bytes"),
        (json.dumps([{"size": 4096}]).encode(), "none of its own"),
    ],
)
def test_what_firecracker_would_not_say(data: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        say(Firecracker(), data, 1)


def test_firecracker_says_one_thing_only() -> None:
    conversation = Firecracker()
    assert say(conversation, json.dumps([snapshot_region()]).encode(), 1) is not None
    with pytest.raises(PeerError, match="where nothing may follow"):
        conversation.receive(b"x", 0)
    with pytest.raises(PeerError, match="without the userfaultfd"):
        say(Firecracker(), json.dumps([snapshot_region()]).encode(), 0)
