"""Pages of one HTML file that needs no network, and the geometry of their charts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader

from equipoise.report.heat_map import NUM_COLOURS, mix_colour
from equipoise.topology import FloatArray

WIDTH, HEIGHT = 900.0, 220.0
"""Of the charts, in their own units."""
MOST_POINTS = 180
"""Points of a line, and stretches of a band, before they are merged."""


class Phase(NamedTuple):
    """A time in which one kind of text was served; `left` and `width` in units of the chart."""

    name: str
    left: float
    width: float


def render_page(template: str, **values: Any) -> str:
    """Fill a template of this package; values are escaped.

    Args:
        template: its file name.
        values: what it names, beside the geometry and the colours' scale.
    """
    environment = Environment(
        loader=PackageLoader("equipoise.report"), autoescape=True, trim_blocks=True
    )
    scale = [mix_colour(at / (NUM_COLOURS - 1)) for at in range(NUM_COLOURS)]
    page = environment.get_template(template)
    return page.render(width=WIDTH, height=HEIGHT, scale=scale, **values)


def bin_means(values: FloatArray) -> FloatArray:
    """Means of at most MOST_POINTS stretches of values [N], over the first axis."""
    pieces = np.array_split(values, max(1, min(len(values), MOST_POINTS)))
    return np.array([piece.mean(axis=0) for piece in pieces])


def draw_line(values: FloatArray, low: float, high: float) -> str:
    """Points of an SVG polyline over the width of the chart.

    Args:
        values: [N], each in the middle of its stretch.
        low: value at the bottom.
        high: value at the top.
    """
    across = (np.arange(len(values)) + 0.5) / len(values) * WIDTH
    return " ".join(
        f"{x:.1f},{find_height(value, low, high):.1f}"
        for x, value in zip(across, values, strict=True)
    )


def find_height(value: float, low: float, high: float) -> float:
    """Where a value is, counted from the top of the chart."""
    return float(HEIGHT * (high - value) / (high - low)) if high > low else 0.0


def list_phases(kinds: Iterable[str]) -> list[Phase]:
    """Stretches of steps of one kind; none where they change too often to be seen.

    Args:
        kinds: of each step.
    """
    words = list(kinds)
    starts = [at for at in range(len(words)) if at == 0 or words[at] != words[at - 1]]
    if len(starts) > MOST_POINTS:
        return []
    ends = [*starts[1:], len(words)] if words else []
    return [
        Phase(words[start], start / len(words) * WIDTH, (end - start) / len(words) * WIDTH)
        for start, end in zip(starts, ends, strict=True)
    ]


def divide_by_share(load: FloatArray) -> FloatArray:
    """Load [L, N] over the mean of its layer; 1 in layers without any."""
    mean = load.mean(axis=1, keepdims=True)
    share: FloatArray = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return share
