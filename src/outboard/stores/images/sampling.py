"""Whether two hosts see the same image: both look at places that one of them has just chosen, and compare digests.

It says that they have the same file, or one very like it. It need not say more: whoever uses a block of it compares
that block's own digest.
"""

from __future__ import annotations

import hashlib
import random
import re

from outboard.errors import KernelError, PeerError
from outboard.pages import PAGE_SIZE
from outboard.stores.images.files import ImageFile

_HEAD = 64 * 1024
_PLACES = 16
_NONCE = re.compile("[0-9a-f]{32}")


def sample(file: ImageFile, nonce: str) -> str:
    """A digest of an image's size, its first 64 KiB, and 16 blocks that ``nonce`` chooses; empty if it cannot be read.

    :param nonce: 32 hexadecimal digits, from whoever asks.
    :raise PeerError: it is no nonce.
    """
    if _NONCE.fullmatch(nonce) is None:
        raise PeerError(f"{nonce[:40]!r} is no nonce of 32 hexadecimal digits")
    size = file.size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16, key=bytes.fromhex(nonce))
    chance = random.Random(nonce)  # noqa: S311  # both hosts must draw the same
    places = [(0, _HEAD)]
    places += [(chance.randrange(max(1, size // PAGE_SIZE)) * PAGE_SIZE, PAGE_SIZE) for _ in range(_PLACES)]
    room = bytearray(_HEAD)
    try:
        for offset, length in places:
            file.read_into(memoryview(room)[:length], offset)
            digest.update(room[:length])
    except KernelError:
        return ""
    return digest.hexdigest()
