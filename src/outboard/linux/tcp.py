"""tcp(7), <linux/tcp.h>: what the kernel knows of a connection, and its pacing."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

SO_MAX_PACING_RATE = 47
_UNPACED = (1 << 64) - 1
_LENGTH = 168
_HEAD = struct.Struct("<8B24I")
_TAIL = struct.Struct("<4Q2I4I1Q")
"""From tcpi_pacing_rate on: rates, byte counts, segment counts, notsent, min_rtt, data segments, delivery_rate."""


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """A part of struct tcp_info. Times in microseconds, rates in bytes/s.

    ``app_limited``: the delivery rate was bound by the sender having nothing to send.
    """

    rtt_us: int
    min_rtt_us: int
    delivery_rate: int
    app_limited: bool
    acknowledged_bytes: int
    unsent_bytes: int
    retransmits: int


def tcp_info(connection: socket.socket) -> TcpInfo:
    """getsockopt(TCP_INFO)."""
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)
    head = _HEAD.unpack_from(raw)
    tail = _TAIL.unpack_from(raw, _HEAD.size)
    return TcpInfo(
        rtt_us=head[8 + 15],
        min_rtt_us=tail[7],
        delivery_rate=tail[10],
        app_limited=bool(head[7] & 1),
        acknowledged_bytes=tail[2],
        unsent_bytes=tail[6],
        retransmits=head[8 + 23],
    )


def set_pacing_rate(connection: socket.socket, rate: float | None) -> None:
    """Send no faster than ``rate`` bytes/s, evenly; None is as fast as it goes. Works without the fq qdisc."""
    value = _UNPACED if rate is None else max(1, int(rate))
    connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("<Q", value))
