"""A small job, as records, and a reader of its page, for tests of what is said of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html.parser import HTMLParser

import numpy as np

from equipoise.job.records import (
    CheckRecord,
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
from equipoise.report.summary import JobSummary
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
        forward_s=0.01,
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
