"""Attention of a step whose tokens belong to many sequences, by the family's own kernels.

A step's tokens lie in one row, without padding: one of each decoding sequence, then chunks of
prompts. Everything but attention takes them as they are. Attention, which transformers lets others
provide, keeps their keys and values, and asks the model's implementation once for all decoding
sequences, once for each run of prompts of one length, and once for each other chunk.

Axis letters: N tokens of a step, H heads, D head dimension, B sequences, C tokens of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from equipoise.engine.cache import KVCache, LayerShape
from equipoise.errors import ModelError
from equipoise.models.parallel import ParallelModel

_NAME = "equipoise"
"""What transformers knows this attention by."""
_HANDED = "equipoise_pass"
"""What `_Pass` is handed down as."""
_INNER = ("sdpa", "eager")


class Chunk(NamedTuple):
    """Tokens of one sequence: row of the cache, position of the first, and how many.

    Or of several in rows behind each other: position of the last one's first, and of how many.
    """

    row: int
    start: int
    length: int
    num: int = 1


def join(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Make one of each run that begins sequences by chunks of one length; its row is none."""
    alike = groupby(chunks, lambda chunk: chunk if chunk.start else chunk._replace(row=-1))
    return [chunk._replace(num=len(list(run))) for chunk, run in alike]


@dataclass(frozen=True)
class Layout:
    """Which sequences a step's tokens belong to: rows of the cache and positions, [N] int64."""

    rows: Tensor
    positions: Tensor
    chunks: list[Chunk]
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def hide(self, chunk: Chunk, at: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B or 1, 1, C, keys]: 0 where a token of the chunk looks, -inf elsewhere.

        Layers share it: token `at` of the step and the window tell one from another.
        """
        if (at, window) not in self._masks:
            _, start, length, num = chunk
            key = torch.arange(start + length, device=self.positions.device)
            position = self.positions[at : at + num * length] if start else key
            back = position.view(-1, 1, length, 1) - key
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            shown = torch.zeros_like(hidden, dtype=dtype)
            self._masks[at, window] = shown.masked_fill_(hidden, float("-inf"))
        return self._masks[at, window]


@dataclass
class _Pass:
    """One forward pass, handed down to every layer by the model."""

    inner: str
    cache: KVCache | None = None
    layout: Layout | None = None
    seen: dict[int, LayerShape] = field(default_factory=dict)


class Attention:
    """Has a model attend to a cache of rows while the engine calls it.

    Args:
        model: of transformers.
    Raises: ModelError if it attends by something else than sdpa or eager.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._inner: str = model.config._attn_implementation
        if self._inner not in _INNER:
            raise ModelError(
                f"the model attends by {self._inner!r}, which cannot be asked for single "
                f"sequences: load it with attention={_INNER[0]!r} or {_INNER[1]!r}"
            )
        import_module("transformers").AttentionInterface.register(_NAME, _attend)

    @contextmanager
    def serve(self, cache: KVCache | None, layout: Layout | None) -> Iterator[dict[str, Any]]:
        """Within, calls of the model attend to the cache; without a layout, its token to itself.

        Returns: what the model is called with besides tokens and positions.
        """
        self._config._attn_implementation = _NAME
        try:
            yield {"use_cache": False, _HANDED: _Pass(self._inner, cache, layout)}
        finally:
            self._config._attn_implementation = self._inner

    def find_shapes(self, parallel: ParallelModel) -> dict[int, LayerShape]:
        """What a token leaves in each layer, by sending one through all but the experts.

        Collective: none. Raises: ModelError if its attention cannot be provided from outside.
        """
        zero = torch.zeros(1, 1, dtype=torch.int64, device=parallel.state.group.device)
        without = parallel.spread.without_experts()
        with torch.inference_mode(), without as model, self.serve(None, None) as named:
            model.base_model(input_ids=zero, position_ids=zero, **named)
        seen: dict[int, LayerShape] = named[_HANDED].seen
        num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(seen))
        if len(seen) != num_layers:
            raise ModelError(
                f"{len(seen)} of its {num_layers} layers attend by transformers' AttentionInterface"
            )
        return seen


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - it is known from the layout
    **named: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention: query [1, H, N, D] and so on -> [1, N, H, D]."""
    this: _Pass | None = named.pop(_HANDED, None)
    if this is None:
        raise ModelError(f"its {type(module).__name__} is not handed what the model is called with")
    inner, layer = _find_inner(this.inner, module), cast(int, module.layer_idx)
    sizes = (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])
    this.seen[layer] = LayerShape(*sizes, key.dtype, "sliding_window" in named)
    if this.cache is None or this.layout is None:
        return inner(module, query, key, value, None, **named)[0], None
    layout, window = this.layout, cast("int | None", named.get("sliding_window"))
    cached = this.cache.store(layer, layout.rows, layout.positions, key, value)
    outputs, at = [], 0
    for chunk in layout.chunks:
        row, start, length, num = chunk
        until, behind, mask = start + length, at + num * length, None
        # From the first token on, sdpa knows by itself that it is causal.
        if this.inner != "sdpa" or start or (window is not None and window < until):
            mask = layout.hide(chunk, at, window, query.dtype)
        each, *seen = (
            tensor[0, :, at:behind].view(-1, num, length, tensor.shape[3]).transpose(0, 1)
            for tensor in (query, key, value)
        )
        if start:
            seen = [tensor[row : row + num, :, :until] for tensor in cached]
        outputs.append(inner(module, each, *seen, mask, **named)[0].flatten(0, 1)[None])
        at = behind
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _find_inner(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    if name == "eager":
        found = sys.modules[type(module).__module__].eager_attention_forward
    else:
        found = import_module("transformers").AttentionInterface()[name]
    return cast("Callable[..., tuple[Tensor, Any]]", found)
