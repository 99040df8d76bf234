"""A public load generator, locust, asks a server all the time while its ranks come and go."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.server.client import ServerClient
from tests.server.serving import wait_until
from tests.server.test_serve import end, serve

NUM_REQUESTS = int(os.environ.get("SERVER_LOCUST", "0"))
SIZES = (4, 3, 5, 2)
MOST_S = 600.0
FILE = Path(__file__).parent / "locustfile.py"


@pytest.mark.slow
@pytest.mark.skipif(not NUM_REQUESTS, reason="SERVER_LOCUST says for how many requests")
@pytest.mark.timeout(1800)
def test_no_request_fails_or_is_answered_wrong(tmp_path: Path) -> None:
    with serve(tmp_path, "--ranks=2", "--step-interval=32") as (process, url):
        client = ServerClient(url, {})
        command = [sys.executable, "-m", "locust", "-f", str(FILE), "--headless", "--host", url]
        options = ["-u", "16", "-r", "16", "--csv", "load", "--only-summary"]
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        locust = subprocess.Popen([*command, *options], cwd=tmp_path, env=environment)

        def finished() -> int:
            return int(client.status()["totals"]["finished"])

        share = NUM_REQUESTS // (len(SIZES) + 1) + 1
        try:
            for number, size in enumerate(SIZES, start=1):
                wait_until(lambda n=number: finished() >= n * share, MOST_S)  # type: ignore[misc]
                assert client.scale(to=size)["done"]
            wait_until(lambda: finished() >= NUM_REQUESTS, MOST_S)
        finally:
            locust.terminate()
            locust.wait(60)
        end(process)
    with (tmp_path / "load_stats.csv").open() as table:
        total = next(row for row in csv.DictReader(table) if row["Name"] == "Aggregated")
    print(total)
    assert int(total["Request Count"]) >= 0.9 * NUM_REQUESTS
    assert int(total["Failure Count"]) == 0
