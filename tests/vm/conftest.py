"""One cluster and one image for all tests of this folder; a fresh VM for each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from guest.build import Image
from tests.support.cluster import Cluster, Vm
from tests.support.machine import image as build_image
from tests.support.requirements import require


@pytest.fixture(scope="session")
def image() -> Image:
    """The test guest."""
    require("qemu", "root")
    return build_image()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two hosts with agents."""
    require("qemu", "root")
    with Cluster() as running:
        yield running


@pytest.fixture
def vm(cluster: Cluster, image: Image) -> Iterator[Vm]:
    """A VM on host a, its guest writing 5,000 pages/s of 64 MiB."""
    made = Vm(cluster, image, f"vm-{secrets.token_hex(3)}")
    made.write()
    yield made
    for host in cluster.hosts.values():
        if host.has(made.name):
            host.outboard("stop", made.name)
