"""A QEMU VM on the host of two nodes, whose memory goes to and fro: it writes to 24 MiB at random and verifies them
all the while, and says on its console after each pass whether all was as it must be.

Its kernel and ``dirty`` are the test guest's. It is emulated by what is emulated itself; its clock counts its
instructions, since by a real one the next tick would come before it has dealt with the last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from guest import cpio
from guest.build import HERE, build, fetch, unpack
from outboard.numa.following import Follower
from outboard.numa.moving import Limits, Mover, Pace, Rests
from outboard.numa.policies import ABSENT, POLICIES, UNKNOWN, Memory
from outboard.numa.whereabouts import Whereabouts, free_of
from outboard.vmm.process import attach_process

_MIB, _WRITTEN_MIB, _RATE = 128, 24, 500
_CONSOLE = Path("/run/verifier")
_BOOT_S = 300.0
_LOOK_S = 0.2
_PASSES = 2
"""After the last move as many passes are waited for: the first of them may have begun before it."""
_COMMAND_LINE = "console=ttyS0 quiet no_timer_check tsc=reliable lpj=1000000 random.trust_cpu=on"
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
exec >/dev/ttyS0 2>&1
ip link set lo up
dirty serve &
until dirty start {_WRITTEN_MIB} {_RATE}; do usleep 100000; done
while :; do dirty verify; done
"""


class Carried(NamedTuple):
    """What became of it: when each move had ended and which share of its memory was on the other node then, all batches
    (end, pages, seconds), passes over its memory meanwhile, and those that found something wrong."""

    at: list[float]
    shares: list[float]
    batches: list[tuple[float, int, float]]
    passes: int
    wrong: int


def prepare(directory: Path, images: Path) -> list[str]:
    """Put what it boots into ``directory``; QEMU's command line."""
    root = directory / "root"
    unpack(fetch(images / "debs", ("busybox-static",)), root)
    program = directory / "dirty"
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-o", program, HERE / "dirty.c"], check=True)
    entries = {folder: cpio.directory() for folder in ("dev", "proc", "sys")}
    entries["init"] = cpio.file(_INIT.encode(), executable=True)
    entries["bin/busybox"] = cpio.file((root / "bin/busybox").read_bytes(), executable=True)
    entries["bin/dirty"] = cpio.file(program.read_bytes(), executable=True)
    (directory / "verifier.cpio").write_bytes(cpio.pack(entries))
    shutil.rmtree(root)
    words = ["qemu-system-x86_64", "-accel", "tcg,tb-size=64", "-icount", "shift=3,sleep=off", "-cpu", "qemu64"]
    words += ["-display", "none", "-nodefaults", "-no-user-config", "-m", f"{_MIB}M"]
    words += ["-machine", "microvm,memory-backend=ram"]
    words += ["-object", f"memory-backend-memfd,id=ram,share=on,size={_MIB}M"]
    words += ["-kernel", os.fspath(build(images).kernel), "-initrd", os.fspath(directory / "verifier.cpio")]
    return [*words, "-append", _COMMAND_LINE, "-serial", f"file:{_CONSOLE}"]


class _Verifier:
    """The VM, on the second processor."""

    def __init__(self, command: list[str]) -> None:
        _CONSOLE.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, {1})
        )
        self.pid = self._process.pid

    def told(self) -> tuple[int, int]:
        """Passes over its memory, and those that found something wrong."""
        lines = _CONSOLE.read_text(errors="replace").splitlines() if _CONSOLE.exists() else []
        # The first line that begins so is of the start.
        ok, bad = (sum(line.startswith(word) for line in lines) for word in ("ok ", "bad "))
        return max(0, ok - 1) + bad, bad

    def wait(self, passes: int) -> None:
        ends = time.monotonic() + _BOOT_S
        while self.told()[0] < passes:
            said = _CONSOLE.read_text(errors="replace")[-2000:] if _CONSOLE.exists() else ""
            if self._process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"the VM has not verified its memory within {_BOOT_S:.0f} s; its console says: {said}")
            time.sleep(_LOOK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._process:
            self._process.kill()


def to_and_fro(command: list[str], moves: int, most: float, stall: float) -> Carried:
    """Run it, and move all of its memory to the other node and back, again and again while ``most`` seconds last."""
    os.sched_setaffinity(0, {0})
    with _Verifier(command) as vm:
        vm.wait(1)
        passes, _ = vm.told()
        found = Carried([], [], [], 0, 0)
        began = time.monotonic()
        with attach_process(vm.pid) as guest, Whereabouts(guest, 1) as where:
            cold, pace = np.zeros(guest.pages), Pace(stall, 64, 65536, 16)
            while len(found.at) < moves and time.monotonic() < began + most:
                # It has begun on the second node.
                node = len(found.at) % 2
                memory = Memory(cold, cold, np.full(guest.pages, UNKNOWN, dtype=np.int16))
                mover = Mover(POLICIES["address"], node, Limits(64), free_of(node) // 4096)
                rests = Rests(guest.pages, 0)
                follower = Follower(where, memory, mover, pace, rests, time.monotonic, time.sleep)
                while follower.step():
                    pass
                told = follower.progress()
                found.at.append(time.monotonic() - began)
                found.batches.append((found.at[-1], told.moved, told.longest))
                now = where.nodes()
                found.shares.append(float((now == node).sum() / (now != ABSENT).sum()))
            vm.wait(vm.told()[0] + _PASSES)
        done, wrong = vm.told()
        return found._replace(passes=done - passes, wrong=wrong)
