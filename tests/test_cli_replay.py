"""`equipoise replay`: the demo, its own figures, JSON and HTML, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from equipoise.load.trace import LoadTrace, write_trace
from equipoise.report.heat_map import NUM_COLOURS
from tests.command_line import run_command

EARLY, LATE = [[4, 4, 1, 1]], [[4, 1, 4, 1]]


@pytest.fixture
def trace(tmp_path):
    """The trace that tests/test_sim.py works out by hand."""
    path = tmp_path / "trace.npz"
    write_trace(LoadTrace(np.array([EARLY] * 4 + [LATE] * 4)), path)
    return path


class Reader(HTMLParser):
    """What a browser would have to fetch, the tags, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_demo_ends_in_a_sentence_of_its_own_figures(tmp_path):
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done = run_command("replay", "--demo", f"--json={figures}", f"--report={page}")
    assert done.code == 0
    said = re.fullmatch(
        r"Planning anew every (\d+) steps moves ([\d,]+) experts \(.*\) and gains (.*)% of the "
        r"step time; flow every (\d+) steps moves ([\d,]+) \(.*\) and gains (.*)%\.",
        done.out.splitlines()[-1],
    )
    assert said
    result = json.loads(figures.read_text())
    rows = {(row["policy"], row["interval_steps"]): row for row in result["rows"]}
    for policy, groups in (("deepseek", (1, 2, 3)), ("flow", (4, 5, 6))):
        interval, received, gain = (said[group].replace(",", "") for group in groups)
        row = rows[policy, int(interval)]
        assert row["received"] == int(received)
        assert f"{row['net_gain'] * 100:.1f}" == gain
    # What the policy promises, on this real load: as much gained for far fewer moves.
    assert int(said[5].replace(",", "")) < int(said[2].replace(",", "")) / 2
    assert float(said[6]) >= float(said[3])
    assert result["trace"]["phases"] == ["gpqa_main", "mmlu_test", "sorry_bench_base"]
    assert result["rows"][result["recommended"]]["net_gain"] > 0

    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.fetched == []
    assert "script" not in reader.tags
    assert reader.tags.count("polyline") == 6
    # Tokens per expert; per rank in order, and as recommended.
    assert reader.tags.count("figure") == 3
    assert result["reason"] in "".join(reader.text)


def test_figures_of_a_trace_worked_out_by_hand(tmp_path, trace):
    times = tmp_path / "times.csv"
    times.write_text("tokens,seconds\n1,0.002\n9,0.010\n")
    figures = tmp_path / "figures.json"
    done = run_command(
        "replay", trace, "--ranks=2", "--redundant-experts=0", "--policies=deepseek",
        "--intervals=2,once", "--warm-up=2", f"--measurements={times}", "--expert-bytes=1000000",
        "--link-gb-per-s=1", "--stall-ms=2", f"--json={figures}", f"--report={tmp_path / 'page'}",
    )  # fmt: skip
    assert done.code == 0
    result = json.loads(figures.read_text())
    anew, once = result["rows"]
    assert (anew["received"], anew["bytes"], once["received"]) == (2, 2_000_000, 0)
    assert anew["lost_s"] == pytest.approx(0.005)
    assert anew["compute_s"] == pytest.approx(0.042)
    assert result["baseline"]["compute_s"] == pytest.approx(0.042)
    assert [row["net_gain"] for row in (anew, once)] == pytest.approx([-5 / 42, -6 / 42])
    assert [plan["balancedness_next"] for plan in anew["rebalances"]] == [5 / 8, 1.0]
    assert result["recommended"] is None
    # Nothing is recommended, and of the trace nobody said what it served.
    reader = Reader()
    reader.feed((tmp_path / "page").read_text(encoding="utf-8"))
    assert (reader.tags.count("figure"), reader.tags.count("polyline")) == (2, 4)
    assert (
        "None pays: the best, deepseek every 2 steps, 4 slots, saves 0.0% of the step" in done.out
    )


