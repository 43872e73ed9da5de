"""What a program in ELF wants loaded with it, and what a kernel module wants loaded before it; x86-64 only (elf(5))."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB = 1, 5
_EM_X86_64 = 62


class _Elf:
    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:6] != b"\x7fELF\x02\x01" or len(self.data) < _HEADER.size:
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        header = _HEADER.unpack_from(self.data)
        machine, self._segments_at, self._sections_at = header[2], header[5], header[6]
        self._segment_count, self._section_count, self._names_index = header[10], header[12], header[13]
        if machine != _EM_X86_64:
            raise ValueError(f"{path} is for ELF machine {machine}, not for x86-64")

    def string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Type, file offset, address and size in the file of each segment."""
        for index in range(self._segment_count):
            fields = _SEGMENT.unpack_from(self.data, self._segments_at + index * _SEGMENT.size)
            yield fields[0], fields[2], fields[3], fields[5]

    def section(self, name: str) -> bytes:
        sections = [
            _SECTION.unpack_from(self.data, self._sections_at + index * _SECTION.size)
            for index in range(self._section_count)
        ]
        names = sections[self._names_index][4]
        for fields in sections:
            if self.string(names + fields[0]) == name:
                return self.data[fields[4] : fields[4] + fields[5]]
        return b""


def is_dynamic(path: Path) -> bool:
    """Whether the file is an ELF program or library that asks for others."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return False
    return any(kind == _PT_DYNAMIC for kind, *_ in _Elf(path).segments())


def needed(path: Path) -> list[str]:
    """The libraries that the file asks for, by DT_NEEDED, and its interpreter's path if it has one.

    :raise ValueError: it is no x86-64 ELF file.
    """
    elf = _Elf(path)
    segments = list(elf.segments())
    found = [elf.string(offset) for kind, offset, _, _ in segments if kind == _PT_INTERP]
    for kind, offset, _, size in segments:
        if kind != _PT_DYNAMIC:
            continue
        entries = [_DYNAMIC.unpack_from(elf.data, offset + at) for at in range(0, size, _DYNAMIC.size)]
        address = next(value for tag, value in entries if tag == _DT_STRTAB)
        # The dynamic section speaks of addresses; the file offset follows from the segment that is loaded there.
        strings = next(
            at + address - start
            for segment, at, start, length in segments
            if segment == _PT_LOAD and start <= address < start + length
        )
        found += [elf.string(strings + value) for tag, value in entries if tag == _DT_NEEDED]
    return found


def module_depends(path: Path) -> list[str]:
    """The kernel modules that a module names in the ``depends=`` of its .modinfo.

    :raise ValueError: it is no x86-64 ELF file.
    """
    for entry in _Elf(path).section(".modinfo").split(b"\0"):
        if entry.startswith(b"depends="):
            return [name.decode() for name in entry.removeprefix(b"depends=").split(b",") if name]
    return []
