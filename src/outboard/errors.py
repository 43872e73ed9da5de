"""Every error that Outboard raises on purpose, as one tree.

::

    OutboardError                  the operation failed; where a VM is concerned it is safe at the source   exit 1
    ├── UsageError                 you asked for something that cannot be meant                             exit 2
    │   └── SpecError              a file you wrote does not fit its schema
    ├── NotFoundError              no such VM, host, migration or file                                      exit 3
    ├── RefusedError               a check said no before anything was touched; ``reason`` is a stable word exit 4
    ├── CancelledError             cancelled on request; the VM runs at the source                          exit 5
    ├── NeedsRecoveryError         paused after the switch-over; no page is lost                            exit 6
    ├── NotAuthorisedError         a certificate, a token or a credential was not accepted                  exit 7
    ├── UnreachableError           an agent, a host or a monitor did not answer                             exit 8
    ├── PeerError                  what came over a socket or from a guest broke the protocol               exit 1
    ├── StoreFullError             no room for a page that was to be put away: it stays where it is          exit 1
    ├── DamagedPageError           a page that was put away is not what it was: it is not used               exit 1
    └── KernelError (an OSError)   a system call failed; ``operation`` names it                             exit 1

A message says what was attempted, on what, what came back, and what to do about it. Library code raises;
only the command line prints and exits.
"""

from __future__ import annotations

import os
from typing import ClassVar


class OutboardError(Exception):
    """The root of the tree; ``exit_code`` is what the command line exits with."""

    exit_code: ClassVar[int] = 1


class UsageError(OutboardError):
    """The request cannot be meant as it stands."""

    exit_code = 2


class SpecError(UsageError):
    """A file written by a person does not fit its schema; the message names the key and a near one that exists."""


class NotFoundError(OutboardError):
    """Nothing has that name."""

    exit_code = 3


class RefusedError(OutboardError):
    """A check refused before anything was touched.

    :param reason: a stable, machine-readable word, such as ``vfio`` or ``anonymous-memory``.
    """

    exit_code = 4

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CancelledError(OutboardError):
    """Somebody cancelled; the VM runs at the source."""

    exit_code = 5


class NeedsRecoveryError(OutboardError):
    """The VM is paused after its switch-over and needs its peer back; no page is lost."""

    exit_code = 6


class NotAuthorisedError(OutboardError):
    """The other side's certificate or token, or our own credential, was not accepted."""

    exit_code = 7


class UnreachableError(OutboardError):
    """An agent, a host or a monitor did not answer in time."""

    exit_code = 8


class PeerError(OutboardError):
    """What came over a socket or from a guest broke the protocol; the connection is unusable from then on."""


class StoreFullError(OutboardError):
    """A store has no room; nothing of what was being put there has been kept, and all of it is where it was."""


class DamagedPageError(OutboardError):
    """A page that was put away came back as something else; it is named, and never used."""


class KernelError(OutboardError, OSError):
    """A system call failed.

    :param operation: the call and what it was applied to, as it should read in the message.
    :param number: the errno.
    """

    def __init__(self, operation: str, number: int) -> None:
        OSError.__init__(self, number, f"{operation}: {os.strerror(number)}")
        self.operation = operation

    def __str__(self) -> str:
        return f"{self.operation}: {os.strerror(self.errno or 0)}"


_BY_EXIT_CODE: dict[int, type[OutboardError]] = {
    kind.exit_code: kind
    for kind in (
        OutboardError,
        UsageError,
        NotFoundError,
        CancelledError,
        NeedsRecoveryError,
        NotAuthorisedError,
        UnreachableError,
    )
}


def error_of(exit_code: int, words: str) -> OutboardError:
    """The error that another process of ours, here or on another host, has told of by its exit code and its words."""
    if exit_code == RefusedError.exit_code:
        return RefusedError("told", words)
    return _BY_EXIT_CODE.get(exit_code, OutboardError)(words)
