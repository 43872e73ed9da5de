"""script/chaos migrate: a VM that writes is migrated to and fro while things go wrong, and verifies its memory.

First every cell of the table in docs/migrate.md, each fault held at its moment, then rounds of chance: a method, a
fault, and now and then a second one, whenever it hits. After each: one copy of the VM that runs, where the command said
that it is, with its memory as it left it, nothing left over at either host, and it can be migrated again.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import click
from rich import box
from rich.console import Console
from rich.table import Table

from demo.hosts import ROOT
from guest.build import build
from outboard.migrate.states import State
from tests.support.cluster import Cluster
from tests.support.following import Follower
from tests.support.link import Link
from tests.support.matrix import CELLS, Fault, Outcome, Place
from tests.support.processes import engines
from tests.support.scene import Scene

_METHODS = ("--enlightened", "--post-copy", "--pre-copy", "--hybrid", "--verify")
_RATES = ("10MB", "20MB", "40MB")
_LONGEST_S = 5.0
_SECOND_S = 2.0
_TWICE = 0.3


@dataclass
class _Cell:
    """What came of all rounds in which a fault hit a state."""

    rounds: int = 0
    came: Counter[str] = field(default_factory=Counter)
    repaired: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Account:
    """The cells, by state and fault."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], _Cell] = {}

    def note(self, when: str, what: str, outcome: Outcome | None, repaired: float | None, wrong: str | None) -> None:
        """Enter one round."""
        cell = self.cells.setdefault((when, what), _Cell())
        cell.rounds += 1
        if outcome is not None:
            cell.came[f"exit {outcome.exit_code}, {outcome.place.value.partition(';')[0]}"] += 1
        if repaired is not None:
            cell.repaired.append(repaired)
        if wrong is not None:
            cell.wrong.append(wrong)

    def wrong(self) -> list[str]:
        """All that was."""
        return [f"{when}, {what}: {each}" for (when, what), cell in self.cells.items() for each in cell.wrong]

    def table(self) -> Table:
        """The cells as a table."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("moment", "fault", "rounds", "came of it", "repair s, median", "worst", "wrong"):
            table.add_column(heading, justify="left" if heading in ("moment", "fault", "came of it") else "right")
        for (when, what), cell in self.cells.items():
            took = cell.repaired
            table.add_row(
                when,
                what,
                str(cell.rounds),
                "; ".join(f"{came} ({count})" if count > 1 else came for came, count in cell.came.items()),
                f"{statistics.median(took):.2f}" if took else "-",
                f"{max(took):.2f}" if took else "-",
                str(len(cell.wrong)),
            )
        return table


def judge(outcome: Outcome, faults: list[Fault]) -> str | None:
    """What is wrong with an outcome; None: nothing."""
    place = outcome.place
    if place is Place.GONE and not {Fault.SOURCE_VMM, Fault.TARGET_VMM} & set(faults):
        return "the VM is gone, and nobody killed it"
    if place is Place.STOPPED and (Fault.TARGET_VMM not in faults or outcome.state in (State.FAILED, State.CANCELLED)):
        return "the VM stands still at the source"
    told = {
        State.COMPLETED: (Place.TARGET, Place.GONE),
        State.FAILED: (Place.SOURCE, Place.GONE),
        State.CANCELLED: (Place.SOURCE, Place.GONE),
        State.PAUSED: (Place.STOPPED, Place.GONE),
    }
    if outcome.state is not None and place not in told.get(outcome.state, ()):
        return f"the command said {outcome.state.value}, and the VM is at: {place.value}"
    return None


class _Chance:
    """Rounds of chance on one scene."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self._scene = scene
        self.hit = self.words = ""
        """Of the present round: the state that the first fault hit, and all faults in words."""
        self._chance = random.Random(seed)  # noqa: S311  # moments, not secrets

    def round(self) -> tuple[str, str, Outcome, float | None, list[Fault]]:
        """Migrate once; what was hit, by which faults in words, what came of it, the time of repair, and the faults."""
        scene, chance = self._scene, self._chance
        faults = [chance.choice(list(Fault))]
        if chance.random() < _TWICE:
            faults.append(chance.choice(list(Fault)))
        options = [chance.choice(_METHODS), "--max-bandwidth", chance.choice(_RATES)]
        with Follower(scene.source, scene.vm.name, scene.target.name, *options) as follower:
            follower.wait(lambda: bool(follower.reports), "the first report")
            time.sleep(chance.uniform(0, _LONGEST_S))
            self.hit = f"{follower.states()[-1].value} ({options[0][2:]})"
            self.words = ", then ".join(fault.value for fault in faults)
            struck = time.monotonic()
            for fault in faults:
                if fault is not faults[0]:
                    time.sleep(chance.uniform(0, _SECOND_S))
                scene.strike(fault)
            if not follower.over:
                scene.source.outboard("limit", scene.vm.name, "none")
            code = follower.end(300)
            state = follower.last_state()
            repaired = follower.repaired(struck)
        return self.hit, self.words, Outcome(code, state, scene.settle()), repaired, faults


