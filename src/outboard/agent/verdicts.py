"""Whether a migration to here was committed: decided once, by whoever comes first, and kept.

The engine commits before it lets the VM run. When the source has lost touch in that moment its agent asks ours, which
swears off whatever is not committed yet. Each is a link(2) of a file that says so to the same name, which succeeds
once. The files lie on a disk: a host that has been switched off remembers what it has sworn.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

import msgspec

from outboard.errors import NotAuthorisedError, PeerError

_COMMITTED, _REFUSED = "committed", "refused"
_ID = re.compile("[0-9a-zA-Z-]{1,64}")
_KEPT_S = 30 * 86_400
"""A source that has not asked for a month has been told, or is gone."""


class _Coming(msgspec.Struct, frozen=True):
    """A migration that was announced to us."""

    source: str
    vm: str


class Verdicts:
    """The verdicts of this host, in ``directory``.

    Synchronization: any number of processes; the file system decides.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _file(self, migration: str, kind: str) -> Path:
        """The id comes from another host, and becomes the name of a file."""
        if not _ID.fullmatch(migration):
            raise PeerError(f"{migration!r} is no id of a migration")
        return self.directory / f"{migration}.{kind}"

    def _decide(self, migration: str, verdict: str) -> bool:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = self._file(migration, "verdict")
        draft = self._file(migration, secrets.token_hex(4))
        with draft.open("w") as file:
            file.write(verdict)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, place)
        except FileExistsError:
            return place.read_text() == verdict
        finally:
            draft.unlink()
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return True

    def expect(self, migration: str, source: str, vm: str) -> None:
        """A migration of ``vm`` from ``source`` is coming.

        :raise PeerError: its id is none.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prune()
        self._file(migration, "json").write_bytes(msgspec.json.encode(_Coming(source, vm)))

    def coming(self, migration: str, source: str) -> str:
        """The VM of a migration from ``source``.

        :raise NotAuthorisedError: no such migration was announced, or not by that host.
        """
        try:
            found = msgspec.json.decode(self._file(migration, "json").read_bytes(), type=_Coming)
        except FileNotFoundError:
            found = None
        if found is None or found.source != source:
            raise NotAuthorisedError(f"no migration {migration} from {source} has come here")
        return found.vm

    def commit(self, migration: str) -> bool:
        """The VM is ours from now on; False: that was sworn off."""
        return self._decide(migration, _COMMITTED)

    def refuse(self, migration: str) -> bool:
        """The VM will never be ours; False: it is already."""
        return self._decide(migration, _REFUSED)

    def note_arrived(self, migration: str, message: bytes) -> None:
        """No page is missing any more; ``message`` is what the source is told of it, also when it asks again."""
        self._file(migration, "arrived").write_bytes(message)

    def arrived(self, migration: str) -> bytes | None:
        """What :meth:`note_arrived` has kept."""
        try:
            return self._file(migration, "arrived").read_bytes()
        except FileNotFoundError:
            return None

    def _prune(self) -> None:
        oldest = time.time() - _KEPT_S
        for file in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < oldest:
                    file.unlink()
