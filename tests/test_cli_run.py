"""`equipoise run`: what it writes, what it refuses, and how it ends when something ends it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.bundled import model_directory
from tests.command_line import Done, run_command
from tests.ranks import start_forkserver
from tests.sessions import end_session, list_children, start, wait_until_alone

pytestmark = pytest.mark.timeout(300)

SMALL = ("--ranks=2", "--prompts=8", "--max-new-tokens=4", "--step-interval=2", "--window-size=2")
ENDLESS = ("--ranks=2", "--prompts=400", "--max-new-tokens=200", "--batch-size=1")
SERVING = "serving, balancing on"

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (
        ("--model=nowhere",),
        "nowhere: no such directory; a model is a Hugging Face checkpoint directory",
    ),
    "a model that is a file": (
        ("--model=prose.txt",),
        "prose.txt: is not a directory; a model is a Hugging Face checkpoint directory",
    ),
    "no checkpoint": (("--model=folder",), "folder: has no config.json; is it a checkpoint?"),
    "a dense model": (
        ("--model=dense",),
        "dense: model_type 'llama' is not a family that can be served: ask for one of qwen3_moe, "
        "mixtral, olmoe",
    ),
    "a broken config.json": (
        ("--model=broken",),
        "broken/config.json: cannot be read as JSON: Expecting value: line 1 column 16 (char 15)",
    ),
    "no weights": (("--model=bare",), "bare: has no weights (*.safetensors)"),
    "pickled weights": (
        ("--model=pickled",),
        "pickled: weights are pickled (pytorch_model.bin), which can run code: convert them to "
        "safetensors",
    ),
    "no ranks": (("--ranks=0",), "--ranks must be at least 1, got 0"),
    "slots that ranks do not divide": (
        ("--redundant-experts=3",),
        "32 experts and 3 redundant ones make 35 slots, which 4 ranks do not divide: ask for 0, 4 "
        "or 8 redundant experts",
    ),
    "more slots than any rank has use for": (
        ("--redundant-experts=100000",),
        "--redundant-experts 100000: 32 experts are on all of 4 ranks with 96",
    ),
    "fewer slots than experts": (
        ("--redundant-experts=-4",),
        "--redundant-experts: num_redundant_experts must be 'auto' or a whole number from 0 up, "
        "got -4",
    ),
    "redundant experts by word": (
        ("--redundant-experts=some",),
        "--redundant-experts: num_redundant_experts must be 'auto' or a whole number from 0 up, "
        "got 'some'",
    ),
    "a misspelt policy": (
        ("--policy=deepsek",),
        "no policy 'deepsek': did you mean 'deepseek'? there are deepseek, flow",
    ),
    "another policy": (("--policy=fortune",), "no policy 'fortune': there are deepseek, flow"),
    "a misspelt option": (
        ("--step-intervl=3",),
        "unknown argument '--step-intervl=3': did you mean '--step-interval'?",
    ),
    "an option of nobody": (("--colour",), "unknown argument '--colour'"),
    "an argument": (("prose.txt",), "unknown argument 'prose.txt'"),
    "no window": (
        ("--window-size=0",),
        "--window-size: window_size: input should be greater than or equal to 1, got 0",
    ),
    "a misspelt key as vLLM writes it": (
        ("--eplb-config.windw_size", "3"),
        "--eplb-config.windw_size: unknown option 'windw_size': did you mean 'window_size'?",
    ),
    "a misspelt key in JSON": (
        ('--eplb-config={"step_intervall": 3}',),
        "--eplb-config: unknown option 'step_intervall': did you mean 'step_interval'?",
    ),
    "a key twice in JSON": (
        ('--eplb-config={"window_size": 3, "window_size": 4}',),
        "--eplb-config: key 'window_size' stands twice",
    ),
    "no JSON": (
        ("--eplb-config={window_size: 3}",),
        "--eplb-config: not JSON: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)",
    ),
    "options that contradict": (
        ("--eplb-config.window_size=3", "--window-size=4"),
        "--window-size 4 contradicts --eplb-config.window_size, which says window_size = 3: give "
        "one of them",
    ),
    "no plans, and often": (
        ("--no-balance", "--step-interval=4"),
        "--no-balance makes no plans, and --step-interval says how often: give one of them",
    ),
    "a misspelt key in a file": (
        ("--config=misspelt.yaml",),
        "misspelt.yaml: unknown option 'comunicator': did you mean 'communicator'?",
    ),
    "no configuration file": (("--config=nowhere",), "nowhere: no such configuration file"),
    "no YAML": (
        ("--config=broken.yaml",),
        "broken.yaml: not YAML or JSON: line 2, column 1: expected ',' or ']', but got "
        "'<stream end>'",
    ),
    "no text to continue": (
        ("--input=empty.txt",),
        "--input empty.txt: is empty; give it some text to continue",
    ),
    "blank text": (
        ("--input=blank.txt",),
        "--input blank.txt: is empty; give it some text to continue",
    ),
    "a binary file": (("--input=binary",), "--input binary: is not UTF-8 text: invalid start byte"),
    "no input": (("--input=nowhere",), "--input nowhere: no such file"),
    "a folder for input": (("--input=folder",), "--input folder: cannot be read: Is a directory"),
    "a file that nobody can read": (
        ("--input=/proc/self/mem",),
        "--input /proc/self/mem: cannot be read: Input/output error",
    ),
    "no prompts": (("--prompts=0",), "--prompts must be at least 1, got 0"),
    "no prompts of a file": (
        ("--input=prose.txt", "--prompts=0"),
        "--prompts must be at least 1, got 0",
    ),
    "prompts that kinds do not share": (
        ("--prompts=7",),
        "--prompts 7: 4 kinds of text share them evenly, so ask for 4 or 8",
    ),
    "no tokens": (("--max-new-tokens=0",), "--max-new-tokens must be at least 1, got 0"),
    "no batch": (("--batch-size=0",), "--batch-size must be at least 1, got 0"),
    "no steps": (("--steps=0",), "--steps must be at least 1, got 0"),
    "no patience": (("--timeout=0",), "--timeout must be from 1 to 86400 s, got 0"),
    "endless patience": (("--timeout=inf",), "--timeout must be from 1 to 86400 s, got inf"),
    "no number": (("--timeout=nan",), "--timeout must be from 1 to 86400 s, got nan"),
    "a negative seed": (
        ("--seed=-1",),
        "--seed must be from 0 to 9223372036854775807, got -1",
    ),
    "another dtype": (
        ("--dtype=float8",),
        "--dtype float8: must be one of float32, bfloat16, float16",
    ),
    "another device": (("--device=tpu",), "--device tpu: must be one of auto, cpu, cuda"),
    "another dispatcher": (
        ("--dispatch=pigeon",),
        "--dispatch pigeon: must be one of torch, nixl_ep",
    ),
    "NIXL-EP on the CPU": (
        ("--dispatch=nixl_ep", "--device=cpu"),
        "--dispatch nixl_ep sends tokens between GPUs: add --device cuda",
    ),
    "NIXL-EP in float32": (
        ("--dispatch=nixl_ep",),
        "--dispatch nixl_ep carries bfloat16, not float32: add --dtype bfloat16",
    ),
    "figures into a folder": (("--json=folder",), "--json folder: is a directory; name a file"),
    "figures where nobody can write": (
        ("--json=/proc/run.json",),
        "--json /proc/run.json: cannot be written: No such file or directory",
    ),
    "a report into a folder": (
        ("--report=folder",),
        "--report folder: is a directory; name a file",
    ),
    "figures and report in one file": (
        ("--json=both", "--report=both"),
        "--json and --report are both both: name two files",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of `BAD` find what they name."""
    monkeypatch.chdir(tmp_path)
    config = (model_directory() / "config.json").read_text()
    for name, content in {
        "prose.txt": "It was a bright day, and the clocks agreed.",
        "empty.txt": "",
        "blank.txt": " \n\t",
        "broken.yaml": "window_size: [1\n",
        "misspelt.yaml": "comunicator: nixl\n",
        "dense/config.json": '{"model_type": "llama"}',
        "broken/config.json": '{"model_type": ',
        "bare/config.json": config,
        "pickled/config.json": config,
        "pickled/pytorch_model.bin": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_and_exit_2_and_nothing_is_written(
    folder: Path, case: str
) -> None:
    options, message = BAD[case]
    there = list_files(folder)
    done = run_command("run", *options)
    assert done == Done(2, "", f"equipoise: {message}\n")
    assert list_files(folder) == there


def test_figures_into_no_folder_are_refused(folder: Path) -> None:
    done = run_command("run", "--json=nowhere/run.json")
    told = f"--json nowhere/run.json: there is no directory {folder}/nowhere; make it first"
    assert done == Done(2, "", f"equipoise: {told}\n")


def test_more_prompts_than_text_are_refused(folder: Path) -> None:
    done = run_command("run", "--prompts=4000000")
    assert done.code == 2
    assert re.fullmatch(
        r"equipoise: --prompts 4000000: there is not so much text; ask for fewer, or give your own "
        r"by --input \(Held-out text of kind 'python' gives \d+ distinct excerpts of 192 bytes, "
        r"not 1250000\)\n",
        done.err,
    )


def test_a_wrong_variable_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_WINDOW_SIZ", "3")
    told = (
        "environment EQUIPOISE_WINDOW_SIZ: unknown option 'window_siz': did you mean 'window_size'?"
    )
    assert run_command("run") == Done(2, "", f"equipoise: {told}\n")


def test_half_of_a_launchers_variables_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run_command("run").err == (
        "equipoise: environment: WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set beside RANK or "
        "WORLD_SIZE: start with torchrun, or unset RANK and WORLD_SIZE to start ranks on this "
        "machine\n"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ranks=many", "Invalid value for '--ranks'"),
        ("--step-interval", "Option '--step-interval' requires an argument"),
    ],
)
def test_an_option_that_cannot_be_read_says_which(folder: Path, option: str, message: str) -> None:
    there = list_files(folder)
    done = run_command("run", option)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err
    assert list_files(folder) == there


