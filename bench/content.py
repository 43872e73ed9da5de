"""script/bench content: what packing gains where memory can be packed, and costs where it cannot, over 1 Gbit/s.

A guest of 1 GiB holds 256 MiB of files in memory: this machine's sources and documents, its programs and libraries, or
random bytes; its job writes 1,000 pages/s of 16 MiB. It is moved by pre-copy without hints, by ``--compress auto`` and
``none`` in turn, and where its memory can be packed by QEMU's multifd with zstd too.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console

from demo.arms import Arm, Hosts
from demo.figures import Outcome
from demo.hosts import CLIENT_ADDRESS, ROOT, Testbed, TestbedError
from demo.outboard_arms import OutboardArm
from demo.qemu_arms import QemuArm
from demo.vms import BOOT_S, CONTENDED_CORE, EVICTED, JOB_PORT, OTHER_CORE, Job, wait_for_port
from guest.build import Image, build
from outboard.vmm.guest_agent import GuestAgent
from outboard.vmm.registry import Registry

from .claims import Claim, claim, publish

FILL_MIB = 256
FILL_S = 300.0
"""A guest without KVM takes its memory over the network slowly."""
LIMIT_S = 60.0
PART = 1 << 20
FILES = Path("/usr")
LIBRARIES = FILES / "lib"
TEXT = {".c", ".h", ".html", ".js", ".json", ".md", ".pl", ".pm", ".py", ".pyi", ".rst", ".txt"}


class Played(msgspec.Struct, kw_only=True):
    """One run."""

    content: str
    arm: str
    outcome: Outcome


def programs() -> Iterator[bytes]:
    """Programs and libraries, in the order of their names."""
    for path in sorted(LIBRARIES.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in TEXT:
            yield path.read_bytes()


def text() -> Iterator[bytes]:
    """Sources and documents, in the order of their names."""
    for path in sorted(FILES.rglob("*")):
        if path.suffix in TEXT and path.is_file() and not path.is_symlink():
            yield path.read_bytes()


def noise() -> Iterator[bytes]:
    """What nothing makes smaller."""
    while True:
        yield os.urandom(PART)


CONTENTS = {"text": text, "programs": programs, "noise": noise}


def write(file: Path, pieces: Iterator[bytes]) -> None:
    """Write FILL_MIB of pieces.

    :raise TestbedError: there are not as many.
    """
    left = FILL_MIB << 20
    with file.open("wb") as out:
        for piece in pieces:
            left -= out.write(piece[:left])
            if not left:
                return
    raise TestbedError(f"{FILES} has less than {FILL_MIB} MiB of such files")


def fill(bed: Testbed, hosts: Hosts, file: Path) -> None:
    """Put a file into the guest's memory."""
    agent = Registry(hosts.runtime(bed.a)).get(EVICTED.name).agent_socket
    assert agent is not None
    with bed.client.call(lambda: socket.create_server((CLIENT_ADDRESS, 0))) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection, file.open("rb") as data:
                connection.sendfile(data)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        with GuestAgent(agent, timeout=FILL_S) as guest:
            port = server.getsockname()[1]
            status, said = guest.run("/bin/sh", "-c", f"nc {CLIENT_ADDRESS} {port} > /tmp/fill; wc -c < /tmp/fill")
        sender.join(10)
    if status or int(said) != FILL_MIB << 20:
        raise TestbedError(f"the guest took {said!r} of {FILL_MIB} MiB")


@contextmanager
def guest_with(hosts: Hosts, image: Image, file: Path) -> Iterator[Job]:
    """A guest on host A whose memory holds a file, at work."""
    bed = hosts.bed
    spec = bed.directory / "web.toml"
    spec.write_text(EVICTED.spec(image.kernel, image.initrd, "1GiB", "4KiB"))
    hosts.outboard(bed.a, "run", str(spec))
    wait_for_port(bed.client, EVICTED.address, JOB_PORT, BOOT_S)
    with closing(hosts.monitor(bed.a, EVICTED)) as monitor:
        monitor.pin(CONTENDED_CORE)
    fill(bed, hosts, file)
    job = Job(bed, EVICTED)
    try:
        job.start(16, 1000)
        yield job
    finally:
        job.close()


