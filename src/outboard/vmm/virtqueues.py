"""Virtqueues: where a guest's virtio devices find their work, and which pages that work is in.

QEMU tells the addresses of the rings (``x-query-virtio`` and its kin, QEMU 7.2); what is in them is read from the
guest's memory. Of a split ring the requests between the index that the device has used last and the one that the
driver has made available last are in flight: QEMU drains its disks before it saves them, and its network and serial
devices work in order, so few others can be. Of a packed ring they are the descriptors whose two flags differ, and, as
the rest of a chain keeps its flags when the chain has been used, some that no longer are.

All of this is a hint: what is missed costs a fault, what is too much costs its bytes. A guest writes rings as it
likes, so lengths, indices and chains are bounded, and addresses count only where there is RAM.

Source: Virtual I/O Device (VIRTIO) 1.2, sections 2.7 and 2.8; QEMU's qapi/virtio.json.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import OutboardError
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest
from outboard.vmm.monitor import Monitor

_ASK_S = 2.0
"""The longest that QEMU may take to tell all of it."""
_MOST_QUEUES = 1024
_MOST_PIECES = 4096
"""Pieces of requests of one VM that are looked at."""
_MOST_PAGES = 4096
"""Pages of requests of one VM that are told: 16 MiB."""
_TOP = 1 << 62
"""Addresses from here on are nobody's."""
_MOST_INDIRECT = 1024
"""Entries of one indirect table: QEMU takes no longer ones (VIRTQUEUE_MAX_SIZE)."""

_VAPIC_ROM = (0xC0000, 0x3000)
"""The option ROM of the virtual APIC on x86, which QEMU reads as it loads that device."""

_DESCRIPTOR = struct.Struct("<QIHH")
"""struct virtq_desc: address, length, flags, next; of a packed ring address, length, id, flags."""
_NEXT, _INDIRECT = 1, 4
_AVAILABLE, _USED = 1 << 7, 1 << 15
_INDEX = struct.Struct("<2xH")

Read = Callable[[int, int], bytes | None]
"""The bytes at a guest-physical address, so many of them; None where not all of that is RAM."""


class _Features(msgspec.Struct):
    transports: list[str] = []


class _Device(msgspec.Struct, rename="kebab"):
    """VirtioStatus, of it what matters here."""

    num_vqs: int
    guest_features: _Features
    started: bool


class _QueueStatus(msgspec.Struct, rename="kebab"):
    """VirtQueueStatus, of it what matters here."""

    vring_num: int
    vring_desc: int
    vring_avail: int
    vring_used: int


@dataclass(frozen=True, slots=True)
class Queue:
    """One virtqueue: ``size`` entries; the guest-physical addresses of its parts.

    Of a packed ring ``driver`` and ``device`` are the two event suppression structures.
    """

    size: int
    descriptors: int
    driver: int
    device: int
    packed: bool = False

    def parts(self) -> list[tuple[int, int]]:
        """Guest-physical address and bytes of each part."""
        if self.packed:
            return [(self.descriptors, 16 * self.size), (self.driver, 4), (self.device, 4)]
        return [(self.descriptors, 16 * self.size), (self.driver, 6 + 2 * self.size), (self.device, 6 + 8 * self.size)]


@dataclass(frozen=True, slots=True)
class Queues:
    """The queues of a VM's devices that the guest has set up; ``words`` say how many, or why there are none."""

    queues: tuple[Queue, ...]
    words: str


def find(monitor: Monitor) -> Queues:
    """Ask QEMU for the rings of all devices. What it does not tell is said, never raised."""
    found: list[Queue] = []
    left_out: list[str] = []
    devices = 0
    deadline = time.monotonic() + _ASK_S

    def ask(command: str, **arguments: object) -> Any:
        return monitor.execute(command, timeout=max(0.01, deadline - time.monotonic()), **arguments)

    try:
        for entry in ask("x-query-virtio"):
            path, name = str(entry["path"]), str(entry["name"])
            device = msgspec.convert(ask("x-query-virtio-status", path=path), type=_Device)
            if not device.started:
                continue
            if _has(device, "VIRTIO_F_IOMMU_PLATFORM"):
                left_out.append(f"{name} is behind an IOMMU, its rings' addresses are not the guest's physical ones")
                continue
            devices += 1
            for index in range(min(device.num_vqs, _MOST_QUEUES - len(found))):
                status = msgspec.convert(ask("x-query-virtio-queue-status", path=path, queue=index), type=_QueueStatus)
                # A queue without an address is one that the driver has not set up.
                if status.vring_desc > 0 and 0 < status.vring_num <= 1 << 15:
                    packed = _has(device, "VIRTIO_F_RING_PACKED")
                    found.append(
                        Queue(status.vring_num, status.vring_desc, status.vring_avail, status.vring_used, packed)
                    )
    except (OutboardError, msgspec.ValidationError, KeyError, TypeError) as error:
        left_out.append(f"QEMU does not tell the rest: {error}" if found else f"QEMU does not tell: {error}")
    words = f"{len(found)} queues of {devices} devices" if found else "none"
    return Queues(tuple(found), "; ".join([words, *left_out]))


