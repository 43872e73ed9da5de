"""The layers of a disk: the image that the guest writes to, and under it those that the ones above refer to.

An image below another is *fixed*: QEMU opens it read-only, and whoever wrote to it would spoil the disk above. So is
the top one of a read-only disk. Formats come from the VM's description and from the images' own headers, never from a
guess by content: that is the guest's to choose.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from outboard.errors import RefusedError
from outboard.pages import PAGE_SIZE
from outboard.stores.images.files import ImageFile
from outboard.stores.images.qcow2 import Qcow2

_MOST_LAYERS = 64


class DiskSpec(Protocol):
    """What is to be known of a disk: that of :class:`outboard.vmm.spec.Disk`."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def read_only(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """One image file of a disk.

    :ivar disk: the number of the disk among the VM's. :ivar depth: 0 is the top. :ivar fixed: nobody writes to it.
    :ivar qcow2: its metadata; None: raw.
    """

    disk: int
    depth: int
    file: ImageFile
    fixed: bool
    qcow2: Qcow2 | None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def size(self) -> int:
        """Bytes of the disk that it describes."""
        return self.file.size if self.qcow2 is None else self.qcow2.size

    def extents(self) -> list[tuple[int, int]]:
        """Where in the file whole blocks of the disk lie: (offset, length), multiples of 4 KiB, in order."""
        found = self.file.extents() if self.qcow2 is None else self._clusters(self.qcow2)
        merged: list[list[int]] = []
        end = self.file.size // PAGE_SIZE * PAGE_SIZE
        for offset, length in found:
            low = offset // PAGE_SIZE * PAGE_SIZE
            high = min(end, -(-(offset + length) // PAGE_SIZE) * PAGE_SIZE)
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            elif low < high:
                merged.append([low, high])
        return [(low, high - low) for low, high in merged]

    @staticmethod
    def _clusters(qcow2: Qcow2) -> list[tuple[int, int]]:
        """Where clusters lie, those that follow one another as one."""
        if qcow2.cluster < PAGE_SIZE:
            return []
        offsets = np.concatenate([np.empty(0, np.uint64), *(part.data[part.data != 0] for part in qcow2.clusters())])
        offsets = np.unique(offsets)
        if not offsets.size:
            return []
        begins = np.append(0, np.flatnonzero(np.diff(offsets) != qcow2.cluster) + 1)
        counts = np.diff(begins, append=offsets.size)
        return [
            (offset, count * qcow2.cluster)
            for offset, count in zip(offsets[begins].tolist(), counts.tolist(), strict=True)
        ]


def open_layers(disk: DiskSpec, number: int) -> list[Layer]:
    """Open a disk's images, the top one first.

    :param number: of the disk among the VM's.
    :raise NotFoundError: one is not there.
    :raise RefusedError: one is nothing that is understood here; the reason says what.
    :raise KernelError: one cannot be read.
    """
    layers: list[Layer] = []
    path, kind = Path(disk.path), disk.format
    try:
        while True:
            file = ImageFile(path)
            try:
                qcow2 = Qcow2(file) if kind == "qcow2" else None
            except BaseException:
                file.close()
                raise
            layers.append(Layer(number, len(layers), file, bool(layers) or disk.read_only, qcow2))
            if qcow2 is None or qcow2.backing is None:
                return layers
            path, kind = _below(layers[-1])
            if len(layers) == _MOST_LAYERS or any(path.exists() and path.samefile(one.path) for one in layers):
                raise RefusedError(
                    "image-chain", f"{layers[0].path} has more than {_MOST_LAYERS} images below it, or one is its own"
                )
    except BaseException:
        close_layers(layers)
        raise


def close_layers(layers: Iterable[Layer]) -> None:
    """Close their files. Idempotent."""
    for layer in layers:
        layer.file.close()


def _below(layer: Layer) -> tuple[Path, str]:
    """The path and the format of the image below."""
    if layer.qcow2 is None or layer.qcow2.backing is None:
        raise AssertionError("a raw image has none below")
    name, kind = layer.qcow2.backing, layer.qcow2.backing_format
    head = name.partition("/")[0]
    if ":" in head:
        name_of, _, rest = name.partition(":")
        if name_of != "file":
            raise RefusedError("image-protocol", f"{layer.path} is over {name!r}, which is no file of this host")
        name = rest
    if kind not in ("raw", "qcow2"):
        raise RefusedError(
            "image-format",
            f"{layer.path} says {kind or 'nothing'} of the format of {name}; raw and qcow2 are understood, and "
            "qemu-img rebase -u -F FORMAT notes it",
        )
    return layer.path.parent / name, kind


def read_disk(layers: list[Layer], offset: int, length: int) -> bytes:
    """What the guest reads from ``length`` bytes at ``offset`` of the disk, the layers being its own, top first.

    :raise RefusedError: ``image-damaged``. :raise KernelError: a read failed.
    """
    out = bytearray(length)
    _fill(layers, offset, memoryview(out))
    return bytes(out)


def _fill(layers: list[Layer], offset: int, out: memoryview) -> None:
    layer, length = layers[0], min(len(out), max(0, layers[0].size - offset))
    if not length:
        return
    if layer.qcow2 is None:
        layer.file.read_into(out[:length], offset)
        return
    cluster = layer.qcow2.cluster
    first = offset // cluster
    count = -(-(offset + length) // cluster) - first
    missing = dict.fromkeys(range(first, first + count))
    for part in layer.qcow2.clusters(first, count):
        for index in range(part.data.size):
            number = part.first + index
            low, high = max(offset, number * cluster), min(offset + length, (number + 1) * cluster)
            piece, inside = out[low - offset : high - offset], low - number * cluster
            if part.data[index]:
                layer.file.read_into(piece, int(part.data[index]) + inside)
            elif part.compressed[index]:
                content = layer.qcow2.unpacked(int(part.compressed[index]))
                piece[:] = content[inside : inside + len(piece)]
            elif not part.zero[index]:
                continue
            missing.pop(number)
    if len(layers) == 1:
        return
    for number in missing:
        low, high = max(offset, number * cluster), min(offset + length, (number + 1) * cluster)
        _fill(layers[1:], low, out[low - offset : high - offset])
