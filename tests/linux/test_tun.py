"""TAPs and bridges of the live kernel, in a namespace of the test's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial

import pytest

from outboard.errors import KernelError
from outboard.linux import tun
from tests.support.network import Network
from tests.support.requirements import require


@pytest.fixture
def network() -> Iterator[Network]:
    require("root")
    with Network() as made:
        yield made


def test_a_tap_lives_as_long_as_its_descriptor(network: Network) -> None:
    fd = network.call(partial(tun.open_tap, "tap0"))
    try:
        assert "state DOWN" in network.ip("link", "show", "tap0")
        network.call(partial(tun.add_to_bridge, "guests", "tap0"))
        network.call(partial(tun.set_up, "tap0"))
        shown = network.ip("-details", "link", "show", "tap0")
        assert "master guests" in shown
        assert "vnet_hdr on" in shown
        assert ",UP" in shown
        with pytest.raises(KernelError, match="TUNSETIFF of tap0") as caught:
            network.call(partial(tun.open_tap, "tap0"))
        assert caught.value.errno == errno.EBUSY
    finally:
        os.close(fd)
    assert "tap0" not in network.ip("link")


def test_what_does_not_exist_is_told(network: Network) -> None:
    for call, number in (
        (partial(tun.set_up, "none"), errno.ENODEV),
        (partial(tun.add_to_bridge, "none", "guests"), errno.ENODEV),
        (partial(tun.add_to_bridge, "guests", "none"), errno.ENODEV),
        (partial(tun.add_to_bridge, "lo", "guests"), errno.EOPNOTSUPP),
    ):
        with pytest.raises(KernelError) as caught:
            network.call(call)
        assert caught.value.errno == number


def test_a_name_that_is_too_long_never_reaches_the_kernel() -> None:
    for name in ("", "a-name-of-16-chr"):
        with pytest.raises(ValueError, match="is no interface's name"):
            tun.open_tap(name)
