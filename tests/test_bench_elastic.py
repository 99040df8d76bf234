"""`equipoise bench elastic` and `recovery`, `run --kill`: what they refuse, and small runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from equipoise.bench.random_model import write_random_model
from equipoise.bench.request_stream import TIE, _count_wrong
from equipoise.cli.faults import SILENCE_S, AskedFault, read_faults
from equipoise.elastic.spec import ServiceSpec
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
        (("elastic", "--dispatch=nixl_ep", "--size-gb=1"), "nixl_ep needs device cuda, not cpu"),
        (("elastic", "--sizes=two"), "must be numbers with commas between, like 2,4,2"),
        (("recovery", "--ranks=1"), "at least 2 ranks, of which one may die, got 1"),
        (("elastic", "--requests=0"), "--requests must be at least 1, got 0"),
        (("elastic", "--in-flight=0"), "--in-flight must be at least 1, got 0"),
        (("elastic", "--model=nowhere"), "nowhere: no such directory; a model is a Hugging Face"),
        (("elastic", "--size-gb=nan"), "--size-gb must be a number above 0, got nan"),
        (("recovery", "--kills=0"), "at least 1 rank must be killed, got 0"),
        (("recovery", "--new-tokens=0"), "--new-tokens must be at least 1, got 0"),
        pytest.param(
            ("recovery", "--device=cuda"),
            "--device cuda: torch sees no CUDA device here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (("recovery", "--every=-1"), "--every must be a number from 0 on, got -1.0"),
        (("recovery", "--timeout=inf"), "--timeout must be a number above 0, got inf"),
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


def test_an_answer_within_the_rounding_of_a_narrow_dtype_is_no_wrong_one() -> None:
    class Plain:
        device = "cpu"

        def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            scores = torch.tensor([8.0, 7.9, 7.0]).expand(len(input_ids), 2, 3)
            return SimpleNamespace(logits=scores)

    answers = [[0, 0], [0, 1], [1, 2]]
    assert _count_wrong(Plain(), [[5]] * 3, answers, TIE["bfloat16"]) == (1, 1)
    assert _count_wrong(Plain(), [[5]] * 3, answers, TIE["float32"]) == (2, 0)


def test_a_random_model_is_as_large_as_asked_in_either_dtype(tmp_path: Path) -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        directory = tmp_path / dtype
        directory.mkdir()
        write_random_model(directory, 3e5, num_layers=2, num_experts=8, dtype=dtype)
        tensors = load_file(directory / "model.safetensors")
        experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        num_bytes = sum(tensor.numel() for tensor in experts) * itemsize
        assert 0.5e5 < num_bytes <= 3e5
        hidden = experts[0].shape[1]
        assert (
            0.8
            < float(torch.cat([one.float().flatten() for one in experts]).std()) * (hidden**0.5)
            < 1.2
        )


def test_a_service_over_nixl_ep_says_what_it_needs() -> None:
    needed = {"device": "cuda", "dtype": "bfloat16", "dispatch": "nixl_ep"}
    for given, message in (
        ({"dispatch": "nixl_ep"}, "dispatch nixl_ep needs device cuda, not cpu"),
        ({**needed, "dtype": "float32"}, "dispatch nixl_ep needs dtype bfloat16, not float32"),
        (needed, "say slots_per_rank and max_ranks"),
        ({**needed, "slots_per_rank": 8, "max_ranks": 1}, "of 1 does not hold the 2 ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServiceSpec(Path("model"), 2, **given)  # type: ignore[arg-type]


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
def test_the_text_goes_on_where_a_rank_is_killed_and_another_hangs(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    faults = ("--kill=1@5", "--hang=2@8")
    done = run_command("run", "--prompts=16", "--ranks=3", *faults, f"--json={path}")
    assert done.code == 0
    assert "rank-1 was killed by SIGKILL, with " in done.out
    assert f"rank-2 gave no sign of life for {SILENCE_S:g} s, and was given up, with " in done.out
    figures = json.loads(path.read_text())
    # The second may come before the first has been gone through.
    assert (figures["deaths"], figures["recoveries"] in (1, 2)) == (2, True)
    assert figures["identical"] == figures["tokens"] > 0
