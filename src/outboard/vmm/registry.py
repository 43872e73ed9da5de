"""The VMs that ``outboard run`` started on this host, each in a directory of its own: ROOT/vms/NAME.

=================  ====================================================================
vm.json            the record: QEMU's process, by pid and start time, and what it runs on
spec.toml          the description that starts the same VM on another host
qmp.sock           a monitor for people and tools
engine.sock        a monitor for Outboard
guest-agent.sock   the guest agent's port, if the VM has one
console.log        what the guest wrote to its first serial port
qemu.log           what QEMU itself had to say
memory             the journal of the engine that manages the VM's memory, if one does
=================  ====================================================================

A directory that is being filled is locked with flock(2).
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError
from outboard.linux import pidfd, proc
from outboard.vmm.attach import attach
from outboard.vmm.guest import QemuGuest

_RECORD = "vm.json"
_SPEC = "spec.toml"
CONSOLE = "console.log"
LOG = "qemu.log"
QMP_SOCKET = "qmp.sock"
ENGINE_SOCKET = "engine.sock"
AGENT_SOCKET = "guest-agent.sock"
MEMORY = "memory"


class VmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that was started here.

    :ivar pid: QEMU's process, with ``start_time`` in clock ticks since boot.
    :ivar accelerator: ``kvm`` or ``tcg``; ``accelerator_reason`` says why, where it was left to this host.
    :ivar memory_bytes: the guest's RAM.
    :ivar started: seconds since 1970.
    """

    name: str
    pid: int
    start_time: int
    directory: Path
    accelerator: str
    accelerator_reason: str
    memory_bytes: int
    vcpus: int
    guest_agent: bool
    started: float

    @property
    def engine_socket(self) -> Path:
        """The monitor that Outboard uses."""
        return self.directory / ENGINE_SOCKET

    @property
    def qmp_socket(self) -> Path:
        """The monitor for everybody else."""
        return self.directory / QMP_SOCKET

    @property
    def agent_socket(self) -> Path | None:
        """The guest agent's port."""
        return self.directory / AGENT_SOCKET if self.guest_agent else None

    @property
    def console(self) -> Path:
        """What the guest wrote to its first serial port."""
        return self.directory / CONSOLE

    @property
    def memory_directory(self) -> Path:
        """Where the engine that manages its memory keeps its journal; it is there while the VM is managed."""
        return self.directory / MEMORY

    @property
    def alive(self) -> bool:
        """Whether its QEMU still runs."""
        try:
            return proc.start_time(self.pid) == self.start_time and pidfd.alive(self.pid)
        except KernelError:
            return False

    def spec_text(self) -> str:
        """The description that starts the same VM on another host, as TOML."""
        return (self.directory / _SPEC).read_text()

    def attach(self, *, managed: bool = False) -> QemuGuest:
        """Attach to it; see :func:`outboard.vmm.attach.attach`."""
        return attach(qmp=self.engine_socket, name=self.name, agent_path=self.agent_socket, managed=managed)


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return os.fspath(value)
    raise NotImplementedError(type(value))


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


class Registry:
    """The VMs under ``root``.

    Synchronization: any number of processes; the kernel serializes what matters (rename, flock).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._vms = root / "vms"

    @contextlib.contextmanager
    def reserve(self, name: str) -> Iterator[Path]:
        """Take a name for a VM that is being started: its directory, empty; gone again if the block raises.

        What an ended VM of that name left behind is removed.

        :raise RefusedError: ``name-taken``: a VM of that name runs here, or is being started.
        """
        directory = self._vms / name
        with _locked(directory):
            record = _read(directory)
            if record is not None and record.alive:
                raise RefusedError(
                    "name-taken",
                    f"a VM named {name} runs on this host already (process {record.pid}); "
                    f"end it with outboard stop {name}, or choose another name",
                )
            _empty(directory)
            try:
                yield directory
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    def add(self, record: VmRecord, spec: str) -> None:
        """Record a VM in the directory that :meth:`reserve` gave.

        :param spec: the description that starts the same VM elsewhere.
        """
        (record.directory / _SPEC).write_text(spec)
        # By rename, so that nobody reads half a record.
        fresh = record.directory / f"{_RECORD}.new"
        fresh.write_bytes(msgspec.json.encode(record, enc_hook=_encode_path))
        fresh.rename(record.directory / _RECORD)

    def describe(self, name: str, spec: str) -> None:
        """Replace the description of a VM: its disks are others now."""
        fresh = self._vms / name / f"{_SPEC}.new"
        fresh.write_text(spec)
        fresh.rename(self._vms / name / _SPEC)

    def get(self, name: str) -> VmRecord:
        """The VM of that name.

        :raise NotFoundError: there is none, or its QEMU has ended.
        """
        record = _read(self._vms / name) if "/" not in name else None
        if record is None:
            known = [record.name for record in self.list()]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known) or 'none'}"
            raise NotFoundError(f"no VM named {name} was started on this host (in {self.root}); {hint}")
        if not record.alive:
            raise NotFoundError(
                f"the VM {name} has ended: its QEMU (process {record.pid}) is gone; {record.directory / LOG} may say "
                f"why, outboard run starts it again and outboard stop {name} forgets it"
            )
        return record

    def list(self) -> list[VmRecord]:
        """All VMs by name, also those whose QEMU has ended (``alive`` tells)."""
        try:
            directories = sorted(self._vms.iterdir())
        except FileNotFoundError:
            return []
        return [record for record in map(_read, directories) if record is not None]

    def unrecorded(self) -> set[str]:
        """The names under which VMs are being started, or were by somebody who died before they could be recorded."""
        try:
            return {path.name for path in self._vms.iterdir() if path.is_dir() and _read(path) is None}
        except FileNotFoundError:
            return set()

    def remove(self, name: str) -> None:
        """Forget a VM, and remove its directory. Idempotent; its QEMU is left alone."""
        shutil.rmtree(self._vms / name, ignore_errors=True)


def _read(directory: Path) -> VmRecord | None:
    try:
        text = (directory / _RECORD).read_bytes()
        return msgspec.json.decode(text, type=VmRecord, dec_hook=_decode_path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError as error:
        raise OutboardError(f"{directory / _RECORD} is no record of a VM ({error}); remove {directory}") from error


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make a directory if need be, and hold its lock.

    :raise RefusedError: ``name-taken``: somebody else holds it.
    """
    while True:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the directory that we have open.
            if directory.exists() and os.path.samestat(os.fstat(fd), directory.stat()):
                yield
                return
        except BlockingIOError as error:
            raise RefusedError("name-taken", f"a VM named {directory.name} is being started on this host") from error
        finally:
            os.close(fd)
