"""The log: a line for each request, and nothing of what clients say."""

from __future__ import annotations

import io
import threading

import pytest

from equipoise.server.log import JsonLog
from tests.server.serving import KEYS, Running, make_spec, serve, wait_until

SECRET = "the safe opens at violets"
BODIES: tuple[dict[str, object], ...] = (
    {"prompt": SECRET, "max_tokens": 3, "temperature": 0},
    {"prompt": SECRET, "max_tokens": 3, "stream": True, "stop": [SECRET]},
    {"prompt": [SECRET, SECRET]},
    {"prompt": SECRET, SECRET: 1},
    {"prompt": SECRET, "model": SECRET},
    {"prompt": SECRET, "temperature": SECRET},
    {"prompt": SECRET * 20},
)


def test_no_text_of_clients_stands_in_the_log(running: Running) -> None:
    ids = []
    with running.http() as client:
        for body in BODIES:
            answer = client.post("/v1/completions", json=body)
            ids.append(answer.headers["x-request-id"])
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": SECRET}]})
        ids.append(answer.headers["x-request-id"])
        broken = b'{"prompt": "' + SECRET.encode()
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/completions", content=broken, headers=headers)
        ids.append(answer.headers["x-request-id"])
    lines = [running.find_line(each) for each in ids]
    assert [line["status"] for line in lines] == [200, 200, 400, 400, 404, 400, 400, 400, 400]
    assert "violets" not in running.log_text


def test_a_line_says_what_became_of_a_request(running: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
    with running.http(headers={"x-request-id": "mine-1"}) as client:
        done = client.post("/v1/completions", json=body)
        wrong = client.post("/v1/completions", json={"prompt": ""})
    line = running.find_line(done.headers["x-request-id"])
    seconds, first_token_s = line.pop("seconds"), line.pop("first_token_s")
    assert 0 < first_token_s <= seconds
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "request",
        "id": done.headers["x-request-id"],
        "client_request_id": "mine-1",
        "method": "POST",
        "path": "/v1/completions",
        "client": "127.0.0.1",
        "status": 200,
        "prompt_tokens": 3,
        "generated_tokens": 4,
        "finish_reason": "length",
    }
    line = running.find_line(wrong.headers["x-request-id"])
    assert (line["status"], line["refused"]) == (400, "invalid_request_error")


def test_texts_are_logged_where_that_is_asked_for() -> None:
    with serve(make_spec(), log_prompts=True, keys=KEYS) as server, server.http(KEYS.api) as client:
        body = {"prompt": SECRET, "max_tokens": 3, "stream": True}
        answer = client.post("/v1/completions", json=body)
        line = server.find_line(answer.headers["x-request-id"])
    assert line["prompt"] == SECRET
    assert len(line["text"]) == 3
    assert KEYS.api not in server.log_text


class _Stuck(io.StringIO):
    """A pipe that nobody reads from, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.writes, self.goes_on = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.writes.set()
        assert self.goes_on.wait(60)
        return super().write(text)


def test_a_full_pipe_holds_nobody_up_and_what_is_lost_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("equipoise.server.log._LONGEST_TAIL", 4)
    stream = _Stuck()
    log = JsonLog(stream)
    log.write("first")
    assert stream.writes.wait(60)
    for _ in range(10):
        log.write("more")
    stream.goes_on.set()
    wait_until(lambda: stream.getvalue().count("\n") == 5)
    log.write("last")
    log.close()
    assert '"lines_lost": 6' in stream.getvalue().splitlines()[-1]
