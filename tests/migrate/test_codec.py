"""Which codec is chosen: by the wire, by the processor, by what the pages are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from outboard.migrate import codec
from outboard.migrate.codec import Choice, Compress
from outboard.wire.codecs import CODERS, LZ4, NONE, ZSTD, Coder, Octets


class Time:
    """A clock, and a thread whose packing takes as long as it is told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def coder(time: Time, like: Coder, ratio: float, ns: float) -> Coder:
    """A codec of known ratio and speed."""

    def pack(data: Octets) -> Octets:
        time.now += int(len(data) * ns)
        return bytes(int(len(data) * ratio))

    return Coder(like.name, like.codec, pack)


@pytest.fixture
def time() -> Time:
    return Time()


def choice_of(
    monkeypatch: pytest.MonkeyPatch,
    time: Time,
    compress: Compress = Compress.AUTO,
    ratios: Iterable[float] = (0.5, 0.3),
) -> tuple[Choice, list[Coder]]:
    """A choice between nothing, a codec of 2 ns for each byte and one of 5."""
    made = [NONE] + [
        coder(time, like, ratio, ns) for like, ratio, ns in zip((LZ4, ZSTD[0]), ratios, (2.0, 5.0), strict=True)
    ]
    monkeypatch.setattr(codec, "CODERS", tuple(made))
    return Choice(compress, time, time), made


CONTENT = np.ones(64 * 4096, dtype=np.uint8)


def taken(choice: Choice, batches: int = 4) -> str:
    return [choice.pack(CONTENT)[0].name for _ in range(batches)][-1]


def test_nothing_is_packed_until_the_wire_is_known(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time)
    assert taken(choice) == "none"
    assert (choice.packing, choice.saving_pays) == (False, False)
    choice.note_wire(50e6)
    assert taken(choice) == "zstd-1"
    assert (choice.packing, choice.saving_pays) == (True, True)
    assert choice.ratio == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("wire", "name"),
    # A byte takes reading 0.3 ns, packing 2 or 5, sending 0.5, and the wire 100 to 1.
    [(10e6, "zstd-1"), (60e6, "zstd-1"), (100e6, "lz4"), (330e6, "lz4"), (400e6, "none"), (1e9, "none")],
)
def test_the_codec_of_the_least_time_is_taken(
    monkeypatch: pytest.MonkeyPatch, time: Time, wire: float, name: str
) -> None:
    choice, _ = choice_of(monkeypatch, time)
    choice.note_wire(wire)
    assert taken(choice) == name


def test_a_faster_wire_ends_packing(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time)
    choice.note_wire(50e6)
    assert taken(choice) == "zstd-1"
    choice.note_wire(2e9)
    assert taken(choice) == "none"


def test_a_processor_that_others_want_too_packs_more_slowly(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time)
    choice.note_wire(125e6)
    assert taken(choice) == "lz4"
    for _ in range(500):
        choice.note_work(CONTENT.size, 400_000, 100_000, 21_000)
    assert choice.share == pytest.approx(0.25, rel=0.05)
    assert taken(choice) == "none"
    for _ in range(500):
        choice.note_work(CONTENT.size, 100_000, 100_000, 21_000)
    time.now += 10**9
    assert taken(choice) == "lz4"


def test_alike_the_cheaper_is_taken(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time, ratios=(0.5, 0.49))
    choice.note_wire(10e6)
    assert taken(choice) == "lz4"


def test_what_cannot_be_packed_costs_its_probes_only(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time, ratios=(1.004, 1.0))
    choice.note_wire(125e6)
    batches, wire_ns = 2000, CONTENT.size * 8
    for _ in range(batches):
        before = time.now
        used, packed = choice.pack(CONTENT)
        assert used is NONE
        assert len(packed) == CONTENT.size
        time.now = max(time.now, before + wire_ns)
    assert 0 < choice.spent_ns < 0.03 * batches * wire_ns


def test_probes_are_seldom_where_no_ratio_could_pay(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, _ = choice_of(monkeypatch, time)
    choice.note_wire(1e9)
    began = time.now
    for _ in range(5000):
        choice.pack(CONTENT)
        time.now += CONTENT.size
    assert choice.spent_ns < 0.003 * (time.now - began)


def test_a_batch_that_gets_no_smaller_goes_as_it_is(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    choice, made = choice_of(monkeypatch, time)
    choice.note_wire(20e6)
    assert taken(choice) == "zstd-1"
    content = np.zeros(64 * 4096, dtype=np.uint8)
    ratio = iter([1.0, 0.3, 0.3])
    object.__setattr__(made[2], "pack", lambda data: bytes(int(len(data) * next(ratio))))
    assert [choice.pack(content)[0].name for _ in range(3)] == ["none", "zstd-1", "zstd-1"]


@pytest.mark.parametrize(
    ("compress", "name", "pays"),
    [(Compress.LZ4, "lz4", True), (Compress.ZSTD, "zstd-1", True), (Compress.NONE, "none", False)],
)
def test_what_the_user_says_is_done(compress: Compress, name: str, pays: bool) -> None:
    choice = Choice(compress, Time(), Time())
    used, packed = choice.pack(CONTENT)
    assert used.name == name
    assert (len(packed) < 5000) == (name != "none")
    assert choice.saving_pays == choice.enabled == pays


def test_nothing_is_made_of_nothing() -> None:
    choice = Choice(Compress.LZ4, Time(), Time())
    assert choice.pack(np.empty(0, dtype=np.uint8)) == (NONE, b"")


def test_every_codec_is_probed_on_pages_from_everywhere() -> None:
    seen: list[int] = []
    choice = Choice(Compress.AUTO, Time(), Time())
    for each in CODERS[1:]:
        choice._estimates[each].note(1.0, 1.0, 1.0)
    pages = np.repeat(np.arange(64, dtype=np.uint8), 4096)
    spread = codec._spread(64)
    seen += pages.reshape(-1, 4096)[spread][:, 0].tolist()
    assert seen[0] == 0
    assert seen[-1] == 63
    assert len(seen) == 8
