"""Draws the states of a migration from their table: `python -m docs.states_diagram` writes docs/states.svg.

The chain of states from NEW by what happens when all goes well runs down the middle; where CANCEL and FAIL lead stands
beside it, as a tall box that an arrow from each of its sources reaches straight. BREAK leads to the left, from where
RECOVERED leads back and FAIL on to the right, below the chain; REFUSED leads up to what FAIL leads to there. Bands
behind the states say where the VM is safe. A table that has another shape is refused: the picture would be wrong.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from pathlib import Path

from outboard.migrate.states import SAFE_AT, TRANSITIONS, Event, State, Where

OUTPUT = Path(__file__).with_name("states.svg")

_ASIDE = (Event.CANCEL, Event.FAIL, Event.BREAK, Event.RECOVERED, Event.REFUSED)
_ROW = 78
_BELOW = 15
"""How far a box with a way below the chain reaches down."""
_BOX_WIDTH, _BOX_HEIGHT = 150, 38
_WIDTH, _TOP = 930, 20
_MIDDLE, _LEFT, _RIGHT = 390, 110, 670
_LABEL = 775
_FILL = {Where.SOURCE: "#e8f1fb", Where.BOTH: "#fdf0dc", Where.DESTINATION: "#e6f4e7"}
_SAYS = {
    Where.SOURCE: ("whole at the", "source"),
    Where.BOTH: ("the destination alone", "may run it; pages at both"),
    Where.DESTINATION: ("whole at the", "destination"),
}
_STYLE = (
    "text{font:14px sans-serif;fill:#1b1f24}.event{font-size:12px;fill:#44505c}.where{font-size:12px;font-style:italic}"
    ".state{fill:#fff;stroke:#1b1f24;stroke-width:1.4}.way{stroke:#44505c;stroke-width:1.4;marker-end:url(#head)}"
)


def main_line() -> list[State]:
    """The states from NEW on, as long as all goes well.

    :raise ValueError: the table forks, or turns back.
    """
    line = [State.NEW]
    while True:
        onward = [
            target for (source, event), target in TRANSITIONS.items() if source is line[-1] and event not in _ASIDE
        ]
        if not onward:
            return line
        if len(onward) > 1 or onward[0] in line:
            raise ValueError(
                f"{line[-1].name} leads to {[state.name for state in onward]}: draw the table by other means"
            )
        line += onward


def sides(line: list[State], event: Event) -> dict[State, list[int]]:
    """Where ``event`` leads from the main line: each target with the rows of its sources, which are neighbours.

    :raise ValueError: the sources of one target are not neighbours.
    """
    found: dict[State, list[int]] = {}
    for row, state in enumerate(line):
        target = TRANSITIONS.get((state, event))
        if target is not None:
            found.setdefault(target, []).append(row)
    for target, rows in found.items():
        if rows != list(range(rows[0], rows[-1] + 1)):
            raise ValueError(f"{event.name} leads to {target.name} from rows {rows}: draw the table by other means")
    return found


def _middle_of(row: int) -> int:
    return _TOP + _ROW * row + _ROW // 2


def _box(x: int, top: int, bottom: int, state: State) -> str:
    return (
        f'<rect class="state" x="{x - _BOX_WIDTH // 2}" y="{top}" width="{_BOX_WIDTH}" height="{bottom - top}" rx="6"/>'
        f'<text x="{x}" y="{(top + bottom) // 2 + 5}" text-anchor="middle">{escape(state.value)}</text>'
    )


def _way(x1: int, y1: int, x2: int, y2: int, event: Event, label: tuple[int, int], anchor: str) -> str:
    return (
        f'<line class="way" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
        f'<text class="event" x="{label[0]}" y="{label[1]}" text-anchor="{anchor}">{escape(event.value)}</text>'
    )


def _bands(line: list[State]) -> list[str]:
    parts = []
    for where, group in groupby(range(len(line)), key=lambda row: SAFE_AT[line[row]]):
        rows = list(group)
        top, height = _TOP + _ROW * rows[0], _ROW * len(rows)
        parts.append(f'<rect x="0" y="{top}" width="{_WIDTH}" height="{height}" fill="{_FILL[where]}"/>')
        for index, words in enumerate(_SAYS[where]):
            y = top + height // 2 + 16 * index - 2
            parts.append(f'<text class="where" x="{_LABEL}" y="{y}" text-anchor="start">{escape(words)}</text>')
    return parts


def _detour(line: list[State]) -> list[str]:
    """BREAK from the chain to the left, RECOVERED back, and FAIL from there on to the right."""
    parts = []
    half = _BOX_WIDTH // 2
    for target, (row, *_) in sides(line, Event.BREAK).items():
        y = _middle_of(row)
        parts.append(_box(_LEFT, y - 19, y + 19 + _BELOW, target))
        near, far, middle = _MIDDLE - half, _LEFT + half, (_LEFT + _MIDDLE) // 2
        parts.append(_way(near, y - 8, far + 3, y - 8, Event.BREAK, (middle, y - 13), "middle"))
        if TRANSITIONS.get((target, Event.RECOVERED)) is line[row]:
            parts.append(_way(far, y + 8, near - 3, y + 8, Event.RECOVERED, (middle, y + 22), "middle"))
        if TRANSITIONS.get((target, Event.FAIL)) is TRANSITIONS[line[row], Event.FAIL]:
            below = y + 19 + _BELOW - 7
            parts.append(_way(far, below, _RIGHT - half - 3, below, Event.FAIL, (_RIGHT - half - 40, below - 4), "end"))
    return parts


def _refusal(line: list[State]) -> list[str]:
    """REFUSED from the chain up to what FAIL leads to from the state before."""
    parts = []
    for target, (row, *_) in sides(line, Event.REFUSED).items():
        if target is TRANSITIONS[line[row - 1], Event.FAIL]:
            start, end = (_MIDDLE + 40, _middle_of(row) - 19), (_RIGHT - 40, _middle_of(row - 1) + 19 + 3)
            label = ((start[0] + end[0]) // 2 - 12, (start[1] + end[1]) // 2 - 6)
            parts.append(_way(*start, *end, Event.REFUSED, label, "end"))
    return parts


def draw() -> str:
    """The diagram as SVG.

    :raise ValueError: the table has a transition that has no place in it.
    """
    line = main_line()
    parts = _bands(line)
    half = _BOX_WIDTH // 2
    drawn = 0
    for row, state in enumerate(line):
        y = _middle_of(row)
        parts.append(_box(_MIDDLE, y - _BOX_HEIGHT // 2, y + _BOX_HEIGHT // 2, state))
        if row:
            (event,) = [
                event for (source, event), target in TRANSITIONS.items() if (source, target) == (line[row - 1], state)
            ]
            low, high = y - _ROW + _BOX_HEIGHT // 2, y - _BOX_HEIGHT // 2
            parts.append(_way(_MIDDLE, low, _MIDDLE, high - 3, event, (_MIDDLE + 8, (low + high) // 2 + 4), "start"))
            drawn += 1
    for event, column in ((Event.CANCEL, _LEFT), (Event.FAIL, _RIGHT)):
        toward = 1 if column > _MIDDLE else -1
        for target, rows in sides(line, event).items():
            if SAFE_AT[target] is not SAFE_AT[line[rows[0]]]:
                raise ValueError(f"{target.name} would stand in the band of {line[rows[0]].name}")
            detour = any(source not in line for (source, by), to in TRANSITIONS.items() if (by, to) == (event, target))
            below = _BELOW if detour else 0
            parts.append(_box(column, _middle_of(rows[0]) - 19, _middle_of(rows[-1]) + 19 + below, target))
            for row in rows:
                y = _middle_of(row)
                start, end = _MIDDLE + toward * half, column - toward * (half + 3)
                parts.append(_way(start, y, end, y, event, ((start + end) // 2, y - 5), "middle"))
                drawn += 1
    for way in (*_detour(line), *_refusal(line)):
        parts.append(way)
        drawn += way.count("<line")
    if drawn != len(TRANSITIONS):
        raise ValueError(f"{len(TRANSITIONS)} transitions, {drawn} of them drawn")
    height = _TOP * 2 + _ROW * len(line)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' role="img" aria-label="The states of a migration">'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#44505c"/></marker></defs>'
        f'<style>{_STYLE}</style><rect width="{_WIDTH}" height="{height}" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    OUTPUT.write_text(draw())
