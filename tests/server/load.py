"""Clients that ask all the time, and compare what they get."""

from __future__ import annotations

import threading

import openai

from tests.server.serving import wait_until


class Load:
    """Streams greedy completions until it is told to stop.

    Args:
        url: of the server.
        expected: what the plain model says, by prompt.
        max_tokens: of each answer.
        key: that clients show.
        num_clients: at once.
    """

    def __init__(
        self,
        url: str,
        expected: dict[str, str],
        max_tokens: int,
        *,
        key: str = "none",
        num_clients: int = 3,
    ) -> None:
        self._expected, self._prompts = expected, list(expected)
        self._max_tokens, self._num_clients = max_tokens, num_clients
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120.0
        )
        self._is_over = threading.Event()
        self.num_right, self.wrong = 0, list[object]()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        self._client.close()

    def wait_for_more(self, rounds: int = 2) -> None:
        """Until each client has had so many more answers, in the mean."""
        goal = self.num_right + len(self.wrong) + rounds * self._num_clients
        wait_until(lambda: self.num_right + len(self.wrong) >= goal)

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            prompt = self._prompts[number % len(self._prompts)]
            number += 1
            try:
                chunks = self._client.completions.create(
                    model="equipoise-small",
                    prompt=prompt,
                    temperature=0,
                    max_tokens=self._max_tokens,
                    stream=True,
                )
                text = "".join(chunk.choices[0].text for chunk in chunks)
            except Exception as error:  # whatever a client may meet
                text = repr(error)
            with self._lock:
                if text == self._expected[prompt]:
                    self.num_right += 1
                else:
                    self.wrong.append((prompt, text))