def _has(device: _Device, feature: str) -> bool:
    return any(line.startswith(feature) for line in device.guest_features.transports)


def pieces(queue: Queue, read: Read) -> Iterator[tuple[int, int]]:
    """What the requests in flight are made of: guest-physical address and bytes of each piece, in no order.

    Indirect tables are among them. However the ring is written, no descriptor of it comes twice.
    """
    table = read(queue.descriptors, 16 * queue.size)
    if table is None:
        return
    for address, length, flags in _packed(table) if queue.packed else _split(queue, table, read):
        yield address, length
        if flags & _INDIRECT:
            inner = read(address, min(length // 16, _MOST_INDIRECT) * 16)
            for piece, size, _, _ in _DESCRIPTOR.iter_unpack(inner or b""):
                yield piece, size


def _packed(table: bytes) -> Iterator[tuple[int, int, int]]:
    for address, length, _, flags in _DESCRIPTOR.iter_unpack(table):
        if bool(flags & _AVAILABLE) != bool(flags & _USED):
            yield address, length, flags


def _split(queue: Queue, table: bytes, read: Read) -> Iterator[tuple[int, int, int]]:
    available, used = read(queue.driver, 4 + 2 * queue.size), read(queue.device, 4)
    if available is None or used is None:
        return
    done, ready = _INDEX.unpack(used)[0], _INDEX.unpack_from(available)[0]
    waiting = (ready - done) & 0xFFFF
    if waiting > queue.size:
        return
    heads = struct.unpack_from(f"<{queue.size}H", available, 4)
    seen = bytearray(queue.size)
    for index in range(done, done + waiting):
        # Indices run freely over 16 bits; a split ring's size is a power of two.
        at = heads[(index & 0xFFFF) % queue.size]
        while at < queue.size and not seen[at]:
            seen[at] = 1
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * at)
            yield address, length, flags
            at = following if flags & _NEXT else queue.size


class DevicePages:
    """The pages that the devices of ``guest`` are about to touch.

    Synchronization: none; it only reads.
    """

    def __init__(self, guest: Guest, found: Queues) -> None:
        self._guest = guest
        self._queues = found.queues

    def rings(self) -> PageSet:
        """Those of the rings, and what QEMU itself reads as it loads its devices."""
        if not self._queues:
            return PageSet(self._guest.pages)
        places = [_VAPIC_ROM, *(part for queue in self._queues for part in queue.parts())]
        parts = [self._numbers(address, size) for address, size in places]
        return self._set(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))

    def in_flight(self) -> PageSet:
        """Those of the requests in flight now, as far as there are not too many.

        :raise KernelError: the guest's memory cannot be read.
        """
        everything = (piece for queue in self._queues for piece in pieces(queue, self._read))
        usable = [(at, size) for at, size in islice(everything, _MOST_PIECES) if size > 0 and at < _TOP]
        if not usable:
            return PageSet(self._guest.pages)
        table: NDArray[np.int64] = np.array(usable, dtype=np.int64)
        first = table[:, 0] // PAGE_SIZE
        counts = (table[:, 0] + table[:, 1] - 1) // PAGE_SIZE + 1 - first
        # Cut where there are too many.
        counts = np.clip(_MOST_PAGES - (np.cumsum(counts) - counts), 0, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._set(self._guest.pages_of_pfns(np.repeat(first, counts) + within))

    def _set(self, numbers: NDArray[np.int64]) -> PageSet:
        return PageSet.from_numbers(self._guest.pages, numbers[numbers >= 0])

    def _numbers(self, address: int, size: int) -> NDArray[np.int64]:
        """The page numbers of a range of guest-physical addresses; -1 where there is no RAM."""
        if size <= 0 or not 0 <= address < _TOP:
            return np.zeros(0, dtype=np.int64)
        frames: NDArray[np.int64] = np.arange(address // PAGE_SIZE, -(-(address + size) // PAGE_SIZE), dtype=np.int64)
        return self._guest.pages_of_pfns(frames)

    def _read(self, address: int, size: int) -> bytes | None:
        numbers = self._numbers(address, size)
        if not numbers.size or bool((numbers < 0).any()):
            return None
        buffer = bytearray(numbers.size * PAGE_SIZE)
        with memoryview(buffer) as view:
            cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
            for part in np.split(np.arange(numbers.size), cuts):
                low, high = int(part[0]) * PAGE_SIZE, (int(part[-1]) + 1) * PAGE_SIZE
                self._guest.memory.read_into(int(numbers[part[0]]), view[low:high])
        at = address % PAGE_SIZE
        return bytes(buffer[at : at + size])
