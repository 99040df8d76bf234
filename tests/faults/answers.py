"""Prompts whose answers are known beforehand, and a stream of requests that compares as it goes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import torch

from equipoise.elastic.service import RequestFailed, Service, ServiceClosed, ServiceRequest
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.models.loading import load_model

LEAST_GAP = 1e-3
"""Between a best token and the next one: what rounding decides is no test of anything."""

Answers = dict[tuple[int, ...], tuple[int, ...]]


def find_answers(model: Path, count: int, length: int, num_new: int) -> Answers:
    """The plain model's greedy answers to random prompts, where none hangs by a hair."""
    plain = load_model(model, torch.float32, torch.device("cpu"))
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 250, (3 * count, length), generator=chance)
    tokens, gaps = prompts, torch.full((3 * count,), float("inf"))
    with torch.inference_mode():
        for _ in range(num_new):
            logits = plain(input_ids=tokens, use_cache=False).logits[:, -1]
            best = logits.topk(2)
            gaps = torch.minimum(gaps, best.values[:, 0] - best.values[:, 1])
            tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    chosen = [
        row for row, gap in zip(tokens.tolist(), gaps.tolist(), strict=True) if gap > LEAST_GAP
    ]
    answers = {tuple(row[:length]): tuple(row[length:]) for row in chosen}
    assert len(answers) >= count, f"only {len(answers)} prompts of {3 * count} will do"
    return answers


class AnswerStream:
    """Requests all the while, each token of which is compared when it comes.

    Args:
        service: that answers.
        answers: by prompt.
        num_in_flight: requests at any time.
        pause_s: if not 0, so many at a time: the next come so long after all have been answered.
    """

    def __init__(
        self, service: Service, answers: Answers, num_in_flight: int, pause_s: float = 0.0
    ) -> None:
        self._service, self._answers = service, answers
        self._num_in_flight, self._pause_s = num_in_flight, pause_s
        self._chance = random.Random(0)
        self._prompts = list(answers)
        self._changed = threading.Condition()
        self._known: dict[str, tuple[tuple[int, ...], int]] = {}
        self._is_ending = False
        self.num_sent = self.num_right = 0
        self.faults: list[str] = []
        self._send_all()

    def wait_for(self, num_more: int, timeout_s: float) -> bool:
        """Wait until so many more were answered; whether they were in time."""
        with self._changed:
            until = self.num_right + num_more
            done = lambda: self.num_right >= until or bool(self.faults)  # noqa: E731
            return self._changed.wait_for(done, timeout_s) and not self.faults

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that are under way now, and as many as there may be, are answered.

        Returns: whether they were in time.
        """
        with self._changed:
            asked, until = set(self._known), self.num_right + self._num_in_flight

            def is_done() -> bool:
                is_through = self.num_right >= until and not asked & set(self._known)
                return is_through or bool(self.faults)

            return self._changed.wait_for(is_done, timeout_s) and not self.faults

    def end(self, timeout_s: float) -> bool:
        """Send no more; whether all that were sent are answered in time."""
        with self._changed:
            self._is_ending = True
            return self._changed.wait_for(lambda: not self._known, timeout_s)

    def _send_all(self) -> None:
        for _ in range(self._num_in_flight):
            self._send()

    def _send(self) -> None:
        with self._changed:
            if self._is_ending:
                return
            prompt = self._chance.choice(self._prompts)
            num_new = self._chance.randint(1, len(self._answers[prompt]))
            key = f"request-{self.num_sent}"
            self.num_sent += 1
            self._known[key] = (self._answers[prompt][:num_new], 0)
        sampling = SamplingParams(max_new_tokens=num_new, ignore_end=True)
        try:
            self._service.submit(ServiceRequest(key, prompt, sampling), self._take)
        except ServiceClosed as error:
            self._complain(key, str(error))

    def _take(self, event: Delta | RequestFailed) -> None:
        if isinstance(event, RequestFailed):
            self._complain(event.request_id, event.reason)
            return
        key = event.request_id
        with self._changed:
            wanted, place = self._known.get(key, ((), 0))
            end = event.position + len(event.tokens)
            if event.position != place or wanted[place:end] != tuple(event.tokens):
                self.faults.append(f"{key}: {event} where {wanted} is right, {place} came before")
            self._known[key] = (wanted, end)
            has_ended = event.finish_reason is not None
            if has_ended:
                del self._known[key]
                self.num_right += 1
                if end != len(wanted):
                    self.faults.append(f"{key} ends with {end} of {len(wanted)} tokens")
            is_last = not self._known
            self._changed.notify_all()
        if has_ended and not self._pause_s:
            self._send()
        elif has_ended and is_last:
            timer = threading.Timer(self._pause_s, self._send_all)
            timer.daemon = True
            timer.start()

    def _complain(self, key: str, reason: str) -> None:
        with self._changed:
            self._known.pop(key, None)
            self.faults.append(f"{key} failed: {reason}")
            self._changed.notify_all()
