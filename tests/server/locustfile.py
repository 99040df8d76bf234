"""Users for locust: each asks for a greedy completion, whole or streamed, and compares the answer.

    locust -f tests/server/locustfile.py --headless -u 16 -r 16 -t 2m --host http://127.0.0.1:8000

A wrong answer is a failure of locust's. EQ_API_KEY is shown, where it is set.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

from locust import HttpUser, events, task

from equipoise.bundled import model_directory
from equipoise.server.client_load import prepare

NUM_TOKENS = 16
EXPECTED: dict[str, str] = {}
HEADERS = {"authorization": f"Bearer {os.environ.get('EQ_API_KEY', 'none')}"}


@events.init.add_listener
def _learn(**_: Any) -> None:
    EXPECTED.update(prepare(model_directory(), NUM_TOKENS).expected)


class Reader(HttpUser):
    """Asks one thing after the other."""

    def _ask(self, name: str, **options: Any) -> None:
        prompt = random.choice(list(EXPECTED))
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, **options}
        with self.client.post(
            "/v1/completions", json=body, headers=HEADERS, name=name, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                return
            text = _join(answer.text) if "stream" in options else _read(answer.text)
            if text != EXPECTED[prompt]:
                answer.failure(f"wrong: {prompt!r}: {text!r}")

    @task
    def whole(self) -> None:
        """An answer at once."""
        self._ask("whole")

    @task
    def streamed(self) -> None:
        """An answer token by token."""
        self._ask("streamed", stream=True)


def _read(body: str) -> str:
    text: str = json.loads(body)["choices"][0]["text"]
    return text


def _join(events_of_stream: str) -> str:
    data = [line[6:] for line in events_of_stream.splitlines() if line.startswith("data: ")]
    if data[-1:] != ["[DONE]"]:
        return "a stream without an end"
    return "".join(json.loads(part)["choices"][0]["text"] for part in data[:-1])
