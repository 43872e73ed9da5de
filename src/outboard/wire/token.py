"""One-time tokens: what lets a stream into the one migration it belongs to."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from outboard.errors import NotAuthorisedError

_LIFE_S = 60.0


class TokenBook:
    """Tokens that were issued and not redeemed.

    :param clock: seconds, monotonic; a token lives for 60.

    Synchronization: one thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[str, tuple[str, float]] = {}

    def issue(self, purpose: str) -> str:
        """A token good for one redemption for ``purpose``; it replaces an earlier one for the same."""
        token = secrets.token_urlsafe(32)
        self._open[purpose] = (token, self._clock() + _LIFE_S)
        return token

    def redeem(self, token: str, purpose: str) -> None:
        """Use a token up.

        :raise NotAuthorisedError: it is none of ours, was used, has expired, or is for something else.
        """
        issued, until = self._open.get(purpose, ("", 0.0))
        if not issued or not hmac.compare_digest(issued.encode(), token.encode()) or self._clock() > until:
            raise NotAuthorisedError(f"the token for the {purpose} stream is wrong, was used already, or has expired")
        del self._open[purpose]
