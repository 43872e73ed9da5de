"""Hostile VMMs: whatever they say, a conversation ends in PeerError or in claims of whole pages within bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outboard.errors import PeerError
from outboard.linux.proc import Mapping
from outboard.vmm import claims
from outboard.vmm.cloud_hypervisor import CloudHypervisor
from outboard.vmm.firecracker import Firecracker
from outboard.vmm.handoff import MAX_BODY, Claim, Conversation, Handoff
from tests.support.vmm_client import framed

pytestmark = pytest.mark.slow

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
NUMBERS = st.one_of(st.integers(0, 8).map(lambda number: number << 12), st.integers(), ANYTHING)
REGIONS = st.fixed_dictionaries(
    {"guest_phys_addr": NUMBERS, "host_virt_addr": NUMBERS, "size": NUMBERS}, optional={"backing_file_offset": NUMBERS}
)
MESSAGES = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {
            "type": st.one_of(st.just("handoff"), ANYTHING),
            "regions": st.one_of(st.lists(REGIONS, max_size=4), ANYTHING),
        },
        optional={
            "version": st.one_of(st.just(0), ANYTHING),
            "vmm_pid": st.one_of(st.just(1), ANYTHING),
            "mode": st.one_of(st.sampled_from(["MISSING", "WP|WP_ASYNC", "|"]), ANYTHING),
        },
    ),
    st.fixed_dictionaries({"type": st.just("add_region")}, optional={"region": st.one_of(REGIONS, ANYTHING)}),
)
SNAPSHOTS = st.lists(
    st.fixed_dictionaries(
        {"base_host_virt_addr": NUMBERS, "size": NUMBERS, "offset": NUMBERS},
        optional={"page_size": st.one_of(st.just(4096), NUMBERS), "page_size_kib": NUMBERS},
    ),
    max_size=4,
)
PIECES = st.lists(
    st.tuples(
        st.one_of(
            st.binary(max_size=64),
            MESSAGES.map(framed),
            st.one_of(SNAPSHOTS, ANYTHING).map(lambda told: json.dumps(told).encode()),
        ),
        st.integers(0, 2),
    ),
    max_size=5,
)
MAPPINGS = [
    Mapping(0x1000, 0x4000, "rw-s", 0x1000, "00:01", 7, "/memfd:a"),
    Mapping(0x4000, 0x6000, "rw-p", 0, "00:00", 0, ""),
    Mapping(0x7000, 0x8000, "r--s", 0, "00:01", 8, "/etc/passwd"),
]


def check(told: tuple[Claim, ...]) -> None:
    for claim in told:
        assert claim.size > 0
        assert all(
            0 <= value < 1 << 57 and value % 4096 == 0 for value in (claim.gpa, claim.hva, claim.size, claim.offset)
        )
    try:
        regions = claims.regions_of(told, MAPPINGS, lambda _: 4096)
    except PeerError:
        return
    numbers = sorted(page for one in regions for page in range(one.first, one.first + one.pages))
    assert numbers == list(range(len(numbers)))
    addresses = sorted(address for one in regions for address in range(one.hva, one.hva + one.pages * 4096, 4096))
    assert len(set(addresses)) == len(addresses)
    assert all(0x1000 <= address < 0x6000 for address in addresses)


def converse(conversation: Conversation, pieces: list[tuple[bytes, int]]) -> None:
    handed = False
    for data, descriptors in pieces:
        while data:
            wanted = conversation.wanted()
            assert 0 < wanted <= MAX_BODY + 4
            try:
                message = conversation.receive(data[:wanted], descriptors)
            except PeerError:
                return
            data, descriptors = data[wanted:], 0
            if isinstance(message, Handoff):
                assert not handed
                handed = True
                check(message.claims)
            elif message is not None:
                assert handed
                check((message,))


@settings(max_examples=300)
@given(PIECES)
def test_cloud_hypervisor(pieces: list[tuple[bytes, int]]) -> None:
    converse(CloudHypervisor(), pieces)


@settings(max_examples=300)
@given(PIECES)
def test_firecracker(pieces: list[tuple[bytes, int]]) -> None:
    converse(Firecracker(), pieces)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries({"type": st.just("handoff"), "vmm_pid": st.just(1), "mode": st.just("MISSING")}), st.data()
)
def test_regions_only(head: dict[str, Any], data: st.DataObject) -> None:
    pages = st.integers(0, 9).map(lambda number: number << 12)
    whole = st.fixed_dictionaries(
        {"guest_phys_addr": pages, "host_virt_addr": pages, "size": pages, "backing_file_offset": pages}
    )
    converse(CloudHypervisor(), [(framed(head | {"regions": data.draw(st.lists(whole, min_size=1, max_size=3))}), 1)])
