"""How likely texts are to the model, over the dispatch and experts of whoever serves just now."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch.nn.functional import cross_entropy

from equipoise.elastic.channel import Message
from equipoise.elastic.duty import Duty
from equipoise.elastic.roster import Roster

NOTHING = 0
"""No texts were asked for yet."""


class RankScores:
    """A rank's part of scoring: texts are shared out, and all ranks call the model as often.

    Owner: the forward thread.

    Attributes:
        asked: number of the texts that were asked for last; ranks run them once all have them.
    """

    def __init__(self) -> None:
        self.asked = self._done = NOTHING
        self._texts: list[list[int]] = []

    def take(self, message: Message) -> None:
        """Texts to be scored: `number`, above those before, and `texts`, tokens of each."""
        self.asked, self._texts = int(message["number"]), message["texts"]

    def is_due(self, least: int) -> bool:
        """Whether all ranks have texts that were not scored yet.

        Args:
            least: of all ranks' `asked`.
        """
        return least == self.asked > self._done

    @torch.inference_mode()
    def run(self, duty: Duty) -> Message:
        """Score this rank's share; a rank that has none left goes along with a token of no account.

        Collective: every rank of the generation, at the same step.
        Returns:
            What to tell: by text its negative log-likelihood and how many tokens that is of.
        Raises: what dispatch raises.
        """
        self._done = self.asked
        size, device = duty.group.size, duty.group.device
        mine = range(duty.number, len(self._texts), size)
        told = []
        spread = duty.parallel.spread
        for one in spread.sets:
            one.recorder.enabled = False
        for turn in range(-(-len(self._texts) // size)):
            index = mine[turn] if turn < len(mine) else None
            tokens = torch.tensor([[0] if index is None else self._texts[index]], device=device)
            valid = torch.full((tokens.numel(),), index is not None, device=device)
            with spread.route(valid, 0) as model:
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            if index is not None:
                loss = cross_entropy(logits, tokens[0, 1:], reduction="sum")
                told.append([index, float(loss), tokens.shape[1] - 1])
        for one in spread.sets:
            one.recorder.enabled = True
        for dispatcher in duty.parallel.dispatchers:
            dispatcher.check()
        return {"say": "scores", "number": self.asked, "scores": told}


class Scores:
    """The controller's part. Owner: its thread.

    Args:
        roster: whom to ask.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._number = NOTHING
        self._losses: list[float | None] = []
        self._answer: Future[list[float]] = Future()

    def ask(self, texts: Sequence[Sequence[int]]) -> Future[list[float]]:
        """Have the ranks that serve score texts; only the last that were asked for are answered.

        Args:
            texts: tokens of each, at least two.
        Returns:
            Of each text its loss: negative log-likelihood per token, in nats.
        """
        self._number += 1
        self._losses = [None] * len(texts)
        self._answer = Future()
        order: Message = {"do": "score", "number": self._number, "texts": [list(t) for t in texts]}
        self._roster.tell(self._roster.names_serving(), order)
        return self._answer

    def hear(self, message: Message) -> None:
        """A rank tells of its share."""
        if message["number"] != self._number or self._answer.done():
            return
        for index, loss, num_tokens in message["scores"]:
            self._losses[index] = loss / num_tokens
        known = [loss for loss in self._losses if loss is not None]
        if len(known) == len(self._losses):
            self._answer.set_result(known)
