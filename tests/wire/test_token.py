"""A token is good once, for one purpose, for a minute."""

import pytest

from outboard.errors import NotAuthorisedError
from outboard.wire.token import TokenBook


def test_once_and_for_its_purpose() -> None:
    book = TokenBook(lambda: 0.0)
    token = book.issue("bulk")
    for wrong, purpose in (("", "bulk"), ("guess", "bulk"), (token, "urgent"), (token + "x", "bulk")):
        with pytest.raises(NotAuthorisedError):
            book.redeem(wrong, purpose)
    book.redeem(token, "bulk")
    with pytest.raises(NotAuthorisedError):
        book.redeem(token, "bulk")


def test_it_expires() -> None:
    now = [0.0]
    book = TokenBook(lambda: now[0])
    token = book.issue("bulk")
    now[0] = 61.0
    with pytest.raises(NotAuthorisedError):
        book.redeem(token, "bulk")


def test_a_new_one_replaces_the_old() -> None:
    book = TokenBook(lambda: 0.0)
    old, new = book.issue("bulk"), book.issue("bulk")
    with pytest.raises(NotAuthorisedError):
        book.redeem(old, "bulk")
    book.redeem(new, "bulk")
