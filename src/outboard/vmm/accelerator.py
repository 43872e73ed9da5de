"""Whether this host's KVM runs guests: tried with a guest of a few instructions, since nothing less tells.

/dev/kvm can be opened, and a VM made, on hosts where guests then crawl: nested inside a hypervisor that emulates
instead of virtualising, every instruction of an ordinary guest takes microseconds. So the trial guest counts, and must
have counted in time.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import msgspec

_COUNT = 2_000_000
_LIMIT_S = 3.0
"""QEMU's own start takes 0.2 s of it; counting takes 1 ms with KVM, 5 ms with TCG, and 16 s when emulated."""
_EXIT_PORT = 0xF4
_DONE = 0x10
_DONE_STATUS = _DONE << 1 | 1
"""What QEMU exits with when the guest writes ``_DONE`` to the port of isa-debug-exit."""
_FIRMWARE_SIZE = 65536
_RESET_VECTOR = 0xFFF0


class _Trial(msgspec.Struct, frozen=True):
    """How a trial ended: ``failure`` is None where KVM runs guests. Holds for this boot and this QEMU."""

    boot: str
    qemu: str
    failure: str | None


def _firmware() -> bytes:
    """64 KiB that count down in ecx, then say so to the exit port; 16-bit code, entered at the reset vector."""
    count = b"\x66\xb9" + _COUNT.to_bytes(4, "little")  # mov ecx, _COUNT
    loop = b"\x66\x49\x75\xfc"  # dec ecx; jnz to the dec
    done = bytes((0xB0, _DONE, 0xE6, _EXIT_PORT, 0xF4))  # mov al, _DONE; out _EXIT_PORT, al; hlt
    image = bytearray((count + loop + done).ljust(_FIRMWARE_SIZE, b"\xf4"))
    image[_RESET_VECTOR : _RESET_VECTOR + 5] = b"\xea\x00\x00\x00\xf0"  # jmp f000:0000
    return bytes(image)


def _try(qemu: str, accelerator: str) -> str | None:
    """Run the trial guest; why it failed, or None."""
    with tempfile.NamedTemporaryFile() as firmware:
        firmware.write(_firmware())
        firmware.flush()
        machine = ["-machine", f"q35,accel={accelerator}", "-m", "16", "-bios", firmware.name]
        quiet = ["-nodefaults", "-no-user-config", "-display", "none"]
        device = ["-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"]
        try:
            done = subprocess.run(
                [qemu, *machine, *quiet, *device],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"a trial guest had not counted to {_COUNT:,} within {_LIMIT_S:g} s: its instructions are emulated"
        except OSError as error:
            return f"{qemu} could not be run: {error.strerror}"
    if done.returncode == _DONE_STATUS:
        return None
    return done.stderr.strip() or f"the trial guest's QEMU exited with {done.returncode}"


def why_not_kvm(qemu: str, memory: Path) -> str | None:
    """Why guests cannot run under KVM on this host, in words; None where they can.

    :param qemu: the program that will run them.
    :param memory: a file that remembers the answer until the next boot.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm" if not Path("/dev/kvm").exists() else "/dev/kvm may not be opened"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        known = msgspec.json.decode(memory.read_bytes(), type=_Trial)
        if (known.boot, known.qemu) == (boot, qemu):
            return known.failure
    except (OSError, msgspec.DecodeError):
        known = None
    failure = _try(qemu, "kvm")
    memory.parent.mkdir(parents=True, exist_ok=True)
    fresh = memory.with_name(f"{memory.name}.{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode(_Trial(boot, qemu, failure)))
    fresh.rename(memory)
    return failure
