"""unix(7) sockets that belong to a VM: opened without following a link, and with a look at who listens.

A directory of sockets may be writable to a VMM that has been taken over. A link laid there must not lead us to another
VM's socket, and what a socket says is believed of the process behind it only.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from outboard.errors import KernelError, RefusedError, UnreachableError
from outboard.linux import pidfd

SO_PEERPIDFD = 77
"""Linux 6.5; Python has no name for it."""
_UCRED = struct.Struct("3i")
_INT = struct.Struct("i")


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


def listen(path: Path, mode: int = 0o660) -> socket.socket:
    """Listen at ``path``, however deep it lies; what a dead process has left there is replaced.

    :raise RefusedError: ``path-taken``: somebody listens there, or it is no socket.
    :raise KernelError: the directory is not there, is a link, or cannot be written to.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            place = f"/proc/self/fd/{directory}/{path.name}"
            # bind(2) gives the file the socket's mode, less the umask: there is no moment when all may connect.
            os.fchmod(made.fileno(), mode)
            try:
                made.bind(place)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _clear(path, directory)
                made.bind(place)
            _set_mode(path.name, directory, mode)
        finally:
            os.close(directory)
        made.listen()
    except OSError as error:
        made.close()
        if isinstance(error, KernelError):
            raise
        # Python itself refuses a name that does not fit an address, and gives no errno.
        raise KernelError(f"listen at {path}", error.errno or errno.ENAMETOOLONG) from error
    except RefusedError:
        made.close()
        raise
    return made


def _clear(path: Path, directory: int) -> None:
    """Remove a socket that nobody listens at."""
    if not stat.S_ISSOCK(os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise RefusedError("path-taken", f"cannot listen at {path}: there is something that is no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN, a full queue, is somebody who listens, too.
        if probe.connect_ex(f"/proc/self/fd/{directory}/{path.name}") != errno.ECONNREFUSED:
            raise RefusedError(
                "path-taken", f"cannot listen at {path}: another process does; end it, or use another path"
            )
    os.unlink(path.name, dir_fd=directory)


def _set_mode(name: str, directory: int, mode: int) -> None:
    """Give what the umask has taken; never through a link that has been laid in the file's place."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101  # the man page's name for it
    finally:
        os.close(fd)


def readable(which: Iterable[socket.socket], timeout: float) -> list[socket.socket]:
    """Those that have something to read, or have ended; waits ``timeout`` seconds for the first of them."""
    sockets = {one.fileno(): one for one in which}
    poll = select.poll()
    for fd in sockets:
        poll.register(fd, select.POLLIN)
    # poll(2) counts in milliseconds: round up, or the last of them would be spent in a loop.
    return [sockets[fd] for fd, _ in poll.poll(math.ceil(max(timeout, 0.0) * 1000))]


def peer_pidfd(connected: socket.socket) -> int:
    """A descriptor of the process of :func:`peer_pid`, readable when that has ended.

    Before Linux 6.5 it is opened by number, and could be of a process that has taken the number over meanwhile.

    :raise KernelError: it has ended already.
    """
    try:
        return int(_INT.unpack(connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, _INT.size))[0])
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise KernelError("SO_PEERPIDFD", error.errno or errno.EIO) from error
    return pidfd.open(peer_pid(connected))


def peer_pid(connected: socket.socket) -> int:
    """The process on the other end: the one that called connect(2), or there listen(2); 0 if we cannot see it.

    Source: unix(7), SO_PEERCRED.
    """
    return int(_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