def test_a_replay_is_the_same_every_time(tmp_path, trace):
    for name in ("a", "b"):
        done = run_command("replay", trace, "--ranks=2", f"--json={tmp_path / name}")
        assert done.code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_several_sums_are_played_in_turn_and_said_to_be_sums(tmp_path):
    files = []
    for name, counts in (("code", EARLY), ("prose", LATE), ("mail", LATE)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"logical_count": counts}))
    figures = tmp_path / "figures.json"
    done = run_command("replay", *files, "--ranks=2", "--intervals=1", f"--json={figures}")
    assert done.code == 0
    said = " ".join(done.out.split())
    assert "3 files: 3 sums of unknown numbers of steps" in said
    assert "what moves cost is not set against what they gain" in said
    result = json.loads(figures.read_text())
    assert result["trace"]["phases"] == ["code.json", "prose.json", "mail.json"]
    assert all(row["net_gain"] == row["gain"] for row in result["rows"])


def test_names_in_a_report_are_text(tmp_path):
    path, page = tmp_path / "<b>&.npz", tmp_path / "page.html"
    phases = ("<i>",) * 4
    write_trace(LoadTrace(np.array([EARLY] * 4), phases=phases), path)
    done = run_command("replay", path, "--ranks=2", "--policies=flow", f"--report={page}")
    assert done.code == 0
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    # Each line of the chart has an <i> in its key, each colour of the maps a <b>; no name has.
    assert reader.tags.count("i") == 2
    assert reader.tags.count("b") == NUM_COLOURS
    assert "Replay of <b>&.npz" in "".join(reader.text)


BAD = {
    "nothing to play": ([], False, "give load files to play, or --demo for a bundled one"),
    "both": (["--demo"], True, "give load files to play, or --demo for a bundled one"),
    "an interval that is none": (
        ["--intervals=5,often"],
        True,
        "--intervals: 'often' cannot be one of its values, in '5,often'",
    ),
    "no interval": (["--intervals=0"], True, "--intervals: '0' cannot be one of its values"),
    "a policy that is none": (
        ["--policies=flow,deep"],
        True,
        "no policy 'deep': did you mean 'deepseek'?",
    ),
    "a budget that cannot be": (["--budgets=5"], True, "move_budget must be between 0 and 1"),
    "redundancy that ranks do not divide": (
        ["--redundant-experts=1"],
        True,
        "4 experts and 1 redundant ones make 5 slots, which 2 ranks do not divide: ask for 0",
    ),
    "a warm-up of all": (["--warm-up=8"], True, "8 steps leave none to judge after a warm-up of 8"),
    "no warm-up": (["--warm-up=0"], True, "warm_up_steps must be at least 1, got 0"),
    "no time": (["--step-ms=0"], True, "step_s must be above 0 seconds, got 0.0"),
    "no ranks": (["--ranks=0"], True, "--ranks must be at least 1, got 0"),
    "no sequences": (["--in-flight=0"], True, "num_in_flight must be at least 1, got 0"),
    "no measurements": (
        ["--measurements=nowhere.csv"],
        True,
        "--measurements nowhere.csv: No such file or directory",
    ),
    "no such directory": (
        ["--report=nowhere/page.html"],
        True,
        "--report nowhere/page.html: there is no directory",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_and_exit_2_and_nothing_is_written(tmp_path, trace, case):
    options, with_trace, message = BAD[case]
    page = (
        []
        if any(option.startswith("--report") for option in options)
        else [f"--report={tmp_path / 'page.html'}"]
    )
    done = run_command(
        "replay", *([trace] if with_trace else []), "--ranks=2", *options,
        f"--json={tmp_path / 'figures.json'}", *page,
    )  # fmt: skip
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == [trace]


@pytest.mark.parametrize("text", ["tokens,seconds\n1,x\n", "a,b\n1,2\n", '{"tokens": [1]}'])
def test_measurements_that_cannot_be_read_are_named(tmp_path, trace, text):
    times = tmp_path / "times"
    times.write_text(text)
    done = run_command("replay", trace, "--ranks=2", f"--measurements={times}")
    assert done.code == 2
    assert f"--measurements {times}: must be JSON or CSV with numbers" in done.err


def test_one_sum_is_refused_with_what_would_do(tmp_path):
    path = tmp_path / "sum.json"
    path.write_text(json.dumps(EARLY))
    done = run_command("replay", path, "--ranks=2")
    assert done.code == 2
    assert "1 sums, each played as a step, leave none to judge" in done.err
    assert "of one sum, `equipoise plan` makes a placement" in done.err
