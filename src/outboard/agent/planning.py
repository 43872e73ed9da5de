"""Plans: an engine's task beside a departure, which looks at a VM, asks the destination, and moves nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from outboard.agent.history import History
from outboard.errors import NotAuthorisedError, OutboardError, RefusedError, UnreachableError
from outboard.migrate import messages, probe
from outboard.migrate.desk import Destination
from outboard.migrate.measure import watch
from outboard.migrate.method import Options
from outboard.migrate.plan import Blocker, Past, Plan, Watched, recommend
from outboard.migrate.predict import link_of, predict
from outboard.migrate.states import State
from outboard.stores.disk import Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images
from outboard.vmm.device_state import runs
from outboard.vmm.registry import VmRecord
from outboard.vmm.spec import parse_spec

WATCHED_S = 3.0
"""How long a guest is watched."""
_REMEMBERED = 5
"""Earlier migrations that count."""


class Planning(msgspec.Struct, frozen=True, tag="planning"):
    """Plan the migration of a VM of this host (``source``).

    ``blockers``: what the agent knows to stand in the way already; the VM is not looked at then.
    """

    vm: str
    source: str
    destination: Destination
    options: Options
    past: Past
    blockers: list[Blocker]


def past_of(history: History, vm: str, destination: str) -> Past:
    """What is remembered that tells of another migration of that VM to that host."""
    done = [one for one in history.read() if one.state is State.COMPLETED]
    own = [one for one in done if one.vm == vm][:_REMEMBERED]
    rates = [one.bulk_rate for one in done if one.destination == destination and one.bulk_rate is not None]
    early = [one.time_to_resume_s for one in own if not one.method.rounds and one.time_to_resume_s is not None]
    return Past(
        rates=rates[:_REMEMBERED],
        blackouts_ms=[one.blackout_ms for one in own if one.blackout_ms is not None and not one.verified],
        resumes_s=early,
        throttle_gain=history.throttle_gain(vm),
    )


def make(work: Planning, record: VmRecord, identity: Path, indexes: Path, random: np.random.Generator) -> Plan:
    """Plan. Whatever stands in the way is in the plan, not raised.

    :param indexes: the directory of the disk images' indexes.
    """
    blockers = list(work.blockers)
    watched, version = None, None
    if not blockers:
        try:
            watched, version = _look(record, indexes, random)
        except RefusedError as error:
            blockers.append(Blocker(work.source, error.reason, str(error)))
        except OutboardError as error:
            blockers.append(Blocker(work.source, "not-attached", str(error)))
    there, bursts = _ask(work, record, version, identity)
    blockers += there
    expected, link = [], None
    recommended, why = None, "the VM could not be looked at"
    if watched is not None:
        link = link_of(bursts, work.past.rates, work.options.max_bandwidth)
        expected = predict(watched, link, work.past, work.options)
        recommended, why = recommend(expected, work.options.goal)
    return Plan(
        vm=work.vm,
        source=work.source,
        destination=work.destination.name,
        options=work.options,
        blockers=blockers,
        watched=watched,
        link=link,
        expected=expected,
        recommended=recommended,
        why=why,
    )


def _look(record: VmRecord, indexes: Path, random: np.random.Generator) -> tuple[Watched, tuple[int, int]]:
    disks = parse_spec(record.spec_text(), f"the spec of {record.name}").disks
    with record.attach() as guest, Images(disks) as images:
        runs(guest.monitor, guest.name)
        version = guest.monitor.execute("query-version")["qemu"]
        found = [index.load(layer, indexes) if layer.fixed else None for layer in images.layers]
        finder = Finder(images.files, found) if any(one is not None for one in found) else None
        return watch(guest, WATCHED_S, random, finder), (int(version["major"]), int(version["minor"]))


def _ask(
    work: Planning, record: VmRecord, version: tuple[int, int] | None, identity: Path
) -> tuple[list[Blocker], list[float]]:
    """What stands in the way there, and the rates of bursts."""
    try:
        probed, bursts = probe.ask(work.destination, identity, messages.Probe(record.spec_text(), version))
    except (UnreachableError, NotAuthorisedError) as error:
        reason = "unreachable" if isinstance(error, UnreachableError) else "not-authorised"
        return [Blocker(work.destination.name, reason, str(error))], []
    except OutboardError as error:
        return [Blocker(work.destination.name, "not-asked", str(error))], []
    return [Blocker(work.destination.name, one.reason, one.words) for one in probed.hindrances], bursts
