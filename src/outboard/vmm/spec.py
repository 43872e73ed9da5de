"""The file that describes a VM, for ``outboard run``: TOML, strict.

::

    name = "web"                     # letters, digits, ".", "_", "-"; unique on a host
    memory = "1GiB"                  # KiB, MiB, GiB, TiB; whole MiB
    vcpus = 2                        # 1
    cpu = "max"                      # QEMU's -cpu
    machine = "q35"                  # QEMU's -machine
    accel = "auto"                   # "kvm", "tcg"; auto takes KVM where it really runs a guest
    page_size = "4KiB"               # "2MiB": the memory is made of huge pages (hugetlb), here and wherever it moves
    qemu = "qemu-system-x86_64"      # the program, by name or by absolute path
    guest_agent = true               # a virtio port for the QEMU guest agent
    memory_reservation = "256MiB"    # of its memory what is never swapped out; nothing when left out
    pool = "prod/web"                # whose swap reservation it counts against; the host's own when left out
    extra_args = []                  # given to QEMU as they are, at the end

    [boot]                           # without it the firmware boots from the first disk
    kernel = "/srv/web/vmlinuz"
    initrd = "/srv/web/initrd.gz"    # may be left out, like append
    append = "console=ttyS0"

    [[disks]]                        # virtio-blk; must be reachable from every host that the VM moves to
    path = "/srv/web/root.qcow2"
    format = "qcow2"                 # "raw" (the default)
    read_only = false

    [[networks]]                     # virtio-net on a TAP that lives as long as the VM does
    tap = "tap-web"                  # at most 15 characters
    bridge = "br0"                   # the TAP becomes a port of it; may be left out
    mac = "52:54:00:12:34:56"        # derived from the VM's name when left out

``name`` and ``memory`` are required, the others have the defaults shown first. Paths are absolute, since the same
description starts the VM on every host that it moves to. A key that is not listed here is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w

from outboard.errors import NotFoundError, SpecError

CPU = "max"
"""QEMU's ``-cpu`` where nothing is said of it."""
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1 << 40}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})*")
_MAC = re.compile(r"[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$(?P<path>[^`]*)`)?")
T = TypeVar("T")


def parse_size(text: str) -> int:
    """``1GiB`` as bytes.

    :raise ValueError: it is no size.
    """
    match = re.fullmatch(r"([1-9]\d{0,9})\s*(KiB|MiB|GiB|TiB)", text)
    if match is None:
        raise ValueError(f"{text!r} is no size; sizes are written as 512MiB or 1GiB")
    return int(match[1]) * _UNITS[match[2]]


def _require(pattern: re.Pattern[str], key: str, value: str, rule: str) -> None:
    if pattern.fullmatch(value) is None:
        raise ValueError(f"{key} = {value!r}: {rule}")


