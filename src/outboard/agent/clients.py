"""Clients: whoever gives orders at the socket of an engine."""

from __future__ import annotations

import os
import select
import socket
from multiprocessing.connection import Connection
from pathlib import Path


class Clients:
    """Takes clients in at a socket ``path``, in the place of one that a predecessor left there.

    :param also: a descriptor to wait for as well; ``called`` says whether it was readable the last time.
    :raise OSError: there can be no socket.

    Synchronization: one thread.
    """

    def __init__(self, path: Path, also: int | None = None) -> None:
        self.called = False
        self._also = also
        self._clients: dict[int, Connection] = {}
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        # By the directory's descriptor: the path may be longer than an address.
        place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(f"/proc/self/fd/{place}/{path.name}")
            path.chmod(0o660)
            self._listener.listen()
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.close(place)
        self._poll = select.poll()
        for fd in (self._listener.fileno(), *([] if also is None else [also])):
            self._poll.register(fd, select.POLLIN)

    def speaking(self, seconds: float) -> list[Connection]:
        """Wait for so long at most; who says something, or has gone."""
        ready = {fd for fd, _ in self._poll.poll(seconds * 1000)}
        self.called = self._also in ready
        found = [self._clients[fd] for fd in ready if fd in self._clients]
        if self._listener.fileno() in ready:
            client = Connection(self._listener.accept()[0].detach())
            self._clients[client.fileno()] = client
            self._poll.register(client.fileno(), select.POLLIN)
        return found

    def drop(self, client: Connection) -> None:
        """One that has gone."""
        self._poll.unregister(client.fileno())
        del self._clients[client.fileno()]
        client.close()

    def turn_away(self) -> None:
        """Take nobody in any more; who is there already can still be answered. Idempotent."""
        self._listener.close()

    def close(self) -> None:
        """Hang up on everybody: nobody waits for an answer that will not come. Idempotent."""
        self.turn_away()
        while self._clients:
            self._clients.popitem()[1].close()