def play(arm: Arm, image: Image, file: Path) -> Outcome:
    """Move the guest once.

    :raise TestbedError: the arm or the testbed failed, or the guest lost something.
    """
    with Testbed("1gbit") as bed:
        hosts = Hosts(bed)
        try:
            arm.prepare(hosts)
            with guest_with(hosts, image, file) as job:
                arm.expect(EVICTED)
                outcome = arm.migrate(EVICTED, lambda destination: destination.pin(OTHER_CORE))
                try:
                    wrong = job.check()
                except OSError as error:
                    raise TestbedError(f"{arm.name}: the guest does not answer any more: {error}") from error
                if wrong or not outcome.converged:
                    raise TestbedError(f"{arm.name}: {wrong or outcome.note}")
                return outcome
        finally:
            arm.close()


def arms() -> dict[str, list[Arm]]:
    """By what is in the guest's memory."""
    ours: list[Arm] = [
        OutboardArm(f"outboard-{codec}", LIMIT_S, "pre-copy", ("--no-hints", "--compress", codec))
        for codec in ("auto", "none")
    ]
    zstd = {"multifd-channels": 2, "multifd-compression": "zstd"}
    both = [*ours, QemuArm("qemu-multifd-zstd", LIMIT_S, ("multifd",), zstd)]
    return {"text": both, "programs": both, "noise": ours}


def _of(played: Sequence[Played], content: str, arm: str) -> list[float]:
    return [
        one.outcome.total_s
        for one in played
        if one.content == content and one.arm == arm and one.outcome.total_s is not None
    ]


def claims_of(played: Sequence[Played]) -> list[Claim]:
    """What packing must reach."""
    claims = []
    for name, content, peer, bar in (
        ("total time, memory of text", "text", "outboard-none", 0.5),
        ("total time, memory of text", "text", "qemu-multifd-zstd", 1.0),
        ("total time, memory of programs", "programs", "outboard-none", 1.0),
        ("total time, memory of programs", "programs", "qemu-multifd-zstd", 1.0),
        ("total time, memory of noise", "noise", "outboard-none", 1.03),
    ):
        ours, theirs = _of(played, content, "outboard-auto"), _of(played, content, peer)
        claims.append(
            claim(
                name,
                statistics.median(ours) if ours else None,
                bar,
                "s",
                len(ours),
                peer=statistics.median(theirs) if theirs else None,
                against=peer,
                spread=(min(ours), max(ours)) if ours else None,
            )
        )
    return claims


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--session", "session_file", type=click.Path(path_type=Path), help="Write every run here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--content", "contents", type=click.Choice(list(CONTENTS)), multiple=True, default=list(CONTENTS))
def main(file: Path | None, session_file: Path | None, runs: int, contents: tuple[str, ...]) -> None:
    """Judge packing at 1 Gbit/s."""
    image = build(ROOT / ".build/guest")
    console = Console(stderr=True)
    played: list[Played] = []
    scratch = Path(tempfile.mkdtemp(prefix="outboard-bench-"))
    try:
        for content in contents:
            write(scratch / content, CONTENTS[content]())
        for _ in range(runs):
            for content in contents:
                for arm in arms()[content]:
                    try:
                        outcome = play(arm, image, scratch / content)
                    except TestbedError as error:
                        if isinstance(arm, OutboardArm):
                            raise
                        # A peer that has failed has no figure; ours are judged all the same.
                        console.print(f"{content}: {error}")
                        continue
                    played.append(Played(content=content, arm=arm.name, outcome=outcome))
                    console.print(f"{arm.name}, {content}: {outcome.total_s:.2f} s")
    finally:
        shutil.rmtree(scratch)
    if session_file is not None:
        session_file.write_bytes(msgspec.json.format(msgspec.json.encode(played), indent=1))
    claims = claims_of(played)
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
