"""`equipoise serve` in torchrun's processes, on one machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from equipoise.server.client import ServerClient, ServerRefused
from tests.server.load import Load
from tests.server.serving import wait_until
from tests.server.test_completions import MAX_TOKENS, plain
from tests.sessions import end_session, list_children, list_session, start

__all__ = ["plain"]

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "equipoise")


@pytest.mark.more_faults
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_dies_and_comes_back_in_its_place(tmp_path: Path, plain: dict[str, str]) -> None:
    process = start(
        tmp_path, *TORCHRUN, "serve", "--port=0", "--device=cpu", "--log-file=log.jsonl"
    )
    workers: list[int] = []
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found := re.match(r"serving \S+ at (http://\S+)\n", line):
                break
        assert found is not None, process.stderr and process.stderr.read()
        workers = list_children(process.pid)
        client = ServerClient(found[1], {})
        assert {rank["node"] for rank in client.status()["ranks"]} == {"node-0"}
        with Load(found[1], plain, MAX_TOKENS) as load:
            load.wait_for_more()
            with pytest.raises(ServerRefused, match="torchrun started 2 processes, and each has"):
                client.scale(to=3)
            load.wait_for_more()
            os.kill(client.status()["ranks"][1]["pid"], signal.SIGKILL)
            wait_until(lambda: client.status()["totals"]["recoveries"] == 1)
            load.wait_for_more()
            assert client.scale(to=2)["joining"] == ["rank-1"]
            load.wait_for_more()
        assert load.wrong == []
        assert client.status()["totals"]["failed"] == 0
        # The first of torchrun's processes is the server: its end is the job's, and a good one.
        os.kill(_find_server(workers), signal.SIGTERM)
        assert process.wait(120) == 0
        assert '"drained": true' in (tmp_path / "log.jsonl").read_text()
        until = time.monotonic() + 60
        while any(list_session(worker) for worker in workers):
            assert time.monotonic() < until
            os.sched_yield()
    finally:
        for worker in workers:
            for pid in list_session(worker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        end_session(process)


def _find_server(workers: list[int]) -> int:
    """The one that torchrun numbers 0."""
    return next(
        pid for pid in workers if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )


@pytest.mark.more_faults
@pytest.mark.timeout(240)
def test_a_wrong_option_is_said_by_one_process(tmp_path: Path) -> None:
    process = start(tmp_path, *TORCHRUN, "serve", "--port=0", "--ranks=3")
    try:
        _, errors = process.communicate(timeout=200)
    finally:
        end_session(process)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("equipoise: ")]
    assert said == [
        "equipoise: --ranks 3, but torchrun started 2: leave --ranks out, or start 3",
    ]
