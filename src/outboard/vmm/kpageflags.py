"""/proc/kpageflags of a guest, 64 bits a page frame, carried out by the guest agent.

The quickest way is a program in the guest that compresses: a gibibyte of guest is 2 MiB of flags and 5 kB on the wire,
where reading the file through the agent spells it out in base64. So ``dd | gzip`` comes first; a guest that has no
shell, or whose agent does not run programs, is read by file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.vmm.guest_agent import GuestAgent, GuestAgentError

PATH = "/proc/kpageflags"
_ENTRY = 8
_BLOCK = 1 << 16
_FIRST_PIECE, _LAST_PIECE = 1 << 18, 1 << 23
"""Bytes asked for at once, each time four times as many: 128 MiB of guest, so that work can begin soon, to 4 GiB, so
that starting programs does not count."""
_FILE_PIECE = 1 << 18


def read(
    agent: GuestAgent, ranges: Iterable[tuple[int, int]], *, deadline: float
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """The flags of the guest's page frames in ``ranges`` (first, count), a piece at a time.

    Pieces may begin a little before a range. They may end before it does: the file does so where a guest's RAM ends.

    :param deadline: on the monotonic clock.
    :return: (first frame, flags of it and of those that follow it).
    :raise GuestAgentError: the agent neither runs programs nor reads files.
    :raise PeerError: the answer is no kpageflags. :raise UnreachableError: the agent is too slow, or gone.
    """
    told = False
    by_file = False
    for first, count in ranges:
        begin, end = first * _ENTRY // _BLOCK * _BLOCK, (first + count) * _ENTRY
        if not by_file:
            try:
                for at, data in _by_program(agent, begin, end, deadline):
                    told = True
                    yield at // _ENTRY, np.frombuffer(data, dtype="<u8")
            except GuestAgentError:
                if told:
                    raise
            by_file = not told
        if by_file:
            for at, data in _by_file(agent, begin, end, deadline):
                yield at // _ENTRY, np.frombuffer(data, dtype="<u8")


def _by_program(agent: GuestAgent, at: int, end: int, deadline: float) -> Iterator[tuple[int, bytes]]:
    piece = _FIRST_PIECE
    while at < end:
        piece = min(piece, -(-(end - at) // _BLOCK) * _BLOCK)
        copy = f"dd if={PATH} bs={_BLOCK} skip={at // _BLOCK} count={piece // _BLOCK} 2>/dev/null | gzip -1"
        # Ahead of whatever keeps the guest busy: it is asked because it is in trouble.
        command = f"renice -n -10 -p $$ >/dev/null 2>&1; {copy}"
        _, packed = agent.run("/bin/sh", "-c", command, deadline=deadline)
        # Nothing at all comes where there is no gzip.
        data = _unpacked(packed, piece) if packed else b""
        if data:
            yield at, data[: end - at]
        if len(data) < piece:
            return
        at += piece
        piece = min(4 * piece, _LAST_PIECE)


def _unpacked(packed: bytes, most: int) -> bytes:
    """
    :raise PeerError: not gzip, not all of it, more than ``most`` bytes, or no whole number of entries.
    """
    engine = zlib.decompressobj(wbits=31)
    try:
        data = engine.decompress(packed, most + 1)
    except zlib.error as error:
        raise PeerError(f"the guest's {PATH} does not decompress: {error}") from error
    if len(data) > most or not engine.eof or len(data) % _ENTRY:
        raise PeerError(
            f"the guest's {PATH} came as {len(data)} bytes or more, of at most {most}; that is not what it is"
        )
    return data


def _by_file(agent: GuestAgent, at: int, end: int, deadline: float) -> Iterator[tuple[int, bytes]]:
    rest = b""
    for part in agent.read_file(PATH, _FILE_PIECE, skip=at, deadline=deadline):
        data = rest + part
        whole = min(len(data) // _ENTRY * _ENTRY, end - at)
        rest = data[whole:]
        if whole:
            yield at, data[:whole]
        at += whole
        if at >= end:
            return