def _logs(scene: Scene) -> str:
    return "\n".join(f"{name}: {host.log()[-1500:]}" for name, host in scene.cluster.hosts.items())


def _note_broken(
    scene: Scene, account: Account, console: Console, cell: tuple[str, str], error: AssertionError
) -> None:
    """A round that did not come to its end."""
    account.note(*cell, None, None, str(error))
    at_work = {name: engines(host) for name, host in scene.cluster.hosts.items()}
    console.print(f"BROKEN: {cell}: {error}\nat work: {at_work}\n{_logs(scene)}", markup=False)
    scene.start_over()


def _play_cells(scene: Scene, account: Account, console: Console) -> None:
    for (moment, fault), expected in CELLS.items():
        try:
            outcome, repaired = scene.play(moment, fault)
        except AssertionError as error:
            _note_broken(scene, account, console, (moment.value, fault.value), error)
            continue
        wrong = None if outcome == expected else f"expected {expected}, came {outcome}"
        account.note(moment.value, fault.value, outcome, repaired, wrong)
        if wrong:
            console.print(f"{moment.value}, {fault.value}: {wrong}\n{_logs(scene)}", markup=False)
        scene.go_on(outcome.place)


def _play_rounds(scene: Scene, rounds: int, seed: int, account: Account, console: Console) -> None:
    luck = _Chance(scene, seed)
    for number in range(1, rounds + 1):
        try:
            when, what, outcome, repaired, faults = luck.round()
        except AssertionError as error:
            _note_broken(scene, account, console, (luck.hit, luck.words), error)
            continue
        wrong = judge(outcome, faults)
        # By the state alone: what the method was is told above.
        account.note(when.partition(" (")[0], what, outcome, repaired, wrong)
        state = "-" if outcome.state is None else outcome.state.value
        words = f"{number}: {when}, {what}: exit {outcome.exit_code}, {state}, the VM is at: {outcome.place.value}"
        console.print(words, markup=False, highlight=False)
        if wrong:
            console.print(f"WRONG: {wrong}\n{_logs(scene)}", markup=False)
        scene.go_on(outcome.place)


@click.command()
@click.option("--cells/--no-cells", default=True, show_default=True, help="Every cell of the table once, first.")
@click.option("--rounds", default=20, show_default=True, help="Of chance, after the cells.")
@click.option("--seed", type=int, help="Of the rounds; another one each time when not given.")
def main(cells: bool, rounds: int, seed: int | None) -> None:
    """Disturb migrations, and let the guest judge."""
    console = Console(stderr=True)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    console.print(f"seed {seed}")
    account = Account()
    with Link() as link, Cluster(link=link) as cluster:
        scene = Scene(cluster, link, build(ROOT / ".build/guest"))
        try:
            if cells:
                _play_cells(scene, account, console)
            _play_rounds(scene, rounds, seed, account, console)
        finally:
            # Also of rounds that somebody ends.
            Console(width=180).print(account.table())
    for each in account.wrong():
        console.print(each, style="bold red", markup=False)
    sys.exit(1 if account.wrong() else 0)
