"""Heat maps as SVG paths, one per colour, so that large ones stay small files."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.topology import FloatArray

NUM_COLOURS = 21
COLD, EVEN, HOT = (44, 103, 160), (246, 244, 238), (178, 40, 36)


class HeatMap(NamedTuple):
    """A grid of coloured cells, one unit wide and high.

    Attributes:
        title: what it shows.
        rows: name of the rows' axis.
        columns: name of the columns' axis.
        width: columns.
        height: rows.
        paths: colour and SVG path of the cells that have it.
    """

    title: str
    rows: str
    columns: str
    width: int
    height: int
    paths: list[tuple[str, str]]


def draw_heat_map(ratio: FloatArray, title: str, rows: str, columns: str) -> HeatMap:
    """Colour each cell: 1 is even, half and less cold, double and more hot.

    Args:
        ratio: [height, width], load over its share.
        title: what it shows.
        rows: name of the rows' axis.
        columns: name of the columns' axis.
    """
    height, width = ratio.shape
    octave = np.log2(np.clip(ratio, 0.5, 2.0))
    level = np.rint((octave + 1.0) / 2.0 * (NUM_COLOURS - 1)).astype(np.int64)
    paths = []
    for colour in np.unique(level):
        cells = (f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(level == colour))
        paths.append((mix_colour(colour / (NUM_COLOURS - 1)), "".join(cells)))
    return HeatMap(title, rows, columns, width, height, paths)


def mix_colour(place: float) -> str:
    """A colour of the scale; 0 is cold, 0.5 even, 1 hot."""
    end = HOT if place > 0.5 else COLD
    part = abs(place - 0.5) * 2.0
    mixed = (round(a + (b - a) * part) for a, b in zip(EVEN, end, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
