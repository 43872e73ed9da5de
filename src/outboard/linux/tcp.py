"""tcp(7), <linux/tcp.h>: what the kernel knows of a connection, and its pacing."""

from __future__ import annotations

import ctypes
import socket
import struct
from dataclasses import dataclass

from outboard.linux.libc import layout, u8, u32, u64

SO_MAX_PACING_RATE = 47
_UNPACED = (1 << 64) - 1


@layout(168)
class tcp_info_head(ctypes.Structure):
    """struct tcp_info as far as delivery_rate; the kernel fills as much as is asked for.

    Bit 0 of ``tcpi_app_limited`` is tcpi_delivery_rate_app_limited, the window scales are four bits each.
    """

    tcpi_state: u8
    tcpi_ca_state: u8
    tcpi_retransmits: u8
    tcpi_probes: u8
    tcpi_backoff: u8
    tcpi_options: u8
    tcpi_window_scales: u8
    tcpi_app_limited: u8
    tcpi_rto: u32
    tcpi_ato: u32
    tcpi_snd_mss: u32
    tcpi_rcv_mss: u32
    tcpi_unacked: u32
    tcpi_sacked: u32
    tcpi_lost: u32
    tcpi_retrans: u32
    tcpi_fackets: u32
    tcpi_last_data_sent: u32
    tcpi_last_ack_sent: u32
    tcpi_last_data_recv: u32
    tcpi_last_ack_recv: u32
    tcpi_pmtu: u32
    tcpi_rcv_ssthresh: u32
    tcpi_rtt: u32
    tcpi_rttvar: u32
    tcpi_snd_ssthresh: u32
    tcpi_snd_cwnd: u32
    tcpi_advmss: u32
    tcpi_reordering: u32
    tcpi_rcv_rtt: u32
    tcpi_rcv_space: u32
    tcpi_total_retrans: u32
    tcpi_pacing_rate: u64
    tcpi_max_pacing_rate: u64
    tcpi_bytes_acked: u64
    tcpi_bytes_received: u64
    tcpi_segs_out: u32
    tcpi_segs_in: u32
    tcpi_notsent_bytes: u32
    tcpi_min_rtt: u32
    tcpi_data_segs_in: u32
    tcpi_data_segs_out: u32
    tcpi_delivery_rate: u64


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """A part of struct tcp_info. Times in microseconds, rates in bytes/s.

    ``app_limited``: the delivery rate was bound by the sender having nothing to send. ``queued_bytes``: given to the
    kernel and not acknowledged. ``silent_s``: seconds since data came last.
    """

    rtt_us: int
    min_rtt_us: int
    delivery_rate: int
    app_limited: bool
    acknowledged_bytes: int
    unsent_bytes: int
    queued_bytes: int
    retransmits: int
    silent_s: float


def tcp_info(connection: socket.socket) -> TcpInfo:
    """getsockopt(TCP_INFO)."""
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ctypes.sizeof(tcp_info_head))
    told = tcp_info_head.from_buffer_copy(raw)
    return TcpInfo(
        rtt_us=told.tcpi_rtt,
        min_rtt_us=told.tcpi_min_rtt,
        delivery_rate=told.tcpi_delivery_rate,
        app_limited=bool(told.tcpi_app_limited & 1),
        acknowledged_bytes=told.tcpi_bytes_acked,
        unsent_bytes=told.tcpi_notsent_bytes,
        queued_bytes=told.tcpi_notsent_bytes + told.tcpi_unacked * told.tcpi_snd_mss,
        retransmits=told.tcpi_total_retrans,
        silent_s=told.tcpi_last_data_recv / 1e3,
    )


def give_up_silence(connection: socket.socket, seconds: int) -> None:
    """End a connection whose other end has acknowledged nothing for so long (ETIMEDOUT), also one on which nothing is
    sent. Source: tcp(7), TCP_USER_TIMEOUT, TCP_KEEPIDLE."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 2))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 4))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)


def set_pacing_rate(connection: socket.socket, rate: float | None) -> None:
    """Send no faster than ``rate`` bytes/s, evenly; None is as fast as it goes. Works without the fq qdisc."""
    value = _UNPACED if rate is None else max(1, int(rate))
    connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("<Q", value))
