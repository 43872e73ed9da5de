"""Two network namespaces joined by a link of which either direction can be made to lose everything, silently.

The neighbour entries are ours: what a host sends to an address that nobody has is dropped at the other end, and no
error comes back. Source: ip-neighbour(8), veth(4).
"""

from __future__ import annotations

import secrets
import subprocess
from types import TracebackType

ADDRESSES = {"a": "10.79.0.1", "b": "10.79.0.2"}
_MACS = {"a": "02:00:00:00:79:01", "b": "02:00:00:00:79:02"}
_DEVICE = "between"
_NOBODY = "02:00:00:00:79:99"
_OTHER = {"a": "b", "b": "a"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Link:
    """Namespaces for the hosts ``a`` and ``b``; a context manager that removes them."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self._names = {host: f"outboard-link-{tag}-{host}" for host in ADDRESSES}

    def inside(self, host: str) -> list[str]:
        """What a command is preceded by to run in a host's namespace."""
        # Not `ip netns exec`, which hides what is mounted below /sys, the cgroups too.
        return ["nsenter", f"--net=/run/netns/{self._names[host]}"]

    def lose(self, *senders: str) -> None:
        """From now on, what these hosts send does not arrive; what the others send does."""
        for host in ADDRESSES:
            self._point(host, _NOBODY if host in senders else _MACS[_OTHER[host]])

    def _point(self, host: str, mac: str) -> None:
        peer = ADDRESSES[_OTHER[host]]
        _ip("-n", self._names[host], "neigh", "replace", peer, "lladdr", mac, "dev", _DEVICE, "nud", "permanent")

    def __enter__(self) -> Link:
        a, b = self._names["a"], self._names["b"]
        try:
            for name in (a, b):
                _ip("netns", "add", name)
            end = ["name", _DEVICE, "address", _MACS["b"], "netns", b]
            _ip("link", "add", "name", _DEVICE, "address", _MACS["a"], "netns", a, "type", "veth", "peer", *end)
            for host, name in self._names.items():
                _ip("-n", name, "address", "add", f"{ADDRESSES[host]}/30", "dev", _DEVICE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", _DEVICE, "up")
            self.lose()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
