"""Forward passes over the tokens of a step.

Axis letters: N tokens of a step, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from equipoise.engine.attention import Attention, Chunk, Layout, join
from equipoise.engine.cache import CacheMemory, KVCache
from equipoise.engine.graphs import DecodeGraphs
from equipoise.engine.schedule import Sequence, Work
from equipoise.errors import ConfigError, ModelError
from equipoise.models.free_memory import find_free_bytes
from equipoise.models.grouped import computes_grouped
from equipoise.models.parallel import ParallelModel

_NUM_TRIED, _TOLERANCE = 10, 0.1
"""Tokens of a text that is tried when a model is taken; and what rounding may make of it."""


class Forward:
    """Calls the model with a step's tokens. Owner: the forward thread.

    Arguments and errors are those of `Engine`.
    """

    def __init__(
        self, parallel: ParallelModel, num_rows: int, max_len: int, *, graphs: bool
    ) -> None:
        self._parallel, self._device = parallel, parallel.state.group.device
        try:
            self._attention = Attention(parallel.model)
            self.cache = self._make_cache(num_rows, max_len)
            self._try_text(min(max_len, _NUM_TRIED))
        except ConfigError:
            raise
        except Exception as error:  # whatever a family's code makes of it
            kind = type(parallel.model).__name__
            raise ModelError(f"{kind} cannot be served: {error}") from error
        self._wants_graphs, self._graphs = graphs, DecodeGraphs(self._decode, num_rows, max_len)
        # Ranks start elsewhere, so that replicas take turns over ranks as well as over tokens.
        self._position = parallel.state.group.rank
        self.adopt(parallel)

    def _make_cache(self, num_rows: int, max_len: int) -> KVCache:
        shapes = self._attention.find_shapes(self._parallel)
        window = getattr(self._parallel.model.config.get_text_config(), "sliding_window", None)
        if (window or max_len) < max_len and not any(s.knows_window for s in shapes.values()):
            raise ModelError(f"it attends to {window} tokens only, and does not tell its attention")
        token_bytes = sum(shape.num_bytes for shape in shapes.values())
        free, device = find_free_bytes(self._device), self._device
        memory = CacheMemory(num_rows, max_len, token_bytes, free, device)
        memory.check()
        return KVCache(shapes, memory)

    @torch.inference_mode()
    def _try_text(self, length: int) -> None:
        """Whether, experts left out, a text says the same in parts as whole: no other states."""
        tokens, parts = torch.arange(length, device=self._device), []
        with self._parallel.spread.without_experts() as model:
            whole = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
            for start, end in pairwise((*range(0, length, 3), length)):
                place, chunk = tokens[start:end], Chunk(0, start, end - start)
                layout = Layout(torch.zeros_like(place), place, [chunk])
                parts.append(self._call(place, layout, None, 0))
            if model.get_output_embeddings() is None:
                raise ModelError("it has no head that gives tokens")
        off, norm = float((torch.cat(parts) - whole).norm()), float(whole.norm())
        # Nothing at all is what a lone padding token may say; what is not a number is never right.
        if not off <= _TOLERANCE * norm:
            share = off / norm if norm else off
            raise ModelError(f"a text in parts is off by {share:.2g} of the text as a whole")

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
        """Run a step; if there is no work, a dummy token that goes nowhere, in a row that is free.

        Returns: [sequences that get a token, V] float32, and these; of use once `check` returns.
        Collective: every rank of the generation, equally often.
        """
        tokens, rows, positions = list[int](), list[int](), list[int]()
        getters, lasts = [], []
        for sequence, (row, start, length, _) in work.parts:
            tokens += sequence.list_pending(length)
            rows += [row] * length
            positions += range(start, start + length)
            if length == sequence.num_pending:
                getters.append(sequence)
                lasts.append(len(tokens) - 1)
        longest = max(positions[: work.num_decoding], default=-1) + 1
        chunks = join(chunk for _, chunk in work.parts[work.num_decoding :])
        valid = None
        if not tokens:
            tokens, rows, positions, chunks = [0], [0], [0], [Chunk(0, 0, 1)]
            valid = torch.zeros(1, dtype=torch.bool, device=self._device)
        first, self._position = self._position, self._position + len(tokens)
        if self._captures and not chunks:
            inputs = np.stack(np.broadcast_arrays(tokens, positions, 1, first))
            return self._graphs.run(inputs, longest, self._device), getters
        placed = torch.from_numpy(np.array([tokens, rows, positions]))
        placed = placed.to(self._device, non_blocking=True)
        # A list would be placed behind the pass, by a wait for the device that has no deadline.
        last = torch.tensor(lasts, dtype=torch.int64).to(self._device, non_blocking=True)
        decoding = [Chunk(0, longest - 1, 1, work.num_decoding)] if longest else []
        layout = Layout(placed[1], placed[2], decoding + chunks)
        return self._score(self._call(placed[0], layout, valid, first)[last]), getters

    def check(self) -> None:
        """Return when all ranks have taken part and the device is through; raises as a step."""
        for dispatcher in self._parallel.dispatchers:
            dispatcher.check()
        # On its own stream: experts travel on others. A wait for nothing still lets the GIL go.
        if self._device.type == "cuda" and not torch.cuda.current_stream(self._device).query():
            torch.cuda.current_stream(self._device).synchronize()

    def _decode(self, inputs: Tensor, longest: int) -> Tensor:
        """As `Decode` says; what is no token goes nowhere, and leaves its mark in a free row."""
        token, position, is_there, first = inputs
        rows = torch.arange(inputs.shape[1], device=self._device)
        layout = Layout(rows, position, [Chunk(0, longest - 1, 1, len(rows))])
        return self._score(self._call(token, layout, is_there.bool(), first[0]))

    def _call(
        self, tokens: Tensor, layout: Layout, valid: Tensor | None, first: int | Tensor
    ) -> Tensor:
        """[N, hidden] of tokens [N]; those that are not valid are nobody's."""
        named = {"input_ids": tokens[None], "position_ids": layout.positions[None]}
        with self._parallel.route(valid, first), self._attention.serve(self.cache, layout) as more:
            output = self._parallel.model.base_model(**named, **more)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._parallel.model.get_output_embeddings()(hidden)
        return logits.float()
