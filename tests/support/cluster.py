"""Two hosts of a cluster on one machine: two agents, each with directories and a loopback address of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guest.build import COMMAND_LINE, Image
from guest.disk import DiskImage
from outboard.errors import KernelError, UnreachableError
from outboard.linux import pidfd, proc
from outboard.vmm.guest_agent import GuestAgent
from outboard.vmm.registry import Registry, VmRecord
from outboard.wire.pki import create_authority, issue_host
from tests.support.link import ADDRESSES, Link

WAIT_S = 60.0


def wait_for(condition: Callable[[], object], what: str, timeout: float = WAIT_S, every: float = 0.02) -> None:
    """Wait until ``condition`` holds; looked at ``every`` so many seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout:.0f} s"
        time.sleep(every)


class Host:
    """One host: its agent's process, and the commands that people give there."""

    def __init__(
        self,
        root: Path,
        name: str,
        address: str,
        peers: dict[str, str],
        identity: Path,
        inside: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._inside = inside
        self.address = address
        self.directory = root / name
        self.runtime = self.directory / "run"
        self.environment = {
            **os.environ,
            "OUTBOARD_CONFIG_DIR": str(self.directory / "etc"),
            "OUTBOARD_RUNTIME_DIR": str(self.runtime),
            "OUTBOARD_STATE_DIR": str(self.directory / "state"),
        }
        shutil.copytree(identity, self.directory / "etc" / "pki")
        hosts = "".join(f'{peer} = "{where}"\n' for peer, where in peers.items())
        (self.directory / "etc" / "agent.toml").write_text(
            f'name = "{name}"\nlisten = "{address}"\nport = 7849\n\n[hosts]\n{hosts}\n'
            '[sharing]\ntwins = ["twin-1", "twin-2"]\n'
        )
        self.registry = Registry(self.runtime)
        self._agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        """Start the agent and wait until it answers."""
        with (self.directory / "agent.log").open("ab") as log:
            self._agent = subprocess.Popen(
                [*self._inside, sys.executable, "-m", "outboard", "agent"],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        wait_for((self.runtime / "agent.sock").exists, f"the agent of {self.name}")

    def stop_agent(self) -> None:
        """End the agent. Idempotent."""
        if self._agent is not None:
            self._agent.terminate()
            self._agent.wait(30)
            self._agent = None

    @property
    def agent_pid(self) -> int:
        """The agent's process."""
        assert self._agent is not None
        return self._agent.pid

    def kill_agent(self) -> None:
        """End the agent by SIGKILL."""
        assert self._agent is not None
        self._agent.kill()
        self._agent.wait(30)
        self._agent = None
        (self.runtime / "agent.sock").unlink()

    def engine(self) -> int:
        """The one engine at work here, a child of the server that the agent has them forked from.

        Waits for it: a successor takes a moment.
        """
        found: list[int] = []

        def one() -> bool:
            found[:] = self._engines()
            return len(found) == 1

        wait_for(one, f"a single engine of {self.name}")
        return found[0]

    def _engines(self) -> list[int]:
        assert self._agent is not None
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, KernelError):
                pid = int(entry.name)
                engine = (entry / "comm").read_text().strip() == "outboard-engine"
                # One that was killed has its name until it is waited for.
                if engine and pidfd.alive(pid) and proc.parent(proc.parent(pid)) == self._agent.pid:
                    found.append(pid)
        return found

    def command(self, *arguments: str) -> list[str]:
        """The command line of an outboard command."""
        return [sys.executable, "-m", "outboard", *arguments]

    def outboard(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command here, to its end."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a command here."""
        return subprocess.Popen(
            self.command(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def has(self, vm: str) -> bool:
        """Whether a VM of that name runs here."""
        return any(record.name == vm and record.alive for record in self.registry.list())

    def log(self) -> str:
        """What the agent and its engines have written."""
        return (self.directory / "agent.log").read_text()


class Cluster:
    """Hosts ``a`` and ``b``, at loopback addresses from ``first`` on; a context manager.

    :param link: the hosts are in its namespaces instead.
    """

    def __init__(self, first: int = 11, link: Link | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="outboard-cluster-"))
        create_authority(self.root / "ca")
        addresses = {"a": f"127.0.0.{first}", "b": f"127.0.0.{first + 1}"} if link is None else ADDRESSES
        self.hosts = {}
        for name, address in addresses.items():
            issue_host(self.root / "ca", self.root / "pki" / name, name, [address])
            peers = {peer: where for peer, where in addresses.items() if peer != name} | {"silent": "127.0.0.13"}
            inside = [] if link is None else link.inside(name)
            self.hosts[name] = Host(self.root, name, address, peers, self.root / "pki" / name, inside)
        self.a, self.b = self.hosts["a"], self.hosts["b"]

    def __enter__(self) -> Cluster:
        self.a.start_agent()
        self.b.start_agent()
        return self

    def __exit__(self, *_exc: object) -> None:
        for host in self.hosts.values():
            for record in host.registry.list():
                host.outboard("stop", record.name)
            host.stop_agent()
        shutil.rmtree(self.root)


class Vm:
    """A test guest in a cluster, writing to its memory and able to prove it.

    :param more: lines of its description; :param tables: more tables. :param append: for its kernel.
    """

    def __init__(
        self,
        cluster: Cluster,
        image: Image | DiskImage,
        name: str,
        mebibytes: int = 256,
        guest_agent: bool = True,
        page_size: str = "4KiB",
        more: str = "",
        tables: str = "",
        append: str = COMMAND_LINE,
        boot_s: float = WAIT_S,
    ) -> None:
        self.cluster = cluster
        self.name = name
        spec = cluster.root / f"{name}.toml"
        spec.write_text(
            f'name = "{name}"\nmemory = "{mebibytes}MiB"\nvcpus = 1\naccel = "tcg"\n'
            f'guest_agent = {str(guest_agent).lower()}\npage_size = "{page_size}"\n{more}\n\n'
            f"[boot]\n"
            f'kernel = "{image.kernel}"\ninitrd = "{image.initrd}"\nappend = "{append}"\n{tables}'
        )
        done = cluster.a.outboard("run", str(spec))
        assert done.returncode == 0, done.stderr
        wait_for(lambda: b"outboard-guest ready" in self.record("a").console.read_bytes(), "the guest's boot", boot_s)

    def record(self, host: str) -> VmRecord:
        """Its record on a host."""
        return self.cluster.hosts[host].registry.get(self.name)

    def tell(self, host: str, line: str) -> str:
        """Give the guest's dirty job an order, through the guest agent."""
        path = self.record(host).agent_socket
        assert path is not None
        try:
            status, said = self._run(path, line)
        except UnreachableError:
            # Once in some hundred boots an order to a guest agent that has just started is lost.
            status, said = self._run(path, line)
        assert status == 0
        return said.decode().strip()

    def run(self, host: str, script: str) -> str:
        """Run a shell's script in the guest; what it wrote."""
        path = self.record(host).agent_socket
        assert path is not None
        with GuestAgent(path, timeout=200) as agent:
            status, said = agent.run("/bin/sh", "-c", script)
        assert status == 0, said
        return said.decode().strip()

    @staticmethod
    def _run(path: Path, line: str) -> tuple[int, bytes]:
        with GuestAgent(path, timeout=60) as agent:
            return agent.run("/bin/sh", "-c", f"echo '{line}' | nc -w 50 127.0.0.1 7000")

    def write(self, mebibytes: int = 64, rate: int = 5000) -> None:
        """Have the guest write ``rate`` pages/s of a working set, from its boot host on."""
        assert self.tell("a", f"start {mebibytes} {rate}").startswith("ok")

    def verify(self, host: str) -> None:
        """Have the guest check every page of its working set."""
        said = self.tell(host, "verify")
        assert said.startswith("ok"), said


def summary_of(output: str) -> dict[str, Any]:
    """The summary at the end of ndjson output."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    assert found["schema"] == "outboard.migration.summary.v1", output
    return found
