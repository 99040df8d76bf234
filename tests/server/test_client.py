"""What commands ask of a server, and how they show it."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from equipoise.bundled import model_directory
from equipoise.elastic.service import ModelFacts, RankStatus, ServiceStatus, ServiceTotals
from equipoise.errors import ConfigError
from equipoise.report.service import render_service
from equipoise.server.client import ServerClient, ServerRefused
from equipoise.server.settings import ADMIN_KEY, API_KEY
from tests.server.serving import KEYS, Running

ALIVE = RankStatus("rank-0", 0, 4_194_304, "localhost", "cuda:7", "serving", 1_234_567, 3, 13, 0.1)
STATUS = ServiceStatus(
    model=ModelFacts("a-model", model_directory(), 64, 384, 16),
    generation=3,
    phase="preparing",
    reason="rank-1 was killed by SIGKILL",
    ready=True,
    balancing=False,
    balancedness=0.75,
    ranks=(ALIVE, replace(ALIVE, name="rank-1", number=None, state="dead", detail="it died " * 20)),
    queue_length=7,
    queue_limit=256,
    running=3,
    changes_waiting=1,
    totals=ServiceTotals(finished=1_234_567, generated_tokens=500, steps=90),
)


def show(before: dict[str, Any] | None) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    console.print(render_service("http://127.0.0.1:8000", STATUS.to_json(), before, 2.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_service_fits_on_eighty_columns() -> None:
    before = replace(STATUS, totals=replace(STATUS.totals, generated_tokens=100, steps=80))
    lines = show(before.to_json())
    assert len(lines) == 1 + 3 + 1 + 2 + 1
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for said in ("a-model", "tokens/s 200", "steps/s 5", "waiting 7 of 256", "balancedness 0.750"):
        assert said in text
    assert "3 of 16" in lines[-3]
    assert "dead" in lines[-2]
    assert lines[-1].startswith("rank-1: it died it died")
    assert "tokens/s -" in "\n".join(show(None))


def test_a_node_is_shown_where_it_is_not_the_host() -> None:
    spread = (replace(ALIVE, node="localhost"), replace(ALIVE, node="0123456789abcdef"))
    status = replace(STATUS, ranks=spread).to_json()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_service("http://127.0.0.1:8000", status, None, 0.0))
    text = console.export_text()
    assert " localhost cuda:7 " in text
    assert " localhost/01234567 cuda:7 " in text


def test_a_server_is_asked_and_changed(guarded: Running) -> None:
    client = ServerClient(guarded.url + "/", {ADMIN_KEY: KEYS.admin, API_KEY: KEYS.api})
    assert client.url == guarded.url
    assert client.status()["ranks"][0]["name"] == "rank-0"
    assert client.placement()["num_ranks"] == 1
    assert client.rebalance()["message"].startswith("A rebalance begins")
    assert client.scale(to=1, dry_run=True)["staying"] == ["rank-0"]
    with pytest.raises(ServerRefused, match="one rank in the server's process: it stays") as caught:
        client.scale(to=2)
    assert caught.value.status == 409
    with pytest.raises(ServerRefused, match="give new_data_parallel_size, or remove"):
        client.scale()
    with pytest.raises(ServerRefused, match="send Authorization: Bearer KEY") as refused:
        ServerClient(guarded.url, {}).status()
    assert refused.value.status == 401
    assert KEYS.admin not in str(caught.value)


@contextmanager
def other_server(status: int, body: bytes, location: str | None = None) -> Iterator[str]:
    """A server that is none of ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location is not None:
                self.send_header("location", location)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "is no server of Equipoise: no JSON came"),
        (404, b"<html>", "answers 404 Not Found"),
        (500, b'{"error": "x"}', "answers 500 Internal Server Error"),
    ],
)
def test_other_servers_are_told_apart(status: int, body: bytes, message: str) -> None:
    with other_server(status, body) as url, pytest.raises(ServerRefused, match=message):
        ServerClient(url, {}).status()


def test_a_key_does_not_follow_a_redirect(guarded: Running) -> None:
    with (
        other_server(302, b"", f"{guarded.url}/status") as url,
        pytest.raises(ServerRefused, match="answers 302 Found"),
    ):
        ServerClient(url, {API_KEY: KEYS.api}).status()


@pytest.mark.parametrize(
    "url", ["", "x", "localhost:8000", "file:///etc/passwd", "http://", "http://h/?x=1"]
)
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        ServerClient(url, {})
