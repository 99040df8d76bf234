"""OpenAI's public client, many times over: are answers right, and how long is between tokens?"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.bundled.texts import KINDS, excerpts
from equipoise.errors import DependencyError
from equipoise.job.texts import encode

NUM_PER_KIND, PROMPT_CHARACTERS = 4, 24
ANSWER_S = 120.0
"""Longest wait for one answer, and for all clients to end."""


class Gap(NamedTuple):
    """Between two pieces of one stream, in seconds of time.monotonic()."""

    began_s: float
    ended_s: float


@dataclass(frozen=True)
class Asked:
    """What is asked, and what the plain model says.

    Attributes:
        expected: greedy continuations by prompt.
        num_tokens: of each, at most.
    """

    expected: dict[str, str]
    num_tokens: int


def prepare(model: Path, num_tokens: int) -> Asked:
    """Have the plain model answer some prompts of every kind of text.

    Args:
        model: checkpoint directory.
        num_tokens: of each answer, at most.
    Collective: none.
    """
    import torch

    from equipoise.models.loading import load_model, load_tokenizer

    plain: Any = load_model(model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(model)
    expected = {}
    for kind in KINDS:
        for prompt in excerpts(kind, NUM_PER_KIND, PROMPT_CHARACTERS):
            tokens = torch.tensor([encode(tokenizer, prompt)])
            with torch.inference_mode():
                whole = plain.generate(tokens, do_sample=False, max_new_tokens=num_tokens)
            new = whole[0, tokens.shape[1] :].tolist()
            expected[prompt] = str(tokenizer.decode(new, skip_special_tokens=True))
    return Asked(expected, num_tokens)


class ClientLoad:
    """Clients that stream greedy completions all the time, until they are told to end.

    Args:
        url: of the server.
        model: by which the server knows it.
        asked: prompts, and what is right.
        num_clients: at once.
        key: that they show.
    Raises: DependencyError without the client.
    """

    def __init__(
        self, url: str, model: str, asked: Asked, num_clients: int, key: str = "none"
    ) -> None:
        self._asked, self._model = asked, model
        self._client = _load_openai().OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=ANSWER_S
        )
        self._changed = threading.Condition()
        self._is_over = False
        self._gaps: list[Gap] = []
        self._num_right = 0
        self.wrong: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name="client", daemon=True)
            for number in range(num_clients)
        ]

    def __enter__(self) -> ClientLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        until = time.monotonic() + ANSWER_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._client.close()

    @property
    def num_ended(self) -> int:
        """Answers so far, right or wrong."""
        with self._changed:
            return self._num_right + len(self.wrong)

    def wait_for(self, num_ended: int, timeout_s: float) -> None:
        """Wait until there have been so many answers.

        Raises: TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._num_right + len(self.wrong) >= num_ended, timeout_s
            ):
                raise TimeoutError(f"{num_ended} answers did not come within {timeout_s:g} s")

    def find_gaps(self, began_s: float, ended_s: float) -> list[float]:
        """Seconds between two tokens of a stream, where that time touches the one that is named."""
        with self._changed:
            return [
                gap.ended_s - gap.began_s
                for gap in self._gaps
                if gap.ended_s >= began_s and gap.began_s <= ended_s
            ]

    def _run(self, number: int) -> None:
        prompts = list(self._asked.expected)
        while not self._is_over:
            prompt = prompts[number % len(prompts)]
            number += 1
            gaps: list[Gap] = []
            try:
                text = self._ask(prompt, gaps)
            except Exception as error:  # whatever a client may meet
                text = repr(error)
            with self._changed:
                self._gaps += gaps
                if text == self._asked.expected[prompt]:
                    self._num_right += 1
                else:
                    self.wrong.append(f"{prompt!r}: {text!r}")
                self._changed.notify_all()

    def _ask(self, prompt: str, gaps: list[Gap]) -> str:
        chunks = self._client.completions.create(
            model=self._model,
            prompt=prompt,
            temperature=0,
            max_tokens=self._asked.num_tokens,
            stream=True,
        )
        text, before_s = "", None
        for chunk in chunks:
            piece = chunk.choices[0].text
            text += piece
            if piece:
                now_s = time.monotonic()
                if before_s is not None:
                    gaps.append(Gap(before_s, now_s))
                before_s = now_s
        return text


def _load_openai() -> Any:
    try:
        return import_module("openai")
    except ImportError as error:
        raise DependencyError("this load is of OpenAI's client: pip install openai") from error
