"""Two hosts and a client on one machine, as network namespaces.

::

            10.78.0.1     link0     10.78.0.2
      host A ──────────────────────────── host B      the migration's own link, shaped at both ends
        │ bridge "guests"                   │ bridge "guests"
        │                                   │
        └──────────── client ───────────────┘         bridge "guests", 10.77.0.1: where the VMs' users are

The VMs' TAPs hang on the bridge of their host, so that a VM keeps its address when it moves. The client's namespace
joins the two bridges with one of its own.

Nothing is left behind: namespaces, veth pairs and the run directory go when the testbed is closed, and so does every
process that still lives in one of its namespaces. Their names carry the process that made them,
``outboard-demo-PID-START-RANDOM``; when that process is no more (another one with its number has another start time),
the next testbed removes what it left.

Source: ip-netns(8), tc-tbf(8), network_namespaces(7).
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from pyroute2 import netns

from . import scheduling

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
"""The project's root."""
PREFIX = "outboard-demo-"
NETNS = Path("/run/netns")
CLIENT_ADDRESS = "10.77.0.1"
LINK_ADDRESSES = {"a": "10.78.0.1", "b": "10.78.0.2"}
SHAPES = {
    "1gbit": "rate 1gbit burst 256kb latency 20ms",
    "10gbit": "rate 10gbit burst 2mb latency 10ms",
    "unlimited": None,
}
"""What tc-tbf(8) is told at each end of the link, by the name that the command line knows."""
LINK_BYTES_PER_S = {"1gbit": 125e6, "10gbit": 1250e6}
"""What a shaped link carries; an unshaped one has no such figure."""


class TestbedError(Exception):
    """The machine would not become two hosts and a client; the message holds the command and its answer."""

    __test__ = False


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat, or None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def run(*command: str, given: str | None = None) -> str:
    """Run a command and return what it printed.

    :raise TestbedError: it failed.
    """
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TestbedError(
            f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


@dataclass(frozen=True)
class Namespace:
    """One network namespace, by its name under /run/netns.

    :ivar role: what it is in the testbed: ``a``, ``b`` or ``client``.
    """

    name: str
    role: str

    def popen(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program inside, from the project's root, in a session of its own.

        Ctrl-C then reaches the demo alone, which ends its children itself.
        """
        return subprocess.Popen(
            # Not `ip netns exec`, which hides what is mounted below /sys, the cgroups too.
            ["nsenter", f"--net={NETNS / self.name}", *command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | (environment or {}),
            cwd=ROOT,
            start_new_session=True,
        )

    def call(self, function: Callable[[], T]) -> T:
        """What *function* returns when it runs inside, on a thread made for it.

        A socket or a file of /proc/net made there stays in this namespace whoever uses it later, and a process started
        there lives there.

        :raise Exception: what *function* raised.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                netns.setns(self.name)
                results.append(function())
            except BaseException as error:  # noqa: BLE001 (raised again below, on the caller's thread)
                errors.append(error)

        thread = threading.Thread(target=inside, name=f"in {self.name}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def pids(self) -> list[int]:
        """The processes whose main thread is in this namespace."""
        inode = (NETNS / self.name).stat().st_ino
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "ns/net").stat().st_ino == inode:
                        found.append(int(entry.name))
                except OSError:  # it ended meanwhile, or is a zombie
                    continue
        return found


class LinkCounter:
    """The bytes that one end of the link has sent and received, as its interface counts them.

    A packet larger than the wire's is counted once with one header, for every arm alike.
    """

    def __init__(self, host: Namespace) -> None:
        self._fd = host.call(lambda: os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC))

    def sent(self) -> int:
        """Bytes sent since the link was made."""
        for line in os.pread(self._fd, 4096, 0).decode().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == "link0":
                return int(counts.split()[8])
        raise TestbedError("the migration's link is gone from its host")

    def close(self) -> None:
        """Close the counter's file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Testbed:
    """The namespaces and the run directory; a context manager.

    :param shape: a key of :data:`SHAPES`.
    :ivar directory: scratch space that goes with the testbed.
    """

    __test__ = False  # not pytest's

    def __init__(self, shape: str = "1gbit") -> None:
        self.shape = shape
        self.name = f"{PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(2)}"
        self.a, self.b, self.client = (Namespace(f"{self.name}-{role}", role) for role in ("a", "b", "client"))
        self.directory = Path(tempfile.gettempdir()) / self.name
        self._group = scheduling.SchedulingGroup(self.name)

    def __enter__(self) -> Testbed:
        sweep()
        try:
            self.directory.mkdir(mode=0o700)
            self._build()
            self._group.enter()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        a, b, client = self.a.name, self.b.name, self.client.name
        made = [f"netns add {name}" for name in (a, b, client)]
        made.append(f"link add link0 netns {a} type veth peer name link0 netns {b}")
        made += [
            f"link add uplink netns {host} type veth peer name {role} netns {client}"
            for host, role in ((a, "a"), (b, "b"))
        ]
        run("ip", "-batch", "-", given="\n".join(made) + "\n")
        for host in (self.a, self.b):
            self._configure(
                host, ["uplink"], f"addr add {LINK_ADDRESSES[host.role]}/24 dev link0", "link set dev link0 up"
            )
        self._configure(self.client, ["a", "b"], f"addr add {CLIENT_ADDRESS}/24 dev guests")
        tbf = SHAPES[self.shape]
        if tbf is not None:
            for host in (self.a, self.b):
                run("tc", "-n", host.name, *f"qdisc replace dev link0 root tbf {tbf}".split())

    @staticmethod
    def _configure(namespace: Namespace, ports: Sequence[str], *rest: str) -> None:
        lines = ["link set dev lo up", "link add guests type bridge stp_state 0 forward_delay 0"]
        for port in ports:
            lines += [f"link set dev {port} master guests addrgenmode none", f"link set dev {port} up"]
        lines += ["link set dev guests addrgenmode none up", *rest]
        run("ip", "-n", namespace.name, "-batch", "-", given="\n".join(lines) + "\n")

    def close(self) -> None:
        """End what still runs inside and remove everything; idempotent."""
        _remove(self.name)
        self._group.close()


def _end(pids: Sequence[int]) -> None:
    """SIGKILL processes and wait until they are gone, however long the kernel takes to free their memory."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], 30)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)


def _remove(name: str) -> None:
    """Remove one testbed by the name that its namespaces and its directory begin with."""
    namespaces = [Namespace(path.name, path.name.rpartition("-")[2]) for path in sorted(NETNS.glob(f"{name}-*"))]
    for namespace in namespaces:
        _end(namespace.pids())
    for namespace in namespaces:
        run("ip", "netns", "delete", namespace.name)
    shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)


def sweep() -> list[str]:
    """Remove testbeds whose maker is dead; returns their names."""
    found = {path.name.rpartition("-")[0] for path in NETNS.glob(f"{PREFIX}*")}
    found |= {path.name for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")}
    swept = []
    for name in sorted(found):
        pid, _, rest = name.removeprefix(PREFIX).partition("-")
        if pid.isdigit() and _start_time(int(pid)) != rest.partition("-")[0]:
            _remove(name)
            scheduling.remove(name)
            swept.append(name)
    return swept
