"""Stacked bars and pipeline timelines as inline SVG, in the colours of the page's classes term-0 to term-9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from anychip.report.charts import svg

COLOURS = 10
_LABEL_WIDTH, _VALUE_WIDTH = 400, 90
_RECTANGLE = Markup('<rect class="{}" x="{:.2f}" y="{}" width="{:.2f}" height="{}"><title>{}</title></rect>')


@dataclass(frozen=True)
class Stack:
    """One bar: its parts by name, and what is written after it."""

    label: str
    parts: Mapping[str, float]
    value: str


@dataclass(frozen=True)
class Block:
    """A piece of work of one row of a timeline."""

    row: int
    start: float
    end: float
    style: str
    label: str = ""


def stacked_chart(
    stacks: Sequence[Stack], names: Sequence[str], title: str, limit: float | None = None, width: int = 1040
) -> Markup:
    """Horizontal bars whose parts follow `names`; a dashed line marks `limit`."""
    pitch, thick = 30, 18
    height = pitch * len(stacks) + 8
    room = width - _LABEL_WIDTH - _VALUE_WIDTH
    largest = max([sum(stack.parts.values()) for stack in stacks] + [limit or 0.0]) or 1.0
    parts = []
    for row, stack in enumerate(stacks):
        top, x = row * pitch + 6, float(_LABEL_WIDTH)
        parts.append(
            Markup('<text class="stack-label" x="{}" y="{}">{}</text>').format(_LABEL_WIDTH - 10, top + 13, stack.label)
        )
        for index, name in enumerate(names):
            length = room * stack.parts.get(name, 0.0) / largest
            if length <= 0:
                continue
            words = f"{name} {stack.parts[name]:.4g}"
            parts.append(_RECTANGLE.format(f"term-{index % COLOURS}", x, top, length, thick, words))
            x += length
        parts.append(
            Markup('<text class="stack-value" x="{:.1f}" y="{}">{}</text>').format(x + 8, top + 13, stack.value)
        )
    if limit is not None:
        place = _LABEL_WIDTH + room * limit / largest
        parts.append(Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(place, height))
    return svg(title, width, height, parts, "chart bars")


def timeline_chart(blocks: Sequence[Block], rows: int, title: str, width: int = 1040) -> Markup:
    """One line a row, time to the right."""
    pitch, left = 26, 70
    height = pitch * rows + 8
    end = max((block.end for block in blocks), default=1.0) or 1.0
    scale = (width - left - 4) / end
    parts = [
        Markup('<text class="stack-label" x="{}" y="{}">{}</text>').format(left - 10, row * pitch + 17, f"rank {row}")
        for row in range(rows)
    ]
    for block in blocks:
        x, length = left + block.start * scale, max((block.end - block.start) * scale - 0.4, 0.3)
        parts.append(_RECTANGLE.format(block.style, x, block.row * pitch + 4, length, 18, block.label))
    return svg(title, width, height, parts, "chart bars")
