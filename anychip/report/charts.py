"""Line and bar charts as inline SVG. Colours come from the page's CSS classes, so they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
_MOST_POINTS = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 12.0, 40.0


@dataclass(frozen=True)
class Series:
    """One curve: `style` is a CSS class of the page (line-main, line-faint, line-second); dots mark single points."""

    name: str
    points: Sequence[Point]
    style: str = "line-main"
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with its value; `note` is small text under the label."""

    label: str
    value: float
    note: str = ""
    style: str = "bar-plain"


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels between `start` and `end`, linearly or by logarithm, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        low, high, at = (self._scale(v) for v in (self.low, self.high, max(value, self.low)))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    *,
    width: int = 520,
    height: int = 250,
    x_log: bool = False,
    y_log: bool = False,
    y_from_zero: bool = False,
    y_format: Callable[[float], str] | None = None,
    marks: Sequence[float] = (),
    mark_name: str = "",
) -> Markup:
    """A chart of all series over one pair of axes; values that an axis cannot show (log of zero) are left out.

    `title` is what a screen reader says; x is shown in short form (1.2M). `marks` are vertical lines at these x.
    """
    shown = [Series(s.name, _visible(s.points, x_log, y_log), s.style, s.dots) for s in series]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    if not xs:
        return Markup("")
    x_axis = _Axis(*_padded(min(xs), max(xs), x_log, 0.0), _LEFT, width - _RIGHT, x_log)
    y_low, y_high = _padded(min(ys), max(ys), y_log, 0.06)
    y_axis = _Axis(0.0 if y_from_zero else y_low, y_high, height - _BOTTOM, _TOP, y_log)
    parts = [_grid(x_axis, y_axis, width, height, x_label, y_format or short)]
    parts += [_mark(x, x_axis, height, mark_name) for x in marks if x_axis.low <= x <= x_axis.high]
    parts += [_curve(s, x_axis, y_axis) for s in shown]
    return svg(title, width, height, parts)


def bar_chart(
    bars: Sequence[Bar],
    title: str,
    unit: str,
    value_format: Callable[[float], str],
    *,
    width: int = 900,
    label_width: int = 250,
) -> Markup:
    """Horizontal bars from zero, in the order given, each with its value and `unit` beside it."""
    notes = any(bar.note for bar in bars)
    pitch, thick = (52, 26) if notes else (38, 20)
    height = pitch * len(bars) + 8
    room = width - label_width - 150
    largest = max((bar.value for bar in bars), default=0.0) or 1.0
    parts = []
    for row, bar in enumerate(bars):
        top = row * pitch + 10
        middle = top + thick / 2
        length = max(room * bar.value / largest, 2.0)
        up = 7 if bar.note else 0
        parts.append(
            Markup('<text class="bar-label" x="{}" y="{:.1f}">{}</text>').format(
                label_width - 14, middle + 4.5 - up, bar.label
            )
        )
        if bar.note:
            parts.append(
                Markup('<text class="bar-note" x="{}" y="{:.1f}">{}</text>').format(
                    label_width - 14, middle + 12, bar.note
                )
            )
        parts.append(
            Markup('<rect class="{}" x="{}" y="{}" width="{:.1f}" height="{}" rx="5"/>').format(
                bar.style, label_width, top, length, thick
            )
        )
        parts.append(
            Markup('<text class="bar-value" x="{:.1f}" y="{:.1f}">{} <tspan class="bar-unit">{}</tspan></text>').format(
                label_width + length + 10, middle + 5, value_format(bar.value), unit
            )
        )
    return svg(title, width, height, parts, "chart bars")


def smoothed(points: Sequence[Point], share: float = 0.06) -> list[Point]:
    """Centred moving average over a window that grows with the position: steep starts stay sharp, long tails calm."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        reach = int(i * share)
        low, high = i - reach, min(i + reach + 1, len(points))
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return result


def short(value: float) -> str:
    """A number as an axis shows it: 1.5M, 20k, 0.25, 3e-05."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit * 0.9995:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def svg(title: str, width: int, height: int, parts: Sequence[Markup], kind: str = "chart") -> Markup:
    """Parts as one picture; `title` is what a screen reader says."""
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(kind, width, height, title)
    return head + Markup("").join(parts) + Markup("</svg>")


def _grid(
    x_axis: _Axis, y_axis: _Axis, width: int, height: int, x_label: str, y_text: Callable[[float], str]
) -> Markup:
    right, floor, parts = width - _RIGHT, height - _BOTTOM, []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        text = escape(y_text(tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{floor + 17}">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="axis-label" text-anchor="end" x="{right}" y="{height - 4}">{escape(x_label)}</text>')
    return Markup("".join(parts))


def _mark(x: float, x_axis: _Axis, height: int, name: str) -> Markup:
    at = f"{x_axis.place(x):.1f}"
    return Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>{3}</title></line>').format(
        at, _TOP, height - _BOTTOM, f"{name} at {short(x)}"
    )


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis) -> Markup:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    style = escape(series.style)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="{style}" points="{path}"/>'] if len(places) > 1 else []
    if series.dots or len(places) == 1:
        for (x, y), (tokens, value) in zip(places, series.points, strict=True):
            label = escape(f"{series.name}: {value:.4g} at {short(tokens)}")
            circle = f'<circle class="{style} dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
            parts.append(f"{circle}<title>{label}</title></circle>")
    return Markup("".join(parts))


_SMALLEST = 1e-300  # that a logarithmic axis shows: below, what is left of it for room is zero


def _visible(points: Sequence[Point], x_log: bool, y_log: bool) -> list[Point]:
    """The points an axis can show, thinned to what the eye can tell apart (the mean of each bucket)."""
    kept = [(x, y) for x, y in points if (x >= _SMALLEST or not x_log) and (y >= _SMALLEST or not y_log)]
    size = math.ceil(len(kept) / _MOST_POINTS)
    if size <= 1:
        return kept
    buckets = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def _padded(low: float, high: float, log: bool, share: float) -> tuple[float, float]:
    """A range with some air above and below, never empty, on a logarithmic axis of at most twelve decades."""
    if log:
        low = max(low, high * 1e-12)
        air = 2.0 if high <= low * (1 + 1e-9) else (high / low) ** share
        return low / air, high * air
    largest = max(abs(low), abs(high))
    if high - low <= largest * 1e-9 or largest < 1e-200:
        air = largest / 2 if largest > 1e-200 else 1.0
    else:
        air = (high - low) * share
    return low - air, high + air


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    factors: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 7)
    for least, fewer in ((0.5, (1, 2, 5)), (1.2, (1, 3)), (3.0, (1,))):
        factors = fewer if decades > least else factors
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
