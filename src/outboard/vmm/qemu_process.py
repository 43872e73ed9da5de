"""What the kernel tells of a QEMU process: that it is one, and on which sockets its command line has it listen. And
its end.

Options are ``key=value`` lists or JSON; a path is the one that QEMU sees, which may have another root than we do.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec

from outboard.errors import KernelError, RefusedError
from outboard.linux import pidfd, proc

AGENT_PORT = "org.qemu.guest_agent.0"
_END_S = 5.0


def check(pid: int) -> None:
    """See that process ``pid`` is a QEMU.

    :raise RefusedError: ``not-qemu``: there is no such process, or it runs another program; ``no-privilege``.
    """
    try:
        program = Path(f"/proc/{pid}/exe").readlink()
    except PermissionError as error:
        raise RefusedError(
            "no-privilege", f"cannot look at process {pid}: {error.strerror}; it takes CAP_SYS_PTRACE: run as root"
        ) from error
    except OSError as error:
        raise RefusedError("not-qemu", f"there is no process {pid} to attach to") from error
    if "qemu" not in program.name:
        raise RefusedError("not-qemu", f"process {pid} runs {program}, which is no QEMU")


def end(process: int) -> bool:
    """End a QEMU by its pidfd, like pulling the plug: SIGTERM, and SIGKILL when that has not done it in five seconds.

    Not by ``quit``: now and then QEMU 7.2 takes that from its monitor only seconds later, while a signal interrupts
    whatever its main loop waits for.

    :return: whether it has ended.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        pidfd.send_signal(process, number)
        if pidfd.wait(process, _END_S):
            return True
    return False


def monitors(pid: int) -> list[Path]:
    """The QMP monitors on unix sockets of QEMU process ``pid``.

    :raise KernelError: it has ended, or EACCES.
    """
    arguments = proc.command_line(pid)
    # A chardev may be named without its key, and a monitor that prints prettily is not for programs.
    control = {
        options.get("chardev", options[""])
        for options in _options(arguments, "mon")
        if options.get("mode") == "control" and options.get("pretty") != "on"
    }
    named = [options.get("path") for options in _options(arguments, "chardev") if options.get("id") in control]
    short = [options[""] for options in _options(arguments, "qmp")]
    found = [text.removeprefix("unix:") for text in short if text.startswith("unix:")] + [
        path for path in named if path
    ]
    return [_as_seen_by(pid, path) for path in found]


def agent(pid: int) -> Path | None:
    """The unix socket behind the port of the guest agent of QEMU process ``pid``, if it has one.

    :raise KernelError: it has ended, or EACCES.
    """
    arguments = proc.command_line(pid)
    ports = (options for options in _options(arguments, "device") if options.get("name") == AGENT_PORT)
    wanted = {options.get("chardev") for options in ports}
    for options in _options(arguments, "chardev"):
        if options.get("id") in wanted and (path := options.get("path")):
            return _as_seen_by(pid, path)
    return None


def _options(arguments: list[str], name: str) -> Iterator[dict[str, str]]:
    """The properties of each option ``name``; its first word, which has no key, is under the empty one."""
    for option, value in itertools.pairwise(arguments):
        if option in (f"-{name}", f"--{name}"):
            yield _properties(value)


def _properties(option: str) -> dict[str, str]:
    if option.startswith("{"):
        try:
            decoded = msgspec.json.decode(option, type=dict[str, object])
        except msgspec.DecodeError:
            return {"": ""}
        return {"": ""} | {key: value for key, value in decoded.items() if isinstance(value, str)}
    first, *_ = parts = option.replace(",,", "\0").split(",")
    pairs = (part.partition("=") for part in parts)
    return {"": first.replace("\0", ",")} | {key: value.replace("\0", ",") for key, _, value in pairs}


def _as_seen_by(pid: int, path: str) -> Path:
    theirs = Path(f"/proc/{pid}")
    if not path.startswith("/"):
        return theirs / "cwd" / path
    try:
        if (theirs / "root").samefile("/") and (theirs / "ns/mnt").samefile("/proc/self/ns/mnt"):
            return Path(path)
    except OSError as error:
        raise KernelError(f"look at the root directory of process {pid}", error.errno or 0) from error
    return theirs / "root" / path.lstrip("/")
