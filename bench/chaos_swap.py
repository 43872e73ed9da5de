"""script/chaos swap: VMs swapped out and in at random from one reservation, while their engines are killed.

Three processes with three writing threads each, and one Debian guest that writes 5,000 pages/s, on a file system of
their own, which is filled to the last block halfway. At every check the blocks of reservation and swap files together
must be what was reserved, to the block; no order may fail; in the end every writer finds what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from outboard.agent.orders import Evict, Fetch, Order, ask
from outboard.agent.swapping import ReservedSwap
from outboard.errors import OutboardError, UnreachableError
from outboard.linux import pidfd
from tests.support.cluster import Cluster
from tests.support.loops import KINDS, fill, mounted, reserve
from tests.support.processes import kill

from .claims import claim, publish
from .managed import GUEST_MIB, MIB, ManagedGuest, ManagedProcess

_RESERVED = (3 * MIB + GUEST_MIB) << 20


class _Disturber:
    """Gives a VM's engine one order after another; ``failures`` are those that were refused."""

    def __init__(self, vm: ManagedProcess | ManagedGuest, chance: random.Random) -> None:
        self._vm, self._chance = vm, chance
        self.failures: list[str] = []
        self.orders = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._disturb)
        self._thread.start()

    def _orders(self) -> Iterator[Order]:
        while True:
            yield Evict(to="file", most=self._chance.randrange(1, 48) << 20, idle=0.0)
            if self._chance.random() < 0.4:
                yield Fetch()

    def _disturb(self) -> None:
        for order in self._orders():
            if self._ending.is_set():
                return
            try:
                ask(self._vm.control, order, 30.0)
                self.orders += 1
            except UnreachableError:
                # Whoever dies meanwhile has not answered.
                time.sleep(0.01)
            except OutboardError as error:
                self.failures.append(str(error))

    def end(self) -> None:
        """Wait for its last order."""
        self._ending.set()
        self._thread.join()


@contextlib.contextmanager
def _host(disk: Path) -> Iterator[Cluster]:
    cluster = Cluster(51)
    with (cluster.a.directory / "etc" / "agent.toml").open("a") as file:
        file.write(f'\n[swap]\nreservation = "{_RESERVED >> 20}MiB"\ndirectory = "{disk / "swap"}"\n')
    with cluster:
        yield cluster


@click.command()
@click.option("--kills", default=200, show_default=True, help="Of engines, whosever comes.")
@click.option("--seconds", default=600.0, show_default=True, help="At least; kills are spread over it.")
@click.option("--file-system", "kind", type=click.Choice((*KINDS, "ext4-lent")), default="ext4", show_default=True)
@click.option("--guest/--no-guest", default=True, show_default=True, help="A real one beside the processes.")
@click.option("--seed", type=int, help="Of the moments and orders; another one each time when not given.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
def main(kills: int, seconds: float, kind: str, guest: bool, seed: int | None, file: Path | None) -> None:
    """Swap and kill; count the blocks, and let the writers judge."""
    console = Console(stderr=True)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    console.print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311  # moments and orders, not secrets
    place = Path(tempfile.mkdtemp(prefix="outboard-chaos-swap-"))
    memory = Path(tempfile.mkdtemp(prefix="outboard-chaos-swap-", dir="/dev/shm"))  # journals lie in memory
    odd: list[str] = []
    took: list[float] = []
    failures: list[str] = []
    wrong = checks = 0
    try:
        with contextlib.ExitStack() as until_end:
            disk = until_end.enter_context(mounted(kind, place, 1 << 30))
            lookout = reserve(disk / "swap", _RESERVED)
            until_end.callback(lookout.close)
            vms: list[ManagedProcess | ManagedGuest] = []
            if guest:
                vms.append(ManagedGuest(until_end.enter_context(_host(disk))))
            for number in range(3):
                name = f"process-{number}"
                swap = ReservedSwap(str(disk / "swap"), _RESERVED, name)
                vms.append(ManagedProcess(memory / name, swap))
                until_end.callback(vms[-1].close)
            engines = {vm.name: vm.next() for vm in vms}
            disturbers = [_Disturber(vm, random.Random(chance.random())) for vm in vms]  # noqa: S311
            began = time.monotonic()
            try:
                for number in range(1, kills + 1):
                    time.sleep(max(0.0, chance.uniform(0, 2) * seconds / kills - (took[-1] / 1e3 if took else 0)))
                    vm = chance.choice(vms)
                    killed = time.monotonic()
                    kill(engines[vm.name])
                    while pidfd.alive(engines[vm.name]):
                        os.sched_yield()
                    engines[vm.name] = vm.next()
                    took.append((time.monotonic() - killed) * 1e3)
                    now = lookout.statistics()
                    checks += 1
                    if now.blocks != now.blocks_reserved or now.lost:
                        odd.append(f"after {number} kills: {now}")
                    if number == kills // 2:
                        fill(disk)
                        console.print("the disk is full from now on")
                    if number % 20 == 0:
                        orders = sum(one.orders for one in disturbers)
                        console.print(f"{number} kills, {orders} orders; {now.moved >> 20} MiB moved, {now}")
            finally:
                for one in disturbers:
                    one.end()
            while time.monotonic() - began < seconds:
                time.sleep(1)
            failures = [failure for one in disturbers for failure in one.failures]
            wrong = sum(vm.wrong() for vm in vms)
            now = lookout.statistics()
            checks += 1
            if now.blocks != now.blocks_reserved or now.lost:
                odd.append(f"in the end: {now}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    for line in (*odd[:10], *failures[:10]):
        console.print(line)
    claims = [
        claim(f"{kind}: checks at which blocks were others than reserved", len(odd), 0, "", checks),
        claim(f"{kind}: orders refused", len(failures), 0, "", kills),
        claim(f"{kind}: what is wrong in memory", wrong, 0, "", kills),
        claim(f"{kind}: recovery, median", statistics.median(took), 300, "ms", len(took)),
    ]
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
