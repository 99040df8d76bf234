"""What is refused, how that is said, and that nothing of it hurts the server."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from equipoise.server.settings import ServerLimits
from tests.server.serving import KEYS, Running, count, make_spec, serve, wait_until

NUM_GARBAGE = int(os.environ.get("SERVER_REQUESTS", "100"))

BAD: dict[str, tuple[str, int, str]] = {
    "no prompt": ("{}", 400, "prompt: field required"),
    "no object": ("[]", 400, "the body: is no JSON object, or not"),
    "no JSON": ('{"prompt":', 400, "the body is not JSON: "),
    "nothing": ("", 400, "the body: field required"),
    "a number": ('{"prompt": 5}', 400, "prompt: input should be a valid string, or input should"),
    "an empty prompt": ('{"prompt": ""}', 400, "prompt: is empty; it needs at least one token"),
    "no tokens": ('{"prompt": []}', 400, "prompt: "),
    "tokens that there are not": ('{"prompt": [1, 100000]}', 400, "tokens must be from 0 to "),
    "several prompts": ('{"prompt": ["a", "b"]}', 400, "prompt: "),
    "half a character": ('{"prompt": "\\ud800"}', 400, "prompt: is not Unicode text"),
    "half a character in a name": ('{"prompt": "a", "\\udfff": 1}', 400, "the body: "),
    "half a character in a model": ('{"prompt": "a", "model": "\\ud800"}', 404, "there is no"),
    "several answers": ('{"prompt": "a", "n": 2}', 400, "n: input should be 1, or left out"),
    "an echo": ('{"prompt": "a", "echo": true}', 400, "echo: input should be False, or left out"),
    "log probabilities": ('{"prompt": "a", "logprobs": 2}', 400, "logprobs: input should be None"),
    "a penalty": ('{"prompt": "a", "presence_penalty": 0.5}', 400, "presence_penalty: input sh"),
    "a field of others": ('{"prompt": "a", "top_k": 4}', 400, "top_k: this server knows no such"),
    "no tokens asked": ('{"prompt": "a", "max_tokens": 0}', 400, "max_tokens: input should be gr"),
    "tokens by word": ('{"prompt": "a", "max_tokens": "9"}', 400, "max_tokens: input should be a"),
    "too many tokens": (
        '{"prompt": "abcd", "max_tokens": 253}',
        400,
        "max_tokens: 253 do not fit behind a prompt of 4 tokens: the model takes 256, so ask for "
        "at most 252",
    ),
    "too long a prompt": (
        json.dumps({"prompt": "a" * 256}),
        400,
        "prompt: has 256 tokens; the model takes 256, generated ones included",
    ),
    "heat": ('{"prompt": "a", "temperature": 3}', 400, "temperature: input should be less than"),
    "no number": ('{"prompt": "a", "temperature": NaN}', 400, "temperature: input should be a fi"),
    "infinity": ('{"prompt": "a", "temperature": 1e999}', 400, "temperature: input should be"),
    "a huge seed": ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", 400, ""),
    "no probability": ('{"prompt": "a", "top_p": 0}', 400, "top_p: input should be greater than"),
    "an empty stop": ('{"prompt": "a", "stop": ""}', 400, "stop: "),
    "options of no stream": (
        '{"prompt": "a", "stream_options": {"include_usage": true}}',
        400,
        "the body: stream_options are of a stream: set stream too",
    ),
    "depth": ("[" * 100_000, 400, ""),
    "another model": (
        '{"prompt": "a", "model": "gpt"}',
        404,
        "there is no model 'gpt': there is 'model'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_body_is_refused_by_name(running: Running, name: str) -> None:
    body, status, message = BAD[name]
    headers = {"content-type": "application/json"}
    with running.http() as client:
        answer = client.post("/v1/completions", content=body.encode(), headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]


def test_clients_get_their_own_errors(running: Running) -> None:
    client = running.openai()
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="model", prompt="a", max_tokens=1000)
    assert refused.value.code == "context_length_exceeded"


def test_what_is_not_there_is_said(running: Running) -> None:
    with running.http() as client:
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/v1/models/gpt", 404),
            ("GET", "/docs", 404),
            ("POST", "//rebalance", 404),
            ("POST", "/rebalance/", 404),
            ("GET", "/rebalance", 405),
            ("PUT", "/v1/completions", 405),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, "error" in answer.json()) == (status, True), path


def test_pages_of_other_hosts_are_not_served_without_keys(running: Running) -> None:
    with running.http() as client:
        for headers in (
            {"host": "evil.example"},
            {"origin": "http://evil.example"},
            {"origin": "null"},
        ):
            assert client.post("/rebalance", headers=headers).status_code == 403
            assert client.get("/health/live", headers=headers).status_code == 200
        for headers in ({"host": "localhost:80"}, {"host": "[::1]"}, {"origin": "http://[::1]:3"}):
            assert client.get("/status", headers=headers).status_code == 200


GARBAGE = (
    b"\0\1\2\3",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n"
    b"content-length: 3\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /status HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET /%ff%00%0a HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /status HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: 100\r\n\r\n{",
)


def test_garbage_on_the_socket_hurts_nobody(running: Running) -> None:
    draw = random.Random(4)
    sent = [*GARBAGE]
    while len(sent) < NUM_GARBAGE:
        data = bytearray(draw.choice(GARBAGE))
        for _ in range(draw.randrange(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        sent.append(bytes(data))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(running.send, sent))
    assert not [answer for answer in answers if b" 500 " in answer.partition(b"\r\n")[0]]
    assert any(answer.startswith(b"HTTP/1.1 400") for answer in answers)
    assert running.openai().completions.create(model="model", prompt="a", max_tokens=1).choices
    assert not [line for line in running.lines() if line["event"] == "failure"]


def test_a_long_body_is_refused_however_it_comes(guarded: Running) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"prompt": "' + b"a" * 20_000 + b'"}'
    with guarded.http(KEYS.api) as client:
        known = client.post("/v1/completions", content=body, headers=headers)
        parts = (body[begin : begin + 1000] for begin in range(0, len(body), 1000))
        unknown = client.post("/v1/completions", content=parts, headers=headers)
    for answer in (known, unknown):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_long")


def test_a_slow_body_is_refused(guarded: Running) -> None:
    request = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {KEYS.api}\r\ncontent-length: 100\r\n\r\n{{"
    ).encode()
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET /status HTTP/1.1\r\nhost: local"])
@pytest.mark.parametrize("is_first", [True, False])
def test_who_does_not_say_what_they_want_keeps_no_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes, is_first: bool
) -> None:
    def hurry() -> None:
        monkeypatch.setattr("equipoise.server.serving.HEAD_S", 0.2)

    if is_first:
        hurry()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        if not is_first:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            # Head and body may come apart.
            while not answer.endswith(b"}"):
                answer += connection.recv(65536) or pytest.fail(f"cut off after {answer!r}")
            assert answer.startswith(b"HTTP/1.1 200")
            # Only now: the first request may take its time, however busy the machine is.
            hurry()
            if not sent:
                return  # between two requests there is more time
        connection.sendall(sent)
        assert connection.recv(65536) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_time(guarded: Running, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    with guarded.http(KEYS.api) as client:
        answer = client.post("/v1/completions", json=body)
    if stream:
        assert answer.status_code == 200
        last = answer.text.strip().rpartition("data: ")[2]
        error = json.loads(last)["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("timeout", "timeout_error")
    line = guarded.find_line(answer.headers["x-request-id"])
    assert (line["finish_reason"], line["status"]) == ("late", answer.status_code)
    assert 0 < line["generated_tokens"] < 2000


def test_a_full_queue_says_when_to_come_again() -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with serve(make_spec(max_len=2048, max_batch_size=1, queue_limit=1)) as server:
        service = server.service
        assert service is not None
        with server.http() as client:
            with client.stream("POST", "/v1/completions", json=body) as first:
                events = first.iter_lines()
                assert next(events)
                second = threading.Thread(target=_ignore, args=(server, {**body, "max_tokens": 9}))
                second.start()
                wait_until(lambda: service.status().queue_length == 1)
                third = client.post("/v1/completions", json=body)
                assert third.status_code == 429
                assert int(third.headers["retry-after"]) >= 1
                assert third.json()["error"]["code"] == "queue_full"
            # The first has left: its place is free, so that the second ends.
            second.join(60)
            assert not second.is_alive()
            assert service.status().totals.cancelled == 1
            wait_until(lambda: service.status().running == 0)
            metrics = client.get("/metrics").text
    labels = {"endpoint": "/v1/completions", "status": "429"}
    assert count(metrics, "equipoise_http_requests_total", labels) == 1
    assert count(metrics, "equipoise_service_cancelled_total") == 1


def _ignore(server: Running, body: dict[str, Any]) -> None:
    with server.http() as client:
        assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_along(stream: bool) -> None:
    # So many tokens that the client is sure to leave before the last.
    body = json.dumps(
        {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": stream, "user": "leaver"}
    )
    request = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    )
    with serve(make_spec(max_len=2048)) as server:
        service = server.service
        assert service is not None
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.encode())
            wait_until(lambda: service.status().running == 1)
        wait_until(lambda: service.status().totals.cancelled == 1)
        wait_until(lambda: any(line.get("finish_reason") == "gone" for line in server.lines()))


def test_connections_beyond_the_limit_are_told() -> None:
    with serve(make_spec(), limits=ServerLimits(num_connections=2)) as server:
        with server.http() as one, server.http() as two:
            assert one.get("/health/live").status_code == 200
            answers = {two.get("/health/live").status_code}
        assert answers == {503}
