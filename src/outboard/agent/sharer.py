"""What an engine does about sharing: its guest's pages mapped from the pool of a domain, and given back.

Which domain it is lies in the guest's directory, in the file ``sharing``, from the first shared page to the last: a
successor opens the same pool. The pool is opened for reading only, so that the VMM, whose process maps it, cannot write
to what others see.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from outboard.agent.orders import DropZeros, ReadRound, Rebuild, Share, Tidy, Unshare
from outboard.errors import KernelError, RefusedError, UsageError
from outboard.linux import statfs
from outboard.pager.overlay import Overlay
from outboard.pager.pager import Pager
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.sharing.pool import SLOTS
from outboard.sharing.reads import Reads, Watch

_NAMED = "sharing"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Shared(TypedDict):
    """What :class:`~outboard.agent.orders.Looked` has of sharing."""

    shared: int
    copied: int
    domain: str | None
    read_much: dict[str, int]


Order = Share | Unshare | DropZeros | Tidy | ReadRound | Rebuild


def domain_directory(root: Path, domain: str) -> Path:
    """Where a sharing domain's pool is, under the runtime directory.

    :raise UsageError: that is no name of a domain.
    """
    if _NAME.fullmatch(domain) is None:
        raise UsageError(f"{domain!r} is no name of a sharing domain: letters, digits, '.', '_', '-'")
    return root / "sharing" / domain


def pool_path(root: Path, domain: str) -> Path:
    """Where a domain's pool is: in its directory, where that is memory, as /run is; else in /dev/shm.

    :raise UsageError: that is no name of a domain. :raise KernelError: the runtime directory cannot be looked at.
    """
    directory = domain_directory(root, domain)
    fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        if statfs.of(fd).type == statfs.TMPFS_MAGIC:
            return directory / "pool"
    finally:
        os.close(fd)
    # Opened without following links, and only if it is ours.
    return Path("/dev/shm") / f"outboard-sharing-{sha256(os.fsencode(directory)).hexdigest()[:24]}"  # noqa: S108


class Sharer:
    """Carries out the orders that concern sharing, for the guest of ``pager``, whose directory is ``directory``.

    :param domains: the runtime directory.
    :raise KernelError: the pool of the domain that it is in cannot be opened.

    Synchronization: the engine's main thread.
    """

    def __init__(self, pager: Pager, directory: Path, domains: Path) -> None:
        self._pager = pager
        self._named = directory / _NAMED
        self._domains = domains
        self._pages = pager.guest.pages
        self._reads = Reads(self._pages, Watch(), np.random.default_rng())
        self._zapped = PageSet(self._pages)
        if self._named.exists():
            self._overlay(self._named.read_text())

    @property
    def domain(self) -> str | None:
        """The domain that the guest is in; None while nothing is shared."""
        return self._named.read_text() if self._named.exists() else None

    def _overlay(self, domain: str) -> Overlay:
        if self._pager.overlay is not None:
            if self.domain != domain:
                raise RefusedError("sharing", f"{self._pager.guest.name} shares in {self.domain} already")
            return self._pager.overlay
        path = pool_path(self._domains, domain)
        try:
            pool = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise KernelError(f"open of the sharing pool {path}", error.errno or 0) from error
        try:
            # Before the first page is shared: whoever comes after us must know from where.
            self._named.write_text(domain)
            return self._pager.share_from(pool)
        finally:
            os.close(pool)

    def carry_out(self, order: Order) -> int:
        """Do it; how many pages that concerned.

        :raise UsageError: it names pages that the guest has not.
        :raise OutboardError: it could not be done.
        """
        match order:
            case Share():
                return self._share(order)
            case Unshare():
                return self._unshare(order)
            case DropZeros():
                # Until something is shared there is no overlay; the next round names them again.
                overlay = self._pager.overlay
                return 0 if overlay is None else overlay.drop_zeros(self._set(order.runs))
            case Tidy():
                overlay = self._pager.overlay
                return 0 if overlay is None else overlay.unshare(overlay.copied())
            case ReadRound():
                return self._read_round(order)
            case Rebuild():
                blocks = self._set([(block * LARGE, LARGE) for block in order.blocks])
                return 0 if self._pager.overlay is None else self._pager.overlay.rebuild(blocks) * LARGE

    def looked(self) -> Shared:
        """What a look at the guest tells of sharing."""
        overlay = self._pager.overlay
        if overlay is None:
            return Shared(shared=0, copied=0, domain=None, read_much={})
        now = overlay.statistics()
        return Shared(
            shared=now.shared * PAGE_SIZE,
            copied=now.copied * PAGE_SIZE,
            domain=self.domain,
            read_much=dict(self._reads.met),
        )

    def _set(self, runs: Sequence[tuple[int, int]]) -> PageSet:
        try:
            return PageSet.from_runs(self._pages, np.array(runs, dtype=np.int64).reshape(-1, 2))
        except (ValueError, OverflowError) as error:
            raise UsageError(f"{self._pager.guest.name} has no such pages: {error}") from error

    def _share(self, order: Share) -> int:
        spans = self._spans(order)
        overlay = self._overlay(order.domain)
        private = self._reads.private(time.monotonic())
        if private:
            spans = _without(spans, private)
        return len(overlay.share(spans))

    def _spans(self, order: Share) -> NDArray[np.int64]:
        try:
            spans: NDArray[np.int64] = np.array(order.spans, dtype=np.int64).reshape(-1, 3)
        except OverflowError as error:
            raise UsageError(f"{self._pager.guest.name} has no such pages: {error}") from error
        self._set([(first, count) for first, _, count in spans.tolist()])
        if spans.size and (int(spans[:, 1].min()) < 0 or int(spans[:, 2].min()) < 1):
            raise UsageError("a slot of a sharing pool is a number from 0 on, and so many are 1 at least")
        if (spans[:, 1] > SLOTS - spans[:, 2]).any():
            raise UsageError(f"a sharing pool has {SLOTS} slots")
        return spans

    def _unshare(self, order: Unshare) -> int:
        overlay = self._pager.overlay
        if order.runs is not None:
            return 0 if overlay is None else overlay.unshare(self._set(order.runs))
        count = 0 if overlay is None else len(overlay.shared())
        self._pager.stop_sharing()
        self._named.unlink(missing_ok=True)
        self._zapped = PageSet(self._pages)
        return count

    def _read_round(self, order: ReadRound) -> int:
        overlay = self._pager.overlay
        if overlay is None:
            return 0
        now = time.monotonic()
        if order.watch is not None and order.watch != self._reads.watch:
            self._reads = Reads(self._pages, order.watch, np.random.default_rng())
            self._zapped = PageSet(self._pages)
        watched = self._zapped & overlay.shared()
        if watched:
            read = overlay.touched(watched)
            self._reads.note(read, overlay.remote(read), now)
        went = overlay.unshare(self._reads.due(now))
        self._zapped = overlay.zap(self._reads.choose(overlay.shared(), now))
        return went


def _without(spans: NDArray[np.int64], pages: PageSet) -> NDArray[np.int64]:
    """Spans, less some pages."""
    kept: list[list[int]] = []
    for first, slot, count in spans.tolist():
        here = PageSet.from_runs(pages.pages, np.array([[first, count]], dtype=np.int64)) - pages
        kept += [[low, slot + low - first, length] for low, length in here]
    return np.array(kept, dtype=np.int64).reshape(-1, 3)
