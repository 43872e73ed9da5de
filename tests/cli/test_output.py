"""Units as people write them."""

import click
import pytest

from outboard.cli.output import Bandwidth, Duration, size_text


@pytest.mark.parametrize(
    ("text", "octets"),
    [("1Gbit", 125_000_000), ("500Mbit/s", 62_500_000), ("100MB", 100_000_000), ("1.5gbit", 187_500_000)],
)
def test_bandwidth(text: str, octets: int) -> None:
    assert Bandwidth().convert(text, None, None) == octets


@pytest.mark.parametrize("text", ["fast", "1", "1 Gibit", "-1Mbit", "0Mbit", "1G"])
def test_no_bandwidth(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no rate"):
        Bandwidth().convert(text, None, None)


@pytest.mark.parametrize(("text", "seconds"), [("300ms", 0.3), ("1.5s", 1.5)])
def test_duration(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["300", "soon", "1m"])
def test_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(("octets", "text"), [(0, "0 B"), (4096, "4.1 kB"), (356e6, "356 MB"), (2.5e12, "2.5 TB")])
def test_sizes_for_people(octets: float, text: str) -> None:
    assert size_text(octets) == text
