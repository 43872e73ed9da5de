"""What the agent remembers of migrations, and which orders it passes on."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import msgspec
import pytest

from outboard.agent.migrations import Migrations
from outboard.errors import NotFoundError, RefusedError
from outboard.migrate.report import Progress
from outboard.migrate.states import SAFE_AT, State


def report(state: State) -> bytes:
    return msgspec.json.encode(
        Progress(
            migration="m1",
            vm="web",
            state=state,
            safe_at=SAFE_AT[state],
            elapsed=1.0,
            fraction=0.5,
            remaining_bytes=1,
            sent_bytes=1,
            rate=1.0,
            dirty_rate=None,
            eta=None,
            verdict="",
        )
    )


def played(play: Callable[[Migrations, Connection], Awaitable[None]]) -> None:
    """``play`` with one migration and the engine's end of its pipe, in an event loop."""
    ours, theirs = multiprocessing.Pipe()

    async def inside() -> None:
        migrations = Migrations()
        migrations.add("m1", "web", ours, lambda: None)
        await play(migrations, theirs)

    asyncio.run(inside())
    theirs.close()


async def heard(migrations: Migrations, engine: Connection, state: State) -> None:
    """The engine reports, and the agent has taken it in."""
    engine.send_bytes(report(state))
    while migrations.find("m1").state is not state:
        await asyncio.sleep(0)


@pytest.mark.parametrize("order", ["cancel", "switch"])
@pytest.mark.parametrize("state", [State.NEW, State.PREPARING, State.COPYING, State.SWITCHING])
def test_an_order_is_passed_on_as_long_as_it_can_be_obeyed(state: State, order: str) -> None:
    async def play(migrations: Migrations, engine: Connection) -> None:
        getattr(migrations, order)("m1")
        assert engine.poll(5)
        await heard(migrations, engine, state)
        engine.recv_bytes()
        getattr(migrations, order)("web")
        assert order.encode() in engine.recv_bytes()

    played(play)


@pytest.mark.parametrize("order", ["cancel", "switch"])
@pytest.mark.parametrize("state", [State.COMMITTED, State.POSTCOPY, State.RECOVERING])
def test_an_order_is_refused_when_the_vm_has_been_given_away(state: State, order: str) -> None:
    async def play(migrations: Migrations, engine: Connection) -> None:
        await heard(migrations, engine, state)
        with pytest.raises(RefusedError, match="given to its destination"):
            getattr(migrations, order)("web")
        assert not engine.poll(0)

    played(play)


def test_cancel_of_one_that_is_over_or_never_was() -> None:
    async def play(migrations: Migrations, engine: Connection) -> None:
        with pytest.raises(NotFoundError):
            migrations.cancel("db")
        engine.close()
        while not migrations.find("m1").ended:
            await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="is over"):
            migrations.cancel("m1")

    played(play)
