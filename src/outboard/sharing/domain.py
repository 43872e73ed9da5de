"""A sharing domain: the guests whose pages may be shared with one another, and one round of finding and sharing them.

By default a guest is a domain of its own. Guests of different owners share only where the host's administrator has put
them into one domain by name: what two guests share, each can find out about the other by the time that a write takes.

A round: every member is scanned; pages of zeros are given up; of pages that were stable and whose digest occurs more
than once, the contents are known for certain by keyed BLAKE3; each content that is there twice gets a slot; then each
member is told which of its pages to map from which slots. It compares byte for byte before it does, so that a page
which was written since, or a digest that lied, costs a look and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, OutboardError
from outboard.pager.batches import read
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Where
from outboard.sharing.inside import Estimate, Inside, by_block, estimate, to_break
from outboard.sharing.pool import Pool
from outboard.sharing.scan import NO_DIGEST, SECRET, Digests, cut, digests

Spans = NDArray[np.int64]
"""Shape (n, 3): first page, first slot, how many."""
_READ = 1024
"""Pages whose content is looked at together."""


class Member(Protocol):
    """A guest of the domain's, as its engine keeps it."""

    name: str
    pages: int

    @property
    def where(self) -> NDArray[np.uint8]: ...
    @property
    def locator(self) -> NDArray[np.uint64]: ...
    def regions(self) -> NDArray[np.int64]:
        """As :meth:`outboard.vmm.guest.GuestMemory.table`."""

    def populated(self) -> PageSet:
        """The pages that have memory in the guest's file."""

    def share(self, spans: Spans) -> int:
        """Share pages, those of the first spans first; how many it did."""

    def drop_zeros(self, runs: Runs) -> int:
        """Give pages of zeros up; how many it did."""

    def large(self) -> PageSet:
        """The pages that are in large pages."""

    def rebuild(self, blocks: list[int]) -> int:
        """Make blocks large pages again, in memory of their own; how many pages that made."""

    def tidy(self) -> int:
        """Give pages that were written since memory of their own; how many there were."""


