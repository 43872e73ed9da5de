"""script/bench streams: how fast pages go over TLS, on one stream and on four, beside QEMU's multifd with TLS.

A guest of 2 GiB with 1 GiB of noise in its memory, its job writing 500 pages/s, over an unshaped link: all on this
machine's processors, both ends. The rate is what the pages hold, by the time in which they are copied: of ours the
first round, of QEMU the whole of its migration but its setup. What the cipher allows is measured too: each byte is
encrypted once and decrypted once, on all processors.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console

from demo.arms import Arm, Hosts
from demo.figures import Outcome
from demo.hosts import ROOT, Testbed, TestbedError
from demo.outboard_arms import OutboardArm
from demo.qemu_arms import multifd_arm
from demo.vms import BOOT_S, CONTENDED_CORE, EVICTED, JOB_PORT, OTHER_CORE, Job, wait_for_port
from guest.build import Image, build

from .claims import Claim, claim, publish

LIMIT_S = 60.0
NOISE_MIB = 1024
RECORD = 16384
PAGE = 4096


class Played(msgspec.Struct, kw_only=True):
    """One run; the rate in bytes/s of pages."""

    arm: str
    rate: float
    total_s: float
    outcome: Outcome


def play(arm: Arm, image: Image) -> Outcome:
    """Move the guest once.

    :raise TestbedError: the arm or the testbed failed, or the guest lost something.
    """
    with Testbed("unlimited") as bed:
        hosts = Hosts(bed)
        try:
            arm.prepare(hosts)
            spec = bed.directory / "web.toml"
            spec.write_text(EVICTED.spec(image.kernel, image.initrd, "2GiB", "4KiB"))
            hosts.outboard(bed.a, "run", str(spec))
            wait_for_port(bed.client, EVICTED.address, JOB_PORT, BOOT_S)
            with closing(hosts.monitor(bed.a, EVICTED)) as monitor:
                monitor.pin(CONTENDED_CORE)
            with closing(Job(bed, EVICTED)) as job:
                job.start(NOISE_MIB, 500)
                arm.expect(EVICTED)
                outcome = arm.migrate(EVICTED, lambda destination: destination.pin(OTHER_CORE))
                wrong = job.check()
                if wrong or not outcome.converged:
                    raise TestbedError(f"{arm.name}: {wrong or outcome.note}")
                return outcome
        finally:
            arm.close()


def rate_of(outcome: Outcome) -> float:
    """What the pages held, by the time in which they were copied.

    :raise TestbedError: the product did not say.
    """
    told = outcome.summary
    if told is None:
        raise TestbedError("there is no summary")
    if "rounds" in told:
        first = told["rounds"][0]
        share = told["data_pages"] / (told["data_pages"] + told["zero_pages"])
        return float(first["sent_pages"] * share * PAGE / first["seconds"])
    return float(told["ram"]["normal-bytes"] / (told["total-time"] - told["setup-time"]) * 1e3)


def cipher_limit() -> float:
    """Bytes/s that all processors together could encrypt and decrypt, did they nothing else."""
    cipher, record = AESGCM(os.urandom(32)), os.urandom(RECORD)
    began, count = time.process_time(), 0
    while time.process_time() - began < 0.5:
        nonce = count.to_bytes(12, "little")
        cipher.decrypt(nonce, cipher.encrypt(nonce, record, None), None)
        count += 1
    return count * RECORD / (time.process_time() - began) * len(os.sched_getaffinity(0))


def arms() -> list[Arm]:
    """In the table's order."""
    ours: list[Arm] = [
        OutboardArm(f"outboard-{streams}", LIMIT_S, "pre-copy", ("--no-hints", "--streams", str(streams)))
        for streams in (4, 1)
    ]
    return [*ours, multifd_arm(LIMIT_S, 4, tls=True), multifd_arm(LIMIT_S, 2, tls=True)]


def claims_of(played: Sequence[Played]) -> list[Claim]:
    """What several streams must reach."""
    rates = {one.arm: [each.rate for each in played if each.arm == one.arm] for one in played}
    ours = rates.get("outboard-4", [])
    median = statistics.median(ours) / 1e6 if ours else None
    spread = (min(ours) / 1e6, max(ours) / 1e6) if ours else None
    claims = []
    for peer, bar in (("qemu-multifd-4-tls", 2.0), ("qemu-multifd-2-tls", 2.0), ("outboard-1", 1.0)):
        theirs = rates.get(peer, [])
        claims.append(
            claim(
                "rate of pages, four streams",
                median,
                bar,
                "MB/s",
                len(ours),
                peer=statistics.median(theirs) / 1e6 if theirs else None,
                against=peer,
                spread=spread,
                at_least=True,
            )
        )
    return claims


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--session", "session_file", type=click.Path(path_type=Path), help="Write every run here.")
@click.option("--runs", default=3, show_default=True)
def main(file: Path | None, session_file: Path | None, runs: int) -> None:
    """Judge several streams over TLS."""
    image = build(ROOT / ".build/guest")
    console = Console(stderr=True)
    played: list[Played] = []
    ciphers = []
    for _ in range(runs):
        ciphers.append(cipher_limit())
        for arm in arms():
            outcome = play(arm, image)
            assert outcome.total_s is not None
            played.append(Played(arm=arm.name, rate=rate_of(outcome), total_s=outcome.total_s, outcome=outcome))
            console.print(f"{arm.name}: {played[-1].rate / 1e6:.0f} MB/s, {outcome.total_s:.2f} s")
    if session_file is not None:
        session_file.write_bytes(msgspec.json.format(msgspec.json.encode(played), indent=1))
    console.print(f"the cipher alone would allow {statistics.median(ciphers) / 1e6:,.0f} MB/s")
    claims = claims_of(played)
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
