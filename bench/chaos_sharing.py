"""script/chaos sharing: pages are shared, un-shared, zapped and tidied without a pause, under writers that verify.

Clones of a process write all the time, some more than others; a domain shares what they have in common for as long as
they do, and stretches of their memory are shared with what they held a moment ago. Pagers let go of their guests in
between and others take over. What dying at each system call does is tests/faults' to tell.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.sharing.domain import Domain, spans_of
from outboard.sharing.pool import Pool
from outboard.sharing.scan import SECRET
from tests.support.sharing import ProcessMember

from .claims import claim, publish

_RESTS_US = (100, 1000, 5000, 20000)
"""Between two writes of each of a clone's three writers."""
_MIB = 16
_STRETCH = 200
"""Pages."""


def play(seconds: float, chance: random.Random, console: Console) -> tuple[dict[str, int], int]:
    """What was done how often; and what is wrong in the end: words that are not as their writers left them."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-chaos-", dir="/dev/shm"))
    done = dict.fromkeys(("shared", "unshared", "zapped", "copied", "taken over"), 0)
    pool = Pool(directory / "pool", np.random.default_rng(chance.randrange(1 << 32)))
    members: list[ProcessMember] = []
    try:
        members += [ProcessMember(str(number), directory, pool.fileno(), _MIB) for number in range(len(_RESTS_US))]
        secret = np.frombuffer(chance.randbytes(SECRET), dtype=np.uint8).copy()
        domain = Domain(members, pool, secret)
        for member, rest in zip(members, _RESTS_US, strict=True):
            member.target.ask(f"p {rest}")
            member.target.ask("g")
        deadline, told = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < deadline:
            round_ = domain.round()
            if round_.failures:
                raise RuntimeError(f"{round_.failures}")
            done["shared"] += round_.shared
            done["copied"] += round_.tidied
            for member in members:
                first = chance.randrange(member.pages)
                done["shared"] += _share_as_it_is(member, pool, chance)
                some = PageSet.from_runs(
                    member.pages, np.array([[first, chance.randrange(1, member.pages - first + 1)]])
                )
                match chance.randrange(4):
                    case 0:
                        done["unshared"] += member.overlay.unshare(some)
                    case 1:
                        done["zapped"] += len(member.overlay.zap(some))
                    case 2:
                        member.take_over(pool.fileno())
                        done["taken over"] += 1
            if time.monotonic() > told + 60:
                told = time.monotonic()
                console.print(f"{done}")
        wrong = 0
        for member in members:
            answer = member.target.ask("s")
            console.print(answer)
            wrong += int(answer.split()[1])
            member.pager.release()
            wrong += member.target.ask("t").split()[1] != str(member.pages * (member.pages - 1) // 2)
            wrong += member.pager.failure is not None
        return done, wrong
    finally:
        for member in members:
            member.close()
        pool.close()
        shutil.rmtree(directory)


def _share_as_it_is(member: ProcessMember, pool: Pool, chance: random.Random) -> int:
    """Put what a stretch of the guest's memory holds now into the pool, and share what has not changed since."""
    first = chance.randrange(1, member.pages - _STRETCH)
    pages = np.arange(first, first + _STRETCH, dtype=np.int64)
    pages = pages[member.where[pages] == Where.RESIDENT]
    content = np.empty(_STRETCH * PAGE_SIZE, dtype=np.uint8)
    member.guest.memory.read_into(first, content.data)
    kept = np.ascontiguousarray(content.reshape(-1, PAGE_SIZE)[pages - first]).reshape(-1)
    slots = pool.put(kept, [chance.randbytes(16) for _ in range(pages.size)])
    return member.share(spans_of(pages, slots))


@click.command()
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--seed", type=int, help="Of the moments and pages; another one each time when not given.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
def main(minutes: float, seed: int | None, file: Path | None) -> None:
    """Share and un-share, and let the writers judge."""
    console = Console(stderr=True)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    console.print(f"seed {seed}")
    done, wrong = play(minutes * 60, random.Random(seed), console)  # noqa: S311  # moments, not secrets
    console.print(f"{done}")
    claims = [claim("words that are not as they were written", wrong, 0, "", done["shared"])]
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
