"""Builds the test guest: a Debian kernel and an initial RAM disk with all that the guest needs.

``python -m guest.build --output DIR`` from the project's root. Debian's packages are fetched by apt into DIR/debs,
never installed, and unpacked; of them the kernel, the modules it needs for virtio, busybox, qemu-ga and memcached with
their libraries are taken. ``dirty`` is compiled from dirty.c. The image lies in a directory named by a digest of what
is in this folder, so that it is built once; remove DIR to have newer packages.

In the guest: the guest agent on the virtio port org.qemu.guest_agent.0, memcached on port 11211, ``dirty`` on port
7000. ``ip=10.77.0.11`` on the kernel's command line gives eth0 that address with a prefix of 24 bits. The console
(ttyS0) says ``outboard-guest ready`` once all of them listen.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import cpio, elf

HERE = Path(__file__).parent
PACKAGES = ("busybox-static", "linux-image-cloud-amd64", "memcached", "qemu-guest-agent")
PROGRAMS = ("bin/busybox", "usr/bin/memcached", "usr/sbin/qemu-ga")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console")
COMMAND_LINE = "console=ttyS0 quiet no_timer_check tsc=reliable"
"""What the kernel is told, beside ``ip=``. Under TCG on a busy host its check of the timer fails, and it panics; and it
takes the TSC for unstable, after which every look at the clock is an exit to QEMU's HPET."""
_MOUNT_POINTS = ("dev", "proc", "run", "sys", "tmp")
_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU boots: ``-kernel`` and ``-initrd``."""

    kernel: Path
    initrd: Path


class BuildError(Exception):
    """The image could not be built; the message says which program failed and what it said."""


def run(*command: str | os.PathLike[str]) -> str:
    """Run a program to its end; what it wrote.

    :raise BuildError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"{' '.join(os.fspath(word) for word in command)} exited with {done.returncode}: {done.stderr.strip()}; "
            "script/bootstrap installs what is needed and fetches apt's lists"
        )
    return done.stdout


def fetch(debs: Path, packages: Iterable[str] = PACKAGES) -> list[Path]:
    """Fetch packages and all they depend on, as apt has verified them; returns the packages' files.

    :raise BuildError: apt could not.
    """
    (debs / "partial").mkdir(parents=True, exist_ok=True)
    # With an empty status file apt takes nothing for installed, hence names the whole closure.
    status = debs / "status"
    status.touch()
    options = {
        "Dir::State::status": status.absolute(),
        "Dir::Cache::archives": debs.absolute(),
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    flags = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
    install = ["apt-get", "-qq", "-y", *flags, "install", *packages]
    run(*install, "--download-only")
    # Inst NAME (VERSION ORIGIN [ARCHITECTURE])
    chosen = re.findall(r"^Inst (\S+) \((\S+) .*\[(\S+)\]\)", run(*install, "--simulate"), re.MULTILINE)
    return [debs / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb" for name, version, architecture in chosen]


def unpack(packages: Iterable[Path], root: Path) -> None:
    """Unpack packages over one another."""
    for package in packages:
        run("dpkg-deb", "-x", package, root)


def _find_library(root: Path, name: str) -> str:
    """The path, relative to ``root``, of a library or of an interpreter named by its whole path."""
    for candidate in [name.lstrip("/"), *(f"{folder}/{name}" for folder in _LIBRARIES)]:
        if (root / candidate).exists():
            return candidate
    raise BuildError(f"{name} is in none of the packages; the closure that apt fetched is incomplete")


def _with_libraries(root: Path, programs: Iterable[str]) -> dict[str, cpio.Entry]:
    """The programs and everything that the dynamic linker will look for, by their paths in the guest."""
    entries: dict[str, cpio.Entry] = {}
    todo = list(programs)
    while todo:
        path = todo.pop()
        if path in entries:
            continue
        entries[path] = cpio.file((root / path).read_bytes(), executable=True)
        if elf.is_dynamic(root / path):
            todo += [_find_library(root, name) for name in elf.needed(root / path)]
    return entries


def modules(root: Path, names: Iterable[str] = MODULES) -> list[Path]:
    """The files of modules and of what they depend on, in the order in which they can be loaded."""
    files = {path.stem: path for path in root.glob("lib/modules/*/kernel/**/*.ko")}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for dependency in elf.module_depends(files[name]):
                add(dependency)
            ordered[name] = files[name]

    for name in names:
        add(name)
    return list(ordered.values())


def _root_files(root: Path, dirty: Path) -> dict[str, cpio.Entry]:
    """Everything in the guest's root file system."""
    entries = {folder: cpio.directory() for folder in _MOUNT_POINTS}
    entries["var/run"] = cpio.link("/run")
    entries["init"] = cpio.file((HERE / "init").read_bytes(), executable=True)
    entries["bin/dirty"] = cpio.file(dirty.read_bytes(), executable=True)
    entries["etc/passwd"] = cpio.file(b"root:x:0:0:root:/:/bin/sh\n")
    entries["etc/group"] = cpio.file(b"root:x:0:\n")
    loaded = modules(root)
    entries |= {f"lib/modules/{path.name}": cpio.file(path.read_bytes()) for path in loaded}
    entries["etc/modules"] = cpio.file("".join(f"/lib/modules/{path.name}\n" for path in loaded).encode())
    return entries | _with_libraries(root, PROGRAMS)


def digest() -> str:
    """What is in this folder: what is made of it lies in a directory of that name."""
    found = hashlib.sha256()
    for path in sorted(HERE.glob("*")):
        if path.is_file():
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def made_once(output: Path, name: str, make: Callable[[Path, Path], None]) -> Path:
    """The directory ``name`` in ``output``, filled by ``make(output, directory)`` if nobody has done so yet.

    Several processes may ask at once; what is there is whole.
    """
    output.mkdir(parents=True, exist_ok=True)
    place = output / name
    with (output / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=output) as work:
                into = Path(work) / "image"
                into.mkdir()
                make(output, into)
                into.rename(place)
    return place


def _make(output: Path, into: Path) -> None:
    root = into / "root"
    unpack(fetch(output / "debs"), root)
    dirty = into / "dirty"
    run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", dirty, HERE / "dirty.c")
    (kernel,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, into / "vmlinuz")
    archive = cpio.pack(_root_files(root, dirty))
    (into / "initrd.gz").write_bytes(gzip.compress(archive, compresslevel=6, mtime=0))
    dirty.unlink()
    shutil.rmtree(root)


def build(output: Path) -> Image:
    """Build the image under ``output``, or find it there; several processes may ask at once.

    :raise BuildError: a program that it needs failed.
    """
    place = made_once(output, digest(), _make)
    return Image(place / "vmlinuz", place / "initrd.gz")


def main() -> None:
    """Build and print where the image lies."""
    parser = argparse.ArgumentParser(prog="python -m guest.build", description="Build the test guest.")
    parser.add_argument("--output", type=Path, required=True, help="a directory; .build/guest is the usual one")
    image = build(parser.parse_args().output)
    print(f"kernel {image.kernel}\ninitrd {image.initrd}")


if __name__ == "__main__":
    main()
