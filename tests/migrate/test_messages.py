"""Messages go round trip; whatever else a peer sends is told as its fault."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import OutboardError, PeerError, RefusedError
from outboard.migrate import messages


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(migration="m", role="bulk", token="t"),
        messages.Prepare(migration="m", vm="web", spec="name = 'web'", layout=[(0, 4, 0)], running=True),
        messages.Prepared(port=1, tokens={"bulk": "t"}),
        messages.Welcome(),
        messages.Barrier(3),
        messages.BarrierPassed(3),
        messages.Final(barrier=1),
        messages.Settled(),
        messages.Forget(),
        messages.Live(),
        messages.AllSent(),
        messages.Digests(),
        messages.Loaded(),
        messages.Commit(),
        messages.Resumed(),
        messages.Arrived(1, 2, 3, 4, 99.5, None, 7),
        messages.Rebuilt(large_mappings=8),
        messages.Large(early=True),
        messages.Arrived(1, 2, 3, 4, 99.5, None, 7, 2, 1, [5, 6]),
    ],
)
def test_round_trip(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message


@given(st.binary(max_size=200))
def test_anything_else_is_the_peers_fault(payload: bytes) -> None:
    with pytest.raises(PeerError):
        messages.decode(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type":"nothing"}',
        b'{"type":"barrier","number":"three"}',
        b'{"type":"final","barrier":1,"more":1}',
        b'{"number":3}',
        b"[]",
    ],
)
def test_near_misses_are_refused(payload: bytes) -> None:
    with pytest.raises(PeerError, match="none of ours"):
        messages.decode(payload)


def test_a_peer_names_no_more_pages_than_are_kept() -> None:
    said = messages.encode(messages.Arrived(1, 2, 3, 4, None, None, 7, 0, 33, list(range(33))))
    with pytest.raises(PeerError, match="none of ours"):
        messages.decode(said)


def test_a_peer_that_gives_up_is_heard() -> None:
    with pytest.raises(OutboardError, match="gave up: no room"):
        messages.decode(messages.encode(messages.Failed(why="no room")))
    with pytest.raises(RefusedError, match="gave up: large pages"):
        messages.decode(messages.encode(messages.Failed(why="large pages", exit_code=4)))


def test_a_message_out_of_turn_is_refused() -> None:
    with pytest.raises(PeerError, match="Final where Welcome"):
        messages.expect(messages.encode(messages.Final(barrier=1)), messages.Welcome)
