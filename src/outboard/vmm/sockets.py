"""unix(7) sockets that belong to a VM: opened without following a link, and with a look at who listens.

A directory of sockets may be writable to a VMM that has been taken over. A link laid there must not lead us to another
VM's socket, and what a socket says is believed of the process behind it only.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from pathlib import Path

from outboard.errors import UnreachableError

_UCRED = struct.Struct("3i")


def connect(path: Path, timeout: float, who: str) -> socket.socket:
    """Connect to the stream socket at ``path``, however long its name is.

    :param timeout: seconds that connecting may take, and each later call on the socket.
    :param who: what should listen there, for the message.
    :raise UnreachableError: nobody listens, or ``path`` is not a socket but a link or another file.
    """
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(timeout)
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mode = os.fstat(place).st_mode
            if not stat.S_ISSOCK(mode):
                kind = "a symbolic link; give the path it leads to" if stat.S_ISLNK(mode) else "not a socket"
                raise UnreachableError(f"no answer from {who} at {path}: it is {kind}")
            made.connect(f"/proc/self/fd/{place}")
        finally:
            os.close(place)
    except OSError as error:
        made.close()
        busy = isinstance(error, TimeoutError) or error.errno == errno.EAGAIN
        why = "too many others are connected to it" if busy else error.strerror
        raise UnreachableError(f"no answer from {who} at {path}: {why}") from error
    except UnreachableError:
        made.close()
        raise
    return made


def peer_pid(connected: socket.socket) -> int:
    """The process that called listen(2) on the other end. Source: unix(7), SO_PEERCRED."""
    return int(_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
