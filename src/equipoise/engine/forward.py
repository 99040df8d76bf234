"""Forward passes over the tokens of a step.

Axis letters: N tokens of a step, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.engine.attention import Attention, Layout
from equipoise.engine.cache import CacheMemory, KVCache, find_free_bytes
from equipoise.engine.graphs import DecodeGraphs
from equipoise.engine.schedule import Sequence, Work
from equipoise.models.grouped import computes_grouped
from equipoise.models.parallel import ParallelModel


class Forward:
    """Calls the model with a step's tokens. Owner: the forward thread.

    Args:
        parallel: the model of the generation that serves.
        num_rows: sequences of a step.
        max_len: tokens of the longest.
        graphs: whether decode steps are captured where that can be.
    Raises: ConfigError, before any of it is taken, if the cache has no room; ModelError if the
        model cannot be served.
    """

    def __init__(
        self, parallel: ParallelModel, num_rows: int, max_len: int, *, graphs: bool
    ) -> None:
        self._attention = Attention(parallel.model)
        self._device = parallel.state.group.device
        shapes = self._attention.find_shapes(parallel)
        token_bytes = sum(shape.num_bytes for shape in shapes.values())
        free_bytes = find_free_bytes(self._device)
        memory = CacheMemory(num_rows, max_len, token_bytes, free_bytes, self._device)
        memory.check()
        self.cache = KVCache(shapes, memory)
        self._wants_graphs = graphs
        self._graphs = DecodeGraphs(self._decode, num_rows, max_len)
        # Ranks start elsewhere, so that replicas take turns over ranks as well as over tokens.
        self._position = parallel.state.group.rank
        self.adopt(parallel)

    def adopt(self, parallel: ParallelModel) -> None:
        """Call the model of another generation from now on. Collective: none."""
        self._parallel = parallel
        self._graphs.clear()
        allowed = all(
            one.dispatcher.captures and all(computes_grouped(layer.module) for layer in one.layers)
            for one in parallel.spread.sets
        )
        self._captures = self._wants_graphs and allowed and self._device.type == "cuda"

    @torch.inference_mode()
    def run(self, work: Work) -> tuple[Tensor, list[Sequence]]:
        """Run a step; a dummy token that is sent nowhere if there is no work.

        Returns: [sequences that get a token, V] float32, and these sequences.
        Collective: every rank of the generation, equally often.
        """
        columns: list[tuple[int, int, int]] = []
        getters, lasts = [], []
        for sequence, (row, start, length) in work.parts:
            tokens = sequence.list_pending(length)
            columns += [(token, row, start + i) for i, token in enumerate(tokens)]
            if length == sequence.num_pending:
                getters.append(sequence)
                lasts.append(len(columns) - 1)
        chunks = tuple(chunk for _, chunk in work.parts)
        decoding, chunks = chunks[: work.num_decoding], chunks[work.num_decoding :]
        longest = max((chunk.start + 1 for chunk in decoding), default=0)
        placed = torch.tensor(columns or [(0, 0, 0)]).T.contiguous()
        first, self._position = self._position, self._position + placed.shape[1]
        if self._captures and decoding and not chunks:
            one = torch.ones_like(placed[0])
            inputs = torch.stack([placed[0], placed[2], one, one * first])
            logits = self._graphs.run(inputs, longest, self._device)
        else:
            there = placed.to(self._device, non_blocking=True)
            layout = Layout(there[1], there[2], len(decoding), longest, chunks)
            hidden = self._call(there[0], there[2], layout if columns else None, None, first)
            logits = self._score(hidden[lasts])
        for dispatcher in self._parallel.dispatchers:
            dispatcher.check()
        return logits, getters

    def _decode(self, inputs: Tensor, longest: int) -> Tensor:
        """As `Decode` says; what is no token goes nowhere, and leaves its mark in a free row."""
        token, position, is_there, first = inputs
        rows = torch.arange(inputs.shape[1], device=self._device)
        layout = Layout(rows, position, inputs.shape[1], longest)
        return self._score(self._call(token, position, layout, is_there.bool(), first[0]))

    def _call(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: Layout | None,
        valid: Tensor | None,
        first: int | Tensor,
    ) -> Tensor:
        """[N, hidden] of tokens and positions [N]; without a layout they are nobody's."""
        model = self._parallel.model
        if layout is None:
            valid = torch.zeros_like(tokens, dtype=torch.bool)
        with (
            self._parallel.route(valid, first),
            self._attention.serve(self.cache, layout) as named,
        ):
            output = model.base_model(input_ids=tokens[None], position_ids=positions[None], **named)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._parallel.model.get_output_embeddings()(hidden)
        return logits.float()
