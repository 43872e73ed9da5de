"""When a guest gets a private copy of a page that it shares: by how it reads it.

A shared page that is read much is better private: on a machine of several nodes the one copy is far from most of its
readers, and whoever shares a page can tell by its own accesses what the others do with theirs. So reads are watched:
shared pages are taken out of the guest's page table every round, and those that are back at the next were read in
between. What that has seen is compared with patterns, which are data: so many reads, of all or of remote ones, within
so many seconds. A round says read or not read, so a page has at most one read a round.

Un-sharing is spread: each page waits a random while first, and only so many go at once, which keeps the guest from
waiting often, and others from telling when a page was judged.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.pages.pageset import PageSet

_MOST_ROUNDS = 512


class Pattern(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page is un-shared when it was read in ``at_least`` rounds of the last ``within_s`` seconds.

    ``remote``: only those rounds count in which its memory was on another node than the processors that read it.
    """

    name: str
    at_least: int
    within_s: float
    remote: bool = False

    def __post_init__(self) -> None:
        if self.at_least < 1 or not 0 < self.within_s < float("inf"):
            raise ValueError(f"pattern {self.name}: at_least is 1 or more, within_s is more than 0 seconds")


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How reads are watched: ``patterns``; ``sample`` pages at a time, each for ``hold_s`` seconds before others come.

    A page that has met a pattern is un-shared within ``jitter_s`` seconds, ``batch`` of them a round, and is not shared
    again for ``private_s``.
    """

    patterns: tuple[Pattern, ...] = (
        Pattern("rate", 20, 60.0),
        Pattern("burst", 5, 5.0),
        Pattern("remote", 5, 60.0, remote=True),
    )
    sample: int = 4096
    hold_s: float = 120.0
    jitter_s: float = 2.0
    batch: int = 256
    private_s: float = 600.0


def met(
    patterns: Sequence[Pattern],
    now: float,
    times: NDArray[np.float64],
    read: NDArray[np.bool_],
    remote: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Which pattern each page has met first, by its index; -1 for none.

    :param times: when each round ended, in seconds, ascending; :param read: shape (rounds, pages);
    :param remote: the same shape: that those reads went to another node.
    """
    found: NDArray[np.int64] = np.full(read.shape[1], -1, dtype=np.int64)
    for index, pattern in enumerate(patterns):
        recent = times > now - pattern.within_s
        counted = read[recent] & remote[recent] if pattern.remote else read[recent]
        found[(found < 0) & (np.count_nonzero(counted, axis=0) >= pattern.at_least)] = index
    return found


class Reads:
    """What was seen of the reads of a guest of ``pages`` pages, and which of them are to be un-shared.

    :param random: which pages are watched, and how long those wait that are to be un-shared.

    Synchronization: one thread. Clocks are passed in, in seconds.
    """

    def __init__(self, pages: int, watch: Watch, random: np.random.Generator) -> None:
        self.watch = watch
        self._pages = pages
        self._random = random
        self._numbers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._since = 0.0
        self._times: list[float] = []
        self._read: list[NDArray[np.bool_]] = []
        self._remote: list[NDArray[np.bool_]] = []
        self._due: NDArray[np.float64] = np.full(pages, np.inf)
        self._private_until: NDArray[np.float64] = np.zeros(pages)
        self.met: dict[str, int] = {pattern.name: 0 for pattern in watch.patterns}

    def choose(self, shared: PageSet, now: float) -> PageSet:
        """The pages to watch from now on: the same as before, until those have been watched long enough."""
        if not self._numbers.size or now >= self._since + self.watch.hold_s:
            among = shared.numbers()
            count = min(among.size, self.watch.sample)
            self._numbers = np.sort(self._random.choice(among, count, replace=False))
            self._since = now
            self._times, self._read, self._remote = [], [], []
        return PageSet.from_numbers(self._pages, self._numbers) & shared

    def note(self, read: PageSet, remote: PageSet, now: float) -> None:
        """A round has ended: which of the watched pages were read in it, and which of those from afar."""
        self._times.append(now)
        self._read.append(read.mask()[self._numbers])
        self._remote.append(remote.mask()[self._numbers])
        for kept in (self._times, self._read, self._remote):
            del kept[:-_MOST_ROUNDS]
        if not self._numbers.size:
            return
        found = met(self.watch.patterns, now, np.array(self._times), np.array(self._read), np.array(self._remote))
        settled = np.isfinite(self._due[self._numbers]) | (self._private_until[self._numbers] > now)
        judged = self._numbers[(found >= 0) & ~settled]
        for index, pattern in enumerate(self.watch.patterns):
            self.met[pattern.name] += int(np.count_nonzero(found[np.isin(self._numbers, judged)] == index))
        self._due[judged] = now + self._random.uniform(0, self.watch.jitter_s, judged.size)

    def due(self, now: float) -> PageSet:
        """The pages to un-share now, of those judged the first; they are private for a while from now on."""
        waiting = np.flatnonzero(self._due <= now)
        batch = waiting[np.argsort(self._due[waiting], kind="stable")][: self.watch.batch]
        self._due[batch] = np.inf
        self._private_until[batch] = now + self.watch.private_s
        return PageSet.from_numbers(self._pages, batch)

    def private(self, now: float) -> PageSet:
        """The pages that are not to be shared again yet."""
        return PageSet.from_mask(self._private_until > now)
