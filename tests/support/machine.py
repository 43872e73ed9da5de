"""A QEMU process for tests, started by hand: what we attach to was seldom started by us."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from guest import disk
from guest.build import COMMAND_LINE, Image, build
from guest.disk import DiskImage
from outboard.linux import ksm
from tests.support.requirements import require

ROOT = Path(__file__).parents[2]
BOOT_S = 120


@contextlib.contextmanager
def the_machine_is_ours() -> Iterator[None]:
    """Of the tests that change a setting of the whole machine one runs at a time, in whichever process."""
    with Path("/run/lock/outboard-tests").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """``count`` more of 2 MiB than there were; skips the test where they cannot be had."""
    require("root")
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    with the_machine_is_ours():
        before = int(pool.read_text())
        pool.write_text(str(before + count))
        try:
            if int(pool.read_text()) < before + count:
                pytest.skip(f"the kernel finds no memory for {count} large pages")
            yield
        finally:
            pool.write_text(str(before))


@contextlib.contextmanager
def transparent_huge_pages() -> Iterator[None]:
    """Large pages for shared memory that asks for them."""
    require("root")
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    with the_machine_is_ours():
        before = setting.read_text().split("[")[1].split("]")[0]
        setting.write_text("advise")
        try:
            yield
        finally:
            setting.write_text(before)


def image() -> Image:
    """The test guest's kernel and initial RAM disk, built once."""
    return build(ROOT / ".build" / "guest")


def disk_image() -> DiskImage:
    """The test guest on a disk, built once."""
    return disk.build(ROOT / ".build" / "guest")


@contextlib.contextmanager
def ksmd() -> Iterator[None]:
    """Have the kernel merge what it may, fast."""
    settings = {"run": 1, "pages_to_scan": 20000, "sleep_millisecs": 1}
    with the_machine_is_ours():
        before = {name: ksm.setting(name) for name in settings}
        try:
            for name, value in reversed(settings.items()):
                ksm.setting(name, value)
            yield
        finally:
            for name, value in before.items():
                ksm.setting(name, value)


class Machine:
    """A running QEMU with ``mebibytes`` of RAM; TCG, no devices but those asked for.

    :param backend: of the RAM: ``file`` (shared, on /dev/shm), ``memfd``, ``private`` (a file, share=off), ``shared``
        (no file, share=on), ``anonymous``, or ``default`` for QEMU's own choice without a backend.
    :param boot: boot the test guest, with its agent; otherwise QEMU stays at the first instruction.
    """

    def __init__(
        self, mebibytes: int = 64, *arguments: str, backend: str = "file", boot: bool = False, machine: str = "q35"
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="outboard-vm-"))
        self.qmp = self.directory / "qmp.sock"
        self.agent = self.directory / "agent.sock"
        self.console = self.directory / "console.log"
        self._backing = Path(f"/dev/shm/outboard-test-{secrets.token_hex(6)}")
        kind = {
            "file": f"memory-backend-file,share=on,mem-path={self._backing}",
            "private": f"memory-backend-file,share=off,mem-path={self._backing}",
            "memfd": "memory-backend-memfd,share=on",
            "shared": "memory-backend-ram,share=on",
            "anonymous": "memory-backend-ram",
        }
        command = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-no-user-config"]
        command += ["-m", f"{mebibytes}M", "-qmp", f"unix:{self.qmp},server=on,wait=off"]
        if backend == "default":
            command += ["-machine", machine]
        else:
            command += ["-machine", f"{machine},memory-backend=ram"]
            command += ["-object", f"{kind[backend]},id=ram,size={mebibytes}M"]
        if boot:
            files = image()
            command += ["-cpu", "max", "-kernel", os.fspath(files.kernel), "-initrd", os.fspath(files.initrd)]
            command += ["-append", COMMAND_LINE, "-serial", f"file:{self.console}"]
            command += ["-device", "virtio-serial-pci", "-chardev"]
            command += [f"socket,id=agent,path={self.agent},server=on,wait=off", "-device"]
            command += ["virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        else:
            command += ["-S"]
        self._process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.pid = self._process.pid
        try:
            self._wait(boot)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _wait(self, boot: bool) -> None:
        deadline = time.monotonic() + BOOT_S
        while not self._listens():
            self._check(deadline, "listen")
        # QEMU made the file and keeps it open: its name is in the way from now on.
        self._backing.unlink(missing_ok=True)
        while boot and b"outboard-guest ready" not in self._said():
            self._check(deadline, "boot")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return self.qmp.exists() and probe.connect_ex(os.fspath(self.qmp)) == 0

    def _said(self) -> bytes:
        return self.console.read_bytes() if self.console.exists() else b""

    def _check(self, deadline: float, what: str) -> None:
        """Look again in 20 ms unless QEMU has ended or time is up."""
        assert self._process.stderr is not None
        ended = select.select([self._process.stderr], [], [], 0.02)[0] and self._process.poll() is not None
        if ended or time.monotonic() > deadline:
            said = self._process.stderr.read().decode() if ended else self._said().decode()[-500:]
            raise AssertionError(f"the test's QEMU did not {what}: {said}")

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._backing.unlink(missing_ok=True)
        for path in self.directory.iterdir():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            self.directory.rmdir()
