"""Whatever a file holds, reading it as a snapshot ends in the content that was written or in a refusal."""

from __future__ import annotations

import hashlib
import struct

import msgspec
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as some

from outboard.errors import DamagedPageError, NotFoundError, RefusedError
from outboard.stores import snapshot_format
from outboard.stores.snapshot import SnapshotStore
from outboard.stores.snapshot_format import FOOTER, _Index
from tests.stores.test_snapshot import read_back
from tests.support.snapshots import SEED, memory_of, name, write

_MEMORY = memory_of(40, np.random.default_rng(1))


@given(some.lists(some.tuples(some.floats(0, 1, exclude_max=True), some.integers(0, 255)), min_size=1, max_size=4))
def test_altered_files(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]) -> None:
    directory = tmp_path_factory.mktemp("s")
    write(directory, 0, _MEMORY)
    path = directory / f"{name(0)}.snap"
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    for at, value in changes:
        content[int(at * len(content))] = value
    path.write_bytes(content)
    if bytes(content) == whole:
        assert np.array_equal(read_back(directory, 0), _MEMORY)
        return
    with pytest.raises((RefusedError, DamagedPageError), match="from byte"):
        read_back(directory, 0)


@given(some.binary(max_size=400))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("s") / f"{name(0)}.snap"
    for body in (content, snapshot_format.header(SEED) + content):
        path.write_bytes(body)
        with pytest.raises(RefusedError):
            snapshot_format.read(path)


def _signed(path_content: bytes, index: _Index) -> bytes:
    """The same file with another index, every digest of which is right: what somebody makes on purpose."""
    offset = FOOTER.unpack(path_content[-FOOTER.size :])[0]
    raw = msgspec.msgpack.encode(index)
    packed = zstandard.ZstdCompressor().compress(raw)
    bare = struct.pack("<QQQ32s", offset, len(packed), len(raw), hashlib.sha256(packed).digest())
    footer = bare + struct.pack("<Q", xxhash.xxh3_64_intdigest(bare)) + path_content[-8:]
    return path_content[:offset] + packed + footer


_FIELDS = [field for field in _Index.__struct_fields__ if field != "meta"]


@given(some.sampled_from(_FIELDS), some.data())
def test_an_index_made_on_purpose(tmp_path_factory: pytest.TempPathFactory, field: str, data: some.DataObject) -> None:
    directory = tmp_path_factory.mktemp("s")
    write(directory, 0, _MEMORY)
    path = directory / f"{name(0)}.snap"
    whole = path.read_bytes()
    offset, length = FOOTER.unpack(whole[-FOOTER.size :])[:2]
    index = msgspec.msgpack.decode(
        zstandard.ZstdDecompressor().decompress(whole[offset : offset + length]), type=_Index
    )
    old: bytes = getattr(index, field)
    at = data.draw(some.integers(0, max(0, len(old) - 1)))
    new = data.draw(
        some.one_of(
            some.just(old[:at] + data.draw(some.binary(min_size=1, max_size=8)) + old[at + 8 :]),
            some.just(old[:at]),
            some.just(old + old),
            some.binary(max_size=64),
        )
    )
    path.write_bytes(_signed(whole, msgspec.structs.replace(index, **{field: new})))
    try:
        store = SnapshotStore(directory, name(0))
    except (RefusedError, NotFoundError):
        return
    # What is within bounds is read, or told to be another than its digest says.
    away = np.flatnonzero(store.where == 6)
    into = np.empty(away.size * 4096, dtype=np.uint8)
    try:
        store.fetch(store.locators[away], into)
    except DamagedPageError:
        pass
    finally:
        store.close()
