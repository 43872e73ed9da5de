"""Whether this host's KVM runs guests: tried with a guest of a few instructions, since nothing less tells.

/dev/kvm can be opened, and a VM made, on hosts where guests then crawl: nested inside a hypervisor that emulates
instead of virtualising, every instruction of an ordinary guest takes microseconds, perhaps in some of the processor's
modes only. So the trial guest counts, in real mode and in protected mode, which every system boots through, and must
have counted in time. It has the processor that the VM is to have: QEMU may fail to make that.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import msgspec

_COUNT = 2_000_000
_LIMIT_S = 3.0
"""QEMU's own start takes 0.2 s of it; counting takes 2 ms with KVM, 10 ms with TCG, and 16 s when emulated."""
_EXIT_PORT = 0xF4
_DONE = 0x10
_DONE_STATUS = _DONE << 1 | 1
"""What QEMU exits with when the guest writes ``_DONE`` to the port of isa-debug-exit."""
_FIRMWARE_SIZE = 65536
_RESET_VECTOR = 0xFFF0
_BASE = 0xF0000
"""Where the firmware lies below 1 MiB."""
_GDT, _GDT_REGISTER = 0x80, 0x90


class _Trial(msgspec.Struct, frozen=True):
    """How a trial ended: ``failure`` is None where KVM runs guests. Holds for this boot, this QEMU and this ``cpu``."""

    boot: str
    qemu: str
    cpu: str
    failure: str | None


def _firmware() -> bytes:
    """64 KiB that count down in ecx, in both modes, then say so to the exit port; entered at the reset vector."""
    count = _COUNT.to_bytes(4, "little")
    code = b"\x66\xb9" + count + b"\x66\x49\x75\xfc"  # mov ecx, _COUNT; dec ecx; jnz to the dec
    code += b"\x2e\x66\x0f\x01\x16" + _GDT_REGISTER.to_bytes(2, "little")  # lgdt cs:[_GDT_REGISTER]
    code += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1; mov cr0, eax
    code += b"\x66\xea" + (_BASE + len(code) + 8).to_bytes(4, "little") + b"\x08\x00"  # jmp 8:the next instruction
    code += b"\xb9" + count + b"\x49\x75\xfd"  # mov ecx, _COUNT; dec ecx; jnz to the dec
    code += bytes((0xB0, _DONE, 0xE6, _EXIT_PORT, 0xF4))  # mov al, _DONE; out _EXIT_PORT, al; hlt
    image = bytearray(code.ljust(_FIRMWARE_SIZE, b"\xf4"))
    # None, and 32-bit code from 0 on.
    image[_GDT : _GDT + 16] = bytes(8) + (0x00CF9A000000FFFF).to_bytes(8, "little")
    image[_GDT_REGISTER : _GDT_REGISTER + 6] = (15).to_bytes(2, "little") + (_BASE + _GDT).to_bytes(4, "little")
    image[_RESET_VECTOR : _RESET_VECTOR + 5] = b"\xea\x00\x00\x00\xf0"  # jmp f000:0000
    return bytes(image)


def _try(qemu: str, cpu: str, accelerator: str) -> str | None:
    """Run the trial guest; why it failed, or None."""
    with tempfile.NamedTemporaryFile() as firmware:
        firmware.write(_firmware())
        firmware.flush()
        machine = ["-machine", f"q35,accel={accelerator}", "-cpu", cpu, "-m", "16", "-bios", firmware.name]
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
    return next(iter(done.stderr.splitlines()), "") or f"the trial guest's QEMU exited with {done.returncode}"


def why_not_kvm(qemu: str, cpu: str, memory: Path) -> str | None:
    """Why guests cannot run under KVM on this host, in words; None where they can.

    :param qemu: the program that will run them; :param cpu: its ``-cpu``.
    :param memory: a file that remembers the answer until the next boot.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm" if not Path("/dev/kvm").exists() else "/dev/kvm may not be opened"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        known = msgspec.json.decode(memory.read_bytes(), type=_Trial)
        if (known.boot, known.qemu, known.cpu) == (boot, qemu, cpu):
            return known.failure
    except (OSError, msgspec.DecodeError):
        known = None
    failure = _try(qemu, cpu, "kvm")
    memory.parent.mkdir(parents=True, exist_ok=True)
    fresh = memory.with_name(f"{memory.name}.{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode(_Trial(boot, qemu, cpu, failure)))
    fresh.rename(memory)
    return failure
