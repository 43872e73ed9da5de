"""Claims from the demo's sessions: an arm's figure against another arm's."""

from __future__ import annotations

from collections.abc import Iterable

from demo.document import Arm, Document

from .claims import Claim, claim

OURS = "outboard-enlightened"


def arm_of(document: Document, name: str, *, churned: bool = True) -> Arm | None:
    """The arm of that name, if it ran."""
    return next((arm for arm in document.arms if arm.arm == name and arm.churned == churned), None)


def best_of(document: Document, figure: str, names: Iterable[str]) -> tuple[str, float] | None:
    """Which of the arms has the least median of a figure, and that."""
    found = []
    for name in names:
        arm = arm_of(document, name)
        value = None if arm is None else getattr(arm, figure)
        if value is not None:
            found.append((value, name))
    return (min(found)[1], min(found)[0]) if found else None


def against(
    document: Document,
    name: str,
    figure: str,
    peer: str | Iterable[str],
    bar: float,
    unit: str,
    scale: float = 1.0,
    our_arm: str = OURS,
) -> Claim:
    """Our figure by a peer arm's, or by the best of several.

    :param scale: from the figure's unit to the one shown.
    """
    ours = arm_of(document, our_arm)
    best = best_of(document, figure, [peer] if isinstance(peer, str) else peer)
    value = None if ours is None else getattr(ours, figure)
    spread = None if ours is None else ours.spread.get(figure)
    return claim(
        name,
        None if value is None else value * scale,
        bar,
        unit,
        0 if ours is None else ours.runs,
        peer=None if best is None else best[1] * scale,
        against="an arm that did not converge" if best is None else best[0],
        spread=None if spread is None else (spread.min * scale, spread.max * scale),
    )


def alone(
    document: Document, name: str, figure: str, bar: float, unit: str, *, worst: bool = False, at_least: bool = False
) -> Claim:
    """Our figure by itself.

    :param worst: judge the most of all runs instead of the median.
    """
    ours = arm_of(document, OURS)
    spread = None if ours is None else ours.spread.get(figure)
    return claim(
        name,
        None if spread is None else spread.max if worst else spread.median,
        bar,
        unit,
        0 if ours is None else ours.runs,
        spread=None if spread is None else (spread.min, spread.max),
        at_least=at_least,
    )
