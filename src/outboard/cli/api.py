"""The command line's end of the agent's API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx

from outboard.agent.config import socket_path
from outboard.errors import UnreachableError, error_of


@contextlib.contextmanager
def _client() -> Iterator[httpx.Client]:
    path = socket_path()
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://agent", timeout=httpx.Timeout(30, read=None)
    ) as client:
        try:
            yield client
        except httpx.ConnectError as error:
            raise UnreachableError(f"no agent answers on {path}: {error}; start one with outboard agent") from error
        except httpx.TransportError as error:
            raise UnreachableError(
                f"the agent on {path} went away: {error}; the migration goes on without it"
            ) from error


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        body = response.json()
        raise error_of(body["exit_code"], body["error"])
    return response


def call(method: str, path: str, body: Any = None) -> Any:
    """One request; its JSON answer.

    :raise OutboardError: what the agent said, as its own kind of error.
    """
    with _client() as client:
        return _checked(client.request(method, path, json=body)).json()


def lines(path: str) -> Iterator[str]:
    """The lines of an answer that streams."""
    with _client() as client, client.stream("GET", path) as response:
        if response.is_error:
            response.read()
        yield from _checked(response).iter_lines()
