"""What ``outboard doctor`` finds: one line each."""

from __future__ import annotations

from enum import Enum

import msgspec


class Verdict(Enum):
    """What a finding means for this host."""

    OK = "ok"
    NOTE = "note"
    """The host can migrate VMs: slower, without something, or once it has been set up."""
    REFUSED = "refused"
    """The host cannot migrate VMs."""


class Finding(msgspec.Struct, frozen=True):
    """One line; ``mend`` is empty where there is nothing to mend."""

    check: str
    verdict: Verdict
    found: str
    follows: str
    mend: str = ""
