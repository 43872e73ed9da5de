"""Pictures of curves, in dots and in SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from outboard.cli.plots import decades, html_page, rate_text, steps, svg_chart, text_chart

SIZES = np.linspace(1e6, 64e6, 64)
RATES = 1e5 * (1 - SIZES / 64e6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 4000.0], (0, 4)), ([1e-9, 99.0], (-2, 2)), ([0.0], (0, 1)), ([100.0, 100.0], (2, 3))],
)
def test_decades_hold_the_values(values: list[float], expected: tuple[int, int]) -> None:
    assert decades(np.array(values)) == expected


@pytest.mark.parametrize(
    ("rate", "text"), [(0, "0"), (12.34, "12.3"), (1500, "1.5k"), (2e6, "2M"), (5e9, "5G"), (1e13, "1e+04G")]
)
def test_rates_for_people(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def test_steps_are_round() -> None:
    assert steps(64e6) == [0, 20e6, 40e6, 60e6]
    assert steps(0) == [0]


def test_a_chart_of_dots_falls_as_the_curve_does() -> None:
    lines = text_chart(SIZES, RATES, 60, 12).splitlines()
    assert len(lines) == 14
    dots = [[index for index, sign in enumerate(line[8:]) if 0x2801 <= ord(sign) <= 0x28FF] for line in lines[:12]]
    assert dots[0][0] == 0
    assert dots[11][-1] == 59
    labels = [line.split("│")[0].strip() for line in lines[:12]]
    assert [label for label in labels if label] == ["100k", "10k", "1k"]
    assert "60 MB" in lines[13]


def test_a_chart_without_misses_is_drawn() -> None:
    assert text_chart(SIZES, np.zeros(64), 30, 6).count("\n") == 7


def test_svg_is_well_formed_and_its_band_holds_the_curve() -> None:
    root = ElementTree.fromstring(svg_chart("a <b> & 'c'", SIZES, RATES, RATES * 0.9, RATES * 1.1, "memory"))
    curve = next(part for part in root.iter() if part.tag.endswith("polyline")).attrib["points"].split()
    band = next(part for part in root.iter() if part.tag.endswith("polygon")).attrib["points"].split()
    assert len(curve) == 64
    assert len(band) == 128
    heights = [float(point.split(",")[1]) for point in curve]
    assert heights == sorted(heights)
    assert all(float(top.split(",")[1]) <= height for top, height in zip(band, heights, strict=False))


def test_a_page_escapes_what_it_says() -> None:
    assert "&lt;vm&gt;" in html_page("<vm>", "<svg/>", ["<vm>"])
    assert "<vm>" not in html_page("<vm>", "<svg/>", ["<vm>"])
