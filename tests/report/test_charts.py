"""Charts show any finite numbers, with ticks inside their range."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.report.charts import Bar, Series, bar_chart, line_chart, short, smoothed

NUMBERS = st.floats(min_value=-1e15, max_value=1e15, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), x_log=st.booleans(), y_log=st.booleans())
def test_any_points_give_a_well_formed_chart_inside_its_frame(
    points: list[tuple[float, float]], x_log: bool, y_log: bool
) -> None:
    chart = line_chart([Series("<s>", points, dots=True)], 'a "title" & more', "x", x_log=x_log, y_log=y_log)
    if not chart:
        return
    root = ElementTree.fromstring(str(chart))
    for circle in root.iter("circle"):
        assert 51 <= float(circle.attrib["cx"]) <= 521 and 11 <= float(circle.attrib["cy"]) <= 251


def test_curves_keep_their_points_and_are_thinned_by_means() -> None:
    root = ElementTree.fromstring(str(line_chart([Series("s", [(x, x % 2) for x in range(4000)])], "t", "x")))
    (curve,) = root.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in curve.attrib["points"].split()]
    assert len(places) == 400
    assert len({y for _, y in places}) == 1


def test_no_points_give_no_chart() -> None:
    assert line_chart([Series("s", [])], "t", "x") == ""
    assert line_chart([Series("s", [(0.0, -1.0)])], "t", "x", y_log=True) == ""


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(str(bar_chart([Bar("a", 1.0), Bar("<b>", 2.0, "note")], "t", "u", short)))
    widths = [float(bar.attrib["width"]) for bar in root.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])


def test_smoothing_is_a_mean_and_keeps_the_start() -> None:
    points = [(float(x), 5.0) for x in range(100)]
    assert smoothed(points) == points
    assert smoothed([(0.0, 9.0), (1.0, 1.0)])[0] == (0.0, 9.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999.9, "1k"), (26_100, "26.1k"), (1.5e6, "1.5M"), (2.5e-5, "2.5e-05"), (-3e9, "-3B")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
