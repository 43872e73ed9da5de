"""The simulated host: deterministic, nothing lost, and the policies in the order that they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import SpecError
from outboard.numa.moving import Limits
from outboard.numa.policies import ABSENT, POLICIES
from outboard.numa.simulation import Host, Outcome, Recording, Simulation, load, save, working_set
from tests.support.topologies import recorded


def recording(seed: int, units: int = 2048, node: int = 0, frames: int = 2, vcpus: int = 2) -> Recording:
    """Zipf-distributed accesses to units in random order, another in each frame."""
    random = np.random.default_rng(seed)
    ranks: NDArray[np.float32] = (1e6 / np.arange(1, units + 1) ** 1.2).astype(np.float32)
    heat: NDArray[np.float32] = np.stack([ranks[random.permutation(units)] for _ in range(frames)])
    return Recording(heat, heat * np.float32(0.25), np.full(units, node, dtype=np.int16), vcpus)


def run(name: str, recordings: list[Recording], to: list[int], until: float = 4.0, period: float = 100.0) -> Outcome:
    simulation = Simulation(recorded("eight"), recordings, POLICIES[name], Limits(), Host(), to)
    free = sum(simulation.free)
    outcome = simulation.run(until, 0.01, period)
    assert sum(simulation.free) == free, "memory is neither made nor lost"
    assert min(simulation.free) >= 0
    return outcome


def test_hottest_first_is_local_long_before_address_order() -> None:
    guests = [recording(1), recording(2, node=3)]
    hottest, address = (run(name, guests, [5, 6]) for name in ("hottest-first", "address"))
    assert hottest.until(0.9) <= 0.4 * address.until(0.9)
    assert hottest.moved[-1] == address.moved[-1] == 4096
    assert hottest.local[0] == 0
    assert hottest.local[-1] == address.local[-1] == pytest.approx(1)
    assert hottest.latency[-1] < hottest.latency[0]


def test_the_same_recordings_give_the_same_outcome() -> None:
    guests = [recording(3), recording(4, node=2)]
    assert run("hot-set", guests, [1, 1], period=0.5) == run("hot-set", guests, [1, 1], period=0.5)


def test_heat_that_changes_is_followed() -> None:
    outcome = run("until-local", [recording(5)], [7], period=2.0)
    before = outcome.moved[outcome.times.index(1.5)]
    assert outcome.local[outcome.times.index(1.5)] >= 0.9
    assert outcome.moved[-1] > before
    assert outcome.local[-1] >= 0.9


def test_a_full_node_swaps_cold_for_hot() -> None:
    topology = recorded("eight")
    full = topology.nodes[1].memory // (2 << 20)
    guest = recording(6, units=full + 4096)
    guest.node[4096:] = 1
    guest.heat[:, :2048] = 5e6
    simulation = Simulation(topology, [guest], POLICIES["short-of-memory"], Limits(), Host(), [1])
    assert simulation.free[1] == 0
    outcome = simulation.run(8.0, 1.0, 100.0)
    assert outcome.left[-1] == outcome.moved[-1] > 0
    assert simulation.free[1] == 0
    assert outcome.local[-1] > outcome.local[0]


def test_vcpus_are_placed_where_their_memory_is() -> None:
    guests = [recording(7 + node, units=256, node=node) for node in range(8)]
    simulation = Simulation(recorded("eight"), guests, POLICIES["hottest-first"], Limits(), Host())
    assert simulation.to == list(range(8))
    assert simulation.run(1.0, 0.5, 10.0).moved == [0, 0, 0]


def test_a_working_set_leaves_out_what_is_absent() -> None:
    guest = recording(8, units=100)
    guest.node[:50] = ABSENT
    simulation = Simulation(recorded("two"), [guest], POLICIES["address"], Limits(), Host(), [1])
    assert simulation.run(1.0, 1.0, 10.0).moved[-1] == 50
    assert 0 < working_set(simulation._guests[0].memory, 2)[1] <= 100 << 20


def test_recordings_are_kept_and_damaged_ones_refused(tmp_path: Path) -> None:
    guest, path = recording(9, units=64), tmp_path / "heat.npz"
    save(guest, path)
    again = load(path)
    assert again.vcpus == guest.vcpus
    for one, two in ((again.heat, guest.heat), (again.writes, guest.writes), (again.node, guest.node)):
        assert np.array_equal(one, two)
    for damaged in (
        guest._replace(heat=guest.heat[:, :-1]),
        guest._replace(heat=-guest.heat),
        guest._replace(vcpus=0),
        guest._replace(node=guest.node - 5),
    ):
        save(damaged, path)
        with pytest.raises(SpecError, match="is no recording of heat"):
            load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(SpecError, match="is no recording of heat"):
        load(path)


def test_what_does_not_fit_the_host_is_refused() -> None:
    def simulate(guest: Recording, to: list[int]) -> None:
        Simulation(recorded("cxl"), [guest], POLICIES["address"], Limits(), Host(), to)

    with pytest.raises(SpecError, match="only 3 nodes"):
        simulate(recording(1, units=8, node=4), [0])
    with pytest.raises(SpecError, match="more memory on node 0"):
        simulate(recording(1, units=1 << 16), [0])
    with pytest.raises(SpecError, match="without processors"):
        simulate(recording(1, units=8), [2])