@dataclass(frozen=True, slots=True)
class Found:
    """What could be shared, in pages: ``equal`` have ``contents`` in common, ``zeros`` hold nothing; of ``scanned``.

    ``unstable`` were not the same twice.
    """

    scanned: int
    unstable: int
    equal: int
    contents: int
    zeros: int

    @property
    def shareable(self) -> int:
        """Pages of memory that sharing would free."""
        return self.equal - self.contents + self.zeros


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did, in pages; ``failures`` by member."""

    found: Found
    shared: int
    zeros: int
    tidied: int
    freed_slots: int
    failures: dict[str, str]


class Domain:
    """The domain of ``members``, with its ``pool``.

    :param secret: SECRET random bytes.

    Synchronization: one thread.
    """

    def __init__(self, members: Sequence[Member], pool: Pool, secret: NDArray[np.uint8]) -> None:
        if secret.size != SECRET:
            raise ValueError(f"a secret has {SECRET} bytes, not {secret.size}")
        self.members = list(members)
        self._pool = pool
        self._secret = secret
        self._digests = [Digests(member.pages, secret) for member in self.members]
        self._large = [PageSet(member.pages) for member in self.members]
        self._breaking = [PageSet(member.pages) for member in self.members]
        self._heat = [by_block(known.stable) for known in self._digests]
        self.broken: list[set[int]] = [set() for _ in self.members]
        self._pool_slots: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._pool_digests: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    def leave(self, name: str) -> None:
        """A member is no more."""
        kept = [index for index, member in enumerate(self.members) if member.name != name]
        self.members = [self.members[index] for index in kept]
        self._digests = [self._digests[index] for index in kept]
        self._large = [self._large[index] for index in kept]
        self._breaking = [self._breaking[index] for index in kept]
        self._heat = [self._heat[index] for index in kept]
        self.broken = [self.broken[index] for index in kept]

    def scan(self) -> Found:
        """Digest every member's resident pages, and say what could be shared.

        :raise KernelError: a member's memory cannot be read.
        """
        for index in range(len(self.members)):
            self._digest(index)
        return self._judge()

    def _digest(self, index: int) -> int:
        member, known = self.members[index], self._digests[index]
        try:
            known.scan(member.regions(), PageSet.from_mask(member.where == Where.RESIDENT) & member.populated())
            self._large[index] = member.large()
        except OutboardError:
            known.forget()
            raise
        return 0

    def _judge(self) -> Found:
        # What changed from one scan to the next was touched; who only reads does not show.
        changed = [by_block(~known.stable & (known.now != NO_DIGEST)) for known in self._digests]
        self._heat = [before / 2 + now for before, now in zip(self._heat, changed, strict=True)]
        return self._found(self._candidates())

    def speed(self) -> float:
        """Bytes of guest memory scanned a second, on one processor."""
        told = [known.statistics() for known in self._digests]
        seconds = sum(one.seconds for one in told)
        return sum(one.pages for one in told) * PAGE_SIZE / seconds if seconds else 0.0

    def _found(self, chosen: list[NDArray[np.int64]]) -> Found:
        told = [known.statistics() for known in self._digests]
        scanned = sum(int(np.count_nonzero(known.now != NO_DIGEST)) for known in self._digests)
        held = [known.now[pages] for known, pages in zip(self._digests, chosen, strict=True)]
        return Found(
            scanned=scanned,
            unstable=scanned - sum(one.stable for one in told),
            equal=sum(pages.size for pages in chosen),
            contents=int(np.unique(np.concatenate(held)).size) if held else 0,
            zeros=sum(
                len(known.zeros() & PageSet.from_mask(self._allowed(index)))
                for index, known in enumerate(self._digests)
            ),
        )

    def _allowed(self, index: int) -> NDArray[np.bool_]:
        """The pages of a member that may be taken: none out of a large page that is not to be broken."""
        return (~(self._large[index] - self._breaking[index])).mask()

    def inside(self, every: int = 1) -> Estimate:
        """What breaking the members' large pages would reclaim, as the last scan found it."""
        return estimate(self._guests(), self._of_zeros(), every, self._pooled())

    def _guests(self) -> list[Inside]:
        return [
            Inside(known.now, known.stable, (large - breaking).mask())
            for known, large, breaking in zip(self._digests, self._large, self._breaking, strict=True)
        ]

    def _of_zeros(self) -> np.uint64:
        return self._digests[0].of_zeros if self._digests else NO_DIGEST

    def reclaim(self, octets: int, least: int) -> int:
        """Choose large pages to break, for so many bytes; the next round takes from them. How many were chosen."""
        chosen = to_break(self._guests(), self._of_zeros(), self._pooled(), self._heat, octets, least)
        for breaking, broken, blocks in zip(self._breaking, self.broken, chosen, strict=True):
            breaking.add(np.column_stack((blocks * LARGE, np.full(blocks.size, LARGE))))
            broken.update(blocks.tolist())
        return sum(blocks.size for blocks in chosen)

    def rebuild(self) -> tuple[int, dict[str, str]]:
        """Make the large pages that were broken large again; how many were, and failures by member."""
        rebuilt, failures = 0, dict[str, str]()
        for index, member in enumerate(self.members):
            blocks = sorted(self.broken[index])
            try:
                rebuilt += member.rebuild(blocks) // LARGE if blocks else 0
            except OutboardError as error:
                failures[member.name] = str(error)
                continue
            # What would not be rebuilt now is small for good: as any other small page it may be shared.
            self.broken[index].clear()
            self._breaking[index] = PageSet(member.pages)
        return rebuilt, failures

    def _candidates(self) -> list[NDArray[np.int64]]:
        """By member, the stable pages whose digest occurs more than once, or in the pool."""
        pages = [
            np.flatnonzero(known.stable & (known.now != known.of_zeros) & self._allowed(index))
            for index, known in enumerate(self._digests)
        ]
        held = [known.now[numbers] for known, numbers in zip(self._digests, pages, strict=True)]
        if not held:
            return []
        kinds, counts = np.unique(np.concatenate([*held, self._pooled()]), return_counts=True)
        wanted = kinds[counts > 1]
        return [numbers[_among(here, wanted)] for numbers, here in zip(pages, held, strict=True)]

    def _pooled(self) -> NDArray[np.uint64]:
        """The digests of what the pool holds, which is read once."""
        slots = self._pool.slots()
        kept = np.isin(self._pool_slots, slots)
        fresh = np.setdiff1d(slots, self._pool_slots)
        pieces = [self._pool.read(fresh[at : at + _READ]) for at in range(0, fresh.size, _READ)]
        found = [digests(piece, self._secret) for piece in pieces]
        self._pool_slots = np.concatenate((self._pool_slots[kept], fresh))
        self._pool_digests = np.concatenate((self._pool_digests[kept], *found))
        return self._pool_digests

    def round(self) -> Round:
        """Scan, and share what can be shared; a member that fails keeps no other from it."""
        failures: dict[str, str] = {}
        tidied = self._each(failures, lambda index: self.members[index].tidy())
        freed = self._pool.retain(self.slots())
        self._each(failures, self._digest)
        found = self._judge()
        chosen = self._candidates()
        zeros = self._each(failures, self._drop_zeros)
        spans = self._place(chosen, failures)
        shared = self._each(failures, lambda index: self._share(index, spans[index]))
        freed += self._pool.retain(self.slots())
        return Round(found, shared, zeros, tidied, freed, failures)

    def _each(self, failures: dict[str, str], work: Callable[[int], int]) -> int:
        done = 0
        for index, member in enumerate(self.members):
            try:
                done += work(index)
            except OutboardError as error:
                failures[member.name] = str(error)
        return done

    def _drop_zeros(self, index: int) -> int:
        runs = (self._digests[index].zeros() & PageSet.from_mask(self._allowed(index))).runs()
        return self.members[index].drop_zeros(runs) if runs.size else 0

    def _share(self, index: int, spans: Spans) -> int:
        return self.members[index].share(spans) if spans.size else 0

    def slots(self) -> NDArray[np.int64]:
        """The slots that members' residencies name."""
        named = [member.locator[member.where == Where.SHARED] for member in self.members]
        return np.unique(np.concatenate(named)).astype(np.int64) if named else np.empty(0, dtype=np.int64)

    def _place(self, chosen: list[NDArray[np.int64]], failures: dict[str, str]) -> list[Spans]:
        """Put contents into the pool that are there more than once; by member, which pages to map from where."""
        known: list[list[bytes]] = [[] for _ in self.members]

        def learn(index: int) -> int:
            known[index] = self._contents(self.members[index], chosen[index])
            return 0

        self._each(failures, learn)
        counts: dict[bytes, int] = {}
        for digests_here in known:
            for digest in digests_here:
                counts[digest] = counts.get(digest, 0) + 1
        spans: list[Spans] = [np.empty((0, 3), dtype=np.int64) for _ in self.members]

        def put(index: int) -> int:
            # Of a member that could not be read nothing is known.
            pages = chosen[index][: len(known[index])]
            wanted = [counts[digest] > 1 or self._pool.find(digest) >= 0 for digest in known[index]]
            kept = [digest for digest, one in zip(known[index], wanted, strict=True) if one]
            numbers = pages[np.array(wanted, dtype=np.bool_)]
            try:
                self._put(self.members[index], numbers, kept)
            finally:
                slots = np.array([self._pool.find(digest) for digest in kept], dtype=np.int64)
                # What could not be put, or has changed since, has none.
                spans[index] = spans_of(numbers[slots >= 0], slots[slots >= 0])
            return 0

        self._each(failures, put)
        return spans

    def _contents(self, member: Member, pages: NDArray[np.int64]) -> list[bytes]:
        found: list[bytes] = []
        for content in self._read(member, pages):
            data = content.data
            found += [self._pool.digest(data[at : at + PAGE_SIZE]) for at in range(0, content.size, PAGE_SIZE)]
        return found

    def _read(self, member: Member, pages: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        found = []
        for at in range(0, pages.size, _READ):
            part = pages[at : at + _READ]
            runs, _ = cut(member.regions(), PageSet.from_numbers(member.pages, part).runs())
            content = np.empty(part.size * PAGE_SIZE, dtype=np.uint8)
            answer = read(member.regions(), runs, content)
            if answer < 0:
                raise KernelError(f"read of the memory of {member.name}", -answer)
            found.append(content)
        return found

    def _put(self, member: Member, pages: NDArray[np.int64], known: list[bytes]) -> None:
        """Put those contents into the pool that it has not, as they follow one another in this member."""
        fresh: dict[bytes, int] = {}
        for page, digest in zip(pages.tolist(), known, strict=True):
            if self._pool.find(digest) < 0 and digest not in fresh:
                fresh[digest] = page
        if not fresh:
            return
        content = np.concatenate(self._read(member, np.array(sorted(fresh.values()), dtype=np.int64)))
        pieces = content.reshape(-1, PAGE_SIZE)
        # A page that changed since it was digested is not what it is known as.
        names = [self._pool.digest(piece.data) for piece in pieces]
        right = np.array([name in fresh for name in names], dtype=np.bool_)
        kept = np.ascontiguousarray(pieces[right]).reshape(-1)
        self._pool.put(kept, [name for name in names if name in fresh])


def _among(here: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``here`` are in ``wanted``, ascending."""
    if not wanted.size:
        return np.zeros(here.size, dtype=np.bool_)
    at = np.minimum(np.searchsorted(wanted, here), wanted.size - 1)
    found: NDArray[np.bool_] = wanted[at] == here
    return found


def spans_of(pages: NDArray[np.int64], slots: NDArray[np.int64]) -> Spans:
    """Pages (ascending) and their slots as spans, the longest first: each is a mapping, whatever its length."""
    if not pages.size:
        return np.empty((0, 3), dtype=np.int64)
    edges = np.flatnonzero((np.diff(pages) != 1) | (np.diff(slots) != 1)) + 1
    begins = np.concatenate(([0], edges))
    counts = np.diff(np.concatenate((begins, [pages.size])))
    order = np.argsort(-counts, kind="stable")
    return np.column_stack((pages[begins], slots[begins], counts))[order]
