"""The generate() of transformers on every rank at once, each with its own requests.

Ranks call the model together or not at all; generate() calls it as often as its own batch needs. So
before each call ranks say whether they still generate, and one that has nothing left goes along
with a token that is sent nowhere, until none has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.comm.groups import RankGroup
from equipoise.models.experts import ExpertParallelModel


class Lockstep:
    """Keeps the calls of a model in step with those of other ranks. Owner: the forward thread.

    Args:
        spread: the model.
        group: its ranks.
        close_step: called after each call of the model.
        first_position: gives the global position that the next call starts from.
    """

    def __init__(
        self,
        spread: ExpertParallelModel,
        group: RankGroup,
        close_step: Callable[[], object],
        first_position: Callable[[], int],
    ) -> None:
        self._spread, self._group = spread, group
        self._close_step, self._first_position = close_step, first_position
        # Of the call that runs.
        self._routing = ExitStack()

    @contextmanager
    def serve(self) -> Iterator[Any]:
        """Within, this rank calls the model as it likes; at the end it waits for the others.

        Returns:
            The model.
        Collective: every rank of the group, once; within, each call of the model.
        Raises: TransferError or MembershipError within the deadline if a rank does not take part.
        """
        model = self._spread.model
        # As experts, they are no part of a call that is compiled.
        apart: Callable[..., Any] = torch.compiler.disable
        before = model.register_forward_pre_hook(apart(self._begin), with_kwargs=True)
        after = model.register_forward_hook(apart(self._end))
        try:
            yield model
        finally:
            before.remove()
            after.remove()
            # A call that raised has not ended by itself.
            self._routing.close()
        while self._says(False):
            self._call_with_nothing()

    def _begin(self, _model: nn.Module, given: Any, named: dict[str, Any]) -> None:
        self._says(True)
        valid = find_tokens(given, named)
        self._routing.enter_context(self._spread.route(valid, self._first_position()))

    def _end(self, *_: Any) -> None:
        self._routing.close()
        self._close_step()

    def _says(self, generates: bool) -> bool:
        """Whether any rank still generates."""
        flag = torch.full((1,), int(generates))
        self._group.all_reduce(flag, "max")
        return bool(flag.item())

    def _call_with_nothing(self) -> None:
        device = self._group.device
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=device)
        nobody = torch.zeros(1, dtype=torch.bool, device=device)
        with torch.inference_mode(), self._spread.route(nobody, 0) as model:
            model(input_ids=nothing, use_cache=False)
        self._close_step()


def find_tokens(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """Which tokens of a call are not padding, by its attention mask.

    Args:
        given: the call's positional arguments, token ids [B, T] first if at all.
        named: the others; a mask [B, positions so far] speaks of the last T.
    Returns:
        [B * T] bool, or None where all are tokens.
    Collective: none.
    """
    mask = named.get("attention_mask")
    tokens = given[0] if given else named.get("input_ids")
    if tokens is None:
        tokens = named.get("inputs_embeds")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or tokens is None:
        return None
    return mask[:, -tokens.shape[1] :].reshape(-1).bool()