def test_debug_adds_the_traceback(folder: Path) -> None:
    done = run_command("run", "--model=nowhere", "--debug")
    assert done.code == 2
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert done.err.endswith("\nequipoise: " + BAD["no model"][1] + "\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with ranks that come from the forkserver of all tests."""
    monkeypatch.chdir(tmp_path)
    start_forkserver()
    return tmp_path


NEEDS_TORCH = {
    "--communicator=nixel": (
        "unknown communicator 'nixel': did you mean 'nixl'? there are auto, nixl, pynccl, "
        "torch_gloo, torch_nccl"
    ),
    "--device=cuda": "--device cuda: torch sees no CUDA device here; use --device cpu",
}


@pytest.mark.parametrize("option", NEEDS_TORCH)
def test_what_only_torch_knows_is_refused(here: Path, option: str) -> None:
    if option == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run_command("run", option) == Done(2, "", f"equipoise: {NEEDS_TORCH[option]}\n")
    assert list_files(here) == []


def test_what_only_a_rank_finds_is_one_line_that_names_it(here: Path) -> None:
    model = here / "model"
    model.mkdir()
    for path in model_directory().iterdir():
        (model / path.name).write_bytes(path.read_bytes()[:1000])
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    there = list_files(here)
    done = run_command("run", f"--model={model}", "--ranks=2", "--quiet")
    assert done.code == 2
    # On a slow machine it says that a policy is compiled.
    *_, said = done.err.splitlines()
    where = f"{model}/model\\.safetensors"
    assert re.fullmatch(rf"equipoise: rank [01]: {where}: is truncated: .+", said)
    assert list_files(here) == there


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A small run, and the folder that it ran in; --sync, so that its steps are known."""
    folder = tmp_path_factory.mktemp("small")
    return run_equipoise(folder, *SMALL, "--sync", "--json=run.json"), folder


@pytest.mark.slow
def test_a_small_run_shows_and_writes_all(small_run: tuple[Done, Path]) -> None:
    done, folder = small_run
    # On a slow machine it says that a policy is compiled.
    assert (done.code, re.sub("^compiling the policy flow, .+\n", "", done.err)) == (0, "")
    assert list_files(folder) == ["equipoise-report.html", "run.json"]
    result = read_result(folder / "run.json")
    assert {name: result[name] for name in ("model", "device", "dtype", "ranks", "prompts")} == {
        "model": "bundled model",
        "device": "cpu",
        "dtype": "float32",
        "ranks": 2,
        "prompts": 8,
    }
    assert (result["new_tokens"], result["tokens_compared"]) == (8 * 4, 2 * 8 * 4)
    assert (result["slots_per_rank"], result["redundant_experts"]) == (17, 2)
    assert result["outputs_identical"] is True
    assert result["divergence"] is None
    assert 0 <= result["max_logit_diff"] < 1e-3
    assert result["tokens_per_s"] > 0
    for loss in result["losses"].values():
        assert abs(loss["on"] - loss["plain"]) < 1e-4
        assert abs(loss["off"] - loss["plain"]) < 1e-4
    # On a slow machine it says how far reading is.
    lines = [line for line in done.out.splitlines() if not line.startswith("reading weights: ")]
    assert lines[0].startswith("bundled model: 2.6 M parameters in float32, 4 MoE layers of 32 ")
    assert SERVING in lines
    assert lines[-1] == "Report: equipoise-report.html"
    assert result["summary"] in " ".join(done.out.split())
    assert result["summary"] in (folder / "equipoise-report.html").read_text()


def test_a_small_run_tells_each_rebalance(small_run: tuple[Done, Path]) -> None:
    _, folder = small_run
    result = read_result(folder / "run.json")
    rebalances = result["rebalances"]
    assert [each["step"] for each in rebalances] == list(range(2, rebalances[-1]["step"] + 1, 2))
    assert [each["planned_step"] for each in rebalances] == [each["step"] for each in rebalances]
    assert set(rebalances[0]) == {
        "planned_step", "step", "moves", "local_moves", "bytes", "plan_s", "transfer_s",
        "forward_s", "balancedness_before", "balancedness_after",
    }  # fmt: skip
    # In bytes: three matrices of 128 x 48 float32 to an expert.
    assert [each["bytes"] for each in rebalances] == [
        each["moves"] * 3 * 128 * 48 * 4 for each in rebalances
    ]
    assert sum(each["moves"] for each in rebalances) > 0
    balancedness = result["balancedness"]
    assert 0 < balancedness["before"] <= 1
    assert 0 < balancedness["after"] <= 1
    assert balancedness["first_step"] == 3
    assert balancedness["last_step"] == result["steps"]


def test_own_text_in_half_precision_with_figures_on_standard_output(here: Path) -> None:
    (here / "own.txt").write_text("The clocks agreed, and nobody was late. " * 60)
    done = run_command(
        "run", "--input=own.txt", "--prompts=3", "--steps=3", "--dtype=bfloat16", "--ranks=2",
        "--redundant-experts=0", "--json=-", "--report=own.html",
    )  # fmt: skip
    assert done.code == 0
    result = json.loads(done.out)
    assert (result["dtype"], result["prompts"], result["steps"]) == ("bfloat16", 3, 3)
    assert (result["slots_per_rank"], result["redundant_experts"]) == (16, 0)
    assert (result["divergence"] is None) == result["outputs_identical"]
    assert result["tokens_compared"] == 2 * 3 * 3
    assert list(result["losses"]) == ["own"]
    assert SERVING in done.err.splitlines()
    assert list_files(here) == ["own.html", "own.txt"]


def test_a_quiet_run_without_the_check_is_silent(here: Path) -> None:
    """And without balancing nothing moves."""
    done = run_command(
        "run", *SMALL[:3], "--quiet", "--no-check", "--policy=flow", "--communicator=torch_gloo",
        "--no-balance", "--json=run.json", "--report=/dev/null",
    )  # fmt: skip
    assert done == Done(0, "", "")
    result = read_result(here / "run.json")
    assert (result["policy"], result["communicator"]) == ("flow", "torch_gloo")
    assert result["rebalances"] == []
    assert result["outputs_identical"] is None
    assert result["max_logit_diff"] is None
    assert list_files(here) == ["run.json"]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_all_ranks_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    with serve(tmp_path) as process:
        began = time.monotonic()
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        # On a slow machine it has said that a policy is compiled.
        *_, said = errors.splitlines()
        assert (process.returncode, said) == (status, f"equipoise: {word}; all ranks have ended")
        wait_until_alone(process.pid, began + 180.0)
    assert list_files(tmp_path) == []


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    with serve(tmp_path) as process:
        began = time.monotonic()
        # Ranks are children of the forkserver, which is one of this process's children.
        ranks = [pid for child in list_children(process.pid) for pid in list_children(child)]
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        *_, said = errors.splitlines()
        assert (process.returncode, said) == (1, "equipoise: rank 1 was killed by SIGKILL")
        wait_until_alone(process.pid, began + 180.0)
    assert list_files(tmp_path) == []


def run_equipoise(folder: Path, *words: str) -> Done:
    """`equipoise run` in a process of its own, which must leave none behind."""
    process = start(folder, "equipoise", "run", *words)
    try:
        out, errors = process.communicate(timeout=240)
        wait_until_alone(process.pid, time.monotonic() + 60.0)
    finally:
        end_session(process)
    return Done(process.returncode, out, errors)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that goes on for long, once it serves."""
    process = start(
        folder, "equipoise", "run", *ENDLESS, "--json=run.json", "--no-check", "--steps=100000"
    )
    try:
        assert process.stdout is not None
        assert any(line == "serving, balancing off\n" for line in process.stdout)
        yield process
    finally:
        end_session(process)


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def read_result(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
