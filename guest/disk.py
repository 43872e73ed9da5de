"""Builds a Debian on a disk: a root file system of unpacked packages, and an initial RAM disk that mounts it.

``python -m guest.disk --output DIR`` from the project's root. The packages are fetched as :mod:`guest.build` fetches
them, unpacked and not configured: no script of theirs runs. ``base.raw`` is an ext4 file system without partitions, to
be the fixed image under an overlay that a VM writes to.

With ``init=/sbin/init`` on the kernel's command line systemd starts, with udev, the journal and D-Bus, and through
outboard-guest.service what the test guest offers (:mod:`guest.build`); with ``init=/init`` that alone, in a tenth of
the time.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import cpio
from .build import HERE, PACKAGES, BuildError, digest, fetch, made_once, modules, run

MORE_PACKAGES = (
    "systemd-sysv",
    "udev",
    "dbus",
    "bash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "gawk",
    "procps",
    "iproute2",
    "kmod",
    "login",
    "base-passwd",
    "python3",
    "perl",
)
COMMAND_LINE = "console=ttyS0 quiet no_timer_check tsc=reliable root=/dev/vda"
_EARLY_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console")
_SIZE_MIB = 900
_MERGED = ("bin", "sbin", "lib", "lib64")
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "boot")
_BUSYBOX_INIT = """#!/bin/busybox sh
# The first process where systemd is not wanted.
export PATH=/bin:/usr/bin:/sbin:/usr/sbin
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
/usr/sbin/outboard-guest
while :; do
    sleep 3600 &
    wait
done
"""
_EARLY_INIT = """#!/bin/busybox sh
# Loads what it takes to mount the root, and hands over to its first process.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do /bin/busybox insmod "$module"; done </etc/modules
init=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in
    init=*) init=${word#init=} ;;
    root=*) root=${word#root=} ;;
    esac
done
until /bin/busybox mount -t ext4 "$root" /root 2>/dev/null; do /bin/busybox usleep 20000; done
for place in proc sys dev; do /bin/busybox mount -o move /$place /root/$place; done
exec /bin/busybox switch_root /root "$init"
"""
_UNIT = """[Unit]
Description=What the test guest offers

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/outboard-guest

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class DiskImage:
    """What QEMU boots, and the disk below the one that it writes to."""

    kernel: Path
    initrd: Path
    base: Path


def overlay(base: Path, path: Path) -> Path:
    """Make a disk to write to at ``path``, over ``base``."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.absolute(), path)
    return path


def _unpack(packages: list[Path], root: Path) -> None:
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        done = subprocess.run(
            ["tar", "-x", "-C", root, "--keep-directory-symlink"], stdin=tar.stdout, capture_output=True, check=False
        )
        if tar.stdout is not None:
            tar.stdout.close()
        if tar.wait() or done.returncode:
            raise BuildError(f"{package.name} cannot be unpacked: {done.stderr.decode()}")


def _services() -> str:
    """The part of the test guest's first process that both kinds of boot have."""
    script = (HERE / "init").read_text()
    begin, end = script.index("# What udev does elsewhere"), script.index("# The first process reaps")
    return f"#!/bin/busybox sh\nexport PATH=/bin:/usr/bin:/sbin:/usr/sbin\nmkdir -p /var/run\n{script[begin:end]}"


def _configure(root: Path, dirty: Path) -> None:
    for kind in ("passwd", "group"):
        shutil.copyfile(root / f"usr/share/base-passwd/{kind}.master", root / "etc" / kind)
    with (root / "etc/passwd").open("a") as users:
        users.write("messagebus:x:100:65534::/nonexistent:/usr/sbin/nologin\n")
    with (root / "etc/group").open("a") as groups:
        for number, name in enumerate(("messagebus", "systemd-journal", "input", "kvm", "render", "sgx"), start=101):
            groups.write(f"{name}:x:{number}:\n")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/fstab").touch()
    (root / "etc/hostname").write_text("debian\n")
    for name in _LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
    programs = {"init": _BUSYBOX_INIT, "usr/sbin/outboard-guest": _services()}
    for name, text in programs.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (root / "etc/systemd/system/outboard-guest.service").write_text(_UNIT)
    (root / "etc/systemd/system/multi-user.target.wants/outboard-guest.service").symlink_to("../outboard-guest.service")
    (root / "etc/systemd/system/default.target").symlink_to("/lib/systemd/system/multi-user.target")
    # The guest agent and memcached are outboard-guest's.
    for name in ("qemu-guest-agent", "memcached"):
        (root / f"etc/systemd/system/{name}.service").symlink_to("/dev/null")
    shutil.copy(dirty, root / "usr/bin/dirty")
    busybox = root / "usr/bin/busybox"
    for applet in run(busybox, "--list").split():
        if not any((root / "usr" / place / applet).exists() for place in ("bin", "sbin")):
            (root / "usr/bin" / applet).symlink_to("busybox")
    run("ldconfig", "-r", root)


def _initrd(root: Path) -> bytes:
    early = modules(root, _EARLY_MODULES)
    entries = {folder: cpio.directory() for folder in ("dev", "proc", "sys", "root")}
    entries["init"] = cpio.file(_EARLY_INIT.encode(), executable=True)
    entries["bin/busybox"] = cpio.file((root / "usr/bin/busybox").read_bytes(), executable=True)
    entries["bin/sh"] = cpio.link("busybox")
    entries |= {f"lib/modules/{path.name}": cpio.file(path.read_bytes()) for path in early}
    entries["etc/modules"] = cpio.file("".join(f"/lib/modules/{path.name}\n" for path in early).encode())
    return gzip.compress(cpio.pack(entries), compresslevel=6, mtime=0)


def _make(output: Path, into: Path) -> None:
    root = into / "root"
    root.mkdir()
    _unpack(fetch(output / "debs", [*PACKAGES, *MORE_PACKAGES]), root)
    dirty = into / "dirty"
    run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", dirty, HERE / "dirty.c")
    (kernel,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, into / "vmlinuz")
    (into / "initrd.gz").write_bytes(_initrd(root))
    _configure(root, dirty)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, "-L", "debian", into / "base.raw", f"{_SIZE_MIB}M")
    dirty.unlink()
    shutil.rmtree(root)


def build(output: Path) -> DiskImage:
    """Build the disk under ``output``, or find it there; several processes may ask at once.

    :raise BuildError: a program that it needs failed.
    """
    place = made_once(output, f"disk-{digest()}", _make)
    return DiskImage(place / "vmlinuz", place / "initrd.gz", place / "base.raw")


def main() -> None:
    """Build and print where the images lie."""
    parser = argparse.ArgumentParser(prog="python -m guest.disk", description="Build the test guest on a disk.")
    parser.add_argument("--output", type=Path, required=True, help="a directory; .build/guest is the usual one")
    image = build(parser.parse_args().output)
    print(f"kernel {image.kernel}\ninitrd {image.initrd}\nbase {image.base}")


if __name__ == "__main__":
    main()