def _require_absolute(key: str, value: str) -> None:
    if not value.startswith("/") or "\0" in value:
        raise ValueError(f"{key} = {value!r}: paths are absolute, since the VM may start on another host")


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kernel that QEMU itself loads."""

    kernel: str
    initrd: str | None = None
    append: str = ""

    def __post_init__(self) -> None:
        _require_absolute("kernel", self.kernel)
        if self.initrd is not None:
            _require_absolute("initrd", self.initrd)


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A virtio-blk disk."""

    path: str
    format: Literal["raw", "qcow2"] = "raw"
    read_only: bool = False

    def __post_init__(self) -> None:
        _require_absolute("path", self.path)


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A virtio-net device on a TAP."""

    tap: str
    bridge: str | None = None
    mac: str | None = None

    def __post_init__(self) -> None:
        rule = "an interface's name has 1 to 15 of letters, digits, '.', '_', '-'"
        _require(_INTERFACE, "tap", self.tap, rule)
        if self.bridge is not None:
            _require(_INTERFACE, "bridge", self.bridge, rule)
        if self.mac is not None:
            _require(_MAC, "mac", self.mac, "a unicast MAC address is written as 52:54:00:12:34:56")


class VmSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The description of a VM; see the module for the keys."""

    name: str
    memory: str
    vcpus: int = 1
    cpu: str = CPU
    machine: str = "q35"
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    page_size: Literal["4KiB", "2MiB"] = "4KiB"
    qemu: str = "qemu-system-x86_64"
    guest_agent: bool = True
    memory_reservation: str | None = None
    pool: str | None = None
    extra_args: list[str] = []
    boot: Boot | None = None
    disks: list[Disk] = []
    networks: list[Network] = []

    def __post_init__(self) -> None:
        _require(_NAME, "name", self.name, "a VM's name has 1 to 64 of letters, digits, '.', '_', '-'")
        whole = max(MIB, parse_size(self.page_size))
        try:
            odd = parse_size(self.memory) % whole
        except ValueError as error:
            raise ValueError(f"memory = {error}") from error
        if odd:
            raise ValueError(f"memory = {self.memory!r}: must be a multiple of {whole // MIB} MiB")
        try:
            kept = 0 if self.memory_reservation is None else parse_size(self.memory_reservation)
        except ValueError as error:
            raise ValueError(f"memory_reservation = {error}") from error
        if kept > self.memory_bytes:
            raise ValueError(f"memory_reservation = {self.memory_reservation!r}: is more than its memory")
        if self.pool is not None:
            _require(_POOL, "pool", self.pool, "a pool is named as in agent.toml: prod or prod/web")
        if not 1 <= self.vcpus <= 1024:
            raise ValueError(f"vcpus = {self.vcpus}: must be 1 to 1024")
        if "/" in self.qemu:
            _require_absolute("qemu", self.qemu)
        taps = [network.tap for network in self.networks]
        if len(set(taps)) < len(taps):
            raise ValueError("two networks have the same tap")

    @property
    def memory_bytes(self) -> int:
        """The size of the guest's RAM."""
        return parse_size(self.memory)

    @property
    def reclaimable_bytes(self) -> int:
        """What could be swapped out of it."""
        return self.memory_bytes - (0 if self.memory_reservation is None else parse_size(self.memory_reservation))

    @property
    def page_bytes(self) -> int:
        """The size of the host's pages that the RAM is made of."""
        return parse_size(self.page_size)

    def settled(self, accel: Literal["kvm", "tcg"]) -> VmSpec:
        """The same VM with nothing left to the host that starts it: its accelerator and its MAC addresses."""
        networks = [
            msgspec.structs.replace(network, mac=network.mac or _derived_mac(self.name, index))
            for index, network in enumerate(self.networks)
        ]
        return msgspec.structs.replace(self, accel=accel, networks=networks)

    def to_toml(self) -> str:
        """The description as a file; what has its default is left out."""
        return tomli_w.dumps(msgspec.to_builtins(self))


def _derived_mac(name: str, index: int) -> str:
    digest = hashlib.sha256(f"{name}/{index}".encode()).hexdigest()
    return f"52:54:00:{digest[:2]}:{digest[2:4]}:{digest[4:6]}"


def _fields_at(schema: Any, path: str) -> list[str]:
    """The keys that the schema has at a path as msgspec writes it: ``.networks[...]``."""
    for part in re.findall(r"\.(\w+)", path):
        kinds = [typing.get_type_hints(schema)[part]]
        # Optional and list are seen through to the table inside.
        while kinds and not (isinstance(kinds[0], type) and issubclass(kinds[0], msgspec.Struct)):
            kinds = [*typing.get_args(kinds.pop(0)), *kinds]
        if not kinds:
            return []
        schema = kinds[0]
    return list(schema.__struct_fields__)


def _explain(error: msgspec.ValidationError, schema: Any) -> str:
    match = _UNKNOWN.fullmatch(str(error))
    if match is None:
        return str(error)
    table = (match["path"] or "").lstrip(".")
    known = _fields_at(schema, match["path"] or "")
    near = difflib.get_close_matches(match["key"], known, n=1, cutoff=0.5)
    place = f" in {table}" if table else ""
    meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"no key is called {match['key']!r}{place}; {meant}"


def parse_toml(text: str, schema: type[T], where: str) -> T:
    """Read TOML that must fit ``schema``, a msgspec Struct that forbids unknown fields.

    :param where: what the text is, for the message: a file's path.
    :raise SpecError: it does not fit; the message names the key, and a near one that exists.
    """
    try:
        return msgspec.toml.decode(text, type=schema)
    except msgspec.ValidationError as error:
        raise SpecError(f"{where}: {_explain(error, schema)}") from error
    except msgspec.DecodeError as error:
        raise SpecError(f"{where} is no TOML: {error}") from error


def read_toml(path: Path, schema: type[T]) -> T:
    """Read a file for :func:`parse_toml`.

    :raise NotFoundError: there is no such file.
    :raise SpecError: it cannot be read, or does not fit.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    return parse_toml(text, schema, str(path))


def parse_spec(text: str, where: str) -> VmSpec:
    """Read the description of a VM; see :func:`parse_toml`.

    :raise SpecError: it does not fit.
    """
    return parse_toml(text, VmSpec, where)


def read_spec(path: Path) -> VmSpec:
    """Read the description of a VM from a file.

    :raise NotFoundError: there is no such file.
    :raise SpecError: it does not fit.
    """
    return read_toml(path, VmSpec)
