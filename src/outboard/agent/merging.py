"""Sharing left to the kernel (KSM): which processes were told to let it merge their memory, and how it goes.

KSM needs no process of ours. What is to be undone at the end lies in RUNTIME/ksm.json, there before the first process
is told: whoever dies in between, ``outboard sharing stop`` finds what to take back. KSM knows no domains: what two
processes have said may be merged is merged, whoever owns them. So there is one such domain on a host at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from outboard.agent.domains import MemberTold, Told, wanted_of
from outboard.agent.sharer import domain_directory
from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError
from outboard.linux import ksm, proc
from outboard.pages import PAGE_SIZE
from outboard.sharing.ksm import Spans, check, let_merge, merged, take_back, unsaid
from outboard.vmm.guest import Guest

_RECORD = "ksm.json"


class Process(msgspec.Struct, frozen=True):
    """A process that was told; with ``start_time``, in clock ticks since boot, the pid is a process for good."""

    name: str
    pid: int
    start_time: int
    thread: int
    spans: Spans

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            return proc.start_time(self.pid) == self.start_time
        except KernelError:
            return False


class Merged(msgspec.Struct, frozen=True):
    """The domain whose memory the kernel merges."""

    domain: str
    processes: list[Process]


def merging(root: Path) -> Merged | None:
    """The domain of this host that is left to the kernel, if there is one."""
    try:
        return msgspec.json.decode((root / _RECORD).read_bytes(), type=Merged)
    except FileNotFoundError:
        return None


def _keep(work: Merged, root: Path) -> None:
    """Write it down, unless there is one already."""
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = root / f"{_RECORD}.{os.getpid()}"
    fresh.write_bytes(msgspec.json.encode(work))
    try:
        (root / _RECORD).hardlink_to(fresh)
    except FileExistsError as error:
        raise _taken(merging(root)) from error
    finally:
        fresh.unlink()


def _taken(other: Merged | None) -> RefusedError:
    name = "another domain" if other is None else other.domain
    return RefusedError(
        "sharing",
        f"the kernel merges the memory of {name} already, and knows no domains: it would merge this with that; "
        f"outboard sharing stop {name} ends it",
    )


def begin(root: Path, domain: str, guests: Sequence[Guest]) -> None:
    """Let the kernel merge the memory of ``guests`` from now on.

    :raise RefusedError: ``no-ksm``; ``shared-memory``; ``sharing``: it merges another domain's, or this domain shares
        through an overlay.
    :raise KernelError: a process could not be told; none is, then.
    """
    if (other := merging(root)) is not None:
        raise _taken(other)
    if wanted_of(domain_directory(root, domain)) is not None:
        raise RefusedError("sharing", f"the domain {domain} shares already, by an overlay; stop that first")
    for guest in guests:
        check(guest)
    work = Merged(
        domain,
        [
            Process(guest.name, guest.pid, proc.start_time(guest.pid), guest.emulator_thread(), unsaid(guest))
            for guest in guests
        ],
    )
    _keep(work, root)
    try:
        for one in work.processes:
            let_merge(one.pid, one.thread, one.spans)
    except BaseException:
        with contextlib.suppress(OutboardError):
            end(root, domain)
        raise


def told(root: Path, domain: str) -> Told:
    """How it goes, as the kernel tells.

    :raise NotFoundError: the kernel merges nothing of that domain's.
    """
    work = _of(root, domain)
    alive = [one for one in work.processes if one.alive]
    now, failures = merged([one.pid for one in alive])
    switch = "" if ksm.setting("run") == 1 else "ksmd is off: /sys/kernel/mm/ksm/run is not 1"
    members = []
    for one in work.processes:
        known = now.get(one.pid)
        failure = failures.get(one.pid) or switch or None
        if not one.alive:
            failure = "it has ended"
        shared, zeros = (0, 0) if known is None else (known.merged * PAGE_SIZE, known.zeros * PAGE_SIZE)
        members.append(MemberTold(one.name, shared, 0, zeros, {}, failure))
    # The kernel does not say whose the pages are that are kept once: of all that are, these are the host's.
    shared, pool = sum(one.shared for one in members), ksm.setting("pages_shared") * PAGE_SIZE
    return Told(
        domain=domain,
        process=0,
        scans=ksm.setting("full_scans"),
        scanned=sum(high - low for one in alive for low, high in one.spans),
        scan_rate=None,
        shareable=None,
        unstable=ksm.setting("pages_volatile") * PAGE_SIZE,
        pool=pool,
        shared=shared,
        saved=max(0, shared - pool),
        zeros=sum(one.zeros for one in members),
        inside=0,
        broken=0,
        tlb_entries=0,
        members=members,
        backend="ksm",
    )


def end(root: Path, domain: str) -> Told:
    """Have every process take back what it said: what was merged is its own again. How things are then.

    :raise NotFoundError: the kernel merges nothing of that domain's.
    :raise KernelError: a process that still runs could not be told, or there is no memory; it may be tried again.
    """
    for one in _of(root, domain).processes:
        try:
            if one.alive:
                take_back(one.pid, one.thread, one.spans)
        except KernelError:
            if one.alive:
                raise
    last = told(root, domain)
    (root / _RECORD).unlink(missing_ok=True)
    return last


def _of(root: Path, domain: str) -> Merged:
    work = merging(root)
    if work is None or work.domain != domain:
        raise NotFoundError(f"the kernel merges nothing of {domain}; outboard sharing status lists what is shared")
    return work
