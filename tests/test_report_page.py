"""The page of a job holds together, and needs nothing from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.job.records import (
    LossRecord,
    StepRecord,
)
from equipoise.report.heat_map import COLD, EVEN, HOT, draw_heat_map
from equipoise.report.html import render_html
from equipoise.report.summary import write_sentence
from tests.report_job import (
    BALANCED,
    JOB,
    ON,
    RESULT,
    Page,
    make_rebalance,
    sum_up,
)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = render_html(sum_up())
    page = Page(text)
    for attributes in (attributes for _, attributes in page.tags):
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(attributes)
    for word in ("http:", "https:", "@import", "url(", "<script", "<link", "//"):
        assert word not in text.lower()


def test_values_are_escaped() -> None:
    evil = '<script src="http://a.b">alert(1)</script>'
    kind = '<b class="x">&prose'
    on = [replace(step, kind=kind) if isinstance(step, StepRecord) else step for step in ON]
    job = replace(JOB, model=evil, communicator=evil, policy=evil, kinds=(kind,))
    losses = (LossRecord(kind, 1, 1.0, 1.0, 1.0),)
    result = replace(RESULT, losses=losses, samples=((kind, evil, evil),))
    page = Page(render_html(sum_up(on, result, job)))
    assert page.list_tags("script") == []
    assert all("src" not in attributes for _, attributes in page.tags)
    assert not any(attributes.get("class") == "x" for attributes in page.list_tags("b"))
    # Title, heading, the line on the job (model, policy, communicator), prompt, continuation.
    assert page.text.count(evil) == 7
    assert kind in page.text


def test_the_page_shows_the_figures() -> None:
    summary = sum_up()
    page = Page(render_html(summary))
    assert write_sentence(summary) in page.text
    assert "Largest difference of logits: 1.5e-06." in page.text
    rounded = Page(render_html(sum_up(job=replace(JOB, dtype="bfloat16"))))
    assert "1.5e-06; rounding in bfloat16 sends some tokens to other experts" in rounded.text
    words = page.text.split()
    for row in (
        "all 1.38 1.25",
        "prose 1.20 1.00",
        "code 1.67 1.67",
        "prose 1.2500 1.2500 1.2500",
        "1 2 0 2.0 kB 12 ms 300 ms 0.750 1.000",
    ):
        cells = "".join(row.split())
        assert cells in "".join(words), row


def test_the_chart_has_a_point_for_each_step_and_a_mark_for_each_change() -> None:
    page = Page(render_html(sum_up([*ON, make_rebalance(3, BALANCED, moves=0)])))
    lines = [str(line["points"]).split() for line in page.list_tags("polyline")]
    assert [len(points) for points in lines] == [3, 3]
    # At the initial placement the steps have 10/13, 10/12, 6/10: the axis begins at 0.6.
    heights = [[float(point.split(",")[1]) for point in points] for points in lines]
    top = [[(1 - value) / 0.4 * 220 for value in values] for values in (
        (10 / 13, 10 / 12, 6 / 10), (10 / 13, 1.0, 6 / 10),
    )]  # fmt: skip
    assert heights == [pytest.approx(values, abs=0.06) for values in top]
    marks = [line for line in page.list_tags("line") if line.get("class") == "mark"]
    assert [float(str(mark["x1"])) for mark in marks] == [pytest.approx(900 / 3)]
    bands = page.list_tags("rect")
    assert [float(str(band["width"])) for band in bands] == [pytest.approx(600), pytest.approx(300)]


def test_heat_maps_have_a_cell_for_each_value_in_its_colour() -> None:
    maps = Page(render_html(sum_up())).read_maps()
    assert {title: sizes[:2] for title, sizes in maps.items()} == {
        "Balancing off": (3, 2),
        "Balancing on": (3, 2),
        "Tokens per expert": (4, 2),
        "Tokens per rank, initial placement": (2, 2),
        "Tokens per rank, as balanced": (2, 2),
    }
    for width, height, paths in maps.values():
        cells = [cell for path in paths.values() for cell in path.split("M")[1:]]
        assert sorted(cells) == sorted(
            f"{x} {y}h1v1h-1z" for x in range(width) for y in range(height)
        )
    even = name_colour(EVEN)
    # Steps 2 and 3 on the initial placement: 10 10 in the first layer, 8 4 in the second.
    assert maps["Tokens per rank, initial placement"][2][even] == "M0 0h1v1h-1zM1 0h1v1h-1z"
    # Ranks over the steps, both layers: 13 7, 12 8, 6 6, and as balanced 13 7, 10 10, 10 2.
    assert maps["Balancing off"][2][even] == "M2 0h1v1h-1zM2 1h1v1h-1z"
    assert maps["Balancing on"][2][even] == "M1 0h1v1h-1zM1 1h1v1h-1z"


def test_double_and_more_is_hot_and_half_and_less_is_cold() -> None:
    drawn = draw_heat_map(np.array([[2.0, 0.5, 1.0], [3.0, 0.0, 1.5]]), "Tokens", "layer", "rank")
    paths = dict(drawn.paths)
    assert paths.pop(name_colour(HOT)) == "M0 0h1v1h-1zM0 1h1v1h-1z"
    assert paths.pop(name_colour(COLD)) == "M1 0h1v1h-1zM1 1h1v1h-1z"
    assert paths.pop(name_colour(EVEN)) == "M2 0h1v1h-1z"
    assert list(paths.values()) == ["M2 1h1v1h-1z"]


def name_colour(colour: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
