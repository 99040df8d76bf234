"""What clients see of a server that changes, as `equipoise bench serve` measures and judges it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.bundled import model_directory
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.server.client_load import Asked, ClientLoad, Gap, prepare
from equipoise.server.traffic import Event, TrafficSpec, judge
from tests.command_line import run_command
from tests.server.serving import Running


def test_the_slowest_token_of_a_hundred_is_judged() -> None:
    event = Event("2 to 4 ranks", 10.0, 20.0, 0.2, {"step_ms": 50.0})
    row = judge(event, [0.05] * 99 + [0.3] * 1)
    assert row["what"] == "2 to 4 ranks: between tokens, p99"
    assert (row["value"], row["goal"], row["met"]) == (300.0, 200.0, False)
    assert (row["median_ms"], row["longest_ms"], row["step_ms"]) == (50.0, 300.0, 50.0)
    assert judge(event, [0.05] * 100 + [0.3] * 1)["met"]
    with pytest.raises(EquipoiseError, match="2 to 4 ranks: no tokens came meanwhile"):
        judge(event, [])


def test_clients_tell_right_answers_from_wrong_ones(running: Running) -> None:
    asked = prepare(model_directory(), 6)
    assert len(asked.expected) == 16
    first, *others = asked.expected
    twisted = {first: "something else", **{prompt: asked.expected[prompt] for prompt in others}}
    with ClientLoad(running.url, "model", Asked(twisted, 6), 2) as load:
        load.wait_for(24, 120.0)
    assert load.num_ended >= 24
    assert load.wrong
    assert all(said.startswith(f"{first!r}: {asked.expected[first]!r}") for said in load.wrong)


def test_gaps_are_those_that_touch_the_time_asked_for(running: Running) -> None:
    load = ClientLoad(running.url, "model", Asked({}, 1), 1)
    load._gaps = [Gap(0.0, 1.0), Gap(1.0, 3.0), Gap(3.0, 3.5), Gap(9.0, 9.5)]
    assert load.find_gaps(2.0, 3.2) == [2.0, 0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sizes=2,x",), "--sizes 2,x: must be numbers with commas between"),
        (("--sizes=2,2",), "sizes must be from 1 up, each unlike the last, got (2, 2)"),
        (("--clients=0",), "num_clients must be at least 1, got 0"),
        (("--tokens=0",), "num_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_said(words: tuple[str, ...], message: str) -> None:
    done = run_command("bench", "serve", "--case=scale", *words)
    assert (done.code, done.err.startswith(f"equipoise: {message}")) == (2, True)


def test_sizes_of_no_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes must be from 1 up"):
        TrafficSpec(sizes=(1, 0))


@pytest.mark.more_faults
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["scale", "kill"])
def test_a_server_is_measured_as_users_start_it(tmp_path: Path, case: str) -> None:
    path = tmp_path / "out.json"
    sizes = {"scale": "1,2,1", "kill": "2"}[case]
    few = ("--requests=30", "--clients=4", "--tokens=8", "--kills=1", "--every=0")
    done = run_command(
        "bench", "serve", f"--case={case}", f"--sizes={sizes}", *few, f"--json={path}"
    )
    assert done.code == 0, done.err
    answers, *changes = json.loads(path.read_text())["rows"]
    assert (answers["value"], answers["met"]) == (0, True)
    assert len(changes) == {"scale": 2, "kill": 1}[case]
    for row in changes:
        assert row["value"] > 0
        assert row["met"] == (row["value"] <= row["goal"])
