"""What is said of a job: figures worked out by hand, and pages that hold together."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console

from equipoise.engine.records import (
    CheckRecord,
    Divergence,
    JobRecord,
    LossRecord,
    Pass,
    PhaseRecord,
    RebalanceRecord,
    Record,
    ResultRecord,
    StepRecord,
)
from equipoise.placement import Placement, place_in_order
from equipoise.report.heat_map import COLD, EVEN, HOT, draw_heat_map
from equipoise.report.html import render_html
from equipoise.report.live import LiveDisplay, render_progress
from equipoise.report.plain import PlainDisplay
from equipoise.report.result import make_result, write_json
from equipoise.report.summary import JobSummary, write_sentence
from equipoise.topology import Topology

# Two layers of four experts, on two ranks of two slots: in order, and with 1 and 2 of the first
# layer in each other's place.
INITIAL = place_in_order(2, 4, Topology(2, 2))
BALANCED = Placement(np.array([[0, 2, 1, 3], [0, 1, 2, 3]]), 4, Topology(2, 2))

# Loads of ranks 0 and 1, by layer:   initial   balanced
STEP_1 = [[6, 2, 1, 1], [5, 0, 0, 5]]  # 8 2, 5 5
STEP_2 = [[4, 4, 2, 2], [3, 1, 3, 1]]  # 8 4, 4 4   6 6, 4 4
STEP_3 = [[1, 1, 5, 1], [2, 2, 0, 0]]  # 2 6, 4 0   6 2, 4 0

JOB = JobRecord(
    model="/models/small",
    device="cpu",
    dtype="float32",
    communicator="torch_gloo",
    policy="deepseek",
    num_prompts=3,
    kinds=("prose", "code"),
    placement=INITIAL,
    num_parameters=2_600_000,
    expert_bytes=1000,
)
CHECK = CheckRecord(num_tokens=12, num_identical=12, max_logit_diff=1.5e-6, divergence=None)
RESULT = ResultRecord(
    check=CHECK,
    losses=(LossRecord("prose", 40, 1.25, 1.25, 1.25), LossRecord("code", 30, 0.5, 0.5, 0.5)),
    seconds={"off": 1.5, "on": 2.0},
    samples=(("prose", "It was a bright", " day"),),
)


def make_step(
    in_pass: Pass, step: int, kind: str | None, counts: object, placement: Placement = INITIAL
) -> StepRecord:
    logical = np.array(counts)
    slot_count = np.take_along_axis(logical, placement.slot_to_expert, axis=1)
    cpu_s = np.array([0.1 * step, 0.1])
    return StepRecord(in_pass, step, kind, 9, 2, logical, slot_count, placement, cpu_s, 0.01)


def make_rebalance(step: int, placement: Placement, moves: int = 2) -> RebalanceRecord:
    return RebalanceRecord(
        planned_step=step,
        step=step,
        moves=moves,
        local_moves=0,
        moves_per_layer=np.array([moves, 0]),
        bytes=1000 * moves,
        plan_s=0.012,
        transfer_s=0.3,
        balancedness_before=np.array([0.5, 1.0]),
        balancedness_after=np.array([1.0, 1.0]),
        placement=placement,
    )


OFF = [
    make_step("off", 1, "prose", STEP_1),
    make_step("off", 2, "prose", STEP_2),
    make_step("off", 3, "code", STEP_3),
]
ON = [
    make_step("on", 1, "prose", STEP_1),
    make_rebalance(1, BALANCED),
    make_step("on", 2, "prose", STEP_2, BALANCED),
    make_step("on", 3, "code", STEP_3, BALANCED),
]


def sum_up(
    on: Iterable[Record] = ON, result: ResultRecord = RESULT, job: JobRecord = JOB
) -> JobSummary:
    summary = JobSummary()
    passes: list[Record] = [PhaseRecord("off"), *OFF, PhaseRecord("loss"), PhaseRecord("on"), *on]
    for record in (job, *passes, PhaseRecord("loss"), PhaseRecord("check"), result):
        summary.add(record)
    return summary


def test_before_is_the_initial_placement_on_the_tokens_that_after_is_of() -> None:
    # Steps 2 and 3. Means 6 + 4 and 4 + 2; largest 8 + 4 and 6 + 4, then 6 + 4 and 6 + 4.
    assert make_result(sum_up())["balancedness"] == {
        "before": 16 / 22,
        "after": 16 / 20,
        "first_step": 2,
        "last_step": 3,
        "per_kind": {
            "prose": {"before": 10 / 12, "after": 1.0},
            "code": {"before": 6 / 10, "after": 6 / 10},
        },
        "per_layer": [
            {"before": 10 / 14, "after": 10 / 12},
            {"before": 6 / 8, "after": 6 / 8},
        ],
    }


def test_figures_are_of_the_same_steps() -> None:
    result = make_result(sum_up())
    assert result["expert_cpu_s"] == {
        "off": pytest.approx([0.2 + 0.3, 0.2]),
        "on": pytest.approx([0.2 + 0.3, 0.2]),
    }
    assert (result["new_tokens"], result["tokens_per_s"], result["steps"]) == (6, 3.0, 3)


def test_steps_of_mixed_text_count_for_all_and_for_no_kind() -> None:
    mixed = make_step("on", 4, None, STEP_2, BALANCED)
    balancedness = make_result(sum_up([*ON, mixed]))["balancedness"]
    assert balancedness["before"] == (16 + 10) / (22 + 12)
    assert balancedness["after"] == (16 + 10) / (20 + 10)
    assert list(balancedness["per_kind"]) == ["prose", "code"]
    assert balancedness["per_kind"]["prose"] == {"before": 10 / 12, "after": 1.0}


def test_without_a_rebalance_all_steps_are_covered() -> None:
    on = [make_step("on", n, "prose", c) for n, c in ((1, STEP_1), (2, STEP_2), (3, STEP_3))]
    for said in (on, [*on[:1], make_rebalance(1, INITIAL, moves=0), *on[1:]]):
        balancedness = make_result(sum_up(said))["balancedness"]
        # Means 5 + 5 too, and largest 8 + 5.
        assert balancedness["before"] == balancedness["after"] == (16 + 10) / (22 + 13)
        assert (balancedness["first_step"], balancedness["last_step"]) == (1, 3)


def test_a_plan_that_changes_nothing_does_not_begin_what_is_covered() -> None:
    later = [ON[0], make_rebalance(1, INITIAL, moves=0), make_step("on", 2, "prose", STEP_2)]
    last = make_step("on", 3, "code", STEP_3, BALANCED)
    summary = sum_up([*later, make_rebalance(2, BALANCED), last])
    assert summary.covered_steps == (3, 3)
    assert summary.covered.balancedness().before == 6 / 10


DIVERGED = CheckRecord(1200, 1100, 0.25, Divergence(7, 3, expected=65, got=66, margin=0.03125))

SENTENCES: dict[str, tuple[list[Record], CheckRecord | None, str]] = {
    "moved": (
        ON,
        CHECK,
        "The slowest rank did 1.4 times its share, now 1.2; 2 experts moved in 0.3 s; 12 of 12 "
        "tokens identical to the plain model.",
    ),
    "no plan": (
        [ON[0]],
        CHECK,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "12 of 12 tokens identical to the plain model.",
    ),
    "a plan for nothing": (
        [ON[0], make_rebalance(1, INITIAL, moves=0)],
        CHECK,
        "The slowest rank did 1.3 times its share; nothing was moved: 1 plan in 1 step changed "
        "nothing; 12 of 12 tokens identical to the plain model.",
    ),
    "moved at the end": (
        [ON[0], make_rebalance(1, BALANCED, moves=1)],
        CHECK,
        "The slowest rank did 1.3 times its share; 1 expert moved in 0.3 s, but no step ran after "
        "that; 12 of 12 tokens identical to the plain model.",
    ),
    "not checked": (
        [ON[0]],
        None,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "tokens were not compared with the plain model.",
    ),
    "diverged": (
        [ON[0]],
        DIVERGED,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "1,100 of 1,200 tokens identical to the plain model, the first difference at token 3 of "
        "prompt 7, where the plain model's choice led by 0.031 in its logits.",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence_says_what_came_of_it(case: str) -> None:
    on, check, sentence = SENTENCES[case]
    assert write_sentence(sum_up(on, replace(RESULT, check=check))) == sentence


def test_the_json_has_what_was_promised() -> None:
    result = json.loads(write_json(sum_up()))
    expected = {
        "format_version": 1,
        "model": "/models/small",
        "device": "cpu",
        "dtype": "float32",
        "ranks": 2,
        "slots_per_rank": 2,
        "redundant_experts": 0,
        "policy": "deepseek",
        "communicator": "torch_gloo",
        "steps": 3,
        "prompts": 3,
        "new_tokens": 6,
        "tokens_per_s": 3.0,
        "seconds": {"off": 1.5, "on": 2.0},
        "outputs_identical": True,
        "max_logit_diff": 1.5e-6,
        "tokens_compared": 12,
        "tokens_identical": 12,
        "divergence": None,
        "losses": {
            "prose": {"num_tokens": 40, "off": 1.25, "on": 1.25, "plain": 1.25},
            "code": {"num_tokens": 30, "off": 0.5, "on": 0.5, "plain": 0.5},
        },
        "rebalances": [
            {
                "planned_step": 1,
                "step": 1,
                "moves": 2,
                "local_moves": 0,
                "bytes": 2000,
                "plan_s": 0.012,
                "transfer_s": 0.3,
                "balancedness_before": 0.75,
                "balancedness_after": 1.0,
            }
        ],
    }
    assert {name: result[name] for name in expected} == expected
    assert result["summary"] == write_sentence(sum_up())
    assert set(result["versions"]) == {"python", "equipoise", "torch", "transformers", "numpy"}


def test_a_divergence_is_told_in_full() -> None:
    result = json.loads(write_json(sum_up(result=replace(RESULT, check=DIVERGED))))
    assert result["outputs_identical"] is False
    assert result["divergence"] == {
        "prompt": 7, "position": 3, "expected": 65, "got": 66, "margin": 0.03125,
    }  # fmt: skip


def test_what_was_not_measured_is_null_and_nothing_is_not_a_number() -> None:
    losses = (LossRecord("prose", 40, 1.25, 1.25, None),)
    summary = sum_up([], ResultRecord(None, losses, {"off": 0.0, "on": 0.0}, ()))
    text = write_json(summary)
    assert "NaN" not in text
    assert "Infinity" not in text
    result = json.loads(text)
    for name in ("outputs_identical", "max_logit_diff", "divergence", "tokens_per_s"):
        assert result[name] is None
    assert result["losses"]["prose"]["plain"] is None
    assert result["balancedness"] == {
        "before": 1.0, "after": 1.0, "first_step": None, "last_step": None, "per_kind": {},
        "per_layer": [{"before": 1.0, "after": 1.0}] * 2,
    }  # fmt: skip
    assert Page(render_html(summary)).text.count("No plan fell due.") == 1


VOID = ("meta", "br", "hr", "link", "img", "input")


class Page(HTMLParser):
    """A page that was read: every tag that it opens it closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def list_tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def read_maps(self) -> dict[str, tuple[int, int, dict[str, str]]]:
        """Of each heat map its width, height, and the colour's path of cells."""
        maps: dict[str, tuple[int, int, dict[str, str]]] = {}
        paths: dict[str, str] = {}
        for tag, attributes in self.tags:
            if tag == "svg" and "class" not in attributes:
                paths = {}
                width, height = map(int, str(attributes["viewbox"]).split()[2:])
                maps[str(attributes["aria-label"])] = (width, height, paths)
            elif tag == "path":
                paths[str(attributes["fill"])] = str(attributes["d"])
        return maps


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


