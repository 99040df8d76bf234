"""`equipoise run` whose ranks a launcher started: one voice, one file, and an end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.sessions import end_session, list_children, read_processes, start
from tests.test_cli_run import ENDLESS, SMALL, list_files

pytestmark = pytest.mark.timeout(300)

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "equipoise", "run")


def without_ranks(options: tuple[str, ...]) -> list[str]:
    return [option for option in options if not option.startswith("--ranks")]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """How it ended, what it said, and what it said of errors."""
    try:
        out, errors = process.communicate(timeout=200)
    finally:
        end_session(process)
    return process.returncode, out, errors


@pytest.mark.slow
def test_ranks_of_torchrun_do_the_job_and_rank_0_writes_it_down(tmp_path: Path) -> None:
    words = [*without_ranks(SMALL), "--json=run.json"]
    code, out, _ = finish(start(tmp_path, *TORCHRUN, *words))
    assert code == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert (result["ranks"], result["prompts"], result["new_tokens"]) == (2, 8, 32)
    assert result["outputs_identical"] is True
    assert out.count("serving, balancing on\n") == 1
    # Wherever the line is broken.
    assert " ".join(out.split()).count("64 of 64 tokens identical to the plain model") == 1
    assert list_files(tmp_path) == ["equipoise-report.html", "run.json"]


def test_a_bad_option_is_told_once(tmp_path: Path) -> None:
    code, out, errors = finish(start(tmp_path, *TORCHRUN, "--policy=fortune"))
    assert code != 0
    told = [line for line in errors.splitlines() if line.startswith("equipoise: ")]
    assert told == ["equipoise: no policy 'fortune': there are deepseek, flow"]
    assert (out, list_files(tmp_path)) == ("", [])


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(tmp_path: Path) -> None:
    process = start(tmp_path, *TORCHRUN, *without_ranks(ENDLESS), "--no-check", "--json=run.json")
    try:
        assert process.stdout is not None
        assert any(line == "serving, balancing off\n" for line in process.stdout)
        ranks = list_children(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=100)
        assert time.monotonic() - began < 25, "torchrun kills what does not end within 30 s"
        assert process.returncode != 0
        assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in errors
        # torchrun gives each of its ranks a session of its own.
        assert not set(ranks) & {pid for pid, _ in read_processes()}
    finally:
        for rank in list_children(process.pid):
            os.kill(rank, signal.SIGKILL)
        end_session(process)
    assert list_files(tmp_path) == []


def start_ranks(folder: Path, port: int, options: list[list[str]]) -> list[subprocess.Popen[str]]:
    """One process a rank, as a launcher of env:// jobs that is not torchrun starts them."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(options))}
    return [
        start(folder, "equipoise", "run", *words, environment={**job, "RANK": str(rank)})
        for rank, words in enumerate(options)
    ]


def test_ranks_that_were_given_different_options_are_refused_in_one_voice(tmp_path: Path) -> None:
    told = (
        "equipoise: rank 1 was given other options than rank 0: other prompts, seed 0, not 3, "
        "policy deepseek, not flow\n"
    )
    with socket.socket() as held:
        # Bound until rank 0 listens, so that nobody is given the port meanwhile; with this option
        # rank 0 may still have it, as long as only one of the two listens.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        ranks = start_ranks(tmp_path, port, [["--seed=3"], ["--policy=deepseek", "--prompts=8"]])
        assert [finish(rank) for rank in ranks] == [(2, "", told), (2, "", "")]
    assert list_files(tmp_path) == []


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (rank,) = start_ranks(tmp_path, port, [[]])
        told = (
            f"equipoise: rank 0: the port of 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) is in "
            "use: choose one that is free\n"
        )
        assert finish(rank) == (2, "", told)
