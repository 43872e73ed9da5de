"""What the command line of a running QEMU says of its sockets, in the forms that QEMU takes (qemu(1))."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec

from outboard.errors import KernelError, RefusedError
from outboard.linux import proc

_AGENT_PORT = "org.qemu.guest_agent.0"


def check_qemu(pid: int) -> None:
    """See that process ``pid`` runs a QEMU.

    :raise RefusedError: ``not-qemu``: there is no such process, or it is another program.
    :raise KernelError: EACCES: we may not look.
    """
    try:
        program = Path(f"/proc/{pid}/exe").readlink()
    except PermissionError as error:
        raise KernelError(f"readlink of /proc/{pid}/exe", error.errno or 0) from error
    except OSError as error:
        raise RefusedError("not-qemu", f"there is no process {pid} to attach to: {error.strerror}") from error
    if "qemu" not in program.name:
        raise RefusedError("not-qemu", f"process {pid} is {program}, not a QEMU")


def _values(arguments: list[str], *options: str) -> list[dict[str, str]]:
    """The property lists given to the options: ``first,key=value,...`` or JSON; the first word's key is empty."""
    return [
        _properties(value)
        for option, value in itertools.pairwise(arguments)
        if option.startswith("-") and option.lstrip("-") in options
    ]


def _properties(text: str) -> dict[str, str]:
    if text.startswith("{"):
        try:
            return {key: str(value) for key, value in msgspec.json.decode(text, type=dict[str, object]).items()}
        except msgspec.DecodeError:
            return {}
    properties = {}
    # Two commas are one comma of a value.
    for place, part in enumerate(re.split(r"(?<!,),(?=(?:,,)*(?!,))", text)):
        key, equals, value = part.replace(",,", ",").partition("=")
        if equals:
            properties[key] = value
        elif place == 0:
            properties[""] = key
    return properties


def _path(pid: int, path: str) -> Path:
    """A path of QEMU's as we see it: its root and its working directory may be others."""
    return Path(f"/proc/{pid}/root") / path.lstrip("/") if path.startswith("/") else Path(f"/proc/{pid}/cwd") / path


def _chardevs(arguments: list[str]) -> dict[str, str]:
    """The path of each chardev that is a unix socket, by its id."""
    found = _values(arguments, "chardev")
    return {one["id"]: one["path"] for one in found if one.get("") == "socket" and "id" in one and "path" in one}


def monitors(pid: int) -> list[Path]:
    """The unix sockets of the QMP monitors of QEMU process ``pid``.

    :raise KernelError: it has ended.
    """
    arguments = proc.command_line(pid)
    direct = [one.get("", "") for one in _values(arguments, "qmp", "qmp-pretty")]
    paths = [place.removeprefix("unix:") for place in direct if place.startswith("unix:")]
    chardevs = _chardevs(arguments)
    for monitor in _values(arguments, "mon"):
        if monitor.get("mode") == "control":
            paths.append(chardevs.get(monitor.get("chardev", monitor.get("", "")), ""))
    return [_path(pid, path) for path in paths if path]


def agent(pid: int) -> Path | None:
    """The socket of the guest agent's port, if the command line has one.

    :raise KernelError: the process has ended.
    """
    arguments = proc.command_line(pid)
    chardevs = _chardevs(arguments)
    for device in _values(arguments, "device"):
        if device.get("name") == _AGENT_PORT and (path := chardevs.get(device.get("chardev", ""))):
            return Path(path) if path.startswith("/") else _path(pid, path)
    return None
