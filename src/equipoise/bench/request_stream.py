"""A constant stream of requests into a service, and whether each was answered right."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equipoise.bundled.texts import KINDS, excerpts
from equipoise.elastic.service import RequestFailed, Service, ServiceRequest
from equipoise.engine.requests import Delta, SamplingParams

SHORTEST, LONGEST = 8, 32
"""Tokens of a prompt."""
NUM_EXCERPTS = 64
TIE = {"float32": 0.0, "bfloat16": 2**-5}
"""Share of the largest logit that two tokens may be apart by and be a tie: each layer rounds to 8
bits. In float32 any difference counts."""
BATCH = 64
"""Answers that are compared at once."""


@dataclass(frozen=True)
class StreamResult:
    """What became of a stream.

    Attributes:
        num_requests: that were sent.
        num_failed: those that were told so, or had no end in time.
        num_wrong: those with tokens unlike the plain model's greedy ones.
        num_ties: in a narrow dtype, those whose tokens the plain model gives as much as its greedy
            ones, within rounding; not wrong.
        num_tokens: generated.
        longest_gap_s: between two tokens of the service.
        seconds: from the first request to the last token.
    """

    num_requests: int
    num_failed: int
    num_wrong: int
    num_tokens: int
    longest_gap_s: float
    seconds: float
    num_ties: int = 0


class RequestStream:
    """Keeps as many requests in flight as it was told to, each from a prompt of its own.

    Args:
        service: that serves them.
        encode: a text's tokens.
        num_in_flight: at any time.
        num_new_tokens: of each request.
        seed: of the prompts.
    """

    def __init__(
        self,
        service: Service,
        encode: Callable[[str], Sequence[int]],
        num_in_flight: int,
        num_new_tokens: int,
        seed: int = 0,
    ) -> None:
        self._service, self._num_in_flight = service, num_in_flight
        self._num_new_tokens = num_new_tokens
        self._random = random.Random(seed)
        self._texts = [
            tuple(encode(text)) for kind in KINDS for text in excerpts(kind, NUM_EXCERPTS, 192)
        ]
        self._changed = threading.Condition()
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._answers: dict[str, list[int]] = {}
        self._num_ended = self._num_failed = self._num_disordered = 0
        self._is_ending = False
        self._started_at = self._last_at = 0.0
        self._longest_gap_s = self._gap_s = 0.0

    def start(self) -> None:
        """Send the first requests; each that ends is followed by another."""
        self._started_at = self._last_at = time.monotonic()
        for _ in range(self._num_in_flight):
            self._send()

    @property
    def num_ended(self) -> int:
        """Requests that have ended."""
        with self._changed:
            return self._num_ended

    def wait_for(self, num_more: int, timeout_s: float) -> None:
        """Wait until so many more requests have ended.

        Raises: TimeoutError.
        """
        with self._changed:
            until = self._num_ended + num_more
            if not self._changed.wait_for(lambda: self._num_ended >= until, timeout_s):
                raise TimeoutError(
                    f"{until - self._num_ended} of {num_more} requests did not end within "
                    f"{timeout_s:g} s"
                )

    def take_gap_s(self) -> float:
        """The longest time without any token since the last call."""
        with self._changed:
            gap_s, self._gap_s = max(self._gap_s, time.monotonic() - self._last_at), 0.0
            return gap_s

    def end(self, timeout_s: float) -> None:
        """Send no more, and wait for those in flight; what does not end in time has failed."""
        with self._changed:
            self._is_ending = True
            self._changed.wait_for(lambda: self._num_ended == len(self._prompts), timeout_s)

    def check(
        self,
        model: Path,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> StreamResult:
        """Compare every token with the plain model's. Behind `end`.

        Args:
            model: directory of its checkpoint.
            device: kind of device to compare on.
            dtype: of the weights, there and here.
        Collective: none.
        """
        import torch

        from equipoise.models.loading import load_model

        plain = load_model(model, getattr(torch, dtype), torch.device(device))
        alike: dict[tuple[int, int], list[str]] = {}
        for key, answer in self._answers.items():
            if answer:
                alike.setdefault((len(self._prompts[key]), len(answer)), []).append(key)
        num_wrong = num_ties = 0
        with torch.inference_mode():
            for keys in alike.values():
                for first in range(0, len(keys), BATCH):
                    batch = keys[first : first + BATCH]
                    wrong, ties = _count_wrong(
                        plain,
                        [self._prompts[key] for key in batch],
                        [self._answers[key] for key in batch],
                        TIE[dtype],
                    )
                    num_wrong, num_ties = num_wrong + wrong, num_ties + ties
        unended = len(self._prompts) - self._num_ended
        return StreamResult(
            num_requests=len(self._prompts),
            num_failed=self._num_failed + unended,
            num_wrong=num_wrong + self._num_disordered,
            num_tokens=sum(map(len, self._answers.values())),
            longest_gap_s=self._longest_gap_s,
            seconds=self._last_at - self._started_at,
            num_ties=num_ties,
        )

    def _send(self) -> None:
        with self._changed:
            if self._is_ending:
                return
            key = f"request-{len(self._prompts)}"
            text = self._random.choice(self._texts)
            length = self._random.randint(SHORTEST, min(LONGEST, len(text)))
            first = self._random.randint(0, len(text) - length)
            prompt = text[first : first + length]
            self._prompts[key], self._answers[key] = prompt, []
        sampling = SamplingParams(max_new_tokens=self._num_new_tokens, ignore_end=True)
        self._service.submit(ServiceRequest(key, prompt, sampling), self._take)

    def _take(self, event: Delta | RequestFailed) -> None:
        with self._changed:
            now = time.monotonic()
            is_failed = isinstance(event, RequestFailed)
            has_ended = is_failed
            if isinstance(event, Delta):
                answer = self._answers[event.request_id]
                self._num_disordered += event.position != len(answer)
                answer.extend(event.tokens)
                has_ended = event.finish_reason is not None
                gap_s, self._last_at = now - self._last_at, now
                self._gap_s = max(self._gap_s, gap_s)
                self._longest_gap_s = max(self._longest_gap_s, gap_s)
            self._num_failed += is_failed
            self._num_ended += has_ended
            self._changed.notify_all()
        if has_ended and not is_failed:
            self._send()


def _count_wrong(
    plain: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], tie: float
) -> tuple[int, int]:
    """How many answers are not the plain model's greedy ones, and of how many more that is a tie.

    Prompts and answers are as long.
    """
    import torch

    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    sequences = torch.tensor(rows, device=plain.device)
    output = plain(input_ids=sequences, use_cache=False, logits_to_keep=len(answers[0]))
    logits = output.logits.float().cpu()
    given = torch.tensor([list(answer) for answer in answers])
    best = logits.amax(dim=-1)
    short = best - logits.gather(-1, given[..., None])[..., 0]
    is_other = (logits.argmax(dim=-1) != given).any(dim=1)
    is_wrong = is_other & (short > tie * logits.abs().amax(dim=-1)).any(dim=1)
    return int(is_wrong.sum()), int((is_other & ~is_wrong).sum())
