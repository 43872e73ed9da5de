"""A guest that stands for a host: of several nodes, with the root of this machine mounted, and one program to run.

Its kernel is Debian's of the full flavour, which has 9p; its root file system is this machine's, read-only (what is in
/run and /dev/shm is its own), so that whatever is installed here runs there. Under TCG it is up in five to ten seconds.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import cpio
from .build import HERE, BuildError, Image, digest, fetch, made_once, modules, unpack

_PACKAGES = ("busybox-static", "linux-image-amd64")
_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p")
_MOUNT_POINTS = ("bin", "dev", "proc", "root", "sys", "etc")
_COMMAND_LINE = "console=ttyS0 quiet no_timer_check tsc=reliable panic=-1"


def _make(output: Path, into: Path) -> None:
    root = into / "root"
    unpack(fetch(output / "debs", _PACKAGES), root)
    entries = {folder: cpio.directory() for folder in _MOUNT_POINTS}
    entries["init"] = cpio.file((HERE / "init-host").read_bytes(), executable=True)
    entries["bin/busybox"] = cpio.file((root / "bin/busybox").read_bytes(), executable=True)
    loaded = modules(root, _MODULES)
    entries |= {f"lib/modules/{path.name}": cpio.file(path.read_bytes()) for path in loaded}
    entries["etc/modules"] = cpio.file("".join(f"/lib/modules/{path.name}\n" for path in loaded).encode())
    (kernel,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, into / "vmlinuz")
    (into / "initrd.gz").write_bytes(gzip.compress(cpio.pack(entries), compresslevel=6, mtime=0))
    shutil.rmtree(root)


def build(output: Path) -> Image:
    """Build the image under ``output``, or find it there; several processes may ask at once.

    :raise BuildError: a program that it needs failed.
    """
    place = made_once(output, f"host-{digest()}", _make)
    return Image(place / "vmlinuz", place / "initrd.gz")


def command(
    image: Image, program: Path, results: Path, console: Path, mebibytes: Sequence[int], distance: int = 21
) -> list[str]:
    """QEMU's command line for a host with a processor and so much memory on each node, all alike far from one another.

    :param program: a shell script of this machine, which it runs as root; then it powers off.
    :param results: a file of this machine that takes what the program writes to ``/dev/vport*p1``; :param console: one
        that takes what it prints.
    """
    nodes = len(mebibytes)
    words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-no-reboot"]
    words += ["-smp", f"{nodes},sockets={nodes}", "-m", f"{sum(mebibytes)}M", "-display", "none", "-nodefaults"]
    for node, size in enumerate(mebibytes):
        words += ["-object", f"memory-backend-memfd,id=m{node},size={size}M,share=on,prealloc=on"]
        words += ["-numa", f"node,nodeid={node},memdev=m{node},cpus={node}"]
    for one in range(nodes):
        for other in range(one):
            words += ["-numa", f"dist,src={one},dst={other},val={distance}"]
    words += ["-kernel", os.fspath(image.kernel), "-initrd", os.fspath(image.initrd)]
    words += ["-append", f"{_COMMAND_LINE} outboard.run={program}"]
    words += ["-serial", f"file:{console}"]
    words += ["-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"]
    words += ["-device", "virtio-serial-pci", "-chardev", f"file,id=results,path={results}"]
    return words + ["-device", "virtserialport,chardev=results,name=results"]


def run(image: Image, program: Path, results: Path, console: Path, mebibytes: Sequence[int], timeout: float) -> None:
    """Boot it, have it run the program, and wait for its end.

    :raise BuildError: QEMU failed.
    :raise subprocess.TimeoutExpired: it has not ended.
    """
    done = subprocess.run(
        command(image, program, results, console, mebibytes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise BuildError(
            f"the host of {len(mebibytes)} nodes: QEMU exited with {done.returncode}: {done.stdout.strip()}"
        )
