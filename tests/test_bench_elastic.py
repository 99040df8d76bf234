"""`equipoise bench elastic` and `recovery`, `run --kill`: what they refuse, and small runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from equipoise.cli.faults import AskedFault, read_faults
from equipoise.errors import ConfigError
from tests.command_line import run_command

runs_long = pytest.mark.skipif(
    not os.environ.get("EQUIPOISE_FAULTS"), reason="takes a minute: set EQUIPOISE_FAULTS=1"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("elastic", "--sizes=2"), "sizes must be at least two"),
        (("elastic", "--sizes=2,0"), "each from 1 on, got (2, 0)"),
        (("elastic", "--sizes=2,2"), "sizes must differ from the ones before them"),
        (("elastic", "--model=x", "--size-gb=1"), "either given or made of a size, not both"),
        (("elastic", "--sizes=two"), "must be numbers with commas between, like 2,4,2"),
        (("recovery", "--ranks=1"), "at least 2 ranks, of which one may die, got 1"),
        (("recovery", "--kills=0"), "at least 1 rank must be killed, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: tuple[str, ...], message: str) -> None:
    done = run_command("bench", *words)
    assert done.code == 2
    assert message in done.err


def test_faults_are_read_and_refused() -> None:
    assert read_faults(["1@40", "0@2"], ["3@7"]) == (
        AskedFault(1, 40, "kill"),
        AskedFault(0, 2, "kill"),
        AskedFault(3, 7, "hang"),
    )
    for text in ("1", "@4", "1@", "one@4", "1@0", "-1@4"):
        with pytest.raises(ConfigError, match="must be RANK@STEP, like 1@40"):
            read_faults([text], [])
    done = run_command("run", "--prompts=8", "--ranks=2", "--kill=2@3")
    assert (done.code, done.out) == (2, "")
    assert "--kill 2@3: ranks are 0 to 1" in done.err


@runs_long
@pytest.mark.timeout(300)
def test_answers_are_right_through_changes_of_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "elastic.json"
    done = run_command("bench", "elastic", "--sizes=1,2,1", "--requests=60", f"--json={path}")
    assert done.code == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["what"].startswith("requests failed or wrong, of ")
    assert (rows[0]["value"], rows[0]["goal"], rows[0]["met"]) == (0, 0, True)
    losses, changes = rows[1:5], rows[5:]
    assert all(row["what"].startswith("held-out loss of ") and row["met"] for row in losses)
    assert len(changes) == 4
    assert all(row["value"] > 0 for row in changes)


@runs_long
@pytest.mark.timeout(300)
def test_answers_are_right_through_a_death(tmp_path: Path) -> None:
    path = tmp_path / "recovery.json"
    done = run_command(
        "bench", "recovery", "--ranks=2", "--kills=1", "--requests=60", f"--json={path}"
    )
    assert done.code == 0
    rows = json.loads(path.read_text())["rows"]
    assert (rows[0]["value"], rows[0]["met"]) == (0, True)
    assert 0 < rows[1]["value"] <= rows[1]["full_s"]


@runs_long
@pytest.mark.timeout(300)
def test_the_text_goes_on_where_a_rank_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "killed.json"
    done = run_command("run", "--prompts=16", "--ranks=2", "--kill=1@5", f"--json={path}")
    assert done.code == 0
    assert "rank-1 was killed by SIGKILL, with " in done.out
    figures = json.loads(path.read_text())
    assert (figures["deaths"], figures["recoveries"]) == (1, 1)
    assert figures["identical"] == figures["tokens"] > 0
