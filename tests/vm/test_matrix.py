"""Every moment of a migration with what may go wrong then; what other tests of this folder show is left to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest.build import Image
from tests.support.cluster import Cluster
from tests.support.link import Link
from tests.support.matrix import CELLS, IN_TESTS, UNTOLD, Fault, Moment
from tests.support.scene import Scene

pytestmark = pytest.mark.slow

PLAYED = [(moment, fault) for moment, faults in IN_TESTS.items() for fault in faults]


@pytest.fixture(autouse=True)
def no_process_is_left_behind() -> None:
    """An agent that is killed and started again is the cluster's, and outlives the test; the scene looks after it."""


@pytest.fixture(scope="module")
def scene(image: Image) -> Iterator[Scene]:
    with Link() as link, Cluster(link=link) as cluster:
        yield Scene(cluster, link, image)


@pytest.mark.parametrize(("moment", "fault"), PLAYED, ids=lambda one: one.name.lower())
def test_what_becomes_of_the_vm(scene: Scene, moment: Moment, fault: Fault) -> None:
    try:
        outcome, _ = scene.play(moment, fault)
    except BaseException:
        scene.start_over()
        raise
    if outcome == UNTOLD:
        assert scene.kept() == "completed"
    scene.go_on(outcome.place)
    assert outcome == CELLS[moment, fault], scene.cluster.a.log()[-3000:] + scene.cluster.b.log()[-3000:]
