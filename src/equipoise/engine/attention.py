"""Attention of a step whose tokens belong to many sequences, by the family's own kernels.

A step's tokens lie in one row, without padding: one of each decoding sequence, then chunks of
prompts. Everything but attention takes them as they are. Attention, which transformers lets others
provide, keeps their keys and values, and asks the model's implementation once for all decoding
sequences and once for each chunk.

Axis letters: N tokens of a step, H heads, D head dimension, C tokens of a chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from equipoise.engine.cache import KVCache, LayerShape
from equipoise.errors import ModelError
from equipoise.models.parallel import ParallelModel

NAME = "equipoise"
"""What transformers knows this attention by."""

_INNER = ("sdpa", "eager")

Attend = Callable[..., tuple[Tensor, Any]]


class Chunk(NamedTuple):
    """Tokens of one sequence's prompt.

    Attributes:
        row: of the cache.
        start: position of the first.
        length: C.
    """

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Which sequences a step's tokens belong to.

    Attributes:
        rows: [N] int64, row of the cache.
        positions: [N] int64.
        num_decoding: the first tokens, one of each of the first rows.
        longest: positions that any of these looks at.
        chunks: behind them, in order.
    """

    rows: Tensor
    positions: Tensor
    num_decoding: int
    longest: int
    chunks: tuple[Chunk, ...]


@dataclass
class _Pass:
    """One forward pass, handed down to every layer by the model."""

    inner: str
    cache: KVCache | None
    layout: Layout | None
    masks: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict)
    seen: dict[int, LayerShape] = field(default_factory=dict)


class Attention:
    """Has a model attend to a cache of rows while the engine calls it.

    Args:
        model: of transformers; attends by sdpa or eager.
    Raises: ModelError if it attends by something else.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._inner: str = model.config._attn_implementation
        if self._inner not in _INNER:
            raise ModelError(
                f"the model attends by {self._inner!r}, which cannot be asked for single "
                f"sequences: load it with attention={_INNER[0]!r} or {_INNER[1]!r}"
            )
        transformers = import_module("transformers")
        transformers.AttentionInterface.register(NAME, _attend)

    @contextmanager
    def serve(self, cache: KVCache, layout: Layout | None) -> Iterator[dict[str, Any]]:
        """Within, calls of the model attend to the cache.

        Args:
            cache: of the sequences.
            layout: of the step's tokens; None for one token that belongs to nobody.
        Returns:
            What the model is called with besides tokens and positions.
        """
        with self._call(_Pass(self._inner, cache, layout)) as named:
            yield named

    def find_shapes(self, parallel: ParallelModel) -> dict[int, LayerShape]:
        """What a token leaves in each layer, by sending one through all but the experts.

        Collective: none: the experts are left out.
        Raises: ModelError if the model has attention that cannot be provided from outside.
        """
        model = parallel.model
        zero = torch.zeros(1, 1, dtype=torch.int64, device=parallel.state.group.device)
        probe = _Pass(self._inner, None, None)
        with torch.inference_mode(), _without_experts(parallel), self._call(probe) as named:
            model.base_model(input_ids=zero, position_ids=zero, **named)
        num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(probe.seen))
        if len(probe.seen) != num_layers:
            raise ModelError(
                f"{type(model).__name__} cannot be served: {len(probe.seen)} of {num_layers} "
                "layers attend by transformers' AttentionInterface"
            )
        return probe.seen

    @contextmanager
    def _call(self, this: _Pass) -> Iterator[dict[str, Any]]:
        self._config._attn_implementation = NAME
        try:
            yield {"use_cache": False, "equipoise_pass": this}
        finally:
            self._config._attn_implementation = self._inner


@contextmanager
def _without_experts(parallel: ParallelModel) -> Iterator[None]:
    modules = [
        module
        for one in parallel.spread.sets
        for layer in one.layers
        for module in (layer.module, *layer.copies)
    ]
    kept = [module.forward for module in modules]

    def skip(*given: Tensor, **named: Tensor) -> Tensor:
        return given[0] if given else next(iter(named.values()))

    try:
        for module in modules:
            module.forward = skip
        yield
    finally:
        for module, forward in zip(modules, kept, strict=True):
            module.forward = forward


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    equipoise_pass: _Pass | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention: query [1, H, N, D] and so on -> [1, N, H, D]."""
    this = equipoise_pass
    if this is None:
        raise ModelError(
            f"{type(module).__name__} is not handed what the model was called with: it cannot be "
            "served"
        )
    inner = _find_inner(this.inner, module)
    layer = cast(int, module.layer_idx)
    if this.cache is None:
        this.seen[layer] = LayerShape(_size(key), _size(value), key.dtype)
    if this.cache is None or this.layout is None:
        return inner(module, query, key, value, None, **named)[0], None
    layout = this.layout
    keys, values = this.cache.store(layer, layout.rows, layout.positions, key, value)
    window: int | None = named.get("sliding_window")
    outputs = []
    at = layout.num_decoding
    if at:
        until = layout.longest
        output, _ = inner(
            module,
            query[0, :, :at].transpose(0, 1)[:, :, None],
            keys[:at, :, :until],
            values[:at, :, :until],
            _mask_decoding(this, layout, window, query.dtype),
            **named,
        )
        outputs.append(output.transpose(0, 1))
    for number, chunk in enumerate(layout.chunks):
        rows, until = slice(chunk.row, chunk.row + 1), chunk.start + chunk.length
        output, _ = inner(
            module,
            query[:, :, at : at + chunk.length],
            keys[rows, :, :until],
            values[rows, :, :until],
            _mask_chunk(this, number, chunk, window, query),
            **named,
        )
        outputs.append(output)
        at += chunk.length
    return torch.cat(outputs, dim=1), None


def _find_inner(name: str, module: nn.Module) -> Attend:
    if name == "eager":
        eager: Attend = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    found: Attend = import_module("transformers").AttentionInterface()[name]
    return found


def _size(states: Tensor) -> tuple[int, int]:
    return states.shape[1], states.shape[3]


def _mask_decoding(this: _Pass, layout: Layout, window: int | None, dtype: torch.dtype) -> Tensor:
    """[decoding, 1, 1, longest], added to scores; the same for all layers of a window."""
    place = (None, window)
    if place not in this.masks:
        position = layout.positions[: layout.num_decoding, None]
        this.masks[place] = _hide(position, layout.longest, window, dtype)[:, None, None]
    return this.masks[place]


def _mask_chunk(
    this: _Pass, number: int, chunk: Chunk, window: int | None, query: Tensor
) -> Tensor | None:
    """[1, 1, C, keys], added to scores; None where sdpa knows by itself that it is causal."""
    until = chunk.start + chunk.length
    plain = chunk.start == 0 and (window is None or window >= until)
    if this.inner == "sdpa" and plain:
        return None
    place = (number, window)
    if place not in this.masks:
        position = torch.arange(chunk.start, until, device=query.device)[:, None]
        this.masks[place] = _hide(position, until, window, query.dtype)[None, None]
    return this.masks[place]


def _hide(position: Tensor, until: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[tokens, until]: 0 where a token of a position looks, -inf elsewhere."""
    key = torch.arange(until, device=position.device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return torch.zeros(hidden.shape, dtype=dtype, device=position.device).masked_fill_(
        hidden, float("-inf")
    )