def draw(summary: JobSummary, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_progress(summary, width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def begin(
    records: Iterable[Record], job: JobRecord = JOB, phase: Literal["off", "on"] = "on"
) -> JobSummary:
    summary = JobSummary()
    for record in (job, PhaseRecord(phase), *records):
        summary.add(record)
    return summary


def test_the_live_picture_shows_loads_balance_and_moves() -> None:
    # Rank 0 has got 8 + 5, 6 + 4, 6 + 4 of 20, 20, 12 tokens: 1.27 of its share.
    assert draw(begin(ON), 80) == [
        "serving, balancing on   step 3   text: code",
        "tokens per rank, last 3 steps (1.00 is its share)",
        "rank 0 1.27 " + "█" * 30,
        "rank 1 0.73 " + "█" * 18,
        "balancedness per layer, same steps (1.00 is perfect)",
        "                   layer 0  layer 1",
        "initial placement  0.83     0.85",
        "now                0.75     0.85",
        "last moves of experts, balancedness of the window",
        "step 1  2 moved  0 within ranks  2.0 kB  300 ms  0.75 -> 1.00",
    ]


def test_without_balancing_there_is_nothing_to_compare_layers_with() -> None:
    # Rank 0 has got 8 + 5, 8 + 4, 2 + 4 of 20, 20, 12 tokens: 1.19 of its share.
    assert draw(begin(OFF, phase="off"), 80) == [
        "serving, balancing off   step 3   text: code",
        "tokens per rank, last 3 steps (1.00 is its share)",
        "rank 0 1.19 " + "█" * 29,
        "rank 1 0.81 " + "█" * 19,
        "balancedness per layer, same steps (1.00 is perfect)",
        "     layer 0  layer 1",
        "now  0.83     0.85",
    ]


def test_the_live_picture_says_what_is_going_on_before_there_are_steps() -> None:
    assert draw(JobSummary(), 80) == ["starting ranks and loading the model"]
    assert draw(begin([]), 80) == ["serving, balancing on"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_the_live_picture_of_a_large_model_fits(width: int) -> None:
    placement = place_in_order(48, 128, Topology(64, 2))
    rng = np.random.default_rng(0)
    steps = [
        make_step("on", 1000 + n, "mathematics", rng.integers(0, 999, (48, 128)), placement)
        for n in range(20)
    ]
    rebalances = [
        replace(make_rebalance(n, placement, moves=4321), local_moves=1234, bytes=9.9e9)
        for n in range(1000, 1006)
    ]
    lines = draw(begin([*steps, *rebalances], replace(JOB, placement=placement)), width)
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("rank ") for line in lines) == 12
    assert "the heaviest 12 of 64 ranks" in lines
    assert any(line.endswith(" of 48") for line in lines)
    assert [line.split()[:2] for line in lines[-4:]] == [
        ["step", str(n)] for n in range(1002, 1006)
    ]
    # Only titles may be cut.
    assert not any("…" in line for line in lines if width >= 60 or line.startswith("rank "))


def show_all(display: Any, summary: JobSummary) -> None:
    passes: list[Record] = [PhaseRecord("off"), *OFF, PhaseRecord("loss"), PhaseRecord("on"), *ON]
    for record in (JOB, *passes, PhaseRecord("check"), RESULT):
        summary.add(record)
        display.show(record)
    display.close()


def test_plain_lines_say_what_changes() -> None:
    out, summary = io.StringIO(), JobSummary()
    show_all(PlainDisplay(Console(file=out, width=100), summary), summary)
    lines = out.getvalue().splitlines()
    job = (
        "/models/small: 2.6 M parameters in float32, 2 MoE layers of 4 experts and 0 redundant "
        "slots on 2 ranks (cpu); policy deepseek, weights travel by torch_gloo"
    )
    assert lines[:12] == [
        job,
        "serving, balancing off",
        "step 1: text is prose",
        "step 3: text is code",
        "scoring held-out text",
        "serving, balancing on",
        "step 1: text is prose",
        "step 1: 2 experts moved, 2.0 kB in 300 ms (planned in 12 ms); balancedness of the window "
        "0.75 -> 1.00",
        "step 3: text is code",
        "comparing with the plain model in one process",
        "Slowest rank's load over its share, steps 2 to 3 with balancing on",
        "kind of text  initial placement  as balanced",
    ]
    assert [line.split() for line in lines if line.startswith(("all", "off", "on"))] == [
        ["all", "1.38", "1.25"],
        ["off", "6", "4", "0.50", "0.35"],
        ["on", "6", "3", "0.50", "0.35"],
    ]
    assert " ".join(lines[-2:]).split() == write_sentence(summary).split()


def test_a_terminal_gets_its_screen_back_with_the_closing_tables() -> None:
    out, summary = io.StringIO(), JobSummary()
    console = Console(file=out, width=100, height=40, force_terminal=True, color_system=None)
    show_all(LiveDisplay(console, summary), summary)
    said = out.getvalue()
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor, off and on again
    closing = said[said.rindex("\x1b[?25h") :]
    assert "Slowest rank's load over its share, steps 2 to 3 with balancing on" in closing
    assert "rank 0 1.27" not in closing


def test_a_job_that_did_not_end_shows_no_closing_tables() -> None:
    out, summary = io.StringIO(), JobSummary()
    display = PlainDisplay(Console(file=out, width=100), summary)
    for record in (JOB, PhaseRecord("off")):
        summary.add(record)
        display.show(record)
    display.close()
    assert out.getvalue().splitlines()[1:] == ["serving, balancing off"]
