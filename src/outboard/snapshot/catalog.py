"""The snapshots of this host: a directory of files, in which one may go on from another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, NotFoundError, OutboardError, RefusedError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import keyed_digests
from outboard.snapshot.writing import locked
from outboard.stores import snapshot_format
from outboard.stores.snapshot import SUFFIX, SnapshotStore
from outboard.stores.snapshot_format import Contents, Kind, check_id

ORDER = ".order"
_MOST_ORDER = 1 << 30
_BATCH = 4096


class Listed(msgspec.Struct, frozen=True):
    """A snapshot, or a file that cannot be read as one and why (``damage``); sizes in bytes.

    ``new``: pages that are neither zeros nor elsewhere, as they are in memory.
    """

    id: str
    vm: str
    created: float
    memory: int
    new: int
    file: int
    parent: str | None
    damage: str | None = None


class Verified(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.snapshot.verified.v1"):
    """A snapshot all of whose pages, and all files that it goes on from, are what was written."""

    id: str
    pages: int
    files: int
    bytes: int


def listed(directory: Path) -> list[Listed]:
    """All snapshots, the oldest first."""
    found = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        try:
            one = snapshot_format.read(path)
        except NotFoundError:
            # Removed since we looked.
            continue
        except OutboardError as error:
            found.append(Listed(name, "", 0.0, 0, 0, path.stat().st_size, None, str(error)))
            continue
        parent = None if one.meta.parent is None else one.meta.parent.id
        new = int(one.chunks.pages.sum()) * PAGE_SIZE
        found.append(Listed(name, one.meta.vm, one.meta.created, one.pages * PAGE_SIZE, new, one.size, parent))
    return sorted(found, key=lambda one: (one.created, one.id))


def latest(directory: Path, vm: str) -> Contents:
    """The youngest snapshot of ``vm``.

    :raise NotFoundError: there is none.
    """
    of_vm = [one for one in listed(directory) if one.vm == vm and one.damage is None]
    if not of_vm:
        raise NotFoundError(f"there is no snapshot of {vm} to go on from; take a full one first")
    return snapshot_format.read(directory / f"{of_vm[-1].id}{SUFFIX}")


def remove(directory: Path, name: str, used: Iterable[tuple[str, str]]) -> None:
    """Remove a snapshot.

    :param used: snapshots that VMs still take pages from, and which VM.
    :raise NotFoundError: there is none.
    :raise RefusedError: ``in-use``: a VM has pages in it, or in one that goes on from it; ``has-children``.
    """
    path = directory / f"{check_id(name)}{SUFFIX}"
    if not path.exists():
        raise NotFoundError(f"there is no snapshot {name}; outboard snapshot ls lists them")
    with locked(directory):
        children = [one.id for one in listed(directory) if one.parent == name]
        if children:
            raise RefusedError("has-children", f"{name} is what {', '.join(children)} goes on from; remove that first")
        for snapshot, vm in used:
            if snapshot == name:
                raise RefusedError("in-use", f"{vm} still has pages in {name}; outboard fetch {vm} brings them in")
        path.unlink()
        _order_path(directory, name).unlink(missing_ok=True)


def verify(directory: Path, name: str) -> Verified:
    """Read every byte of a snapshot and of those that it goes on from.

    :raise NotFoundError: one is not there.
    :raise RefusedError: ``damaged-snapshot``; it says from which byte on.
    """
    store = SnapshotStore(directory, name)
    try:
        for contents, base in zip(store.chain, store.bases, strict=True):
            _verify_chunks(store, contents, base)
        return Verified(name, store.chain[0].pages, len(store.chain), sum(one.size for one in store.chain))
    except DamagedPageError as error:
        raise RefusedError("damaged-snapshot", str(error)) from error
    finally:
        store.close()


def _verify_chunks(store: SnapshotStore, contents: Contents, base: int) -> None:
    """Every chunk, also those that nothing refers to any more, and that pages are in them what their digests say."""
    table = contents.table
    here = np.flatnonzero(table.kinds == Kind.HERE)
    here = here[np.argsort(table.places[here], kind="stable")]
    into = np.empty(_BATCH * PAGE_SIZE, dtype=np.uint8)
    rows = np.arange(contents.chunks.offsets.size, dtype=np.uint64) + np.uint64(base)
    whole = np.concatenate(
        (
            rows << np.uint64(snapshot_format.SLOT_BITS),
            table.places[here] + np.uint64(base << snapshot_format.SLOT_BITS),
        )
    )
    wanted = np.concatenate((np.zeros((rows.size, 2), dtype=np.uint64), table.digests[here]))
    order = np.argsort(whole, kind="stable")
    for at in range(0, order.size, _BATCH):
        batch = order[at : at + _BATCH]
        store.fetch(whole[batch], into)
        found = keyed_digests(into[: batch.size * PAGE_SIZE], contents.meta.seed)
        wrong = (batch >= rows.size) & np.any(found != wanted[batch], axis=1)
        if wrong.any():
            row = int(whole[batch[np.flatnonzero(wrong)[0]]]) >> snapshot_format.SLOT_BITS
            raise snapshot_format.damaged(
                contents.path, int(store.rows.offsets[row]), "a page in this chunk is not the one that its digest names"
            )


def _order_path(directory: Path, name: str) -> Path:
    return directory / f"{check_id(name)}{ORDER}"


def keep_order(directory: Path, name: str, rows: NDArray[np.int64]) -> None:
    """Keep the order in which a restored VM wanted rows of its snapshot, for the next that is restored from it.

    A hint: where it cannot be kept the next one goes without.
    """
    raw = rows.astype("<u4").tobytes()
    path = _order_path(directory, name)
    fresh = path.with_name(f"{path.name}.new")
    with contextlib.suppress(OSError):
        fresh.write_bytes(raw + xxhash.xxh3_64_digest(raw))
        fresh.rename(path)


def kept_order(directory: Path, name: str, rows: int) -> NDArray[np.int64] | None:
    """What :meth:`keep_order` has kept, if it is whole and names rows of a snapshot that has ``rows``."""
    path = _order_path(directory, name)
    try:
        if path.stat().st_size > _MOST_ORDER:
            return None
        raw = path.read_bytes()
    except OSError:
        return None
    body, digest = raw[:-8], raw[-8:]
    if len(body) % 4 or xxhash.xxh3_64_digest(body) != digest:
        return None
    order: NDArray[np.int64] = np.frombuffer(body, dtype="<u4").astype(np.int64)
    return order if not order.size or order.max() < rows else None
