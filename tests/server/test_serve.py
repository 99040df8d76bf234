"""`equipoise serve` as a user starts it: ranks come and go under load, and it ends in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from equipoise.server.client import ServerClient, ServerRefused
from equipoise.server.settings import ADMIN_KEY, API_KEY
from tests.command_line import run_command
from tests.server.load import Load
from tests.server.serving import KEYS, wait_until
from tests.server.test_completions import MAX_TOKENS, plain
from tests.sessions import end_session, start, wait_until_alone

__all__ = ["plain"]

pytestmark = pytest.mark.timeout(400)


@contextlib.contextmanager
def serve(folder: Path, *words: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """The process, and where it serves."""
    command = ("serve", "--port=0", "--log=log.jsonl", *words)
    process = start(folder, "equipoise", *command, environment=environment)
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found := re.match(r"serving \S+ at (http://\S+)\n", line):
                break
        assert found is not None, process.stderr and process.stderr.read()
        yield process, found[1]
    finally:
        end_session(process)


def test_ranks_come_and_go_under_load_and_the_end_is_in_good_order(
    tmp_path: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {API_KEY: KEYS.api, ADMIN_KEY: KEYS.admin}
    words = ("--ranks=2", "--step-interval=8", "--drain-timeout=120")
    with serve(tmp_path, *words, **keys) as (process, url):
        client = ServerClient(url, {ADMIN_KEY: KEYS.admin})
        with Load(url, plain, MAX_TOKENS, key=KEYS.api) as load:
            load.wait_for_more()
            assert client.scale(to=3, dry_run=True)["joining"] == ["rank-2"]
            assert client.scale(to=3)["done"]
            load.wait_for_more()
            client.rebalance()
            assert client.scale(remove=["rank-0"])["leaving"] == ["rank-0"]
            load.wait_for_more()
            _kill(client, "rank-2")
            load.wait_for_more()
        assert load.wrong == []
        # A rank that has left stands among the others until its process has ended.
        wait_until(lambda: "rank-0" not in list_states(client))
        assert list_states(client) == {"rank-1": "serving", "rank-2": "dead"}
        totals = client.status()["totals"]
        assert (totals["failed"], totals["scalings"], totals["deaths"]) == (0, 2, 1)
        assert totals["rerun"] > 0
        assert client.placement()["num_ranks"] == 1
        with pytest.raises(ServerRefused, match="it takes the admin key"):
            ServerClient(url, {API_KEY: KEYS.api}).scale(to=3)
        monkeypatch.setenv(API_KEY, KEYS.api)
        shown = run_command("top", "--url", url)
        assert (shown.code, "rank-2" in shown.out) == (0, True)
        _end(process, url)
    ended = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (ended["event"], ended["drained"]) == ("ended", True)


def list_states(client: ServerClient) -> dict[str, str]:
    return {rank["name"]: rank["state"] for rank in client.status()["ranks"]}


def _kill(client: ServerClient, name: str) -> None:
    """Kill a rank that has a request."""

    def find() -> dict[str, Any]:
        return next(rank for rank in client.status()["ranks"] if rank["name"] == name)

    pid = find()["pid"]

    def stops_with_a_request() -> bool:
        # Stopped, so that the request does not end between the question and the death.
        os.kill(pid, signal.SIGSTOP)
        if find()["running"] > 0:
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    wait_until(stops_with_a_request)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: client.status()["totals"]["recoveries"] == 1)


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, with nothing in flight."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def _end(process: subprocess.Popen[str], url: str) -> None:
    """SIGTERM: what is in flight ends, nothing new is taken, no process is left."""
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {KEYS.api}"}
    with (
        httpx2.Client(base_url=url, headers=headers, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert [*lines][-1] == "data: [DONE]"
    assert process.wait(120) == 0
    wait_until_alone(process.pid, time.monotonic() + 60)


@pytest.mark.more_faults
def test_a_server_without_ranks_ends_and_says_why(tmp_path: Path) -> None:
    with serve(tmp_path, "--ranks=1") as (process, url):
        (rank,) = ServerClient(url, {}).status()["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)
        assert process.wait(120) == 2
        assert process.stderr is not None
        said = process.stderr.read().splitlines()[-1]
        assert said.startswith("equipoise: ")
        assert "rank-0 was killed by SIGKILL" in said
        wait_until_alone(process.pid, time.monotonic() + 60)


@pytest.mark.more_faults
def test_ranks_of_a_server_that_was_killed_are_the_next_ones(
    tmp_path: Path, plain: dict[str, str]
) -> None:
    words = ("--ranks=2", "--state=state.json")
    with serve(tmp_path, *words) as (first, url):
        before = {rank["name"]: rank["pid"] for rank in ServerClient(url, {}).status()["ranks"]}
        first.kill()
        first.wait(60)
        with serve(tmp_path, *words) as (second, url):
            client = ServerClient(url, {})
            with Load(url, plain, MAX_TOKENS) as load:
                load.wait_for_more()
                assert client.scale(to=3)["done"]
                load.wait_for_more()
            assert load.wrong == []
            after = {rank["name"]: rank["pid"] for rank in client.status()["ranks"]}
            assert before.items() < after.items()
            end(second)
    assert not (tmp_path / "state.json").exists()


BAD = {
    ("--port=99999",): "--port must be from 0 to 65535, got 99999",
    ("--host=0.0.0.0",): "--host 0.0.0.0 lets other machines in: set EQ_API_KEY and EQ_ADMIN_KEY",
    ("--ranks=0",): "--ranks must be at least 1, got 0",
    ("--max-len=5000",): "--max-len 5000: the model takes 2048 tokens",
    ("--queue=0",): "--queue must be at least 1, got 0",
    ("--drain-timeout=0",): "--drain-timeout must be above 0, got 0.0",
    ("nowhere",): "nowhere: no such directory; a model is a Hugging Face checkpoint directory",
    ("--policy=fortune",): "no policy 'fortune': there are deepseek, flow",
    ("--no-balance", "--step-interval=4"): "--no-balance makes no plans, and --step-interval says",
    ("--colour",): "unknown argument '--colour'",
    ("--eplb-config.windw_size", "3"): "--eplb-config.windw_size: unknown option 'windw_size'",
    ("--eplb-config.window_size", "3", "nowhere"): "nowhere: no such directory",
    ("--log=/nowhere/log",): "--log /nowhere/log: cannot be written: No such file or directory",
    ("--launcher=torchrun",): "--launcher torchrun: this process is none of torchrun's: torchrun ",
    ("--interface=eth99",): "eth99: is no interface of this host: there are ",
    ("--launcher=ray", "--state=x"): "--state is for ranks of this machine: with ray they end too",
    ("--slots-per-rank=0",): "--slots-per-rank must be at least 1, got 0",
    ("--silence=0.1",): "--silence of 0.1 s gives ranks up between two signs of life, 0.2 s apart",
    ("--ray-cpus=2",): "--ray-cpus is for --launcher ray",
    ("--redundant-experts=3",): "32 experts and 3 redundant ones make 35 slots",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_served_is_said_in_one_line(words: tuple[str, ...]) -> None:
    done = run_command("serve", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"equipoise: {BAD[words]}")
    assert done.err.count("\n") == 1


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command("serve", f"--port={port}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(
        f"equipoise: --host 127.0.0.1 --port {port}: cannot be bound to: Address already in use"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url=ftp://x",), "ftp://x: is no address of a server, like http://127.0.0.1:8000"),
        (("--url=127.0.0.1:8000",), "127.0.0.1:8000: is no address of a server"),
        (("--url=http://127.0.0.1:1",), "http://127.0.0.1:1: does not answer: Connection refused"),
        (("--interval=0",), "--interval must be at least 0.1 s, got 0"),
    ],
)
def test_top_says_why_it_shows_nothing(words: tuple[str, ...], message: str) -> None:
    done = run_command("top", *words)
    assert (done.code, done.err.startswith(f"equipoise: {message}")) == (2, True)
