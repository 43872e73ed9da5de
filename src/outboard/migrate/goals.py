"""Goals: what a user wants of a migration, and the settings that follow from it, as one table.

A goal sets every option that it has an opinion on; what the user says explicitly overrides it, option by option.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec

from outboard.errors import UsageError
from outboard.migrate.codec import Compress
from outboard.migrate.method import Goal, Method, Options

SETTINGS: Mapping[Goal, Mapping[str, Any]] = {
    Goal.DOWNTIME: {"method": Method.ENLIGHTENED, "hints": True, "max_downtime": 0.1},
    Goal.TIME: {"method": Method.ENLIGHTENED, "hints": True},
    Goal.BANDWIDTH: {"method": Method.ENLIGHTENED, "hints": True, "compress": Compress.ZSTD},
    Goal.GUEST_SPEED: {"method": Method.HYBRID, "hints": True, "throttle": False, "compress": Compress.NONE},
}
"""What each goal sets; what is not named keeps its default."""

WHY: Mapping[Goal, str] = {
    Goal.DOWNTIME: "each page goes once after a short pause, in which re-sending may take no more than 25 ms",
    Goal.TIME: "what the guest holds free does not go, and each page goes once after the resume, whatever it writes",
    Goal.BANDWIDTH: "what the guest holds free does not go, few pages go twice, and all are packed",
    Goal.GUEST_SPEED: "rounds while they help, so that few pages are missing after the resume; nobody is held back, "
    "and packing takes no processor from the guest",
}
"""Why these settings serve the goal."""


def options_for(goal: Goal | None, explicit: Mapping[str, Any]) -> Options:
    """The options of a migration: the defaults, overridden by the goal's settings, overridden by what was said.

    :param explicit: options by their names in :class:`~outboard.migrate.method.Options`, as JSON has them.
    :raise UsageError: there is no such option, or it does not take that value.
    """
    settings = {} if goal is None else {"goal": goal.value, **_as_json(SETTINGS[goal])}
    try:
        return msgspec.convert({**settings, **explicit}, type=Options)
    except msgspec.ValidationError as error:
        raise UsageError(f"the options of a migration: {error}") from error


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
